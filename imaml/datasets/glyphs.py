"""Glyphs: a few-shot dataset that is drawn, not downloaded, from the fonts that matplotlib carries.

It stands in for Omniglot where nothing can be fetched: some two thousand characters of many scripts, twenty
28x28 samples each, whole scripts held out for test. A font is too regular to be handwriting, so every character
goes through three steps. It is thinned to a skeleton, which takes the weight of the face away; a sample bends,
turns and scales the skeleton of one of the character's faces; a soft pen of two pixels draws the result.

Equal bits on every machine are part of the promise, because checkpoints carry the dataset's fingerprint. FreeType
works in integers; random numbers are rounded to a grid before they are used; sums of products are sums of
integers, which floats hold exactly in any order; the rest is elementwise and rounded as IEEE 754 demands.
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

VERSION = 1  # part of the cache's name: raise it with every change of a pixel
SEED = 20190910
SAMPLES = 20
SIDE = 28
TRAIN_CLASSES = 1463  # with the fonts of today's matplotlib: what is begun while they are drawn relies on it

TEST_SCRIPTS = ("GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN", "HEBREW", "LAO", "OLD ITALIC", "COPTIC", "LISU")
TRAIN_SCRIPTS = ("LATIN", "ARABIC", "CANADIAN SYLLABICS")
# What belongs to no script above, by Unicode category; all of it for training.
SIGNS = {"N": "NUMBER", "Sm": "MATH", "Sc": "CURRENCY", "L": "LETTERLIKE"}
VARIANTS = ("<font>", "<super>", "<sub>", "<fraction>")

# Standard deviations of a sample's distortion; lengths in half image sides (14 pixels), each axis with its own scale.
# In these units nearest neighbours on pixels do about as well as on Omniglot, which a test measures.
ROTATION, LOG_SCALE, SHEAR, SHIFT, ELASTIC = 0.13, 0.15, 0.12, 0.11, 0.065

MIN_FONTS = 4
FINE = 64  # pixels of the canvas on which a character is thinned
LONG_SIDE = 48  # of which its longer side fills these many ...
INK_SIDE = 19  # ... and these many of the 28 in the picture, before distortion
MAGNIFICATION = LONG_SIDE / INK_SIDE
DARK = 80  # grey level of ink, below one half: the serif faces' hairlines are about a fine pixel wide
REACH = 8  # fine pixels around the skeleton in which its distance is known: the margin, so that nothing wraps around
PER_PIXEL = 28  # steps of a distance in a fine pixel, as uint8
PEN_RADIUS = 1.0  # in pixels of the picture
BLUR = 3.0  # softness of the pen, in pixels, with which look-alikes are compared
DISTINCT = 0.05  # one minus the cosine between two characters' blurred pictures, below which they look alike
DISTINCT_ACROSS = 0.07  # the same where one is for training and one for test
LEAST_INK = 20  # skeleton pixels; a dot has fewer, and so has a blank
CALMER = np.float32(0.875)  # step in which the distortion of a picture that would leave its frame is made less
GRID = 2.0**-12  # what the random numbers decide is rounded to it
FACES_AT_ONCE, PICTURES_AT_ONCE = 64, 240  # so few that what is made of them stays in the processor's cache


@dataclass(frozen=True)
class _Character:
    code: int
    script: str
    fonts: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.script}/U+{self.code:04X}"


def _fonts() -> list:
    """The text faces; the cm fonts' code points are not Unicode, the display faces repeat a few of these signs."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    sans = [f"DejaVuSans{style}" for style in ("", "-Oblique", "-Bold", "-BoldOblique", "Mono", "Mono-Bold")]
    serif = [f"DejaVuSerif{style}" for style in ("", "-Italic", "-Bold", "-BoldItalic")]
    stix = [f"STIXGeneral{style}" for style in ("", "Italic", "Bol", "BolIta")]
    paths = [folder / f"{name}.ttf" for name in sans + serif + stix]
    if missing := [path.name for path in paths if not path.exists()]:
        raise InputError(f"{folder} lacks fonts that glyphs is drawn from, {', '.join(missing)}: reinstall matplotlib")
    return [FT2Font(str(path)) for path in paths]


