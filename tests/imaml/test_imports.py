"""Who may import whom in imaml: each layer only those above it in this list, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "imaml"
LAYERS = (
    {"errors", "interruption", "networks", "versions"},
    {"files", "rollcall"},
    {"arrays", "runlog"},
    {"checkpoints", "datasets", "devices", "plots", "problem", "processes", "progress"},
    {"tasks"},
    {"algorithms"},
    {"settings"},
    {"meta_step", "presets"},
    {"compilation", "evaluation", "verification"},
    {"runfolder"},
    {"training", "reproduction"},
    {"cli"},
    {"__main__"},
)


def layer(module: str) -> int:
    return next(number for number, modules in enumerate(LAYERS) if module in modules)


def imported_modules(path: Path) -> set[str]:
    """Modules of imaml that a file imports when it runs; what only a type checker reads does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "imaml":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("imaml."):
            found.add(node.module.split(".")[1])
    return found


MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_to_earlier_layers(path):
    assert {name: layer(name) for name in imported_modules(path) if layer(name) >= layer(path.stem)} == {}


@pytest.mark.parametrize("path", sorted((PACKAGE / "datasets").glob("*.py")), ids=lambda path: path.stem)
def test_datasets_know_of_nothing_but_files_and_errors(path):
    assert imported_modules(path) <= {"datasets", "arrays", "files", "errors"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "reproduction").glob("*.py")), ids=lambda path: path.stem)
def test_reproduction_imports_earlier_layers(path):
    others = imported_modules(path) - {"reproduction"}
    assert {name: layer(name) for name in others if layer(name) >= layer("reproduction")} == {}


def test_every_module_has_a_layer():
    assert {path.stem for path in MODULES} | {"datasets", "reproduction"} == set().union(*LAYERS)
