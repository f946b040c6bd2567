"""Which module of imaml imports which, read from the source: arrows between rooms point down, and there is no circle.

A room is a folder of ``imaml/``, or one of its top modules. Every import counts, wherever it stands: at the top of a
file, inside a function, or under ``TYPE_CHECKING``.
"""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "imaml"
# Each room with the rooms that it may import from, the lowest first.
ALLOWED = {
    "errors": set(),
    "storage": {"errors"},
    "parallel": {"errors"},
    "datasets": {"storage", "errors"},
    "learning": {"datasets", "errors"},
    "settings": {"learning", "errors"},
    "runs": {"settings", "learning", "datasets", "parallel", "storage", "errors"},
    "report": {"runs", "storage"},
    "reproduction": {"report", "runs", "settings", "learning", "storage", "errors"},
    "cli": {"reproduction", "report", "runs", "settings", "learning", "datasets", "parallel", "errors"},
    "__main__": {"cli"},
}


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by dotted name; a folder's ``__init__.py`` by the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(package: Path) -> dict[str, set[str]]:
    """Each module of a package with the modules of the same package that it imports."""
    modules = modules_of(package)
    return {name: imported_modules(path, modules) - {name} for name, path in modules.items()}


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this test does not read"
            # `from imaml.runs import log` imports a module, `from imaml.datasets import load` a name of a package.
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {dotted if dotted in modules else str(node.module) for dotted in names.values()}
    return found & set(modules)


def room(module: str) -> str:
    return module.split(".")[1]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, in order and with the first again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


ARROWS = arrows(PACKAGE)
# The package's own `__init__.py` stands above all rooms: it collects the public names.
BELOW = {name: targets for name, targets in ARROWS.items() if name != "imaml"}


def between_rooms() -> dict[str, set[str]]:
    found = defaultdict(set)
    for name, targets in BELOW.items():
        found[room(name)] |= {room(target) for target in targets if target != "imaml"} - {room(name)}
    return dict(found)


@pytest.mark.parametrize("name", BELOW)
def test_a_module_imports_from_its_own_room_and_those_below(name):
    allowed = ALLOWED[room(name)] | {room(name)}
    assert {target for target in BELOW[name] if target == "imaml" or room(target) not in allowed} == set()


def test_the_table_allows_what_is_used_and_no_more():
    assert between_rooms() == ALLOWED


def test_the_table_points_down():
    rooms = list(ALLOWED)
    assert all(rooms.index(other) < rooms.index(name) for name, others in ALLOWED.items() for other in others)


def test_modules_import_each_other_in_no_circle():
    assert circle(ARROWS) == []


def test_rooms_import_each_other_in_no_circle():
    assert circle(between_rooms()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from house.upper.roof import tile",
        "from house.upper import roof",
        "import house.upper.roof",
        "if TYPE_CHECKING:\n    from house.upper.roof import tile",
        "def late():\n    from house.upper import roof",
    ],
)
def test_an_import_counts_wherever_and_however_it_is_written(tmp_path, line):
    sources = {"__init__": "", "upper/__init__": "", "upper/roof": "from house import lower", "lower": line}
    for name, source in sources.items():
        path = tmp_path / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    found = arrows(tmp_path / "house")
    assert found == {
        "house": set(), "house.upper": set(), "house.upper.roof": {"house.lower"}, "house.lower": {"house.upper.roof"},
    }  # fmt: skip
    assert set(circle(found)) == {"house.lower", "house.upper.roof"}
