"""Glyphs: a few-shot dataset rendered from the fonts of matplotlib, so that no download is needed.

The dataset replaces Omniglot on machines without a network. It has about two thousand characters with twenty 28x28
samples each. The test classes come from scripts without training classes. Fonts are more regular than handwriting, so
each sample is made in three steps. First, a character in one of its fonts is thinned to a skeleton, which removes the
stroke width of the font. Then the skeleton is bent, rotated and scaled at random. Finally, a soft pen two pixels wide
draws along the skeleton.

Checkpoints store the dataset's fingerprint, so the pixels must be bit for bit the same on every machine. FreeType
computes in integers. The random distortions are rounded to a grid. Matrix products and sums have integer terms, so
floats hold each partial sum exactly. All other operations are elementwise and correctly rounded by IEEE 754.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from imaml.datasets.cache import cached
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.errors import InputError

VERSION = 1  # part of the name of the cache entry: increase it with every change that alters a pixel
SEED = 20190910
SAMPLES = 20
SIDE = 28
TRAIN_CLASSES = 1463  # with the fonts of current matplotlib; `load` passes this many blank classes to `meanwhile`

TEST_SCRIPTS = ("GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "LAO", "OLD ITALIC", "COPTIC", "LISU")
TRAIN_SCRIPTS = ("LATIN", "ARABIC", "CANADIAN SYLLABICS")
# Groups of characters that belong to none of these scripts, by Unicode category. All are training classes.
SIGNS = {"N": "NUMBER", "Sm": "MATH", "Sc": "CURRENCY", "L": "LETTERLIKE"}
VARIANTS = ("<font>", "<super>", "<sub>", "<fraction>")  # tags in the Unicode decomposition of a variant

# Standard deviations of a sample's distortion. Lengths are in half image sides (14 pixels); the two axes have
# independent scales. With these values, nearest neighbours on pixels are about as accurate as on Omniglot; see
# test_pixel_nearest_neighbours_are_as_accurate_as_on_omniglot.
ROTATION, LOG_SCALE, SHEAR, SHIFT, ELASTIC = 0.13, 0.15, 0.12, 0.11, 0.065

MIN_FONTS = 4
FINE = 64  # side in pixels of the fine canvas, on which a character is thinned
LONG_SIDE = 48  # length in fine pixels of the longer side of a character
INK_SIDE = 19  # length in picture pixels of the character's longer side before distortion
MAGNIFICATION = LONG_SIDE / INK_SIDE
DARK = 80  # pixels with a higher grey level are ink; less than 128, because hairlines are only one fine pixel wide
REACH = 8  # distances are exact up to this number of fine pixels, the width of the empty margin around a character
PER_PIXEL = 28  # units of a stored distance per fine pixel; 255 / 28 exceeds REACH
PEN_RADIUS = 1.0  # in picture pixels
BLUR = 3.0  # softness of the pen, in picture pixels, for comparing characters that look alike
DISTINCT = 0.05  # characters look alike if one minus the cosine of their blurred pictures is below this
DISTINCT_ACROSS = 0.07  # the same threshold for a training and a test character
LEAST_INK = 20  # least number of skeleton pixels; excludes dots and blanks
SHRINK = np.float32(0.875)  # factor on the distortion, applied until the ink stays inside the picture
GRID = 2.0**-12  # grid to which the distortions are rounded
FACES_AT_ONCE, PICTURES_AT_ONCE = 64, 240  # batch sizes whose temporaries fit into the processor's cache


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
    """Return the script of a character or its group in SIGNS, or None if it belongs to neither."""
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

    Variants are left out, and so are characters that have neither a listed script nor a group in SIGNS.

    Of two characters that look alike, `_distinct` keeps the one that comes first in the returned list.
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
    """Render a character, centred, LONG_SIDE pixels on its longer side; bool ``[FINE, FINE]``, all False for blanks."""
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
    except TypeError:  # matplotlib before 3.11 needs an FT2Image; later versions deprecate it
        from matplotlib.ft2font import FT2Image

        canvas = FT2Image(FINE, FINE)
        font.draw_glyph_to_bitmap(canvas, x, y, glyph)
    return np.asarray(canvas)


def _shifts(images: np.ndarray, offsets: list[int]) -> list[np.ndarray]:
    """Return the flattened images, shifted by each offset. An offset of 1 is one column, and an offset of FINE one row.

    The results share memory. A shift across an edge reads from the next row or image, whose margin is empty too.
    """
    reach = max(map(abs, offsets))
    padded = np.pad(images.reshape(-1), reach, mode="edge")
    return [padded[reach + offset : reach + offset + images.size] for offset in offsets]


def _at_least_two(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return (a & b) | (c & d) | ((a | b) & (c | d))


def _deletable(ink: np.ndarray, second: bool) -> np.ndarray:
    """Return the mask of pixels that a half step of Guo and Hall (1989) deletes. The 8 bits of a byte are 8 images."""
    ring = [-FINE, 1 - FINE, 1, FINE + 1, FINE, FINE - 1, -1, -FINE - 1]
    n, ne, e, se, s, sw, w, nw = _shifts(ink, ring)
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


def _distances(skeleton: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the skeleton in its image, in units of 1/PER_PIXEL fine pixels, as uint8."""
    squared = np.where(skeleton, 0, (REACH + 1) ** 2).astype(np.uint8)
    for stride in (FINE, 1):  # the squared distance separates into columns and rows
        nearest = squared.reshape(-1).copy()
        steps = [step for step in range(-REACH, REACH + 1) if step]
        for step, shifted in zip(steps, _shifts(squared, [stride * step for step in steps]), strict=True):
            np.minimum(nearest, shifted + np.uint8(step * step), out=nearest)
        squared = nearest.reshape(skeleton.shape)
    table = np.minimum(np.round(np.sqrt(np.arange(256)) * PER_PIXEL), 255).astype(np.uint8)
    return table[squared]


