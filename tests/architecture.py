"""Read the imports of a package from its source, and find modules that import each other in a circle.

Every import statement counts, wherever it stands: at the top of a file, inside a function, or under ``TYPE_CHECKING``.
"""

import ast
from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def modules_of(package: Path) -> dict[str, Path]:
    """Return the files of a package by dotted name. The ``__init__.py`` of a folder has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(package: Path) -> dict[str, set[str]]:
    """Map each module of a package to the set of modules of the same package that it imports."""
    modules = modules_of(package)
    return {name: imported_names(path, modules) & set(modules) - {name} for name, path in modules.items()}


def imported_names(path: Path, modules: Mapping[str, Path] = {}) -> set[str]:  # the default is only read
    """Return the dotted names of the modules that a file imports.

    ``from a import b`` counts as an import of the module ``a.b`` if ``modules`` has that name, and of ``a`` if not.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this function does not read"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {dotted if dotted in modules else str(node.module) for dotted in names.values()}
    return found


def room(module: str) -> str:
    """Return the room of a module: its folder directly under the package, or its own name if no folder holds it."""
    return module.split(".")[1]


def between_rooms(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """Map each room to the set of rooms that it imports from. The package's own ``__init__.py`` is left out."""
    found = defaultdict(set)
    for name, targets in graph.items():
        if name != package:
            found[room(name)] |= {room(target) for target in targets if target != package} - {room(name)}
    return dict(found)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import circle, the first again at the end, or an empty list if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []
