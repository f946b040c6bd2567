"""Objects that installed packages offer as entry points in a group of this package.

A package offers a dataset or a preset in its ``pyproject.toml``::

    [project.entry-points."imaml.datasets"]
    cards = "my_package.data:read_cards"
"""

from importlib.metadata import entry_points
from typing import Any

from imaml.errors import InputError


def offered(group: str) -> tuple[str, ...]:
    """Return the sorted names of the entry points in a group. No package is imported.

    Args:
        group: the name of the group, such as ``"imaml.datasets"``.
    """
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def load(group: str, name: str) -> Any:
    """Import the package that offers an entry point, and return the object that the entry point names.

    Args:
        group: the name of the group, such as ``"imaml.datasets"``.
        name: one of :func:`offered`.

    Raises:
        InputError: if no entry point or several different ones have this name, or if the import fails.
    """
    points = list(entry_points(group=group, name=name))
    if len({point.value for point in points}) != 1:
        places = ", ".join(sorted(point.value for point in points)) or "no package"
        raise InputError(f"{name!r} should be offered by one installed package in the group {group}, got {places}")
    try:
        return points[0].load()
    except Exception as error:  # any error of a foreign module
        raise InputError(
            f"{points[0].value}, which is the entry point {name!r} of {group}, cannot be imported "
            f"({type(error).__name__}: {error}); repair or uninstall its package"
        ) from error
