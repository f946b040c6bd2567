"""One point of a problem, looked at: what the implicit function theorem asks for, and whether it holds there."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify import oracles
from bilevel.verify.oracles import Flat, flatten
from bilevel.verify.tables import figure, table, wrapped

THETA = "θ in the condition"
LANCZOS = 40
"""Steps of Lanczos's method, each one product, where A is too large to be written out."""


@dataclass(frozen=True)
class Check:
    """One row of a report.

    Attributes:
        name: what was looked at.
        ok: whether it is as it should be.
        found: what was found, a phrase.
        remedy: what to do, a sentence; empty where nothing is wrong.
        value: the figure behind it, where there is one.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    value: float | None = None


@dataclass(frozen=True)
class ConditionReport:
    """What :func:`check_condition` found; ``report["symmetry"]`` is one row."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is."""
        return all(check.ok for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        rows = [(check.name, "ok" if check.ok else "FAILED", check.found) for check in self.checks]
        remedies = [wrapped(f"{check.name}: {check.remedy}") for check in self.checks if not check.ok]
        return "\n".join([table(("check", "", "found"), rows), *remedies])


def check_condition(
    problem: Problem, theta: PyTree, w: PyTree, data: PyTree, tol: float | None = None
) -> ConditionReport:
    """What the implicit function theorem needs, at one point, in float64.

    ==================  =====================================================================================
    leaves              no complex ones; integer ones are named, they get no gradient
    structure           F is a tree like w
    finite              θ, w, F, the outer value and its derivatives
    captured θ          no closure or global of the functions holds an array of θ, unseen by any derivative
    residual            ‖A⁻¹F‖ / (1 + ‖w‖), how far the solution is; ‖F‖ / (1 + ‖w‖) where A is large
    symmetry            |⟨u, Av⟩ − ⟨Au, v⟩| / (‖u‖‖Av‖) of random u, v against what is declared
    curvature           the extreme eigenvalues (for a general A singular values) of A; where A is large those that
                        Lanczos's method sees, which can disprove definiteness and never prove it
    θ in the condition  ∂F/∂θ ≠ 0, here or nearby: a θ that is only in the initial point has a zero hypergradient
    w in outer          ∂outer/∂w ≠ 0, here or nearby
    kinks               F and the derivatives of F and outer do not jump at this point
    ==================  =====================================================================================

    Args:
        problem: the condition and the outer function.
        theta, w, data: where; w is usually a solver's result.
        tol: how far the solution may be, relative to w; None for √eps of the dtype of w.

    Returns:
        a :class:`ConditionReport`, which prints as a table with a remedy for each row that failed.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import Root
        >>> shear = Root(lambda w, theta, data: jnp.array([[1.0, 5.0], [0.0, 1.0]]) @ w - theta, symmetric=True)
        >>> problem = Problem(shear, lambda w, theta, data: w @ w)
        >>> report = check_condition(problem, jnp.ones(2), jnp.array([-4.0, 1.0]), None)
        >>> report.ok, [check.name for check in report.checks if not check.ok]
        (False, ['symmetry'])
    """
    leaves = _leaves(theta, w, data)
    if not leaves.ok:
        return ConditionReport((leaves,))
    tol = oracles.eps_of(w) ** 0.5 if tol is None else tol
    captured = _captured(problem, theta)
    with oracles.double_precision():
        structure = _structure(problem.condition, theta, w, data)
        if not structure.ok:
            return ConditionReport((leaves, structure, captured))
        view = _View.of(problem, theta, w, data)
        finite = _finite(view, theta, w, data)
        if not finite.ok:
            return ConditionReport((leaves, structure, finite, captured))
        spectrum = _Spectrum.of(view, problem.condition.symmetric)
        symmetry = _symmetry(view, spectrum, problem.condition, tol)
        symmetric = problem.condition.symmetric and symmetry.ok
        rows = [_residual(view, spectrum, tol), symmetry]
        rows += _curvature(spectrum, problem.condition, symmetric, theta, data)
        rows += [_theta_used(view), _w_used(view), _kinks(view, tol)]
    return ConditionReport((leaves, structure, finite, captured, *rows))


@dataclass(frozen=True)
class _View:
    """The functions of a problem on flat vectors, compiled; ``w`` and ``theta`` are where they are looked at."""

    place: Flat
    point: Flat
    residual: Callable
    outer: Callable
    push: Callable
    """(w, θ, u, t) → Au + Bt."""
    transposed: Callable
    """(w, θ, u) → (Aᵀu, Bᵀu)."""
    outer_slopes: Callable
    """(w, θ) → (∂outer/∂w, ∂outer/∂θ)."""

    @staticmethod
    def of(problem, theta, w, data):
        theta, w, data = (oracles.as_double(part) for part in (theta, w, data))
        place, point = flatten(w, "w"), flatten(theta, "theta")

        def residual(w, theta):
            return flatten(problem.condition.residual(place.rebuild(w), point.rebuild(theta), data)).vector

        def outer(w, theta):
            value = problem.outer(place.rebuild(w), point.rebuild(theta), data)
            return value[0] if problem.has_aux else value  # type: ignore[index]

        return _View(
            place,
            point,
            jax.jit(residual),
            jax.jit(outer),
            jax.jit(lambda w, theta, u, t: jax.jvp(residual, (w, theta), (u, t))[1]),
            jax.jit(lambda w, theta, u: jax.vjp(residual, w, theta)[1](u)),
            jax.jit(jax.grad(outer, (0, 1))),
        )

    @property
    def w(self):
        return self.place.vector

    @property
    def theta(self):
        return self.point.vector

    def product(self, u):
        """Au, here."""
        return self.push(self.w, self.theta, u, jnp.zeros_like(self.theta))

    def random(self, seed, like):
        return jnp.asarray(np.random.default_rng(seed).normal(size=like.shape))


# --- Leaves and functions ------------------------------------------------------------------------------------------


def _named_leaves(**trees):
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            yield f"{name}{jax.tree_util.keystr(path)}", jnp.asarray(leaf)


def _leaves(theta, w, data):
    complex_ones, integers = [], []
    for name, leaf in _named_leaves(theta=theta, w=w, data=data):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            complex_ones.append(name)
        elif not jnp.issubdtype(leaf.dtype, jnp.inexact) and not name.startswith("data"):
            integers.append(name)
    if complex_ones:
        remedy = "split them into real and imaginary parts: hypergradients are of real variables."
        return Check("leaves", False, f"complex: {', '.join(complex_ones)}", remedy)
    return Check("leaves", True, f"without a gradient, not float: {', '.join(integers)}" if integers else "real")


def _structure(condition, theta, w, data):
    theta, w, data = (oracles.as_double(part) for part in (theta, w, data))
    residual = jax.eval_shape(condition.residual, w, theta, data)
    got, wanted = ((jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]) for tree in (residual, w))
    if got == wanted:
        return Check("structure", True, "the residual is a tree like w")
    found = f"the residual is no tree like w: got {got}, expected {wanted}"
    return Check("structure", False, found, "return one number of F for each of w, in a tree like w.")


