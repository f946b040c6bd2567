"""Problems like those of Optimistix's tests, and their solutions and derivatives computed by NumPy alone.

Each function takes flat vectors and a module, ``jax.numpy`` or ``numpy``. NumPy also evaluates the function at complex
arguments, so a complex step gives first derivatives that are exact up to rounding. No reference uses a derivative of
JAX.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel as bl


@dataclass(frozen=True, eq=False)
class Situation:
    """A problem of one kind, on pytrees of NumPy arrays.

    Attributes:
        kind: ``"mapping"`` (w = function), ``"residuals"`` (minimise ½‖function‖²) or ``"objective"``.
        function: ``function(w, theta, xp)`` of two vectors and the module of the arithmetic.
        start: where a solver starts, a pytree like w. Newton's method in NumPy starts there too.
        theta: the outer variables, a pytree.
        exact: the solution as a function of the vector θ, where it has a closed form.
    """

    kind: str
    function: Callable[[Any, Any, Any], Any]
    start: Any
    theta: Any
    exact: Callable[[np.ndarray], np.ndarray] | None = None

    def on_trees(self, w: Any, theta: Any, data: Any) -> Any:
        """Return ``function`` at pytrees, as conditions call it. The value of a mapping is a tree like w."""
        del data
        flat, unravel = ravel_pytree(w)
        value = self.function(flat, ravel_pytree(theta)[0], jnp)
        return unravel(value) if self.kind == "mapping" else value

    def condition(self, as_root: bool = False, **options: Any) -> Any:
        """Return the condition of this kind. With ``as_root``, return the Root of w − mapping instead."""
        if as_root:
            return bl.Root(lambda *at: jax.tree.map(jnp.subtract, at[0], self.on_trees(*at)), **options)
        kinds = {"mapping": bl.FixedPoint, "residuals": bl.LeastSquares, "objective": bl.Stationary}
        return kinds[self.kind](self.on_trees, **options)

    def residual(self, w: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """Return the residual of the condition: w − mapping, Jᵀr, or the gradient of the objective."""
        if self.kind == "mapping":
            return w - self.function(w, theta, np)
        slope = complex_step(lambda w: np.atleast_1d(self.function(w, theta, np)), w)
        return slope.T @ self.function(w, theta, np) if self.kind == "residuals" else slope[0]

    @functools.cached_property
    def solved(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the solution w, and dw/dθ as a matrix, by Newton's method and a dense solve in NumPy."""
        w, theta = flat(self.start), flat(self.theta)
        slopes = complex_step if self.kind == "mapping" else differences
        for _ in range(50):
            step = np.linalg.solve(slopes(lambda w: self.residual(w, theta), w), self.residual(w, theta))
            w = w - step
            if np.linalg.norm(step) <= 1e-14 * np.linalg.norm(w) + 1e-300:
                break
        along_w = slopes(lambda w: self.residual(w, theta), w)
        return w, -np.linalg.solve(along_w, slopes(lambda theta: self.residual(w, theta), theta))


def flat(tree: Any) -> np.ndarray:
    """Return the leaves of a pytree as one float64 vector."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)] or [np.zeros(0)])


def complex_step(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the Jacobian matrix of an analytic function, exact up to rounding."""
    size = np.maximum(np.abs(x), 1e-3) * 1e-30
    return np.stack([function(x + 1j * h * e).imag / h for h, e in zip(size, np.eye(x.size), strict=True)], axis=-1)


