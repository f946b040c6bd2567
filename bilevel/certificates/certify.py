"""How far a hypergradient may be from the exact one, said after the fact, with a label for what the figure rests on.

At the returned ŵ, with F the residual, A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w, h = ∂outer/∂θ and an adjoint v̂, both
unknowns are off: r₁ = F(ŵ) and r₂ = g − Aᵀv̂ are not zero. One step of Newton's method on both at once,

    A ε₁ = r₁,    Aᵀ ε_v = ∂_w[g − Aᵀv̂]ε₁ − r₂,    ΔG = ∂_w[h − Bᵀv̂]ε₁ − Bᵀε_v,

tells what they do to the gradient G = h − Bᵀv̂: the corrected G − ΔG is off by O(‖ŵ − w*‖²). With constants that
hold everywhere (:class:`Lipschitz`) and ⟨u, Au⟩ ≥ μ‖u‖² the error of any such G has a bound,

    ‖ŵ − w*‖ ≤ ‖r₁‖/μ = e,    ‖G − G*‖ ≤ (L_h + β_v)e + ‖B*‖·[(L_g + ρ_v)e + ‖r₂‖]/μ,

and where convexity is not known Newton and Kantorovich's theorem gives e and ‖A*⁻¹‖ instead. The bound is taken at
ŵ and at the point ŵ − ε₁, v̂ − ε_v after the step, where residuals are of second order and ‖G − G₊‖ is added: the
smaller of the two holds, and the second is sharp wherever a step of Newton's method helps.

Nothing here shares code with the methods: a gradient that another formula, or a mistake, has made is certified too.
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
"""How large what is left after the correction may be against the estimate, for that to be called first order.

To third order the estimate is then within 0.8 and 1.33 times the error, which leaves room up to a factor of two.
"""
SLOPPINESS = 0.1
"""The relative residual up to which a linear solve of the correction is good enough."""


class CertificateKind(enum.IntEnum):
    """What a certificate's bound rests on, the weaker the larger, so that ``maximum`` merges two."""

    CERTIFIED = 0
    """The bound is a theorem, up to the stated allowance for rounding: every constant is declared or proved."""
    ESTIMATED = 1
    """A constant was probed at one point, where it may be larger elsewhere; the estimate passed its test."""
    INVALID = 2
    """A check failed: the figures say nothing."""


class Finding(enum.IntFlag):
    """What was found on the way, as bits of ``Certificate.findings``; ``Certificate.reasons`` has the sentences."""

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
    """The error of a hypergradient; all norms are Euclidean. Under ``vmap`` every array has the mapped axes in front.

    Attributes:
        kind: a :class:`CertificateKind` as an int32 scalar.
        estimate: the first-order estimate of ‖out.gradient − G*‖, between the rounding floor and the bound.
        bound: the bound of the same error: proved where ``kind`` is CERTIFIED; infinite where there is none.
        gradient: the corrected gradient, a pytree like θ, whose error is of second order in the inner error.
        corrected_bound: the bound of the corrected gradient's error.
        norm: ‖gradient‖, which relative figures are relative to.
        inner_error: the bound of ‖ŵ − w*‖.
        rounding: what rounding may do to the gradient at the exact solution.
        findings: bits of :class:`Finding`, an int32 scalar.
        probed: names of the constants that are neither declared nor known from structure; static.
        convex: whether the bound rests on a declared strong convexity; static.
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
        """``estimate / norm``."""
        return self.estimate / self.norm

    @property
    def relative_bound(self) -> jax.Array:
        """``bound / norm``."""
        return self.bound / self.norm

    @property
    def first_order(self) -> jax.Array:
        """Whether the estimate passed its test: it is then within a factor of two up to terms of third order."""
        return (self.findings & int(Finding.NONLINEAR | Finding.SLOPPY | Finding.NONFINITE)) == 0

    @property
    def ok(self) -> bool:
        """Whether no certificate in here is INVALID; for concrete values."""
        return bool(jnp.all(self.kind < CertificateKind.INVALID))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the kind is what it is, in words; under ``vmap`` what was found anywhere."""
        bits = int(np.bitwise_or.reduce(np.asarray(self.findings).ravel(), initial=0))
        return (*_grounds(self), *(_SENTENCES[finding] for finding in Finding if bits & finding))

    def __str__(self) -> str:
        return _batch_table(self) if jnp.ndim(self.kind) else _table(self)


