"""Check the site's links, API pages, gallery and list of error messages, and that importing the packages is fast."""

import ast
import importlib
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from blocks import ROOT, blocks, pages

PACKAGES = ("bilevel", "bilevel.stochastic", "bilevel.testing", "imaml", "imaml.datasets")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEAVY = {"jaxopt", "optax", "matplotlib", "rich", "scipy", "sklearn", "hypothesis", "pytest", "PIL", "flax", "equinox"}
"""Packages that are slow to import and that only some functions need."""


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site generate them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links_have_targets(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"\w+:", target):  # an external link
            continue
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        assert goal.exists(), target
        assert not anchor or anchor in anchors(goal), target


def documented() -> set[str]:
    """Return the dotted names that the API pages document. `automodule` documents all public names of a module."""
    found = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for block in blocks(page):
            module = ""
            for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", block.text, flags=re.MULTILINE):
                if directive == "currentmodule":
                    module = name
                elif directive == "automodule":
                    found.add(name)
                    found |= {f"{name}.{member}" for member in public(name)}
                elif directive.startswith("auto"):
                    found.add(name if name.startswith(("bilevel.", "imaml.")) else f"{module}.{name}")
    return found


def public(module: str) -> list[str]:
    """Return a module's ``__all__``, or else the public names that it defines."""
    names = vars(importlib.import_module(module))
    return names.get("__all__") or [
        name for name, value in names.items() if name[0] != "_" and getattr(value, "__module__", None) == module
    ]


def described(module: str) -> set[str]:
    """Return the names in a module's source whose assignment is followed by a string."""
    body = ast.parse(Path(importlib.import_module(module).__file__).read_text()).body
    return {
        node.targets[0].id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.Assign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_an_api_page(package):
    missing = {f"{package}.{name}" for name in public(package)} - documented()
    assert not missing, "document them on a page in docs/api/"


def test_the_api_pages_have_no_other_names_of_bilevel():
    names = {name.removeprefix("bilevel.") for name in documented() if name.startswith("bilevel.")}
    assert {name for name in names if "." not in name} == set(public("bilevel"))


def test_the_front_page_of_the_api_has_the_names_in_the_docstring():
    front = (ROOT / "docs" / "api" / "index.md").read_text()
    listed = set(re.findall(r"`~bilevel\.(\w+)`", front))
    docstring = importlib.import_module("bilevel").__doc__
    assert listed == set(re.findall(r"``(\w+)``", docstring.partition("The other names")[0]))
    assert listed <= set(public("bilevel"))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    module = importlib.import_module(package)
    constants = described("bilevel.certificates.lipschitz") | described("bilevel.solvers.protocol")
    for name in public(package):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            text = inspect.getdoc(value) or ""
            # The default docstring of a dataclass is its signature.
            assert len(text) > 20 and not text.startswith(f"{name}("), name
        else:
            assert name in constants, f"{name} needs a string below its assignment, in a module that `constants` reads"


def test_the_gallery_shows_every_example():
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f"```{{example}} {example.stem}\n:alt: " in gallery, example.stem


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_begins_with_what_the_reader_can_do_after_it(page):
    if page.name != "changelog.md" and not {"_build", "generated"} & set(page.parts):
        begin = page.read_text().splitlines()[2]
        assert begin.startswith("After this page you "), begin


def test_the_words_that_readers_search_for_are_in_headings():
    text = (ROOT / "docs" / "trouble.md").read_text()
    headings = " ".join(re.findall(r"^## (.+)$", text, flags=re.MULTILINE))
    assert all(word in headings for word in ("NaN", "OOM", "L-BFGS", "BatchNorm", "indefinite"))


def test_the_list_of_error_messages_is_complete():
    sys.path.insert(0, str(ROOT / "docs" / "extensions"))
    import refusals

    bilevel, imaml = (refusals.page(package) for package in ("bilevel", "imaml"))
    assert "Unrolled(last=…) needs last between 1 and the solver's … steps" in bilevel
    assert "outer.steps must be at least 1, got …" in imaml  # the helper `check` raises it
    raises = sum(len(re.findall(r"raise (ValueError|TypeError)\(", p.read_text())) for p in sources("bilevel"))
    assert bilevel.count("\n") - 2 == raises


def sources(package: str) -> list[Path]:
    return [path for path in (ROOT / package).rglob("*.py") if path.parent.name != "testing"]


def test_importing_both_packages_imports_nothing_heavy():
    code = f"import sys, bilevel, imaml, imaml.cli; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
