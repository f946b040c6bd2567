"""The situations in which Optimistix's tests take derivatives, declared with this library.

The problems and their references in NumPy are in tests/optimistix_problems.py. The page docs/moving/optimistix.md
counts the cases of each family, and a test compares its numbers with this file.
"""

import re
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
from optimistix_problems import MAPPINGS, OBJECTIVES, RESIDUALS, SITUATIONS, complex_step, flat

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

    return bl.Optimistix(
        getattr(optimistix, name)(*arguments, **{"rtol": 1e-11, "atol": 1e-11} | options), max_steps, tol
    )


def agrees(found: Any, expected: np.ndarray, rtol: float = 1e-6, atol: float = 1e-8) -> None:
    """Assert that a tree differs from a vector by at most rtol times the vector's norm, or atol for a zero vector."""
    expected = np.ravel(np.asarray(expected, np.float64))
    assert flat(found).shape == expected.shape
    size = np.linalg.norm(expected)
    assert np.linalg.norm(flat(found) - expected) <= (rtol * size if size > 1e-100 else atol)


def direction(tree: Any, seed: int) -> Any:
    """Return a random tree of the same structure. An entry is scaled by max(|given entry|, 0.1)."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.normal(size=np.shape(leaf)) * np.maximum(np.abs(leaf), 0.1), tree)


def arrays(tree: Any, dtype: Any = np.float64) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


@pytest.mark.parametrize("name", [name for name, situation in SITUATIONS.items() if situation.exact])
def test_the_references_in_numpy_agree_with_the_closed_forms(name):
    situation = SITUATIONS[name]
    theta, (w, slopes) = flat(situation.theta), situation.solved
    agrees(w, situation.exact(theta), rtol=1e-12)
    along = flat(direction(situation.theta, 2))
    near, far = (situation.exact(theta + h * along) - situation.exact(theta - h * along) for h in (1e-4, 2e-4))
    agrees(slopes @ along, (8 * near - far) / 12e-4, rtol=1e-8)


# Layers, differentiated in forward and in reverse mode.

ITERATION, ANDERSON = bl.FixedPointIteration(5000, tol=1e-13), bl.Anderson(200, tol=1e-13)
GAUSS_NEWTON, MARQUARDT = bl.GaussNewton(100, tol=1e-12), bl.LevenbergMarquardt(500, tol=1e-11)
NEWTON = bl.HessianFree(200, cg_steps=20, tol=1e-11)
# These mappings contract by about 1e-5, so ten steps suffice. ‖w‖ is between 1e-10 and 1: no absolute tol fits all.
STIFF = [name for name in MAPPINGS if name.startswith("robertson")]

MAPPING_LAYERS = [
    *[(name, "FixedPoint", ITERATION) for name in MAPPINGS if name not in STIFF],
    *[(name, "FixedPoint", bl.FixedPointIteration(10)) for name in STIFF],
    *[(name, "Root", GAUSS_NEWTON) for name in ("exponential", "network", "linear value", "robertson slope")],
    *[(name, "Root", MARQUARDT) for name in ("cosine", "heat", "linear slope")],
    *[(name, "FixedPoint", ANDERSON) for name in ("exponential", "linear slope")],
    ("cosine", "Root", bl.Jaxopt("Broyden", maxiter=200, tol=1e-12)),
]
# HessianFree solves the flat bowl, whose Jacobian is zero at the minimum, and the trigonometric fit.
# Levenberg-Marquardt compares values of ½‖r‖², so where r ≠ 0 at the minimum, it finds w only to about √eps. The
# derivative of the trigonometric fit multiplies this error by a hundred.
FITS = [name for name in RESIDUALS if name not in ("flat bowl", "trigonometric")]
RESIDUAL_LAYERS = [
    *[(name, "LeastSquares", MARQUARDT) for name in FITS],
    *[(name, "LeastSquares", GAUSS_NEWTON) for name in ("rosenbrock", "decay")],
    *[(name, "LeastSquares", NEWTON) for name in ("flat bowl", "trigonometric")],
    *[(name, "gauss_newton", MARQUARDT) for name in ("rosenbrock", "variably dimensioned")],  # exact, because r = 0
]
OBJECTIVE_LAYERS = [
    *[(name, "Stationary", NEWTON) for name in OBJECTIVES],
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
    along, against = direction(situation.theta, 0), np.random.default_rng(1).normal(size=w_reference.size)

    @jax.jit
    def linearised(theta, init, along, against):
        w, push = jax.linearize(lambda theta: layer(theta, init, None), theta)
        (pulled,) = jax.linear_transpose(push, theta)(ravel_pytree(w)[1](against))
        return w, push(along), pulled

    w, pushed, pulled = linearised(arrays(situation.theta), arrays(situation.start), arrays(along), against)
    assert jax.tree.structure(w) == jax.tree.structure(situation.start)
    agrees(w, w_reference)
    agrees(pushed, slopes @ flat(along))
    # The rates of Robertson's reaction differ by orders of magnitude. Weigh each derivative by the size of its rate.
    scale = np.maximum(np.abs(flat(situation.theta)), 0.1)
    agrees(flat(pulled) * scale, against @ slopes * scale)


@pytest.mark.slow(
    "compiles a layer for each solver", fast=("cosine-FixedPoint-FixedPointIteration", "rob*slope-Root-Gau*")
)
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
    """Return ⟨c, w⟩ + ½‖w‖² with c = (1, 2, 3, …). Its gradient is c + w."""
    del theta, data
    w = ravel_pytree(w)[0]
    return jnp.arange(1.0, w.size + 1) @ w + 0.5 * w @ w


def gradient_of(name: str, slopes: np.ndarray | None = None) -> np.ndarray:
    """Return the total derivative of ``outer`` in the vector θ, for the given slopes dw/dθ or the exact ones."""
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


def optax_sgd() -> bl.Optimistix:
    import optax

    return optimistix("OptaxMinimiser", optax.sgd(0.2), rtol=1e-13, atol=1e-13)


OF_OPTIMISTIX = {
    "FixedPointIteration": partial(optimistix, "FixedPointIteration", rtol=1e-13, atol=1e-13),
    "Newton": partial(optimistix, "Newton"),
    "Chord": partial(optimistix, "Chord"),
    "LevenbergMarquardt": partial(optimistix, "LevenbergMarquardt"),
    "GaussNewton": partial(optimistix, "GaussNewton"),
    "Dogleg": partial(optimistix, "Dogleg"),
    "BFGS": partial(optimistix, "BFGS", rtol=1e-12, atol=1e-12),
    "DFP": partial(optimistix, "DFP", rtol=1e-12, atol=1e-12),
    "LBFGS": partial(optimistix, "LBFGS", rtol=1e-12, atol=1e-12),
    "NonlinearCG": partial(optimistix, "NonlinearCG", rtol=1e-13, atol=1e-13),
    "OptaxMinimiser": optax_sgd,
    "NelderMead": partial(optimistix, "NelderMead", rtol=1e-14, atol=1e-14),
}
HYPERGRADIENTS = [
    ("cosine", "FixedPoint", "FixedPointIteration"),
    ("network", "FixedPoint", "Newton"),
    ("linear value", "FixedPoint", "Chord"),
    ("robertson slope", "Root", "Newton"),
    ("exponential", "Root", "LevenbergMarquardt"),
    ("linear slope", "Root", "Dogleg"),
    ("linear increment", "Root", "BFGS"),
    ("cosine", "FixedPoint", "BFGS"),
    ("chain", "LeastSquares", "LevenbergMarquardt"),
    ("decay", "LeastSquares", "GaussNewton"),
    ("variably dimensioned", "LeastSquares", "Dogleg"),
    ("rosenbrock", "LeastSquares", "BFGS"),
    ("himmelblau", "Stationary", "LBFGS"),
    ("beale", "Stationary", "NonlinearCG"),
    ("matyas", "Stationary", "DFP"),
    ("quadratic", "Stationary", "OptaxMinimiser"),
    ("himmelblau", "Stationary", "NelderMead"),
]


@needs_optimistix
@pytest.mark.slow("compiles the solvers of Optimistix")
@cases("Solvers of Optimistix", ("name", "kind", "solver"), HYPERGRADIENTS)
def test_the_hypergradient_at_a_solution_of_optimistix(name, kind, solver):
    linear = {"LeastSquares": bl.Cholesky(), "Stationary": bl.CG(20, tol=1e-10)}.get(kind, bl.LU())
    check_hypergradient(name, kind, OF_OPTIMISTIX[solver](), bl.Implicit(linear), gradient_of(name))


# Ways to differentiate: adjoints through the steps, one step, and linear solvers.


def truncated(name: str, steps: int) -> np.ndarray:
    """Return Σ MᵏB over k < steps, with M = ∂mapping/∂w and B = ∂mapping/∂θ at the solution.

    This is the derivative through the last steps of the iteration w ← mapping(w, θ).
    """
    situation = SITUATIONS[name]
    (w, _), theta = situation.solved, flat(situation.theta)
    by_w = complex_step(lambda w: situation.function(w, theta, np), w)
    by_theta = complex_step(lambda theta: situation.function(w, theta, np), theta)
    return sum(np.linalg.matrix_power(by_w, k) @ by_theta for k in range(steps))


def after_steps(name: str, steps: int) -> np.ndarray:
    """Return the derivative of ``outer`` after ``steps`` steps from the start, where w is not yet the solution."""
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


# User-defined solver functions.


def iterate(mapping: Callable[[Any], Any], init: Any) -> Any:
    return jax.lax.while_loop(lambda state: state[0] < 60, lambda state: (state[0] + 1, mapping(state[1])), (0, init))[
        1
    ]


@pytest.mark.slow("compiles a layer")
@cases("Solver functions", "rate", [1.0, 0.7])
def test_a_loop_of_ones_own_with_a_pytree_and_a_keyword(rate):
    """The solution of w = exp(−θw) has the derivative −w²/(1 + θw)."""

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
    """Newton with the bound w₁ ≥ 0 finds w₁ = √θ, and with w₁ ≤ 0 it finds w₁ = −√θ. The root has w₂ = θ³."""
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


SCALARS = {  # the residual, and dw/dθ at θ = 1 as a function of the root w
    "trivial": (lambda w, theta: theta * (w - 1), lambda w: 0.0),
    "cosine": (lambda w, theta: jnp.cos(theta * w) - w, lambda w: -w * np.sin(w) / (1 + np.sin(w))),
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

SIMPLE = {  # the condition, its function of (w, θ), and its solver
    "root": (bl.Root, lambda w, theta: w**3 + w - 10 * theta, bl.GaussNewton(50, tol=1e-12)),
    "fixed point": (bl.FixedPoint, lambda w, theta: theta + 0 * w, bl.FixedPointIteration(5, tol=1e-12)),
    "least squares": (
        bl.LeastSquares,
        lambda w, theta: (w + theta, 2 * w),
        bl.LevenbergMarquardt(50, tol=1e-12),
    ),
    "minimum": (
        bl.Stationary,
        lambda w, theta: (w - theta**2) ** 2 + theta,
        bl.HessianFree(10, tol=1e-12),
    ),
}
ROOT = 1.5159802276928197  # of w³ + w = 5
# w and dw/dθ at θ = 0.5
SOLUTIONS = {"root": (ROOT, 10 / (3 * ROOT**2 + 1)), "fixed point": (0.5, 1.0), "least squares": (-0.1, -0.2)}
SOLUTIONS["minimum"] = (0.25, 1.0)


def solved_simply(kind: str, theta: Any, init: Any) -> Any:
    """Return the layer's w. The condition's function closes over θ instead of taking it as an argument."""
    declare, function, solver = SIMPLE[kind]
    return bl.implicit_layer(declare(lambda w, _, data: function(w, theta)), solver)(None, init, None)


@pytest.mark.slow("compiles a layer for each condition", fast="root")
@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_a_function_that_closes_over_the_outer_variable(kind):
    w, slope = SOLUTIONS[kind]
    value, pulled = jax.value_and_grad(lambda theta: solved_simply(kind, theta, 0.3))(0.5)
    at_solution = jax.jit(lambda theta: jax.jvp(lambda theta: solved_simply(kind, theta, w), (theta,), (1.0,))[1])(0.5)
    agrees(value, np.array(w))
    agrees(pulled, np.array(slope))
    agrees(at_solution, np.array(slope))


@pytest.mark.slow("compiles a hypergradient for each condition")
@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_a_hypergradient_whose_outer_function_closes_over_a_variable(kind):
    """JAX differentiates the value scale·w² in both variables: θ in the condition, and the scale."""
    declare, function, solver = SIMPLE[kind]

    def value(theta, scale):
        condition = declare(lambda w, _, data: function(w, theta))
        problem = bl.Problem(condition, lambda w, _, data: scale * w**2)
        return bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.LU()))(1.0, 0.3, None).value

    w, slope = SOLUTIONS[kind]
    agrees(jax.grad(value, (0, 1))(0.5, 3.0), np.array([6 * w * slope, w**2]))


@pytest.mark.slow("compiles a layer for each condition", fast="minimum")
@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_the_derivative_in_the_start_is_zero(kind):
    declare, function, solver = SIMPLE[kind]
    layer = bl.implicit_layer(declare(lambda w, theta, data: function(w, theta)), solver)
    with pytest.warns(UserWarning, match="derivative in init is zero"):
        pushed = jax.jvp(lambda theta, init: layer(theta, init, None), (0.5, 0.3), (1.0, 1e6))[1]
    agrees(pushed, np.array(SOLUTIONS[kind][1]))
    with pytest.warns(UserWarning, match="derivative in init is zero"):
        assert float(jax.grad(lambda init: layer(0.5, init, None))(0.3)) == 0.0


@pytest.mark.slow("compiles a layer for each condition")
@cases("Closures, starts, auxiliary outputs", "kind", SIMPLE)
def test_an_auxiliary_output_changes_no_derivative(kind):
    declare, function, solver = SIMPLE[kind]
    seen = {"ones": jnp.ones((2, 3)), "count": 3}
    condition = declare(lambda w, theta, data: (function(w, theta), seen | {"w": w}), has_aux=True)
    w, pulled = jax.value_and_grad(lambda theta: bl.implicit_layer(condition, solver)(theta, 0.3, None))(0.5)
    agrees(pulled, np.array(SOLUTIONS[kind][1]))
    aux = condition.aux(w, 0.5, None)
    assert aux["count"] == 3 and aux["ones"].shape == (2, 3) and float(aux["w"]) == float(w)


# Bounds: a projection in place of the bounds of a solver.


class Point(NamedTuple):
    a: Any
    b: Any


def clip(w: Any, theta: Any, data: Any) -> Any:
    del data
    return jax.tree.map(jnp.clip, w, theta["lower"], theta["upper"])


INF = np.inf
PARABOLOIDS = {  # the centre of a paraboloid, the bounds of a box, the start, and a function from a vector to a tree
    "free": ([0.0, 0.5], [-INF, -INF], [1.0, 1.0], [-1.0, -5.0], np.array),
    "one upper": ([0.0, 0.5], [-INF, -INF], [-1.0, 1.0], [-3.0, -1.0], lambda v: {"a": v[0], "b": v[1]}),
    "one lower": ([0.0, 0.5], [1.0, -INF], [INF, INF], [2.0, 3.0], lambda v: [v[0], v[1]]),
    "both upper": ([0.5, 0.0], [-INF, -INF], [-1.0, -1.0], [-3.0, -1.0], np.array),
    "both lower": ([0.5, 0.0], [1.0, 1.0], [INF, INF], [2.0, 3.0], lambda v: Point(*v)),
    "a start outside": ([0.0, 0.5], [-1.0, -INF], [1.0, -1.0], [9.0, -2.0], lambda v: (v[0], {"b": v[1]})),
    "a start at the minimum": ([0.5, 0.0], [-INF, -1.0], [-1.0, 1.0], [-1.0, 0.0], lambda v: (v[0], v[1])),
    "lower and upper": ([3.0, -3.0], [-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], lambda v: Point(v[0], {"b": v[1]})),
}


@pytest.mark.slow("compiles a projection for each structure", fast="lower and upper")
@cases("Bounds", "name", PARABOLOIDS)
def test_a_paraboloid_in_a_box_is_differentiated_in_its_centre_and_its_bounds(name):
    """Each entry of w equals its active bound, or its centre if no bound is active.

    Its derivative is 1 in the variable that it equals, and 0 in all others.
    """
    center, lower, upper, start, as_tree = PARABOLOIDS[name]
    theta = {"center": as_tree(center), "lower": as_tree(lower), "upper": as_tree(upper)}

    def objective(w, theta, data):
        return 0.5 * sum(jax.tree.leaves(jax.tree.map(lambda w, c: jnp.sum((w - c) ** 2), w, theta["center"])))

    condition = bl.Projected(objective, clip, step_size=0.5)
    layer = bl.implicit_layer(condition, bl.FixedPointIteration(200, tol=1e-12))

    @jax.jit
    def pulled(theta, init):
        w, pull = jax.vjp(lambda theta: layer(theta, init, None), theta)
        return w, pull(jax.tree.map(lambda leaf: 2 + 0 * leaf, w))[0]

    w, gradient = pulled(arrays(theta), arrays(as_tree(start)))
    center, lower, upper = map(np.array, (center, lower, upper))
    agrees(w, np.clip(center, lower, upper))
    below, above = center < lower, center > upper
    for part, expected in (("center", ~below & ~above), ("lower", below), ("upper", above)):
        agrees(gradient[part], 2.0 * expected)


QUADRANTS = {  # for each quadrant, the corners of a box around the minimum of Himmelblau's function, and a start in it
    "first": ((0.0, 0.0), (5.0, 5.0), (4.0, 1.0)),
    "second": ((-8.0, 0.0), (0.0, 8.0), (-3.0, 2.0)),
    "third": ((-5.0, -5.0), (0.0, 0.0), (-3.0, -2.0)),
    "fourth": ((0.0, -5.0), (5.0, 0.0), (4.0, -1.0)),
}
HIMMELBLAU = SITUATIONS["himmelblau"]
IN_A_BOX = bl.implicit_layer(
    bl.Projected(
        lambda w, theta, data: HIMMELBLAU.function(w, theta, jnp),
        lambda w, theta, box: jnp.clip(w, *box),
        step_size=0.01,
    ),
    bl.FixedPointIteration(5000, tol=1e-11),
    bl.LU(),
)
JACOBIAN_IN_A_BOX = jax.jit(
    lambda theta, init, box: (IN_A_BOX(theta, init, box), jax.jacrev(IN_A_BOX)(theta, init, box))
)


@pytest.mark.slow("compiles a layer in a box")
@cases("Bounds", "name", QUADRANTS)
def test_a_box_selects_one_of_four_minima_of_himmelblau(name):
    lower, upper, start = map(np.array, QUADRANTS[name])
    theta = flat(HIMMELBLAU.theta)
    w, slopes = JACOBIAN_IN_A_BOX(jnp.array(theta), jnp.array(start), (jnp.array(lower), jnp.array(upper)))
    w = flat(w)
    assert (lower < w).all() and (w < upper).all()
    # The function is the sum of two squares, which are zero at each minimum: w₁² + w₂ = θ₁ and w₁ + w₂² = θ₂.
    agrees([w[0] ** 2 + w[1], w[0] + w[1] ** 2], theta)
    agrees(slopes, np.linalg.inv([[2 * w[0], 1], [1, 2 * w[1]]]))


@pytest.mark.slow("compiles a layer in a box")
@one_case("Bounds")
def test_a_bound_that_cuts_off_the_minimum_of_himmelblau():
    """At w₁ = 2.5, the other variable is a root of ∂f/∂w₂ = 2(w₁² + w₂ − θ₁) + 4w₂(w₁ + w₂² − θ₂)."""
    theta = flat(HIMMELBLAU.theta)
    box = jnp.array([0.0, 0.0]), jnp.array([2.5, 5.0])
    w, slopes = JACOBIAN_IN_A_BOX(jnp.array(theta), jnp.array([2.0, 2.0]), box)
    a, b = flat(w)
    assert a == 2.5 and abs(2 * (a**2 + b - theta[0]) + 4 * b * (a + b**2 - theta[1])) < 1e-8
    curvature = 2 + 4 * (a + b**2 - theta[1]) + 8 * b**2
    agrees(slopes, np.array([[0, 0], [2 / curvature, 4 * b / curvature]]))


INTERVALS = {  # the sign of (y − θ)², θ, the interval, the solution, and its derivatives in θ and in both ends
    "inside": (1.0, 2.0, (0.0, 3.0), 2.0, (1.0, 0.0, 0.0)),
    "at the lower end": (1.0, -1.0, (0.0, 3.0), 0.0, (0.0, 1.0, 0.0)),
    "at the upper end": (1.0, 4.0, (0.0, 2.0), 2.0, (0.0, 0.0, 1.0)),
    "unbounded below": (-1.0, 2.0, (0.0, 3.0), 0.0, (0.0, 1.0, 0.0)),
}


@jax.jit
def on_interval(variables: Any, sign: Any) -> tuple[jax.Array, Any]:
    condition = bl.Projected(
        lambda y, theta, sign: sign * (y - theta[0]) ** 2, lambda y, theta, sign: jnp.clip(y, theta[1], theta[2]), 0.2
    )
    layer = bl.implicit_layer(condition, bl.FixedPointIteration(200, tol=1e-12))
    return jax.value_and_grad(lambda theta: layer(theta, 1.0, sign))(variables)


@cases("Bounds", "name", INTERVALS)
def test_the_problems_of_golden_search(name):
    sign, theta, ends, expected, slopes = INTERVALS[name]
    w, gradient = on_interval((theta, *ends), sign)
    agrees(w, np.array(expected), atol=1e-10)
    agrees(gradient, np.array(slopes))


# Batches and higher derivatives.


def cubic_root(theta: Any, init: Any = 1.0) -> jax.Array:
    """Return the w with w³ + w = θ."""
    return bl.implicit_layer(bl.Root(lambda w, theta, data: w**3 + w - theta), bl.GaussNewton(50, tol=1e-13))(
        theta, init, None
    )


def real_root(theta: float) -> float:
    return next(root.real for root in np.roots([1, 0, 1, -theta]) if abs(root.imag) < 1e-9)


THETAS = np.array([-3.0, 0.5, 2.0, 10.0])
CUBIC = np.array([real_root(theta) for theta in THETAS])
FIRST = 1 / (3 * CUBIC**2 + 1)
SECOND = -6 * CUBIC * FIRST**3
TRANSFORMED = {
    "vmap of a layer": (lambda: jax.vmap(cubic_root)(THETAS), CUBIC),
    "vmap of grad": (lambda: jax.vmap(jax.grad(cubic_root))(THETAS), FIRST),
    "grad of vmap, jit": (lambda: jax.jit(jax.grad(lambda thetas: jax.vmap(cubic_root)(thetas).sum()))(THETAS), FIRST),
    "vmap of jvp": (lambda: jax.vmap(lambda t: jax.jvp(cubic_root, (t,), (1.0,))[1])(THETAS), FIRST),
    "hessian": (lambda: jax.vmap(jax.hessian(cubic_root))(THETAS), SECOND),
    "grad of grad": (lambda: jax.vmap(jax.grad(jax.grad(cubic_root)))(THETAS), SECOND),
    "grad through scan": (
        lambda: jax.grad(lambda t: jax.lax.scan(lambda w, _: (cubic_root(w), None), t, length=2)[0])(10.0),
        FIRST[3] / (3 * real_root(CUBIC[3]) ** 2 + 1),  # CUBIC[3] is 2
    ),
}


@pytest.mark.slow("compiles each combination of transformations", fast="vmap of grad")
@cases("Batches and higher derivatives", "name", TRANSFORMED)
def test_transformations_of_a_layer(name):
    compute, expected = TRANSFORMED[name]
    agrees(compute(), expected)


@pytest.mark.slow("compiles a batch of layers")
@one_case("Batches and higher derivatives")
def test_a_batch_of_starts_finds_roots_with_their_own_derivatives():
    layer = bl.implicit_layer(bl.Root(lambda w, theta, data: w**2 - theta), bl.GaussNewton(50, tol=1e-13))
    starts = jnp.array([1.0, -1.0, 3.0])
    slopes = jax.vmap(lambda init: jax.grad(layer)(4.0, init, None))(starts)
    agrees(slopes, np.array([0.25, -0.25, 0.25]))


@pytest.mark.slow("compiles a batch of layers")
@one_case("Batches and higher derivatives")
def test_a_batch_of_fits_with_data_of_their_own():
    """The line y = wx, fitted to data (x, y) with the penalty θ, has the slope w = ⟨x, y⟩ / (⟨x, x⟩ + θ)."""
    x = np.arange(1.0, 4.0)
    condition = bl.LeastSquares(lambda w, theta, y: (w * x - y, jnp.sqrt(theta) * w))
    layer = bl.implicit_layer(condition, bl.LevenbergMarquardt(50, tol=1e-12))
    y = np.random.default_rng(0).normal(size=(5, 3))
    slopes, in_data = jax.vmap(jax.grad(layer, (0, 2)), in_axes=(0, None, 0))(THETAS[1:2].repeat(5), 0.0, y)
    agrees(slopes, -y @ x / (x @ x + THETAS[1]) ** 2)
    agrees(in_data, np.tile(x / (x @ x + THETAS[1]), (5, 1)))


@pytest.mark.slow("compiles a layer in both modes")
@one_case("Batches and higher derivatives")
def test_jacobians_in_forward_and_reverse_mode_are_the_dense_matrix():
    situation = SITUATIONS["linear slope"]
    layer = bl.implicit_layer(situation.condition(), ITERATION)
    at = arrays(situation.theta), arrays(situation.start), None
    for jacobian in (jax.jacfwd, jax.jacrev):
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, 16), jax.jit(jacobian(layer))(*at))
        agrees(rows, situation.solved[1])


@pytest.mark.slow("compiles a hypergradient")
@one_case("Batches and higher derivatives")
def test_a_call_with_other_values_traces_nothing():
    traces = []

    def objective(w, theta, data):
        traces.append(None)
        return (w - theta) ** 2

    problem = bl.Problem(bl.Stationary(objective), lambda w, theta, data: w**2)
    hypergradient = bl.value_and_hypergradient(problem, bl.HessianFree(5, tol=1e-12), bl.Implicit(bl.CG(2)))
    agrees(hypergradient(2.0, 0.0, None).gradient, np.array(4.0))
    count = len(traces)
    agrees(hypergradient(3.0, 1.0, None).gradient, np.array(6.0))
    assert count == len(traces)


# Precision, structures of w and θ, and failures.


@pytest.mark.slow("compiles a layer in float32 for each condition", fast="quadratic")
@cases("Precision and structures", "name", ["cosine", "rosenbrock", "quadratic"])
def test_single_precision_stays_single(name):
    situation = SITUATIONS[name]
    solver = {"mapping": bl.FixedPointIteration(100), "residuals": bl.LevenbergMarquardt(50)}
    layer = bl.implicit_layer(situation.condition(), solver.get(situation.kind, bl.HessianFree(20)))
    theta, init = arrays(situation.theta, np.float32), arrays(situation.start, np.float32)
    w, gradient = jax.value_and_grad(lambda theta: outer32(layer(theta, init, None)))(theta)
    assert w.dtype == np.float32 and all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(gradient))
    agrees(gradient, np.ones(situation.solved[0].size) @ situation.solved[1], rtol=1e-4)


def outer32(w: Any) -> jax.Array:
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(w))


@pytest.mark.slow("compiles a layer")
@one_case("Precision and structures")
def test_leaves_of_two_dtypes():
    """The float32 leaf keeps its dtype next to a float64 leaf, with θ in float64."""

    def mapping(w, theta, data):
        return {"a": (0.5 * jnp.cos(theta)).astype(jnp.float32) + 0 * w["a"], "b": 0.5 * w["b"] + theta}

    layer = bl.implicit_layer(bl.FixedPoint(mapping), bl.FixedPointIteration(100))
    init = {"a": jnp.zeros((), jnp.float32), "b": jnp.zeros(())}
    w, pushed = jax.jvp(lambda theta: layer(theta, init, None), (0.3,), (1.0,))
    assert w["a"].dtype == pushed["a"].dtype == np.float32 and w["b"].dtype == np.float64
    agrees(pushed["a"], np.array(-0.5 * np.sin(0.3)))
    agrees(pushed["b"], np.array(2.0))


@pytest.mark.slow("compiles a hypergradient")
@one_case("Precision and structures")
def test_without_an_outer_variable_the_gradient_is_empty():
    problem = bl.Problem(bl.Stationary(lambda w, theta, data: w**2 - 1), lambda w, theta, data: w - 3)
    out = bl.value_and_hypergradient(problem, bl.HessianFree(5, tol=1e-12), bl.Implicit(bl.CG(2)))(None, 1.0, None)
    assert float(out.value) == -3.0 and out.gradient is None


@pytest.mark.slow("compiles a layer")
@one_case("Precision and structures")
def test_an_integer_among_the_outer_variables_is_a_constant():
    theta = {"factor": jnp.array(8.0), "power": jnp.array(3), "name": None}
    layer = bl.implicit_layer(bl.Root(lambda w, theta, data: w**3 - theta["factor"]), bl.GaussNewton(50, tol=1e-12))
    gradient = jax.grad(lambda theta: layer(theta, 1.0, None), allow_int=True)(theta)
    agrees(gradient["factor"], np.array(1 / 12))
    assert gradient["power"].dtype == jax.dtypes.float0 and gradient["name"] is None


@jax.custom_vjp
def square(w: jax.Array) -> jax.Array:
    """Return w², with a derivative in reverse mode only."""
    return w**2


square.defvjp(lambda w: (w**2, w), lambda w, cotangent: (2 * w * cotangent,))


@pytest.mark.slow("compiles a layer")
@one_case("Precision and structures")
def test_an_objective_with_a_reverse_mode_of_its_own():
    layer = bl.implicit_layer(
        bl.Stationary(lambda w, theta, data: (square(w) - theta) ** 2), bl.HessianFree(40, tol=1e-12)
    )
    agrees(jax.grad(layer)(2.0, 1.0, None), np.array(0.5 / 2**0.5))


def fails(condition: Any, solver: Any, init: Any) -> Callable[[], Any]:
    return lambda: jax.grad(bl.implicit_layer(condition, solver))(0.5, init, None)


FAILURES = {
    "a start that is not finite": (
        fails(bl.Stationary(lambda w, theta, data: (w - theta) ** 2), bl.HessianFree(9, tol=1e-9), float("nan")),
        "NONFINITE",
    ),
    "a residual without a root": (
        fails(bl.Root(lambda w, theta, data: w**2 + theta), bl.LevenbergMarquardt(50, tol=1e-9), 0.7),
        "MAX_STEPS",
    ),
    "a minimum without curvature": (
        fails(bl.Stationary(lambda w, theta, data: theta * w**4), bl.HessianFree(9), 0.0),
        "linear solve in the derivative of a layer, (NEGATIVE_CURVATURE|SINGULAR)",
    ),
    "too few steps": (
        fails(bl.Root(lambda w, theta, data: jnp.exp(w) - theta), bl.GaussNewton(1, tol=1e-9), 3.0),
        "MAX_STEPS",
    ),
}


@pytest.mark.slow("compiles a layer for each failure", fast="too few steps")
@cases("Failures", "name", FAILURES)
def test_a_failed_solve_gives_no_derivative(name):
    compute, status = FAILURES[name]
    with pytest.raises(bl.HypergradientError, match=status):
        compute()


# The functions of REFUSALS: calls that this library refuses, and other ways to the same derivatives.


def of_bisection() -> Any:
    """Return d/dθ of the root of cos(θw) = w at θ = 1, by jaxopt's bisection."""
    bisection = bl.Jaxopt("Bisection", lower=0.0, upper=2.0, maxiter=60, tol=1e-12)
    layer = bl.implicit_layer(bl.Root(lambda w, theta, data: jnp.cos(theta * w) - w), bisection)
    return jax.grad(layer)(1.0, 0.5, None)


