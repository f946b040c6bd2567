"""Imports between the rooms of imaml point down, and there is no circle.

A room is a folder of ``imaml/``, or one of its top modules.
"""

from pathlib import Path

import pytest
from architecture import arrows, between_rooms, circle, room

ARROWS = arrows(Path(__file__).parents[2] / "imaml")
# The package's own `__init__.py` stands above all rooms: it collects the public names.
BELOW = {name: targets for name, targets in ARROWS.items() if name != "imaml"}
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


@pytest.mark.parametrize("name", BELOW)
def test_a_module_imports_from_its_own_room_and_those_below(name):
    allowed = ALLOWED[room(name)] | {room(name)}
    assert {target for target in BELOW[name] if target == "imaml" or room(target) not in allowed} == set()


def test_the_table_allows_what_is_used_and_no_more():
    assert between_rooms(ARROWS, "imaml") == ALLOWED


def test_the_table_points_down():
    rooms = list(ALLOWED)
    assert all(rooms.index(other) < rooms.index(name) for name, others in ALLOWED.items() for other in others)


def test_modules_import_each_other_in_no_circle():
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
