"""Run tests on a copy of the library, with one fault after another planted in it."""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.planting import Fault, Sources

ROOT = Path(__file__).parents[1]


def chosen(faults: Sequence[Fault], description: str | None) -> list[Fault]:
    """Return the faults that the command line names, or all faults if it names none."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault to plant (default: all faults)")
    names = parser.parse_args().names
    known = [fault.name for fault in faults]
    if unknown := set(names) - set(known):
        parser.error(f"there is no {', '.join(unknown)}; the names are: {', '.join(known)}")
    return [fault for fault in faults if not names or fault.name in names]


def copy_into(folder: Path, *parts: str) -> Path:
    """Copy these files and folders of the repository into ``folder``, and return ``folder``."""
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)
    return folder


def run(copy: Path, sources: Sources, planned: Sequence[tuple[Fault, list[str]]], unchanged: list[str]) -> int:
    """Plant one fault after another in the copy, run the tests of the fault, and print one line for each fault.

    Args:
        copy: a folder with the library and the tests.
        sources: the library in that folder.
        planned: each fault with the arguments of pytest that select its tests.
        unchanged: the arguments of pytest for the tests that must pass before a fault is planted.

    Returns:
        The exit status: 0 if the tests caught every fault, 1 if a fault survived or the unchanged copy fails.
    """
    seconds, failure = _pytest(copy, unchanged)
    print(f"{seconds:6.1f} s  {'FAILS' if failure else 'passes'}  without a fault", flush=True)
    if failure:
        print(failure)
        return 1
    survivors = [fault.name for fault, arguments in planned if not _is_caught(copy, sources, fault, arguments)]
    print(f"{len(planned) - len(survivors)} of {len(planned)} caught")
    return 1 if survivors else 0


def _is_caught(copy: Path, sources: Sources, fault: Fault, arguments: list[str]) -> bool:
    change = sources.plant(fault)
    original = change.path.read_bytes()
    change.path.write_bytes(change.content)
    try:
        seconds, failure = _pytest(copy, arguments)
    finally:
        change.path.write_bytes(original)
    outcome = "caught" if failure else "SURVIVED"
    print(f"{seconds:6.1f} s  {outcome}  {fault.name}{': ' + _first_error(failure) if failure else ''}", flush=True)
    return bool(failure)


def _pytest(copy: Path, arguments: list[str]) -> tuple[float, str]:
    """Return the seconds that pytest took, and its output if a test failed, else ""."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        # Without this, Python could run a stale .pyc: it compares timestamps in whole seconds, and two faults may be
        # planted within one second.
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time goes into compiling
        # Programs that a fault does not touch are compiled once for all runs.
        "JAX_COMPILATION_CACHE_DIR": str(copy / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):  # pytest itself failed, or found no test
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout if done.returncode else ""


def _first_error(output: str) -> str:
    """Return the first line of pytest's error message."""
    lines = [line[1:].strip() for line in output.splitlines() if line.startswith("E ")]
    return lines[0] if lines else "no message"
