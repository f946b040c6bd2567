"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each, read from the two official archives.

The archives are untrusted input. They are read in memory and never extracted to disk. All sizes are checked before
anything is decompressed. A hash of the drawings' paths and decoded pixels is compared with a recorded hash. If they
differ, an `InputError` is raised before anything is cached. The hash does not cover the zip container: archives with
another order of members, with folder entries or with files such as ``.DS_Store`` are accepted.

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
    """One official archive: the name of its only folder, its number of characters, and the hash of its drawings."""

    folder: str
    characters: int
    sha256: str  # over all drawings, sorted by path: path, newline, 105 x 105 bytes (paper 255, ink 0)

    @property
    def file(self) -> str:
        return f"{self.folder}.zip"


ARCHIVES = (
    _Archive("images_background", 964, "0a1bc63751a4c84e73a57aad0374cf4172faaa4f18b108869426de584d4b41b5"),
    _Archive("images_evaluation", 659, "66a879024f66d84f509bc18fe9e03e4c1aa4778443eda76bc13131ebda5561ee"),
)
URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"  # the official source of both archives
DRAWINGS = 20  # per character
DRAWN_SIZE, SIZE = 105, 28  # side in pixels, in the archives and in few-shot learning
TRAIN_CHARACTERS = 1200  # leaves 423 for test: the split sizes of the MAML and iMAML papers
SPLIT_SEED = 2015  # another seed would be another split and thus another dataset, so this is not an argument

# Part of the name of the cache entry: increase it with every change that alters the arrays.
_CACHE_VERSION = 1

# The largest official drawing has 522 bytes. An uncompressed RGBA picture of 105 x 105 pixels has 44 kB.
_MAX_DRAWING_BYTES = 64 * 1024
_MAX_TOTAL_BYTES = 64 * 1024 * 1024  # for the drawings of one archive; all official drawings have 8 MB together
_MAX_ARCHIVE_BYTES = 32 * 1024 * 1024  # for one archive; each official one has less than 10 MB

_DRAWING = re.compile(r"[^/]+/[^/]+/character\d\d/\d{4}_\d\d\.png", re.ASCII)
_IGNORED = re.compile(r"(.*/)?(__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)", re.DOTALL)
_Source = Path | str  # the path or URL of an archive, for messages
_UNIT = 2**22  # the number 1 in Pillow's fixed-point arithmetic for 8-bit pictures
_PNG_HEADER = struct.Struct(">8s4x4sII")
_DOWNLOAD_AGAIN = "download it again from https://github.com/brendenlake/omniglot (folder python)"


def load(
    directory: str | os.PathLike[str], meanwhile: Callable[[ImageClasses], None] = lambda training: None
) -> ImageDataset:
    """Return Omniglot, read from ``images_background.zip`` and ``images_evaluation.zip`` in ``directory``.

    The characters of both archives are pooled. A fixed permutation of the sorted labels splits them into 1,200 for
    training and 423 for test. Drawings are resized from 105 x 105 to 28 x 28 pixels as in the published few-shot code
    (greyscale, then Lanczos) but **inverted**: as in every `ImageClasses`, ink is 255 and paper 0. Compute
    ``255 - pixels`` for the published form, in which paper is 255.

    Args:
        directory: the folder with both archives as downloaded. It is only read.
        meanwhile: called after the containers are verified and before the drawings are decoded, with blank classes in
            the shape of the training classes. It is not called if the arrays are in the cache.

    Returns:
        A dataset named ``omniglot``: ``train.pixels`` uint8 ``[1200, 20, 28, 28, 1]``, ``test.pixels`` uint8
        ``[423, 20, 28, 28, 1]``, labels ``ALPHABET/characterNN``, sorted in each part. Decoded arrays are
        cached under a hash of the archives' bytes, so a changed archive is decoded and verified again.

    Raises:
        InputError: if the folder or an archive is missing, unreadable, damaged, unsafe or not Omniglot's, or if Pillow
            is missing. The message names the fault and the remedy. In this case, nothing is written to the cache.

    Source: Lake, Salakhutdinov, Tenenbaum 2015.

    >>> load("/no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    imaml.errors.InputError: /no/such/folder: no such folder; name the one that holds images_background.zip and ...
    """
    return _split(*characters(Path(directory), TRAIN_CHARACTERS, meanwhile))


