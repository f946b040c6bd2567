"""Print the list of slow tests that CONTRIBUTING.md holds: ``python tests/package/slow_tests.py``."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- slow tests -->\n", "<!-- end of slow tests -->"


def slow_tests() -> str:
    """Return the slow tests as Markdown, by file, each with the reason that its mark gives."""
    lines = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        # Marks in a string, as in test_tiers.py, are no decorators in the syntax tree, so they are not listed.
        marks = [mark for node in ast.walk(ast.parse(path.read_text())) for mark in _marks(node)]
        if marks:
            lines += ["", f"`{path.relative_to(ROOT).as_posix()}`", "", *marks]
    return "\n".join(lines) + "\n\n"


def _marks(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return []
    found = [call for call in node.decorator_list if isinstance(call, ast.Call)]
    found = [call for call in found if ast.unparse(call.func) == "pytest.mark.slow"]
    return [
        f"- `{node.name}`: {ast.literal_eval(call.args[0])}{' (some parameters are fast)' if call.keywords else ''}"
        for call in found
    ]


def listed() -> str:
    """Return the list that CONTRIBUTING.md holds."""
    return (ROOT / "CONTRIBUTING.md").read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    print(slow_tests())
