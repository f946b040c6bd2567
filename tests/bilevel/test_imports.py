"""Modules import only what the table below allows; imports are read from the source, so that all are checked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The modules that each module of bilevel may import: those below it, so that no two import each other.
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
    "verify.oracles": {"conditions", "tree", "types"},
    "verify.tables": set(),
    "verify.examine": {"verify.oracles", "verify.tables", "conditions", "tree", "types"},
    "verify.suspects": {"verify.oracles", "verify.tables", "conditions", "tree", "types"},
    "verify.verdict": {"verify.suspects", "verify.oracles", "verify.tables", "conditions", "tree", "types"},
    "verify.compare": {"verify.oracles", "verify.tables", "conditions", "tree", "types"},
    "verify": {"verify.examine", "verify.verdict", "verify.compare"},
    "certificates.lipschitz": {"types"},
    "certificates.spectrum": {"tree", "types"},
    "certificates.error_bounds": {"certificates.lipschitz", "certificates.spectrum", "conditions", "tree", "types"},
    "certificates.certify": {"certificates.error_bounds", "certificates.lipschitz", "conditions", "tree", "types"},
    "certificates": {"certificates.certify", "certificates.lipschitz"},
}
# The test kit shares no gradient code with the methods that it checks. It gets a method as an argument, or, for the
# method that a case suggests, by its public name in `bilevel`.
VERIFIERS = {"verify.examine", "verify.suspects", "verify.oracles", "verify.tables"}
ALLOWED_TO_TESTING = {"conditions", "tree", "types"} | VERIFIERS


def imports(path: Path) -> set[str]:
    """Return the dotted names of all imports in a file, those inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module(path: Path) -> str:
    """Return the dotted name of a file relative to `bilevel`; for an ``__init__`` that of its package."""
    parts = path.relative_to(ROOT / "bilevel").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module(path): path for path in sorted((ROOT / "bilevel").rglob("*.py"))}


def modules_of_bilevel(path: Path) -> set[str]:
    return {home(name.removeprefix("bilevel.")) for name in imports(path) if name.startswith("bilevel.")}


def home(name: str) -> str:
    """Return the module that defines a dotted name."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda p: str(p.relative_to(ROOT)))
def test_bilevel_imports_downward_only(path):
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] == "imaml"}
    if path.name != "_jaxopt.py":
        assert not {name for name in names if name.split(".")[0] == "jaxopt"}
    if module(path) in ALLOWED:
        assert modules_of_bilevel(path) <= ALLOWED[module(path)]
    if path.parent.name == "testing":
        others = {name for name in modules_of_bilevel(path) if name.split(".")[0] != "testing"}
        assert others <= ALLOWED_TO_TESTING


@pytest.mark.parametrize("path", sorted((ROOT / "imaml").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imaml_uses_the_public_names_of_bilevel(path):
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] == "jaxopt"}
    assert not {name for name in names if name.startswith("bilevel.")}


def test_the_table_holds_every_module_of_bilevel():
    modules = {name for name in MODULES if name and name.split(".")[0] != "testing"}
    assert modules == set(ALLOWED), f"missing in ALLOWED, or no longer there: {modules ^ set(ALLOWED)}"


def test_importing_bilevel_does_not_import_jaxopt():
    code = "import sys, bilevel; sys.exit('jaxopt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_importing_the_test_kit_imports_neither_hypothesis_nor_pytest():
    code = "import sys, bilevel.testing; sys.exit(bool({'hypothesis', 'pytest', 'jaxopt'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
