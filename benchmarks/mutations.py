"""Are wrong hypergradients found? Faults are planted in a copy of `bilevel`, one by one, and the test kit is run.

    python -m benchmarks.mutations [NAME …]

Each fault is an exact replacement of text. The kit, `mutation_suite.py`, must pass on the copy as it is, and fail
on every fault; a fault that survives makes the exit status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SUITE = Path(__file__).with_name("mutation_suite.py")


class Mutation(NamedTuple):
    """A fault: in ``file`` the one place that reads ``text`` reads ``replacement``."""

    name: str
    file: str
    text: str
    replacement: str

    def apply(self, source: str) -> str:
        """The source with the fault.

        Raises:
            ValueError: where the text does not stand there exactly once.
        """
        if source.count(self.text) != 1:
            raise ValueError(f"{self.name}: found {source.count(self.text)} times in {self.file}: {self.text!r}")
        return source.replace(self.text, self.replacement)


_ENDING = "tree.subtract(outer_theta, through_w), aux, inner, info)"
_FIXED_POINT = """("FixedPoint", self.strong_convexity)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w,"""
MUTATIONS = (
    Mutation("adjoint term's sign", "bilevel/hypergradients.py", _ENDING, _ENDING.replace("subtract", "add")),
    Mutation(
        "direct term lost",
        "bilevel/hypergradients.py",
        _ENDING,
        _ENDING.replace("outer_theta,", "tree.scale(0, outer_theta),"),
    ),
    Mutation(
        "half the adjoint term",
        "bilevel/hypergradients.py",
        _ENDING,
        _ENDING.replace("through_w)", "tree.scale(0.5, through_w))"),
    ),
    Mutation("transpose dropped", "bilevel/hypergradients.py", "if is_gradient(condition):", "if True:"),
    Mutation(
        "transpose dropped in the layer",
        "bilevel/hypergradients.py",
        "tangent, scaling, is_gradient(condition))",
        "tangent, scaling, True)",
    ),
    Mutation(
        "B at a wrong argument",
        "bilevel/hypergradients.py",
        "condition.residual(w, theta, data), theta)[1](adjoint)",
        "condition.residual(adjoint, theta, data), theta)[1](adjoint)",
    ),
    Mutation("scaling D missing once", "bilevel/hypergradients.py", "    v = tree.scale(scaling, u)\n", "    v = u\n"),
    Mutation(
        "scaling D missing in the product",
        "bilevel/hypergradients.py",
        "return tree.scale(scaling, matvec(tree.scale(scaling, u)))",
        "return matvec(tree.scale(scaling, u))",
    ),
    Mutation(
        "linear_init ignored",
        "bilevel/hypergradients.py",
        "solve_differentiably(linear, matvec, b, symmetric, init)\n",
        "solve_differentiably(linear, matvec, b, symmetric)\n",
    ),
    Mutation(
        "one step short",
        "bilevel/hypergradients.py",
        "fori_loop(0, last, advance, state)[0]",
        "fori_loop(1, last, advance, state)[0]",
    ),
    Mutation("truncation without its cut", "bilevel/hypergradients.py", "if last < solver.steps:", "if False:"),
    Mutation(
        "init's derivative lost",
        "bilevel/hypergradients.py",
        "solver, theta, starting_point(init, theta, data)",
        "solver, theta, jax.lax.stop_gradient(starting_point(init, theta, data))",
    ),
    Mutation(
        "tangent of w lost",
        "bilevel/hypergradients.py",
        "problem)(inner.w, theta, data)",
        "problem)(jax.lax.stop_gradient(inner.w), theta, data)",
    ),
    Mutation(
        "OneStep's sign",
        "bilevel/hypergradients.py",
        "tree.add(outer_theta, tree.with_zeros(through_w, theta))",
        "tree.subtract(outer_theta, tree.with_zeros(through_w, theta))",
    ),
    Mutation(
        "FirstOrder's sign",
        "bilevel/hypergradients.py",
        "tree.subtract(outer_theta, through_w), aux, inner, None)",
        "tree.add(outer_theta, through_w), aux, inner, None)",
    ),
    Mutation(
        "λ dropped",
        "bilevel/conditions.py",
        "pull = tree.scale(self._strength(theta, data), ",
        "pull = tree.scale(1.0, ",
    ),
    Mutation("fixed point's sign", "bilevel/conditions.py", _FIXED_POINT, _FIXED_POINT.replace("subtract", "add")),
    Mutation(
        "complementarity without its multiplier",
        "bilevel/conditions.py",
        "jax.tree.map(jnp.multiply, unequal, inequality)",
        "inequality",
    ),
    Mutation(
        "multiplier's sign",
        "bilevel/conditions.py",
        "pull_back((jnp.ones_like(objective), equal, unequal))",
        "pull_back((jnp.ones_like(objective), jax.tree.map(jnp.negative, equal), unequal))",
    ),
    Mutation(
        "ascent in place of descent",
        "bilevel/conditions.py",
        "return tree.subtract(w, tree.scale(condition.step_size, slope))",
        "return tree.add(w, tree.scale(condition.step_size, slope))",
    ),
    Mutation(
        "prox with half its step",
        "bilevel/conditions.py",
        "theta, data, self.step_size)",
        "theta, data, 0.5 * self.step_size)",
    ),
    Mutation(
        "stale iterate",
        "bilevel/solvers.py",
        "return report(residual(state[0]), state[0], steps=solver.steps)",
        "return report(residual(state[0]), init, steps=solver.steps)",
    ),
    Mutation("Anderson's mix reversed", "bilevel/solvers.py", "step = slope + mix @", "step = slope - mix @"),
    Mutation(
        "line search backwards",
        "bilevel/solvers.py",
        "return tree.add(w, tree.scale(size, direction))",
        "return tree.subtract(w, tree.scale(size, direction))",
    ),
    Mutation("ridge forgotten", "bilevel/linear.py", "    if not ridge:\n", "    if True:\n"),
    Mutation(
        "preconditioner twice",
        "bilevel/linear.py",
        "_widely(solver.preconditioner, b)",
        "_widely(lambda r: solver.preconditioner(solver.preconditioner(r)), b)",
    ),
    Mutation("one product skipped", "bilevel/linear.py", "tree.subtract(b_unit, regularised(x))", "b_unit"),
    Mutation(
        "unit not scaled back",
        "bilevel/linear.py",
        "solution = tree.scale(unit, info.solution)",
        "solution = info.solution",
    ),
    Mutation(
        "float32 in a float64 solve",
        "bilevel/linear.py",
        "(flat_matvec, flat))",
        "(flat_matvec, flat).astype(jnp.float32).astype(flat.dtype))",
    ),
    Mutation(
        "Woodbury without its ridge", "bilevel/linear.py", "inner, factor.T @ b)) / self.ridge", "inner, factor.T @ b))"
    ),
    Mutation("sign after differences", "bilevel/estimators.py", _ENDING, _ENDING.replace("subtract", "add")),
    Mutation(
        "penalty forgotten",
        "bilevel/estimators.py",
        "tree.scale(self.penalty, tree.subtract(slope, plain))",
        "tree.subtract(slope, plain)",
    ),
    Mutation("samples doubled", "bilevel/estimators.py", "/ (2 * self.scale)", "/ self.scale"),
)


def main() -> int:
    chosen = named(MUTATIONS, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder), "bilevel", "pytest_bilevel.py")
        shutil.copy(SUITE, copy)
        # The kit alone, without the settings of this repository.
        words = ["-p", "pytest_bilevel", "-c", os.devnull, "--rootdir", str(copy), str(copy / SUITE.name)]
        return verdict(copy, [(mutation, words) for mutation in chosen], words)


def named(mutations: Sequence[Mutation], description: str | None) -> list[Mutation]:
    """Those that the command line names; all by default."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to plant; all of it by default")
    names = parser.parse_args().names
    known = [mutation.name for mutation in mutations]
    if unknown := set(names) - set(known):
        parser.error(f"nothing is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [mutation for mutation in mutations if not names or mutation.name in names]


def copied(folder: Path, *parts: str) -> Path:
    """``folder`` with these files and folders of the repository."""
    for part in parts:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)
    return folder


