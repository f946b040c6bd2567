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


# The solvers of Optimistix, with the hypergradient of an outer value.


def outer(w: Any, theta: Any, data: Any) -> jax.Array:
    """Return a function of w with the gradient 1, 2, 3, … plus w."""
    del theta, data
    w = ravel_pytree(w)[0]
    return jnp.arange(1.0, w.size + 1) @ w + 0.5 * w @ w


def gradient_of(name: str, slopes: np.ndarray | None = None) -> np.ndarray:
    """Return the total derivative of ``outer`` in θ, a vector."""
    w, exact = SITUATIONS[name].solved
    return (np.arange(1.0, w.size + 1) + w) @ (exact if slopes is None else slopes)


def check_hypergradient(name: str, kind: str, solver: Any, method: Any, expected: np.ndarray, **at: Any) -> None:
    situation = SITUATIONS[name]
    found = bl.value_and_hypergradient(bl.Problem(condition_of(name, kind), outer), solver, method)(
        arrays(situation.theta), arrays(situation.start), None, **at
    )
    assert jax.tree.structure(found.gradient) == jax.tree.structure(situation.theta)
    scale = np.maximum(np.abs(flat(situation.theta)), 0.1)
    agrees(flat(found.gradient) * scale, expected * scale)


def _adam() -> Any:
    import optax

    return optax.adam(0.3)


OF_OPTIMISTIX = {
    "FixedPointIteration": partial(optimistix, "FixedPointIteration", rtol=1e-13, atol=1e-13),
    "Newton": partial(optimistix, "Newton"),
    "Chord": partial(optimistix, "Chord"),
    "LevenbergMarquardt": partial(optimistix, "LevenbergMarquardt"),
    "IndirectLevenbergMarquardt": partial(optimistix, "IndirectLevenbergMarquardt"),
    "GaussNewton": partial(optimistix, "GaussNewton"),
    "Dogleg": partial(optimistix, "Dogleg"),
    "BFGS": partial(optimistix, "BFGS", rtol=1e-12, atol=1e-12),
    "DFP": partial(optimistix, "DFP", rtol=1e-12, atol=1e-12),
    "LBFGS": partial(optimistix, "LBFGS", rtol=1e-12, atol=1e-12),
    "NonlinearCG": partial(optimistix, "NonlinearCG", rtol=1e-13, atol=1e-13),
    "GradientDescent": partial(optimistix, "GradientDescent", 0.1, rtol=1e-13, atol=1e-13),
    "OptaxMinimiser": lambda: optimistix("OptaxMinimiser", _adam(), rtol=1e-12, atol=1e-12),
    "NelderMead": partial(optimistix, "NelderMead", rtol=1e-14, atol=1e-14),
}
HYPERGRADIENTS = [
    ("cosine", "FixedPoint", "FixedPointIteration"),
    ("network", "FixedPoint", "Newton"),
    ("linear value", "FixedPoint", "Chord"),
    ("heat", "Root", "Newton"),
    ("robertson slope", "Root", "Newton"),
    ("exponential", "Root", "LevenbergMarquardt"),
    ("linear slope", "Root", "Dogleg"),
    ("linear increment", "Root", "BFGS"),
    ("cosine", "FixedPoint", "BFGS"),
    ("rosenbrock", "LeastSquares", "LevenbergMarquardt"),
    ("decay", "LeastSquares", "Dogleg"),
    ("trigonometric", "LeastSquares", "GaussNewton"),
    ("chain", "LeastSquares", "IndirectLevenbergMarquardt"),
    ("variably dimensioned", "LeastSquares", "BFGS"),
    ("bowl", "Stationary", "BFGS"),
    ("himmelblau", "Stationary", "LBFGS"),
    ("quadratic", "Stationary", "NonlinearCG"),
    ("matyas", "Stationary", "DFP"),
    ("quadratic", "Stationary", "GradientDescent"),
    ("matyas", "Stationary", "OptaxMinimiser"),
    ("himmelblau", "Stationary", "NelderMead"),
]