def _finite(view, theta, w, data):
    """Data that are not finite are named where they do harm: an infinity may be a bound."""
    residual = view.residual(view.w, view.theta)
    slopes = view.outer_slopes(view.w, view.theta)
    back = view.transposed(view.w, view.theta, residual)
    outer = view.outer(view.w, view.theta)
    names = ("outer", "∂outer/∂w", "∂outer/∂θ", "(∂F/∂w)ᵀF", "(∂F/∂θ)ᵀF")
    values = dict(zip(names, (outer, *slopes, *back), strict=True))
    wrong = list(_not_finite(theta=theta, w=w))
    broken = np.flatnonzero(~np.isfinite(residual))
    broken = [f"F ({residual[broken[0]]} at {view.place.labels[broken[0]]})"] if broken.size else []
    broken += [name for name, value in values.items() if not bool(jnp.isfinite(value).all())]
    wrong += [*_not_finite(data=data), *broken] if broken else []
    if not wrong:
        return Check("finite", True, "all values and derivatives")
    remedy = "look for a division by zero, a log or a root at zero (its derivative too), or data that is not finite."
    return Check("finite", False, f"NaN or infinite: {', '.join(wrong)}", remedy)


def _not_finite(**trees):
    for name, leaf in _named_leaves(**trees):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
            yield name


