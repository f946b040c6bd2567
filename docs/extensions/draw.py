"""Runs one example twice, once with dark ink and once with light, and lets it print what it prints.

`python draw.py EXAMPLE FOLDER` writes NAME-light.png and NAME-dark.png. Both have no background of their own.
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
import matplotlib.pyplot as plt  # after the choice of a backend

STYLES = {"dark": ["dark_background", {"axes.prop_cycle": plt.rcParams["axes.prop_cycle"]}], "light": []}
"""Lines keep their colours: text that speaks of them is right for both."""


def main(example: str, folder: str) -> None:
    # The second run computes what the first did: with its programs it is a matter of seconds.
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
