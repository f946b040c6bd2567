"""Each room of bilevel imports only from lower rooms, and no modules import each other in a circle.

A room is a folder of ``bilevel/``, or one of the modules directly in it. ALLOWED lists the rooms, the lowest first.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from architecture import arrows, between_rooms, circle, imported_names, modules_of, room

ROOT = Path(__file__).parents[2]
MODULES = modules_of(ROOT / "bilevel")
ARROWS = arrows(ROOT / "bilevel")
# The package's own `__init__.py` belongs to no room and may import from any of them, because it collects the public
# names.
BELOW = {name: targets for name, targets in ARROWS.items() if name != "bilevel"}
# Each room with the rooms that it may import from, the lowest first.
ALLOWED = {
    "notebook": set(),
    "types": {"notebook"},
    "_deprecation": set(),
    "tree": {"types"},
    "spectrum": {"tree", "types"},
    "start": {"tree", "types"},
    "_jaxopt": {"tree", "types"},
    "conditions": {"tree", "types"},
    "problem": {"conditions", "types"},
    "linear": {"_deprecation", "_jaxopt", "conditions", "spectrum", "tree", "types"},
    "solvers": {"_deprecation", "_jaxopt", "linear", "conditions", "start", "tree", "types"},
    "theorem": {"solvers", "linear", "conditions", "tree", "types"},
    "methods": {"theorem", "solvers", "linear", "problem", "conditions", "start", "tree", "types"},
    "advice": {"solvers", "linear", "spectrum", "conditions", "tree", "types"},
    "errors": {"types"},
    "layer_errors": {"errors", "linear", "tree", "types"},
    "hypergradients": {
        "advice",
        "layer_errors",
        "errors",
        "methods",
        "theorem",
        "solvers",
        "linear",
        "problem",
        "conditions",
        "start",
        "tree",
        "types",
    },
    "decorators": {"hypergradients", "errors", "solvers", "conditions", "tree", "types"},
    "outer": {"advice", "errors", "methods", "problem", "solvers", "start", "tree", "types"},
    "stochastic": {
        "errors",
        "methods",
        "theorem",
        "linear",
        "problem",
        "conditions",
        "spectrum",
        "tree",
        "types",
    },
    "certificates": {"notebook", "spectrum", "problem", "conditions", "tree", "types"},
    # The verifiers share no gradient code with the methods that they check.
    "verify": {"notebook", "spectrum", "problem", "conditions", "start", "tree", "types"},
    "testing": {"verify", "_deprecation", "_jaxopt", "problem", "conditions", "start", "types"},
}


@pytest.mark.parametrize("name", BELOW)
def test_a_module_imports_from_its_own_room_and_those_below(name):
    allowed = ALLOWED[room(name)] | {room(name)}
    # `bilevel.testing` imports the package itself when it suggests a solver and a method for a case.
    public = {"bilevel"} if room(name) == "testing" else set()
    assert {target for target in BELOW[name] - public if target == "bilevel" or room(target) not in allowed} == set()


def test_the_table_allows_what_is_used_and_no_more():
    assert between_rooms(ARROWS, "bilevel") == ALLOWED


def test_the_table_lists_each_room_after_those_that_it_may_import_from():
    rooms = list(ALLOWED)
    assert all(rooms.index(other) < rooms.index(name) for name, others in ALLOWED.items() for other in others)


def test_modules_import_each_other_in_no_circle():
    assert circle({name: targets - {"bilevel"} for name, targets in ARROWS.items()}) == []


@pytest.mark.parametrize("name", MODULES)
def test_one_module_imports_each_solver_library_and_none_imports_imaml(name):
    packages = {dotted.split(".")[0] for dotted in imported_names(MODULES[name])}
    assert "imaml" not in packages
    assert "jaxopt" not in packages or name == "bilevel._jaxopt.library"
    assert "lineax" not in packages or name == "bilevel.linear.from_lineax"
    assert "optimistix" not in packages or name == "bilevel.solvers.from_optimistix"


@pytest.mark.parametrize("path", sorted((ROOT / "imaml").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imaml_uses_the_public_names_of_bilevel(path):
    names = imported_names(path)
    assert not {name for name in names if name.split(".")[0] == "jaxopt"}
    assert not {name for name in names if name.startswith("bilevel.")}


def test_importing_bilevel_does_not_import_jaxopt():
    code = "import sys, bilevel; sys.exit('jaxopt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_bilevel_testing_imports_neither_hypothesis_nor_pytest():
    code = "import sys, bilevel.testing; sys.exit(bool({'hypothesis', 'pytest', 'jaxopt'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
