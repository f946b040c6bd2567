"""Compute the numbers in a certificate: a Newton step on the inner and the adjoint equation, and error bounds.

The module docstring of :mod:`bilevel.certificates.certificate` has the formulas and defines the symbols. The Lagrangian
outer − ⟨F, v⟩ has the adjoint equation's residual g − Aᵀv as its derivative in w. Its derivative in θ is the
hypergradient h − Bᵀv.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import jax.scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from bilevel import spectrum, tree
from bilevel.certificates.lipschitz import Ball
from bilevel.conditions import Proximal, identity_center
from bilevel.problem import Problem
from bilevel.spectrum import Spectrum
from bilevel.types import LinearSolver, MatVec, PyTree

DENSE_LIMIT = 500
"""Largest number n of unknowns for a factorisation of A, which takes n products and stores the n² entries of A."""
ROUNDING = 16.0
"""Allowance for rounding in F, g − Aᵀv and h − Bᵀv: this factor times eps times the norms of the terms."""


class System(NamedTuple):
    """A problem with its data fixed: its functions of w and θ, and their derivatives at one θ."""

    residual: Callable[[PyTree, PyTree], PyTree]
    """F(w, θ)."""
    outer: Callable[[PyTree, PyTree], jax.Array]
    """outer(w, θ)."""
    theta: PyTree
    data: PyTree

    def lagrangian(self, w: PyTree, v: PyTree) -> tuple[PyTree, PyTree]:
        """Return g − Aᵀv and h − Bᵀv, the derivatives of outer − ⟨F, v⟩ in w and θ."""
        of_outer = jax.grad(self.outer, (0, 1))(w, self.theta)
        return tree.subtract(of_outer, jax.vjp(self.residual, w, self.theta)[1](v))

    def jacobian(self, w: PyTree) -> tuple[PyTree, MatVec, MatVec]:
        """Return F(w) and the maps u ↦ Au and u ↦ Aᵀu."""
        value, forward = jax.linearize(lambda w: self.residual(w, self.theta), w)
        pull_back = jax.vjp(lambda w: self.residual(w, self.theta), w)[1]
        return value, forward, lambda u: pull_back(u)[0]

    def mixed(self, w: PyTree) -> Callable[[PyTree], PyTree]:
        """Return the map u ↦ Bᵀu."""
        pull_back = jax.vjp(lambda theta: self.residual(w, theta), self.theta)[1]
        return lambda u: pull_back(u)[0]


def system_at(problem: Problem, theta: PyTree, data: PyTree) -> System:
    """Return a problem's residual and outer function with the data fixed, and the θ of their derivatives."""

    def outer(w, theta) -> Any:
        value: Any = problem.outer(w, theta, data)
        return value[0] if problem.has_aux else value

    return System(lambda w, theta: problem.condition.residual(w, theta, data), outer, theta, data)


class LinearAlgebra(NamedTuple):
    """Linear solves with A at one fixed w, and the spectrum of A at any w."""

    solve: MatVec
    """b ↦ A⁻¹b."""
    solve_transposed: MatVec
    """b ↦ A⁻ᵀb."""
    spectrum: Callable[[PyTree], Spectrum]
    """w ↦ the spectrum of A at w."""
    dense: bool
    """True if A is factorised, False if it is used through products alone."""


def linear_algebra(system: System, w: PyTree, linear: LinearSolver | None) -> LinearAlgebra:
    """Prepare solves with A at ``w``: by a factorisation if no solver is given and A is small, else by products."""
    _, forward, transpose = system.jacobian(w)
    flat, unravel = ravel_pytree(w)
    if linear is None and flat.size <= DENSE_LIMIT:
        factors = jax.scipy.linalg.lu_factor(spectrum.matrix(forward, w))

        def solve(b, trans=0):
            return unravel(jax.scipy.linalg.lu_solve(factors, ravel_pytree(b)[0], trans=trans))

        def dense_spectrum(w):
            return spectrum.dense_spectrum(spectrum.matrix(system.jacobian(w)[1], w))

        return LinearAlgebra(solve, lambda b: solve(b, trans=1), dense_spectrum, True)

    use = _gmres if linear is None else linear

    def probed_spectrum(w):
        return spectrum.probed_spectrum(*system.jacobian(w)[1:], w)

    return LinearAlgebra(lambda b: use(forward, b)[0], lambda b: use(transpose, b)[0], probed_spectrum, False)


