"""The types that a user's type checker sees in the installed packages.

A right program has no error, and each mistake is reported on its line. All public names of `bilevel` have complete
types. The same test of `imaml` is an expected failure, because some annotations are missing.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
import jax
import jax.numpy as jnp
import optax

import bilevel as bl
import imaml


def fit(w: jax.Array, theta: jax.Array, data: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((w - data) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)


def validate(w: jax.Array, theta: jax.Array, data: jax.Array) -> jax.Array:
    return jnp.sum(w**2)


problem = bl.Problem(bl.Stationary(fit), validate)
solver = bl.GradientDescent(0.3, 200, tol=1e-5)
method = bl.Implicit(bl.CG(10, tol=1e-5))

out: bl.Hypergradient = bl.value_and_hypergradient(problem, solver, method)(0.0, jnp.zeros(2), jnp.ones(2))
solution: bl.Solution = out.inner
numbers: list[jax.Array] = [out.value, solution.residual_norm, out.status]
if out.linear is not None:
    numbers.append(out.linear.status)
name: str = bl.Status(int(out.status)).name
sentence: str = bl.Status.CONVERGED.message

layer = bl.implicit_layer(bl.Stationary(fit), solver, bl.Cholesky())
slope = jax.grad(lambda theta: jnp.sum(layer(theta, jnp.zeros(2), jnp.ones(2))))(0.0)

minimum: bl.Minimum = bl.minimize(
    problem, 0.0, jnp.zeros(2), jnp.ones(2), solver, method, optax.sgd(0.1), steps=3, on_failure="warn"
)
certificate: bl.Certificate = bl.certify(problem, 0.0, out, jnp.ones(2))
methods: dict[str, bl.Method] = {"implicit": method, "unrolled": bl.Unrolled(last=5), "one step": bl.OneStep()}


def identity(matvec: object, b: jax.Array, init: jax.Array | None = None) -> tuple[jax.Array, bl.LinearInfo]:
    raise NotImplementedError


own_solver: bl.LinearSolver = identity
conditions: list[bl.Condition] = [
    bl.Stationary(fit),
    bl.Proximal(fit, 2.0),
    bl.LeastSquares(fit),
    bl.Root(lambda w, theta, data: w - theta),
    bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta),
    bl.Projected(fit, lambda w, theta, data: w),
    bl.ProximalGradient(fit, lambda w, theta, data, step_size: w),
    bl.KKT(fit),
]
root: bl.Solution = bl.solve(bl.GaussNewton(5), bl.Root(lambda w, theta, data: w - theta), 0.0, 1.0, None)
linear: bl.LinearSolver = bl.Blockwise(bl.LU())
preset: imaml.Preset = imaml.preset("glyphs-5way-1shot-gd")
"""
"""A user's file without a type error."""

WRONG = """
import jax
import jax.numpy as jnp
import optax

import bilevel as bl
import imaml


def fit(w: jax.Array, theta: jax.Array, data: jax.Array) -> jax.Array:
    return 0.5 * jnp.sum((w - data) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)


condition = bl.Stationary(fit)
solver = bl.GradientDescent(0.3, 200)
method = bl.Implicit(bl.CG(10))
bl.Stationary(0.5)  # E: arg-type
bl.Problem(condition)  # E: call-arg
bl.Problem(fit, fit)  # E: arg-type
bl.GradientDescent("0.3", 200)  # E: arg-type
bl.GradientDescent(0.3, tolerance=1e-5)  # E: call-arg
bl.Implicit(bl.CG)  # E: arg-type
bl.Implicit(solver)  # E: arg-type
problem = bl.Problem(condition, fit)
bl.value_and_hypergradient(problem, solver)  # E: call-arg
bl.value_and_hypergradient(problem, method, solver)  # E: arg-type
bl.value_and_hypergradient(problem, solver, method, on_failure="rise")  # E: arg-type
bl.implicit_layer(problem, solver, bl.CG(10))  # E: arg-type
out = bl.value_and_hypergradient(problem, solver, method)(0.0, jnp.zeros(2), jnp.ones(2))
out.gradients  # E: attr-defined
out.inner.residual  # E: attr-defined
out.linear.status  # E: union-attr
out.value = jnp.zeros(())  # E: misc
number: float = out.value  # E: assignment
bl.Status.CONVERGE  # E: attr-defined
bl.Status("CONVERGED")  # E: arg-type
bl.minimize(problem, 0.0, jnp.zeros(2), jnp.ones(2), solver, method, optax.sgd(0.1))  # E: call-arg
minimum = bl.minimize(problem, 0.0, jnp.zeros(2), jnp.ones(2), solver, method, optax.sgd(0.1), steps=3)
minimum.losses  # E: attr-defined
bl.Hessian(3)  # E: attr-defined
imaml.preset(5)  # E: arg-type
imaml.preset("glyphs-5way-1shot-gd").inner_steps  # E: attr-defined
"""
"""A user's file: each line that ends with ``# E: code`` has one mistake, which mypy reports under that code."""