def _fields(fonts: list, characters: list[_Character]) -> np.ndarray:
    """Return the distance field of each face, a character in one of its fonts, as uint8 ``[faces, FINE, FINE]``."""
    jobs = [(fonts[font], character.code) for character in characters for font in character.fonts]
    chunks = [jobs[start : start + FACES_AT_ONCE] for start in range(0, len(jobs), FACES_AT_ONCE)]
    return np.concatenate([_distances(_thin(np.stack([_raster(*job) for job in chunk]))) for chunk in chunks])


def _bilinear(fields: np.ndarray, face: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate ``fields[face]`` linearly at the fine pixels x, y.

    ``face`` is ``[images]``. The arrays x, y and the result are ``[images, SIDE, SIDE]``.
    """
    x, y = np.clip(x, 0, FINE - 1.001), np.clip(y, 0, FINE - 1.001)
    column, row = x.astype(np.int32), y.astype(np.int32)
    corner = face.astype(np.intp)[:, None, None] * (FINE * FINE) + (row * FINE + column)
    x, y, flat = x - column, y - row, fields.reshape(-1)

    # The coordinates are already clipped, so mode="clip" changes no index; it is faster than numpy's bounds check.
    def between(left):
        return left.take(corner, mode="clip") * (1 - x) + left[1:].take(corner, mode="clip") * x

    return between(flat) * (1 - y) + between(flat[FINE:]) * y


def _draw(fields: np.ndarray, face: np.ndarray, inverse, shift, bend, softness: float = 1.0) -> np.ndarray:
    """Draw pen strokes along distorted skeletons, uint8 ``[images, SIDE, SIDE]``.

    ``inverse`` ``[images, 2, 2]`` maps picture coordinates to coordinates of the undistorted character. ``shift``
    ``[images, 2]`` and ``bend`` ``[images, 2, SIDE, SIDE]`` are in picture pixels. All are float32 with x before y, and
    broadcast over images.
    """
    grid = np.arange(SIDE, dtype=np.float32) - np.float32((SIDE - 1) / 2)
    u, v = grid[None, None, :] - shift[:, 0, None, None], grid[None, :, None] - shift[:, 1, None, None]
    x, y = (inverse[:, i, 0, None, None] * u + inverse[:, i, 1, None, None] * v + bend[:, i] for i in (0, 1))
    scale, middle = np.float32(MAGNIFICATION), np.float32((FINE - 1) / 2)
    distance = _bilinear(fields, face, x * scale + middle, y * scale + middle)
    area = inverse[:, 0, 0] * inverse[:, 1, 1] - inverse[:, 0, 1] * inverse[:, 1, 0]
    pixels = distance / (np.sqrt(area)[:, None, None] * np.float32(PER_PIXEL * MAGNIFICATION))
    ink = np.clip((np.float32(PEN_RADIUS) - pixels) / np.float32(softness) + np.float32(0.5), 0, 1)
    return (ink * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _upright(fields: np.ndarray, face: np.ndarray, softness: float = 1.0) -> np.ndarray:
    """Draw the undistorted pictures of faces, uint8 ``[images, SIDE, SIDE]``."""
    inverse = np.eye(2, dtype=np.float32)[None]
    shift, bend = np.zeros((1, 2), np.float32), np.zeros((1, 2, 1, 1), np.float32)
    return _draw(fields, face, inverse, shift, bend, softness)


def _starts(characters: list[_Character]) -> np.ndarray:
    """Return the index of each character's first face among all faces, ``[characters]``."""
    return np.cumsum([0] + [len(character.fonts) for character in characters[:-1]])


def _views(fields: np.ndarray, characters: list[_Character]) -> tuple[np.ndarray, np.ndarray]:
    """Return two blurred pictures of each character: the mean of its faces, and its first face.

    Both results are ``[characters, pixels]``.
    """
    begins = range(0, len(fields), PICTURES_AT_ONCE)
    pieces = [np.arange(begin, min(begin + PICTURES_AT_ONCE, len(fields))) for begin in begins]
    faces = np.concatenate([_upright(fields, piece, BLUR).reshape(len(piece), -1) for piece in pieces])
    starts = _starts(characters)
    sums = np.add.reduceat(faces, starts, dtype=np.int64)
    counts = np.array([[len(character.fonts)] for character in characters])
    return (sums // counts).astype(np.float64), faces[starts].astype(np.float64)


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


def _on_grid(numbers: np.ndarray) -> np.ndarray:
    """Round to GRID. The last bits of a cosine or exponential differ between machines; GRID is far coarser."""
    return (np.round(numbers / GRID) * GRID).astype(np.float32)


def _affine(normal: np.ndarray) -> np.ndarray:
    """Return matrices ``[samples, 2, 2]`` of rotation, shear and two scales from normals ``[samples, 4]``."""
    angle, shear = ROTATION * normal[:, 0], SHEAR * normal[:, 1]
    wide, high = np.exp(LOG_SCALE * normal[:, 2]), np.exp(LOG_SCALE * normal[:, 3])
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos * wide, (cos * shear - sin) * high], [sin * wide, (sin * shear + cos) * high]]
    return np.moveaxis(np.array(rows), -1, 0)