@needs_optimistix
@pytest.mark.slow("compiles the solvers of Optimistix")
@cases("Solvers of Optimistix", ("name", "kind", "solver"), HYPERGRADIENTS)
def test_the_hypergradient_at_a_solution_of_optimistix(name, kind, solver):
    linear = bl.CG(50, tol=1e-12) if kind in ("LeastSquares", "Stationary") else bl.LU()
    check_hypergradient(name, kind, OF_OPTIMISTIX[solver](), bl.Implicit(linear), gradient_of(name))


# Ways to differentiate: adjoints through the steps, one step, and linear solvers.


def truncated(name: str, steps: int) -> np.ndarray:
    """Return Σ MᵏB over k < steps, the derivative of the last steps of an iteration w ← mapping(w, θ) at w*."""
    situation = SITUATIONS[name]
    (w, _), theta = situation.solved, flat(situation.theta)
    by_w = complex_step(lambda w: situation.function(w, theta, np), w)
    by_theta = complex_step(lambda theta: situation.function(w, theta, np), theta)
    return sum(np.linalg.matrix_power(by_w, k) @ by_theta for k in range(steps))


def after_steps(name: str, steps: int) -> np.ndarray:
    """Return the derivative of ``outer`` after few steps from the start, which are far from the solution."""
    situation = SITUATIONS[name]

    def value(theta):
        w = flat(situation.start)
        for _ in range(steps):
            w = situation.function(w, theta, np)
        return np.atleast_1d(np.arange(1.0, w.size + 1) @ w + 0.5 * w @ w)

    return complex_step(value, flat(situation.theta))[0]


FIFTY, LINEAR = bl.FixedPointIteration(50), {"max_steps": 30, "tol": 1e-11}
WAYS = {
    "Unrolled": ("network", FIFTY, bl.Unrolled(), gradient_of("network")),
    "Unrolled, recomputed": ("heat", FIFTY, bl.Unrolled(checkpoint=True), gradient_of("heat")),
    "Unrolled, three steps": ("cosine", bl.FixedPointIteration(3), bl.Unrolled(), after_steps("cosine", 3)),
    "Unrolled, last four": ("network", FIFTY, bl.Unrolled(last=4), gradient_of("network", truncated("network", 4))),
    "Unrolled, Anderson": ("linear slope", bl.Anderson(20), bl.Unrolled(), gradient_of("linear slope")),
    "ForwardUnrolled": ("exponential", FIFTY, bl.ForwardUnrolled(), gradient_of("exponential")),
    "ForwardUnrolled, tol": ("cosine", ITERATION, bl.ForwardUnrolled(), gradient_of("cosine")),
    "OneStep": ("network", FIFTY, bl.OneStep(), gradient_of("network", truncated("network", 1))),
    "OneStep, Anderson": ("heat", ANDERSON, bl.OneStep(), gradient_of("heat", truncated("heat", 1))),
    "GMRES": ("network", FIFTY, bl.Implicit(bl.GMRES(**LINEAR)), gradient_of("network")),
    "BiCGStab": ("linear slope", FIFTY, bl.Implicit(bl.BiCGStab(**LINEAR)), gradient_of("linear slope")),
    "NormalCG": ("heat", FIFTY, bl.Implicit(bl.NormalCG(**LINEAR)), gradient_of("heat")),
    "Neumann": ("network", FIFTY, bl.Implicit(bl.Neumann(4)), gradient_of("network", truncated("network", 4))),
    "Cholesky": ("fitted network", MARQUARDT, bl.Implicit(bl.Cholesky()), gradient_of("fitted network")),
    "watched CG": ("valley", NEWTON, bl.Implicit(bl.CG(**LINEAR, engine="watched")), gradient_of("valley")),
}


@pytest.mark.slow("compiles each way to differentiate", fast=("OneStep", "Unrolled, three steps"))
@cases("Adjoints and linear solvers", "way", WAYS)
def test_each_way_to_differentiate(way):
    name, solver, method, expected = WAYS[way]
    kinds = {"mapping": "FixedPoint", "residuals": "LeastSquares", "objective": "Stationary"}
    check_hypergradient(name, kinds[SITUATIONS[name].kind], solver, method, expected)


# Solver functions of one's own.


