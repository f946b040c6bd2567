"""The situations in which jaxopt's tests take derivatives, with this library and references in NumPy.

Each :class:`Situation` is a small problem, in a family that is named after the test files of jaxopt that contain such
problems. Its solution is compared with a reference that shares no code with either library, and its Jacobian with
central differences of this reference.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jaxopt.base import LinearOperator
from numpy_solvers import differences, lasso, program, root

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

RANDOM = np.random.default_rng(0)
X = np.linalg.qr(RANDOM.normal(size=(6, 3)))[0] * [1.0, 1.3, 1.6]  # XᵀX has the condition number 2.6
Y = RANDOM.normal(size=6)
GRAM, MOMENT = X.T @ X, X.T @ Y
LABELS, CLASSES = np.array([0, 1, 1, 0, 1, 0]), np.array([0, 2, 1, 0, 1, 2])
SIGNS, ONE_HOT = 2.0 * LABELS - 1, np.eye(3)[CLASSES]
RATE = float(1 / np.linalg.norm(GRAM, 2))


class Situation(NamedTuple):
    """A function of arrays with a solver inside, and the same function in NumPy."""

    family: str
    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple
    mode: str
    """``"reverse"`` or ``"forward"`` differentiation, both compiled; or ``"eager"``, reverse mode without ``jit``."""
    tolerance: float
    """The relative and absolute tolerance. Differences with a step of 1e-5 have errors below 1e-9 for values near 1."""


SITUATIONS: list[Situation] = []


def family(name):
    """Return the function that adds a situation to a family."""

    def add(case, ours, reference, *arguments, mode="reverse", tolerance=1e-7):
        SITUATIONS.append(Situation(name, case, ours, reference, arguments, mode, tolerance))

    return add


def solution(condition, init, solver, linear=None, data=None):
    """Return the inner solution as a function of the parts of θ. The condition receives them as a tuple."""
    layer = bl.implicit_layer(condition, solver, linear)
    return lambda *theta: layer(theta, jax.tree.map(jnp.asarray, init), data)


def value(condition, outer, init, solver, method):
    """Return the outer value as a function of the parts of θ. JAX differentiates it by ``method``."""
    hypergradient = bl.value_and_hypergradient(bl.Problem(condition, outer), solver, method)
    return lambda *theta: hypergradient(theta, jax.tree.map(jnp.asarray, init), None).value


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(tree)])


@functools.partial(jax.jit, static_argnums=(0, 2))
def compiled_value_and_jacobian(function, arguments, mode):
    return value_and_jacobian(function, arguments, mode)


def value_and_jacobian(function, arguments, mode):
    x, unravel = ravel_pytree(arguments)

    def of_flat(x):
        return ravel_pytree(function(*unravel(x)))[0]

    if mode == "forward":
        found, push_forward = jax.linearize(of_flat, x)
        return found, jax.vmap(push_forward, out_axes=1)(jnp.eye(x.size))
    found, pull_back = jax.vjp(of_flat, x)
    if mode == "eager":
        return found, jnp.stack([pull_back(unit)[0] for unit in jnp.eye(found.size)])
    return found, jax.vmap(pull_back)(jnp.eye(found.size))[0]


# User-defined solver functions: ridge regression by its normal equations, and an equation of one unknown.


def ridge(w, strength, x, y):
    return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.sum(strength * w**2)


def normal_equations(init, strength, x, y):
    return jnp.linalg.solve(x.T @ x + strength * jnp.eye(3), x.T @ y)


def ridge_by_numpy(strength, x=X, y=Y):
    return np.linalg.solve(x.T @ x + strength * np.eye(3), x.T @ y)


def ridge_with_options(init, strength, kind, power=2):
    assert (kind, power) == ("ridge", 2)
    return normal_equations(init, strength**power, X, Y)


def sum_to_one(init, problem):
    """Return the w with Σᵢ weightᵢ·exp(−rateᵢ·w) = 1. The residual below writes this 1 as ``count``/2, with count 2."""
    excess = lambda w: jnp.sum(problem["weight"] * jnp.exp(-problem["rate"] * w)) - 1  # noqa: E731
    w = jax.lax.fori_loop(0, 30, lambda _, w: w - excess(w) / jax.grad(excess)(w), init["w"])
    return {"w": w}


def sum_to_one_residual(w, problem):
    return {"w": jnp.sum(problem["weight"] * jnp.exp(-problem["rate"] * w["w"])) - problem["count"] / 2}


def ridge_with_captured_strength(strength):
    residual = lambda w, x: slope(w, strength, x, jnp.asarray(Y))  # noqa: E731
    solver = bl.custom_root(residual)(lambda init, x: normal_equations(init, strength, x, jnp.asarray(Y)))
    return solver(None, jnp.asarray(X))


STRENGTH, STRENGTHS = np.array(0.7), np.array([0.1, 1.0, 5.0])
slope = jax.grad(ridge)
ridge_root = bl.custom_root(slope)(normal_equations)
ridge_by_keywords = bl.custom_root(slope)(lambda init, **given: normal_equations(init, **given))
ridge_by_host = bl.custom_root(slope, callback=True)(lambda init, *theta: ridge_by_numpy(*theta))


def of_strength(solver):
    return lambda strength: solver(None, strength, jnp.asarray(X), jnp.asarray(Y))


add = family("implicit_diff")
add("reverse mode", of_strength(ridge_root), ridge_by_numpy, STRENGTH)
add("forward mode", of_strength(ridge_root), ridge_by_numpy, STRENGTH, mode="forward")
add("without jit", of_strength(ridge_root), ridge_by_numpy, STRENGTH, mode="eager")
add("all arguments", lambda *theta: ridge_root(None, *theta), ridge_by_numpy, STRENGTH, X, Y)
add(
    "aux with a name and an integer array",
    of_strength(
        lambda *given: bl.custom_root(slope, has_aux=True)(
            lambda *given: (normal_equations(*given), {"name": "ridge", "order": jnp.arange(3)})
        )(*given)[0]
    ),
    ridge_by_numpy,
    STRENGTH,
)
add(
    "fixed point of a step of gradient descent",
    of_strength(bl.custom_fixed_point(lambda w, *theta: w - slope(w, *theta))(normal_equations)),
    ridge_by_numpy,
    STRENGTH,
)
add("keywords", lambda a: ridge_by_keywords(None, strength=a, x=X, y=Y), ridge_by_numpy, STRENGTH)
add("keywords in another order", lambda a: ridge_by_keywords(None, y=Y, x=X, strength=a), ridge_by_numpy, STRENGTH)
add("keywords for positional arguments", lambda a: ridge_root(None, y=Y, strength=a, x=X), ridge_by_numpy, STRENGTH)
add(
    "a string, and an integer by default",
    lambda a: bl.custom_root(lambda w, a, kind, power: slope(w, a**power, X, Y))(ridge_with_options)(None, a, "ridge"),
    lambda a: ridge_by_numpy(a**2),
    STRENGTH,
)
add("vmap over strengths", jax.vmap(of_strength(ridge_root)), lambda a: [ridge_by_numpy(b) for b in a], STRENGTHS)
add("one strength for each feature", of_strength(ridge_root), ridge_by_numpy, STRENGTHS)
add("a captured strength", ridge_with_captured_strength, ridge_by_numpy, STRENGTH)
add("a solver of NumPy under jit", lambda a: ridge_by_host(jnp.zeros(3), a, X, Y), ridge_by_numpy, STRENGTH)
add(
    "a solver of NumPy under vmap",
    jax.vmap(lambda a: ridge_by_host(jnp.zeros(3), a, X, Y)),
    lambda a: [ridge_by_numpy(b) for b in a],
    STRENGTHS,
    mode="forward",
)
add(
    "a linear solver of jaxopt",
    of_strength(
        bl.custom_root(slope, linear=functools.partial(jaxopt.linear_solve.solve_gmres, tol=1e-12))(normal_equations)
    ),
    ridge_by_numpy,
    STRENGTH,
)
add(
    "second derivative in the strength",
    jax.hessian(lambda a: jnp.sum(of_strength(ridge_root)(a))),
    lambda a: 2 * np.sum(np.linalg.matrix_power(np.linalg.inv(GRAM + a * np.eye(3)), 3) @ MOMENT),
    STRENGTH,
)
add(
    "a tree of arguments with an integer",
    lambda weight, rate: bl.custom_root(sum_to_one_residual)(sum_to_one)(
        {"w": jnp.zeros(())}, {"weight": weight, "rate": rate, "count": 2}
    ),
    lambda weight, rate: root(lambda w: np.sum(weight * np.exp(-rate * w), keepdims=True) - 1, [0.0]),
    np.array([1.0, 2.0]),
    np.array([0.5, 1.5]),
)

# Fixed points.


def cosine(w, theta, data):
    return jnp.cos(w) + theta[0]


def cosine_by_numpy(theta):
    return root(lambda w: w - np.cos(w) - theta, np.ones(len(theta)))


def affine(w, theta, data):
    return theta[0] @ w + theta[1]


def affine_by_numpy(matrix, offset):
    return np.linalg.solve(np.eye(3) - matrix, offset)


def turn(w, theta, data):
    """Rotate w about the centre θ₁ by the angle θ₀."""
    angle, centre = theta
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    return rotation @ (w - centre) + centre


def nested(w, theta, data):
    """A mapping of a nested tree, in which b depends on a, and c depends on b."""
    a, (b, c) = w
    return 0.3 * jnp.sin(a) + theta["a"], (0.2 * jnp.tanh(jnp.sum(a)) * b + theta["b"], 0.5 * c * jnp.cos(b[0]) + 1)


def nested_by_numpy(theta):
    def mapping(w):
        a, b, c = w[:2], w[2:4], w[4:]
        return np.concatenate(
            [0.3 * np.sin(a) + theta["a"], 0.2 * np.tanh(np.sum(a)) * b + theta["b"], 0.5 * c * np.cos(b[0]) + 1]
        )

    found = root(lambda w: w - mapping(w), np.zeros(5))
    return found[:2], (found[2:4], found[4:])


ANGLES = np.array([-0.4, 0.3])
CONTRACTION = 0.5 * np.linalg.qr(RANDOM.normal(size=(3, 3)))[0]
OFFSET = np.array([0.4, -1.0, 2.0])
ITERATE, ANDERSON = bl.FixedPointIteration(500, tol=1e-13), bl.Anderson(100, tol=1e-12)
FIXED_POINT_SOLVERS = {
    "FixedPointIteration": ITERATE,
    "jaxopt's FixedPointIteration": bl.Jaxopt("FixedPointIteration", maxiter=500, tol=1e-13),
}
add = family("fixed_point_iteration, anderson")
for name, solver in FIXED_POINT_SOLVERS.items():
    add(f"cosine by {name}", solution(bl.FixedPoint(cosine), np.ones(2), solver), cosine_by_numpy, ANGLES)
add("affine mapping", solution(bl.FixedPoint(affine), np.zeros(3), ITERATE), affine_by_numpy, CONTRACTION, OFFSET)
for name, solver in (
    ("FixedPointIteration", bl.FixedPointIteration(120)),
    ("Anderson", bl.Anderson(10, history=2)),
):
    outer = lambda w, theta, data: jnp.sum(w * theta[0])  # noqa: E731
    unrolled = value(bl.FixedPoint(cosine), outer, np.ones(2), solver, bl.Unrolled())
    add(f"cosine by unrolled {name}", unrolled, lambda t: np.sum(cosine_by_numpy(t) * t), ANGLES)
for steps in (1, 4):
    add(
        f"{steps} unrolled steps that do not converge",
        value(
            bl.FixedPoint(lambda w, theta, data: theta[0] * w + theta[1]),
            lambda w, theta, data: w,
            1.0,
            bl.FixedPointIteration(steps),
            bl.Unrolled(),
        ),
        lambda rate, offset, steps=steps: rate**steps + offset * sum(rate**k for k in range(steps)),
        np.array(0.6),
        np.array(1.5),
    )
add(
    "a fixed point that does not depend on θ",
    solution(bl.FixedPoint(lambda w, theta, data: theta[0] * w), np.array([1.0, -0.5]), ITERATE),
    lambda theta: np.zeros(2),
    np.array([0.05, 0.2]),
)
add(
    "slow geometric decay",
    solution(bl.FixedPoint(lambda w, theta, data: theta[0] * w + theta[1]), np.zeros(3), ANDERSON),
    lambda rate, offset: offset / (1 - rate),
    np.array([0.9, 0.95, 0.98]),
    np.array([0.1, 0.04, -0.02]),
    # At rate 0.98, the third derivative of 1/(1 − rate) is 4e7. The error of differences is step²/6 = 2e-11 times it.
    tolerance=1e-5,
)
add(
    "a rotation, which does not contract",
    solution(bl.FixedPoint(turn), np.zeros(2), bl.Anderson(20, tol=1e-12)),
    lambda angle, centre: centre,
    np.array(2.0),
    np.array([1.0, -2.0]),
)
TREE = {"a": np.array([0.3, -0.8]), "b": np.array([1.0, 0.4])}
start = (np.zeros(2), (np.zeros(2), np.zeros(1)))
found = solution(bl.FixedPoint(lambda w, theta, data: nested(w, theta[0], data)), start, ITERATE)
add("a nested tree, forward mode", found, nested_by_numpy, TREE, mode="forward")
add(
    "a scalar",
    solution(bl.FixedPoint(lambda w, theta, data: 0.5 * w + theta[0] ** 2), 0.0, ANDERSON),
    lambda theta: 2 * theta**2,
    np.array(0.5),
)
add(
    "aux",
    solution(
        bl.FixedPoint(lambda w, theta, data: (cosine(w, theta, data), {"aux": 10 * w}), has_aux=True),
        np.ones(2),
        ITERATE,
    ),
    cosine_by_numpy,
    ANGLES,
)
add(
    "a start that depends on θ",
    lambda theta: bl.implicit_layer(bl.FixedPoint(cosine), ITERATE)((theta,), start=lambda theta, data: theta[0] ** 2),
    cosine_by_numpy,
    ANGLES,
)
add(
    "vmap over matrices",
    jax.vmap(solution(bl.FixedPoint(affine), np.zeros(3), ITERATE)),
    lambda matrices, offsets: [affine_by_numpy(*pair) for pair in zip(matrices, offsets, strict=True)],
    np.stack([CONTRACTION, -CONTRACTION]),
    np.stack([OFFSET, OFFSET[::-1]]),
)
add(
    "Anderson mixing every third step",
    solution(
        bl.FixedPoint(affine),
        np.zeros(3),
        bl.Jaxopt("AndersonAcceleration", maxiter=200, tol=1e-12, ridge=1e-12, mixing_frequency=3),
    ),
    affine_by_numpy,
    CONTRACTION,
    OFFSET,
)

# Systems of equations.


def circle_and_line(w, theta, data):
    return jnp.stack([w[0] ** 2 + w[1] ** 2 - theta[0], w[0] - theta[1] * w[1]])


def meeting_point(square, slope):
    height = np.sqrt(square / (1 + slope**2))
    return np.array([slope * height, height])


def simplex_excess(w, theta, data):
    """Return Σᵢ max(xᵢ − w, 0) − s with θ = (x, s). Its root w is the threshold of the projection onto the simplex."""
    return jnp.sum(jnp.maximum(theta[0] - w, 0)) - theta[1]


def in_two_parts(x):
    return {"a": x[:1], "b": x[1:]}


def simplex_by_numpy(x, total=1.0):
    return program(np.eye(len(x)), -x, np.ones((1, len(x))), np.ravel(total), -np.eye(len(x)), np.zeros(len(x)))[0]


def simplex_threshold(x, total):
    point = simplex_by_numpy(x, total)
    return (x - point)[point > 1e-9].mean()


POINT = np.array([0.53, -0.3, 1.1, 0.72])
BISECTION = bl.Jaxopt("Bisection", lower=-5.0, upper=5.0, maxiter=60, tol=1e-14)
bisected = solution(bl.Root(simplex_excess), 0.0, BISECTION)
add = family("broyden, bisection, scipy_wrappers")
for name, solver, mode in (
    ("Broyden", bl.Jaxopt("Broyden", maxiter=100, tol=1e-12), "reverse"),
    ("SciPy in a callback", bl.Jaxopt("ScipyRootFinding", tol=1e-12), "eager"),
):
    found = solution(bl.Root(circle_and_line), np.array([1.0, 0.8]), solver)
    if mode == "eager":  # JAX cannot trace ScipyRootFinding: replace it by a callback to the SciPy function it wraps
        decorated = bl.custom_root(lambda w, *theta: circle_and_line(w, theta, None), callback=True)(
            lambda init, square, slope: (
                scipy.optimize.root(lambda w: np.array([w @ w - square, w[0] - slope * w[1]]), init, tol=1e-13).x
            )
        )
        found = lambda *theta, decorated=decorated: decorated(jnp.array([1.0, 0.8]), *theta)  # noqa: E731
    add(f"a circle and a line by {name}", found, meeting_point, np.array(2.0), np.array(0.5), mode=mode)
add(
    "the projection by a threshold",
    lambda x, total: jnp.maximum(x - bisected(x, total), 0),
    simplex_by_numpy,
    POINT,
    np.array(1.0),
)
add(
    "the value inside of a value_and_grad",
    lambda x: jax.value_and_grad(lambda x: bisected(x, jnp.array(1.0)))(x)[0],
    lambda x: simplex_threshold(x, 1.0),
    POINT,
)
add(
    "a cube root whose first midpoint is the solution",
    solution(bl.Root(lambda w, theta, data: w**3 - theta[0]), 0.0, bl.Jaxopt("Bisection", lower=0.0, upper=4.0)),
    np.cbrt,
    np.array(8.0),
)
add(
    "an equation of a tree, linear in w",
    solution(
        bl.Root(lambda w, theta, data: in_two_parts(theta[0] @ jnp.concatenate([w["a"], w["b"]]) - theta[1])),
        {"a": np.zeros(1), "b": np.zeros(2)},
        lambda condition, init, theta, data: in_two_parts(jnp.linalg.solve(*theta)),
    ),
    lambda *system: in_two_parts(np.linalg.solve(*system)),
    np.eye(3) + CONTRACTION,
    OFFSET,
)

# Smooth objectives: logistic regressions with integer labels, differentiated in the penalty and in the data.


def log_loss(w, theta, data):
    """Binary logistic regression with the penalty θ₀/2·‖w‖² on the samples X."""
    return jnp.sum(jax.nn.softplus(-SIGNS * (X @ w))) + 0.5 * theta[0] * jnp.sum(w**2)


def log_loss_by_numpy(strength, x=X, weights=1.0):
    return root(lambda w: x.T @ (weights * (1 / (1 + np.exp(-x @ w)) - LABELS)) + strength * w, np.zeros(3))


def multiclass(w, theta, data):
    return jnp.sum(jax.nn.logsumexp(X @ w, 1) - (X @ w)[np.arange(6), CLASSES]) + 0.5 * theta[0] * jnp.sum(w**2)


def multiclass_by_numpy(strength):
    def gradient(w):
        power = np.exp(X @ w.reshape(3, 3))
        return (X.T @ (power / power.sum(1, keepdims=True) - ONE_HOT)).ravel() + strength * w

    return root(gradient, np.zeros(9)).reshape(3, 3)


def with_intercept(w, theta, data):
    """Multiclass logistic regression with the penalty θ₀ on W. A constant penalty on b makes the intercept unique."""
    scores = X @ w["W"] + w["b"]
    loss = jnp.sum(jax.nn.logsumexp(scores, 1) - scores[np.arange(6), CLASSES])
    return loss + 0.5 * theta[0] * jnp.sum(w["W"] ** 2) + 0.05 * jnp.sum(w["b"] ** 2)


def with_intercept_by_numpy(strength):
    def gradient(w):
        matrix, offset = w[:9].reshape(3, 3), w[9:]
        power = np.exp(X @ matrix + offset)
        error = power / power.sum(1, keepdims=True) - ONE_HOT
        return np.concatenate([(X.T @ error).ravel() + strength * w[:9], error.sum(0) + 0.1 * offset])

    found = root(gradient, np.zeros(12))
    return {"W": found[:9].reshape(3, 3), "b": found[9:]}


def log_loss_of_data(w, theta, data):
    strength, x, weights = theta
    return jnp.sum(weights * (jax.nn.softplus(x @ w) - data * (x @ w))) + 0.5 * strength * jnp.sum(w**2)


def likelihood(w, theta, data):
    """The negative log-likelihood of a logit model with the scale exp(w["scale"]), and a penalty on w."""
    scores = (X @ w["slope"]) * jnp.exp(w["scale"])
    penalty = 0.5 * theta[0] * (jnp.sum(w["slope"] ** 2) + (w["scale"] - 0.3) ** 2)
    return jnp.sum(jnp.logaddexp(0.0, -SIGNS * scores)) + penalty


def likelihood_by_numpy(strength):
    def gradient(w):
        w, scale = w[:3], np.exp(w[3])
        slope = -SIGNS / (1 + np.exp(SIGNS * (X @ w) * scale))
        return np.append(X.T @ slope * scale + strength * w, slope @ X @ w * scale + strength * (np.log(scale) - 0.3))

    found = root(gradient, np.zeros(4))
    return {"scale": found[3], "slope": found[:3]}


PENALTY, WEIGHTS = np.array(0.8), np.array([1.0, 2.0, 0.5, 1.5, 0.2, 1.0])
NEWTON = bl.HessianFree(30, cg_steps=12, tol=1e-11)
LBFGS = bl.Jaxopt("LBFGS", maxiter=200, tol=1e-10)
STATIONARY = bl.Stationary(log_loss)
DESCENT = bl.GradientDescent(0.2, 400, tol=1e-12)
add = family("gradient_descent, lbfgs, armijo_sgd, polyak_sgd, optax_wrapper")
for name, solver, mode in (
    ("GradientDescent", DESCENT, "reverse"),
    ("HessianFree", NEWTON, "reverse"),
    ("Optax", bl.Optax(optax.sgd(0.2), 400, tol=1e-12), "reverse"),
    ("jaxopt's LBFGS", LBFGS, "forward"),
    ("jaxopt's ArmijoSGD", bl.Jaxopt("ArmijoSGD", maxiter=1000, tol=1e-10), "reverse"),
    ("jaxopt's PolyakSGD", bl.Jaxopt("PolyakSGD", maxiter=2000, tol=1e-9, max_stepsize=0.2), "reverse"),
    ("jaxopt's OptaxSolver", bl.Jaxopt("OptaxSolver", opt=optax.sgd(0.2), maxiter=400, tol=1e-12), "reverse"),
):
    found = solution(STATIONARY, np.zeros(3), solver)
    add(f"logistic regression by {name}", found, log_loss_by_numpy, PENALTY, mode=mode)
for name, solver in (
    ("GradientDescent", bl.GradientDescent(0.2, 120)),
    ("Optax", bl.Optax(optax.sgd(0.2), 120)),
):
    add(
        f"logistic regression by unrolled {name}",
        value(STATIONARY, lambda w, theta, data: theta[0] * jnp.sum(w**3), np.zeros(3), solver, bl.Unrolled()),
        lambda a: a * np.sum(log_loss_by_numpy(a) ** 3),
        PENALTY,
    )
add(
    "two unrolled steps that do not converge",
    value(
        bl.Stationary(lambda w, theta, data: 0.5 * theta[0] * w**2 - theta[1] * w),
        lambda w, theta, data: w,
        0.3,
        bl.GradientDescent(0.25, 2),
        bl.Unrolled(),
    ),
    lambda a, b: (1 - a / 4) * ((1 - a / 4) * 0.3 + b / 4) + b / 4,
    np.array(1.3),
    np.array(0.6),
)
add(
    "multiclass logistic regression",
    solution(bl.Stationary(multiclass), np.zeros((3, 3)), DESCENT),
    multiclass_by_numpy,
    PENALTY,
)
start = {"W": np.zeros((3, 3)), "b": np.zeros(3)}
found = solution(bl.Stationary(with_intercept), start, bl.GradientDescent(0.2, 3000, tol=1e-12))
add("a tree with an intercept", found, with_intercept_by_numpy, PENALTY, mode="forward")
labelled = bl.implicit_layer(bl.Stationary(log_loss_of_data), DESCENT)
add(
    "penalty, samples and sample weights",
    lambda *t: labelled(t, jnp.zeros(3), jnp.asarray(LABELS, float)),
    log_loss_by_numpy,
    PENALTY,
    X,
    WEIGHTS,
)
decorated = bl.custom_root(lambda w, **given: jax.grad(log_loss)(w, (given["strength"],), None), tol=1e-8)(
    lambda init, **given: bl.solve(DESCENT, STATIONARY, init, (given["strength"],), None).w
)
add("keywords, in a custom_root", lambda a: decorated(jnp.zeros(3), strength=a), log_loss_by_numpy, PENALTY)
add(
    "vmap over penalties",
    jax.vmap(solution(STATIONARY, np.zeros(3), DESCENT)),
    lambda a: [log_loss_by_numpy(b) for b in a],
    STRENGTHS + 0.3,
)
add(
    "a likelihood with a scale",
    solution(
        bl.Stationary(likelihood),
        {"scale": np.zeros(()), "slope": np.zeros(3)},
        bl.GradientDescent(0.2, 2000, tol=1e-12),
    ),
    likelihood_by_numpy,
    PENALTY,
)
minimiser = bl.custom_root(lambda w, a: jax.grad(log_loss)(w, (a,), None), callback=True)(
    lambda init, a: (
        scipy.optimize.minimize(
            lambda w: (
                np.sum(np.logaddexp(0, -SIGNS * (X @ w))) + 0.5 * a * w @ w,
                -X.T @ (SIGNS / (1 + np.exp(SIGNS * (X @ w)))) + a * w,
            ),
            init,
            jac=True,
            tol=1e-12,
        ).x
    )
)
add("a minimiser of SciPy", lambda a: minimiser(jnp.zeros(3), a), log_loss_by_numpy, PENALTY, tolerance=1e-6)


# Least squares.

# The data are those of the example in Wikipedia's article on the Gauss–Newton algorithm.
SUBSTRATE = np.array([0.038, 0.194, 0.425, 0.626, 1.253, 2.5, 3.74])
RATES = np.array([0.05, 0.127, 0.094, 0.2122, 0.2729, 0.2665, 0.3317])
TIMES = np.linspace(0.0, 2.0, 7)
WAVE = 1.5 * np.sin(2.5 * TIMES + 0.4) + 0.3 + 0.05 * np.cos(9 * TIMES)
DECAY = 2 * np.exp(-0.5 * TIMES) + np.exp(-3 * TIMES) + 0.02 * np.sin(5 * TIMES)


def reaction(w, theta, data):
    substrate, rates = theta
    return rates - w[0] * substrate / (w[1] + substrate)


def reaction_by_numpy(substrate, rates):
    def gradient(w):
        fraction = substrate / (w[1] + substrate)
        error = rates - w[0] * fraction
        return np.array([-fraction @ error, w[0] * (fraction / (w[1] + substrate)) @ error])

    return root(gradient, [0.36, 0.55])


def model_fit(model, slopes, start):
    """Return the fit of ``model`` as a function of the measurements. ``slopes`` is its transposed Jacobian in w."""
    return lambda y: root(lambda w: slopes(w) @ (model(w) - y), start)


def wave(w, theta, data):
    return theta[0] - (w[0] * jnp.sin(TIMES * w[1] + w[2]) + w[3])


wave_by_numpy = model_fit(
    lambda w: w[0] * np.sin(TIMES * w[1] + w[2]) + w[3],
    lambda w: np.stack(
        [
            np.sin(TIMES * w[1] + w[2]),
            w[0] * TIMES * np.cos(TIMES * w[1] + w[2]),
            w[0] * np.cos(TIMES * w[1] + w[2]),
            np.ones(7),
        ]
    ),
    [1.5, 2.5, 0.4, 0.3],
)
decay_by_numpy = model_fit(
    lambda w: w[0] * np.exp(-w[1] * TIMES) + w[2] * np.exp(-w[3] * TIMES),
    lambda w: np.stack(
        [
            np.exp(-w[1] * TIMES),
            -w[0] * TIMES * np.exp(-w[1] * TIMES),
            np.exp(-w[3] * TIMES),
            -w[2] * TIMES * np.exp(-w[3] * TIMES),
        ]
    ),
    [2.0, 0.5, 1.0, 3.0],
)


def sigmoid_fit(w, theta, data):
    """The residuals of a sigmoid with the scale θ₀ and its other parameters in a tree. CURVE has the scale 2.5."""
    return data - (w["offset"] + theta[0] * jax.nn.sigmoid(X[:, :2] @ w["w"] - w["shift"]))


SIGMOID = np.array([1.0, 1.5, -0.25, -0.5])  # offset, shift and the two weights
CURVE = SIGMOID[0] + 2.5 / (1 + np.exp(SIGMOID[1] - X[:, :2] @ SIGMOID[2:]))


def sigmoid_by_numpy(scale):
    def gradient(w):
        part = 1 / (1 + np.exp(w[1] - X[:, :2] @ w[2:]))
        slope = scale * part * (1 - part)
        error = w[0] + scale * part - CURVE
        return np.concatenate([[np.sum(error), -slope @ error], (slope * error) @ X[:, :2]])

    offset, shift, *weights = root(gradient, SIGMOID)
    return {"offset": offset, "shift": shift, "w": weights}


def robust(w, theta, data):
    """Regression with the loss θ₀²·(√(1 + (r/θ₀)²) − 1) of each residual r."""
    return jnp.sum(theta[0] ** 2 * (jnp.sqrt(1 + ((X @ w - Y) / theta[0]) ** 2) - 1))


def robust_by_numpy(scale):
    return root(lambda w: X.T @ ((X @ w - Y) / np.sqrt(1 + ((X @ w - Y) / scale) ** 2)), np.linalg.solve(GRAM, MOMENT))


REACTION = bl.LeastSquares(reaction)
GAUSS_NEWTON, MARQUARDT = bl.GaussNewton(50, tol=1e-12), bl.LevenbergMarquardt(100, tol=1e-12)
add = family("gauss_newton, levenberg_marquardt, scipy_wrappers")
for name, solver, mode in (
    ("GaussNewton", GAUSS_NEWTON, "reverse"),
    ("LevenbergMarquardt", MARQUARDT, "forward"),
):
    found = solution(REACTION, np.array([0.4, 0.5]), solver)
    add(f"an enzyme reaction by {name}", found, reaction_by_numpy, SUBSTRATE, RATES, mode=mode, tolerance=1e-6)
add(
    "a wave with four parameters",
    solution(bl.LeastSquares(wave), np.array([1.4, 2.4, 0.5, 0.2]), MARQUARDT),
    wave_by_numpy,
    WAVE,
)
add(
    "two exponentials",
    solution(
        bl.LeastSquares(lambda w, t, d: w[0] * jnp.exp(-w[1] * TIMES) + w[2] * jnp.exp(-w[3] * TIMES) - t[0]),
        np.array([1.8, 0.6, 1.2, 2.5]),
        bl.LevenbergMarquardt(200, tol=1e-13),
    ),
    decay_by_numpy,
    DECAY,
    tolerance=1e-4,  # the fit is ill-conditioned, so differences have larger errors
)
start = {"offset": np.zeros(()), "shift": np.zeros(()), "w": np.zeros(2)}
condition = bl.LeastSquares(sigmoid_fit, "gauss_newton")  # exact, because the residuals are zero at the solution
found = solution(condition, start, MARQUARDT, data=CURVE)
add("a curve in a tree", found, sigmoid_by_numpy, np.array(2.5))
add(
    "Rosenbrock's residuals",
    solution(
        bl.LeastSquares(lambda w, t, d: jnp.stack([t[0] - w[0], t[1] * (w[1] - w[0] ** 2)])),
        np.array([-1.2, 1.0]),
        MARQUARDT,
    ),
    lambda a, b: np.array([a, a**2]),
    np.array(1.0),
    np.array(10.0),
)
add(
    "one residual and one unknown",
    solution(bl.LeastSquares(lambda w, t, d: w**3 - t[0]), 1.0, GAUSS_NEWTON),
    np.cbrt,
    np.array(2.0),
    mode="forward",
)
add("a robust loss", solution(bl.Stationary(robust), np.zeros(3), NEWTON), robust_by_numpy, np.array(0.6))
curve_fit = bl.custom_root(lambda w, y: jax.grad(lambda w: 0.5 * jnp.sum(wave(w, (y,), None) ** 2))(w), callback=True)(
    lambda init, y: (
        scipy.optimize.least_squares(
            lambda w: w[0] * np.sin(TIMES * w[1] + w[2]) + w[3] - y, init, xtol=1e-15, ftol=1e-15, gtol=1e-15
        ).x
    )
)
add(
    "a curve fit of SciPy", lambda y: curve_fit(jnp.array([1.4, 2.4, 0.5, 0.2]), y), wave_by_numpy, WAVE, tolerance=1e-5
)

# Minima over a set.


def least_squares(w, theta, data):
    return 0.5 * jnp.sum((X @ w - theta[0]) ** 2)


def quadratic(w, theta, data):
    return 0.5 * w @ theta[0] @ w + theta[1] @ w


def bounds(lower, upper):
    """Return G and h of the inequalities lower ≤ x ≤ upper."""
    lower, upper = np.broadcast_arrays(lower, upper)
    return np.concatenate([-np.eye(len(upper)), np.eye(len(upper))]), np.concatenate([-lower, upper])


def in_a_set(objective, name, params=None, init=(0.0, 0.0, 0.0), solver=ITERATE, linear=None, step=RATE):
    """Return the minimum over a set as a function of θ. ``name`` is its projection, and params(θ) its parameters."""
    projection = bl.jaxopt_projection(name, params and (lambda theta, data: params(theta)))
    return solution(bl.Projected(objective, projection, float(step)), np.array(init), solver, linear)


def in_a_ball(y, radius):
    """Return argmin ½‖Xw − y‖² on the sphere ‖w‖ = radius. The multiplier is the root of an equation of one unknown."""
    (multiplier,) = root(
        lambda m: np.sum(np.linalg.solve(GRAM + m[0] * np.eye(3), X.T @ y) ** 2, keepdims=True) - radius**2, [0.1]
    )
    return np.linalg.solve(GRAM + multiplier * np.eye(3), X.T @ y)


def in_a_diamond(y, radius):
    """Return argmin ½‖Xw − y‖² with ‖w‖₁ ≤ radius."""
    signs = np.array([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)])
    return program(GRAM, -X.T @ y, G=signs, h=np.full(8, radius))[0]


def svm_dual(beta, theta, data):
    """The dual of a multiclass support vector machine with the penalty θ₀, on the samples ``data``."""
    return 0.5 * jnp.sum((data.T @ (ONE_HOT[: len(data)] - beta)) ** 2) / theta[0] - jnp.sum(
        (1 - ONE_HOT[: len(data)]) * beta
    )


def svm_weights(beta, strength, samples):
    return samples.T @ (ONE_HOT[: len(samples)] - beta) / strength


def svm_by_numpy(strength, samples=X[:3]):
    """Return the weights of the support vector machine. They are unique even where the dual solution is not."""
    n = len(samples)
    one_hot, each_row = ONE_HOT[:n].ravel(), np.kron(np.eye(n), np.ones(3))
    hessian = np.kron(samples @ samples.T, np.eye(3)) / strength
    signs = -np.eye(3 * n), np.zeros(3 * n)
    beta = program(hessian, one_hot - 1 - hessian @ one_hot, each_row, np.ones(n), *signs)[0]
    return svm_weights(beta.reshape(n, 3), strength, samples)


def svm_solution(projection, solver, samples=X[:3]):
    layer = bl.implicit_layer(bl.Projected(svm_dual, projection, 0.2), solver)

    def weights(strength):
        beta = layer((strength,), jnp.full((len(samples), 3), 1 / 3), jnp.asarray(samples))
        return svm_weights(beta, strength, samples)

    return weights


def exponentiated(w, slope, step, outer):
    """Return w after a step of mirror descent with the entropy as mirror map. Each row of w stays on a simplex."""
    moved = w * jnp.exp(-step * slope)
    return moved / jnp.sum(moved, axis=-1, keepdims=True)


def factor(w, theta, data):
    """The objective of one factor of a non-negative factorisation, with the other factor θ₁ fixed."""
    return 0.5 * jnp.sum((theta[0] - theta[1] @ w) ** 2)


def factor_by_numpy(matrix, left):
    columns = [program(left.T @ left, -left.T @ y, G=-np.eye(2), h=np.zeros(2))[0] for y in matrix.T]
    return np.stack(columns, axis=1)


def non_negative(y):
    return program(GRAM, -X.T @ y, G=-np.eye(3), h=np.zeros(3))[0]


HESSIAN = GRAM + 0.3 * np.diag(np.arange(3.0))
LINE, LIMIT = np.array([1.0, -0.5, 2.0]), np.array(0.6)
rows_of_simplices = lambda w, theta, data: jax.vmap(bl.jaxopt_projection("projection_simplex"), (0, None, None))(  # noqa: E731
    w, None, None
)
add = family("projected_gradient, mirror_descent, lbfgsb, cd_qp")
add("non-negative least squares", in_a_set(least_squares, "projection_non_negative"), non_negative, Y)
found = in_a_set(least_squares, "projection_l2_ball", lambda theta: theta[1])
add("least squares in a ball", found, in_a_ball, Y, np.array(0.2))
add(
    "least squares in an l1 ball",
    in_a_set(least_squares, "projection_l1_ball", lambda theta: theta[1]),
    in_a_diamond,
    Y,
    np.array(0.4),
    mode="forward",
)
add(
    "least squares on a simplex",
    in_a_set(least_squares, "projection_simplex", lambda theta: theta[1], np.full(3, 1 / 3)),
    lambda y, s: program(GRAM, -X.T @ y, np.ones((1, 3)), np.ravel(s), -np.eye(3), np.zeros(3))[0],
    Y,
    np.array(0.9),
)
for name, solver, mode in (
    ("FixedPointIteration", ITERATE, "forward"),
    ("jaxopt's ProjectedGradient", bl.Jaxopt("ProjectedGradient", stepsize=RATE, maxiter=500, tol=1e-12), "reverse"),
    ("jaxopt's BoxCDQP", bl.Jaxopt("BoxCDQP", maxiter=200, tol=1e-13), "reverse"),
    ("jaxopt's LBFGSB", bl.Jaxopt("LBFGSB", maxiter=100, tol=1e-11), "reverse"),
):
    add(
        f"a quadratic in a box by {name}",
        in_a_set(quadratic, "projection_box", lambda theta: theta[2:], solver=solver),
        lambda Q, c, lower, upper: program(Q, c, None, None, *bounds(lower, upper))[0],
        HESSIAN,
        -2 * MOMENT,
        np.array([-0.2, -0.3, -0.1]),
        np.array([0.3, 0.2, 0.5]),
        mode=mode,
    )
add(
    "a box of scalars",
    in_a_set(quadratic, "projection_box", lambda theta: (-theta[2], theta[2]), solver=bl.Anderson(100, tol=1e-12)),
    lambda Q, c, size: program(Q, c, None, None, *bounds(np.full(3, -size), np.full(3, size)))[0],
    HESSIAN,
    -2 * MOMENT,
    np.array(0.25),
)
for name, sign in (("active", -1.0), ("inactive", 1.0)):
    add(
        f"a minimum in a half-space that is {name}",
        in_a_set(quadratic, "projection_halfspace", lambda theta: theta[2:]),
        lambda Q, c, row, right: program(Q, c, G=row[None], h=np.ravel(right))[0],
        HESSIAN,
        -MOMENT,
        LINE,
        sign * 3 * LIMIT,
    )
add(
    "a minimum in a polyhedron",
    in_a_set(quadratic, "projection_polyhedron", lambda theta: theta[2:], step=1.5 * RATE),
    lambda Q, c, *constraints: program(Q, c, *constraints)[0],
    HESSIAN,
    -MOMENT,
    np.ones((1, 3)),
    np.array([0.4]),
    np.array([[1.0, 0.0, -1.0], [0.0, -1.0, 0.5]]),
    np.array([0.1, 0.2]),
)
add(
    "a support vector machine by mirror descent",
    svm_solution(
        rows_of_simplices,
        bl.Jaxopt("MirrorDescent", projection_grad=exponentiated, stepsize=1.0, maxiter=3000, tol=1e-10),
    ),
    svm_by_numpy,
    np.array(1.5),
)
add(
    "a support vector machine by projections",
    svm_solution(rows_of_simplices, bl.Anderson(200, tol=1e-11)),
    svm_by_numpy,
    np.array(1.5),
)
add(  # JAX 0.12 compiles this program so that the projected point is computed twice, with different rounding errors
    "a support vector machine with more samples than features",
    svm_solution(rows_of_simplices, bl.FixedPointIteration(3000, tol=1e-11), X[:4, :2]),
    lambda strength: svm_by_numpy(strength, X[:4, :2]),
    np.array(0.4),
)
add(
    "a factor of a non-negative factorisation",
    solution(bl.Projected(factor, bl.jaxopt_projection("projection_non_negative"), 0.3), np.zeros((2, 2)), ITERATE),
    factor_by_numpy,
    np.array([[1.0, 0.4], [0.3, 1.5], [-0.5, 0.8]]),
    np.array([[1.0, 0.2], [0.1, 1.1], [0.3, 0.5]]),
)
add(
    "unrolled projected descent",
    value(
        bl.Projected(least_squares, bl.jaxopt_projection("projection_non_negative"), RATE),
        lambda w, theta, data: jnp.sum(w**2),
        np.zeros(3),
        bl.FixedPointIteration(200),
        bl.Unrolled(),
    ),
    lambda y: np.sum(non_negative(y) ** 2),
    Y,
)
add(
    "a minimiser of SciPy in a box",
    lambda y, size: bl.custom_fixed_point(
        lambda w, y, size: jnp.clip(w - X.T @ (X @ w - y), -size, size), callback=True
    )(lambda init, y, size: scipy.optimize.lsq_linear(X, y, (-size, size), tol=1e-14).x)(jnp.zeros(3), y, size),
    lambda y, size: program(GRAM, -X.T @ y, None, None, *bounds(np.full(3, -size), np.full(3, size)))[0],
    Y,
    np.array(0.1),
)

# Minima with a penalty that has a kink.


def lasso_of(solver, prox="prox_lasso", objective=least_squares):
    """Return the minimum with the proximal operator ``prox`` as a function of y and the penalty's parameters."""
    operator = bl.jaxopt_prox(prox, lambda theta, data: theta[1] if len(theta) == 2 else theta[1:])
    return solution(bl.ProximalGradient(objective, operator, RATE), np.zeros(3), solver)