def verdict(copy: Path, planned: Sequence[tuple[Mutation, list[str]]], without: list[str]) -> int:
    """Plant each fault in the copy and run its tests: 0 where all are caught, 1 for a survivor.

    Args:
        copy: a folder with the source and the tests.
        planned: faults, each with the words after ``pytest`` that run its tests.
        without: those that must pass before anything is planted.
    """
    seconds, failure = _run(copy, without)
    print(f"{seconds:6.1f} s  {'FAILS' if failure else 'passes'}  without a fault", flush=True)
    if failure:
        print(failure)
        return 1
    survivors = [mutation.name for mutation, words in planned if not _caught(copy, mutation, words)]
    print(f"{len(planned) - len(survivors)} of {len(planned)} caught")
    return 1 if survivors else 0


def _caught(copy: Path, mutation: Mutation, words: list[str]) -> bool:
    path = copy / mutation.file
    source = path.read_text()
    path.write_text(mutation.apply(source))
    try:
        seconds, failure = _run(copy, words)
    finally:
        path.write_text(source)
    seen = "caught" if failure else "SURVIVED"
    print(f"{seconds:6.1f} s  {seen}  {mutation.name}{': ' + _first_line(failure) if failure else ''}", flush=True)
    return bool(failure)


def _run(copy: Path, words: list[str]) -> tuple[float, str]:
    """Seconds, and what pytest printed, or "" where all passed."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults in one second would share a timestamp, and a stale .pyc
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time goes into compiling
        # What a fault does not touch was compiled before.
        "JAX_COMPILATION_CACHE_DIR": str(copy / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *words],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):  # neither passed nor failed: nothing was tested
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start, done.stdout if done.returncode else ""


def _first_line(output: str) -> str:
    """What failed first, and why, in pytest's own words."""
    lines = [line[1:].strip() for line in output.splitlines() if line.startswith("E ")]
    return lines[0] if lines else "no message"


if __name__ == "__main__":
    sys.exit(main())
