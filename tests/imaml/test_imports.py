"""The imports between the rooms of imaml: each room imports only from lower ones, and there is no cycle.

A room is a folder of ``imaml/``, or one of the modules directly in it.
"""

from pathlib import Path

import pytest
from architecture import arrows, between_rooms, circle, room

ARROWS = arrows(Path(__file__).parents[2] / "imaml")
# `imaml/__init__.py` belongs to no room: it imports `imaml.public` when a public name is first used.
MODULES = {name: targets for name, targets in ARROWS.items() if name != "imaml"}
# The rooms from the lowest to the highest, each with the rooms that it may import from.
ALLOWED = {
    "errors": set(),
    "entry_points": {"errors"},
    "tables": set(),
    "storage": {"errors"},
    "parallel": {"errors"},
    "datasets": {"storage", "entry_points", "errors"},
    "learning": {"datasets", "errors"},
    "settings": {"learning", "entry_points", "errors"},
    "runs": {"settings", "learning", "datasets", "parallel", "storage", "tables", "errors"},
    "reports": {"runs", "settings", "learning", "datasets", "storage", "tables", "errors"},
    "reproduction": {"reports", "runs", "settings", "learning", "datasets", "storage", "tables", "errors"},
    "arguments": {"reproduction", "runs", "settings", "learning", "datasets", "errors"},
    "public": {"reports", "runs", "settings", "learning", "datasets", "errors"},
    "cli": {"arguments", "reproduction", "reports", "runs", "settings", "learning", "datasets", "parallel", "errors"},
    "__main__": {"cli"},
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_its_own_room_and_allowed_lower_rooms(name):
    allowed = ALLOWED[room(name)] | {room(name)}
    assert {target for target in MODULES[name] if target == "imaml" or room(target) not in allowed} == set()


def test_the_table_lists_exactly_the_imports_between_rooms():
    assert between_rooms(ARROWS, "imaml") == ALLOWED


def test_each_room_in_the_table_may_import_only_from_rooms_that_precede_it():
    rooms = list(ALLOWED)
    assert all(rooms.index(other) < rooms.index(name) for name, others in ALLOWED.items() for other in others)


def test_the_imports_of_modules_have_no_cycle():
    assert circle(ARROWS) == []


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
def test_every_form_of_import_is_found_anywhere_in_a_module(tmp_path, line):
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
