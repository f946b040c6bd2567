"""Error estimate and error bound of a finished hypergradient, with a label for what they rest on.

Let ŵ be the returned inner solution, F the residual, A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w, h = ∂outer/∂θ, and v̂ the
adjoint vector. Neither equation is solved exactly: r₁ = F(ŵ) and r₂ = g − Aᵀv̂ are not zero. One Newton step on both
equations at once,

    A ε₁ = r₁,    Aᵀ ε_v = ∂_w[g − Aᵀv̂]ε₁ − r₂,    ΔG = ∂_w[h − Bᵀv̂]ε₁ − Bᵀε_v,

gives the effect of both residuals on the gradient G = h − Bᵀv̂: the error of the corrected gradient G − ΔG is
O(‖ŵ − w*‖²). Constants that hold everywhere (:class:`Lipschitz`), with ⟨u, Au⟩ ≥ μ‖u‖², bound the error of G:

    ‖ŵ − w*‖ ≤ ‖r₁‖/μ = e,    ‖G − G*‖ ≤ (L_h + β_v)e + ‖B*‖·[(L_g + ρ_v)e + ‖r₂‖]/μ.

Where no strong convexity is known, the Newton–Kantorovich theorem bounds e and ‖A*⁻¹‖ instead. The bound is computed at
two points, and the smaller one is returned. The first point is (ŵ, v̂). The second is (ŵ − ε₁, v̂ − ε_v), whose gradient
G₊ differs from G by ‖G − G₊‖, which is added. At the second point the residuals are of second order, so its bound is
sharp wherever a Newton step helps.

This module shares no code with the methods, so that it also certifies a gradient from another formula or from a bug.
"""

import enum
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.certificates.error_bounds import Bounds, Constants, Step, distance, linear_algebra, newton_step, system_at
from bilevel.certificates.lipschitz import Lipschitz
from bilevel.conditions import StrongConvexity
from bilevel.problem import Problem
from bilevel.types import Hypergradient, LinearSolver, PyTree

NONLINEARITY = 0.25
"""Largest ratio of the second Newton step's correction to the estimate at which the estimate counts as first order.

Up to terms of third order the estimate is then between 0.8 and 1.33 times the error. The test promises a factor of
two, so those terms have room.
"""
SOLVE_TOLERANCE = 0.1
"""Largest relative residual at which a linear solve of the correction counts as accurate."""


class CertificateKind(enum.IntEnum):
    """What the bound of a certificate rests on. A larger value is a weaker claim, so ``maximum`` merges two."""

    CERTIFIED = 0
    """The bound is a theorem, up to the stated allowance for rounding: every constant is declared or proved."""
    ESTIMATED = 1
    """A constant was probed at one point and may be larger elsewhere; the estimate passed its test."""
    INVALID = 2
    """A check failed: neither the bound nor the estimate can be relied on."""


