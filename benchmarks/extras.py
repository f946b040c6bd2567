"""Install each extra alone into a clean environment, and check there that the extra serves its purpose.

    python benchmarks/extras.py                    # the base installation and every extra but benchmarks
    python benchmarks/extras.py docs flax          # these two extras
    python benchmarks/extras.py benchmarks         # installs several gigabytes: PyTorch and the libraries to compare

The script fails if pyproject.toml does not list a dependency that an extra needs. A developer's environment hides this
mistake if another extra has installed the dependency. The script needs a package index; pip's cache makes later runs
faster. Each environment is removed after its check.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_STEPS = """
import jax.numpy as jnp
import bilevel as bl
import imaml

problem = bl.Problem(
    bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)),
    lambda w, theta, data: jnp.sum(w**2),
)
out = bl.value_and_hypergradient(problem, bl.GradientDescent(0.3, 200), bl.Implicit(bl.CG(10)))(
    0.0, jnp.zeros(2), jnp.ones(2)
)
assert abs(float(out.gradient) + 0.5) < 1e-4, out.gradient  # w = 1/2, d(2 w²)/dθ = -4 w³
assert imaml.preset("glyphs-5way-1shot-gd")
"""

WITH_LINEAX = """
import jax.numpy as jnp
import lineax
import bilevel as bl

x, info = bl.Lineax(lineax.LU())(lambda v: 2 * v, jnp.ones(2))
assert int(info.status) == bl.Status.CONVERGED and float(abs(x - 0.5).max()) < 1e-6, info
"""

WITH_OPTIMISTIX = """
import jax.numpy as jnp
import optimistix
import bilevel as bl

condition = bl.Root(lambda w, theta, data: w**2 - theta)
solver = bl.Optimistix(optimistix.Newton(rtol=1e-4, atol=1e-4), tol=1e-4)
found = bl.solve(solver, condition, 2.0, 9.0, None)
assert int(found.status) == bl.Status.CONVERGED and abs(float(found.w) - 3) < 1e-4, found
"""

WITH_LOGGER = """
import glob
import imaml

preset = imaml.preset("sinusoid-5shot-gd")
preset = imaml.replace(preset, outer=imaml.replace(preset.outer, steps=2, tasks=2))
imaml.train(preset, "run", evaluation_tasks=2, loggers=[LOGGER])
assert glob.glob("run/WRITTEN")
"""

USERS_TEST = """
import jax.numpy as jnp
from hypothesis import given, settings

import bilevel as bl
from bilevel.testing import strategies


def test_mine(hypergradient):
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * jnp.exp(theta) * w**2),
        lambda w, theta, data: w**2,
    )
    hypergradient.assert_hypergradient(problem, 0.5, 0.0, 2.0, bl.GradientDescent(0.3, 200), bl.Implicit(bl.CG(1)))


@settings(max_examples=2, deadline=None)
@given(case=strategies.quadratic_problems())
def test_drawn(hypergradient, case):
    hypergradient.assert_case(case)
"""


@dataclass(frozen=True)
class Environment:
    """A clean environment in which this checkout is installed with one extra.

    Attributes:
        python: the interpreter of the environment.
        folder: an empty folder to work in. It is outside the checkout, so that imports find what was installed.
    """

    python: Path
    folder: Path

    def run(self, *words: str | Path) -> str:
        """Run ``python`` with these arguments, and return its output.

        Raises:
            RuntimeError: if the exit code is not 0.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [self.python, *words],
            cwd=self.folder,
            env=inherited | {"MPLBACKEND": "agg"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words))} exits with {done.returncode}:\n{done.stdout}")
        return done.stdout


def base(env: Environment) -> None:
    """Check the base installation: a hypergradient, the command line, and an example that needs no extra."""
    env.run("-c", FIRST_STEPS)
    assert "glyphs-5way-1shot-gd" in env.run("-m", "imaml", "presets")
    env.run(ROOT / "examples" / "portfolio.py", env.folder / "portfolio.png")


def testing(env: Environment) -> None:
    """Run a user's tests with the pytest plugin and the Hypothesis strategies."""
    (env.folder / "test_mine.py").write_text(USERS_TEST)
    report = env.run("-m", "pytest", "--hypergradient-report", "--numprocesses", "1")
    assert "2 passed" in report and "hypergradients checked" in report, report