ERROR = re.compile(r"^user\.py:(\d+): error: .*\[([\w-]+)\]$", re.MULTILINE)


@pytest.fixture(scope="module")
def mypy(installation, tmp_path_factory):
    """Return a function that runs ``mypy --strict`` on the source of a user's file, with the installed wheel."""
    pytest.importorskip("mypy", reason="mypy, of the extra dev, is not installed")
    folder = tmp_path_factory.mktemp("mypy")

    def check(source: str) -> subprocess.CompletedProcess:
        (folder / "user.py").write_text(source)
        # optax has no py.typed. mypy reports that as import-untyped, and takes the names of optax as Any.
        options = ["--strict", "--disable-error-code=import-untyped", "--python-executable", installation.python]
        return subprocess.run(
            [sys.executable, "-m", "mypy", *options, "user.py"],
            cwd=folder,
            env=installation.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return check


@pytest.mark.slow("mypy reads the types of JAX, which takes half a minute")
class TestMypy:
    def test_a_right_program_has_no_error(self, mypy):
        done = mypy(RIGHT)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout

    def test_the_right_program_runs(self, installation, tmp_path):
        (tmp_path / "user.py").write_text(RIGHT)
        subprocess.run([installation.python, "user.py"], cwd=tmp_path, env=installation.environment, check=True)

    def test_each_mistake_is_reported_on_its_line(self, mypy):
        planted = {
            (number, line.partition("# E: ")[2]) for number, line in enumerate(WRONG.splitlines(), 1) if "# E: " in line
        }
        done = mypy(WRONG)
        assert {(int(line), code) for line, code in ERROR.findall(done.stdout)} == planted, done.stdout


@pytest.mark.slow("pyright reads the types of JAX, which takes ten seconds")
def test_pyright_finds_no_error_in_a_right_program(installation, tmp_path):
    pytest.importorskip("pyright", reason="pyright, of the extra dev, is not installed")
    (tmp_path / "user.py").write_text(RIGHT)
    command = [sys.executable, "-m", "pyright", "--pythonpath", installation.python, "user.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=installation.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow("pyright reads the types of JAX, which takes ten seconds for each package")
@pytest.mark.parametrize(
    "package",
    [
        "bilevel",
        pytest.param("imaml", marks=pytest.mark.xfail(reason="some annotations of imaml are missing", strict=True)),
    ],
)
def test_the_public_surface_has_complete_types(package, installation, tmp_path):
    pytest.importorskip("pyright", reason="pyright, of the extra dev, is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--verifytypes", package, "--ignoreexternal", "--outputjson"],
        cwd=tmp_path,
        env=installation.environment,  # pyright looks for the package in the `python` of PATH
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)["typeCompleteness"]
    assert found["pyTypedPath"] == str(installation.site_packages / package / "py.typed")
    incomplete = sorted(
        symbol["name"] for symbol in found["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]
    )
    assert not incomplete
    assert found["completenessScore"] == 1


def test_both_packages_declare_their_types():
    for package in ("bilevel", "imaml"):
        assert (Path(__file__).parents[2] / package / "py.typed").is_file()
