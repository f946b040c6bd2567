"""Find out which remedy for a failed solve would work, and say so in the error message.

Every function here is called only after a failure, and with concrete values. So it may take products, factorise, and
run a solver again. The numbers in the message, such as a step size, a tolerance or a ridge, are computed at the w that
the failed solve returned, or found by solves that start at this w. If gradient descent diverged, w = 0 is used instead.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import spectrum, tree
from bilevel.conditions.protocol import Condition, is_gradient
from bilevel.linear import CG, DENSE_LIMIT, GMRES, LU, BiCGStab, Neumann, NormalCG
from bilevel.linear.system import scaled_operator
from bilevel.solvers import GradientDescent, InnerSolver, Jaxopt
from bilevel.types import Hypergradient, LinearSolver, MatVec, PyTree, Status

LANCZOS_STEPS = 30
"""Number of Lanczos steps that :func:`advise` takes for the eigenvalues of an operator. Each step costs one product."""


def advise(
    condition: Condition,
    theta: PyTree,
    data: PyTree,
    out: Hypergradient,
    solver: InnerSolver | None = None,
    linear: LinearSolver | None = None,
) -> str:
    """Return sentences that name a remedy for a failed inner or linear solve, for the message about it.

    It costs products with the operator, at most one dense factorisation, and at most six runs of a solver of jaxopt.

    Args:
        condition: the condition that was solved.
        theta: outer variables.
        data: any pytree.
        out: the result with the failed status.
        solver: the inner solver, if it is known.
        linear: the linear solver, if it is known.

    Returns:
        Sentences, each with a leading space; the empty string where no remedy was found.
    """
    found: list[str] = []
    inner = Status(int(out.inner.status))
    if isinstance(solver, GradientDescent) and not inner.ok:
        found += _step_size(condition, theta, data, out.inner.w, solver)
    if isinstance(solver, Jaxopt) and inner in (Status.STOPPED, Status.MAX_STEPS):
        found += _options_of_jaxopt(condition, theta, data, out, solver)
    status = Status.CONVERGED if out.linear is None else Status(int(out.linear.status))
    if not status.ok and inner.ok and status not in (Status.NONSYMMETRIC, Status.NONFINITE):
        found += _remedies_of_a_linear_solve(condition, theta, data, out, linear, status)
    return "".join(f" {sentence}" for sentence in found)


def _remedies_of_a_linear_solve(condition, theta, data, out, linear, status) -> Iterator[str]:
    w = out.inner.w
    unscaled = jax.linearize(lambda w: condition.residual(w, theta, data), w)[1]
    scaling = condition.scaling(theta, data)
    # The linear solver sees this operator, to which it adds its ridge.
    matvec = scaled_operator(unscaled, scaling)
    values, smallest, largest = None, 0.0, 0.0
    if condition.symmetric:
        values = np.asarray(spectrum.ritz_values(matvec, w, LANCZOS_STEPS))
        smallest, largest = _smallest(values), float(values[-1])
        if smallest < 0 and status in (Status.NEGATIVE_CURVATURE, Status.SINGULAR):
            if scaling is None:
                yield f"The smallest eigenvalue of ∂F/∂w is at most {smallest:.3g}: use a ridge above {-smallest:.3g}."
            else:
                lacking = -_smallest(np.asarray(spectrum.ritz_values(unscaled, w, LANCZOS_STEPS)))
                yield (
                    f"The smallest eigenvalue of ∂F/∂w is at most {-lacking:.3g}: increase λ by more than "
                    f"{lacking:.3g}, or use a ridge above {-smallest:.3g}, which is added to I + H/λ."
                )
            return
    if isinstance(linear, Neumann):
        yield from _step_size_of_neumann(condition, matvec, w, linear)
        return
    if status == Status.SINGULAR:
        norm = float(spectrum.operator_norm(matvec, w)) if values is None else float(abs(values).max())
        eps = tree.eps(w)
        yield f"‖A‖ is about {norm:.3g}: " + (
            f"try a ridge of {eps**0.5 * norm:.1g}. It need not suffice, because A is not symmetric."
            if values is None
            else f"a ridge of {eps**0.5 * norm:.1g} bounds the condition number by about {eps**-0.5:.1g}."
        )
        return
    if status == Status.MAX_STEPS and isinstance(linear, CG) and smallest > 0:
        # After k steps the error of CG, in the norm of A, is at most 2((√κ − 1)/(√κ + 1))^k times that of the start.
        kappa, goal = largest / smallest, linear.tol or tree.eps(w) ** 0.5
        steps = int(np.ceil(0.5 * kappa**0.5 * np.log(2 * kappa**0.5 / goal)))
        yield (
            f"The condition number is at least {kappa:.3g}. If it is no larger, CG needs at most {steps} steps to a "
            f"relative residual of {goal:.1g}."
        )
    if isinstance(linear, CG | NormalCG | GMRES | BiCGStab):
        yield from _dense(matvec, w)


def _smallest(values: np.ndarray) -> float:
    """Return the smallest Ritz value plus its rounding error, so that a negative result is not rounding alone."""
    return float(values[0] + 10 * np.finfo(values.dtype).eps * abs(values).max())


def _dense(matvec: MatVec, w: PyTree) -> Iterator[str]:
    """Factorise A, and yield a sentence if the factors solve a system with the matrix A."""
    size = sum(leaf.size for leaf in jax.tree.leaves(w))
    if size <= DENSE_LIMIT:
        _, info = LU()(matvec, jax.tree.map(jnp.ones_like, w))
        if Status(int(info.status)).ok:
            assert info.rcond is not None
            yield f"LU() solves this system of {size} unknowns, whose rcond is {float(info.rcond):.1g}."


def _step_size_of_neumann(condition, matvec, w, linear: Neumann) -> Iterator[str]:
    values = spectrum.ritz_values(lambda v: tree.add(matvec(v), tree.scale(linear.ridge, v)), w, LANCZOS_STEPS)
    if not condition.symmetric or not values[0] > 0:
        norm = float(spectrum.operator_norm(matvec, w))
        yield f"‖A‖ is about {norm:.3g}; the series may diverge for every step_size: use GMRES or LU."
        return
    largest, smallest = float(values[-1]), float(values[0])
    goal = linear.tol or 0.1
    terms = int(np.ceil(largest / smallest * np.log(1 / goal)))
    yield (
        f"The operator's largest eigenvalue L is about {largest:.3g}, so the series converges for a step_size below "
        f"2/L = {2 / largest:.3g}. With a step_size of 1/L = {1 / largest:.3g}, about {terms} terms give a relative "
        f"residual of {goal:.1g}."
    )


def _step_size(condition, theta, data, w, solver: GradientDescent) -> Iterator[str]:
    if not jnp.isfinite(tree.norm(w)):
        w = jax.tree.map(jnp.zeros_like, w)  # the descent has diverged, and its start is not known here
    largest = _largest_curvature(condition, theta, data, w)
    if not largest > 0:
        return
    limit = 2 * (1 + solver.momentum) / largest
    step_size = float(jnp.max(jax.vmap(solver.size_at)(jnp.arange(max(solver.max_steps, 1)))))
    if step_size > limit:
        yield f"The largest curvature L is about {largest:.3g}: the step_size must be below {limit:.3g}."
    elif step_size < 0.5 / largest:
        yield f"The largest curvature L is about {largest:.3g}: a step_size of 1/L = {1 / largest:.3g} is faster."


def _largest_curvature(condition, theta, data, w) -> float:
    """Estimate the largest eigenvalue, at w, of the Hessian of the condition's potential.

    For a condition without a potential, such as :class:`Projected` or :class:`ProximalGradient`, the Hessian is that of
    its ``objective`` alone. Return 0 for a condition with neither.
    """
    objective = condition.potential if is_gradient(condition) else getattr(condition, "objective", None)
    if objective is None:
        return 0.0
    matvec = jax.linearize(lambda w: jax.grad(objective)(w, theta, data), w)[1]
    return float(spectrum.ritz_values(matvec, w, LANCZOS_STEPS)[-1])


def _options_of_jaxopt(condition, theta, data, out, solver: Jaxopt) -> Iterator[str]:
    """Run a solver of jaxopt again from its last w with other options, and describe the first options that work."""
    tol, options = solver.tol, dict(solver.options)
    if tol is None:
        return
    # jaxopt stops when its own error measure meets tol, and ‖F‖ was then still tol/ratio. If both fall in proportion, a
    # tol of tol·ratio suffices. Much smaller values are not tried: they may be out of reach of its line search.
    ratio = tol / float(out.inner.residual_norm)
    smaller = [{"tol": float(f"{tol * 10.0**-k:.1g}")} for k in range(1, 5) if 10.0 ** (1 - k) > 0.5 * ratio]
    trials = smaller if int(out.inner.status) == Status.STOPPED else []
    if "stepsize" in solver.accepted_options:
        largest = _largest_curvature(condition, theta, data, out.inner.w)
        if largest > 0 and not options.get("stepsize"):
            fixed = {"stepsize": float(f"{0.95 / largest:.2g}")}
            trials = [*trials, fixed, *(fixed | trial for trial in trials[-1:])]
    for trial in trials:
        again = Jaxopt(solver.solver, **(options | trial))(condition, out.inner.w, theta, data)
        if float(again.residual_norm) <= tol:
            named = ", ".join(f"{name}={value:g}" for name, value in trial.items())
            yield (
                f"With {named}, the solver continues from the w at which it ended, and reaches a true residual of "
                f"{float(again.residual_norm):.1g} in {int(again.steps)} steps."
            )
            return
