"""Make the file of the glyphs dataset, ``imaml/datasets/glyphs.npz``, from the fonts of the installed matplotlib.

    python -m benchmarks.make_glyphs            # compare the file in the package with what matplotlib renders
    python -m benchmarks.make_glyphs --write    # replace it

A new file may change the dataset. Then change FINGERPRINT in imaml/datasets/glyphs.py too. A run on the former glyphs
keeps a copy of them.
"""

import argparse
import sys
from importlib.metadata import version

from imaml.datasets import glyph_fonts, glyphs
from imaml.datasets.images import ImageDataset
from imaml.storage import arrays


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the file")
    rendered = glyph_fonts.render()
    if parser.parse_args().write:
        arrays.write(glyphs.FILE, rendered, compressed=True)
        print(
            f"wrote {glyphs.FILE}, {glyphs.FILE.stat().st_size / 1e6:.2f} MB, with matplotlib {version('matplotlib')}"
        )
        print(f"fingerprint {ImageDataset.from_dictionary('glyphs', glyphs.draw_file()).fingerprint()}")
        return 0
    same = arrays.digest(rendered) == arrays.digest(arrays.read(glyphs.FILE))
    print(f"matplotlib {version('matplotlib')} renders {'the glyphs of' if same else 'other glyphs than'} the file")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
