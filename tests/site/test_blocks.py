"""Every code block of the README and the site runs, or its commands can be understood, or it says that it is not run.

Doctests are pytest's own business. Here are the blocks that are files, whose tests are called, and those for a shell.
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

sys.path.insert(0, str(Path(__file__).parent))
from blocks import ROOT, Block, all_blocks

BLOCKS = all_blocks()
LANGUAGES = {"python", "sh", "console", "text", ""}
COMMANDS = re.compile(r"^(\w*\$ )?(make|pip|imaml|python3?|pytest|git|\.venv/\S+) ", re.MULTILINE)
PROMPT = re.compile(r"^\w*\$ ")
SCRIPTS = [block for block in BLOCKS if block.language == "python" and not block.is_doctest and not block.not_run]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_block_says_what_it_is(block):
    assert block.language in LANGUAGES or block.language.startswith("{"), "an unknown language is not checked"
    if block.language in ("", "text"):
        assert not COMMANDS.search(block.text), "commands are for sh, or with their output for console"
    of_pytorch = block.language == "python" and re.search(r"\b(torch|torchopt|higher)\.", block.text) is not None
    assert of_pytorch == block.not_run, "a block that cannot run says so, and no other does"


@pytest.mark.parametrize("block", SCRIPTS, ids=repr)
def test_a_file_on_a_page_runs_and_its_tests_pass(block):
    from bilevel.testing.fixture import Hypergradients

    namespace = {"__name__": "page"}
    exec(compile(block.text, repr(block), "exec"), namespace)
    tests = {name: test for name, test in namespace.items() if name.startswith("test_")}
    assert tests, "a file without a test would show nothing"
    for test in tests.values():
        wants_fixture = "hypergradient" in test.__code__.co_varnames[: test.__code__.co_argcount]
        with jax.enable_x64(wants_fixture):
            test(*[Hypergradients()] * wants_fixture)


@pytest.mark.parametrize("block", SHELL, ids=repr)
def test_a_command_is_one(block):
    commands = list(commands_of(block))
    assert commands
    script = "\n".join(command for command, _ in commands)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for command, output in commands:
        words = shlex.split(command, comments=True)
        while words and "=" in words[0]:  # an environment variable
            words.pop(0)
        program = Path(words[0]).name
        if program == "imaml" and output.startswith("imaml "):
            says(words[1:], output, cli.USAGE_ERROR, redirect_stderr)
        elif program == "imaml" and output and words[1] == "presets":
            says(words[1:], output, 0, redirect_stdout)
        elif program in UNDERSTOOD:
            UNDERSTOOD[program](words[1:])
        else:
            raise AssertionError(f"nobody knows {words[0]}")


def commands_of(block: Block):
    """Each command with the output that follows it, in a transcript; else each line."""
    if block.language == "sh":
        yield from ((line, "") for line in block.text.splitlines() if line.strip() and line[0] != "#")
        return
    for part in re.split(r"^(?=\w*\$ )", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield PROMPT.sub("", command), output.strip()


def says(words, output, code, redirect):
    """The command line says what the page says it says; … stands for anything."""
    said = io.StringIO()
    with redirect(said):
        assert cli.main(words) == code
    pattern = ".*".join(map(re.escape, output.split("…")))
    assert re.fullmatch(pattern, said.getvalue().strip(), re.DOTALL), said.getvalue()


def imaml_command(words):
    known, overrides = cli._split(words) if words[0] == "train" else (words, [])
    options = cli._parser().parse_args(known)
    if words[0] == "train":
        cli._chosen(options, overrides)


def make(words):
    targets = [word for word in words if "=" not in word]
    assert targets and set(targets) <= set(TARGETS)


def python(words):
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1].split(".")[0]) or words[1] in ("venv", "pip", "build")
    elif words and words[0] != "examples/NAME.py":
        assert (ROOT / words[0]).exists()


def pip(words):
    assert words[0] == "install"
    for extras in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(EXTRAS)


UNDERSTOOD = {
    "imaml": imaml_command, "make": make, "python": python, "python3": python, "pip": pip, "source": list, "git": list,
}  # fmt: skip