def _gmres(matvec, b):
    """Solve Ax = b, if 600 iterations suffice, to a relative residual of √eps; `certify` checks the residual later."""
    with jax.numpy_dtype_promotion("standard"):  # JAX's GMRES mixes float32 with float64 and fails under "strict"
        return jax.scipy.sparse.linalg.gmres(matvec, b, tol=tree.eps(b) ** 0.5, restart=30, maxiter=20)


class Step(NamedTuple):
    """A point (w, v), its residuals, and the Newton step from there."""

    w: PyTree
    v: PyTree
    residual: PyTree
    """r₁ = F(w)."""
    defect: PyTree
    """r₂ = g − Aᵀv."""
    gradient: PyTree
    """G = h − Bᵀv."""
    step_w: PyTree
    """ε₁, subtracted from w."""
    step_v: PyTree
    """ε_v, subtracted from v."""
    change: PyTree
    """ΔG, subtracted from G."""
    adjoint_target: PyTree
    """∂_w[g − Aᵀv]ε₁ − r₂, the right-hand side of the equation for ε_v."""
    unsolved_w: PyTree
    """r₁ − Aε₁, the residual of the linear solve for ε₁."""
    unsolved_v: PyTree
    """The residual of the linear solve for ε_v."""
    product: PyTree
    """Aw. The allowance for rounding takes F − Aw as the part of F that does not depend on w."""

    def target(self) -> tuple[PyTree, PyTree]:
        """Return the point after the step, (w − ε₁, v − ε_v)."""
        return tree.subtract(self.w, self.step_w), tree.subtract(self.v, self.step_v)

    def corrected(self) -> PyTree:
        """Return the gradient after the step, G − ΔG."""
        return tree.subtract(self.gradient, self.change)


def newton_step(system: System, algebra: LinearAlgebra, w: PyTree, v: PyTree) -> Step:
    """Compute the Newton step from (w, v).

    The linear solves use A at the w of ``algebra``. If that is another w, the result is a simplified Newton step.
    """
    residual, forward, transpose = system.jacobian(w)
    step_w = algebra.solve(residual)
    (defect, gradient), (moved_defect, moved_gradient) = jax.jvp(lambda w: system.lagrangian(w, v), (w,), (step_w,))
    adjoint_target = tree.subtract(moved_defect, defect)
    step_v = algebra.solve_transposed(adjoint_target)
    return Step(
        w=w,
        v=v,
        residual=residual,
        defect=defect,
        gradient=gradient,
        step_w=step_w,
        step_v=step_v,
        change=tree.subtract(moved_gradient, system.mixed(w)(step_v)),
        adjoint_target=adjoint_target,
        unsolved_w=tree.subtract(residual, forward(step_w)),
        unsolved_v=tree.subtract(adjoint_target, transpose(step_v)),
        product=forward(w),
    )


class Bounds(NamedTuple):
    """Upper bounds of the errors at one point (w, v), as scalars; infinite where no solution is proved to be near."""

    radius: jax.Array
    """Bound of ‖w − w*‖."""
    gradient: jax.Array
    """Bound of ‖(h − Bᵀv) − G*‖."""
    rounding: jax.Array
    """The value of ``gradient`` with the allowances for rounding in place of r₁ and r₂, and the same constants."""
    residual_rounding: jax.Array
    """Allowance for rounding in r₁."""
    defect_rounding: jax.Array
    """Allowance for rounding in r₂."""


