"""Damage archives of Omniglot's layout at random, and check that each is refused or gives the same data.

    python -m benchmarks.fuzz_archives --archives 1000 --omniglot DIR

A refusal must be an InputError of one line. While an archive is read, an audit hook watches every file that is opened
for writing, created, renamed or removed. Files may be written only in the cache folder, and no file there may be
incomplete. Most archives are small and take milliseconds. With ``--omniglot``, a tenth are copies of the official
archives.
"""

import argparse
import os
import random
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from archives import EVALUATION, TRAIN_CHARACTERS, Tiny, damage, expected, pack

from imaml.datasets import omniglot
from imaml.errors import InputError
from imaml.storage import arrays

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Audit hook that records writes outside of one folder.

    Args:
        folder: the folder in which writes are allowed.

    Attributes:
        on: whether writes are recorded.
        outside: the recorded writes, each as the audit event and the path.
    """

    def __init__(self, folder: Path):
        self.folder, self.outside, self.on = str(folder.resolve()), [], False
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            paths = arguments[:1] if isinstance(arguments[2], int) and arguments[2] & WRITE_FLAGS else ()
        else:
            paths = arguments[:2] if event in WRITES else ()
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._inside(path):
                self.outside.append(f"{event} {path!r}")

    def _inside(self, path):
        real = os.path.realpath(os.fsdecode(path))
        return real == self.folder or real.startswith(self.folder + os.sep)


@dataclass
class Tally:
    """Counts over all damaged archives.

    Attributes:
        refused: archives that were refused.
        unharmed: archives that were loaded, because the damage changed no data or was not noticed.
        failures: messages about archives that failed a check.
        longest: the longest time that loading one archive took, in seconds.
    """

    refused: int = 0
    unharmed: int = 0
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0


def flips(content: bytes, source: random.Random) -> bytes:
    """Return the archive's bytes with one to three faults.

    A fault begins at a random position in one of three ranges: the whole archive, the part from the directory of
    members to the end, or the last 60 bytes.
    """
    for _ in range(source.randint(1, 3)):
        directory = max(content.rfind(b"PK\x01\x02", 0, len(content) // 2), content.find(b"PK\x01\x02"), 0)
        start = source.choice([0, directory, max(len(content) - 60, 0)])
        if start >= len(content):
            break
        content = damage(content, source, start, len(content))
    return content


def drawing(path: Path, members: dict[str, bytes], source: random.Random) -> None:
    """Write a valid archive that contains a damaged image."""
    name = source.choice(list(members))
    pack(path, members | {name: damage(members[name], source, 0, len(members[name]))})


def member(path: Path, members: dict[str, bytes], source: random.Random) -> None:
    """Write an archive with an unexpected member: a path outside of the folder, a link, a large file, or a wrong name.

    With probability 0.3, an expected member is also removed, and its content replaces that of another member.
    """
    names = list(members)
    name = source.choice(names)
    outside = source.choice(["../" * source.randint(1, 4) + "up.png", "/tmp/up.png", "..\\up.png", f"{name}/../../up"])
    info = zipfile.ZipInfo(source.choice([outside, name + "x", f"{EVALUATION}/x", outside]))
    kind = source.choice([stat.S_IFREG, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFDIR])
    info.external_attr = (kind | 0o777) << 16
    changed = dict(members)
    if source.random() < 0.3:
        changed[name] = changed.pop(source.choice(names))
    pack(path, changed)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(info, source.choice([b"/etc/passwd", bytes(5_000_000), members[names[0]]]))


def damages(directory: Path) -> Iterator[Callable[[random.Random], None]]:
    """Yield functions that replace the folder's second archive by a damaged copy of the original."""
    path = directory / f"{EVALUATION}.zip"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name.endswith(".png")}
    yield lambda source: path.write_bytes(flips(content, source)) and None
    yield lambda source: drawing(path, members, source)
    yield lambda source: member(path, members, source)


def fuzz(directory: Path, cache: Path, watch: Watch, archives: int, source: random.Random, tally: Tally) -> None:
    """Damage the second archive of a folder many times, and load the folder after each time.

    Args:
        directory: folder of the two archives; the second is overwritten.
        cache: the cache folder.
        watch: the audit hook.
        archives: number of damaged archives.
        source: random numbers.
        tally: counts that are updated.
    """
    fingerprint = omniglot.load(directory).fingerprint()
    ways = list(damages(directory))
    for number in range(archives):
        source.choices(ways, weights=(4, 1, 1))[0](source)
        before, started = set(cache.iterdir()), time.monotonic()
        watch.on = True
        try:
            data = omniglot.load(directory)
            watch.on = False
            tally.unharmed += 1
            if data.fingerprint() != fingerprint:
                tally.failures.append(f"{directory} {number}: other data")
        except InputError as error:
            watch.on = False
            tally.refused += 1
            if set(cache.iterdir()) != before or "\n" in str(error):
                tally.failures.append(
                    f"{directory} {number}: refused, but the cache changed or the error has many lines"
                )
        except BaseException as error:
            watch.on = False
            tally.failures.append(f"{directory} {number}: {error!r}")
        tally.longest = max(tally.longest, time.monotonic() - started)
    for path in cache.iterdir():
        arrays.read(path)  # Raises for an incomplete file.


@contextmanager
def take_for_official(members) -> Iterator[None]:
    """Make the loader accept the small archives as the official ones inside the context."""
    before = omniglot.ARCHIVES, omniglot.TRAIN_CHARACTERS
    omniglot.ARCHIVES, omniglot.TRAIN_CHARACTERS = expected(members), TRAIN_CHARACTERS
    try:
        yield
    finally:
        omniglot.ARCHIVES, omniglot.TRAIN_CHARACTERS = before


def main() -> int:
    """Damage the archives, print the counts, and return 1 if a check failed, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archives", type=int, default=1000, help="number of damaged archives (default: 1000)")
    parser.add_argument("--omniglot", type=Path, help="the folder of the official archives; they are copied")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (default: 0)")
    options = parser.parse_args()
    source, tally = random.Random(options.seed), Tally()
    real = options.archives // 10 if options.omniglot else 0
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        os.environ["IMAML_CACHE"] = str(cache)
        watch = Watch(cache)
        tiny = Tiny(Path(folder) / "tiny")
        with take_for_official(tiny.members):
            fuzz(tiny.directory, cache, watch, options.archives - real, source, tally)
        if real:
            copies = Path(folder) / "official"
            copies.mkdir()
            for archive in omniglot.ARCHIVES:
                (copies / archive.file).write_bytes((options.omniglot / archive.file).read_bytes())
            fuzz(copies, cache, watch, real, source, tally)
    for line in (*tally.failures, *watch.outside):
        print(line)
    print(
        f"{options.archives} damaged archives, {real} of them official ones: {tally.refused} refused, {tally.unharmed} "
        f"unharmed, {len(tally.failures)} failures, {len(watch.outside)} writes outside of the cache; "
        f"the longest took {tally.longest:.1f} s"
    )
    return int(bool(tally.failures or watch.outside))


if __name__ == "__main__":
    sys.exit(main())
