"""Write a table of the error messages of both packages, read from the `raise` statements in their source.

A refusal is a `raise` statement with a ValueError, TypeError or InputError, or a call of a helper that raises one.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
REFUSALS = ("ValueError", "TypeError", "InputError")
CHECKS = ("_check", "check")
"""Helpers that raise an InputError if their first argument is false; the second argument is its message."""


class Refusal(NamedTuple):
    """The type of an error, its message with … for each value, and the module that raises it."""

    kind: str
    message: str
    place: str


def setup(app):
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(app):
    """Write the table of each package to docs/generated, where a page includes it."""
    (DOCS / "generated").mkdir(exist_ok=True)
    for package in ("bilevel", "imaml"):
        (DOCS / "generated" / f"refusals-{package}.md").write_text(page(package))


def page(package: str) -> str:
    """Return a Markdown table of all refusals of a package, ordered by module."""
    rows = [f"| `{r.place}` | {r.kind} | {_escaped(r.message)} |" for r in refusals(ROOT / package)]
    return "\n".join(["| where | kind | message |", "|---|---|---|", *rows, ""])


def refusals(package: Path) -> Iterator[Refusal]:
    """Yield each refusal of a package, if its message is a string expression. Skip files directly in `testing`."""
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "testing":  # the assertions there raise AssertionError
            continue
        tree = ast.parse(path.read_text())
        place = path.relative_to(package.parent).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(tree):
            found = _raised(node)
            if found is not None:
                yield Refusal(*found, place.removesuffix(".__init__"))


def _raised(node):
    """Return the error type and the message of a refusal; None for any other node."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
        kind, arguments = node.exc.func.id, node.exc.args
        if kind in REFUSALS and arguments and (message := _text(arguments[0])):
            return kind, message
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKS
    if named and len(node.args) == 2 and (message := _text(node.args[1])):
        return "InputError", message
    return None


def _text(node):
    """Return the text of a string expression, with … for each value; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = _text(node.left), _text(node.right)
        return None if None in parts else "".join(parts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # "…".replace(…)
        return _text(node.func.value)
    return None


def _escaped(text):
    for character in "\\|*_`<[":
        text = text.replace(character, "\\" + character)
    return text.replace("\n", " ")