def complex_layer(theta: Any, init: Any) -> Any:
    return bl.implicit_layer(bl.Root(lambda w, theta, data: w**2 - theta), bl.GaussNewton(50, tol=1e-12))(
        theta, init, None
    )


def of_two_parts() -> Any:
    """Return the derivative of the root of w² = θ at θ = 3 + 4i in the direction 1."""

    def residual(w, theta, data):
        value = jax.lax.complex(*w) ** 2 - jax.lax.complex(*theta)
        return jnp.real(value), jnp.imag(value)

    layer = bl.implicit_layer(bl.Root(residual), bl.GaussNewton(50, tol=1e-12))
    return jax.jvp(lambda theta: layer(theta, (1.5, 0.8), None), ((3.0, 4.0),), ((1.0, 0.0),))[1]


def forward_only(w: Any) -> Any:
    """Return w + w/2 + w/4, by a loop that JAX differentiates in forward mode alone."""
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, 0.5 * s[1] + w), (0, w))[1]


def of_a_forward_loop() -> Any:
    """Return dw/dθ for the minimiser w of (1.75w − θ)².

    The objective's gradient is computed in forward mode, and w is differentiated through the steps of the solver.
    """
    gradient = jax.jacfwd(lambda w, theta, data: (forward_only(w) - theta) ** 2)
    problem = bl.Problem(bl.Root(gradient, symmetric=True), lambda w, theta, data: w)
    hypergradient = bl.value_and_hypergradient(problem, bl.GaussNewton(9, tol=1e-12), bl.ForwardUnrolled())
    return hypergradient(2.0, 0.0, None).gradient


