"""Run the examples during the build of the site, and write their pictures and their output to docs/generated.

An example runs only if its file, `draw.py` or one of the packages has changed since the example's last run.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.display import status_iterator

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
PICTURES = DOCS / "generated"
DRAW = Path(__file__).with_name("draw.py")
logger = logging.getLogger(__name__)


def setup(app):
    app.connect("builder-inited", run_examples)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def run_examples(app):
    """Write the pictures, the output and the digest of every example whose inputs have changed."""
    PICTURES.mkdir(exist_ok=True)
    library = digest(*sorted(path for package in ("bilevel", "imaml") for path in (ROOT / package).rglob("*.py")))
    stale = [path for path in examples() if not is_drawn(path, library)]
    for path in status_iterator(stale, "running examples… ", "brown", len(stale), app.verbosity, lambda p: p.stem):
        printed = run(path)
        (PICTURES / f"{path.stem}.txt").write_text(printed)
        (PICTURES / f"{path.stem}.digest").write_text(digest(path, DRAW) + library)


def examples():
    return sorted((ROOT / "examples").glob("*.py"))


def is_drawn(path, library):
    """Return True if the example was drawn with its present file, `draw.py`, and the library of the given digest."""
    stamp = PICTURES / f"{path.stem}.digest"
    return stamp.exists() and stamp.read_text() == digest(path, DRAW) + library


def run(path):
    """Write both pictures of an example to PICTURES, and return the printed output of the example."""
    command = [sys.executable, str(DRAW), str(path), str(PICTURES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExtensionError(f"{path.name} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def digest(*paths):
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()