def _script(code: int) -> str | None:
    """The character's script, or the group of signs it belongs to; None where it belongs to neither."""
    name, category = unicodedata.name(chr(code), ""), unicodedata.category(chr(code))
    for script in TRAIN_SCRIPTS + TEST_SCRIPTS:
        if category[0] in "LN" and name.removeprefix("EXTENDED ").startswith(script):
            return script
    return SIGNS.get(category) or SIGNS.get(category[0])


def _is_variant(code: int) -> bool:
    """Whether Unicode itself calls it another character in another dress, or it bears more than one accent."""
    tag, *parts = unicodedata.decomposition(chr(code)).split(" ")
    same = tag in VARIANTS or (tag == "<compat>" and len(parts) == 1)  # the alef symbol is the letter alef
    return same or len(unicodedata.normalize("NFD", chr(code))) > 2


def _characters(fonts: list) -> list[_Character]:
    """Characters that enough fonts hold, scripts before signs: of two look-alikes the first is kept."""
    charmaps = [font.get_charmap() for font in fonts]
    order = ("LATIN", *TEST_SCRIPTS, *TRAIN_SCRIPTS[1:], *SIGNS.values())
    found = []
    for code in sorted(set().union(*charmaps)):
        holders = tuple(i for i, charmap in enumerate(charmaps) if charmap.get(code, 0) > 0)
        if len(holders) >= MIN_FONTS and not _is_variant(code) and (script := _script(code)):
            found.append(_Character(code, script, holders))
    return sorted(found, key=lambda character: (order.index(character.script), character.code))


def _raster(font, code: int) -> np.ndarray:
    """One character, bool ``[FINE, FINE]``: its longer side LONG_SIDE, centred; empty where the font draws nothing."""
    from matplotlib.ft2font import LoadFlags

    font.set_size(FINE, 72)
    left, bottom, right, top = font.load_char(code, LoadFlags.NO_HINTING).bbox
    longest = max(right - left, top - bottom)
    if longest == 0:
        return np.zeros((FINE, FINE), bool)
    font.set_size(FINE * 64 * LONG_SIDE / longest, 72)
    glyph = font.load_char(code, LoadFlags.NO_HINTING)
    left, bottom, right, top = (side / 64 for side in glyph.bbox)
    # The call adds the left bearing by itself, but takes y for the top of the bitmap.
    return _canvas(font, glyph, round((FINE - left - right) / 2), round((FINE - top + bottom) / 2)) > DARK


def _canvas(font, glyph, x: int, y: int) -> np.ndarray:
    """The glyph in grey, uint8 ``[FINE, FINE]``."""
    canvas = np.zeros((FINE, FINE), np.uint8)
    try:
        font.draw_glyph_to_bitmap(canvas, x, y, glyph)
    except TypeError:  # before matplotlib 3.11, which deprecates this class
        from matplotlib.ft2font import FT2Image

        canvas = FT2Image(FINE, FINE)
        font.draw_glyph_to_bitmap(canvas, x, y, glyph)
    return np.asarray(canvas)


def _shifts(images: np.ndarray, offsets: list[int]) -> list[np.ndarray]:
    """Flat views of the images with each pixel's neighbour in its place; FINE is one row, 1 is one column.

    No pixel is copied. What lies beyond an edge comes from the next row or image, whose margin is empty as well.
    """
    reach = max(map(abs, offsets))
    padded = np.pad(images.reshape(-1), reach, mode="edge")
    return [padded[reach + offset : reach + offset + images.size] for offset in offsets]


