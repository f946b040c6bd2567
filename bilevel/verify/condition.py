"""Check at one point whether the assumptions of the implicit function theorem hold."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.notebook import html_table
from bilevel.problem import Problem
from bilevel.types import PyTree
from bilevel.verify import kinks
from bilevel.verify.captured import captured_leaves
from bilevel.verify.jacobian import LANCZOS_STEPS, Jacobian
from bilevel.verify.local_problem import LocalProblem, random_like
from bilevel.verify.precision import EPS, as_double, double_precision, eps_of
from bilevel.verify.programs import kept
from bilevel.verify.tables import figure, table, wrapped

THETA_ROW = "θ in the condition"


@dataclass(frozen=True)
class Check:
    """The result of one check, a row of a :class:`ConditionReport`.

    Attributes:
        name: what was checked, such as ``residual`` or ``symmetry``.
        ok: whether the check passed.
        found: a phrase with the measured numbers or the names of the faulty leaves.
        remedy: what to do about a failure. Some rows that passed have a remedy too, which is not printed.
        value: the number that was compared with a limit, or the limit itself for ``strong convexity``; None for a check
            without a number.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    value: float | None = None


@dataclass(frozen=True)
class ConditionReport:
    """The result of :func:`check_condition`, which prints as a table.

    ``report["symmetry"]`` returns one row. A row is missing, and raises a KeyError, if the check does not apply, or if
    an earlier check failed without which it cannot be made.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if every check passed."""
        return all(check.ok for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"the report has no row {name!r}: it has {', '.join(check.name for check in self.checks)}")

    def __str__(self) -> str:
        return "\n".join([table(_HEADER, self._rows()), *map(wrapped, self._remedies())])

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows(), self._remedies())

    def _rows(self):
        return [(check.name, "ok" if check.ok else "FAILED", check.found) for check in self.checks]

    def _remedies(self):
        return [f"{check.name}: {check.remedy}" for check in self.checks if not check.ok]


_HEADER = ("check", "", "found")


def check_condition(
    problem: Problem, theta: PyTree, w: PyTree, data: PyTree, tol: float | None = None
) -> ConditionReport:
    """Check the assumptions of the implicit function theorem at one point, in float64.

    F is the residual of the condition, and A = ∂F/∂w. The rows of the report are:

    ==================  =====================================================================================
    leaves              no leaf is complex; integer leaves of θ and w are named, because they get no gradient
    structure           F is a tree like w
    finite              θ, w, F, the outer value and the first derivatives are finite
    captured θ          no closure or global of the functions holds an array of θ. Every derivative would treat that
                        array as a constant
    residual            ‖A⁻¹F‖ / (1 + ‖w‖), an estimate of the relative distance to the solution, is at most
                        ``tol``. With more than 1000 unknowns or a singular A, ‖F‖ replaces ‖A⁻¹F‖
    symmetry            |⟨u, Av⟩ − ⟨Au, v⟩| ≤ ``tol``·‖u‖·max(‖Av‖, ‖Aᵀv‖) for three random pairs u, v. The check
                        can fail only if A is declared symmetric
    curvature           A is not singular. Its symmetric part is positive definite if A is declared so, and has no
                        negative eigenvalue if A is declared symmetric. With more than 1000 unknowns only the
                        eigenvalues of the symmetric part are estimated, by Lanczos's method, which can disprove
                        definiteness but never prove it
    strong convexity    the smallest eigenvalue is at least the declared μ; without a declaration there is no row
    θ in the condition  ∂F/∂θ is nonzero at the point or at one of two random points: a θ that enters only the
                        initial point has a zero hypergradient. Each leaf of θ enters F or outer
    w in outer          ∂outer/∂w is nonzero at the point or at a random point near it
    kinks               along two random lines, neither F nor a first derivative of F or outer jumps within
                        max(``tol``, 1e-7)·(1 + ‖(w, θ)‖) of the point
    ==================  =====================================================================================

    If ``leaves``, ``structure`` or ``finite`` fails, the checks that depend on it are left out. A further call with the
    same problem and the same shapes compiles nothing.

    Args:
        problem: the condition and the outer function.
        theta, w, data: the point; w is usually a solver's result.
        tol: the largest allowed distance of w from the solution, relative to 1 + ‖w‖; also the tolerance of the rows
            ``symmetry`` and ``kinks``. None means √eps of the dtype of w.

    Returns:
        A :class:`ConditionReport`. It prints as a table, with a remedy for each row that failed.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import Root
        >>> shear = Root(lambda w, theta, data: jnp.array([[1.0, 5.0], [0.0, 1.0]]) @ w - theta, symmetric=True)
        >>> problem = Problem(shear, lambda w, theta, data: w @ w)
        >>> report = check_condition(problem, jnp.ones(2), jnp.array([-4.0, 1.0]), None)
        >>> report.ok, [check.name for check in report.checks if not check.ok]
        (False, ['symmetry'])
    """
    captured = _check_captured(problem, theta)  # compares objects, so it needs θ before the conversion to arrays
    theta, w, data = tree.arrays(tree.numbers_as_floats(theta), "theta"), tree.arrays(w, "w"), tree.arrays(data, "data")
    leaves = _check_leaves(theta, w, data)
    if not leaves.ok:
        return ConditionReport((leaves,))
    tol = eps_of(w) ** 0.5 if tol is None else tol
    with double_precision():
        structure = _check_structure(problem.condition, theta, w, data)
        if not structure.ok:
            return ConditionReport((leaves, structure, captured))
        local = LocalProblem.at(problem, theta, w, data)
        finite = _check_finite(local, theta, w, data)
        if not finite.ok:
            return ConditionReport((leaves, structure, finite, captured))
        jacobian = Jacobian.at(local, problem.condition.symmetric)
        symmetry = _check_symmetry(local, jacobian, problem.condition, tol)
        symmetric = problem.condition.symmetric and symmetry.ok
        rows = [_check_residual(local, jacobian, tol), symmetry]
        rows.append(_check_curvature(jacobian, problem.condition, symmetric))
        rows += _check_strong_convexity(jacobian, problem.condition, theta, data)
        rows += [_check_theta_is_used(local), _check_w_is_used(local), _check_kinks(local, tol)]
    return ConditionReport((leaves, structure, finite, captured, *rows))


