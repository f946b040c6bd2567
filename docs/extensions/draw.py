"""Run one example twice, to draw its picture for light and for dark pages.

`python draw.py EXAMPLE FOLDER` writes NAME-light.png and NAME-dark.png to FOLDER, where NAME is the example's file name
without `.py`. The backgrounds are transparent. The output of the example is printed once.
"""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend

STYLES = {"dark": ["dark_background", {"axes.prop_cycle": plt.rcParams["axes.prop_cycle"]}], "light": []}
"""Styles of matplotlib for both pictures. The colours of lines are the same, so that a page can mention them."""


def main(example: str, folder: str) -> None:
    """Write both pictures of an example to a folder."""
    # Both runs compile the same programs. With the cache, the second run need not compile them again.
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    sys.path.insert(0, str(Path(example).parent))
    for name, style in STYLES.items():
        quiet = contextlib.redirect_stdout(io.StringIO()) if name == "dark" else contextlib.nullcontext()
        with plt.style.context([*style, {"savefig.transparent": True}]), quiet:
            sys.argv[1:] = [os.path.join(folder, f"{Path(example).stem}-{name}.png")]
            runpy.run_path(example, run_name="__main__")
        plt.close("all")


if __name__ == "__main__":
    main(*sys.argv[1:])