def iterate(mapping: Callable[[Any], Any], init: Any) -> Any:
    return jax.lax.while_loop(
        lambda state: state[0] < 60, lambda state: (state[0] + 1, mapping(state[1])), (0, init)
    )[1]


@cases("Solver functions", "rate", [1.0, 0.7])
def test_a_loop_of_ones_own_with_a_pytree_and_a_keyword(rate):
    """The derivative of w = exp(−θw) is −w²/(1 + θw)·…, from w(1 + θw)' = 0: dw/dθ = −w²/(1 + θw)."""

    @bl.custom_fixed_point(lambda w, theta, *, unused: jax.tree.map(lambda leaf: jnp.exp(-theta * leaf), w))
    def solver(init, theta, *, unused):
        return iterate(lambda w: jax.tree.map(lambda leaf: jnp.exp(-theta * leaf), w), init)

    def total(theta):
        w = solver({"a": jnp.full(2, 0.5), "b": jnp.array(0.5)}, theta, unused="a string")
        return w["a"].sum() + w["b"], w

    slope, w = jax.jit(jax.grad(total, has_aux=True))(rate)
    entry = flat(w)[0]
    assert abs(entry - np.exp(-rate * entry)) < 1e-12
    agrees(slope, -3 * entry**2 / (1 + rate * entry))


@needs_optimistix
@pytest.mark.slow("compiles the solvers of Optimistix")
@cases("Solver functions", ("side", "sign"), [("lower", 1.0), ("upper", -1.0)])
def test_root_find_with_bounds_of_w(side, sign):
    """Newton with bounds finds the root w₁ = ±√θ, w₂ = θ³ on its side."""
    import optimistix

    def residual(w, theta):
        return w[0] ** 2 - theta, {"b": w[1]["b"] - theta**3}

    @bl.custom_root(residual)
    def solver(init, theta):
        newton = optimistix.Newton(rtol=1e-12, atol=1e-12)
        bounds = (jnp.array(0.0), {"b": jnp.array(-sign * jnp.inf)})
        return optimistix.root_find(
            residual, newton, init, args=theta, options={side: bounds}, adjoint=optimistix.ImplicitAdjoint()
        ).value

    start = (jnp.array(sign * 1.5), {"b": jnp.array(0.1)})
    w, pushed = jax.jvp(lambda theta: solver(start, theta), (2.0,), (1.0,))
    agrees(w, np.array([sign * 2**0.5, 8.0]), rtol=1e-9)
    agrees(pushed, np.array([sign * 0.5 / 2**0.5, 12.0]))


SCALARS = {  # the residual, its root at θ = 1, and the root's derivative
    "trivial": (lambda w, theta: theta * (w - 1), lambda w: 0.0),
    "cosine": (lambda w, theta: jnp.cos(theta * w) - w, lambda w: -w * np.sin(w) / (1 + np.sin(w))),
    "exponential": (lambda w, theta: jnp.exp(-theta * w) - w, lambda w: -(w**2) / (1 + w)),
    "implicit step": (lambda w, theta: 0.5 + 0.25 * theta * (0.5 + w) - w, lambda w: 0.25 * (0.5 + w) / 0.75),
}


@needs_optimistix
@pytest.mark.slow("compiles the solvers of Optimistix")
@cases("Solver functions", "name", SCALARS)
def test_bisection_of_optimistix_in_a_solver_function(name):
    import optimistix

    residual, slope = SCALARS[name]

    @bl.custom_root(residual, tol=1e-8)
    def solver(init, theta):
        options = {"lower": 0.0, "upper": 2.0}
        bisection = optimistix.Bisection(rtol=1e-11, atol=1e-11)
        return optimistix.root_find(residual, bisection, init, args=theta, options=options, throw=False).value

    w, pulled = jax.value_and_grad(lambda theta: solver(jnp.array(0.7), theta))(1.0)
    agrees(pulled, slope(float(w)))


# Closures, starts and auxiliary outputs, for each condition.