_SENTENCES = {
    Finding.NONFINITE: "NaN or infinity among the figures: in the inner solution, the adjoint or a constant.",
    Finding.CURVATURE: (
        "The declared strong convexity is disproved: a direction of less curvature was found at the inner solution."
    ),
    Finding.UNPROVED: (
        "β₀ρη > ½: the theorem of Newton and Kantorovich proves no solution near; solve the inner problem further."
    ),
    Finding.NONLINEAR: (
        "What is left after the correction is not small against it: the estimate is no more than an order of magnitude."
    ),
    Finding.SLOPPY: (
        "The linear solves of the correction are not accurate: give `linear` more iterations, or leave it out."
    ),
    Finding.OTHER_GRADIENT: (
        "The gradient is not h − Bᵀv of its own adjoint: another formula or a mistake; it is certified as it stands."
    ),
    Finding.ROUNDING: "The error is below what rounding allows to tell: the estimate is that floor.",
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
    """How far ``out.gradient`` may be from the exact hypergradient.

    Works on what any method returned; where ``out.linear`` is None an adjoint is solved for here. It costs four
    linear solves and some ten products with second derivatives; up to ``DENSE_LIMIT`` unknowns without ``linear``
    A is factorised once instead. The residual must have a forward derivative.

    Args:
        problem: the condition and the outer function.
        theta: where ``out`` was computed, as was ``data``.
        out: the hypergradient.
        data: as above.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖² wherever the solution may be, a number or ``f(theta, data)``; the
            condition's own where None. If neither is known the theorem of Newton and Kantorovich takes its place.
        lipschitz: the constants that are known.
        linear: solves Ax = b and Aᵀx = b; None for a factorisation, or GMRES above ``DENSE_LIMIT`` unknowns.

    Returns:
        A :class:`Certificate`; ``print`` shows it as a table. A pure function, compiled once per problem and shape.

    Raises:
        ValueError: for a strong convexity that is not positive, or a linear solver that needs a symmetry the
            condition does not have.

    Source: Pedregosa (2016); Becker and Rannacher (2001) for the estimate; Ortega (1968) for the theorem.

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
        raise ValueError(f"certify needs a strong_convexity above 0, got {mu}; leave it None where none is known")
    if getattr(linear, "needs_symmetry", False) and not problem.condition.symmetric:
        name = type(problem.condition).__name__
        raise ValueError(f"{type(linear).__name__} needs a symmetric operator, and that of {name} is not")
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
        Finding.SLOPPY: _sloppy(here, at_here),
        Finding.OTHER_GRADIENT: jnp.bool_(out.linear is not None) & differs,
        Finding.ROUNDING: error <= rounding,
    }
    findings = sum(jnp.where(there_is, jnp.int32(finding), jnp.int32(0)) for finding, there_is in found.items())
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


def _sloppy(step: Step, bounds: Bounds):
    """Whether a linear solve of the correction left more than it may, and more than rounding."""
    w, v = tree.norm(step.unsolved_w), tree.norm(step.unsolved_v)
    enough_w = SLOPPINESS * tree.norm(step.residual) + bounds.residual_rounding
    enough_v = SLOPPINESS * tree.norm(step.adjoint_target) + bounds.defect_rounding
    return ~((w <= enough_w) & (v <= enough_v))


def _kind(found, bound, probed):
    broken = found[Finding.NONFINITE] | found[Finding.CURVATURE] | ~jnp.isfinite(bound)
    if probed:
        broken = broken | found[Finding.NONLINEAR] | found[Finding.SLOPPY]
    otherwise = CertificateKind.ESTIMATED if probed else CertificateKind.CERTIFIED
    return jnp.where(broken, jnp.int32(CertificateKind.INVALID), jnp.int32(otherwise))


def _grounds(certificate):
    """What the bound rests on, known without looking at a number."""
    if certificate.convex:
        yield "Strong convexity was declared."
    else:
        yield "Strong convexity was not declared: the bound rests on the theorem of Newton and Kantorovich."
    if certificate.probed:
        yield f"Probed at one point, not declared or proved: {', '.join(certificate.probed)}."
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
    trust = "first order" if bool(certificate.first_order) else "not first order"
    lines = [f"Hypergradient {CertificateKind(int(certificate.kind)).name.lower()}, its error estimate {trust}"]
    lines += [f"{'':24}{'absolute':>12}{'relative':>12}", f"{'norm of the gradient':24}{norm:12.3e}"]
    lines += [f"{name:24}{float(value):12.3e}{float(value) / norm if norm else np.nan:12.3e}"
              for name, value in rows.items()]  # fmt: skip
    lines += [f"{'inner error, at most':24}{float(certificate.inner_error):12.3e}"]
    return "\n".join([*lines, *(f"- {reason}" for reason in certificate.reasons)])


def _batch_table(certificate):
    kinds = np.asarray(certificate.kind).ravel()
    counts = ", ".join(f"{np.sum(kinds == kind)} {kind.name.lower()}" for kind in CertificateKind)
    lines = [f"{kinds.size} hypergradients: {counts}", f"{'relative':16}{'median':>12}{'largest':>12}"]
    for name in ("estimate", "bound"):
        values = np.asarray(getattr(certificate, f"relative_{name}")).ravel()
        lines.append(f"{name:16}{np.median(values):12.3e}{np.max(values):12.3e}")
    return "\n".join([*lines, *(f"- {reason}" for reason in certificate.reasons)])
