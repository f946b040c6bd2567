"""The place of a fault is found by syntax, in any file and formatting. A missing or ambiguous place is an error."""

import doctest

import pytest

from benchmarks import planting
from benchmarks.planting import Fault, PlantingError, Sources

SOURCE = '''\
"""θ takes two bytes: columns of the syntax tree count bytes."""
from elsewhere import decorate, f, g

class Solver:
    def run(self, y, x):  # a comment
        θ = x   ;   return θ + f(y)   # another

@decorate(1)
def outer(y, x):
    def inner(z):
        return z
    return EXPRESSION

def unrelated(a):
    return a
'''


@pytest.fixture
def library(tmp_path):
    """Return the function that writes SOURCE with an expression into one or more files, and reads them."""

    def write(expression="y", files=("code.py",)):
        for file in files:
            (tmp_path / "library" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "library" / file).write_text(SOURCE.replace("EXPRESSION", expression))
        return Sources.read(tmp_path, "library")

    return write


def plant(sources, pattern, replacement, place="outer"):
    """Return the new text of the one line that the fault changes."""
    change = sources.plant(Fault("a fault", place, pattern, replacement))
    before, after = change.path.read_text().splitlines(), change.content.decode().splitlines()
    [line] = [new for old, new in zip(before, after, strict=True) if old != new]
    return line


@pytest.mark.parametrize(
    ("expression", "pattern", "replacement", "expected"),
    [
        ("f(y, x)", "f(y, x)", "g(y)", "g(y)"),
        ("f(  y, x )", "f(y, x)", "y", "y"),
        ("f(y, x + 1)", "f(y, _A)", "f(_A, y)", "f(x + 1, y)"),
        ("f(y, y)", "f(_LEFT, _LEFT)", "f(_LEFT)", "f(y)"),
        ("f(x - y, 2) * x", "f(_A, 2)", "_A", "(x - y) * x"),
        ("f(y)(x)", "_F(x)", "_F(y)", "f(y)(y)"),
        ("f(y, x, key=1, more=2)", "f(...)", "y", "y"),
        ("f(y, x, key=1, more=2)", "f(_A, ..., more=2)", "_A", "y"),
        ("f(y, key=1, more=2)", "f(_A, more=_M, key=1)", "f(_M)", "f(2)"),
        ("f(y, x)", "f(..., _B)", "f(_B)", "f(x)"),
        ("[z for z in x if z > 1]", "z > 1", "z > 2", "[z for z in x if (z > 2)]"),
        ("g('θ') + f(y)", "f(y)", "y", "g('θ') + y"),
        ("y and not x", "not x", "True", "y and True"),
        ("y", "y", "(lambda new: new)(y)", "(lambda new: new)(y)"),
    ],
)
def test_an_expression_is_found_and_replaced(library, expression, pattern, replacement, expected):
    assert plant(library(expression), pattern, replacement) == f"    return {expected}"


def test_a_statement_a_decorator_and_a_nested_function_are_found(library):
    assert plant(library(), "_V = x", "_V = y", "Solver.run") == "        θ = y   ;   return θ + f(y)   # another"
    assert plant(library(), "θ + _F", "θ - _F", "Solver") == "        θ = x   ;   return (θ - f(y))   # another"
    assert plant(library(), "decorate(...)", "decorate") == "@decorate"
    assert plant(library(), "return z", "pass", "outer.inner") == "        pass"


def test_a_statement_of_several_lines_is_indented(library):
    change = library().plant(Fault("a fault", "outer.inner", "return _Z", "if _Z:\n    return 1"))
    assert b"        if z:\n            return 1\n    return y" in change.content


def test_a_function_is_found_wherever_it_moves(library):
    assert plant(library("f(y)", ["deep/er/moved.py"]), "f(_A)", "_A") == "    return y"


def test_a_part_of_the_module_tells_equal_names_apart(library):
    sources = library("f(y)", ["one.py", "two/code.py"])
    for place in ("one:outer", "library.one:outer", "two:outer", "two.code:outer"):
        assert place.partition(":")[0].split(".")[-1] in str(sources.find(place).path)
    with pytest.raises(PlantingError, match=r"^a fault: outer is defined 2 times.*library\.one:outer.*two\.code:outer"):
        plant(sources, "f(_A)", "_A")
    with pytest.raises(PlantingError, match="library:outer is defined 2 times"):
        sources.find("library:outer")


@pytest.mark.parametrize(
    ("place", "pattern", "replacement", "message"),
    [
        ("outter", "f(y)", "y", "no function, method or class is called outter; similar: outer$"),
        ("nowhere:outer", "f(y)", "y", r"called nowhere:outer; similar: library\.code:outer$"),
        ("outer", "g(y)", "y", r"g\(y\) must match exactly once in outer \(code\.py\), .* 0 times; .* no other place$"),
        ("unrelated", "z", "z + 1", r"in unrelated .* matches 0 times; it matches once in library\.code:outer\.inner"),
        ("outer", "f(_A)", "_A", r"in outer \(code\.py\), but it matches 2 times: in lines 12, 12$"),
        ("outer", "f(y)", "_B", "the replacement uses _B, and the pattern does not"),
        ("outer", "f(y)", "a", r"the replacement uses a, unknown in library\.code"),
        ("outer", "f(y)", "pass", "the pattern is an expression and the replacement a statement"),
        ("outer", "f(", "y", "not Python"),
        ("outer", "f(y); f(x)", "y", "not one expression or statement"),
    ],
)
def test_a_fault_without_exactly_one_place_is_an_error(library, place, pattern, replacement, message):
    with pytest.raises(PlantingError, match=message):
        plant(library("f(y) + f(x)"), pattern, replacement, place)


def test_a_replacement_that_cannot_stand_in_its_place_is_an_error(library):
    with pytest.raises(PlantingError, match="does not fit into its place"):
        plant(library("[1 for key in x]"), "key", "f(y)")


def test_examples_in_docstrings_run():
    assert doctest.testmod(planting).failed == 0