# --- Leaves and functions ------------------------------------------------------------------------------------------


def _named_leaves(**variables):
    for name, part in variables.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(part):
            yield f"{name}{jax.tree_util.keystr(path)}", jnp.asarray(leaf)


def _check_leaves(theta, w, data):
    complex_leaves, not_float = [], []
    for name, leaf in _named_leaves(theta=theta, w=w, data=data):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            complex_leaves.append(name)
        elif not jnp.issubdtype(leaf.dtype, jnp.inexact) and not name.startswith("data"):
            not_float.append(name)
    if complex_leaves:
        remedy = "split them into real and imaginary parts: hypergradients are defined for real variables."
        return Check("leaves", False, f"complex: {', '.join(complex_leaves)}", remedy)
    return Check("leaves", True, f"not float, so without a gradient: {', '.join(not_float)}" if not_float else "real")


def _check_structure(condition, theta, w, data):
    w, *rest = (as_double(part) for part in (w, theta, data))
    leaves, structure = jax.tree.flatten((w, *rest))
    try:
        got = _form_of_residual(condition, structure, tuple(map(jax.typeof, leaves)))
    except ValueError as error:
        return Check("structure", False, str(error), "return one entry of F for each entry of w, in a tree like w.")
    wanted = jax.tree.structure(w), tree.shapes(w)
    if got == wanted:
        return Check("structure", True, "the residual is a tree like w")
    found = f"the residual is not a tree like w: got {got[0]} of shapes {got[1]}, expected {wanted[0]} of {wanted[1]}"
    return Check("structure", False, found, "return one entry of F for each entry of w, in a tree like w.")


@kept
def _form_of_residual(condition, structure, types):
    """Return the structure of F and its shapes, for arguments (w, θ, data) of this structure and these types."""
    structures = []

    # Flat lists, because eval_shape would put shapes in place of arrays into a tree, which a user's class may refuse.
    def flat_residual(*leaves):
        leaves, structure_of_residual = jax.tree.flatten(condition.residual(*jax.tree.unflatten(structure, leaves)))
        structures.append(structure_of_residual)
        return leaves

    shapes = [leaf.shape for leaf in jax.eval_shape(flat_residual, *types)]
    return structures[-1], shapes


def _check_finite(local, theta, w, data):
    """Check that θ, w, F, the outer value and the first derivatives are finite.

    The derivatives of F enter as (∂F/∂w)ᵀF and (∂F/∂θ)ᵀF. Data may hold an infinity on purpose, such as a bound, so a
    leaf of the data is named only if a value or a derivative is not finite.
    """
    residual = local.residual(local.w, local.theta)
    outer_gradient = local.outer_gradient(local.w, local.theta)
    pulled_back = local.vjp(local.w, local.theta, residual)
    outer = local.outer(local.w, local.theta)
    names = ("outer", "∂outer/∂w", "∂outer/∂θ", "(∂F/∂w)ᵀF", "(∂F/∂θ)ᵀF")
    values = dict(zip(names, (outer, *outer_gradient, *pulled_back), strict=True))
    wrong = list(_not_finite(theta=theta, w=w))
    entries = np.flatnonzero(~np.isfinite(residual))
    broken = [f"F ({residual[entries[0]]} at {local.flat_w.labels[entries[0]]})"] if entries.size else []
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