def lasso_by_numpy(y, strength):
    return lasso(GRAM, X.T @ y, strength)


def elastic_net_by_numpy(y, strength, ratio):
    return lasso(GRAM + strength * ratio * np.eye(3), X.T @ y, strength)


def tasks(w, theta, data):
    """Two regressions, one for each column of θ₀, on the same samples."""
    return 0.5 * jnp.sum((X @ w - theta[0]) ** 2)


def group_lasso_by_numpy(y, strength):
    """Return the minimum of a regression of two tasks with a penalty on the length of each row of w.

    At this minimum, no row of w is 0.
    """

    def gradient(w):
        w = w.reshape(3, 2)
        length = np.sqrt(np.sum(w**2, axis=1, keepdims=True))
        return (X.T @ (X @ w - y) + strength * w / length).ravel()

    return root(gradient, np.linalg.solve(GRAM, X.T @ y).ravel()).reshape(3, 2)


def sparse_logistic(w, theta, data):
    return jnp.sum(jax.nn.softplus(-SIGNS * (X @ (theta[0] * w))))


def sparse_logistic_by_numpy(scale, strength):
    """Return the minimum with an l1 penalty, by proximal gradient descent."""
    w = np.zeros(3)
    for _ in range(600):
        moved = w + scale * X.T @ (SIGNS / (1 + np.exp(SIGNS * (X @ (scale * w)))))
        w = np.sign(moved) * np.maximum(np.abs(moved) - strength, 0)
    return w


