"""Count the lines of code in files of Python, and in the code cells of notebooks written as MyST Markdown.

    python -m benchmarks.code_lines FILE…

Blank lines, comments and docstrings do not count. In a notebook, IPython's commands and the options of a cell do not
count either.
"""

import io
import re
import sys
import tokenize
from pathlib import Path

IGNORED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
}  # fmt: skip
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OPTIONS = re.compile(r"\A(?:---\n.*?^---\n|(?::\w+:[^\n]*\n)+)", re.DOTALL | re.MULTILINE)


def code_of(path: Path) -> str:
    """Return the code in a file of Python or in a notebook with the suffix ``.md``."""
    text = path.read_text()
    if path.suffix != ".md":
        return text
    cells = (OPTIONS.sub("", cell) for cell in CELL.findall(text))
    return re.sub(r"^%.*$", "", "\n".join(cells), flags=re.MULTILINE)


def count(code: str) -> int:
    """Return the number of lines of code that hold more than blanks, comments and docstrings.

    Example:
        >>> count('"A docstring."\\nx = [1,\\n     2]  # a comment\\n\\n# another\\n')
        2
    """
    lines, starts = set(), True
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type in IGNORED:
            starts = starts or token.type == tokenize.NEWLINE
            continue
        # A string at the start of a statement is taken for a docstring. If the statement goes on, its other tokens do
        # count.
        if not (starts and token.type == tokenize.STRING):
            lines.update(range(token.start[0], token.end[0] + 1))
        starts = False
    return len(lines)


def main(arguments: list[str]) -> int:
    """Print the number of lines of each file."""
    for name in arguments:
        print(f"{count(code_of(Path(name))):5}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
