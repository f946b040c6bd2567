"""Check what the site's extensions make during the build: notebooks, the command-line reference, and the figures."""

import ast
import json
import re
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "extensions"))
import commandline
import figures
import notebooks
from blocks import ROOT, all_blocks

from imaml.cli import COMMANDS

STARTS = sorted((ROOT / "docs" / "start").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

PAGE = """# A title

After this page you can add. See [another page](../other.md#there) and [elsewhere](https://example.org).

Download this page as {download}`a notebook <../generated/page.ipynb>`.

![A picture](../images/picture.png)

```{code-block} python
:caption: a_file.py

print("not run")
```

```python
>>> class Shown:
...     def _repr_html_(self):
...         return "<b>3</b>"
...     def __repr__(self):
...         return "three"
>>> print(1 + 1)
2

>>> Shown()
three
>>> [][0]
Traceback (most recent call last):
  ...
IndexError: list index out of range

```

The end of {func}`~bilevel.minimize`.
"""


def test_a_page_becomes_a_notebook_with_outputs():
    notebook = notebooks.run(notebooks.from_page(PAGE))
    begin, printed, shown, error, end = notebook["cells"]
    assert "# A title" in begin["source"] and notebooks.INSTALL in begin["source"]
    assert "`a_file.py`:\n\n```python\nprint" in begin["source"]
    assert "another page and [elsewhere](https://example.org)" in begin["source"]
    assert "ownload" not in begin["source"] and "picture" not in begin["source"]
    assert end["source"] == "The end of `bilevel.minimize`."
    assert printed["source"].endswith("print(1 + 1)") and ">>>" not in printed["source"]
    assert printed["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "2\n"}]
    assert shown["outputs"][0]["data"] == {"text/plain": "three", "text/html": "<b>3</b>"}
    assert error["outputs"][0]["ename"] == "IndexError" and error["metadata"] == {"tags": ["raises-exception"]}
    assert json.loads(json.dumps(notebook))["nbformat"] == 4
    assert notebooks.printed(notebook) == "2\n"


def test_an_error_that_the_page_does_not_expect_ends_the_build():
    with pytest.raises(ZeroDivisionError):
        notebooks.run(notebooks.from_page("# A\n\n```python\n>>> 1 / 0\n1\n```\n"))


@pytest.mark.parametrize("page", STARTS, ids=lambda path: path.stem)
def test_the_notebook_of_an_introduction_has_all_of_its_code(page):
    cells = notebooks.from_page(page.read_text())
    code = "\n".join(cell.source for cell in cells if cell.kind == "code")
    doctests = [block for block in all_blocks() if block.path == page and block.is_doctest]
    statements = [line[4:] for block in doctests for line in block.text.splitlines() if line[:4] in (">>> ", "... ")]
    assert [line for line in code.splitlines() if line] == [line for line in statements if line.strip()]
    assert doctests and not re.search(r"\]\((?!http)|\{\w+\}`|```\{", "".join(cell.source for cell in cells))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_notebook_of_an_example_has_all_of_its_code(example):
    first, *cells = notebooks.from_script(example.read_text())
    assert first.kind == "markdown" and first.source.startswith("# ")
    text = "\n".join(cell.source for cell in cells)
    assert "sys.argv" not in text and "__main__" not in text and "main()" in cells[-1].source
    defined = {node.name for node in ast.parse(example.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)} == defined
    imported = {line for line in example.read_text().splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(text.splitlines()) <= {"import sys"}


def test_the_reference_of_the_command_line_has_each_command():
    text = commandline.help_of()
    assert set(commandline.commands(text)) == set(COMMANDS)
    assert max(map(len, text.splitlines())) <= commandline.WIDTH
    assert "--keep-checkpoints" in commandline.help_of("train")
    with pytest.raises(RuntimeError, match="lists no commands"):
        commandline.commands("usage: imaml\n")


def test_a_program_that_fails_ends_the_build():
    with pytest.raises(RuntimeError, match="exited with 2"):
        commandline.help_of("no-such-command")


def test_the_figures_have_the_numbers_of_the_records():
    results = ROOT / "benchmarks" / "results"
    error = json.loads((results / "figure2a.json").read_text())["result"]
    place = error["steps"].index(16)
    assert (
        f"{dict(error['curves'])['iMAML, 5 CG steps'][place]:.1e}"
        in _row(figures.error_table(), "`Implicit(CG(5))`")[3]
    )
    memory = json.loads((results / "figure2b.json").read_text())["result"]["temporary"]["MAML, unrolled"]
    assert _row(figures.memory_table(), "`Unrolled()`")[-1] == f"{memory[-1] / 1024**2:,.0f}"
    seconds = json.loads((results / "speed-W1.json").read_text())
    torchopt = _row(figures.seconds_table(), "5-way 1-shot", "torchopt, solve_cg")
    assert torchopt[2] == f"{statistics.median(seconds['seconds']['torchopt, solve_cg']):.3f}"
    assert torchopt[3] == f"{seconds['ratios']['torchopt, solve_cg']['median']:.2f}"
    ours = json.loads((results / "bilevel-logistic.json").read_text())["contenders"]["SABA, bilevel"]["runs"]
    last = statistics.median(run["gap"][-1] for run in ours)
    assert float(_row(figures.samples_table(), "SABA")[-1]) == pytest.approx(last, rel=0.5)


def _row(table, *begin):
    """Return the cells of the first row of a Markdown table whose first cells are ``begin``."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(row for row in cells if tuple(row[: len(begin)]) == begin)


def test_a_copy_button_leaves_out_every_prompt():
    tree = ast.parse((ROOT / "docs" / "conf.py").read_text())
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    prompt = re.compile(f"^({ast.literal_eval(values['copybutton_prompt_text'])})")
    for block in all_blocks():
        lines = block.text.splitlines()
        if block.is_doctest:
            code = [line for line in lines if line.startswith((">>>", "... "))]
            assert all(prompt.match(line) for line in code if line != ">>>"), block
        if block.language == "console":
            assert any(prompt.match(line) for line in lines), block
        if block.language == "sh":
            assert not any(prompt.match(line) for line in lines), block
