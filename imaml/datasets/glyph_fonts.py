"""The characters of the glyphs dataset, rendered from the fonts of matplotlib and thinned to skeletons.

This module makes the file of skeletons from which :mod:`.glyphs` draws. A *face* is one character in one font. Only
``benchmarks.make_glyphs`` and tests import this module. The characters depend on the fonts of matplotlib and its
FreeType, and on the Unicode tables of Python. They do not depend on the machine, because FreeType computes in integers.
"""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imaml.datasets.glyphs import (
    FACES_AT_ONCE,
    FINE,
    LONG_SIDE,
    PICTURES_AT_ONCE,
    distances,
    draw,
    packed,
    shifts,
    starts,
)  # fmt: skip
from imaml.errors import InputError

MATPLOTLIB = "3.11.2"
"""The version of matplotlib whose fonts made the file in the package."""

TEST_SCRIPTS = ("GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "LAO", "OLD ITALIC", "COPTIC", "LISU")
TRAIN_SCRIPTS = ("LATIN", "ARABIC", "CANADIAN SYLLABICS")
# Groups of characters that belong to none of these scripts, by Unicode category. All are training classes.
SIGNS = {"N": "NUMBER", "Sm": "MATH", "Sc": "CURRENCY", "L": "LETTERLIKE"}
VARIANTS = ("<font>", "<super>", "<sub>", "<fraction>")  # tags in the Unicode decomposition of a variant

MIN_FONTS = 4
DARK = 80  # pixels above this grey level are ink; it is below 128, because hairlines are only one fine pixel wide
BLUR = 3.0  # softness of the pen, in picture pixels, for comparing characters that look alike
DISTINCT = 0.05  # characters look alike if one minus the cosine of their blurred pictures is below this
DISTINCT_ACROSS = 0.07  # the threshold for a pair of a training and a test character
LEAST_INK = 20  # least number of skeleton pixels; excludes dots and blanks


@dataclass(frozen=True)
class _Character:
    code: int
    script: str
    fonts: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.script}/U+{self.code:04X}"