def _check_captured(problem, theta):
    captured = captured_leaves(problem, theta)
    if not captured:
        return Check("captured θ", True, "none")
    remedy = "use the theta argument of your functions instead: every derivative treats a captured array as a constant."
    return Check("captured θ", False, f"held by a closure or as a global: {', '.join(captured)}", remedy)


# --- The Jacobian A ------------------------------------------------------------------------------------------------


def _check_residual(local, jacobian, tol):
    residual = np.asarray(local.residual(local.w, local.theta))
    size, scale = float(np.linalg.norm(residual)), 1 + float(np.linalg.norm(local.w))
    distance, formula = size / scale, "‖F‖ / (1 + ‖w‖)"
    if jacobian.matrix is not None and jacobian.smallest_singular > 0:
        distance = float(np.linalg.norm(np.linalg.solve(jacobian.matrix, residual))) / scale
        formula = "‖A⁻¹F‖ / (1 + ‖w‖)"
    remedy = (
        f"solve the inner problem until {formula} is at most {figure(tol)} (more steps, a smaller tol): the error of "
        "the hypergradient is proportional to ‖F‖."
    )
    found = f"‖F‖ = {figure(size)}; {formula} = {figure(distance)}"
    found += "" if distance <= tol else f", above {figure(tol)}"
    return Check("residual", distance <= tol, found, remedy, distance)


def _check_symmetry(local, jacobian, condition, tol):
    worst = 0.0
    for seed in range(3):
        u, v = random_like(local.w, 2 * seed + 1), random_like(local.w, 2 * seed + 2)
        forward, back = local.product(v), local.vjp(local.w, local.theta, v)[0]
        size = float(jnp.linalg.norm(u) * jnp.maximum(jnp.linalg.norm(forward), jnp.linalg.norm(back)))
        worst = max(worst, abs(float(u @ forward - u @ back)) / size if size > 0 else 0.0)
    symmetric = worst <= tol
    measured = f"|⟨u, Av⟩ − ⟨Au, v⟩| = {figure(worst)}·‖u‖·max(‖Av‖, ‖Aᵀv‖)"
    if condition.symmetric and not symmetric:
        found = f"declared symmetric and is not: {_asymmetric_entries(local, jacobian) or measured}"
    else:
        found = f"{measured}; declared {'' if condition.symmetric else 'not '}symmetric"
        found += ", though it seems to be" if symmetric and not condition.symmetric else ""
    remedy = "declare the condition with symmetric=False (a Root) and solve by NormalCG, GMRES or LU, or correct F."
    return Check("symmetry", symmetric or not condition.symmetric, found, remedy, worst)


def _asymmetric_entries(local, jacobian):
    """Describe the two entries Aᵢⱼ and Aⱼᵢ that differ most from each other; None if A is not written out."""
    indices = jacobian.largest_asymmetry()
    if indices is None:
        return None
    (i, j), matrix = indices, jacobian.matrix
    row, column = local.flat_w.labels[i], local.flat_w.labels[j]
    return f"∂F/∂w is {matrix[i, j]:.6} at ({row}, {column}) and {matrix[j, i]:.6} at ({column}, {row})"


def _rounding(jacobian):
    """Return how far rounding may move an eigenvalue of A: n·eps times the norm of A, with n = 1000 for Ritz values."""
    size = max(jacobian.largest_singular or 0.0, abs(jacobian.low), abs(jacobian.high))
    return EPS * size * (len(jacobian.matrix) if jacobian.matrix is not None else 1e3)


