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
        >>> count("'''A string.\\n'''.strip()\\n")
        2
    """
    lines: set[int] = set()
    statement: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in IGNORED:
            statement.append(token)
        elif token.type == tokenize.NEWLINE:
            if not all(part.type == tokenize.STRING for part in statement):  # otherwise it is a docstring
                lines.update(*(range(part.start[0], part.end[0] + 1) for part in statement))
            statement = []
    return len(lines)


def main(arguments: list[str]) -> int:
    """Print the number of lines of each file."""
    for name in arguments:
        print(f"{count(code_of(Path(name))):5}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