@dataclass(frozen=True)
class Constants:
    """Every constant of the bound, as a number or a function of a ball.

    Attributes:
        known: the constants by name, as in :class:`Lipschitz`, and ``strong_convexity`` if it is declared.
        system: the problem at θ.
        here: the spectrum of A at the inner solution.
        algebra: computes the spectrum of A at other points.
        probed: the names of the constants that are not proved: those probed at one point, and the smallest singular
            value of A if it comes from rounded arithmetic.
        disproved: True if the declared strong convexity is not positive, or if the spectrum contradicts it or the
            declared positive definiteness.
    """

    known: dict[str, Any]
    system: System
    here: Spectrum
    algebra: LinearAlgebra
    probed: tuple[str, ...]
    disproved: jax.Array

    @property
    def convex(self) -> bool:
        """True if strong convexity is declared."""
        return "strong_convexity" in self.known

    @staticmethod
    def complete(
        problem: Problem, system: System, algebra: LinearAlgebra, declared: dict[str, Any], step: Step
    ) -> "Constants":
        """Collect the constants: a declared one if there is one, else one from the structure, else a probed one."""
        known = _from_structure(problem, system, step.w) | declared
        probes = _probes(known, system, step, algebra.dense)
        here = algebra.spectrum(step.w)
        probed = tuple(probes)
        if "strong_convexity" in known:
            least = known["strong_convexity"]
            least = least(system.theta, system.data) if callable(least) else least
            known["strong_convexity"] = least = jnp.asarray(least).astype(here.norm.dtype)
            disproved = ~(here.lowest >= least * (1 - 100 * jnp.finfo(here.norm.dtype).eps)) | ~(least > 0)
        else:
            disproved = jnp.bool_(problem.condition.positive_definite) & (here.lowest < 0)
            if not (algebra.dense and here.norm.dtype == jnp.float64):
                probed += ("smallest singular value",)
        return Constants(known | probes, system, here, algebra, probed, disproved)

    def bounds(self, step: Step) -> Bounds:
        """Bound the errors at the point of ``step``, with its residuals enlarged by the allowances for rounding."""
        system, norm = self.system, tree.norm
        dtype, eps = norm(step.w).dtype, ROUNDING * tree.eps((step.w, step.gradient))
        of_w, of_v = norm(step.w), norm(step.v)
        rounding_w = eps * (self.here.norm * of_w + tree.distance(step.residual, step.product))
        radius, inverse = self._enclose(step, rounding_w)
        ball = Ball(step.w, radius, step.v)

        def value(name):
            constant = self.known[name]
            return jnp.asarray(constant(ball, system.theta, system.data) if callable(constant) else constant, dtype)

        outer_w, outer_theta, mixed = value("outer_w"), value("outer_theta"), value("mixed")
        adjoint = value("adjoint") if "adjoint" in self.known else value("jacobian") * of_v
        if "mixed_norm" in self.known:
            mixed_norm = value("mixed_norm")
        else:
            mixed_norm = _mixed_norm(system, step.w).astype(dtype) + _times(mixed, radius)
        slope = outer_theta + mixed * of_v
        rounding_v = eps * (norm(step.defect) + self.here.norm * of_v + outer_w * of_w)
        rounding_gradient = eps * (norm(step.gradient).astype(dtype) + mixed_norm * of_v + outer_theta * of_w)

        def total(radius, defect):
            through_v = _times(mixed_norm, inverse * (_times(outer_w + adjoint, radius) + defect))
            return _times(slope, radius) + through_v + rounding_gradient

        return Bounds(
            radius=radius,
            gradient=total(radius, norm(step.defect) + rounding_v),
            rounding=total(inverse * rounding_w, rounding_v),
            residual_rounding=rounding_w,
            defect_rounding=rounding_v,
        )

    def _enclose(self, step, rounding):
        """Bound ‖w − w*‖ and the norm of A⁻¹ at w*.

        With strong convexity μ the bounds are ‖F(w)‖/μ and 1/μ. Otherwise the Newton–Kantorovich theorem is used. Let η
        be the length of the Newton step, β₀ ≥ ‖A⁻¹‖ at w, and ρ the Lipschitz constant of A. If β₀ρη ≤ ½, the bounds
        are 2η/(1 + √(1 − 2β₀ρη)) and β₀/√(1 − 2β₀ρη). If not, both are infinite.
        """
        residual = tree.norm(step.residual) + rounding
        if self.convex:
            mu = self.known["strong_convexity"]
            return residual / mu, 1 / mu
        here = self.algebra.spectrum(step.w)
        inverse = 1 / here.smallest
        length = tree.norm(step.step_w) + inverse * (tree.norm(step.unsolved_w) + rounding)
        rho = self.known["jacobian"]
        if callable(rho):
            rho = rho(Ball(step.w, 2 * length, step.v), self.system.theta, self.system.data)
        product = _times(jnp.asarray(rho, length.dtype), inverse * length)
        root = jnp.sqrt(jnp.maximum(1 - 2 * product, jnp.zeros_like(product)))
        holds = product <= 0.5
        infinite = jnp.full_like(product, jnp.inf)
        return jnp.where(holds, 2 * length / (1 + root), infinite), jnp.where(holds, inverse / root, infinite)