SIMPLE = {  # the condition on a function of (w, θ), its solver, w and dw/dθ at θ = 0.5
    "root": (lambda f: bl.Root(f), lambda w, theta: w**3 + w - 10 * theta, bl.GaussNewton(50, tol=1e-12)),
    "fixed point": (lambda f: bl.FixedPoint(f), lambda w, theta: theta + 0 * w, bl.FixedPointIteration(5, tol=1e-12)),
    "least squares": (
        lambda f: bl.LeastSquares(f),
        lambda w, theta: (w + theta, 2 * w),
        bl.LevenbergMarquardt(50, tol=1e-12),
    ),
    "minimum": (lambda f: bl.Stationary(f), lambda w, theta: (w - theta**2) ** 2 + theta, bl.HessianFree(10, tol=1e-12)),
}
ROOT = float(np.roots([1.0, 0.0, 1.0, -5.0])[2].real)
SOLUTIONS = {"root": (ROOT, 10 / (3 * ROOT**2 + 1)), "fixed point": (0.5, 1.0), "least squares": (-0.1, -0.2)}
SOLUTIONS["minimum"] = (0.25, 1.0)


def solved_simply(kind: str, theta: Any, init: Any, has_aux: bool = False) -> Any:
    """Return the layer's w, where the condition's function closes over θ in place of an argument."""
    declare, function, solver = SIMPLE[kind]
    return bl.implicit_layer(declare(lambda w, _, data: function(w, theta)), solver)(None, init, None)


@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_a_function_that_closes_over_the_outer_variable(kind):
    w, slope = SOLUTIONS[kind]
    value, pulled = jax.value_and_grad(lambda theta: solved_simply(kind, theta, 0.3))(0.5)
    pushed = jax.jit(lambda theta: jax.jvp(lambda theta: solved_simply(kind, theta, 0.3), (theta,), (1.0,))[1])(0.5)
    agrees(value, np.array(w))
    agrees(pulled, np.array(slope))
    agrees(pushed, np.array(slope))


@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_a_hypergradient_whose_outer_function_closes_over_a_variable(kind):
    """JAX's derivative of the value w² scale in both closed-over variables, θ in the condition and the scale."""
    declare, function, solver = SIMPLE[kind]

    def value(theta, scale):
        condition = declare(lambda w, _, data: function(w, theta))
        problem = bl.Problem(condition, lambda w, _, data: scale * w**2)
        return bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()))(1.0, 0.3, None).value

    w, slope = SOLUTIONS[kind]
    agrees(jax.grad(value, (0, 1))(0.5, 3.0), np.array([6 * w * slope, w**2]))


@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_the_derivative_in_the_start_is_zero(kind):
    declare, function, solver = SIMPLE[kind]
    layer = bl.implicit_layer(declare(lambda w, theta, data: function(w, theta)), solver)
    with pytest.warns(UserWarning, match="derivative in init is zero"):
        pushed = jax.jvp(lambda theta, init: layer(theta, init, None), (0.5, 0.3), (1.0, 1e6))[1]
    agrees(pushed, np.array(SOLUTIONS[kind][1]))
    with pytest.warns(UserWarning, match="derivative in init is zero"):
        assert float(jax.grad(lambda init: layer(0.5, init, None))(0.3)) == 0.0


@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_an_auxiliary_output_changes_no_derivative(kind):
    declare, function, solver = SIMPLE[kind]
    seen = {"ones": jnp.ones((2, 3)), "count": 3}
    condition = type(declare(lambda w, theta, data: w))(
        lambda w, theta, data: (function(w, theta), seen | {"w": w}), has_aux=True
    )
    w, pulled = jax.value_and_grad(lambda theta: bl.implicit_layer(condition, solver)(theta, 0.3, None))(0.5)
    agrees(pulled, np.array(SOLUTIONS[kind][1]))
    aux = condition.aux(w, 0.5, None)
    assert aux["count"] == 3 and aux["ones"].shape == (2, 3) and float(aux["w"]) == float(w)


@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_a_start_at_the_solution_is_differentiated_too(kind):
    w, slope = SOLUTIONS[kind]
    agrees(jax.grad(lambda theta: solved_simply(kind, theta, w))(0.5), np.array(slope))


def test_the_page_counts_the_cases_of_this_file():
    rows = re.findall(r"^\| ([\w ,]+?) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert {family: int(count) for family, count in rows} == dict(CASES)
    assert sum(CASES.values()) >= 90