class Composite(jaxopt.objective.CompositeLinearFunction):
    """½‖Xw − θ₀‖² in the form that jaxopt's block coordinate descent takes, for a vector w or a matrix."""

    def subfun(self, predictions, theta, data):
        return 0.5 * jnp.sum((predictions - theta[0]) ** 2)

    def make_linop(self, theta, data):
        return LinearOperator(jnp.asarray(X))

    def columnwise_lipschitz_const(self, theta, data):
        return jnp.asarray(np.diag(GRAM))


SPARSE = np.array(0.9)
TWO_TASKS = np.stack([Y, Y[::-1]], axis=1)
BLOCKS = bl.Jaxopt("BlockCoordinateDescent", maxiter=400, tol=1e-13)
add = family("proximal_gradient, block_cd")
for name, solver, objective, mode in (
    ("FixedPointIteration", ITERATE, least_squares, "reverse"),
    (
        "jaxopt's ProximalGradient",
        bl.Jaxopt("ProximalGradient", stepsize=RATE, maxiter=800, tol=1e-13),
        least_squares,
        "reverse",
    ),
):
    add(f"lasso by {name}", lasso_of(solver, objective=objective), lasso_by_numpy, Y, SPARSE, mode=mode)
add("elastic net", lasso_of(ITERATE, "prox_elastic_net"), elastic_net_by_numpy, Y, SPARSE, np.array(0.7))
add("lasso, without jit", lasso_of(ITERATE), lasso_by_numpy, Y, SPARSE, mode="eager")
add("lasso with one penalty for each coefficient", lasso_of(ITERATE), lasso_by_numpy, Y, np.array([0.4, 0.9, 0.2]))
add(
    "lasso with the penalty exp θ",
    solution(
        bl.ProximalGradient(least_squares, bl.jaxopt_prox("prox_lasso", lambda theta, data: jnp.exp(theta[1])), RATE),
        np.zeros(3),
        ITERATE,
    ),
    lambda y, exponent: lasso_by_numpy(y, np.exp(exponent)),
    Y,
    np.array(-0.3),
)
add("a lasso of zeros", lasso_of(ITERATE), lambda y, strength: np.zeros(3), Y, np.array(50.0))
add(
    "a lasso of the samples",
    solution(
        bl.ProximalGradient(
            lambda w, theta, data: 0.5 * jnp.sum((theta[0] @ w - Y) ** 2),
            bl.jaxopt_prox("prox_lasso", lambda theta, data: theta[1]),
            RATE / 2,
        ),
        np.zeros(3),
        ITERATE,
    ),
    lambda x, strength: lasso(x.T @ x, x.T @ Y, strength),
    X,
    SPARSE,
)
add(
    "non-negative lasso",
    lasso_of(ITERATE, "prox_non_negative_lasso"),
    lambda y, a: program(GRAM, a - X.T @ y, G=-np.eye(3), h=np.zeros(3))[0],
    Y,
    SPARSE,
)
rows = jax.vmap(jaxopt.prox.prox_group_lasso, (0, None, None))
groups = bl.jaxopt_prox(lambda w, strength, scaling: rows(w, strength, scaling), lambda theta, data: theta[1])
for name, solver, objective in (
    ("FixedPointIteration", ITERATE, tasks),
    ("jaxopt's BlockCoordinateDescent", BLOCKS, Composite()),
):
    found = solution(bl.ProximalGradient(objective, groups, RATE), np.zeros((3, 2)), solver)
    add(f"a group for each row by {name}", found, group_lasso_by_numpy, TWO_TASKS, np.array(0.1))