def flax(env: Environment) -> None:
    """Run the Flax example and the tests of Flax modules as networks of imaml."""
    env.run(ROOT / "examples" / "flax_sinusoids.py", env.folder / "picture.png")
    _test_networks(env)


def equinox(env: Environment) -> None:
    """Run the Equinox examples and the tests of Equinox modules as networks of imaml."""
    for name in ("equinox_features", "learned_denoiser"):
        env.run(ROOT / "examples" / f"{name}.py", env.folder / "picture.png")
    _test_networks(env)


def tensorboard(env: Environment) -> None:
    """Train with the logger for TensorBoard and the real tensorboardX."""
    env.run("-c", WITH_LOGGER.replace("LOGGER", "imaml.TensorBoard()").replace("WRITTEN", "tensorboard/events*"))


def wandb(env: Environment) -> None:
    """Train with the logger for Weights & Biases and the real wandb, in its offline mode."""
    logger = "imaml.WeightsAndBiases(options={'mode': 'offline'})"
    env.run("-c", WITH_LOGGER.replace("LOGGER", logger).replace("WRITTEN", "wandb/offline*"))


def _test_networks(env: Environment) -> None:
    """Run the tests of modules as networks. Those of a library that is not installed are skipped."""
    env.run("-m", "pip", "install", "--quiet", "pytest")
    tests = ROOT / "tests" / "imaml" / "learning" / "test_modules.py"
    report = env.run("-m", "pytest", "--all", "-p", "no:cacheprovider", "--rootdir", ROOT, tests)
    assert "passed" in report and "failed" not in report, report


def lineax(env: Environment) -> None:
    """Solve a linear system with Lineax."""
    env.run("-c", WITH_LINEAX)


def optimistix(env: Environment) -> None:
    """Solve an equation with Optimistix."""
    env.run("-c", WITH_OPTIMISTIX)


def docs(env: Environment) -> None:
    """Build the documentation, with warnings as errors."""
    env.run("-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", "html", ROOT / "docs", env.folder / "html")
    assert (env.folder / "html" / "index.html").is_file()


def benchmarks(env: Environment) -> None:
    """Import the libraries that :mod:`benchmarks.speed` times."""
    env.run("-c", "import higher, lineax, optimistix, torch, torchopt")


def dev(env: Environment) -> None:
    """Run the linter, the type checker, and the file of tests that need a type checker."""
    env.run("-m", "ruff", "check", ROOT)
    env.run("-m", "pyright", "--project", ROOT, "--pythonpath", env.python)
    report = env.run("-m", "pytest", "--all", "--rootdir", ROOT, ROOT / "tests" / "package" / "test_types.py")
    assert "skipped" not in report, report


JOBS = {
    job.__name__: job
    for job in (base, testing, flax, equinox, lineax, optimistix, tensorboard, wandb, docs, dev, benchmarks)
}


def check(extra: str) -> None:
    """Install the checkout with one extra into a new environment, and run the extra's function in ``JOBS``.

    Raises:
        RuntimeError: if the installation or a command fails.
        AssertionError: if a command's output is not as expected.
    """
    with tempfile.TemporaryDirectory(prefix=f"extra-{extra}-") as place:
        venv = Path(place) / "venv"
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        env = Environment(venv / "bin" / "python", Path(place) / "work")
        env.folder.mkdir()
        wanted = str(ROOT) if extra == "base" else f"{ROOT}[{extra}]"
        env.run("-m", "pip", "install", "--quiet", wanted)
        JOBS[extra](env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "extras", nargs="*", metavar="EXTRA", help=f"one of {', '.join(JOBS)}; default: all but benchmarks"
    )
    chosen = parser.parse_args().extras or [name for name in JOBS if name != "benchmarks"]
    if unknown := set(chosen) - set(JOBS):
        parser.error(f"unknown extra {', '.join(sorted(unknown))}; the extras are {', '.join(JOBS)}")
    for extra in chosen:
        start = time.perf_counter()
        check(extra)
        print(f"{extra}: ok, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