def differences(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """Return the Jacobian matrix by central differences of fourth order, with an error of about 1e-11."""
    columns = []
    for h, e in zip(1e-3 * np.maximum(np.abs(x), 1), np.eye(x.size), strict=True):
        near, far = (function(x + k * h * e) - function(x - k * h * e) for k in (1, 2))
        columns.append((8 * near - far) / (12 * h))
    return np.stack(columns, axis=-1)


RANDOM = np.random.default_rng(0)
MATRIX = RANDOM.normal(size=(4, 4))
TREE = {"a": np.full((1, 2), 0.5)}, np.full(2, 0.5)  # w of four unknowns
Y0 = np.array([1.0, -0.5, 2.0, 0.3])
ROBERTSON = np.array([0.04, 3e7, 1e4])  # the rates of Robertson's reaction, which differ by nine orders of magnitude
MIX = np.array([0.9, 2e-5, 0.1])
POINTS = np.linspace(0.0, 2.0, 6)
SYMMETRIC = MATRIX.T @ MATRIX + np.eye(4)


def network(w, theta, xp):
    first, bias, second, last = xp.split(theta, [8, 10, 18]) if xp is np else jnp.split(theta, [8, 10, 18])
    hidden = xp.log(1 + xp.exp(first.reshape(2, 4) @ w + bias))
    return 0.1 * (second.reshape(4, 2) @ hidden + last)


def heat(w, theta, xp):
    """Return θ times a Crank–Nicolson step for ∂y/∂t = (1 − y)·∂²y/∂x², which keeps the values at both ends."""
    y0 = np.linspace(-1, 1, 6) ** 2

    def slope(y):
        inner = (1 - y[1:-1]) * (y[2:] - 2 * y[1:-1] + y[:-2]) / 0.4**2
        return xp.concatenate([xp.zeros(1), inner, xp.zeros(1)])

    return theta[0] * (y0 + 0.01 * (slope(w) + slope(xp.asarray(y0))))


def linear_midpoint(form, y0):
    """Return the mapping of an implicit step for y' = My with M = θ, and its fixed point as a function of θ.

    ``form`` says what w is: the new value of the midpoint rule, or the slope or the increment of an implicit Euler
    step.
    """

    def mapping(w, theta, xp):
        matrix, step = theta.reshape(4, 4), 1 / 16
        if form == "value":
            return y0 + step * (matrix @ (0.5 * (y0 + w)))
        return matrix @ (y0 + step * w) if form == "slope" else step * (matrix @ (y0 + w))

    def exact(theta):
        matrix, eye = theta.reshape(4, 4), np.eye(4)
        if form == "value":
            return np.linalg.solve(eye - matrix / 32, (eye + matrix / 32) @ y0)
        return np.linalg.solve(eye - matrix / 16, matrix @ y0 / (1 if form == "slope" else 16))

    return mapping, exact


def robertson(form):
    """Return the mapping of :func:`linear_midpoint` for Robertson's reaction, with a step of 1e-8."""

    def mapping(w, theta, xp):
        def slope(y):
            first, second, third = theta[0] * y[0], theta[1] * y[1] ** 2, theta[2] * y[1] * y[2]
            return xp.stack([third - first, first - second - third, second])

        if form == "value":
            return MIX + 1e-8 * slope(0.5 * (MIX + w))
        return slope(MIX + 1e-8 * w) if form == "slope" else 1e-8 * slope(MIX + w)

    return mapping


def rosenbrock(w, theta, xp):
    return xp.stack([10 * (w[1] - w[0] ** 2), theta[0] - w[0]])


def chain(w, theta, xp):
    return xp.concatenate([100 * (w[1:] - w[:-1]), theta[0] - w[:-1]])


def variably_dimensioned(w, theta, xp):
    weighted = xp.sum(np.arange(1.0, 5.0) * (w - theta[0]))
    return xp.concatenate([w - theta[0], xp.stack([weighted, weighted**2])])


def trigonometric(w, theta, xp):
    return 3 - xp.sum(xp.cos(w)) + np.arange(1.0, 4.0) * (theta[0] - xp.cos(w)) - xp.sin(w)


def decay(w, theta, xp):
    return w[0] * xp.exp(-w[1] * POINTS) - theta


def fitted_network(w, theta, xp):
    """Return the errors of a network with two hidden units, followed by θ₁ times its weights w (weight decay)."""
    hidden = xp.tanh(POINTS[:, None] * w[:2] + w[2:4])
    return xp.concatenate([hidden @ w[4:6] + w[6] - xp.sin(theta[0] * POINTS), theta[1] * w])


def flat_bowl(w, theta, xp):
    return (1 + w**2) * (0.1 + theta**2)


def bowl(w, theta, xp):
    return w @ (theta.reshape(4, 4) @ w)


def quadratic(w, theta, xp):
    return w @ (theta[:4].reshape(2, 2) @ w) + theta[4:6] @ w + theta[6]


def himmelblau(w, theta, xp):
    return (w[0] ** 2 + w[1] - theta[0]) ** 2 + (w[0] + w[1] ** 2 - theta[1]) ** 2


def matyas(w, theta, xp):
    return theta[0] * (w[0] ** 2 + w[1] ** 2) - theta[1] * w[0] * w[1]


def beale(w, theta, xp):
    return xp.sum((theta - w[0] + w[0] * w[1] ** np.arange(1.0, 4.0)) ** 2)


def valley(w, theta, xp):
    return 100 * (w[1] - w[0] ** 2) ** 2 + (theta[0] - w[0]) ** 2


def _minimum_of_quadratic(theta):
    matrix = theta[:4].reshape(2, 2)
    return -np.linalg.solve(matrix + matrix.T, theta[4:6])


def _of_network():
    shapes = (2, 4), (2,), (4, 2), (4,)
    return tuple(RANDOM.normal(size=shape) for shape in shapes)


FORMS = ("value", "slope", "increment")
MAPPINGS = {
    "cosine": Situation("mapping", lambda w, theta, xp: xp.cos(theta[0] * w), TREE, np.array(1.0)),
    "exponential": Situation("mapping", lambda w, theta, xp: xp.exp(-theta[0] * w), TREE, np.array(1.0)),
    "network": Situation("mapping", network, TREE, _of_network()),
    "heat": Situation("mapping", heat, np.ones(6), np.array(0.9)),
    **{
        f"linear {form}": Situation("mapping", linear_midpoint(form, Y0)[0], TREE, MATRIX, linear_midpoint(form, Y0)[1])
        for form in FORMS
    },
    # The problem of Optimistix's own tests starts at rest, so its solution is zero for every matrix.
    "linear at rest": Situation("mapping", linear_midpoint("value", 0 * Y0)[0], TREE, MATRIX, lambda theta: 0 * Y0),
    **{
        f"robertson {form}": Situation(
            "mapping", robertson(form), (np.array([0.8, 1e-5]), {"b": np.array(0.2)}), tuple(ROBERTSON)
        )
        for form in FORMS
    },
}
RESIDUALS = {
    "rosenbrock": Situation(
        "residuals", rosenbrock, [np.array(1.5), np.array(1.5)], np.array(1.2), lambda theta: np.append(theta, theta**2)
    ),
    "chain": Situation(
        "residuals",
        chain,
        (np.full(2, 1.45), {"a": np.full((1, 3), 1.45)}, ()),
        np.array(1.0),
        lambda theta: theta[[0] * 5],
    ),
    "variably dimensioned": Situation(
        "residuals", variably_dimensioned, 1 - np.arange(1, 5) / 10, np.array(1.0), lambda theta: theta[[0] * 4]
    ),
    "trigonometric": Situation("residuals", trigonometric, (np.full(1, 0.1), {"a": np.full(2, 0.1)}), np.array(1.1)),
    "decay": Situation("residuals", decay, np.array([1.2, 0.8]), np.exp(-POINTS) + 0.1 * np.cos(5 * POINTS)),
    "fitted network": Situation(
        "residuals",
        fitted_network,
        {"kernel": np.array([1.0, 0.4]), "rest": (np.array([0.1, -0.9]), np.array([0.9, 0.7, 0.2]))},
        {"frequency": np.array(1.5), "decay": np.array(0.05)},
    ),
    "flat bowl": Situation(
        "residuals", flat_bowl, np.full(3, 0.05), np.array([0.5, 1.0, 1.5]), lambda theta: 0 * theta
    ),
}
OBJECTIVES = {
    "bowl": Situation("objective", bowl, TREE, SYMMETRIC, lambda theta: np.zeros(4)),
    "quadratic": Situation(
        "objective",
        quadratic,
        np.array([2.0, 3.0]),
        (np.array([[2.0, -1.0], [-1.0, 3.0]]), np.array([-100.0, 5.0]), np.array(100.0)),
        _minimum_of_quadratic,
    ),
    "himmelblau": Situation("objective", himmelblau, [np.array(2.8), np.array(2.2)], (np.array(11.0), np.array(7.0))),
    "matyas": Situation(
        "objective", matyas, [np.array(6.0), np.array(6.0)], (np.array(0.26), np.array(0.48)), lambda theta: np.zeros(2)
    ),
    "beale": Situation("objective", beale, np.array([2.95, 0.48]), np.array([1.5, 2.25, 2.625])),
    "valley": Situation(
        "objective",
        valley,
        {"x": np.array(0.9), "y": np.array(0.7)},
        np.array(1.1),
        lambda theta: np.append(theta, theta**2),
    ),
}
SITUATIONS = MAPPINGS | RESIDUALS | OBJECTIVES