add(
    "sparse logistic regression",
    lasso_of(ITERATE, objective=sparse_logistic),
    sparse_logistic_by_numpy,
    np.array(1.2),
    np.array(0.5),
)
add(
    "a lasso of trees with a penalty for each part",
    solution(
        bl.ProximalGradient(
            lambda w, theta, data: least_squares(jnp.concatenate([w["a"], w["b"]]), theta, data),
            bl.jaxopt_prox("prox_lasso", lambda theta, data: theta[1]),
            RATE,
        ),
        {"a": np.zeros(1), "b": np.zeros(2)},
        ITERATE,
    ),
    lambda y, strength: lasso_by_numpy(y, np.array([strength["a"], strength["b"], strength["b"]])),
    Y,
    {"a": np.array(0.2), "b": np.array(0.6)},
)
add(
    "an operator that is a projection",
    lasso_of(ITERATE, jaxopt.prox.make_prox_from_projection(lambda w, size: jnp.clip(w, -size, size))),
    lambda y, size: program(GRAM, -X.T @ y, None, None, *bounds(np.full(3, -size), np.full(3, size)))[0],
    Y,
    np.array(0.15),
)
add(
    "vmap over penalties",
    jax.vmap(lambda a: lasso_of(ITERATE)(jnp.asarray(Y), a)),
    lambda strengths: [lasso_by_numpy(Y, a) for a in strengths],
    np.array([0.2, 0.9]),
)
add(
    "unrolled proximal descent",
    value(
        bl.ProximalGradient(least_squares, bl.jaxopt_prox("prox_lasso", lambda theta, data: theta[1]), RATE),
        lambda w, theta, data: jnp.sum(w**3),
        np.zeros(3),
        bl.FixedPointIteration(250),
        bl.Unrolled(),
    ),
    lambda y, a: np.sum(lasso_by_numpy(y, a) ** 3),
    Y,
    SPARSE,
)
lasso_by_name = bl.custom_fixed_point(
    lambda w, strength, y: jaxopt.prox.prox_lasso(w - RATE * (GRAM @ w - X.T @ y), RATE * strength)
)(
    lambda init, **given: jax.lax.fori_loop(
        0,
        400,
        lambda _, w: jaxopt.prox.prox_lasso(w - RATE * (GRAM @ w - X.T @ given["y"]), RATE * given["strength"]),
        init,
    )
)
add(
    "lasso with keywords in a custom_fixed_point",
    lambda y, a: lasso_by_name(jnp.zeros(3), strength=a, y=y),
    lasso_by_numpy,
    Y,
    SPARSE,
)