COSINE = float(MAPPINGS["cosine"].solved[0][0])
REFUSALS = {  # pytest marks, what is refused, the error, the way around, and its result
    "Bisection": (
        needs_optimistix,
        lambda: optimistix("Bisection"),
        (ValueError, "needs bounds of w"),
        of_bisection,
        -COSINE * np.sin(COSINE) / (1 + np.sin(COSINE)),
    ),
    "GoldenSearch": (
        needs_optimistix,
        lambda: optimistix("GoldenSearch"),
        (ValueError, "needs bounds of w"),
        lambda: on_interval((2.0, 0.0, 3.0), 1.0)[1],
        (1.0, 0.0, 0.0),
    ),
    "complex variables": (
        (),
        lambda: complex_layer(3 + 4j, 1.5 + 0.8j),
        (TypeError, "split the variable into its real and imaginary"),
        of_two_parts,
        (0.2, -0.1),  # 1/(2w) at w = 2 + i
    ),
    "functions without reverse mode": (
        (),
        lambda: bl.implicit_layer(
            bl.Stationary(lambda w, theta, data: (forward_only(w) - theta) ** 2), bl.HessianFree(9)
        )(2.0, 0.0, None),
        (ValueError, "Reverse-mode differentiation does not work"),
        of_a_forward_loop,
        1 / 1.75,
    ),
}


@pytest.mark.slow("compiles the way around each refusal")
@cases("Refusals", "name", [pytest.param(name, marks=REFUSALS[name][0]) for name in REFUSALS])
def test_what_is_refused_and_the_way_around(name):
    _, refused, (error, message), way_around, expected = REFUSALS[name]
    with pytest.raises(error, match=message):
        refused()
    agrees(way_around(), np.array(expected))
    assert name.split()[0] in PAGE.read_text().partition("not accepted")[2]


def test_the_page_counts_the_cases_of_this_file():
    rows = re.findall(r"^\| ([\w ,]+?) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert {family: int(count) for family, count in rows} == dict(CASES)
    assert sum(CASES.values()) >= 90
