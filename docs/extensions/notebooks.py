"""Make a Jupyter notebook from a page or from an example, run it, and keep the outputs in it.

`python notebooks.py SOURCE FOLDER` writes FOLDER/NAME.ipynb, where SOURCE is a page, NAME.md, or an example, NAME.py.
The cells run in this process and not in a Jupyter kernel, so that the site needs no Jupyter. An error in a cell ends
the program, unless the page expects the error.
"""

import ast
import base64
import contextlib
import doctest
import io
import json
import re
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^(```+)(.*?)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
INSTALL = "To run this notebook, install the packages first: `pip install .` in a clone of the repository."


class Cell(NamedTuple):
    """A cell of a notebook; ``raises`` if the page shows an error of this code."""

    kind: str
    source: str
    raises: bool = False


def from_page(text):
    """Return the cells of a page: each doctest as code without prompts and outputs, and the rest as Markdown."""
    cells, end = [], 0
    for block in FENCE.finditer(text):
        body = block[3]
        if body.lstrip().startswith(">>>"):
            cells += [Cell("markdown", _plain(text[end : block.start()])), *_code_cells(body)]
            end = block.end()
    cells.append(Cell("markdown", _plain(text[end:])))
    title, *rest = [cell for cell in cells if cell.source]
    return [title._replace(source=f"{title.source}\n\n{INSTALL}"), *rest]


def _code_cells(body):
    """Divide a doctest into cells. A cell ends with the statement whose output the page shows."""
    lines, raises, last = [], False, None
    for example in doctest.DocTestParser().get_examples(body):
        if lines and last is not None and example.lineno > last:
            lines.append("")  # the page has an empty line between these statements
        lines.append(example.source.rstrip("\n"))
        raises = example.exc_msg is not None
        last = example.lineno + example.source.count("\n")
        if example.want:
            yield Cell("code", "\n".join(lines), raises)
            lines = []
    if lines:
        yield Cell("code", "\n".join(lines))


def _plain(text):
    """Return Markdown that needs no Sphinx: without directives, roles, pictures, and links into the site."""
    text = re.sub(r"^```\{code-block\} (\w+)\n(?::caption: (.*)\n)?(?::.*\n)*\n?", _captioned, text, flags=re.MULTILINE)
    text = re.sub(r"^(.*\{download\}.*|!\[.*\]\(.*\))\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^```+\{(?!code-block).*?^```+\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\{\w+\}`(?:([^`<]+) <[^`>]+>|~?([^`]+))`", lambda found: f"`{found[1] or found[2]}`", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text).strip()


def _captioned(found):
    return (f"`{found[2]}`:\n\n" if found[2] else "") + f"```{found[1]}\n"


def from_script(text):
    """Return the cells of an example: its docstring, its imports, each of its functions, and its last lines."""
    tree = ast.parse(text)
    title, _, rest = ast.get_docstring(tree).partition("\n")
    cells = [Cell("markdown", f"# {title.rstrip('.')}\n{rest}\n\n{INSTALL}")]
    lines, begin, parts, joins = text.splitlines(), tree.body[0].end_lineno, [], False
    for node in tree.body[1:]:
        part, begin = lines[begin : node.end_lineno], node.end_lineno
        joined, joins = joins, isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)
        if joins and joined:
            parts[-1] += part  # imports and constants share a cell
        else:
            parts.append(part)
    for part in parts:
        source = re.sub(r'^if __name__ == "__main__":\n', "", "\n".join(part).strip("\n"))
        if source.startswith("    "):
            source = re.sub(r"^    ", "", source, flags=re.MULTILINE).replace("*sys.argv[1:]", "")
        cells.append(Cell("code", source.strip("\n")))
    # The last lines lost their command-line arguments above, so the example may not need sys any more.
    if not any("sys." in cell.source for cell in cells):
        cells = [cell._replace(source=re.sub(r"^import sys\n+", "", cell.source, flags=re.MULTILINE)) for cell in cells]
    return [cell for cell in cells if cell.source]


def run(cells):
    """Run the cells in one namespace, and return the notebook as the JSON of nbformat 4.5."""
    namespace, count, found = {"__name__": "__main__"}, 0, []
    for number, cell in enumerate(cells):
        entry = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}, "source": cell.source}
        if cell.kind == "code":
            count += 1
            tags = {"tags": ["raises-exception"]} if cell.raises else {}
            entry |= {"metadata": tags, "execution_count": count, "outputs": _outputs(cell, namespace, count)}
        found.append(entry)
    language = {"name": "python", "version": ".".join(map(str, sys.version_info[:3]))}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": language}
    return {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _outputs(cell, namespace, count):
    tree, printed, outputs, value = ast.parse(cell.source), io.StringIO(), [], None
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, "<cell>", "exec"), namespace)
            value = eval(compile(last, "<cell>", "eval"), namespace) if last else None
    except Exception as error:
        if not cell.raises:
            raise
        lines = traceback.format_exception_only(error)
        outputs.append(
            {"output_type": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": lines}
        )
    if printed.getvalue():
        outputs.insert(0, {"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        data = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_()
        outputs.append({"output_type": "execute_result", "execution_count": count, "data": data, "metadata": {}})
    return outputs + _pictures()


def _pictures():
    """Return the open figures of matplotlib as outputs, and close them, as Jupyter does after each cell."""
    pyplot, outputs = sys.modules.get("matplotlib.pyplot"), []
    for number in pyplot.get_fignums() if pyplot else []:
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, format="png", dpi=80, transparent=False)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        pyplot.close(number)
    return outputs


def printed(notebook):
    """Return the text that the cells of a notebook printed."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def make(source, folder):
    """Run the notebook of a page or an example, write it to the folder, and return it."""
    cells = (from_page if Path(source).suffix == ".md" else from_script)(Path(source).read_text())
    notebook = run(cells)
    Path(folder, f"{Path(source).stem}.ipynb").write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return notebook


if __name__ == "__main__":
    make(*sys.argv[1:])