# Quadratic programs.


def objective(x, theta, data):
    return 0.5 * x @ theta[0] @ x + theta[1] @ x


def equality(x, theta, data):
    return theta[2] @ x - theta[3]


def inequality(x, theta, data):
    return theta[-2] @ x - theta[-1]


def qp(solver, init, objective=objective, equality=None, inequality=None, linear=None, part=None):
    """Return the solution (x, ν, μ) of a quadratic program as a function of θ, or the given part of the solution."""
    found = solution(bl.KKT(objective, equality, inequality), init, solver, linear)
    return found if part is None else lambda *theta: found(*theta)[part]


def lasso_program(w, theta, data):
    """The objective of the lasso as a quadratic program in the coefficients x and their bounds |x| ≤ ``size``."""
    x, size = w
    return 0.5 * jnp.sum((X @ x - theta[0]) ** 2) + theta[1] * jnp.sum(size)


EQUALITY_QP = bl.Jaxopt("EqualityConstrainedQP", tol=1e-12)
OSQP, BOX_OSQP = (bl.Jaxopt(name, tol=1e-11, maxiter=20000) for name in ("OSQP", "BoxOSQP"))
A, B = np.array([[1.0, 1.0, 0.5]]), np.array([0.4])
G, H = np.array([[1.0, 0.0, -1.0], [0.0, -1.0, 0.5]]), np.array([0.1, 0.2])
COST = np.array([0.5, -1.0, 0.3])
KERNEL = np.exp(-0.5 * np.sum((X[:4, None] - X[None, :4]) ** 2, -1))
add = family("eq_qp, osqp, cvxpy_wrapper")
equal = np.zeros(3), np.zeros(1), None
add(
    "equalities, all parameters",
    qp(EQUALITY_QP, equal, equality=equality),
    lambda *t: program(*t)[:2],
    HESSIAN,
    COST,
    A,
    B,
)
add(
    "a matrix that is captured by the objective",
    lambda Q: solution(
        bl.KKT(lambda x, t, d: 0.5 * x @ Q @ x + t[0] @ x, lambda x, t, d: A @ x - B), equal, EQUALITY_QP
    )(COST)[0],
    lambda Q: program(Q, COST, A, B)[0],
    HESSIAN,
)
add(
    "trees of variables and of constraints",
    qp(
        EQUALITY_QP,
        ({"foo": np.zeros(1), "bar": np.zeros(2)}, [np.zeros(1)], None),
        lambda x, t, d: objective(jnp.concatenate([x["foo"], x["bar"]]), t, d),
        lambda x, t, d: [equality(jnp.concatenate([x["foo"], x["bar"]]), t, d)],
        part=0,
    ),
    lambda *theta: (lambda x: {"foo": x[:1], "bar": x[1:]})(program(*theta)[0]),
    HESSIAN,
    COST,
    A,
    B,
)
for name, solver in (("OSQP", OSQP), ("BoxOSQP", BOX_OSQP)):
    init = np.zeros(3), np.zeros(1), np.zeros(2)
    found = qp(solver, init, equality=equality, inequality=inequality)
    add(f"equalities and inequalities, all parameters, by {name}", found, program, HESSIAN, COST, A, B, G, H)
