"""An assertion on a condition: that it is what it says of itself."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import oracles
from bilevel.conditions import Condition, Problem
from bilevel.testing.assertions import Check, Record, judge
from bilevel.types import PyTree


def assert_condition(
    problem: Problem | Condition,
    theta: PyTree,
    w: PyTree,
    data: PyTree,
    solved: bool = True,
    rtol: float = 1e-5,
    record: Record | None = None,
) -> None:
    """Assert that a condition is what it says of itself at w: finite, solved, symmetric, positive definite.

    A = ∂F/∂w is written out up to 1000 unknowns; beyond, eight random directions stand for it, which can disprove
    symmetry and definiteness, and prove neither.

    Args:
        problem: a condition, or a problem that has one.
        theta: outer variables.
        w: where to look, a tree like the inner variables.
        data: of the problem.
        solved: whether w is meant to be the solution: Newton's step from it, ‖A⁻¹F‖, is then at most
            ``rtol·(1 + ‖w‖)``; beyond 1000 unknowns ‖F‖ is.
        rtol: also of ‖A‖, what symmetry and definiteness may be missed by.
        record: called with each :class:`Check`, before it is asserted.

    Raises:
        AssertionError: naming what was declared, the coordinates and the numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import bilevel as bl
        >>> twisted = bl.Root(lambda w, theta, data: jnp.array([[1.0, 5.0], [0.0, 1.0]]) @ w - theta, symmetric=True)
        >>> assert_condition(twisted, jnp.zeros(2), jnp.zeros(2), None)
        Traceback (most recent call last):
          ...
        AssertionError: Root is declared symmetric and is not: ∂F/∂w is 5.0 at (w[0], w[1]) and 0.0 at (w[1], w[0])
    """
    __tracebackhide__ = True
    condition = problem.condition if isinstance(problem, Problem) else problem
    for oracle, (error, message) in _condition_checks(condition, theta, w, data, solved, rtol):
        judge(Check(type(condition).__name__, "", oracle, float(error), rtol, message), record)


def _condition_checks(condition, theta, w, data, solved, rtol):
    """(what is asked, (by how much it is missed, why it fails or "")), one question after the other."""
    name = type(condition).__name__
    with oracles.double_precision():
        theta, w, data = (oracles.as_double(tree) for tree in (theta, w, data))
        residual = condition.residual(w, theta, data)
        got, wanted = jax.tree.structure(residual), jax.tree.structure(w)
        if got != wanted or jax.tree.map(jnp.shape, residual) != jax.tree.map(jnp.shape, w):
            yield "structure", (np.inf, f"{name}: the residual is no tree like w: got {got}, expected {wanted}")
            return
        place = oracles.flatten(w, "w")
        f, basis = np.asarray(oracles.flatten(residual).vector), _basis(place.vector.size)
        matrix = _products(condition, place, theta, data, basis)
    labels = place.labels if len(basis) == place.vector.size else [f"direction {i}" for i in range(len(basis))]
    yield "finite", _finite(name, f, place.labels, matrix)
    if solved:
        yield "solved", _solved(name, f, np.asarray(place.vector), matrix, rtol)
    if condition.symmetric:
        yield "symmetric", _symmetric(name, matrix, labels, rtol)
    mu = condition.strong_convexity
    if callable(mu):
        mu = float(mu(theta, data))  # type: ignore[arg-type]  # an array of one number
    if condition.positive_definite or mu is not None:
        yield "positive definite", _definite(name, matrix, mu, rtol)


def _finite(name, f, labels, matrix):
    bad = np.flatnonzero(~np.isfinite(f))
    if bad.size:
        return np.inf, f"{name}: the residual at {labels[bad[0]]} is {f[bad[0]]}: check the data and w"
    if not np.isfinite(matrix).all():
        return np.inf, f"{name}: the residual is finite and its derivative ∂F/∂w is not: a root or a norm at zero?"
    return 0.0, ""


def _solved(name, f, w, matrix, rtol):
    size = np.linalg.norm(f)
    whole = len(matrix) == f.size and np.linalg.cond(matrix) * oracles.EPS < 1
    step = np.linalg.norm(np.linalg.solve(matrix, f)) if whole else size
    error = step / (1 + np.linalg.norm(w))
    if error <= rtol:
        return error, ""
    what = "Newton's step from w is" if whole else "relative to w that is"
    return error, f"{name} is not solved at w: ‖F‖ = {size:.3g}, and {what} {error:.3g} of it, above rtol {rtol:.3g}"


def _symmetric(name, matrix, labels, rtol):
    apart = np.abs(matrix - matrix.T)
    error = apart.max(initial=0.0) / max(np.abs(matrix).max(initial=0.0), np.finfo(float).tiny)
    if error <= rtol:
        return error, ""
    i, j = np.unravel_index(apart.argmax(), apart.shape)
    i, j = min(i, j), max(i, j)
    return error, (
        f"{name} is declared symmetric and is not: ∂F/∂w is {matrix[i, j]:.6} at ({labels[i]}, {labels[j]}) "
        f"and {matrix[j, i]:.6} at ({labels[j]}, {labels[i]})"
    )


def _definite(name, matrix, mu, rtol):
    smallest = np.linalg.eigvalsh(0.5 * (matrix + matrix.T)).min(initial=np.inf)
    slack = rtol * np.abs(matrix).max(initial=0.0)
    if mu is not None:
        missing = mu - smallest
        message = f"{name} declares a strong_convexity of {mu:.6}, and the smallest curvature found is {smallest:.6}"
        return max(missing, 0.0) / mu, message if missing > slack else ""
    message = f"{name} is declared positive definite, and has a direction u with ⟨u, (∂F/∂w)u⟩ = {smallest:.3g}‖u‖²"
    return max(-smallest, 0.0), message if smallest <= 0 else ""


def _basis(entries):
    return np.eye(entries) if entries <= oracles.DENSE else oracles.random_directions(entries, oracles.DIRECTIONS)


def _products(condition, place, theta, data, basis):
    """basis·A·basisᵀ, one tangent for each row."""

    def residual(vector):
        return oracles.flatten(condition.residual(place.rebuild(vector), theta, data)).vector

    product = jax.linearize(residual, place.vector)[1]
    rows = jnp.asarray(basis)
    return np.asarray(jax.jit(lambda rows: rows @ jax.lax.map(product, rows).T)(rows))