def _fonts() -> list:
    """Return matplotlib's text fonts, without those that are of no use for the dataset.

    The cm fonts are left out because they are not indexed by Unicode. The display fonts would add no characters.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sans = [f"DejaVuSans{style}" for style in ("", "-Oblique", "-Bold", "-BoldOblique", "Mono", "Mono-Bold")]
    serif = [f"DejaVuSerif{style}" for style in ("", "-Italic", "-Bold", "-BoldItalic")]
    stix = [f"STIXGeneral{style}" for style in ("", "Italic", "Bol", "BolIta")]
    paths = [folder / f"{name}.ttf" for name in sans + serif + stix]
    if missing := [path.name for path in paths if not path.exists()]:
        raise InputError(f"{folder} lacks fonts of the glyphs dataset, {', '.join(missing)}: reinstall matplotlib")
    return [FT2Font(str(path)) for path in paths]


def _script(code: int) -> str | None:
    """Return the script of a character or its group in SIGNS; None if it has neither."""
    name, category = unicodedata.name(chr(code), ""), unicodedata.category(chr(code))
    for script in TRAIN_SCRIPTS + TEST_SCRIPTS:
        if category[0] in "LN" and name.removeprefix("EXTENDED ").startswith(script):
            return script
    return SIGNS.get(category) or SIGNS.get(category[0])


def _is_variant(code: int) -> bool:
    """Return True if Unicode defines the character as a variant of another one, or if it has several accents."""
    tag, *parts = unicodedata.decomposition(chr(code)).split(" ")
    same = tag in VARIANTS or (tag == "<compat>" and len(parts) == 1)  # for example, the alef symbol is the letter alef
    return same or len(unicodedata.normalize("NFD", chr(code))) > 2


def _characters(fonts: list) -> list[_Character]:
    """Return the characters that at least MIN_FONTS fonts have.

    Variants are left out. Characters that have neither a listed script nor a group in SIGNS are left out too.

    The order of the result matters: of two characters that look alike, `_distinct` keeps the one that comes first.
    """
    charmaps = [font.get_charmap() for font in fonts]
    order = ("LATIN", *TEST_SCRIPTS, *TRAIN_SCRIPTS[1:], *SIGNS.values())
    found = []
    for code in sorted(set().union(*charmaps)):
        holders = tuple(i for i, charmap in enumerate(charmaps) if charmap.get(code, 0) > 0)
        if len(holders) >= MIN_FONTS and not _is_variant(code) and (script := _script(code)):
            found.append(_Character(code, script, holders))
    return sorted(found, key=lambda character: (order.index(character.script), character.code))


def _raster(font, code: int) -> np.ndarray:
    """Render one character, centred, with its longer side LONG_SIDE; bool ``[FINE, FINE]``, all False for blanks."""
    from matplotlib.ft2font import LoadFlags

    font.set_size(FINE, 72)
    left, bottom, right, top = font.load_char(code, LoadFlags.NO_HINTING).bbox
    longest = max(right - left, top - bottom)
    if longest == 0:
        return np.zeros((FINE, FINE), bool)
    font.set_size(FINE * 64 * LONG_SIDE / longest, 72)
    glyph = font.load_char(code, LoadFlags.NO_HINTING)
    left, bottom, right, top = (side / 64 for side in glyph.bbox)
    # draw_glyph_to_bitmap adds the left bearing to x, but takes y as the top of the bitmap.
    return _canvas(font, glyph, round((FINE - left - right) / 2), round((FINE - top + bottom) / 2)) > DARK


def _canvas(font, glyph, x: int, y: int) -> np.ndarray:
    """Render the glyph in grey, uint8 ``[FINE, FINE]``."""
    canvas = np.zeros((FINE, FINE), np.uint8)
    try:
        font.draw_glyph_to_bitmap(canvas, x, y, glyph)
    except TypeError:  # matplotlib before 3.11 needs an FT2Image, which 3.11 deprecates
        from matplotlib.ft2font import FT2Image

        canvas = FT2Image(FINE, FINE)
        font.draw_glyph_to_bitmap(canvas, x, y, glyph)
    return np.asarray(canvas)


def _at_least_two(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return (a & b) | (c & d) | ((a | b) & (c | d))


def _deletable(ink: np.ndarray, second: bool) -> np.ndarray:
    """Return the mask of pixels that a half step of Guo and Hall (1989) deletes. The 8 bits of a byte are 8 images."""
    ring = [-FINE, 1 - FINE, 1, FINE + 1, FINE, FINE - 1, -1, -FINE - 1]
    n, ne, e, se, s, sw, w, nw = shifts(ink, ring)
    n_ne, ne_e, e_se, se_s, s_sw, sw_w, w_nw, nw_n = n | ne, ne | e, e | se, se | s, s | sw, sw | w, w | nw, nw | n
    a, b, c, d = ~n & ne_e, ~e & se_s, ~s & sw_w, ~w & nw_n
    one_crossing = (a ^ b ^ c ^ d) & ~((a & b) | (c & d))
    enough = _at_least_two(nw_n, ne_e, se_s, sw_w) & _at_least_two(n_ne, e_se, s_sw, w_nw)
    inside = nw_n & ne_e & se_s & sw_w & n_ne & e_se & s_sw & w_nw
    border = ~((n_ne | ~se) & e if second else (s_sw | ~nw) & w)
    return (one_crossing & enough & ~inside & border).reshape(ink.shape)


def _thin(ink: np.ndarray) -> np.ndarray:
    """Return the skeletons of the ink. Argument and result are bool ``[images, FINE, FINE]``."""
    packed = np.packbits(ink, axis=0)
    active = np.arange(len(packed))
    while len(active):
        before = after = packed[active]
        for second in (False, True):
            after = after & ~_deletable(after, second)
        packed[active] = after
        active = active[(after != before).any(axis=(1, 2))]
    return np.unpackbits(packed, axis=0, count=len(ink)).astype(bool)


def skeletons_of(fonts: list, characters: list[_Character]) -> np.ndarray:
    """Return the skeletons of every character in every font that has it, bool ``[faces, FINE, FINE]``."""
    jobs = [(fonts[font], character.code) for character in characters for font in character.fonts]
    chunks = [jobs[start : start + FACES_AT_ONCE] for start in range(0, len(jobs), FACES_AT_ONCE)]
    return np.concatenate([_thin(np.stack([_raster(*job) for job in chunk])) for chunk in chunks])


def fields_of(skeletons: np.ndarray) -> np.ndarray:
    """Return the distance field of each skeleton, uint8 ``[faces, FINE, FINE]``."""
    begins = range(0, len(skeletons), FACES_AT_ONCE)
    return np.concatenate([distances(skeletons[begin : begin + FACES_AT_ONCE]) for begin in begins])


def faces_of(characters: list[_Character]) -> np.ndarray:
    """Return the number of faces of each character."""
    return np.array([len(character.fonts) for character in characters])


def _upright(fields: np.ndarray, face: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Draw the undistorted pictures of faces, uint8 ``[images, SIDE, SIDE]``."""
    inverse = np.eye(2, dtype=np.float32)[None]
    shift, bend = np.zeros((1, 2), np.float32), np.zeros((1, 2, 1, 1), np.float32)
    return draw(fields, face, inverse, shift, bend, softness)


