"""The situations of Optimistix's tests of derivatives, declared with this library.

The problems and their references in NumPy are in tests/optimistix_problems.py. The page docs/moving/optimistix.md
counts the cases of each family, and a test compares its numbers with this file.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from optimistix_problems import MAPPINGS, MATRIX, OBJECTIVES, RANDOM, RESIDUALS, SITUATIONS, Y0, complex_step, flat

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAGE = Path(__file__).parents[3] / "docs/moving/optimistix.md"
CASES: Counter[str] = Counter()
needs_optimistix = pytest.mark.skipif(
    find_spec("optimistix") is None, reason="needs Optimistix: pip install '.[optimistix]'"
)


def cases(family: str, arguments: str, values: Sequence[Any], **options: Any) -> pytest.MarkDecorator:
    """Return the parametrisation of a test by these values, which count as cases of the family."""
    CASES[family] += len(values)
    return pytest.mark.parametrize(arguments, values, **options)


def one_case(family: str) -> Callable[[Any], Any]:
    """Return a decorator that counts a test without parameters as one case of the family."""
    CASES[family] += 1
    return lambda test: test


def optimistix(name: str, *arguments: Any, max_steps: int = 5000, tol: float = 1e-7, **options: Any) -> bl.Optimistix:
    """Return a solver of Optimistix, by name, with tight tolerances."""
    import optimistix

    return bl.Optimistix(getattr(optimistix, name)(*arguments, **{"rtol": 1e-11, "atol": 1e-11} | options), max_steps, tol)


def agrees(found: Any, expected: np.ndarray, rtol: float = 1e-6, atol: float = 1e-8) -> None:
    """Assert that a tree equals a vector, relative to the vector's norm, or to 1 for a zero vector."""
    expected = np.ravel(np.asarray(expected, np.float64))
    assert flat(found).shape == expected.shape
    size = np.linalg.norm(expected)
    assert np.linalg.norm(flat(found) - expected) <= (rtol * size if size > 1e-100 else atol)


def direction(tree: Any, seed: int) -> Any:
    """Return a random tree of the same structure, in the scale of its leaves, which may differ by orders."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=np.shape(leaf)) * np.maximum(np.abs(leaf), 0.1), tree)


def arrays(tree: Any, dtype: Any = np.float64) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def closed_forms():
    return [name for name, situation in SITUATIONS.items() if situation.exact]


@pytest.mark.parametrize("name", closed_forms())
def test_the_references_in_numpy_agree_with_the_closed_forms(name):
    situation = SITUATIONS[name]
    theta, (w, slopes) = flat(situation.theta), situation.solved
    agrees(w, situation.exact(theta), rtol=1e-12)
    along = flat(direction(situation.theta, 2))
    moved = (situation.exact(theta + h * along) - situation.exact(theta - h * along) for h in (1e-4, 2e-4))
    near, far = moved
    agrees(slopes @ along, (8 * near - far) / 12e-4, rtol=1e-8)


# Layers, pushed forward and pulled back.

ITERATION, ANDERSON = bl.FixedPointIteration(5000, tol=1e-13), bl.Anderson(200, tol=1e-13)
GAUSS_NEWTON, MARQUARDT = bl.GaussNewton(100, tol=1e-12), bl.LevenbergMarquardt(500, tol=1e-11)
NEWTON = bl.HessianFree(200, cg_steps=20, tol=1e-11)
STIFF = [name for name in MAPPINGS if name.startswith("robertson")]  # contractions by 1e-5, with solutions of any size

MAPPING_LAYERS = [
    *[(name, "FixedPoint", ITERATION) for name in MAPPINGS if name not in STIFF],
    *[(name, "FixedPoint", bl.FixedPointIteration(10)) for name in STIFF],
    *[(name, "Root", GAUSS_NEWTON) for name in ("exponential", "network", "linear value", "robertson slope")],
    *[(name, "Root", MARQUARDT) for name in ("cosine", "heat", "linear slope")],
    *[(name, "FixedPoint", ANDERSON) for name in ("exponential", "linear slope")],
    ("cosine", "Root", bl.Jaxopt("Broyden", maxiter=200, tol=1e-12)),
]
FITS = [name for name in RESIDUALS if name != "flat bowl"]  # with the Jacobian zero, Gauss-Newton steps are singular
RESIDUAL_LAYERS = [
    *[(name, "LeastSquares", MARQUARDT) for name in FITS],
    *[(name, "LeastSquares", GAUSS_NEWTON) for name in ("rosenbrock", "decay")],
    *[(name, "LeastSquares", NEWTON) for name in ("flat bowl", "rosenbrock")],
    *[(name, "gauss_newton", MARQUARDT) for name in ("rosenbrock", "variably dimensioned")],  # exact, because r = 0
]
OBJECTIVE_LAYERS = [
    *[(name, "Stationary", NEWTON) for name in OBJECTIVES],
    ("himmelblau", "Stationary", bl.Jaxopt("LBFGS", maxiter=1000, tol=1e-11)),
    ("matyas", "Stationary", bl.GradientDescent(1.0, 2000, tol=1e-12)),
]


def condition_of(name: str, kind: str) -> Any:
    if kind == "gauss_newton":
        return SITUATIONS[name].condition(operator="gauss_newton")
    return SITUATIONS[name].condition(as_root=kind == "Root")


def label(value: Any) -> str:
    """Return a test's parameter in words."""
    if isinstance(value, bl.Jaxopt):
        return f"jaxopt {value.solver}"
    return value if isinstance(value, str) else type(value).__name__


def check_layer(name: str, kind: str, solver: Any) -> None:
    """Compare a layer's solution, its tangent and its cotangent with NumPy's."""
    situation = SITUATIONS[name]
    layer = bl.implicit_layer(condition_of(name, kind), solver)
    w_reference, slopes = situation.solved
    along, against = direction(situation.theta, 0), RANDOM.normal(size=w_reference.size)

    @jax.jit
    def linearised(theta, init, along, against):
        w, push = jax.linearize(lambda theta: layer(theta, init, None), theta)
        (pulled,) = jax.linear_transpose(push, theta)(ravel_pytree(w)[1](against))
        return w, push(along), pulled

    w, pushed, pulled = linearised(arrays(situation.theta), arrays(situation.start), arrays(along), against)
    assert jax.tree.structure(w) == jax.tree.structure(situation.start)
    agrees(w, w_reference)
    agrees(pushed, slopes @ flat(along))
    scale = np.maximum(np.abs(flat(situation.theta)), 0.1)  # the rates of Robertson's reaction differ by orders
    agrees(flat(pulled) * scale, against @ slopes * scale)


@pytest.mark.slow("compiles a layer for each solver", fast=("cosine-FixedPoint-FixedPointIteration", "rob*slope-Root-Gau*"))
@cases("Fixed points and roots", ("name", "kind", "solver"), MAPPING_LAYERS, ids=label)
def test_a_layer_of_a_fixed_point_or_a_root(name, kind, solver):
    check_layer(name, kind, solver)


@pytest.mark.slow("compiles a layer for each solver", fast="rosenbrock-LeastSquares-LevenbergMarquardt")
@cases("Least squares", ("name", "kind", "solver"), RESIDUAL_LAYERS, ids=label)
def test_a_layer_of_least_squares(name, kind, solver):
    check_layer(name, kind, solver)


@pytest.mark.slow("compiles a layer for each solver", fast="himmelblau-Stationary-HessianFree")
@cases("Minima", ("name", "kind", "solver"), OBJECTIVE_LAYERS, ids=label)
def test_a_layer_of_a_minimum(name, kind, solver):
    check_layer(name, kind, solver)