add(
    "inequalities, none active",
    qp(OSQP, (np.zeros(3), None, np.zeros(2)), inequality=inequality, part=0),
    lambda *t: program(t[0], t[1], None, None, *t[2:])[0],
    HESSIAN,
    COST,
    G,
    H + 5,
)
add(
    "the simplex as a program",
    qp(
        BOX_OSQP,
        (np.zeros(4), np.zeros(()), np.zeros(4)),
        lambda y, t, d: 0.5 * jnp.sum((y - t[0]) ** 2),
        lambda y, t, d: jnp.sum(y) - t[1],
        lambda y, t, d: -y,
        part=0,
    ),
    simplex_by_numpy,
    POINT,
    np.array(1.0),
)
add(
    "the lasso as a program",
    qp(
        OSQP,
        ((np.zeros(3), np.zeros(3)), None, (np.zeros(3), np.zeros(3))),
        lasso_program,
        inequality=lambda w, t, d: (w[0] - w[1], -w[0] - w[1]),
        part=0,
    ),
    lambda y, a: (lambda w: (w, np.abs(w)))(lasso_by_numpy(y, a)),
    Y,
    np.array(0.2),
)
add(
    "a support vector machine with a kernel",
    qp(
        BOX_OSQP,
        (np.zeros(4), np.zeros(()), (np.zeros(4), np.zeros(4))),
        lambda b, t, d: 0.5 * b @ t[0] @ b - SIGNS[:4] @ b,
        lambda b, t, d: jnp.sum(b),
        lambda b, t, d: (-SIGNS[:4] * b, SIGNS[:4] * b - t[1]),
        part=0,
    ),
    lambda K, C: program(
        K,
        -SIGNS[:4],
        np.ones((1, 4)),
        np.zeros(1),
        np.concatenate([-np.diag(SIGNS[:4]), np.diag(SIGNS[:4])]),
        np.append(np.zeros(4), np.full(4, C)),
    )[0],
    KERNEL,
    np.array(1.3),
)

# Projections, differentiated without a solver around them.


def onto(name):
    """Return the projection as a function of a point and of the parameters of the set."""
    default = bl.jaxopt_projection(name)
    projection = bl.jaxopt_projection(name, params=lambda theta, data: theta[0] if len(theta) == 1 else theta)
    return lambda x, *theta: projection(x, theta, None) if theta else default(x, None, None)


def sphere(x, radius):
    return radius * x / np.linalg.norm(x)


def diamond(x, radius):
    return np.sign(x) * simplex_by_numpy(np.abs(x), radius)


def section(x, lower, upper, row, right):
    return program(np.eye(4), -x, row[None], np.ravel(right), *bounds(lower, upper))[0]


def plan(similarity, a, b):
    """Return the nearest non-negative matrix with given row and column sums.

    The constraint on the last column sum is left out, because the other sums imply it.
    """
    m, n = similarity.shape
    sums = np.concatenate([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])[:-1]
    cells = m * n
    right = np.append(a, b)[:-1]
    return program(np.eye(cells), -similarity.ravel(), sums, right, -np.eye(cells), np.zeros(cells))[0].reshape(m, n)


def scaled_plan(similarity, a, b):
    """Return the matrix uᵢ·exp(Sᵢⱼ)·vⱼ with given row and column sums, by Sinkhorn's iteration."""
    kernel, v = np.exp(similarity), np.ones(len(b))
    for _ in range(400):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


def balanced(function):
    """Return a function of (S, a, b) that appends an entry to b, so that the sums of a and b agree."""
    return lambda S, a, b: function(S, a, [*b, sum(a) - sum(b)])


def isotonic(y):
    """Return the nearest increasing sequence, whose entries are means of blocks (the min-max formula)."""
    n = len(y)
    return [max(min(np.mean(y[i:j]) for j in range(k + 1, n + 1)) for i in range(k + 1)) for k in range(n)]


