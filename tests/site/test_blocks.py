"""Check every code block of the site and the root's Markdown files: Python runs, and commands have valid arguments.

Pytest itself collects the doctests on the pages. A block that cannot run must be marked as not run.
"""

import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import pytest

from imaml import cli
from imaml.arguments import parse

sys.path.insert(0, str(Path(__file__).parent))
from blocks import ROOT, Block, all_blocks

BLOCKS = all_blocks()
LANGUAGES = {"python", "sh", "console", "toml", "text", ""}
COMMANDS = re.compile(r"^(\w*\$ )?(make|pip|imaml|python3?|pytest|git|\.venv/\S+) ", re.MULTILINE)
PROMPT = re.compile(r"^\w*\$ ")
SCRIPTS = [block for block in BLOCKS if block.language == "python" and not block.is_doctest and not block.not_run]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_block_declares_its_language(block):
    assert block.language in LANGUAGES or block.language.startswith("{"), "no test checks a block in this language"
    if block.language in ("", "text"):
        assert not COMMANDS.search(block.text), "write commands in an sh block, or with their output in a console block"
    # PyTorch and benchopt are no dependencies of the tests.
    uses_others = re.search(r"\b(torch|torchopt|higher|l2l|benchopt)\.", block.text) is not None
    assert (uses_others and block.language == "python") == block.not_run, (
        "mark exactly the blocks with PyTorch or benchopt as not run"
    )


@pytest.mark.slow("runs the tests of each script in a process", fast="docs/start/test.md:104")
@pytest.mark.parametrize("block", SCRIPTS, ids=repr)
def test_a_script_on_a_page_runs_and_its_tests_pass(block):
    from bilevel.testing.fixture import Hypergradients

    namespace = {"__name__": "page"}
    exec(compile(block.text, repr(block), "exec"), namespace)
    tests = {name: test for name, test in namespace.items() if name.startswith("test_")}
    assert tests, "a script on a page needs a test"
    for test in tests.values():
        wants_fixture = "hypergradient" in test.__code__.co_varnames[: test.__code__.co_argcount]
        with jax.enable_x64(wants_fixture):
            test(*[Hypergradients()] * wants_fixture)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=repr)
def test_a_toml_block_is_a_file_for_training(block, tmp_path):
    (tmp_path / "block.toml").write_text(block.text)
    assert parse(["train", "--config", str(tmp_path / "block.toml")]).command == "train"


@pytest.mark.parametrize("block", SHELL, ids=repr)
def test_commands_exist_and_their_arguments_are_valid(block):
    commands = list(commands_of(block))
    assert commands
    script = "\n".join(command for command, _ in commands)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for command, output in commands:
        words = shlex.split(command, comments=True)
        while words and "=" in words[0]:  # the word sets an environment variable
            words.pop(0)
        program = Path(words[0]).name
        if program == "imaml" and output.startswith("imaml "):
            check_output(words[1:], output, cli.USAGE_ERROR, redirect_stderr)
        elif program == "imaml" and output and words[1] == "presets":
            check_output(words[1:], output, 0, redirect_stdout)
        elif program in ARGUMENT_CHECKS:
            ARGUMENT_CHECKS[program](words[1:])
        else:
            raise AssertionError(f"no check for the arguments of {words[0]}")


def commands_of(block: Block):
    """Yield each command of a block with the output below it. In an sh block, every line is a command or a comment."""
    if block.language == "sh":
        yield from ((line, "") for line in block.text.splitlines() if line.strip() and line[0] != "#")
        return
    for part in re.split(r"^(?=\w*\$ )", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield PROMPT.sub("", command), output.strip()


def check_output(words, output, code, redirect):
    """Assert that a command of `imaml` prints the output on the page, where … matches any text."""
    printed = io.StringIO()
    with redirect(printed):
        assert cli.main(words) == code
    pattern = ".*".join(map(re.escape, output.split("…")))
    assert re.fullmatch(pattern, printed.getvalue().strip(), re.DOTALL), printed.getvalue()


def check_imaml(words):
    """Parse the arguments of a command, with its preset and settings."""
    parse(words)


def check_make(words):
    """Assert that the Makefile declares the targets in ``.PHONY``."""
    targets = [word for word in words if "=" not in word]
    assert targets and set(targets) <= set(TARGETS)


def check_python(words):
    """Compile the program after ``-c``, or assert that the module or script exists. NAME.py is a placeholder."""
    if words[:1] == ["-c"]:
        compile(words[1], "the argument of python -c", "exec")
    elif words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1].split(".")[0]) or words[1] in ("venv", "pip", "build")
    elif words and words[0] != "examples/NAME.py":
        assert (ROOT / words[0]).exists()


def check_pip(words):
    """Assert that pyproject.toml declares each extra of ``pip install``."""
    assert words[0] == "install"
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(EXTRAS)


def check_loop(words):
    """Check the command of ``for NAME in VALUE …; do COMMAND & done`` with the first value."""
    command = [word.replace(f"${words[0]}", words[2]) for word in words[words.index("do") + 1 : words.index("&")]]
    ARGUMENT_CHECKS[command[0]](command[1:])


ARGUMENT_CHECKS = {
    "for": check_loop,
    "imaml": check_imaml,
    "make": check_make,
    "python": check_python,
    "python3": check_python,
    "pip": check_pip,
    "source": list,  # accepts any arguments
    "git": list,
    "cd": list,
}
