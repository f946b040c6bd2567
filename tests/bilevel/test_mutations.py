"""Each planted fault matches exactly one place and leaves code that compiles, and each guard's test exists.

A guard is code that prevents or reports a wrong number. Its test must fail once the guard is removed
(benchmarks/guards.py).
"""

import pytest

from benchmarks.fault_runs import ROOT
from benchmarks.guards import GUARDS, id_of
from benchmarks.mutations import MUTATIONS
from benchmarks.planting import Sources

FAULTS = (*MUTATIONS, *(guard.fault for guard in GUARDS))


@pytest.fixture(scope="module")
def library():
    return Sources.read(ROOT, "bilevel", "imaml")


@pytest.fixture(scope="module")
def tests():
    return Sources.read(ROOT, "tests")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_still_applies(library, fault):
    change = library.plant(fault)
    assert change.content != change.path.read_bytes()
    compile(change.content, str(change.path), "exec")


@pytest.mark.parametrize("name", sorted({guard.test for guard in GUARDS}))
def test_the_test_of_a_guard_exists(tests, name):
    assert (ROOT / id_of(ROOT, tests, name).partition("::")[0]).is_file()


def test_the_names_of_faults_are_unique():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert len(MUTATIONS) >= 16
