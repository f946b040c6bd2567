"""Glyphs: a few-shot dataset of characters, drawn from a file in this package, so that no download is needed.

The dataset replaces Omniglot on machines without a network. It has about two thousand characters with twenty 28x28
samples each. The test classes come from scripts without training classes. Fonts are more regular than handwriting, so
each sample is made in three steps. First, a character in one of its fonts, called a *face*, is thinned to a skeleton,
which removes the stroke width of the font. Then the skeleton is bent, rotated and scaled at random. Finally, a soft pen
two pixels wide draws along the skeleton.

The first step was done once, with the fonts and the FreeType of one version of matplotlib. The skeletons are in the
file ``glyphs.npz``, which :mod:`.glyph_fonts` makes. The other two steps are done here. The dataset therefore does not
depend on the installed matplotlib.

Checkpoints store the dataset's fingerprint, so the pixels must be bit for bit the same on every machine. The random
distortions are rounded to a grid. Matrix products and sums have integer terms, so floats hold each partial sum exactly.
All other operations are elementwise and correctly rounded by IEEE 754.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from imaml.datasets.cache import cached
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.errors import InputError
from imaml.storage import arrays

FILE = Path(__file__).with_name("glyphs.npz")
"""The skeletons of all classes. ``python -m benchmarks.make_glyphs`` makes it."""
FINGERPRINT = "d37b61869608fd56d1808f765f92d94707aefd0956e0cbb8749e82f206c14638"
"""The fingerprint of the dataset. A change of this module or of the file that alters a pixel needs a new one."""
SEED = 20190910
SAMPLES = 20
SIDE = 28
TRAIN_CLASSES = 1463  # `load` passes this many blank classes to `meanwhile`

# Standard deviations of a sample's distortion. Lengths are in half image sides (14 pixels); the two axes have
# independent scales. With these values, nearest neighbours on pixels are about as accurate as on Omniglot; see
# test_pixel_nearest_neighbours_are_as_accurate_as_on_omniglot.
ROTATION, LOG_SCALE, SHEAR, SHIFT, ELASTIC = 0.13, 0.15, 0.12, 0.11, 0.065

FINE = 64  # side in pixels of the fine canvas, on which a character is thinned
LONG_SIDE = 48  # length in fine pixels of the longer side of a character
INK_SIDE = 19  # length in picture pixels of the character's longer side before distortion
MAGNIFICATION = LONG_SIDE / INK_SIDE
REACH = 8  # distances are exact up to this number of fine pixels, the width of the empty margin around a character
PER_PIXEL = 28  # units of a stored distance per fine pixel; 255 / 28 exceeds REACH
PEN_RADIUS = 1.0  # in picture pixels
SHRINK = np.float32(0.875)  # factor on the distortion, applied until the ink stays inside the picture
GRID = 2.0**-12  # grid to which the distortions are rounded
FACES_AT_ONCE, PICTURES_AT_ONCE = 64, 240  # batch sizes whose temporaries fit into the processor's cache


def shifts(images: np.ndarray, offsets: list[int]) -> list[np.ndarray]:
    """Return the flattened images, shifted by each offset. An offset of 1 is one column, and an offset of FINE one row.

    The results share memory. A shift across an edge reads from the next row or image, whose margin is empty too.
    """
    reach = max(map(abs, offsets))
    padded = np.pad(images.reshape(-1), reach, mode="edge")
    return [padded[reach + offset : reach + offset + images.size] for offset in offsets]


def distances(skeleton: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the skeleton in its image, in units of 1/PER_PIXEL fine pixels, as uint8."""
    squared = np.where(skeleton, 0, (REACH + 1) ** 2).astype(np.uint8)
    for stride in (FINE, 1):  # the squared distance separates into columns and rows
        nearest = squared.reshape(-1).copy()
        steps = [step for step in range(-REACH, REACH + 1) if step]
        for step, shifted in zip(steps, shifts(squared, [stride * step for step in steps]), strict=True):
            np.minimum(nearest, shifted + np.uint8(step * step), out=nearest)
        squared = nearest.reshape(skeleton.shape)
    table = np.minimum(np.round(np.sqrt(np.arange(256)) * PER_PIXEL), 255).astype(np.uint8)
    return table[squared]


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


def draw(fields: np.ndarray, face: np.ndarray, inverse, shift, bend, softness: float = 1.0) -> np.ndarray:
    """Draw pen strokes along distorted skeletons, uint8 ``[images, SIDE, SIDE]``.

    ``fields`` has the distance fields of all faces, and ``face`` ``[images]`` is the index of each image's face.
    ``inverse`` ``[images, 2, 2]`` maps picture coordinates to coordinates of the undistorted character. ``shift``
    ``[images, 2]`` and ``bend`` ``[images, 2, SIDE, SIDE]`` are in picture pixels. These are float32, x comes before y,
    and they broadcast over images. The ink fades over ``softness`` picture pixels at the edge of a stroke.
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


def starts(faces: np.ndarray) -> np.ndarray:
    """Return the index of each character's first face among all faces, from the number of faces of each character."""
    return np.cumsum([0, *faces[:-1]])


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


def _samples(first_face: int, number: int, code: int) -> tuple[np.ndarray, ...]:
    """Return the arguments of `draw` for SAMPLES pictures of a character, from that character's own random stream.

    The character has ``number`` faces, the first of which is ``first_face``, and the Unicode number ``code``.
    """
    random = np.random.Generator(np.random.PCG64([SEED, code]))
    faces = random.permutation(number)
    face = first_face + faces[np.arange(SAMPLES) % len(faces)]
    normal = np.clip(random.standard_normal((SAMPLES, 6)), -2, 2)
    matrix = _affine(normal[:, :4])
    shift = SHIFT * SIDE / 2 * normal[:, 4:]
    bend = _bend(random.standard_normal((SAMPLES, 2, 4, 4)))
    return face, _on_grid(np.linalg.inv(matrix)), _on_grid(shift), bend


def _draw_inside(fields: np.ndarray, face: np.ndarray, inverse, shift, bend) -> np.ndarray:
    """Draw like `draw`, but reduce a distortion until no ink touches the edge. Undistorted ink never touches it."""
    pictures = np.empty((len(face), SIDE, SIDE), np.uint8)
    upright = np.eye(2, dtype=np.float32)
    redo = np.arange(len(face))
    while len(redo):
        pictures[redo] = draw(fields, face[redo], inverse[redo], shift[redo], bend[redo])
        redo = redo[_touches_edge(pictures[redo])]
        inverse[redo] = upright + (inverse[redo] - upright) * SHRINK
        shift[redo], bend[redo] = shift[redo] * SHRINK, bend[redo] * SHRINK
    return pictures


def _touches_edge(pictures: np.ndarray) -> np.ndarray:
    edges = np.concatenate([pictures[:, [0, -1]], pictures[:, :, [0, -1]].swapaxes(1, 2)], axis=1)
    return edges.max(axis=(1, 2)) > 0


def _pictures(fields: np.ndarray, faces: np.ndarray, codes: list[int]) -> np.ndarray:
    """Draw the samples of each character, uint8 ``[characters, SAMPLES, SIDE, SIDE, 1]``.

    ``fields`` has the distance fields of all faces, one character after the other. ``faces`` and ``codes`` are the
    number of faces and the Unicode number of each character.
    """
    first_faces, drawn = starts(faces), []
    at_once = PICTURES_AT_ONCE // SAMPLES
    for begin in range(0, len(codes), at_once):
        chunk = range(begin, min(begin + at_once, len(codes)))
        samples = [_samples(first_faces[i], faces[i], codes[i]) for i in chunk]
        drawn.append(_draw_inside(fields, *(np.concatenate(part) for part in zip(*samples, strict=True))))
    return np.concatenate(drawn).reshape(len(codes), SAMPLES, SIDE, SIDE, 1)


def packed(skeletons: np.ndarray, faces: np.ndarray, labels: list[str], training: int) -> dict[str, np.ndarray]:
    """Return the arrays of :data:`FILE`.

    Args:
        skeletons: bool ``[faces, FINE, FINE]``, the faces of one class after the other.
        faces: the number of faces of each class.
        labels: the labels of the training classes and then those of the test classes.
        training: the number of training classes.
    """
    gaps = np.diff(np.flatnonzero(skeletons), prepend=0)
    high, low = np.divmod(gaps, 256)
    return {
        "gaps_low": low.astype(np.uint8),
        "gaps_high": high.astype(np.uint8),
        "faces": faces.astype(np.uint8),
        "labels": np.array(labels),
        "training": np.array(training),
    }


def _unpacked(contents):
    """Return the skeletons that the arrays of :data:`FILE` encode, bool ``[faces, FINE, FINE]``."""
    pixels = np.cumsum(contents["gaps_low"] + 256 * contents["gaps_high"].astype(np.int64))
    skeletons = np.zeros((int(contents["faces"].sum(dtype=int)), FINE, FINE), bool)
    skeletons.reshape(-1)[pixels] = True
    return skeletons


def draw_file(path: Path = FILE) -> dict[str, np.ndarray]:
    """Return pixels and labels of both splits, drawn along the skeletons in a file.

    Raises:
        InputError: if the file is missing or damaged.
    """
    try:
        contents = arrays.read(path)
    except (OSError, arrays.DamagedFile) as error:
        raise InputError(f"{path}, a file of this package, cannot be read ({error}): reinstall the package") from error
    skeletons, faces, labels = _unpacked(contents), contents["faces"].astype(int), contents["labels"]
    begins = range(0, len(skeletons), FACES_AT_ONCE)
    fields = np.concatenate([distances(skeletons[begin : begin + FACES_AT_ONCE]) for begin in begins])
    pixels = _pictures(fields, faces, [int(label.split("U+")[1], 16) for label in labels.tolist()])
    training = int(contents["training"])
    return {
        "train_pixels": pixels[:training], "train_labels": labels[:training],
        "test_pixels": pixels[training:], "test_labels": labels[training:],
    }  # fmt: skip


def load(meanwhile: Callable[[ImageClasses], None] = lambda training: None) -> ImageDataset:
    """Return the dataset. The first call draws it in a few seconds; later calls read it from the cache.

    Both splits are uint8 ``[classes, 20, 28, 28, 1]`` with ink 255 and paper 0, and labels such as
    ``"ARMENIAN/U+0531"``. The pixels depend on this module, its file, and the random streams of NumPy. The call that
    draws them gives a warning if their fingerprint is not :data:`FINGERPRINT`.

    Args:
        meanwhile: a function of one argument: blank classes in the shape of the training classes. It is called just
            before the glyphs are drawn, and may start a thread that works at the same time. It is not called if the
            dataset is in the cache.

    Raises:
        InputError: if the file of the package is missing or damaged.
    """

    def build():
        meanwhile(ImageClasses.blank(TRAIN_CLASSES, SAMPLES, SIDE, SIDE, 1))
        drawn = draw_file()
        if ImageDataset.from_dictionary("glyphs", drawn).fingerprint() != FINGERPRINT:
            warnings.warn(
                f"the glyphs that NumPy {np.__version__} draws on this machine are not those of other machines: "
                "results on them cannot be compared",
                stacklevel=2,
            )
        return drawn

    return ImageDataset.from_dictionary("glyphs", cached(f"glyphs-{FINGERPRINT[:16]}", build))
