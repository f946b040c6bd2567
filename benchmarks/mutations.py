"""Are wrong hypergradients found? Faults are planted in a copy of `bilevel`, one by one, and the test kit is run.

    python benchmarks/mutations.py [NAME …]

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
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SUITE = Path(__file__).with_name("mutation_suite.py")


class Mutation(NamedTuple):
    """A fault: in ``file`` of `bilevel` the one place that reads ``text`` reads ``replacement``."""

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
    Mutation("adjoint term's sign", "hypergradients.py", _ENDING, _ENDING.replace("subtract", "add")),
    Mutation(
        "direct term lost", "hypergradients.py", _ENDING, _ENDING.replace("outer_theta,", "tree.scale(0, outer_theta),")
    ),
    Mutation(
        "half the adjoint term",
        "hypergradients.py",
        _ENDING,
        _ENDING.replace("through_w)", "tree.scale(0.5, through_w))"),
    ),
    Mutation("transpose dropped", "hypergradients.py", "if is_gradient(condition):", "if True:"),
    Mutation(
        "transpose dropped in the layer",
        "hypergradients.py",
        "tangent, scaling, is_gradient(condition))",
        "tangent, scaling, True)",
    ),
    Mutation(
        "B at a wrong argument",
        "hypergradients.py",
        "condition.residual(w, theta, data), theta)[1](adjoint)",
        "condition.residual(adjoint, theta, data), theta)[1](adjoint)",
    ),
    Mutation("scaling D missing once", "hypergradients.py", "    v = tree.scale(scaling, u)\n", "    v = u\n"),
    Mutation(
        "scaling D missing in the product",
        "hypergradients.py",
        "return tree.scale(scaling, matvec(tree.scale(scaling, u)))",
        "return matvec(tree.scale(scaling, u))",
    ),
    Mutation(
        "linear_init ignored",
        "hypergradients.py",
        "solve_differentiably(linear, matvec, b, symmetric, init)\n",
        "solve_differentiably(linear, matvec, b, symmetric)\n",
    ),
    Mutation(
        "one step short",
        "hypergradients.py",
        "fori_loop(0, last, advance, state)[0]",
        "fori_loop(1, last, advance, state)[0]",
    ),
    Mutation("truncation without its cut", "hypergradients.py", "if last < solver.steps:", "if False:"),
    Mutation(
        "init's derivative lost",
        "hypergradients.py",
        "solver, theta, starting_point(init, theta, data)",
        "solver, theta, jax.lax.stop_gradient(starting_point(init, theta, data))",
    ),
    Mutation(
        "tangent of w lost",
        "hypergradients.py",
        "problem)(inner.w, theta, data)",
        "problem)(jax.lax.stop_gradient(inner.w), theta, data)",
    ),
    Mutation(
        "OneStep's sign",
        "hypergradients.py",
        "tree.add(outer_theta, tree.with_zeros(through_w, theta))",
        "tree.subtract(outer_theta, tree.with_zeros(through_w, theta))",
    ),
    Mutation(
        "FirstOrder's sign",
        "hypergradients.py",
        "tree.subtract(outer_theta, through_w), aux, inner, None)",
        "tree.add(outer_theta, through_w), aux, inner, None)",
    ),
    Mutation(
        "λ dropped", "conditions.py", "pull = tree.scale(self._strength(theta, data), ", "pull = tree.scale(1.0, "
    ),
    Mutation("fixed point's sign", "conditions.py", _FIXED_POINT, _FIXED_POINT.replace("subtract", "add")),
    Mutation(
        "complementarity without its multiplier",
        "conditions.py",
        "jax.tree.map(jnp.multiply, unequal, inequality)",
        "inequality",
    ),
    Mutation(
        "multiplier's sign",
        "conditions.py",
        "pull_back((jnp.ones_like(objective), equal, unequal))",
        "pull_back((jnp.ones_like(objective), jax.tree.map(jnp.negative, equal), unequal))",
    ),
    Mutation(
        "ascent in place of descent",
        "conditions.py",
        "return tree.subtract(w, tree.scale(condition.step_size, slope))",
        "return tree.add(w, tree.scale(condition.step_size, slope))",
    ),
    Mutation(
        "prox with half its step", "conditions.py", "theta, data, self.step_size)", "theta, data, 0.5 * self.step_size)"
    ),
    Mutation(
        "stale iterate",
        "solvers.py",
        "return report(residual(state[0]), state[0], steps=solver.steps)",
        "return report(residual(state[0]), init, steps=solver.steps)",
    ),
    Mutation("Anderson's mix reversed", "solvers.py", "step = slope + mix @", "step = slope - mix @"),
    Mutation(
        "line search backwards",
        "solvers.py",
        "return tree.add(w, tree.scale(size, direction))",
        "return tree.subtract(w, tree.scale(size, direction))",
    ),
    Mutation("ridge forgotten", "linear.py", "    if not ridge:\n", "    if True:\n"),
    Mutation(
        "preconditioner twice",
        "linear.py",
        "_widely(solver.preconditioner, b)",
        "_widely(lambda r: solver.preconditioner(solver.preconditioner(r)), b)",
    ),
    Mutation("one product skipped", "linear.py", "tree.subtract(b_unit, regularised(x))", "b_unit"),
    Mutation(
        "unit not scaled back", "linear.py", "solution = tree.scale(unit, info.solution)", "solution = info.solution"
    ),
    Mutation(
        "float32 in a float64 solve",
        "linear.py",
        "(flat_matvec, flat))",
        "(flat_matvec, flat).astype(jnp.float32).astype(flat.dtype))",
    ),
    Mutation("Woodbury without its ridge", "linear.py", "inner, factor.T @ b)) / self.ridge", "inner, factor.T @ b))"),
    Mutation("sign after differences", "estimators.py", _ENDING, _ENDING.replace("subtract", "add")),
    Mutation(
        "penalty forgotten",
        "estimators.py",
        "tree.scale(self.penalty, tree.subtract(slope, plain))",
        "tree.subtract(slope, plain)",
    ),
    Mutation("samples doubled", "estimators.py", "/ (2 * self.scale)", "/ self.scale"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to plant; all of them by default")
    names = parser.parse_args().names
    unknown = set(names) - {mutation.name for mutation in MUTATIONS}
    if unknown:
        parser.error(f"no fault is called {', '.join(unknown)}; there are {', '.join(m.name for m in MUTATIONS)}")
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        seconds, failure = _run_kit(copy)
        print(f"{seconds:6.1f} s  {'FAILS' if failure else 'passes'}  without a fault", flush=True)
        if failure:
            print(failure)
            return 1
        survivors = [mutation for mutation in chosen if not _caught(copy, mutation)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught")
    return 1 if survivors else 0


def _copy(folder: Path) -> Path:
    shutil.copytree(ROOT / "bilevel", folder / "bilevel", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "pytest_bilevel.py", SUITE):
        shutil.copy(path, folder)
    return folder


def _caught(copy: Path, mutation: Mutation) -> bool:
    path = copy / "bilevel" / mutation.file
    source = path.read_text()
    path.write_text(mutation.apply(source))
    try:
        seconds, failure = _run_kit(copy)
    finally:
        path.write_text(source)
    verdict = "caught" if failure else "SURVIVED"
    print(f"{seconds:6.1f} s  {verdict}  {mutation.name}{': ' + _first_line(failure) if failure else ''}", flush=True)
    return bool(failure)


def _run_kit(copy: Path) -> tuple[float, str]:
    """Seconds, and what pytest printed, or "" where all passed."""
    environment = os.environ | {
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults in one second would share a timestamp, and a stale .pyc
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time goes into compiling
        # What a fault does not touch was compiled before.
        "JAX_COMPILATION_CACHE_DIR": str(copy / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=short",
        "-p",
        "pytest_bilevel",
        "-p",
        "no:cacheprovider",
    ]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(copy), str(copy / SUITE.name)],
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
