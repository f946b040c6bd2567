"""The mutation run cannot rot: each fault still has its place, and leaves Python that compiles."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
mutations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutations)


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_fault_still_applies(mutation):
    source = (ROOT / "bilevel" / mutation.file).read_text()
    changed = mutation.apply(source)
    assert changed != source
    compile(changed, mutation.file, "exec")


def test_names_tell_faults_apart():
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(set(names)) == len(names) >= 16


def test_text_that_is_gone_or_not_unique_is_an_error():
    mutation = mutations.Mutation("a", "b.py", "x", "y")
    assert mutation.apply("x + 1") == "y + 1"
    for source in ("z + 1", "x + x"):
        with pytest.raises(ValueError, match=r"a: found \d times in b.py: 'x'"):
            mutation.apply(source)