def _check_curvature(jacobian, condition, symmetric):
    written_out = jacobian.matrix is not None
    rounding = _rounding(jacobian)
    found = f"eigenvalues {figure(jacobian.low)} to {figure(jacobian.high)}"
    if not symmetric:
        found += " of the symmetric part"
        if written_out:
            found += f"; singular values {figure(jacobian.smallest_singular)} to {figure(jacobian.largest_singular)}"
    if not written_out:
        found += f", estimated by {LANCZOS_STEPS} steps of Lanczos's method: there may be smaller ones"
    if written_out and jacobian.smallest_singular <= rounding:
        remedy = "A is singular: add a ridge or a strongly convex term to the inner problem."
        return Check("curvature", False, found, remedy, jacobian.low)
    must_be_definite = symmetric or condition.positive_definite
    if not must_be_definite or jacobian.low > (0.0 if condition.positive_definite else -rounding):
        return Check("curvature", True, found, value=jacobian.low)
    if condition.positive_definite:
        found = f"declared positive definite, but ⟨u, Au⟩ = {figure(jacobian.low)}‖u‖² for some u: {found}"
    remedy = (
        f"A is not positive definite, so CG does not apply and w is not a minimum: add a ridge of more than "
        f"{figure(-jacobian.low)} to the inner problem (to λ of a Proximal), solve it further, or use LU."
    )
    return Check("curvature", False, found, remedy, jacobian.low)


def _check_strong_convexity(jacobian, condition, theta, data):
    if condition.strong_convexity is None:
        return []
    declared = condition.strong_convexity
    mu = float(declared(theta, data) if callable(declared) else declared)  # type: ignore[arg-type]
    holds = jacobian.low >= mu * (1 - 1e-6) - _rounding(jacobian)
    found = f"declared {figure(mu)}; the smallest eigenvalue found is {figure(jacobian.low)}"
    remedy = f"declare no strong convexity, or at most {figure(jacobian.low)} if that number is above 0."
    return [Check("strong convexity", holds, found, remedy, mu)]


# --- Dependence ----------------------------------------------------------------------------------------------------


def _check_theta_is_used(local):
    """Check that F depends on θ, and that F or outer depends on each leaf of θ.

    A vjp may vanish at one point although the function depends on θ. The vjps are therefore also taken at two random
    points, whose entries differ from the point's by about 1 % and about 100 % of 1 + |entry|.
    """

    def dependence(theta, w):
        slopes = local.vjp(w, theta, random_like(local.w, 8))[1], local.outer_gradient(w, theta)[1]
        return [np.where(np.isfinite(slope), np.abs(slope), 1.0) for slope in slopes]

    shift_theta = (1 + jnp.abs(local.theta)) * random_like(local.theta, 7)
    shift_w = (1 + jnp.abs(local.w)) * random_like(local.w, 6)
    points = [(local.theta + size * shift_theta, local.w + size * shift_w) for size in (0.0, 1e-2, 1.0)]
    through, direct = (np.stack(part) for part in zip(*(dependence(*point) for point in points), strict=True))
    remedy = (
        "F does not depend on this θ, so the derivative through w is zero. If θ enters through the initial point, use "
        "Unrolled with init as a function of θ, or a Proximal condition; if through a closure, pass it as theta."
    )
    if not through.any():
        return Check(THETA_ROW, False, "∂F/∂θ = 0: θ enters only the initial point, or is unused", remedy)
    used = np.atleast_1d((through + direct).any(axis=0)).tolist()
    leaves = local.flat_theta.leaves
    unused = sorted(set(leaves) - {leaf for leaf, depends in zip(leaves, used, strict=True) if depends})
    if unused:
        return Check(THETA_ROW, False, f"neither F nor outer depends on {', '.join(unused)}", remedy)
    here = "∂F/∂θ is not zero" if through[0].any() else "∂F/∂θ is zero at this θ, but not nearby"
    return Check(THETA_ROW, True, here)


def _check_w_is_used(local):
    near = local.w + 1e-2 * (1 + jnp.abs(local.w)) * random_like(local.w, 9)
    if local.outer_gradient(local.w, local.theta)[0].any():
        return Check("w in outer", True, "∂outer/∂w is not zero")
    if local.outer_gradient(near, local.theta)[0].any():
        return Check("w in outer", True, "∂outer/∂w is zero at this w, but not nearby")
    remedy = "the outer function ignores the inner solution, so the term through w is zero: use the argument w."
    return Check("w in outer", False, "∂outer/∂w = 0", remedy)


def _check_kinks(local, tol):
    scale, distance = kinks.scale_of(local), kinks.nearest_kink(local)
    if not math.isfinite(distance):
        return Check("kinks", True, f"none found within {figure(kinks.DISTANCES[0] * scale)}", value=math.inf)
    remedy = (
        "the derivative is one-sided at this point (ReLU, max, abs, a projection at its bound): move the point, or "
        "smooth the function (softplus for ReLU)."
    )
    at_the_point = distance <= max(tol, kinks.DISTANCES[-2])
    found = f"one {'at' if at_the_point else 'near'} the point, within {figure(distance * scale)}"
    return Check("kinks", not at_the_point, found, remedy, distance * scale)