def _times(constant, size):
    """Return constant · size, or zero if the constant is zero and the size infinite."""
    return jnp.where(constant == 0, jnp.zeros_like(size), constant * size)


def _mixed_norm(system, w):
    """Compute ‖B‖ at ``w``, up to rounding, from the largest eigenvalue of the matrix BBᵀ."""
    pull_back = system.mixed(w)
    _, push = jax.linearize(lambda theta: system.residual(w, theta), system.theta)
    gram = spectrum.matrix(lambda u: push(pull_back(u)), w)
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[-1], jnp.zeros((), gram.dtype)))


def _from_structure(problem, system, w):
    """Derive constants from the problem's structure.

    If outer does not use θ, ``outer_theta`` is zero. If the residual does not use θ, ``mixed`` and ``mixed_norm`` are
    zero. For a ``Proximal`` whose objective and λ do not use θ, ``mixed`` is zero, and if its centre is θ itself,
    ``mixed_norm`` is the largest λ.
    """
    theta, data, condition = system.theta, system.data, problem.condition
    known = {}
    if not _uses_second(system.outer, w, theta):
        known["outer_theta"] = 0.0
    if not _uses_second(system.residual, w, theta):
        known |= {"mixed": 0.0, "mixed_norm": 0.0}
    elif isinstance(condition, Proximal):
        strength = condition.strength if callable(condition.strength) else lambda *_: condition.strength
        fixed = not _uses_second(lambda w, theta: strength(theta, data), w, theta)
        if fixed and not _uses_second(lambda w, theta: condition.objective(w, theta, data), w, theta):
            known["mixed"] = 0.0  # B = −λ ∂center/∂θ does not depend on w
            if condition.center is identity_center:
                strengths = [jnp.max(jnp.asarray(leaf)) for leaf in jax.tree.leaves(strength(theta, data))]
                known["mixed_norm"] = functools.reduce(jnp.maximum, strengths)
    return known


def _uses_second(function, first, second):
    """Return True if the function's jaxpr reads its second argument, even if the value is independent of it."""
    jaxpr = jax.make_jaxpr(function)(first, second).jaxpr
    inputs = jaxpr.invars[len(jax.tree.leaves(first)) :]
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars} | {id(o) for o in jaxpr.outvars}
    return any(id(variable) in read for variable in inputs)


def _probes(known, system, step, dense):
    """Replace each missing constant by a lower bound of it, the norm of a derivative at one point."""
    w, v = step.w, step.v

    def at(function):
        return spectrum.operator_norm(jax.linearize(function, w)[1], w)

    probes = {}
    if "outer_w" not in known:
        probes["outer_w"] = at(lambda w: jax.grad(system.outer)(w, system.theta))
    if "outer_theta" not in known:
        probes["outer_theta"] = at(lambda w: jax.grad(system.outer, 1)(w, system.theta))
    if "jacobian" not in known and "strong_convexity" not in known:
        probes["jacobian"] = _probe_jacobian(system, w, step.step_w)
    if "adjoint" not in known and "jacobian" not in known:
        probes["adjoint"] = at(lambda w: system.jacobian(w)[2](v))
    if "mixed" not in known:
        size = tree.norm(v)
        probes["mixed"] = at(lambda w: system.mixed(w)(v)) / jnp.where(size > 0, size, jnp.ones_like(size))
    if "mixed_norm" not in known and not dense:
        probes["mixed_norm"] = spectrum.operator_norm(system.mixed(w), w)
    return probes


def _probe_jacobian(system, w, direction):
    """Estimate the norm of the derivative of A along ``direction``, scaled to length 1: a lower bound of ρ."""
    size = tree.norm(direction)
    unit = tree.scale(1 / jnp.where(size > 0, size, jnp.ones_like(size)), direction)

    def change(u):
        def product(w):
            return jax.jvp(lambda w: system.residual(w, system.theta), (w,), (u,))[1]

        return jax.jvp(product, (w,), (unit,))[1]

    return spectrum.operator_norm(change, w)
