"""Plant a fault in a copy of the library: find an expression or statement by its syntax, and replace it.

A fault names a function, method or class and holds two snippets of Python: a pattern of code in that place, and the
code that replaces what the pattern matches:

    Fault("adjoint term's sign", "Implicit.__call__", "tree.subtract(_H, _BV)", "tree.add(_H, _BV)")

Snippets are compared as syntax trees. A fault therefore still matches if its function moves to another file, if the
code is reformatted, or if comments change. With placeholders it still matches if local variables are renamed:

- ``_A``, ``_LEFT``, … (names that begin with an underscore and a capital letter) match any expression. If a name occurs
  twice in a pattern, both expressions must be equal. The replacement may use the placeholders of the pattern.
- ``...`` matches any expression; as the last positional argument of a call it matches all further arguments.
"""

import ast
import builtins
import copy
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PLACEHOLDER = re.compile(r"_[A-Z]")
Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ATOMS = (ast.Call, ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.List)
"""Expressions that need no parentheses in any context."""


class PlantingError(ValueError):
    """Error for a fault whose place or match is missing or ambiguous, or whose replacement is not valid there."""


class Fault(NamedTuple):
    """A change of one expression or statement that makes the library wrong.

    Attributes:
        name: identifies the fault on the command line.
        place: the qualified name of a function, method or class, such as ``"minimize"`` or ``"CG.__call__"``. If it
            is defined more than once, consecutive parts of the module's name stand before a colon:
            ``"solvers:report"``, ``"imaml:optimizer"``.
        pattern: an expression or a statement; it must match exactly once in the place.
        replacement: the expression or statement that is written instead.
    """

    name: str
    place: str
    pattern: str
    replacement: str


class Definition(NamedTuple):
    """A function, method or class, with the file that defines it."""

    path: Path
    module: str
    module_tree: ast.Module
    node: Named


class Change(NamedTuple):
    """A file and its whole content after a change."""

    path: Path
    content: bytes


@dataclass(frozen=True)
class Sources:
    """The definitions in some folders of Python files, by qualified name."""

    definitions: dict[str, list[Definition]]

    @staticmethod
    def read(root: Path, *folders: str) -> "Sources":
        """Parse every Python file in these folders of ``root``."""
        definitions: dict[str, list[Definition]] = {}
        for path in (path for folder in folders for path in sorted((root / folder).rglob("*.py"))):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            tree = ast.parse(path.read_bytes())
            for name, node in _definitions(tree):
                definitions.setdefault(name, []).append(Definition(path, module, tree, node))
        return Sources(definitions)

    def find(self, place: str) -> Definition:
        """Return the one definition of the name ``place``; :class:`Fault` says how a place is written.

        Raises:
            PlantingError: if the name is unknown or ambiguous.

        Example:
            >>> sources = Sources.read(Path(__file__).parents[1], "benchmarks")
            >>> sources.find("planting:Sources.find").path.name
            'planting.py'
        """
        part, _, name = place.rpartition(":")
        everywhere = self.definitions.get(name, [])
        found = [each for each in everywhere if not part or f".{part}." in f".{each.module}."]
        if len(found) == 1:
            return found[0]
        full = [f"{each.module}:{name}" for each in found or everywhere]
        if found:
            raise PlantingError(f"{place} is defined {len(found)} times, write one of {', '.join(full)}")
        close = full or difflib.get_close_matches(name, self.definitions, n=3)
        advice = f"; similar: {', '.join(close)}" if close else ""
        raise PlantingError(f"no function, method or class is called {place}{advice}")

    def plant(self, fault: Fault) -> Change:
        """Return the file that holds the fault's place, with the fault in it.

        Everything around the replaced expression or statement is kept byte for byte.

        Raises:
            PlantingError: if the place is unknown or ambiguous, if the pattern does not match exactly once in it, or
                if the replacement uses a placeholder or a variable that does not exist there.
        """
        try:
            place = self.find(fault.place)
            pattern, replacement = _parsed(fault.pattern), _parsed(fault.replacement)
            if isinstance(pattern, ast.expr) != isinstance(replacement, ast.expr):
                kinds = [_kind(pattern), _kind(replacement)]
                raise PlantingError(
                    f"the pattern is {kinds[0]} and the replacement {kinds[1]}: write two expressions or two statements"
                )
            node, bound = self._only_match(fault, place)
            _check_names(replacement, bound, place, node)
            return _spliced(place, node, _Exchange({**bound}).visit(replacement))
        except PlantingError as error:
            raise PlantingError(f"{fault.name}: {error}") from None

    def _only_match(self, fault, place):
        pattern = _parsed(fault.pattern)
        found = _matches_in(pattern, place.node)
        if len(found) == 1:
            return found[0]
        lines = ", ".join(str(node.lineno) for node, _ in found)
        matches = f"{len(found)} times: in lines {lines}" if found else f"0 times; {self._elsewhere(pattern)}"
        where = f"{fault.place} ({place.path.name})"
        raise PlantingError(f"{fault.pattern} must match exactly once in {where}, but it matches {matches}")

    def _elsewhere(self, pattern):
        """Name the smallest definitions in which the pattern matches, because code often moves to another function."""
        found = [
            (len(ast.unparse(each.node)), f"{each.module}:{name}")
            for name, definitions in self.definitions.items()
            for each in definitions
            if len(_matches_in(pattern, each.node)) == 1
        ]
        return f"it matches once in {', '.join(name for _, name in sorted(found)[:3]) or 'no other place'}"


