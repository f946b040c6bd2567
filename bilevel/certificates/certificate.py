"""Estimate and bound the error of a finished hypergradient, and say which assumptions the bound rests on.

Let ŵ be the returned inner solution, F the residual, A = ∂F/∂w, B = ∂F/∂θ, g = ∂outer/∂w, h = ∂outer/∂θ, and v̂ the
adjoint vector. A star marks the exact values. The inner and the adjoint equation are not solved exactly: r₁ = F(ŵ) and
r₂ = g − Aᵀv̂ are not zero. One Newton step on both equations at once,

    A ε₁ = r₁,    Aᵀ ε_v = ∂_w[g − Aᵀv̂]ε₁ − r₂,    ΔG = ∂_w[h − Bᵀv̂]ε₁ − Bᵀε_v,

estimates the effect ΔG of both residuals on the gradient G = h − Bᵀv̂. The error of the corrected gradient G − ΔG is of
second order in the errors of ŵ and v̂.

Let ⟨u, Au⟩ ≥ μ‖u‖², and let L_g, L_h, ρ_v and β_v be Lipschitz constants, in w, of g, h, Aᵀv̂ and Bᵀv̂
(:class:`Lipschitz`). Then

    ‖ŵ − w*‖ ≤ ‖r₁‖/μ = e,    ‖G − G*‖ ≤ (L_h + β_v)e + ‖B*‖·[(L_g + ρ_v)e + ‖r₂‖]/μ.

Where no strong convexity is declared, the Newton–Kantorovich theorem bounds ‖ŵ − w*‖ and ‖A*⁻¹‖ instead. The bound is
computed at two points, and the smaller result is returned. The first point is (ŵ, v̂). The second one is
(ŵ − ε₁, v̂ − ε_v), with gradient G₊, and ‖G − G₊‖ is added to the bound there. A Newton step that converges leaves
residuals of second order, so the bound at the second point is then close to the error itself.

This module shares no gradient code with the methods, so its bound also holds for a wrong gradient, and is then large.
"""

import enum
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import tree
from bilevel.certificates.error_bounds import Bounds, Constants, Step, linear_algebra, newton_step, system_at
from bilevel.certificates.lipschitz import Lipschitz
from bilevel.conditions import StrongConvexity
from bilevel.notebook import html_table
from bilevel.problem import Problem
from bilevel.types import Hypergradient, LinearSolver, PyTree

NONLINEARITY = 0.25
"""Largest change of the gradient by a second Newton step, relative to the estimate, at which the estimate is trusted.

Up to terms of third order the estimate is then between 0.8 and 1.33 times the error. `Certificate.first_order`
promises a factor of two, which leaves room for the terms of third order.
"""
SOLVE_TOLERANCE = 0.1
"""Largest relative residual at which a linear solve of the correction counts as accurate."""


class CertificateKind(enum.IntEnum):
    """The basis of a certificate's bound. A larger value is a weaker claim, so ``maximum`` merges two kinds."""

    CERTIFIED = 0
    """The bound is proved, up to an allowance for rounding, because every constant is declared or proved."""
    ESTIMATED = 1
    """A constant was probed at one point and may be larger elsewhere. ``Certificate.first_order`` is True."""
    INVALID = 2
    """A check failed: neither the bound nor the estimate can be relied on."""


