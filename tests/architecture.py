"""The imports of a package, read from its source: which module imports which, and whether there is a circle.

Every import counts, wherever it stands: at the top of a file, inside a function, or under ``TYPE_CHECKING``.
"""

import ast
from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def modules_of(package: Path) -> dict[str, Path]:
    """Return the files of a package by dotted name; the ``__init__.py`` of a folder has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(package: Path) -> dict[str, set[str]]:
    """Return each module of a package with the modules of the same package that it imports."""
    modules = modules_of(package)
    return {name: imported_names(path, modules) & set(modules) - {name} for name, path in modules.items()}


def imported_names(path: Path, modules: Mapping[str, Path] = {}) -> set[str]:  # nobody writes to it
    """Return the dotted names of the modules that a file imports; ``modules`` are known to be modules, not names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import, which this function does not read"
            # `from imaml.runs import log` imports a module, `from imaml.datasets import load` a name of a package.
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {dotted if dotted in modules else str(node.module) for dotted in names.values()}
    return found


def room(module: str) -> str:
    """Return the folder of a package, or its top module, in which a module stands."""
    return module.split(".")[1]


def between_rooms(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """Return each room with the rooms that it imports from; the package's own ``__init__.py`` is no room."""
    found = defaultdict(set)
    for name, targets in graph.items():
        if name != package:
            found[room(name)] |= {room(target) for target in targets if target != package} - {room(name)}
    return dict(found)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle, in order and with the first again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []
