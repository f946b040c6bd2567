"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each, read from the two official archives.

The archives are somebody's download, so nothing about them is believed. They are read in memory (never
extracted), every size is bounded before a byte is inflated, and what they hold is compared with a hash of
member paths and decoded pixels. The bytes of the container do not count, only its content does: the same
drawings zipped by another program, in another order, with folder entries or a file manager's litter, are
the same data set. Whatever does not fit is an `InputError` before anything is cached.

Source: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 350 (2015); https://github.com/brendenlake/omniglot, folder ``python``.
"""

import functools
import hashlib
import io
import os
import re
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from imaml.datasets.cache import cache_directory, cached
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.datasets.web import Unreachable, fetch
from imaml.errors import InputError
from imaml.storage.files import alone_in


@dataclass(frozen=True)
class _Archive:
    """One official archive: the name of its only folder, how much it holds, and the hash of what it holds."""

    folder: str
    characters: int
    sha256: str  # over the drawings in the order of their paths: path, newline, 105 x 105 bytes (paper 255, ink 0)

    @property
    def file(self) -> str:
        return f"{self.folder}.zip"


ARCHIVES = (
    _Archive("images_background", 964, "0a1bc63751a4c84e73a57aad0374cf4172faaa4f18b108869426de584d4b41b5"),
    _Archive("images_evaluation", 659, "66a879024f66d84f509bc18fe9e03e4c1aa4778443eda76bc13131ebda5561ee"),
)
URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"  # the official place of both
DRAWINGS = 20  # of every character
DRAWN_SIZE, SIZE = 105, 28  # pixels, as drawn and as used in few-shot learning
TRAIN_CHARACTERS = 1200  # and 423 for test: the counts of MAML and iMAML
SPLIT_SEED = 2015  # belongs to the data set: another seed is another split, so never an argument

# The cached arrays are looked up under this version: raise it whenever the arrays would differ.
_CACHE_VERSION = 1

# The largest official drawing has 522 bytes. An uncompressed RGBA picture of this size would have 44 kB.
_MOST_DRAWING_BYTES = 64 * 1024
_MOST_TOTAL_BYTES = 64 * 1024 * 1024  # official: 8 MB together
_MOST_ARCHIVE_BYTES = 32 * 1024 * 1024  # official: under 10 MB

_DRAWING = re.compile(r"[^/]+/[^/]+/character\d\d/\d{4}_\d\d\.png", re.ASCII)
_LITTER = re.compile(r"(.*/)?(__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)", re.DOTALL)
_Where = Path | str  # of an archive: its path, or the address that it is fetched from
_UNIT = 2**22  # of Pillow's fixed point for 8-bit pictures
_PNG_HEADER = struct.Struct(">8s4x4sII")
_AGAIN = "download it again from https://github.com/brendenlake/omniglot (folder python)"


def load(
    directory: str | os.PathLike[str], meanwhile: Callable[[ImageClasses], None] = lambda training: None
) -> ImageDataset:
    """Omniglot from the folder ``directory``, which holds ``images_background.zip`` and ``images_evaluation.zip``.

    Both archives are pooled and split into 1,200 characters for training and 423 for test by a fixed
    permutation of the sorted labels. Drawings are shrunk from 105 x 105 to 28 x 28 as in the published
    few-shot code (to grey, then Lanczos), but **inverted**: there paper is 255 and ink 0, here ink is
    bright on 0, as in every `ImageClasses`. Multiply by 1/255 for [0, 1]; ``255 - pixels`` is the published
    form.

    Args:
        directory: The folder with both archives, as downloaded; nothing is written to it.
        meanwhile: Called once their containers are found in order, before they are decoded, with blank classes in the
            shape of the training classes.

    Returns:
        A data set named ``omniglot``: ``train.pixels`` uint8 ``[1200, 20, 28, 28, 1]``, ``test.pixels`` uint8
        ``[423, 20, 28, 28, 1]``, labels ``ALPHABET/characterNN``, sorted in each part. Decoded arrays are
        cached under a hash of the archives' bytes, so a changed archive is decoded and checked anew.

    Raises:
        InputError: the folder or an archive is missing, unreadable, damaged, unsafe or not Omniglot. The
            message names the file, what is wrong with it and what to do; nothing has been written.

    Source: Lake, Salakhutdinov, Tenenbaum 2015.

    >>> load("/no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    imaml.errors.InputError: /no/such/folder: no such folder; name the one that holds images_background.zip and ...
    """
    contents = _read_archives(Path(directory))
    key = hashlib.sha256()
    for content in contents.values():
        key.update(hashlib.sha256(content).digest())
    arrays = cached(f"omniglot-v{_CACHE_VERSION}-{key.hexdigest()}", lambda: _decode(contents, meanwhile))
    return _split(arrays["pixels"], [str(label) for label in arrays["labels"]])


def default_directory() -> Path:
    """Where :func:`download` puts the archives, and where they are looked for, when no folder is named."""
    return cache_directory() / "omniglot"


def download(
    directory: Path,
    url: str = URL,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Put both official archives into ``directory``; what is there and whole stays, what was begun is gone on with.

    Each archive is checked as :func:`load` does before it gets its name: there is Omniglot or nothing.

    Args:
        directory: made where it does not exist.
        url: of the folder with the archives, for a mirror.
        on_event: told in a phrase what happens.
        on_progress: told the bytes of an archive that are there, and how many it has where that is known.

    Raises:
        InputError: where the archives cannot be fetched, with what to put where by hand, or are not Omniglot's.
        OSError: where the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with alone_in(directory):
        for archive in ARCHIVES:
            path, source = directory / archive.file, f"{url.rstrip('/')}/{archive.file}"
            if _is_whole(archive, path, on_event):
                continue
            on_event(f"fetching {source}")
            try:
                check = functools.partial(_verify, archive, source)
                fetch(source, path, check, _MOST_ARCHIVE_BYTES, on_progress)
            except Unreachable as error:
                files = " and ".join(f"{URL}/{each.file}" for each in ARCHIVES)
                raise InputError(
                    f"{error}; try again later, which goes on from what has come, or fetch {files} "
                    f"where there is a network and put them into {directory}"
                ) from error


def _is_whole(archive: _Archive, path: Path, on_event: Callable[[str], None]) -> bool:
    if not path.exists():
        return False
    try:
        _verify(archive, path, _read_file(path))
    except InputError as error:
        on_event(str(error))
        return False
    on_event(f"{path} is there and whole")
    return True


def _verify(archive: _Archive, path: _Where, content: bytes) -> None:
    """Raise InputError where ``content``, from ``path``, is not the official archive's."""
    _pixels(archive, path, _drawings(archive, path, content))


def _split(pixels: np.ndarray, labels: list[str]) -> ImageDataset:
    # RandomState, not Generator: numpy promises the stream of the former for ever (NEP 19).
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    train, test = np.sort(order[:TRAIN_CHARACTERS]), np.sort(order[TRAIN_CHARACTERS:])

    def part(indices: np.ndarray) -> ImageClasses:
        return ImageClasses(pixels[indices], tuple(labels[index] for index in indices))

    return ImageDataset("omniglot", part(train), part(test))


def _read_archives(directory: Path) -> dict[Path, bytes]:
    paths = [directory / archive.file for archive in ARCHIVES]
    wanted = f"name the one that holds {' and '.join(path.name for path in paths)} with --data or as load's argument"
    if not os.path.isdir(directory):  # unlike Path.is_dir, never raises
        raise InputError(f"{directory}: no such folder; {wanted}")
    missing = [path.name for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(f"{directory}: this folder does not hold the file {' or '.join(missing)}; {wanted}")
    return {path: _read_file(path) for path in paths}


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_ARCHIVE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); see to its permissions and its disk") from error
    if len(content) > _MOST_ARCHIVE_BYTES:
        raise InputError(f"{path}: larger than {_MOST_ARCHIVE_BYTES:,} bytes, so not Omniglot's archive; {_AGAIN}")
    return content


def _decode(contents: dict[Path, bytes], meanwhile: Callable[[ImageClasses], None]) -> dict[str, np.ndarray]:
    """``pixels`` uint8 ``[characters, 20, 28, 28, 1]`` and ``labels``, sorted by label."""
    pairs = list(zip(ARCHIVES, contents.items(), strict=True))
    # Every archive's container is checked before the slow part begins.
    drawings = [_drawings(archive, path, content) for archive, (path, content) in pairs]
    meanwhile(ImageClasses.blank(TRAIN_CHARACTERS, DRAWINGS, SIZE, SIZE, 1))
    pixels, labels = [], []
    for (archive, (path, _)), pngs in zip(pairs, drawings, strict=True):
        pixels.append(_pixels(archive, path, pngs))
        labels += sorted({_label(name) for name in pngs})
    order = np.argsort(np.array(labels))
    return {"pixels": np.concatenate(pixels)[order], "labels": np.array(labels)[order]}


def _label(member: str) -> str:
    """``ALPHABET/characterNN`` of ``images_background/ALPHABET/characterNN/xxxx_yy.png``."""
    return member.split("/", 1)[1].rsplit("/", 1)[0]


@contextmanager
def _refusing(path: _Where, what: str) -> Iterator[None]:
    """Damaged bytes make zipfile, zlib and Pillow raise nearly anything; a person gets one kind of error."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {what}; {_AGAIN}") from error


def _drawings(archive: _Archive, path: _Where, content: bytes) -> dict[str, bytes]:
    """The PNG bytes of every drawing by member path, once the whole container is found in order."""
    with _refusing(path, "truncated, damaged or not a zip archive"), zipfile.ZipFile(io.BytesIO(content)) as container:
        members = [info for info in container.infolist() if _counts(path, info)]
        _check_names(archive, path, [info.filename for info in members])
        _check_sizes(path, members)
        return {info.filename: _read_member(path, container, info) for info in members}


def _counts(path: _Where, info: zipfile.ZipInfo) -> bool:
    """Whether a member is content; folders and litter are not. Unsafe ones are refused whatever they are."""
    name = info.filename
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise InputError(f"{path}: member {_shown(name)} points outside of its folder; do not use it, {_AGAIN}")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InputError(f"{path}: member {_shown(name)} is a symbolic link or device; do not use it, {_AGAIN}")
    return not (info.is_dir() or _LITTER.fullmatch(name))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _check_names(archive: _Archive, path: _Where, names: list[str]) -> None:
    for name in names:
        if not (_DRAWING.fullmatch(name) and name.startswith(f"{archive.folder}/")):
            layout = f"{archive.folder}/ALPHABET/characterNN/xxxx_yy.png"
            raise InputError(f"{path}: unexpected member {_shown(name)}, all should be {layout}; {_AGAIN}")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{path}: member {_shown(twice)} is there twice; {_AGAIN}")
    drawings = Counter(map(_label, names))
    if len(drawings) != archive.characters:
        raise InputError(f"{path}: {len(drawings)} characters instead of {archive.characters}; {_AGAIN}")
    for label, count in drawings.items():
        if count != DRAWINGS:
            raise InputError(f"{path}: {count} drawings of {_shown(label)} instead of {DRAWINGS}; {_AGAIN}")


def _check_sizes(path: _Where, members: list[zipfile.ZipInfo]) -> None:
    for info in members:
        if info.file_size > _MOST_DRAWING_BYTES:
            size = f"declares {info.file_size:,} bytes, a drawing has less than {_MOST_DRAWING_BYTES:,}"
            raise InputError(f"{path}: member {_shown(info.filename)} {size}; do not use it, {_AGAIN}")
        # Other methods (LZMA's dictionary, say) may take memory that no declared size bounds.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{path}: member {_shown(info.filename)} is neither stored nor deflated; {_AGAIN}")
    total = sum(info.file_size for info in members)
    if total > _MOST_TOTAL_BYTES:
        limit = f"{total:,} bytes, Omniglot's have less than {_MOST_TOTAL_BYTES:,}"
        raise InputError(f"{path}: its members declare {limit}; do not use it, {_AGAIN}")


def _read_member(path: _Where, container: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # zipfile inflates no more than the declared size, which is bounded, and raises BadZipFile where the
    # checksum is another: a member that declares less than it holds ends there.
    with _refusing(path, f"member {_shown(info.filename)} is damaged or encrypted"), container.open(info) as stream:
        return stream.read(_MOST_DRAWING_BYTES)


def _pixels(archive: _Archive, path: _Where, drawings: dict[str, bytes]) -> np.ndarray:
    """uint8 ``[characters, 20, 28, 28, 1]``, ink bright on 0, of drawings whose content hash is the right one."""
    pillow = _pillow()
    digest = hashlib.sha256()
    names = sorted(drawings)
    small = []
    for first in range(0, len(names), DRAWINGS):  # one character at a time: all drawings as drawn are 360 MB
        drawn = []
        for name in names[first : first + DRAWINGS]:
            with _refusing(path, f"member {_shown(name)} cannot be decoded as a PNG"):
                drawn.append(_grey(pillow, path, name, drawings[name]))
            digest.update(f"{name}\n".encode() + drawn[-1])
        small.append(_shrink(np.frombuffer(b"".join(drawn), np.uint8).reshape(-1, DRAWN_SIZE, DRAWN_SIZE)))
    if digest.hexdigest() != archive.sha256:
        raise InputError(f"{path}: its drawings are not Omniglot's (the content hash is another); {_AGAIN}")
    return 255 - np.stack(small)[..., np.newaxis]


def _grey(pillow: ModuleType, path: _Where, name: str, png: bytes) -> bytes:
    """The 105 x 105 bytes of one drawing, row by row: paper 255, ink 0."""
    signature, chunk, width, height = _PNG_HEADER.unpack_from(png)
    if signature != b"\x89PNG\r\n\x1a\n" or chunk != b"IHDR":
        raise InputError(f"{path}: member {_shown(name)} is not a PNG; {_AGAIN}")
    # The header first, so that Pillow never sees a picture that says it is large; then what Pillow made of
    # the file (nothing is decoded before `convert`), because a second header may follow the first.
    _check_drawn(path, name, (width, height))
    image = pillow.open(io.BytesIO(png), formats=("PNG",))
    _check_drawn(path, name, image.size)
    return image.convert("L").tobytes()


def _check_drawn(path: _Where, name: str, size: tuple[int, int]) -> None:
    if size != (DRAWN_SIZE, DRAWN_SIZE):
        pixels = f"{size[0]} x {size[1]} pixels instead of {DRAWN_SIZE} x {DRAWN_SIZE}"
        raise InputError(f"{path}: member {_shown(name)} has {pixels}; {_AGAIN}")


def _pillow() -> ModuleType:
    # Pillow comes with matplotlib. It is imported here and nowhere else: a cached load does without it.
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("Omniglot's drawings are decoded by Pillow, which is missing: pip install pillow") from error
    return Image


@functools.cache
def _lanczos() -> np.ndarray:
    """``[105, 28]``: the weight of each old pixel in each new one, in units of 2**-22 (whole numbers)."""
    scale = DRAWN_SIZE / SIZE
    distance = (np.arange(DRAWN_SIZE)[:, np.newaxis] + 0.5) / scale - (np.arange(SIZE) + 0.5)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return np.rint(weights / weights.sum(0) * _UNIT)


def _shrink(drawn: np.ndarray) -> np.ndarray:
    """uint8 ``[n, 105, 105]`` to ``[n, 28, 28]`` by an antialiased Lanczos filter, bit for bit as Pillow does it.

    Rows first, columns second, each rounded to whole grey levels, in Pillow's fixed point. The float64 sums
    are exact (whole numbers under 2**35), so that every machine, and whatever Pillow there is, gets the same
    pixels and with them the same fingerprint. It also takes half of Pillow's time on such small pictures.
    """

    def along_rows(images: np.ndarray) -> np.ndarray:
        return np.clip(np.floor(images @ _lanczos() / _UNIT + 0.5), 0, 255)

    rows = along_rows(drawn.astype(np.float64))
    return along_rows(rows.swapaxes(1, 2)).swapaxes(1, 2).astype(np.uint8)
