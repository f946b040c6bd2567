"""The commands on the page about one's own data lead from images to labels, to a report and to an exported file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from blocks import ROOT, blocks

PAGE, HEADING = ROOT / "docs" / "own-data.md", "## From a folder of images to a report"
MOST = 10
"""The largest number of commands that a new user has to type."""
END = "--- the end of a command"


def commands():
    """Return the commands in the section of the page, in order."""
    lines = PAGE.read_text().splitlines()
    begin = lines.index(HEADING) + 1
    end = next(number for number, line in enumerate(lines[begin:], begin) if line.startswith("## "))
    shown = [block.text for block in blocks(PAGE) if block.language == "sh" and begin <= block.line <= end]
    return [line for text in shown for line in text.splitlines() if line.strip() and line[0] != "#"]


def labels(printed):
    """Return the file name, the label and the probability in each row that ``imaml predict`` prints."""
    header, *rows = (line.split() for line in printed.splitlines())
    assert header == ["file", "label", "probability"]
    return [(Path(file).name, label, probability) for file, label, probability in rows]


def test_the_section_has_few_commands():
    words = [line.split()[:2] for line in commands()]
    assert len(words) <= MOST
    needed = [["imaml", name] for name in ("train", "predict", "report", "export")]
    assert all(each in words for each in needed) and words.index(["cd", "shapes"]) < words.index(["python", "-c"])


@pytest.mark.slow("runs every command of the page in a process")
def test_the_commands_of_the_section_work_in_an_empty_folder(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    for name, program in (("python", ""), ("imaml", "-m imaml")):  # the programs of this environment and repository
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "IMAML_CACHE": str(tmp_path / "cache"), "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip
    script = "\n".join(["set -e", *(f"{line}\necho '{END}'" for line in commands())])
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    printed = dict(zip(commands(), done.stdout.split(f"{END}\n"), strict=False))

    assert len(list((tmp_path / "shapes" / "classes").iterdir())) == 60
    run = tmp_path / "runs" / "shapes"
    published, by_support = json.loads((run / "result.json").read_text())["evaluations"]
    assert min(published["value"], by_support["value"]) > 0.5  # guessing gets 0.2
    (diagnosis,) = (text for line, text in printed.items() if line.startswith("imaml diagnose"))
    assert diagnosis.count(f"{published['value']:.2%} ± {published['interval']:.2%}") == 1

    here, elsewhere = (labels(text) for line, text in printed.items() if line.startswith("imaml predict"))
    assert here == elsewhere and len(here) == 20
    right = [file.startswith(f"{label}-") for file, label, _ in here]
    assert sum(right) > 10  # guessing gets 4

    page = (run / "report.html").read_text()
    assert f"{100 * published['value']:.2f}\N{NO-BREAK SPACE}%" in page
    assert f"{100 * by_support['value']:.2f}\N{NO-BREAK SPACE}%" in page
    assert all(f"<h2>{title}</h2>" in page for title in ("Calibration", "Confusion", "Example tasks"))
    assert (tmp_path / "shapes" / "learner.safetensors").stat().st_size > 10_000
    assert printed[commands()[-1]] == "implicit MAML\n"
