"""Who may import whom: read from the source, so that a breach fails whether or not it runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each module of bilevel, and which others it may import. An arrow down is allowed, none goes up.
ALLOWED = {
    "types": set(),
    "tree": {"types"},
    "conditions": {"tree", "types", "_jaxopt", "_projections"},
    "diagnosis": {"tree", "types"},
    "linear": {"diagnosis", "conditions", "tree", "types", "_jaxopt"},
    "solvers": {"conditions", "tree", "types", "_jaxopt_solvers"},
    "failures": {"conditions", "types"},
    "hypergradients": {"failures", "solvers", "linear", "conditions", "tree", "types"},
    "estimators": {"hypergradients", "solvers", "linear", "conditions", "tree", "types"},
    "outer": {"estimators", "hypergradients", "failures", "solvers", "linear", "conditions", "tree", "types"},
    "_jaxopt": set(),
    "_projections": {"_jaxopt"},
    "_jaxopt_solvers": {"_jaxopt", "tree", "types"},
    "oracles": {"conditions", "tree", "types"},
    "tables": set(),
    "examine": {"oracles", "tables", "conditions", "tree", "types"},
    "suspects": {"oracles", "tables", "conditions", "tree", "types"},
    "verify": {"suspects", "oracles", "tables", "conditions", "tree", "types"},
    "compare": {"oracles", "tables", "conditions", "tree", "types"},
    "lipschitz": {"types"},
    "spectrum": {"tree", "types"},
    "error_bounds": {"lipschitz", "spectrum", "conditions", "tree", "types"},
    "certificates": {"error_bounds", "lipschitz", "conditions", "tree", "types"},
}
# The test kit shares no gradient code with the methods it checks; it is handed those, or asks `bilevel` for them by
# their public names while a case suggests one.
ALLOWED_TO_TESTING = {"testing", "suspects", "examine", "oracles", "tables", "conditions", "tree", "types"}


def imports(path: Path) -> set[str]:
    """The dotted names a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules_of_bilevel(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("bilevel.")}


@pytest.mark.parametrize("path", sorted((ROOT / "bilevel").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_bilevel_imports_downward_only(path):
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] == "imaml"}
    if path.name != "_jaxopt.py":
        assert not {name for name in names if name.split(".")[0] == "jaxopt"}
    if path.parent.name == "bilevel" and path.stem in ALLOWED:
        assert modules_of_bilevel(path) <= ALLOWED[path.stem]
    if path.parent.name == "testing":
        assert modules_of_bilevel(path) <= ALLOWED_TO_TESTING


@pytest.mark.parametrize("path", sorted((ROOT / "imaml").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imaml_uses_the_public_names_of_bilevel(path):
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] == "jaxopt"}
    assert not {name for name in names if name.startswith("bilevel.")}


def test_every_module_of_bilevel_stands_in_the_table():
    modules = {path.stem for path in (ROOT / "bilevel").glob("*.py")} - {"__init__"}
    assert modules <= set(ALLOWED), f"say what these may import: {modules - set(ALLOWED)}"


def test_importing_bilevel_does_not_import_jaxopt():
    code = "import sys, bilevel; sys.exit('jaxopt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_the_test_kit_imports_neither_hypothesis_nor_pytest():
    code = "import sys, bilevel.testing; sys.exit(bool({'hypothesis', 'pytest', 'jaxopt'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