STEPS = np.eye(4)[:-1] - np.eye(4)[1:]
SIMILARITY, ROWS, COLUMNS = np.array([[0.9, 0.1, -0.3], [0.4, 0.5, 0.7]]), np.array([0.6, 0.4]), np.array([0.3, 0.45])
SQUARE = np.array([[0.9, 0.1, 0.2], [0.3, 0.5, 0.45], [0.2, 0.6, 0.25]])
clip = lambda x, lower, upper: np.clip(x, lower, upper)  # noqa: E731
add = family("projection, isotonic")
add("non-negative", onto("projection_non_negative"), lambda x: np.maximum(x, 0), POINT)
add("a box of numbers", onto("projection_box"), clip, POINT, np.array(0.0), np.array(0.6))
add(
    "a box of arrays",
    onto("projection_box"),
    clip,
    POINT,
    np.array([0.0, -0.1, 0.2, 0.9]),
    np.array([0.3, 1, 2, 3]),
    mode="forward",
)
add(
    "a box of trees",
    onto("projection_box"),
    lambda x, low, high: {"a": np.clip(x["a"], low["a"], high["a"]), "b": np.clip(x["b"], low["b"], high["b"])},
    {"a": POINT, "b": np.array(2.0)},
    {"a": np.array(0.0), "b": np.array(1.0)},
    {"a": np.array(0.6), "b": np.array(1.5)},
)
add("a hypercube", onto("projection_hypercube"), lambda x, size: np.clip(x, 0, size), POINT, np.array(0.8))
add("a simplex", onto("projection_simplex"), simplex_by_numpy, POINT, np.array(0.8))
add(
    "a simplex of points of size 1e9",
    lambda x: onto("projection_simplex")(1e9 * x, jnp.array(1e9)) / 1e9,
    simplex_by_numpy,
    POINT,
)
add(
    "a simplex with an entry −∞",
    lambda x: onto("projection_simplex")(jnp.append(x, -jnp.inf)),
    lambda x: np.append(simplex_by_numpy(x), 0.0),
    POINT,
)
add(
    "vmap over simplices",
    jax.vmap(onto("projection_simplex")),
    lambda points, totals: [simplex_by_numpy(*pair) for pair in zip(points, totals, strict=True)],
    np.stack([POINT, -POINT]),
    np.array([0.8, 1.2]),
)
add(
    "the largest entries on a simplex",
    lambda x: bl.jaxopt_projection(lambda x: jaxopt.projection.projection_sparse_simplex(x, 2))(x, None, None),
    lambda x: np.eye(4)[:, np.sort(np.argsort(x)[2:])] @ simplex_by_numpy(x[np.sort(np.argsort(x)[2:])]),
    POINT,
)
add("an l1 sphere", onto("projection_l1_sphere"), diamond, POINT, np.array(0.8))
add("an l1 ball, outside", onto("projection_l1_ball"), diamond, POINT, np.array(0.9))
add("an l1 ball, inside", onto("projection_l1_ball"), lambda x, radius: x, POINT, np.array(5.0))
add("an l2 sphere", onto("projection_l2_sphere"), sphere, POINT, np.array(3.2))
add("an l2 ball, outside", onto("projection_l2_ball"), sphere, POINT, np.array(0.7), mode="forward")
add("an l2 ball, inside", onto("projection_l2_ball"), lambda x, radius: x, POINT, np.array(7.0))
add(
    "an l2 ball of trees",
    onto("projection_l2_ball"),
    lambda x, radius: {key: radius * part / np.linalg.norm(flat(x)) for key, part in x.items()},
    {"a": POINT[:1], "b": POINT[1:]},
    np.array(0.7),
)
add("an l∞ ball", onto("projection_linf_ball"), lambda x, size: np.clip(x, -size, size), POINT, np.array(0.6))
ROW4 = np.array([1.0, 0.5, -1.0, 2.0])
hyperplane = lambda x, row, right: x - row * (row @ x - right) / (row @ row)  # noqa: E731
add("a hyperplane", onto("projection_hyperplane"), hyperplane, POINT, ROW4, np.array(0.3))
add(
    "a half-space that contains the point",
    onto("projection_halfspace"),
    lambda x, row, right: x,
    POINT,
    ROW4,
    np.array(9.0),
)
add("a half-space that does not", onto("projection_halfspace"), hyperplane, POINT, ROW4, np.array(-9.0), mode="forward")
add(
    "an affine set",
    onto("projection_affine_set"),
    lambda x, A, b: x - A.T @ np.linalg.solve(A @ A.T, A @ x - b),
    POINT,
    np.stack([ROW4, np.ones(4)]),
    np.array([0.3, 0.9]),
)
add(
    "a polyhedron",
    onto("projection_polyhedron"),
    lambda x, *constraints: program(np.eye(4), -x, *constraints)[0],
    POINT,
    np.ones((1, 4)),
    np.array([1.0]),
    np.stack([ROW4, -np.eye(4)[1]]),
    np.array([0.3, 0.1]),
)
add(
    "a box section",
    onto("projection_box_section"),
    section,
    POINT,
    np.zeros(4),
    np.full(4, 0.8),
    np.array([1.0, 2.0, 3.0, 0.5]),
    np.array(1.6),
)
add(
    "a box section that is a simplex",
    onto("projection_box_section"),
    section,
    POINT,
    np.zeros(4),
    np.full(4, 1.5),
    np.ones(4),
    np.array(1.0),
    mode="forward",
)
add(
    "a transport plan",
    balanced(lambda S, a, b: onto("projection_transport")(S, a, jnp.stack(b))),
    balanced(lambda S, a, b: plan(S, a, np.array(b))),
    SIMILARITY,
    ROWS,
    COLUMNS,
)
add(
    "an entropic transport plan",
    balanced(lambda S, a, b: onto("kl_projection_transport")(S, a, jnp.stack(b))),
    balanced(lambda S, a, b: scaled_plan(S, a, np.array(b))),
    SIMILARITY,
    ROWS,
    COLUMNS,
)
add("a doubly stochastic matrix", onto("projection_birkhoff"), lambda S: plan(S, np.ones(3), np.ones(3)), SQUARE)
add(
    "a doubly stochastic matrix of least divergence",
    onto("kl_projection_birkhoff"),
    lambda S: scaled_plan(S, np.ones(3), np.ones(3)),
    SQUARE,
)
onto_steps = onto("projection_polyhedron")
increasing = lambda y: onto_steps(y, None, None, jnp.asarray(STEPS), jnp.zeros(3))  # noqa: E731
add("increasing sequences", increasing, isotonic, POINT)
add(
    "increasing sequences between bounds",
    lambda y, low, high: jnp.clip(increasing(y), low, high),
    lambda y, low, high: np.clip(isotonic(y), low, high),
    POINT,
    np.array(0.2),
    np.array(0.85),
)
squares = lambda y: jnp.sum(increasing(y**3) ** 2)  # noqa: E731
add(
    "second derivative of increasing sequences",
    jax.grad(squares),
    lambda y: differences(lambda y: np.sum(np.square(isotonic(y**3)), keepdims=True), y, 1e-4)[0],
    POINT,
    tolerance=1e-5,  # the reference is a difference, so the expected Jacobian is a difference of differences
)

# Proximal operators.


def penalised(name):
    """Return the operator with the step size 0.5 as a function of a point and of the penalty's parameters."""
    prox = bl.jaxopt_prox(name, params=lambda theta, data: theta)
    return lambda x, *theta: prox(x, theta[0] if len(theta) == 1 else theta, None, 0.5)


def shrink(x, strength):
    return np.sign(x) * np.maximum(np.abs(x) - 0.5 * strength, 0)


def ridged(x, strength):
    return x / (1 + 0.5 * strength)


PARTS = {"a": POINT, "b": np.array([[2.0, -0.1]])}
add = family("prox")
add("no penalty", lambda x: bl.jaxopt_prox("prox_none")(x, None, None, 0.5), lambda x: x, POINT)
add("lasso", penalised("prox_lasso"), shrink, POINT, np.array(0.9))
add(
    "lasso with one penalty for each entry",
    penalised("prox_lasso"),
    shrink,
    POINT,
    np.array([0.2, 0.1, 0.9, 9.0]),
    mode="forward",
)
add(
    "lasso of trees with a number for each part",
    penalised("prox_lasso"),
    lambda x, s: {key: shrink(x[key], s[key]) for key in x},
    PARTS,
    {"a": np.array(0.9), "b": np.array(0.5)},
)
add(
    "elastic net",
    penalised("prox_elastic_net"),
    lambda x, a, b: shrink(x, a) / (1 + 0.5 * a * b),
    POINT,
    np.array(0.9),
    np.array(0.4),
)
add(
    "elastic net with parameters for each entry",
    penalised("prox_elastic_net"),
    lambda x, a, b: shrink(x, a) / (1 + 0.5 * a * b),
    POINT,
    np.array([0.2, 0.1, 0.9, 9.0]),
    np.full(4, 0.4),
)
add(
    "a group that stays",
    penalised("prox_group_lasso"),
    lambda x, a: x * (1 - 0.5 * a / np.linalg.norm(x)),
    POINT,
    np.array(0.9),
)
add("a group that vanishes", penalised("prox_group_lasso"), lambda x, a: 0 * x, POINT, np.array(9.0))
add("ridge", penalised("prox_ridge"), ridged, POINT, np.array(2.0))
add(
    "non-negative ridge",
    penalised("prox_non_negative_ridge"),
    lambda x, a: np.maximum(ridged(x, a), 0),
    POINT,
    np.array(2.0),
)
add(
    "non-negative lasso",
    penalised("prox_non_negative_lasso"),
    lambda x, a: np.maximum(x - 0.5 * a, 0),
    POINT,
    np.array(0.3),
)
add(
    "a projection as an operator",
    penalised(jaxopt.prox.make_prox_from_projection(jaxopt.projection.projection_simplex)),
    simplex_by_numpy,
    POINT,
    np.array(1.0),
)

# The linear system of the derivative: w = A⁻¹b, differentiated in A and b by each linear solver.


def equations(w, theta, data):
    return theta[0] @ w - theta[1]


def solved_by(linear, symmetric=False):
    """Return A⁻¹b as a function of A and b, differentiated by ``linear``. If ``symmetric``, A is (A + Aᵀ)/2."""
    part = (lambda A: (A + A.T) / 2) if symmetric else (lambda A: A)
    condition = bl.Root(lambda w, t, d: equations(w, (part(t[0]), t[1]), d), symmetric=symmetric)
    return solution(condition, np.zeros(3), lambda c, init, t, d: jnp.linalg.solve(part(t[0]), t[1]), linear)


GENERAL = np.eye(3) + CONTRACTION
add = family("linear_solve, iterative_refinement")
for name, linear in (
    ("LU", bl.LU()),
    ("NormalCG", bl.NormalCG(20, tol=1e-13)),
    ("GMRES", bl.GMRES(3)),
    ("BiCGStab", bl.BiCGStab(20, tol=1e-13)),
    ("a Neumann series", bl.Neumann(60)),
):
    add(f"{name}", solved_by(linear), np.linalg.solve, GENERAL, OFFSET)
for name, linear in (("Cholesky", bl.Cholesky()), ("CG", bl.CG(6)), ("CG, watched", bl.CG(6, engine="watched"))):
    add(
        f"{name}, symmetric",
        solved_by(linear, symmetric=True),
        lambda A, b: np.linalg.solve((A + A.T) / 2, b),
        HESSIAN,
        OFFSET,
    )
add(
    "tensors",
    solution(
        bl.Root(lambda w, t, d: jnp.tensordot(t[0], w, 2) - t[1]),
        np.zeros((3, 2)),
        lambda c, init, t, d: jnp.linalg.solve(t[0].reshape(6, 6), t[1].ravel()).reshape(3, 2),
    ),
    lambda A, b: np.linalg.solve(A.reshape(6, 6), b.ravel()),
    (np.eye(6) + 0.1 * RANDOM.normal(size=(6, 6))).reshape(3, 2, 3, 2),
    RANDOM.normal(size=(3, 2)),
)
add(
    "one equation",
    solution(bl.Root(equations), np.zeros(1), bl.Jaxopt("Broyden", maxiter=50, tol=1e-13)),
    lambda A, b: b / A[0],
    np.array([[1.7]]),
    np.array([0.6]),
)

# Losses of jaxopt as inner objectives, with a quadratic penalty.


def with_loss(loss, targets, init=(3,)):
    """Return the minimum of Σᵢ loss(targetᵢ, θ₁·xᵢw) + θ₀/2·‖w‖² as a function of θ."""

    def objective(w, theta, data):
        return jnp.sum(jax.vmap(loss)(data, theta[1] * (X @ w))) + 0.5 * theta[0] * jnp.sum(w**2)

    layer = bl.implicit_layer(bl.Stationary(objective), bl.GradientDescent(0.3, 300, tol=1e-12))
    return lambda *theta: layer(theta, jnp.zeros(init), jnp.asarray(targets))


