"""The mutation runs cannot rot: each fault still has its place and leaves Python that compiles, each guard its test."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed

from benchmarks.guards import GUARDS  # noqa: E402
from benchmarks.mutations import MUTATIONS, Mutation  # noqa: E402

PLANTED = (*MUTATIONS, *(guard.mutation for guard in GUARDS))


@pytest.mark.parametrize("mutation", PLANTED, ids=lambda mutation: mutation.name)
def test_the_fault_still_applies(mutation):
    source = (ROOT / mutation.file).read_text()
    changed = mutation.apply(source)
    assert changed != source
    compile(changed, mutation.file, "exec")


def test_names_tell_faults_apart():
    names = [mutation.name for mutation in PLANTED]
    assert len(set(names)) == len(names)
    assert len(MUTATIONS) >= 16


@pytest.mark.parametrize("test", sorted({guard.test for guard in GUARDS}))
def test_the_test_of_a_guard_is_there(test):
    file, *names = test.split("::")
    source = (ROOT / file).read_text()
    for name in names:
        assert f"class {name}:" in source or f"def {name}(" in source


def test_text_that_is_gone_or_not_unique_is_an_error():
    mutation = Mutation("a", "b.py", "x", "y")
    assert mutation.apply("x + 1") == "y + 1"
    for source in ("z + 1", "x + x"):
        with pytest.raises(ValueError, match=r"a: found \d times in b.py: 'x'"):
            mutation.apply(source)
