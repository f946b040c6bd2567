"""Write the reference of the command line from the help of the program itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1]
WIDTH = 80
"""Number of characters in a line of the help."""


def setup(app):
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(app):
    """Write the reference to docs/generated, where a page includes it."""
    (DOCS / "generated").mkdir(exist_ok=True)
    (DOCS / "generated" / "commandline.md").write_text(page())


def page():
    """Return one section in Markdown for each command, with its help."""
    sections = [f"### imaml {name}\n\n{_block(help_of(name))}" for name in commands(help_of())]
    return "\n".join([_block(help_of()), *sections])


def commands(text):
    """Return the names of the commands that the help of the program lists."""
    listed = re.search(r"^  COMMAND\n(.*?)(?=^\S|^$)", text, flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"^    ([a-z][\w-]*)", listed[1] if listed else "", flags=re.MULTILINE)
    if not names:
        raise RuntimeError(f"the help of imaml lists no commands:\n{text}")
    return names


def help_of(*command):
    """Return what ``imaml COMMAND --help`` prints."""
    # The package of this repository is documented, even if another one is installed. The width and colours are fixed.
    path = os.pathsep.join(filter(None, [str(DOCS.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": str(WIDTH + 2), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "imaml", *command, "--help"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"imaml {' '.join(command)} --help exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def _block(text):
    return f"````{{code-block}} text\n:class: help\n\n{text.strip()}\n````\n"
