"""Run the examples and the introductions during the build of the site; show an example by the directive `example`.

The pictures, the outputs and the notebooks are written to docs/generated. A source runs only if its file, the programs
that run it, or one of the packages has changed since its last run.
"""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from docutils.parsers.rst import directives
from sphinx.errors import ExtensionError
from sphinx.util.display import status_iterator
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
DRAW, NOTEBOOKS = (Path(__file__).with_name(name) for name in ("draw.py", "notebooks.py"))

AT_ONCE = 2
"""The number of programs that run at the same time."""


def setup(app):
    app.connect("builder-inited", run_sources)
    app.add_directive("example", Example)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def run_sources(app):
    """Write the pictures, the output, the notebook and the digest of every source whose inputs have changed."""
    GENERATED.mkdir(exist_ok=True)
    library = digest(*sorted(path for package in ("bilevel", "imaml") for path in (ROOT / package).rglob("*.py")))
    stale = [path for path in sources() if not is_made(path, library)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = zip(stale, pool.map(run, stale), strict=True)
        for path, output in status_iterator(done, "running… ", "brown", len(stale), app.verbosity, lambda d: d[0].stem):
            (GENERATED / f"{path.stem}.txt").write_text(output)
            (GENERATED / f"{path.stem}.digest").write_text(digest(path, DRAW, NOTEBOOKS) + library)


def sources():
    """Return the paths of the examples and of the introductions."""
    return sorted((ROOT / "examples").glob("*.py")) + sorted((DOCS / "start").glob("*.md"))


def is_made(path, library):
    """Return True if a source ran with its present file, the present programs, and the library of the given digest."""
    stamp = GENERATED / f"{path.stem}.digest"
    made = (GENERATED / f"{path.stem}.ipynb").exists() and stamp.exists()
    return made and stamp.read_text() == digest(path, DRAW, NOTEBOOKS) + library


def run(path):
    """Run one source, write its files to docs/generated, and return its printed output."""
    program = DRAW if path.suffix == ".py" else NOTEBOOKS
    command = [sys.executable, str(program), str(path), str(GENERATED)]
    # The light and the dark run of an example compile the same programs, so the second run takes them from a cache.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(GENERATED / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | cache)
    if done.returncode:
        raise ExtensionError(f"{path.name} exited with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def digest(*paths):
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


class Example(SphinxDirective):
    """Show an example: both pictures, the printed output, the code in a fold, and the file and notebook to download.

    The argument is the example's name. The option `alt` describes the picture.
    """

    required_arguments = 1
    option_spec: ClassVar = {"alt": directives.unchanged_required}

    def run(self):
        return self.parse_text_to_nodes(shown(self.arguments[0], self.options["alt"]))


def shown(name, alt):
    """Return the Markdown that shows an example."""
    pictures = [
        f"```{{image}} generated/{name}-{mode}.png\n:class: only-{mode}\n:alt: {alt}\n```\n"
        for mode in ("light", "dark")
    ]
    output = f"```{{literalinclude}} generated/{name}.txt\n:language: text\n```\n"
    code = f"```{{literalinclude}} ../examples/{name}.py\n:language: python\n```\n"
    fold = f"<details>\n<summary>{name}.py</summary>\n\n{code}\n</details>\n"
    files = f"Download {{download}}`{name}.py <../examples/{name}.py>` or "
    files += f"{{download}}`the notebook <generated/{name}.ipynb>`.\n"
    return "\n".join([*pictures, output, files, fold])