def _captured(problem, theta):
    leaves = {
        id(leaf): f"theta{jax.tree_util.keystr(path)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(theta)
        if isinstance(leaf, jax.Array | np.ndarray)
    }
    found = sorted({leaves[id(value)] for value in _held((problem.condition, problem.outer)) if id(value) in leaves})
    if not found:
        return Check("captured θ", True, "none")
    remedy = "use the theta argument of your functions instead: what they capture is a constant to every derivative."
    return Check("captured θ", False, f"held by a closure or as a global: {', '.join(found)}", remedy)


def _held(root) -> Iterator[Any]:
    """Everything that functions hold: closure cells, defaults, globals they name, fields, containers."""
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, functools.partial):
            todo += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, dict):
            todo += list(value.values())
        elif isinstance(value, list | tuple):
            todo += list(value)
        elif isinstance(value, type):
            continue
        elif dataclasses.is_dataclass(value):
            todo += [getattr(value, field.name) for field in dataclasses.fields(value)]
        elif hasattr(value, "__wrapped__"):
            todo.append(value.__wrapped__)
        elif hasattr(value, "__code__"):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            arrays = [value.__globals__.get(name) for name in value.__code__.co_names]
            todo += cells + [entry for entry in arrays if isinstance(entry, jax.Array | np.ndarray | dict | tuple)]


def _is_filled(cell):
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


# --- A -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spectrum:
    """What is known of A: written out, or by Lanczos's method on its symmetric part.

    Attributes:
        matrix: A, or None where it is too large.
        low, high: extreme eigenvalues of the symmetric part, or Ritz values of it.
        weakest, strongest: extreme singular values; None where A is too large.
    """

    matrix: np.ndarray | None
    low: float
    high: float
    weakest: float | None
    strongest: float | None

    @staticmethod
    def of(view, symmetric):
        if view.w.size <= oracles.DENSE:
            matrix = np.asarray(jax.jit(jax.jacfwd(view.residual))(view.w, view.theta))
            values = np.linalg.eigvalsh((matrix + matrix.T) / 2) if matrix.size else np.ones(1)
            singular = np.linalg.svd(matrix, compute_uv=False) if matrix.size else np.ones(1)
            return _Spectrum(matrix, float(values[0]), float(values[-1]), float(singular[-1]), float(singular[0]))

        def product(u):
            forward = view.product(u)
            return forward if symmetric else (forward + view.transposed(view.w, view.theta, u)[0]) / 2

        ritz = lanczos(product, view.random(0, view.w), LANCZOS)
        return _Spectrum(None, float(ritz[0]), float(ritz[-1]), None, None)


def lanczos(product: Callable, start: jax.Array, steps: int) -> np.ndarray:
    """Ritz values of a symmetric operator, ascending: within its spectrum, and soon near its ends.

    Every new vector is made orthogonal to all before it, twice: without that, copies of an eigenvalue appear.

    Example:
        >>> ritz = lanczos(lambda u: jnp.array([1.0, 2.0, 4.0]) * u, jnp.ones(3), steps=3)
        >>> [round(float(value), 3) for value in ritz]
        [1.0, 2.0, 4.0]
    """
    basis, diagonal, beside = [np.asarray(start) / np.linalg.norm(start)], [], []
    for _ in range(min(steps, start.size)):
        new = np.asarray(product(jnp.asarray(basis[-1])))
        size = np.linalg.norm(new)
        diagonal.append(basis[-1] @ new)
        known = np.stack(basis)
        for _ in range(2):
            new = new - known.T @ (known @ new)
        beside.append(np.linalg.norm(new))
        if beside[-1] <= 1e-10 * size:  # an invariant subspace: the rest is rounding
            break
        basis.append(new / beside[-1])
    off = np.diag(beside[: len(diagonal) - 1], 1)
    return np.linalg.eigvalsh(np.diag(diagonal) + off + off.T)


def _residual(view, spectrum, tol):
    residual = np.asarray(view.residual(view.w, view.theta))
    size, reach = float(np.linalg.norm(residual)), 1 + float(np.linalg.norm(view.w))
    distance, what = size / reach, "‖F‖ / (1 + ‖w‖)"
    if spectrum.matrix is not None and spectrum.weakest > 0:
        distance = float(np.linalg.norm(np.linalg.solve(spectrum.matrix, residual))) / reach
        what = "‖A⁻¹F‖ / (1 + ‖w‖)"
    remedy = f"solve the inner problem to {figure(tol)} there (more steps, a smaller tol): the hypergradient is off by "
    remedy += "a multiple of ‖F‖."
    found = f"‖F‖ = {figure(size)}; {what} = {figure(distance)}"
    found += "" if distance <= tol else f", above {figure(tol)}"
    return Check("residual", distance <= tol, found, remedy, distance)