def _views(fields: np.ndarray, characters: list[_Character]) -> tuple[np.ndarray, np.ndarray]:
    """Return two blurred pictures of each character: the mean of its faces, and its first face.

    Both results are ``[characters, pixels]``.
    """
    begins = range(0, len(fields), PICTURES_AT_ONCE)
    pieces = [np.arange(begin, min(begin + PICTURES_AT_ONCE, len(fields))) for begin in begins]
    faces = np.concatenate([_upright(fields, piece, BLUR).reshape(len(piece), -1) for piece in pieces])
    first = starts(faces_of(characters))
    sums = np.add.reduceat(faces, first, dtype=np.int64)
    counts = np.array([[len(character.fonts)] for character in characters])
    return (sums // counts).astype(np.float64), faces[first].astype(np.float64)


def _distance_matrix(pictures: np.ndarray) -> np.ndarray:
    """Return one minus the cosine between rows. The rows hold integers, so float64 sums are exact in any order."""
    gram = pictures @ pictures.T
    lengths = np.sqrt(np.maximum(np.diag(gram), 1))
    gram /= lengths[:, None] * lengths
    return np.subtract(1, gram, out=gram)


def _alike(views: tuple[np.ndarray, np.ndarray], held_out: np.ndarray) -> np.ndarray:
    """Return the mask of pairs that look alike in either view.

    The threshold is higher for pairs of a training and a test character.
    """
    least = np.where(held_out[:, None] == held_out, DISTINCT, DISTINCT_ACROSS)
    return np.minimum(*map(_distance_matrix, views)) < least


def _distinct(alike: np.ndarray) -> np.ndarray:
    """Return True for each character that looks like no kept character before it, bool ``[characters]``."""
    keep = np.ones(len(alike), bool)
    for row in range(len(alike)):
        if keep[row]:
            keep[row + 1 :] &= ~alike[row, row + 1 :]
    return keep


def _chosen(fields: np.ndarray, characters: list[_Character], held_out: np.ndarray) -> np.ndarray:
    """Return True for the characters that become classes, bool ``[characters]``: neither dots nor look-alikes."""
    ink = np.minimum.reduceat(np.count_nonzero(fields == 0, axis=(1, 2)), starts(faces_of(characters)))
    return _distinct(_alike(_views(fields, characters), held_out)) & (ink >= LEAST_INK)


def _held_out(characters: list[_Character]) -> np.ndarray:
    return np.array([character.script in TEST_SCRIPTS for character in characters])


def render() -> dict[str, np.ndarray]:
    """Return the arrays of the file in the package, from the fonts of the installed matplotlib.

    The classes of each split are sorted by label.

    Raises:
        InputError: if matplotlib's fonts are missing.
    """
    fonts = _fonts()
    characters = _characters(fonts)
    skeletons, held_out = skeletons_of(fonts, characters), _held_out(characters)
    chosen, first = _chosen(fields_of(skeletons), characters, held_out), starts(faces_of(characters))
    order = [
        index
        for mask in (chosen & ~held_out, chosen & held_out)
        for index in sorted(np.flatnonzero(mask), key=lambda index: characters[index].label)
    ]
    classes = [characters[index] for index in order]
    faces = np.concatenate([np.arange(first[index], first[index] + len(characters[index].fonts)) for index in order])
    training = int((chosen & ~held_out).sum())
    return packed(skeletons[faces], faces_of(classes), [character.label for character in classes], training)