class Finding(enum.IntFlag):
    """Observations of :func:`certify`, as bits of ``Certificate.findings``.

    ``Certificate.reasons`` has a sentence for each bit that is set.
    """

    NONFINITE = 1
    """A NaN or an infinity in the gradient, the inner solution, the adjoint vector or a Newton step."""
    CURVATURE = 2
    """The declared strong convexity or definiteness is disproved at the inner solution."""
    UNPROVED = 4
    """No finite bound is known, because no theorem proves a solution near the returned w."""
    NONLINEAR = 8
    """A second Newton step would change the gradient much, so the estimate is an order of magnitude only."""
    SLOPPY = 16
    """A linear solve of the correction is inaccurate."""
    OTHER_GRADIENT = 32
    """The gradient is not the one that the returned adjoint vector gives."""
    ROUNDING = 64
    """The estimate was raised to the rounding floor."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Certificate:
    """Estimate and bound of the error of a hypergradient, and a corrected gradient.

    All norms are Euclidean. Under ``vmap`` every array has the mapped axes in front. The error is ‖out.gradient − G*‖,
    with the exact hypergradient G*.

    Attributes:
        kind: a :class:`CertificateKind` as an int32 scalar.
        estimate: the first-order estimate of the error, at least ``rounding`` and at most ``bound``.
        bound: an upper bound of the error: proved if ``kind`` is CERTIFIED, infinite if none is known.
        gradient: the corrected gradient, a pytree like θ. Its error is of second order in the errors of both solves.
        corrected_bound: an upper bound of the error of ``gradient``.
        norm: ‖gradient‖, the denominator of ``relative_estimate`` and ``relative_bound``.
        inner_error: an upper bound of the inner solution's error ‖ŵ − w*‖.
        rounding: an allowance for the error of the gradient that rounding causes even at the exact solution.
        findings: bits of :class:`Finding`, an int32 scalar.
        probed: names of the constants that were probed at one point, neither declared nor proved; a static field.
        convex: True if the bound rests on a declared strong convexity; a static field.
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
        """True if the estimate is within a factor of two of the error, up to terms of third order.

        The test is that a second Newton step changes the gradient little, that both linear solves are accurate, and
        that the estimate and this change are finite. An estimate that was raised to ``rounding`` may exceed the error
        by any factor.
        """
        return (self.findings & int(Finding.NONLINEAR | Finding.SLOPPY | Finding.NONFINITE)) == 0

    @property
    def ok(self) -> bool:
        """True unless the certificate, or one of a batch, is INVALID. It cannot be read under a JAX trace."""
        return bool(jnp.all(self.kind < CertificateKind.INVALID))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentences that explain ``kind`` and ``findings``. A batch has the sentences of all its tasks, each once."""
        bits = int(np.bitwise_or.reduce(np.asarray(self.findings).ravel(), initial=0))
        return (*_assumptions(self), *(_SENTENCES[finding] for finding in Finding if bits & finding))

    def __str__(self) -> str:
        return "\n".join([self._title(), *map(_line, self._rows()), *(f"- {reason}" for reason in self.reasons)])

    def _repr_html_(self) -> str:
        header, *rows = self._rows()
        return html_table(header, rows, [self._title(), *self.reasons])

    def _title(self):
        return _batch_title(self) if jnp.ndim(self.kind) else _title(self)

    def _rows(self):
        return _batch_rows(self) if jnp.ndim(self.kind) else _rows(self)


_SENTENCES = {
    Finding.NONFINITE: (
        "The gradient, the inner solution, the adjoint vector or a Newton step holds a NaN or an infinity."
    ),
    Finding.CURVATURE: (
        "The declared curvature is disproved: the strong convexity is not positive, or A at the inner solution has a "
        "direction of less curvature than the declared strong convexity or definiteness allows."
    ),
    Finding.UNPROVED: (
        "No finite bound is known, because the Newton–Kantorovich theorem proves no solution near the returned w: "
        "solve the inner problem further, or declare the strong convexity."
    ),
    Finding.NONLINEAR: (
        f"A second Newton step would change the gradient by more than {NONLINEARITY:.0%} of the estimate: read the "
        "estimate as an order of magnitude."
    ),
    Finding.SLOPPY: (
        f"A linear solve of the correction has a relative residual above {SOLVE_TOLERANCE}: pass as `linear` a solver "
        "with a larger budget, or LU."
    ),
    Finding.OTHER_GRADIENT: (
        "The gradient differs from h − Bᵀv with the adjoint vector v that was returned with it, so it comes from "
        "another formula or from a mistake. The estimate and the bound hold for the gradient that was returned."
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

    The result of any method can be certified. The function is pure. It is compiled once for each problem,
    ``linear``, set of constants that are functions, and set of shapes and dtypes. It costs four linear solves (five if
    ``out.linear`` is None, because the adjoint vector must be found first), about ten products with second
    derivatives, and Lanczos's method for the spectrum of A = ∂F/∂w and for each constant that is probed. Without
    ``linear``, an A of at most 500 unknowns (``DENSE_LIMIT``) is written out as a matrix. The solves and its spectrum
    then use factorisations of this matrix. The residual must be differentiable in forward mode.

    Args:
        problem: the condition and the outer function.
        theta: the outer variables at which ``out`` was computed.
        out: the hypergradient.
        data: the data with which ``out`` was computed.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖² wherever the solution may be, a number or ``f(theta, data)``. None
            takes the condition's declaration. If that is None too, the Newton–Kantorovich theorem is used instead.
        lipschitz: the constants that are known. :class:`Lipschitz` says how the other constants are found.
        linear: solves Ax = b and Aᵀx = b. None means a factorisation, or GMRES above ``DENSE_LIMIT`` unknowns.

    Returns:
        A :class:`Certificate`, which prints as a table.

    Raises:
        ValueError: if ``strong_convexity`` is a number that is not both positive and finite, or for a linear solver
            that needs a symmetric operator if the condition is not declared symmetric.

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
        raise ValueError(
            f"{type(linear).__name__} needs a symmetric operator, and {name} is not declared symmetric: leave linear "
            "out, or use NormalCG, GMRES, BiCGStab or LU"
        )
    declared = dict((lipschitz or Lipschitz()).items()) | ({} if mu is None else {"strong_convexity": mu})
    functions = tuple((name, value) for name, value in declared.items() if callable(value))
    numbers = {name: value for name, value in declared.items() if not callable(value)}
    theta, data = tree.arrays((tree.numbers_as_floats(theta), data))
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
        direct = tree.distance(gradient, here.gradient) + at_here.gradient
        return jnp.minimum(direct, tree.distance(gradient, there.gradient) + at_there.gradient)

    error, remainder = tree.distance(out.gradient, corrected), tree.distance(corrected, there.corrected())
    rounding = jnp.minimum(at_here.rounding, at_there.rounding)
    bound = bound_of(out.gradient)
    estimate = jnp.minimum(jnp.maximum(error, rounding), bound)
    differs = tree.distance(out.gradient, here.gradient) > at_here.rounding
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
    """Return True if a linear solve of the correction has a residual that is NaN or above tolerance plus rounding."""
    w, v = tree.norm(step.unsolved_w), tree.norm(step.unsolved_v)
    allowed_w = SOLVE_TOLERANCE * tree.norm(step.residual) + bounds.residual_rounding
    allowed_v = SOLVE_TOLERANCE * tree.norm(step.adjoint_target) + bounds.defect_rounding
    return ~((w <= allowed_w) & (v <= allowed_v))


def _kind(found, bound, probed):
    """Return the :class:`CertificateKind`. If no constant was probed, an inaccurate estimate leaves the bound valid."""
    broken = found[Finding.NONFINITE] | found[Finding.CURVATURE] | ~jnp.isfinite(bound)
    if probed:
        broken = broken | found[Finding.NONLINEAR] | found[Finding.SLOPPY]
    unbroken = CertificateKind.ESTIMATED if probed else CertificateKind.CERTIFIED
    return jnp.where(broken, jnp.int32(CertificateKind.INVALID), jnp.int32(unbroken))


def _assumptions(certificate):
    """Yield the sentences about the assumptions of the bound."""
    if certificate.convex:
        yield "Strong convexity was declared."
    else:
        yield "Strong convexity was not declared: the bound rests on the Newton–Kantorovich theorem."
    if certificate.probed:
        yield f"Probed at one point, neither declared nor proved: {', '.join(certificate.probed)}."
    else:
        yield "Every constant was declared, or proved from the problem's structure or a factorisation."


def _title(certificate):
    order = "first order" if bool(certificate.first_order) else "not first order"
    return f"Hypergradient: {CertificateKind(int(certificate.kind)).name.lower()}; error estimate: {order}"


def _rows(certificate):
    """Return the header and the rows of one certificate's table: a name, an absolute and a relative number as text."""
    norm = float(certificate.norm)
    errors = {
        "error estimate": certificate.estimate,
        "error bound": certificate.bound,
        "bound after correction": certificate.corrected_bound,
        "rounding floor": certificate.rounding,
    }
    return [
        ("", "absolute", "relative"),
        ("norm of the gradient", f"{norm:.3e}", ""),
        *((name, f"{float(e):.3e}", f"{float(e) / norm if norm else np.nan:.3e}") for name, e in errors.items()),
        ("inner error bound", f"{float(certificate.inner_error):.3e}", ""),
    ]


def _batch_title(certificate):
    kinds = np.asarray(certificate.kind).ravel()
    counts = ", ".join(f"{np.sum(kinds == kind)} {kind.name.lower()}" for kind in CertificateKind)
    return f"{kinds.size} hypergradients: {counts}"


def _batch_rows(certificate):
    """Return the header and the rows of a batch's table, with the median and the largest number of all tasks."""
    rows = [("relative", "median", "largest")]
    for name in ("estimate", "bound"):
        values = np.asarray(getattr(certificate, f"relative_{name}")).ravel()
        rows.append((name, f"{np.median(values):.3e}", f"{np.max(values):.3e}"))
    return rows


def _line(row):
    name, absolute, relative = row
    return f"{name:24}{absolute:>12}{relative:>12}".rstrip()