def _bend(normal: np.ndarray) -> np.ndarray:
    """Return smooth displacements in pixels, ``[samples, 2, SIDE, SIDE]``, from normals ``[samples, 2, 4, 4]``.

    Cosine bells interpolate between the knots. The factors are rounded to integers, so the matrix products are exact.
    """
    knots = normal.shape[-1]
    place = np.arange(SIDE)[:, None] * (knots - 1) / (SIDE - 1) - np.arange(knots)
    bells = np.round(64 * np.where(abs(place) < 1, (1 + np.cos(np.pi * place)) / 2, 0))
    fine = bells @ np.round(normal * (256 * ELASTIC * SIDE / 2)) @ bells.T
    return (fine / (64 * 64 * 256)).astype(np.float32)


def _samples(fields: np.ndarray, first_face: int, character: _Character) -> tuple[np.ndarray, ...]:
    """Return the arguments of `_draw` for SAMPLES pictures of a character, from that character's own random stream."""
    random = np.random.Generator(np.random.PCG64([SEED, character.code]))
    faces = random.permutation(len(character.fonts))
    face = first_face + faces[np.arange(SAMPLES) % len(faces)]
    normal = np.clip(random.standard_normal((SAMPLES, 6)), -2, 2)
    matrix = _affine(normal[:, :4])
    shift = SHIFT * SIDE / 2 * normal[:, 4:]
    bend = _bend(random.standard_normal((SAMPLES, 2, 4, 4)))
    return face, _on_grid(np.linalg.inv(matrix)), _on_grid(shift), bend