def _symmetry(view, spectrum, condition, tol):
    worst = 0.0
    for seed in range(3):
        u, v = view.random(2 * seed + 1, view.w), view.random(2 * seed + 2, view.w)
        forward, back = view.product(v), view.transposed(view.w, view.theta, v)[0]
        size = float(jnp.linalg.norm(u) * jnp.maximum(jnp.linalg.norm(forward), jnp.linalg.norm(back)))
        worst = max(worst, abs(float(u @ forward - u @ back)) / size if size > 0 else 0.0)
    symmetric = worst <= tol
    seen = f"|⟨u, Av⟩ − ⟨Au, v⟩| = {figure(worst)} of ‖u‖‖Av‖"
    if condition.symmetric and not symmetric:
        found = f"declared symmetric and is not: {_most_apart(view, spectrum.matrix) or seen}"
    else:
        found = f"{seen}; declared {'' if condition.symmetric else 'not '}symmetric"
        found += ", though it seems to be" if symmetric and not condition.symmetric else ""
    remedy = "declare the condition with symmetric=False (a Root) and solve by NormalCG, GMRES or LU, or mend F."
    return Check("symmetry", symmetric or not condition.symmetric, found, remedy, worst)


def _most_apart(view, matrix):
    """The two entries of A that should be equal and differ most; None where A is not written out."""
    if matrix is None:
        return None
    apart = np.abs(matrix - matrix.T)
    i, j = sorted(np.unravel_index(apart.argmax(), apart.shape))
    row, column = view.place.labels[i], view.place.labels[j]
    return f"∂F/∂w is {matrix[i, j]:.6} at ({row}, {column}) and {matrix[j, i]:.6} at ({column}, {row})"


def _curvature(spectrum, condition, symmetric, theta, data):
    exact = spectrum.matrix is not None
    rounding = oracles.EPS * max(spectrum.strongest or 0.0, abs(spectrum.low), abs(spectrum.high))
    rounding *= len(spectrum.matrix) if exact else 1e3
    found = f"eigenvalues {figure(spectrum.low)} to {figure(spectrum.high)}"
    if not symmetric:
        found += " of the symmetric part"
        found += f"; singular values {figure(spectrum.weakest)} to {figure(spectrum.strongest)}" if exact else ""
    found += "" if exact else f", seen by Lanczos's method in {LANCZOS} steps: there may be smaller ones"
    claims_definite = symmetric or condition.positive_definite
    ok, remedy = True, ""
    if exact and spectrum.weakest <= rounding:
        ok, remedy = False, "A is singular: add a ridge or a strongly convex term to the inner problem."
    elif claims_definite and spectrum.low <= (0.0 if condition.positive_definite else -rounding):
        ok = False
        if condition.positive_definite:
            found = f"declared positive definite, and ⟨u, Au⟩ = {figure(spectrum.low)}‖u‖² for a u: {found}"
        remedy = (
            f"A is not positive definite, so that CG does not apply and w is no minimum: increase λ by more than "
            f"{figure(-spectrum.low)}, solve the inner problem further, or use LU."
        )
    rows = [Check("curvature", ok, found, remedy, spectrum.low)]
    if condition.strong_convexity is not None:
        declared = condition.strong_convexity
        mu = float(declared(theta, data) if callable(declared) else declared)  # type: ignore[arg-type]
        holds = spectrum.low >= mu * (1 - 1e-6) - rounding
        found = f"declared {figure(mu)}; the smallest eigenvalue seen is {figure(spectrum.low)}"
        rows.append(Check("strong convexity", holds, found, f"declare at most {figure(spectrum.low)}, or none.", mu))
    return rows


# --- Dependence ----------------------------------------------------------------------------------------------------


