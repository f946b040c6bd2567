"""Read the fenced blocks of Markdown pages, for the tests of the site."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<fence>```+|:::+)\s*(?P<info>[^`]*)$")
OPTION = re.compile(r"^:[\w-]+:")


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, its language or directive, the options of a directive, and its text."""

    path: Path
    line: int
    language: str
    options: tuple[str, ...]
    text: str

    def __repr__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def is_doctest(self) -> bool:
        return self.text.lstrip().startswith(">>>")

    @property
    def not_run(self) -> bool:
        """Return True if the page marks the block as not run, both by its class and in another option."""
        return ":class: not-run" in self.options and any("not run here" in option for option in self.options)


def pages() -> list[Path]:
    """Return the paths of every page of the site, and of the Markdown files in the root of the repository."""
    site = [path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "generated"} & set(path.parts)]
    return sorted([*site, *ROOT.glob("*.md")])


def blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order, including those inside admonitions."""
    lines = path.read_text().splitlines()
    number = 0
    while number < len(lines):
        opening = FENCE.match(lines[number])
        number += 1
        if opening is None or opening["fence"].startswith(":"):
            continue
        begin, body = number, []
        while lines[number].strip() != opening["fence"]:
            body.append(lines[number])
            number += 1
        number += 1
        yield _block(path, begin, opening["info"].strip(), body)


def _block(path, line, info, body):
    directive = re.match(r"^\{([\w-]+)\}\s*(.*)$", info)
    if directive is None:
        return Block(path, line, info, (), "\n".join(body))
    options = []
    while body and OPTION.match(body[0]):
        options.append(body.pop(0))
    language = directive[2] if directive[1] == "code-block" else f"{{{directive[1]}}}"
    return Block(path, line, language, tuple(options), "\n".join(body))


def all_blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [block for path in pages() for block in blocks(path)]