class Finding(enum.IntFlag):
    """Observations made by :func:`certify`, as bits of ``Certificate.findings``.

    ``Certificate.reasons`` explains those that are set, a sentence each.
    """

    NONFINITE = 1
    CURVATURE = 2
    UNPROVED = 4
    NONLINEAR = 8
    SLOPPY = 16
    OTHER_GRADIENT = 32
    ROUNDING = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Certificate:
    """Estimate and bound of the error of a hypergradient, and a corrected gradient.

    All norms are Euclidean. Under ``vmap`` every array has the mapped axes in front.

    Attributes:
        kind: a :class:`CertificateKind` as an int32 scalar.
        estimate: the first-order estimate of ‖out.gradient − G*‖, raised to ``rounding`` and cut at ``bound``.
        bound: an upper bound of the same error: proved where ``kind`` is CERTIFIED, infinite where none is known.
        gradient: the corrected gradient, a pytree like θ, whose error is of second order in the inner error.
        corrected_bound: an upper bound of the corrected gradient's error.
        norm: ‖gradient‖, the denominator of the relative figures.
        inner_error: an upper bound of ‖ŵ − w*‖.
        rounding: an allowance for the error that rounding causes in the gradient even at the exact solution.
        findings: bits of :class:`Finding`, an int32 scalar.
        probed: names of the constants that are neither declared nor known from structure; static.
        convex: True if the bound rests on a declared strong convexity; static.
    """

    kind: jax.Array
    estimate: jax.Array
    bound: jax.Array
    gradient: PyTree
    corrected_bound: jax.Array
    norm: jax.Array
    inner_error: jax.Array
    rounding: jax.Array
    findings: jax.Array
    probed: tuple[str, ...] = field(metadata={"static": True})
    convex: bool = field(metadata={"static": True})

    @property
    def relative_estimate(self) -> jax.Array:
        """The error estimate relative to the corrected gradient: ``estimate / norm``."""
        return self.estimate / self.norm

    @property
    def relative_bound(self) -> jax.Array:
        """The error bound relative to the corrected gradient: ``bound / norm``."""
        return self.bound / self.norm

    @property
    def first_order(self) -> jax.Array:
        """True if the estimate passed its test: up to terms of third order it is then within a factor of two."""
        return (self.findings & int(Finding.NONLINEAR | Finding.SLOPPY | Finding.NONFINITE)) == 0

    @property
    def ok(self) -> bool:
        """True if no certificate, of one or of a batch, is INVALID. The values must be concrete."""
        return bool(jnp.all(self.kind < CertificateKind.INVALID))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentences that explain ``kind`` and ``findings``. For a batch they cover what was found in any task."""
        bits = int(np.bitwise_or.reduce(np.asarray(self.findings).ravel(), initial=0))
        return (*_assumptions(self), *(_SENTENCES[finding] for finding in Finding if bits & finding))

    def __str__(self) -> str:
        return _batch_table(self) if jnp.ndim(self.kind) else _table(self)


_SENTENCES = {
    Finding.NONFINITE: "The inner solution, the adjoint vector or a constant holds a NaN or an infinity.",
    Finding.CURVATURE: (
        "The declared curvature (strong convexity or definiteness) is disproved: the inner solution has a direction of "
        "less curvature."
    ),
    Finding.UNPROVED: (
        "β₀ρη > ½, so the Newton–Kantorovich theorem proves no solution nearby: solve the inner problem further."
    ),
    Finding.NONLINEAR: (
        f"A second Newton step would change the gradient by more than {NONLINEARITY:.0%} of the estimate: read the "
        "estimate as an order of magnitude."
    ),
    Finding.SLOPPY: (
        f"The linear solves of the correction miss a relative residual of {SOLVE_TOLERANCE}: give `linear` a larger "
        "budget, or leave it out."
    ),
    Finding.OTHER_GRADIENT: (
        "The gradient differs from h − Bᵀv of the adjoint vector v returned with it, so another formula or a mistake "
        "made it. The figures hold for the gradient as it is."
    ),
    Finding.ROUNDING: "The estimated error is below the rounding floor: the estimate was raised to that floor.",
}


def certify(
    problem: Problem,
    theta: PyTree,
    out: Hypergradient,
    data: PyTree,
    strong_convexity: StrongConvexity = None,
    lipschitz: Lipschitz | None = None,
    linear: LinearSolver | None = None,
) -> Certificate:
    """Estimate and bound the distance of ``out.gradient`` from the exact hypergradient, and correct it.

    The result of any method can be certified. The function is pure and compiled once per problem and shape. It costs
    four linear solves (five where ``out.linear`` is None and an adjoint vector must be found first) and about ten
    products with second derivatives. Without ``linear``, up to 500 unknowns (``DENSE_LIMIT``), A is factorised once
    instead. The residual must have a forward derivative.

    Args:
        problem: the condition and the outer function.
        theta: the outer variables that ``out`` was computed at.
        out: the hypergradient.
        data: the data that ``out`` was computed with.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖² wherever the solution may be, a number or ``f(theta, data)``. None
            takes the condition's own; where that is None too, the Newton–Kantorovich theorem is used instead.
        lipschitz: the constants that are known; the others are derived from structure or probed.
        linear: solves Ax = b and Aᵀx = b; None for a factorisation, or GMRES above ``DENSE_LIMIT`` unknowns.

    Returns:
        A :class:`Certificate`; ``print`` shows it as a table.

    Raises:
        ValueError: for a strong convexity that is not positive and finite, or for a linear solver that needs a
            symmetric operator where the condition is not symmetric.

    Source: Pedregosa (2016) for the bound; Becker and Rannacher (2001) for the estimate; Ortega (1968) for the theorem.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel import CG, GradientDescent, Implicit, Stationary, value_and_hypergradient
        >>> ridge = Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2)
        >>> problem = Problem(ridge, lambda w, theta, data: w)  # w* = data / (1 + theta)
        >>> hypergradient = value_and_hypergradient(problem, GradientDescent(0.4, max_steps=3), Implicit(CG(5)))
        >>> out = hypergradient(1.0, 0.0, 2.0)
        >>> constants = Lipschitz(outer_w=0.0, jacobian=0.0, mixed=1.0)
        >>> certificate = certify(problem, 1.0, out, 2.0, lambda theta, data: 1 + theta, constants)
        >>> CertificateKind(int(certificate.kind)), round(float(certificate.gradient), 6)  # −data / (1 + theta)²
        (<CertificateKind.CERTIFIED: 0>, -0.5)
        >>> round(float(certificate.estimate), 6) == round(abs(float(out.gradient) + 0.5), 6)
        True
    """
    mu = problem.condition.strong_convexity if strong_convexity is None else strong_convexity
    if isinstance(mu, int | float) and not 0 < mu < float("inf"):
        raise ValueError(f"certify needs a finite strong_convexity above 0, got {mu}; pass None if none is known")
    if getattr(linear, "needs_symmetry", False) and not problem.condition.symmetric:
        name = type(problem.condition).__name__
        raise ValueError(f"{type(linear).__name__} needs a symmetric operator, but the operator of {name} is not")
    declared = dict((lipschitz or Lipschitz()).items()) | ({} if mu is None else {"strong_convexity": mu})
    functions = tuple((name, value) for name, value in declared.items() if callable(value))
    numbers = {name: value for name, value in declared.items() if not callable(value)}
    theta, data = tree.arrays((theta, data))
    return _certify(problem, functions, linear, numbers, theta, data, out)


@partial(jax.jit, static_argnames=("problem", "functions", "linear"))
def _certify(problem, functions, linear, numbers, theta, data, out):
    system = system_at(problem, theta, data)
    w = out.inner.w
    algebra = linear_algebra(system, w, linear)
    v = algebra.solve_transposed(jax.grad(system.outer)(w, theta)) if out.linear is None else out.linear.solution
    here = newton_step(system, algebra, w, v)
    there = newton_step(system, algebra, *here.target())

    constants = Constants.complete(problem, system, algebra, numbers | dict(functions), here)
    at_here, at_there = constants.bounds(here), constants.bounds(there)
    corrected = here.corrected()

    def bound_of(gradient):
        direct = distance(gradient, here.gradient) + at_here.gradient
        return jnp.minimum(direct, distance(gradient, there.gradient) + at_there.gradient)

    error, remainder = distance(out.gradient, corrected), distance(corrected, there.corrected())
    rounding = jnp.minimum(at_here.rounding, at_there.rounding)
    bound = bound_of(out.gradient)
    estimate = jnp.minimum(jnp.maximum(error, rounding), bound)
    differs = distance(out.gradient, here.gradient) > at_here.rounding
    found = {
        Finding.NONFINITE: ~jnp.isfinite(error + remainder),
        Finding.CURVATURE: constants.disproved,
        Finding.UNPROVED: jnp.bool_(not constants.convex) & ~jnp.isfinite(bound),
        Finding.NONLINEAR: ~(remainder <= NONLINEARITY * estimate),
        Finding.SLOPPY: _inaccurate_solves(here, at_here),
        Finding.OTHER_GRADIENT: jnp.bool_(out.linear is not None) & differs,
        Finding.ROUNDING: error <= rounding,
    }
    findings = sum(jnp.where(is_set, jnp.int32(finding), jnp.int32(0)) for finding, is_set in found.items())
    return Certificate(
        kind=_kind(found, bound, constants.probed),
        estimate=estimate,
        bound=bound,
        gradient=corrected,
        corrected_bound=bound_of(corrected),
        norm=tree.norm(corrected),
        inner_error=jnp.minimum(at_here.radius, tree.norm(here.step_w) + at_there.radius),
        rounding=rounding,
        findings=jnp.asarray(findings),
        probed=constants.probed,
        convex=constants.convex,
    )


def _inaccurate_solves(step: Step, bounds: Bounds):
    """Return True if the residual of a linear solve of the correction is above its tolerance plus rounding, or NaN."""
    w, v = tree.norm(step.unsolved_w), tree.norm(step.unsolved_v)
    allowed_w = SOLVE_TOLERANCE * tree.norm(step.residual) + bounds.residual_rounding
    allowed_v = SOLVE_TOLERANCE * tree.norm(step.adjoint_target) + bounds.defect_rounding
    return ~((w <= allowed_w) & (v <= allowed_v))


def _kind(found, bound, probed):
    """Return the kind. A failed estimate invalidates only what was probed: a bound from known constants stands."""
    broken = found[Finding.NONFINITE] | found[Finding.CURVATURE] | ~jnp.isfinite(bound)
    if probed:
        broken = broken | found[Finding.NONLINEAR] | found[Finding.SLOPPY]
    unbroken = CertificateKind.ESTIMATED if probed else CertificateKind.CERTIFIED
    return jnp.where(broken, jnp.int32(CertificateKind.INVALID), jnp.int32(unbroken))


def _assumptions(certificate):
    """Yield the sentences about the assumptions of the bound; they follow from static fields alone."""
    if certificate.convex:
        yield "Strong convexity was declared."
    else:
        yield "Strong convexity was not declared: the bound rests on the Newton–Kantorovich theorem."
    if certificate.probed:
        yield f"Probed at one point, neither declared nor proved: {', '.join(certificate.probed)}."
    else:
        yield "Every constant was declared, or proved from the problem's structure or a factorisation."


def _table(certificate):
    norm = float(certificate.norm)
    rows = {
        "error estimate": certificate.estimate,
        "error bound": certificate.bound,
        "bound after correction": certificate.corrected_bound,
        "rounding floor": certificate.rounding,
    }
    order = "first order" if bool(certificate.first_order) else "not first order"
    lines = [f"Hypergradient: {CertificateKind(int(certificate.kind)).name.lower()}; error estimate: {order}"]
    lines += [f"{'':24}{'absolute':>12}{'relative':>12}", f"{'norm of the gradient':24}{norm:12.3e}"]
    lines += [f"{name:24}{float(value):12.3e}{float(value) / norm if norm else np.nan:12.3e}"
              for name, value in rows.items()]  # fmt: skip
    lines += [f"{'inner error bound':24}{float(certificate.inner_error):12.3e}"]
    return "\n".join([*lines, *(f"- {reason}" for reason in certificate.reasons)])


def _batch_table(certificate):
    kinds = np.asarray(certificate.kind).ravel()
    counts = ", ".join(f"{np.sum(kinds == kind)} {kind.name.lower()}" for kind in CertificateKind)
    lines = [f"{kinds.size} hypergradients: {counts}", f"{'relative':16}{'median':>12}{'largest':>12}"]
    for name in ("estimate", "bound"):
        values = np.asarray(getattr(certificate, f"relative_{name}")).ravel()
        lines.append(f"{name:16}{np.median(values):12.3e}{np.max(values):12.3e}")
    return "\n".join([*lines, *(f"- {reason}" for reason in certificate.reasons)])