def match(pattern: ast.AST, node: ast.AST) -> dict[str, ast.expr] | None:
    """Return the expression that each placeholder of the pattern stands for, or None if the pattern does not match.

    Example:
        >>> bound = match(_parsed("f(_A, ...)"), _parsed("f(x + 1, y, key=z)"))
        >>> {name: ast.unparse(node) for name, node in bound.items()}
        {'_A': 'x + 1'}
    """
    bound: dict[str, ast.expr] = {}
    return bound if _matches(pattern, node, bound) else None


def _matches(pattern, node, bound):
    if _is_ellipsis(pattern):
        return isinstance(node, ast.expr)
    if isinstance(pattern, ast.Name) and PLACEHOLDER.match(pattern.id):
        return isinstance(node, ast.expr) and ast.unparse(bound.setdefault(pattern.id, node)) == ast.unparse(node)
    if type(pattern) is not type(node):
        return False
    if isinstance(pattern, list):
        return len(pattern) == len(node) and all(_matches(a, b, bound) for a, b in zip(pattern, node, strict=True))
    if isinstance(pattern, ast.Call):
        return _matches(pattern.func, node.func, bound) and _arguments_match(pattern, node, bound)
    if isinstance(pattern, ast.AST):
        fields = [field for field in pattern._fields if field not in ("ctx", "kind", "type_comment")]
        return all(_matches(getattr(pattern, field), getattr(node, field), bound) for field in fields)
    return pattern == node


def _arguments_match(pattern, node, bound):
    """Compare positional arguments in their order and keywords by name."""
    positional, given = pattern.args, node.args
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if positional and _is_ellipsis(positional[-1]):
        positional = positional[:-1]
        given = given[: len(positional)]
    elif len(keywords) != len(pattern.keywords):
        return False
    return _matches(positional, given, bound) and all(
        keyword.arg in keywords and _matches(keyword.value, keywords[keyword.arg], bound)
        for keyword in pattern.keywords
    )


def _is_ellipsis(node):
    return isinstance(node, ast.Constant) and node.value is ...


def _parsed(snippet):
    """Return the syntax tree of a snippet that is one expression or one statement."""
    try:
        body = ast.parse(snippet).body
    except SyntaxError as error:
        raise PlantingError(f"{snippet!r} is not Python: {error.msg}") from None
    if len(body) != 1:
        raise PlantingError(f"{snippet!r} is not one expression or statement")
    return body[0].value if isinstance(body[0], ast.Expr) else body[0]


def _kind(snippet):
    return "an expression" if isinstance(snippet, ast.expr) else "a statement"


def _matches_in(pattern, tree) -> list[tuple[ast.expr | ast.stmt, dict[str, ast.expr]]]:
    """Return the matching expressions or statements of a tree, each with the expressions of the placeholders."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.expr | ast.stmt))
    return [(node, bound) for node in nodes if (bound := match(pattern, node)) is not None]


def _definitions(node, prefix="") -> Iterator[tuple[str, Named]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Named):
            yield prefix + child.name, child
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):
            yield from _definitions(child, prefix)


def _check_names(replacement, bound, place, node):
    """Raise PlantingError if the replacement uses a name that does not exist in the place.

    A test that fails with a NameError would not show that it detects the fault.
    """
    used = {each.id for each in ast.walk(replacement) if isinstance(each, ast.Name)}
    placeholders = {name for name in used if PLACEHOLDER.match(name)}
    if unbound := placeholders - set(bound):
        raise PlantingError(f"the replacement uses {', '.join(sorted(unbound))}, and the pattern does not")
    known = set(dir(builtins)) | {each.arg for each in ast.walk(replacement) if isinstance(each, ast.arg)}
    for statement in place.module_tree.body:
        around = any(each is node for each in ast.walk(statement))
        known |= _names(statement) if around or not isinstance(statement, Named) else {statement.name}
    if unknown := used - placeholders - known:
        raise PlantingError(f"the replacement uses {', '.join(sorted(unknown))}, unknown in {place.module}")


def _names(tree):
    """Return the names of variables, arguments, imports and definitions in a tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, Named):
            names.add(node.name)
    return names


class _Exchange(ast.NodeTransformer):
    """Replace nodes of a tree. The keys of ``new`` are names of placeholders, or ``id(node)``."""

    def __init__(self, new):
        self.new = new

    def visit(self, node):
        key = node.id if isinstance(node, ast.Name) and node.id in self.new else id(node)
        return copy.deepcopy(self.new[key]) if key in self.new else self.generic_visit(node)


def _spliced(place, node, new):
    content = place.path.read_bytes()
    lines = content.splitlines(keepends=True)
    start, end = (  # columns count bytes
        sum(map(len, lines[: line - 1])) + column
        for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
    )
    code = ast.unparse(new)
    if isinstance(new, ast.stmt):
        code = code.replace("\n", "\n" + " " * node.col_offset)
    elif not isinstance(new, ATOMS):
        code = f"({code})"
    changed = content[:start] + code.encode() + content[end:]
    # Precedence and indentation are right if the changed text parses to the changed tree.
    copies: dict[int, ast.AST] = {}
    meant = copy.deepcopy(place.module_tree, copies)
    meant = _Exchange({id(copies[id(node)]): new}).visit(meant)
    try:
        fits = ast.unparse(ast.parse(changed)) == ast.unparse(meant)
    except SyntaxError:
        fits = False
    if not fits:
        raise PlantingError(f"the replacement does not fit into its place: {code}")
    return Change(place.path, changed)