def _draw_inside(fields: np.ndarray, face: np.ndarray, inverse, shift, bend) -> np.ndarray:
    """Draw like `_draw`, but reduce a distortion until the ink does not touch the edge. Undistorted ink never does."""
    pictures = np.empty((len(face), SIDE, SIDE), np.uint8)
    upright = np.eye(2, dtype=np.float32)
    redo = np.arange(len(face))
    while len(redo):
        pictures[redo] = _draw(fields, face[redo], inverse[redo], shift[redo], bend[redo])
        redo = redo[_touches_edge(pictures[redo])]
        inverse[redo] = upright + (inverse[redo] - upright) * SHRINK
        shift[redo], bend[redo] = shift[redo] * SHRINK, bend[redo] * SHRINK
    return pictures


def _touches_edge(pictures: np.ndarray) -> np.ndarray:
    edges = np.concatenate([pictures[:, [0, -1]], pictures[:, :, [0, -1]].swapaxes(1, 2)], axis=1)
    return edges.max(axis=(1, 2)) > 0


def _pictures(fields: np.ndarray, characters: list[_Character], starts: np.ndarray) -> np.ndarray:
    """Draw the samples of each character, uint8 ``[characters, SAMPLES, SIDE, SIDE, 1]``."""
    drawn = []
    at_once = PICTURES_AT_ONCE // SAMPLES
    for begin in range(0, len(characters), at_once):
        chunk = zip(starts[begin : begin + at_once], characters[begin : begin + at_once], strict=True)
        samples = [_samples(fields, start, character) for start, character in chunk]
        drawn.append(_draw_inside(fields, *(np.concatenate(part) for part in zip(*samples, strict=True))))
    return np.concatenate(drawn).reshape(len(characters), SAMPLES, SIDE, SIDE, 1)


def _chosen(fields: np.ndarray, characters: list[_Character], held_out: np.ndarray) -> np.ndarray:
    """Return True for the characters that become classes, bool ``[characters]``: neither dots nor look-alikes."""
    ink = np.minimum.reduceat(np.count_nonzero(fields == 0, axis=(1, 2)), _starts(characters))
    return _distinct(_alike(_views(fields, characters), held_out)) & (ink >= LEAST_INK)


def _held_out(characters: list[_Character]) -> np.ndarray:
    return np.array([character.script in TEST_SCRIPTS for character in characters])


def _build() -> dict[str, np.ndarray]:
    """Return pixels and labels of both splits, with classes sorted by label."""
    fonts = _fonts()
    characters = _characters(fonts)
    fields, starts, held_out = _fields(fonts, characters), _starts(characters), _held_out(characters)
    chosen = _chosen(fields, characters, held_out)
    arrays = {}
    for split, mask in (("train", chosen & ~held_out), ("test", chosen & held_out)):
        order = sorted(np.flatnonzero(mask), key=lambda index: characters[index].label)
        classes = [characters[index] for index in order]
        arrays[f"{split}_pixels"] = _pictures(fields, classes, starts[order])
        arrays[f"{split}_labels"] = np.array([character.label for character in classes])
    return arrays


def load(meanwhile: Callable[[ImageClasses], None] = lambda training: None) -> ImageDataset:
    """Return the dataset. The first call renders it in about 7 seconds; later calls read it from the cache.

    Both splits are uint8 ``[classes, 20, 28, 28, 1]`` with ink 255 and paper 0, and labels such as
    ``"ARMENIAN/U+0531"``. The pixels depend on this module, on the fonts of matplotlib and its FreeType, on the
    random streams of NumPy, and on the Unicode tables of Python.

    Args:
        meanwhile: a function of one argument: blank classes in the shape of the training classes. It is called just
            before the glyphs are rendered, and may start a thread that works during the rendering. It is not called if
            the dataset is in the cache.

    Raises:
        InputError: if matplotlib's fonts are missing.
    """

    def build():
        meanwhile(ImageClasses.blank(TRAIN_CLASSES, SAMPLES, SIDE, SIDE, 1))
        return _build()

    arrays = cached(f"glyphs-{VERSION}-matplotlib-{version('matplotlib')}", build)
    return ImageDataset.from_dictionary("glyphs", arrays)
