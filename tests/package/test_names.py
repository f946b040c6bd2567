"""No public name of a package is also the name of one of its modules.

If ``certificates/__init__.py`` imports a function ``certify`` from a module ``certify``, the attribute of the package
is the function. ``import bilevel.certificates.certify as c`` then binds the function instead of the module.
"""

import importlib
import pkgutil
from types import ModuleType

import pytest

import bilevel
import imaml


def packages(package):
    """Return a package and all packages inside it."""
    inside = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [package, *(importlib.import_module(found.name) for found in inside if found.ispkg)]


def clashes(package):
    """Return the names that belong to a module in a package's folder, but to another object in the package."""
    modules = [found.name for found in pkgutil.iter_modules(package.__path__)]
    return [name for name in modules if not isinstance(getattr(package, name, package), ModuleType)]


@pytest.mark.parametrize("package", [*packages(bilevel), *packages(imaml)], ids=lambda package: package.__name__)
def test_no_module_is_hidden_by_another_object_of_its_name(package):
    assert clashes(package) == []


def test_a_clash_is_found(tmp_path, monkeypatch):
    folder = tmp_path / "house"
    folder.mkdir()
    (folder / "__init__.py").write_text("from house.door import door\nfrom house import window\n")
    (folder / "door.py").write_text("def door(): pass\n")
    (folder / "window.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert clashes(importlib.import_module("house")) == ["door"]