def _theta_used(view):
    """Whether F and outer depend on each leaf of θ, by vjps at θ and at random points near it and far from it."""

    def dependence(theta, w):
        back = view.transposed(w, theta, view.random(8, view.w))[1], view.outer_slopes(w, theta)[1]
        return [np.where(np.isfinite(part), np.abs(part), 1.0) for part in back]

    shift_theta = (1 + jnp.abs(view.theta)) * view.random(7, view.theta)
    shift_w = (1 + jnp.abs(view.w)) * view.random(6, view.w)
    points = [(view.theta + size * shift_theta, view.w + size * shift_w) for size in (0.0, 1e-2, 1.0)]
    through, direct = (np.stack(part) for part in zip(*(dependence(*point) for point in points), strict=True))
    remedy = (
        "F does not depend on it, so its implicit derivative is zero: if it enters by the initial point, use "
        "Unrolled with init as a function of θ, or a Proximal condition; if by a closure, pass it as theta."
    )
    if not through.any():
        return Check(THETA, False, "∂F/∂θ = 0: θ is nowhere but in the initial point, or unused", remedy)
    used = np.atleast_1d((through + direct).any(axis=0)).tolist()
    unused = sorted(
        set(view.point.leaves) - {leaf for leaf, there in zip(view.point.leaves, used, strict=True) if there}
    )
    if unused:
        return Check(THETA, False, f"neither F nor outer depends on {', '.join(unused)}", remedy)
    here = "∂F/∂θ is not zero" if through[0].any() else "∂F/∂θ is zero at this θ, and not elsewhere"
    return Check(THETA, True, here)


def _w_used(view):
    here = np.asarray(view.outer_slopes(view.w, view.theta)[0])
    near = view.w + 1e-2 * (1 + jnp.abs(view.w)) * view.random(9, view.w)
    there = np.asarray(view.outer_slopes(near, view.theta)[0])
    if here.any():
        return Check("w in outer", True, "∂outer/∂w is not zero")
    if there.any():
        return Check("w in outer", True, "∂outer/∂w is zero at this w, and not nearby")
    remedy = "the outer function ignores the inner solution, so the implicit term is zero: use its w argument."
    return Check("w in outer", False, "∂outer/∂w = 0", remedy)


# --- Kinks ---------------------------------------------------------------------------------------------------------

LADDER = tuple(10.0**-k for k in range(1, 9))
"""Distances, relative to 1 + ‖(w, θ)‖, at which derivatives are compared across the point."""


def _kinks(view, tol):
    """The smallest distance within which F or a derivative of F or outer jumps along random lines through (w, θ).

    What is smooth closes up like the distance, by a factor of ten from one rung to the next; a jump does not.
    """
    reach = 1 + float(jnp.linalg.norm(jnp.concatenate([view.w, view.theta])))
    closest = math.inf
    for seed in range(2):
        d, e = view.random(20 + seed, view.w), view.random(30 + seed, view.theta)
        size = float(jnp.linalg.norm(jnp.concatenate([d, e])))
        closest = min(closest, _closest_jump(view, d / size, e / size, reach))
    margin = closest * reach
    if not math.isfinite(margin):
        return Check("kinks", True, f"none found within {figure(LADDER[0] * reach)}", value=math.inf)
    remedy = (
        "the derivative here is that of one side only (ReLU, max, abs, a projection at its bound): move the point, or "
        "smooth the function (softplus for ReLU)."
    )
    at_the_point = closest <= max(tol, LADDER[-2])
    found = "at the point itself" if at_the_point else "near"
    return Check("kinks", not at_the_point, f"{found}, within {figure(margin)}", remedy, margin)


def _closest_jump(view, d, e, reach):
    def probes(t):
        w, theta = view.w + t * d, view.theta + t * e
        parts = (view.residual(w, theta), view.push(w, theta, d, e), *view.outer_slopes(w, theta))
        return [np.asarray(part) for part in parts]

    gaps = []
    for rung in LADDER:
        ahead, behind = probes(rung * reach), probes(-rung * reach)
        gaps.append([np.linalg.norm(a - b) for a, b in zip(ahead, behind, strict=True)])
    floor = [1e4 * oracles.EPS * (1 + np.linalg.norm(part)) for part in probes(0.0)]
    closest = math.inf
    for larger, gap, rung in zip(gaps, gaps[1:], LADDER[1:], strict=False):
        if any(g > 0.5 * before and g > least for g, before, least in zip(gap, larger, floor, strict=True)):
            closest = rung
    return closest
