"""Run one example twice, to draw its picture for light and for dark pages, and keep the first run as a notebook.

`python draw.py EXAMPLE FOLDER` writes NAME-light.png, NAME-dark.png and NAME.ipynb to FOLDER, where NAME is the
example's file name without `.py`. The backgrounds of the pictures are transparent. The output of the example is printed
once.
"""

import contextlib
import io
import os
import runpy
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend
import notebooks

DARK = ["dark_background", {"axes.prop_cycle": plt.rcParams["axes.prop_cycle"]}]
"""The style of the dark picture. The colours of lines are those of the light one, so that a page can mention them."""
TRANSPARENT = {"savefig.transparent": True}


def main(example: str, folder: str) -> None:
    """Write both pictures and the notebook of an example to a folder."""
    name, example, folder = Path(example).stem, Path(example).resolve(), Path(folder).resolve()
    sys.path.insert(0, str(example.parent))
    # The notebook writes its picture to the working folder, under the name of the example.
    with tempfile.TemporaryDirectory(dir=folder) as here, contextlib.chdir(here), plt.style.context(TRANSPARENT):
        print(notebooks.printed(notebooks.make(example, folder)), end="")
        os.replace(f"{name}.png", folder / f"{name}-light.png")
    with plt.style.context([*DARK, TRANSPARENT]), contextlib.redirect_stdout(io.StringIO()):
        sys.argv[1:] = [str(folder / f"{name}-dark.png")]
        runpy.run_path(str(example), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
