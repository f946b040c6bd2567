"""The project's files name one version, each extra has a check, and the wheel holds all modules and the types."""

import re
import tomllib
import zipfile
from pathlib import Path

from benchmarks.extras import JOBS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    citation = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation and newest
    assert citation[1] == newest[1] == PROJECT["version"]


def test_each_extra_is_tried_alone():
    assert set(JOBS) == {"base", *PROJECT["optional-dependencies"]}


def test_the_wheel_holds_the_packages_with_their_types_and_nothing_of_the_checkout_besides(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"bilevel/py.typed", "imaml/py.typed", "pytest_bilevel.py"} <= set(names)
    info = f"bilevel_imaml-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"bilevel", "imaml", "pytest_bilevel.py", info}


def test_the_wheel_holds_each_module_of_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("bilevel", "imaml"):
        assert {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")} <= names
    assert "imaml/datasets/glyphs.npz" in names