def by_gradient(slope, init=(3,)):
    """Return the minimum of :func:`with_loss` as a function of θ, by gradient descent in NumPy.

    ``slope`` is the derivative of the loss in the scores.
    """

    def minimise(strength, scale):
        w = np.zeros(init)
        for _ in range(150):
            w = w - 0.3 * (scale * X.T @ slope(scale * (X @ w)) + strength * w)
        return w

    return minimise


def softmax(scores):
    return np.exp(scores) / np.sum(np.exp(scores), axis=1, keepdims=True)


def sparsemax(scores):
    """Return the projection of each row of three entries onto the simplex."""
    ordered = -np.sort(-scores, axis=1)
    thresholds = (np.cumsum(ordered, axis=1) - 1) / [1, 2, 3]
    return np.maximum(scores - np.max(thresholds, axis=1, keepdims=True), 0)


SCALE, SHARES = np.array(0.9), softmax(RANDOM.normal(size=(6, 3)))
add = family("loss, objective")
for name, loss, targets, derivative in (
    ("binary_logistic_loss", jaxopt.loss.binary_logistic_loss, LABELS, lambda z: 1 / (1 + np.exp(-z)) - LABELS),
    (
        "binary_sparsemax_loss",
        jaxopt.loss.binary_sparsemax_loss,
        LABELS,
        lambda z: np.clip((z + 1) / 2, 0, 1) - LABELS,
    ),
    ("huber_loss", lambda y, z: jaxopt.loss.huber_loss(y, z, 0.4), Y, lambda z: np.clip(z - Y, -0.4, 0.4)),
):
    add(name, with_loss(loss, targets), by_gradient(derivative), PENALTY, SCALE)
for name, loss, targets, derivative in (
    ("multiclass_logistic_loss", jaxopt.loss.multiclass_logistic_loss, CLASSES, lambda z: softmax(z) - ONE_HOT),
    ("multiclass_sparsemax_loss", jaxopt.loss.multiclass_sparsemax_loss, CLASSES, lambda z: sparsemax(z) - ONE_HOT),
    (
        "make_fenchel_young_loss",
        jaxopt.loss.make_fenchel_young_loss(jax.nn.logsumexp),
        SHARES,
        lambda z: softmax(z) - SHARES,
    ),
):
    add(name, with_loss(loss, targets, (3, 3)), by_gradient(derivative, (3, 3)), PENALTY, SCALE, mode="forward")
ridge_objective = bl.Stationary(lambda w, t, d: jaxopt.objective.ridge_regression(w, t[0], (jnp.asarray(X), t[1])))
add(
    "ridge_regression",
    solution(ridge_objective, np.zeros(3), DESCENT, bl.CG(3)),
    lambda a, y: np.linalg.solve(GRAM / 6 + a * np.eye(3), X.T @ y / 6),
    PENALTY,
    Y,
)


@pytest.mark.slow(
    "compiles a solver with its derivative in each situation",
    fast=("implicit_diff: reverse mode", "prox: lasso", "prox: ridge", "projection, isotonic: a hypercube"),
)
@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.family}: {case.name}") for case in SITUATIONS])
def test_the_solution_and_its_jacobian_equal_the_reference(case):
    leaves, structure = jax.tree.flatten(case.arguments)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def reference(x):
        parts = (part.reshape(leaf.shape) for part, leaf in zip(np.split(x, ends), leaves, strict=True))
        return flat(case.reference(*jax.tree.unflatten(structure, parts)))

    compute = value_and_jacobian if case.mode == "eager" else compiled_value_and_jacobian
    # jaxopt's losses multiply integer labels by floats, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard" if case.family.startswith("loss") else "strict"):
        found, jacobian = compute(case.ours, jax.tree.map(jnp.asarray, case.arguments), case.mode)
    x = flat(case.arguments)
    np.testing.assert_allclose(found, reference(x), rtol=case.tolerance, atol=case.tolerance)
    np.testing.assert_allclose(jacobian, differences(reference, x), rtol=case.tolerance, atol=case.tolerance)


class Refusal(NamedTuple):
    """A situation that jaxopt accepts and this library refuses, and another way to the same derivative."""

    refused: Callable[..., Any]
    message: str
    way: Callable[..., Any]
    reference: Callable[..., Any]
    theta: np.ndarray


ROTATED = np.array([[2.0, 1.0], [1.0, 3.0]])
WIDE = RANDOM.normal(size=(2, 3))


def complex_objective(w, theta, data):
    """½wᴴQw − Re((1 + 2i)θᵀw) for a complex w, with the minimiser (1 − 2i)·Q⁻¹θ."""
    return 0.5 * (w.real @ ROTATED @ w.real + w.imag @ ROTATED @ w.imag) - theta @ (w.real - 2 * w.imag)


def on_a_line(solver):
    condition = bl.KKT(lambda x, theta, data: 0.5 * x @ ROTATED @ x - theta @ x, lambda x, theta, data: jnp.sum(x) - 1)
    return lambda theta: bl.implicit_layer(condition, solver)(theta, (jnp.zeros(2), jnp.zeros(()), None), None)[0]


def unrolled(solver):
    problem = bl.Problem(PULL, lambda w, theta, data: jnp.sum(w))
    return lambda theta: bl.value_and_hypergradient(problem, solver, bl.Unrolled())(theta, jnp.zeros(2), None).value


PULL = bl.Stationary(lambda w, theta, data: 0.5 * w @ ROTATED @ w - theta @ w)
BY_SCIPY = bl.custom_root(lambda w, theta: ROTATED @ w - theta, callback=True)(
    lambda init, theta: scipy.optimize.minimize(lambda w: 0.5 * w @ ROTATED @ w - theta @ w, init, tol=1e-12).x
)
SHORTEST = bl.KKT(lambda w, theta, data: 0.5 * jnp.sum(w**2), lambda w, theta, data: WIDE @ w - theta)
REFUSALS = {
    "a complex w": Refusal(
        lambda theta: (
            bl.implicit_layer(bl.Stationary(complex_objective), bl.Jaxopt("LBFGS"))(
                theta, jnp.zeros(2, complex), None
            ).real
        ),
        "split a complex variable into two real ones",
        lambda theta: bl.implicit_layer(
            bl.Stationary(lambda w, theta, data: complex_objective(jax.lax.complex(w["re"], w["im"]), theta, data)),
            bl.GradientDescent(0.3, 300, tol=1e-12),
        )(theta, {"re": jnp.zeros(2), "im": jnp.zeros(2)}, None),
        lambda theta: {"re": np.linalg.solve(ROTATED, theta), "im": -2 * np.linalg.solve(ROTATED, theta)},
        np.array([0.3, -1.0]),
    ),
    "unrolled steps of a solver of jaxopt": Refusal(
        unrolled(bl.Jaxopt("GradientDescent", stepsize=0.3, maxiter=200)),
        "use GradientDescent, Optax, FixedPointIteration, FISTA or Anderson with tol=None",
        unrolled(bl.GradientDescent(0.3, 200)),
        lambda theta: np.sum(np.linalg.solve(ROTATED, theta)),
        np.array([0.3, -1.0]),
    ),
    "a solver of SciPy under `jax.grad` or another trace": Refusal(
        lambda theta: bl.implicit_layer(PULL, bl.Jaxopt("ScipyMinimize", method="BFGS"))(theta, jnp.zeros(2), None),
        "runs SciPy, but a hypergradient or jit would have to trace it",
        lambda theta: BY_SCIPY(jnp.zeros(2), theta),
        lambda theta: np.linalg.solve(ROTATED, theta),
        np.array([0.3, -1.0]),
    ),
    "CvxpyQP": Refusal(
        on_a_line(bl.Jaxopt("CvxpyQP")),
        r"OSQP solves the same programs\): use OSQP, BoxOSQP",
        on_a_line(bl.Jaxopt("OSQP", tol=1e-10, maxiter=5000)),
        lambda theta: program(ROTATED, -theta, np.ones((1, 2)), np.ones(1))[0],
        np.array([0.3, -1.0]),
    ),
    "least squares with fewer residuals than unknowns": Refusal(
        lambda theta: bl.implicit_layer(
            bl.LeastSquares(lambda w, theta, data: WIDE @ w - theta), bl.GaussNewton(20, tol=1e-10)
        )(theta, jnp.zeros(3), None),
        "SINGULAR.*add a ridge, or a strongly convex term",
        lambda theta: bl.implicit_layer(SHORTEST, bl.Jaxopt("EqualityConstrainedQP", tol=1e-12))(
            theta, (jnp.zeros(3), jnp.zeros(2), None), None
        )[0],
        lambda theta: np.linalg.pinv(WIDE) @ theta,
        np.array([0.3, -1.0]),
    ),
}


@pytest.mark.slow("compiles the other way to each derivative", fast="a solver of SciPy *")
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_why_and_there_is_another_way(name):
    case = REFUSALS[name]
    theta = jnp.asarray(case.theta)
    with pytest.raises((ValueError, TypeError, bl.HypergradientError), match=case.message):
        jax.jacrev(case.refused)(theta)
    found, jacobian = compiled_value_and_jacobian(case.way, (theta,), "reverse")
    np.testing.assert_allclose(found, flat(case.reference(case.theta)), atol=1e-7)
    np.testing.assert_allclose(jacobian, differences(lambda x: flat(case.reference(x)), case.theta), atol=1e-7)


def test_the_page_counts_the_situations_and_lists_the_refusals():
    page = (Path(__file__).parents[3] / "docs/moving/jaxopt.md").read_text()
    table = re.findall(r"^\| `([^|]+)` \| (\d+) \|$", page, re.MULTILINE)
    counts = Counter(case.family for case in SITUATIONS)
    assert {name.replace("`", ""): int(count) for name, count in table} == counts
    assert f"{len(SITUATIONS)} situations" in page
    listed = page.partition("| refused | another way |")[2].partition("\n\n")[0]
    assert [row.split("|")[1].strip() for row in listed.strip().splitlines()[1:]] == list(REFUSALS)


def test_no_situation_is_tried_twice():
    assert len({(case.family, case.name) for case in SITUATIONS}) == len(SITUATIONS) >= 120