def _two_of(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return (a & b) | (c & d) | ((a | b) & (c | d))


def _deletable(ink: np.ndarray, second: bool) -> np.ndarray:
    """The pixels that a half step of Guo and Hall (1989) takes away, for the 8 images in the bits of each byte."""
    ring = [-FINE, 1 - FINE, 1, FINE + 1, FINE, FINE - 1, -1, -FINE - 1]
    n, ne, e, se, s, sw, w, nw = _shifts(ink, ring)
    n_ne, ne_e, e_se, se_s, s_sw, sw_w, w_nw, nw_n = n | ne, ne | e, e | se, se | s, s | sw, sw | w, w | nw, nw | n
    a, b, c, d = ~n & ne_e, ~e & se_s, ~s & sw_w, ~w & nw_n
    one_crossing = (a ^ b ^ c ^ d) & ~((a & b) | (c & d))
    enough = _two_of(nw_n, ne_e, se_s, sw_w) & _two_of(n_ne, e_se, s_sw, w_nw)
    inside = nw_n & ne_e & se_s & sw_w & n_ne & e_se & s_sw & w_nw
    border = ~((n_ne | ~se) & e if second else (s_sw | ~nw) & w)
    return (one_crossing & enough & ~inside & border).reshape(ink.shape)


def _thin(ink: np.ndarray) -> np.ndarray:
    """Skeletons of bool ``[images, FINE, FINE]``."""
    packed = np.packbits(ink, axis=0)
    left = np.arange(len(packed))
    while len(left):
        before = after = packed[left]
        for second in (False, True):
            after = after & ~_deletable(after, second)
        packed[left] = after
        left = left[(after != before).any(axis=(1, 2))]
    return np.unpackbits(packed, axis=0, count=len(ink)).astype(bool)


def _distances(skeleton: np.ndarray) -> np.ndarray:
    """Distance to the skeleton in 1/PER_PIXEL fine pixels, capped: uint8 ``[images, FINE, FINE]``."""
    squared = np.where(skeleton, 0, (REACH + 1) ** 2).astype(np.uint8)
    for stride in (FINE, 1):  # a squared distance is the sum of its squares along columns and rows
        nearest = squared.reshape(-1).copy()
        steps = [step for step in range(-REACH, REACH + 1) if step]
        for step, shifted in zip(steps, _shifts(squared, [stride * step for step in steps]), strict=True):
            np.minimum(nearest, shifted + np.uint8(step * step), out=nearest)
        squared = nearest.reshape(skeleton.shape)
    table = np.minimum(np.round(np.sqrt(np.arange(256)) * PER_PIXEL), 255).astype(np.uint8)
    return table[squared]


def _fields(fonts: list, characters: list[_Character]) -> np.ndarray:
    """Distance fields of every face of every character, one after the other."""
    jobs = [(fonts[font], character.code) for character in characters for font in character.fonts]
    chunks = [jobs[start : start + FACES_AT_ONCE] for start in range(0, len(jobs), FACES_AT_ONCE)]
    return np.concatenate([_distances(_thin(np.stack([_raster(*job) for job in chunk]))) for chunk in chunks])


def _bilinear(fields: np.ndarray, face: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``fields[face]`` at fine pixels x, y, ``[images, SIDE, SIDE]``."""
    x, y = np.clip(x, 0, FINE - 1.001), np.clip(y, 0, FINE - 1.001)
    column, row = x.astype(np.int32), y.astype(np.int32)
    corner = face.astype(np.intp)[:, None, None] * (FINE * FINE) + (row * FINE + column)
    x, y, flat = x - column, y - row, fields.reshape(-1)

    def between(left):  # neighbours in a row; 'clip' is quicker than a check of what is clipped above
        return left.take(corner, mode="clip") * (1 - x) + left[1:].take(corner, mode="clip") * x

    return between(flat) * (1 - y) + between(flat[FINE:]) * y


def _draw(fields: np.ndarray, face: np.ndarray, inverse, shift, bend, softness: float = 1.0) -> np.ndarray:
    """Pen strokes along distorted skeletons, uint8 ``[images, SIDE, SIDE]``.

    ``inverse`` ``[images, 2, 2]`` leads from the picture back to the upright character, ``shift`` ``[images, 2]`` and
    ``bend`` ``[images, 2, SIDE, SIDE]`` are in pixels of the picture; all float32, x before y. One may stand for all.
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
    """The undistorted pictures of faces, uint8 ``[images, SIDE, SIDE]``."""
    inverse = np.eye(2, dtype=np.float32)[None]  # the same for all
    shift, bend = np.zeros((1, 2), np.float32), np.zeros((1, 2, 1, 1), np.float32)
    return _draw(fields, face, inverse, shift, bend, softness)


def _starts(characters: list[_Character]) -> np.ndarray:
    """Where each character's faces begin among all faces, ``[characters]``."""
    return np.cumsum([0] + [len(character.fonts) for character in characters[:-1]])


def _views(fields: np.ndarray, characters: list[_Character]) -> tuple[np.ndarray, np.ndarray]:
    """Two blurred pictures of each character, ``[characters, pixels]``: the mean of its faces, and its first face."""
    begins = range(0, len(fields), PICTURES_AT_ONCE)
    pieces = [np.arange(begin, min(begin + PICTURES_AT_ONCE, len(fields))) for begin in begins]
    faces = np.concatenate([_upright(fields, piece, BLUR).reshape(len(piece), -1) for piece in pieces])
    starts = _starts(characters)
    sums = np.add.reduceat(faces, starts, dtype=np.int64)
    counts = np.array([[len(character.fonts)] for character in characters])
    return (sums // counts).astype(np.float64), faces[starts].astype(np.float64)


def _distance_matrix(pictures: np.ndarray) -> np.ndarray:
    """One minus the cosine between rows that hold integers, whose products float64 sums exactly in any order."""
    gram = pictures @ pictures.T
    lengths = np.sqrt(np.maximum(np.diag(gram), 1))
    gram /= lengths[:, None] * lengths
    return np.subtract(1, gram, out=gram)


def _alike(views: tuple[np.ndarray, np.ndarray], held_out: np.ndarray) -> np.ndarray:
    """Which pairs look alike in either view, bool ``[characters, characters]``; across the split, sooner."""
    least = np.where(held_out[:, None] == held_out, DISTINCT, DISTINCT_ACROSS)
    return np.minimum(*map(_distance_matrix, views)) < least


def _distinct(alike: np.ndarray) -> np.ndarray:
    """Which characters to keep: each one that looks like none kept before it, bool ``[characters]``."""
    keep = np.ones(len(alike), bool)
    for row in range(len(alike)):
        if keep[row]:
            keep[row + 1 :] &= ~alike[row, row + 1 :]
    return keep


def _on_grid(numbers: np.ndarray) -> np.ndarray:
    """Rounded far above the last bit, in which one machine's cosine or exponential differs from another's."""
    return (np.round(numbers / GRID) * GRID).astype(np.float32)


def _affine(normal: np.ndarray) -> np.ndarray:
    """Rotation, shear and two scales from standard normals ``[samples, 4]``: ``[samples, 2, 2]``."""
    angle, shear = ROTATION * normal[:, 0], SHEAR * normal[:, 1]
    wide, high = np.exp(LOG_SCALE * normal[:, 2]), np.exp(LOG_SCALE * normal[:, 3])
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos * wide, (cos * shear - sin) * high], [sin * wide, (sin * shear + cos) * high]]
    return np.moveaxis(np.array(rows), -1, 0)


def _bend(normal: np.ndarray) -> np.ndarray:
    """A smooth field of displacements in pixels, ``[samples, 2, SIDE, SIDE]``, from normals ``[samples, 2, 4, 4]``.

    Cosine bells between the knots; integers up to the last line, so that the matrix products are exact.
    """
    knots = normal.shape[-1]
    place = np.arange(SIDE)[:, None] * (knots - 1) / (SIDE - 1) - np.arange(knots)
    bells = np.round(64 * np.where(abs(place) < 1, (1 + np.cos(np.pi * place)) / 2, 0))
    fine = bells @ np.round(normal * (256 * ELASTIC * SIDE / 2)) @ bells.T
    return (fine / (64 * 64 * 256)).astype(np.float32)


def _samples(fields: np.ndarray, first_face: int, character: _Character) -> tuple[np.ndarray, ...]:
    """What `_draw` wants for SAMPLES pictures of a character; a stream of random numbers for each character."""
    random = np.random.Generator(np.random.PCG64([SEED, character.code]))
    faces = random.permutation(len(character.fonts))
    face = first_face + faces[np.arange(SAMPLES) % len(faces)]
    normal = np.clip(random.standard_normal((SAMPLES, 6)), -2, 2)
    matrix = _affine(normal[:, :4])
    shift = SHIFT * SIDE / 2 * normal[:, 4:]
    bend = _bend(random.standard_normal((SAMPLES, 2, 4, 4)))
    return face, _on_grid(np.linalg.inv(matrix)), _on_grid(shift), bend


def _draw_inside(fields: np.ndarray, face: np.ndarray, inverse, shift, bend) -> np.ndarray:
    """`_draw`, where what would run over the edge is distorted less and less until it does not; upright, it fits."""
    pictures = np.empty((len(face), SIDE, SIDE), np.uint8)
    upright = np.eye(2, dtype=np.float32)
    left = np.arange(len(face))
    while len(left):
        pictures[left] = _draw(fields, face[left], inverse[left], shift[left], bend[left])
        left = left[_touches_edge(pictures[left])]
        inverse[left] = upright + (inverse[left] - upright) * CALMER
        shift[left], bend[left] = shift[left] * CALMER, bend[left] * CALMER
    return pictures


def _touches_edge(pictures: np.ndarray) -> np.ndarray:
    edges = np.concatenate([pictures[:, [0, -1]], pictures[:, :, [0, -1]].swapaxes(1, 2)], axis=1)
    return edges.max(axis=(1, 2)) > 0


def _pictures(fields: np.ndarray, characters: list[_Character], starts: np.ndarray) -> np.ndarray:
    """The samples of each character, uint8 ``[characters, SAMPLES, SIDE, SIDE, 1]``."""
    drawn = []
    at_once = PICTURES_AT_ONCE // SAMPLES
    for begin in range(0, len(characters), at_once):
        chunk = zip(starts[begin : begin + at_once], characters[begin : begin + at_once], strict=True)
        samples = [_samples(fields, start, character) for start, character in chunk]
        drawn.append(_draw_inside(fields, *(np.concatenate(part) for part in zip(*samples, strict=True))))
    return np.concatenate(drawn).reshape(len(characters), SAMPLES, SIDE, SIDE, 1)


def _chosen(fields: np.ndarray, characters: list[_Character], held_out: np.ndarray) -> np.ndarray:
    """Which characters become classes: no dots, no look-alikes, bool ``[characters]``."""
    ink = np.minimum.reduceat(np.count_nonzero(fields == 0, axis=(1, 2)), _starts(characters))
    return _distinct(_alike(_views(fields, characters), held_out)) & (ink >= LEAST_INK)


def _held_out(characters: list[_Character]) -> np.ndarray:
    return np.array([character.script in TEST_SCRIPTS for character in characters])


def _build() -> dict[str, np.ndarray]:
    """Pixels and labels of both splits, classes sorted by label."""
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
    """The dataset, drawn on the first call (some 7 seconds) and read from the cache afterwards.

    Both splits are uint8 ``[classes, 20, 28, 28, 1]``, ink 255 on 0, with labels such as ``"ARMENIAN/U+0531"``. The
    pixels depend on nothing but this module's constants and on matplotlib's fonts, hence on its version.

    Args:
        meanwhile: called before they are drawn, with blank classes in the shape of the training classes.
    """

    def build():
        meanwhile(ImageClasses.blank(TRAIN_CLASSES, SAMPLES, SIDE, SIDE, 1))
        return _build()

    arrays = cached(f"glyphs-{VERSION}-matplotlib-{version('matplotlib')}", build)
    train, test = (
        ImageClasses(arrays[f"{split}_pixels"], tuple(arrays[f"{split}_labels"].tolist()))
        for split in ("train", "test")
    )
    return ImageDataset("glyphs", train, test)