def characters(
    directory: Path, training: int, meanwhile: Callable[[ImageClasses], None]
) -> tuple[np.ndarray, list[str]]:
    """Return the pixels, uint8 ``[1623, 20, 28, 28, 1]``, and the labels of all characters, sorted by label.

    ``training`` is the number of training classes, which is the number of blank classes that ``meanwhile`` gets. The
    other arguments and the errors are those of :func:`load`.
    """
    contents = _read_archives(directory)
    key = hashlib.sha256()
    for content in contents.values():
        key.update(hashlib.sha256(content).digest())
    blank = ImageClasses.blank(training, DRAWINGS, SIZE, SIZE, 1)
    name = f"omniglot-v{_CACHE_VERSION}-{key.hexdigest()}"
    arrays = cached(name, lambda: _decode(contents, lambda: meanwhile(blank)))
    return arrays["pixels"], [str(label) for label in arrays["labels"]]


def default_directory() -> Path:
    """Return the folder to which :func:`download` writes the archives if the caller names none."""
    return cache_directory() / "omniglot"


def download(
    directory: Path,
    url: str = URL,
    on_event: Callable[[str], None] = lambda message: None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Download both official archives to ``directory``, and resume an interrupted download.

    An archive that is already there and undamaged is kept. A downloaded archive is verified as in :func:`load` before
    it gets its final name, so this function never puts a wrong or partial archive under that name.

    Args:
        directory: the folder for the archives. It is created if it does not exist.
        url: address of the folder with the archives. Give another one to use a mirror.
        on_event: called with a short description of each event.
        on_progress: called with the number of bytes received and the archive's size, which is None if it is unknown.

    Raises:
        InputError: if an archive cannot be downloaded, if a downloaded archive is not Omniglot's, if Pillow is missing,
            or if another process downloads to the same folder. If the network fails, the message says which files to
            copy by hand.
        OSError: if the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with alone_in(directory):
        for archive in ARCHIVES:
            path, source = directory / archive.file, f"{url.rstrip('/')}/{archive.file}"
            if _is_intact(archive, path, on_event):
                continue
            on_event(f"downloading {source}")
            try:
                check = functools.partial(_verify, archive, source)
                fetch(source, path, check, _MAX_ARCHIVE_BYTES, on_progress)
            except Unreachable as error:
                files = " and ".join(f"{URL}/{each.file}" for each in ARCHIVES)
                raise InputError(
                    f"{error}; try again later to resume the download, or download {files} "
                    f"on another machine and copy them to {directory}"
                ) from error


def _is_intact(archive: _Archive, path: Path, on_event: Callable[[str], None]) -> bool:
    if not path.exists():
        return False
    try:
        _verify(archive, path, _read_file(path))
    except InputError as error:
        on_event(str(error))
        return False
    on_event(f"{path} is already there and intact")
    return True


def _verify(archive: _Archive, path: _Source, content: bytes) -> None:
    """Raise InputError if ``content``, the bytes at ``path``, does not hold the drawings of ``archive``."""
    _pixels(archive, path, _drawings(archive, path, content))


def _split(pixels: np.ndarray, labels: list[str]) -> ImageDataset:
    # Use RandomState: numpy guarantees that its stream never changes, but not that of Generator (NEP 19).
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    train, test = np.sort(order[:TRAIN_CHARACTERS]), np.sort(order[TRAIN_CHARACTERS:])

    def part(indices: np.ndarray) -> ImageClasses:
        return ImageClasses(pixels[indices], tuple(labels[index] for index in indices))

    return ImageDataset("omniglot", part(train), part(test))


def _read_archives(directory: Path) -> dict[Path, bytes]:
    paths = [directory / archive.file for archive in ARCHIVES]
    wanted = f"name the one that holds {' and '.join(path.name for path in paths)}, by --data or as load's argument"
    if not os.path.isdir(directory):  # unlike Path.is_dir, never raises an error
        raise InputError(f"{directory}: no such folder; {wanted}")
    missing = [path.name for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(f"{directory}: this folder does not hold the file {' or '.join(missing)}; {wanted}")
    return {path: _read_file(path) for path in paths}


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_ARCHIVE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from error
    if len(content) > _MAX_ARCHIVE_BYTES:
        raise InputError(
            f"{path}: larger than {_MAX_ARCHIVE_BYTES:,} bytes, so it is not Omniglot's archive; {_DOWNLOAD_AGAIN}"
        )
    return content


def _decode(contents: dict[Path, bytes], meanwhile: Callable[[], None]) -> dict[str, np.ndarray]:
    """Return ``pixels``, uint8 ``[characters, 20, 28, 28, 1]``, and ``labels``, both sorted by label."""
    pairs = list(zip(ARCHIVES, contents.items(), strict=True))
    # Check both containers first, so that errors in them are raised before the slow decoding.
    drawings = [_drawings(archive, path, content) for archive, (path, content) in pairs]
    meanwhile()
    pixels, labels = [], []
    for (archive, (path, _)), pngs in zip(pairs, drawings, strict=True):
        pixels.append(_pixels(archive, path, pngs))
        labels += sorted({_label(name) for name in pngs})
    order = np.argsort(np.array(labels))
    return {"pixels": np.concatenate(pixels)[order], "labels": np.array(labels)[order]}


def _label(member: str) -> str:
    """Return the label ``ALPHABET/characterNN`` of the member ``ARCHIVE/ALPHABET/characterNN/xxxx_yy.png``."""
    return member.split("/", 1)[1].rsplit("/", 1)[0]


@contextmanager
def _as_input_error(path: _Source, fault: str) -> Iterator[None]:
    """Convert every exception to an InputError: on damaged bytes, zipfile, zlib and Pillow raise many types."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: {fault}; {_DOWNLOAD_AGAIN}") from error


def _drawings(archive: _Archive, path: _Source, content: bytes) -> dict[str, bytes]:
    """Return the PNG bytes of every drawing by member path, after checking the names and sizes of all members."""
    with (
        _as_input_error(path, "truncated, damaged or not a zip archive"),
        zipfile.ZipFile(io.BytesIO(content)) as container,
    ):
        members = [info for info in container.infolist() if _is_content(path, info)]
        _check_names(archive, path, [info.filename for info in members])
        _check_sizes(path, members)
        return {info.filename: _read_member(path, container, info) for info in members}


def _is_content(path: _Source, info: zipfile.ZipInfo) -> bool:
    """Return False for folders and for files such as ``.DS_Store``, which are ignored, and True for all others.

    Raises:
        InputError: if the member is unsafe, even if it would be ignored.
    """
    name = info.filename
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise InputError(
            f"{path}: member {_shown(name)} points outside the archive's folder; do not use it, {_DOWNLOAD_AGAIN}"
        )
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise InputError(
            f"{path}: member {_shown(name)} is a symbolic link or device; do not use it, {_DOWNLOAD_AGAIN}"
        )
    return not (info.is_dir() or _IGNORED.fullmatch(name))


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _check_names(archive: _Archive, path: _Source, names: list[str]) -> None:
    for name in names:
        if not (_DRAWING.fullmatch(name) and name.startswith(f"{archive.folder}/")):
            layout = f"{archive.folder}/ALPHABET/characterNN/xxxx_yy.png"
            raise InputError(
                f"{path}: unexpected member {_shown(name)}, all members should be {layout}; {_DOWNLOAD_AGAIN}"
            )
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InputError(f"{path}: member {_shown(twice)} occurs twice; {_DOWNLOAD_AGAIN}")
    drawings = Counter(map(_label, names))
    if len(drawings) != archive.characters:
        raise InputError(f"{path}: {len(drawings)} characters instead of {archive.characters}; {_DOWNLOAD_AGAIN}")
    for label, count in drawings.items():
        if count != DRAWINGS:
            raise InputError(f"{path}: {count} drawings of {_shown(label)} instead of {DRAWINGS}; {_DOWNLOAD_AGAIN}")


def _check_sizes(path: _Source, members: list[zipfile.ZipInfo]) -> None:
    for info in members:
        if info.file_size > _MAX_DRAWING_BYTES:
            size = f"declares {info.file_size:,} bytes, but a drawing has at most {_MAX_DRAWING_BYTES:,}"
            raise InputError(f"{path}: member {_shown(info.filename)} {size}; do not use it, {_DOWNLOAD_AGAIN}")
        # Other compression methods may use memory that the declared size does not bound, such as LZMA's dictionary.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(
                f"{path}: member {_shown(info.filename)} is neither stored nor deflated; {_DOWNLOAD_AGAIN}"
            )
    total = sum(info.file_size for info in members)
    if total > _MAX_TOTAL_BYTES:
        limit = f"{total:,} bytes in all, but Omniglot's have at most {_MAX_TOTAL_BYTES:,}"
        raise InputError(f"{path}: its members declare {limit}; do not use it, {_DOWNLOAD_AGAIN}")


def _read_member(path: _Source, container: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # zipfile decompresses at most the declared size, which _check_sizes has bounded. If a member declares less than it
    # holds, its checksum does not match and zipfile raises BadZipFile.
    with (
        _as_input_error(path, f"member {_shown(info.filename)} is damaged or encrypted"),
        container.open(info) as stream,
    ):
        return stream.read(_MAX_DRAWING_BYTES)


def _pixels(archive: _Archive, path: _Source, drawings: dict[str, bytes]) -> np.ndarray:
    """Return the drawings as uint8 ``[characters, 20, 28, 28, 1]`` with ink 255, after verifying their hash."""
    pillow = _pillow()
    digest = hashlib.sha256()
    names = sorted(drawings)
    resized = []
    for first in range(0, len(names), DRAWINGS):  # one character at a time: all at once take 200 MB
        drawn = []
        for name in names[first : first + DRAWINGS]:
            with _as_input_error(path, f"member {_shown(name)} cannot be decoded as a PNG"):
                drawn.append(_grey(pillow, path, name, drawings[name]))
            digest.update(f"{name}\n".encode() + drawn[-1])
        resized.append(_shrink(np.frombuffer(b"".join(drawn), np.uint8).reshape(-1, DRAWN_SIZE, DRAWN_SIZE)))
    if digest.hexdigest() != archive.sha256:
        raise InputError(f"{path}: its drawings are not Omniglot's (their content hash differs); {_DOWNLOAD_AGAIN}")
    return 255 - np.stack(resized)[..., np.newaxis]


def _grey(pillow: ModuleType, path: _Source, name: str, png: bytes) -> bytes:
    """Return the 105 x 105 bytes of one drawing in row-major order: paper 255, ink 0."""
    signature, chunk, width, height = _PNG_HEADER.unpack_from(png)
    if signature != b"\x89PNG\r\n\x1a\n" or chunk != b"IHDR":
        raise InputError(f"{path}: member {_shown(name)} is not a PNG; {_DOWNLOAD_AGAIN}")
    # Check the size in the first header, so that Pillow never opens a picture of another size. Check the size that
    # Pillow reports too, because a second header may follow. Pillow decodes pixels only in `convert`.
    _check_drawn(path, name, (width, height))
    image = pillow.open(io.BytesIO(png), formats=("PNG",))
    _check_drawn(path, name, image.size)
    return image.convert("L").tobytes()


def _check_drawn(path: _Source, name: str, size: tuple[int, int]) -> None:
    if size != (DRAWN_SIZE, DRAWN_SIZE):
        pixels = f"{size[0]} x {size[1]} pixels instead of {DRAWN_SIZE} x {DRAWN_SIZE}"
        raise InputError(f"{path}: member {_shown(name)} has {pixels}; {_DOWNLOAD_AGAIN}")


def _pillow() -> ModuleType:
    # Pillow is a dependency of matplotlib. Import it only here, because loading from the cache does not need it.
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("Omniglot's drawings are decoded by Pillow, which is missing: pip install pillow") from error
    return Image


@functools.cache
def _lanczos() -> np.ndarray:
    """Return the weight of each old pixel in each new one, ``[105, 28]``, as integers in units of 2**-22."""
    scale = DRAWN_SIZE / SIZE
    distance = (np.arange(DRAWN_SIZE)[:, np.newaxis] + 0.5) / scale - (np.arange(SIZE) + 0.5)
    weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return np.rint(weights / weights.sum(0) * _UNIT)


def _shrink(drawn: np.ndarray) -> np.ndarray:
    """Resize uint8 ``[images, 105, 105]`` to ``[images, 28, 28]`` with a Lanczos filter, bit for bit like Pillow.

    Rows are filtered first and columns second. Each result is rounded to integer grey levels in Pillow's fixed-point
    arithmetic. The float64 sums are exact, because they are integers below 2**35. The pixels and the fingerprint
    therefore do not depend on the machine or on Pillow's version. This function takes half of Pillow's time.
    """

    def along_rows(images: np.ndarray) -> np.ndarray:
        return np.clip(np.floor(images @ _lanczos() / _UNIT + 0.5), 0, 255)

    rows = along_rows(drawn.astype(np.float64))
    return along_rows(rows.swapaxes(1, 2)).swapaxes(1, 2).astype(np.uint8)
