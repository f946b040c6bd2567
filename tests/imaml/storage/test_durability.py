"""Short runs of the benchmarks that kill processes and damage archives, and the determinism of the class splits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def run(*words, **settings):
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=ENVIRONMENT | settings, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def test_no_checkpoint_is_lost_to_kills():
    output = run("-m", "benchmarks.kill_nine", "--kills", 10)
    assert output.startswith("10 kills, ") and output.endswith(": 0 checkpoints lost\n")
    interrupted, saves = (int(output.split(word)[0].split()[-1]) for word in (" of them amid", " finished saves"))
    assert interrupted > 0 and saves > 0  # otherwise no kill hit a save and the test has shown nothing


def test_damaged_archives_are_refused_or_load_unchanged_and_only_the_cache_is_written():
    output = run("-m", "benchmarks.fuzz_archives", "--archives", 100)
    assert "0 failures, 0 writes outside of the cache" in output
    refused, unharmed = (int(output.split(word)[0].split()[-1]) for word in (" refused", " unharmed"))
    assert refused + unharmed == 100 and refused > 50


SPLIT = """
import os, pathlib, random, sys
from archives import TRAIN_CHARACTERS, Tiny, expected
from imaml.datasets import glyph_fonts, omniglot

source = random.Random(int(sys.argv[1]))
tiny = Tiny(pathlib.Path(sys.argv[2]))
omniglot.ARCHIVES, omniglot.TRAIN_CHARACTERS = expected(tiny.members), TRAIN_CHARACTERS
for folder, members in tiny.members.items():
    tiny.members[folder] = {name: members[name] for name in source.sample(list(members), len(members))}
    tiny.pack(folder)

def shuffled(function):
    return lambda *arguments: (found := list(function(*arguments)), source.shuffle(found))[0]

scandir = os.scandir

class ShuffledScan:  # like os.scandir's result, an iterator and a context manager
    def __init__(self, *arguments):
        with scandir(*arguments) as entries:
            found = list(entries)
        source.shuffle(found)
        self.rest = iter(found)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rest)

os.listdir, os.scandir = shuffled(os.listdir), ShuffledScan
pathlib.Path.iterdir, pathlib.Path.glob = shuffled(pathlib.Path.iterdir), shuffled(pathlib.Path.glob)
data = omniglot.load(tiny.directory)
characters = glyph_fonts._characters(glyph_fonts._fonts())
print(data.fingerprint(), data.train.labels, data.test.labels)
print([(c.label, held_out) for c, held_out in zip(characters, glyph_fonts._held_out(characters).tolist())])
"""


@pytest.mark.slow("reads the data in two processes")
def test_splits_do_not_depend_on_the_order_of_files_archive_members_or_hashes(tmp_path):
    first, second = (
        run("-c", SPLIT, seed, tmp_path / seed, IMAML_CACHE=str(tmp_path / f"cache{seed}"), PYTHONHASHSEED=seed)
        for seed in ("1", "2")
    )
    assert first == second and "character01" in first and "GREEK" in first
