"""Projections onto the matrices with given row and column sums, in the Euclidean distance and in the KL divergence.

Both projections are functions of the similarity matrix S plus two potentials: T = max(S + α1ᵀ + 1βᵀ, 0) in the
Euclidean distance, and T = exp(S + α1ᵀ + 1βᵀ) in the KL divergence. An iteration finds the potentials and is not
differentiated. Newton steps follow, one in the Euclidean distance and three in the KL divergence. They leave only
rounding errors, and JAX differentiates them.

Source: Blondel, Seguy, Rolet (2018), Smooth and sparse optimal transport, equation 7.
"""

import jax
import jax.numpy as jnp
from jax import lax

from bilevel._jaxopt.feasibility import nan_if_violated
from bilevel._jaxopt.loops import while_loop

INTERIOR_STEPS = 60
FACE_STEPS = 30
KL_STEPS = 300
"""Limits of the three iterations. For normally distributed similarities with the standard deviation 10, they take about
15, 3 and 20 steps."""


def transport(similarity, marginals, tol=None, rounding=0.0):
    """Return the T nearest to the similarity matrix with T ≥ 0, T1 = a and Tᵀ1 = b.

    An interior-point method identifies the positive entries of T, at any scale of S. Semismooth Newton steps correct
    the entries that it leaves undecided. On the positive entries T is linear in S, a and b, so that derivatives of
    every order are exact. T has a kink where an entry changes between 0 and positive. The derivative there is that of
    one side.

    Args:
        similarity: the matrix S to project, ``[m, n]``. The entries −∞ of S are 0 in T.
        marginals: ``(a, b)``, vectors of lengths m and n with equal sums and without negative entries.
        tol: the error of the row and column sums, relative to the largest sum, at which the Newton steps end; None for
            16·eps.
        rounding: the largest machine epsilon among the dtypes in which the arguments were given, or 0 if none of these
            dtypes is narrower than that of ``similarity``. If the totals of a and b differ by at most the fraction
            4·``rounding``, both vectors are scaled to the mean of the totals.
    """
    a, b = _balanced(marginals, rounding)
    fixed = lax.stop_gradient((similarity, a, b))
    allowed = _allowed(*fixed)
    similarity = jnp.where(allowed, similarity, 0)
    alpha, beta = _interior_point(lax.stop_gradient(similarity), *fixed[1:], allowed)
    # With the potentials found so far added to S, the entries of T are no longer differences of large numbers.
    centred = similarity + lax.stop_gradient(alpha[:, None] + beta[None])
    positive, shift = _positive_entries(lax.stop_gradient(centred), *fixed[1:], allowed, _tolerance(similarity, tol))
    centred = centred + lax.stop_gradient(shift)
    rest = jnp.where(positive, centred, 0)
    inverse = _inverse_curvature(positive.astype(rest.dtype))
    alpha, beta = _solve_for_potentials(inverse, rest.sum(1) - a, rest.sum(0) - b)
    # A positive entry at a kink may be negative by a rounding error.
    result = jnp.where(positive, centred - alpha[:, None] - beta[None], 0)
    result = jnp.where(result < 0, 0, result)
    return _with_checked_sums(result, a, b)


def kl_transport(similarity, marginals, tol=None, rounding=0.0):
    """Return the T with T1 = a and Tᵀ1 = b of the least KL divergence to exp(S).

    Newton's method solves the dual problem for S/4ᵏ, then for 4S/4ᵏ and so on up to S, each from the solution of the
    one before. The derivatives are exact up to the third order.

    Args:
        similarity: the matrix S, ``[m, n]``. The entries −∞ of S are 0 in T.
        marginals: as for :func:`transport`.
        tol: the error of the row sums, relative to the largest column sum, at which the Newton steps that are not
            differentiated end; None for 16·eps.
        rounding: as for :func:`transport`.
    """
    a, b = _balanced(marginals, rounding)
    fixed = lax.stop_gradient((similarity, a, b))
    allowed = _allowed(*fixed)
    similarity = jnp.where(allowed, similarity, 0)
    logarithm = _kl_logarithm(lax.stop_gradient(similarity), *fixed[1:], allowed, _tolerance(similarity, tol))
    logarithm = logarithm + (similarity - lax.stop_gradient(similarity))
    # The logarithm found so far and the matrix of Newton's method count as constants. After k steps, derivatives up to
    # order k are exact. A derivative of the matrix would multiply the rounding errors of the sums by the square of its
    # condition number, which is large if T is almost a permutation matrix.
    inverse = _inverse_curvature(lax.stop_gradient(jnp.where(allowed, jnp.exp(logarithm), 0)))
    for _ in range(3):
        plan = jnp.where(allowed, jnp.exp(logarithm), 0)
        alpha, beta = _solve_for_potentials(inverse, plan.sum(1) - a, plan.sum(0) - b)
        logarithm = logarithm - alpha[:, None] - beta[None]
    return _with_checked_sums(jnp.where(allowed, jnp.exp(logarithm), 0), a, b)


def birkhoff(similarity, tol=None, rounding=0.0):
    """Return the doubly stochastic matrix nearest to the square matrix ``similarity``; see :func:`transport`."""
    return transport(similarity, _ones(similarity), tol, rounding)


def kl_birkhoff(similarity, tol=None, rounding=0.0):
    """Return the doubly stochastic matrix of the least KL divergence to exp(similarity); see :func:`kl_transport`."""
    return kl_transport(similarity, _ones(similarity), tol, rounding)


def _ones(similarity):
    return tuple(jnp.ones(size, similarity.dtype) for size in similarity.shape)


def _balanced(marginals, rounding):
    """Return the row and column sums, both scaled to the mean of their totals if these differ by rounding alone."""
    a, b = marginals
    if not rounding:
        return a, b
    totals = lax.stop_gradient(jnp.stack([a.sum(), b.sum()]))
    total = jnp.mean(totals)
    is_rounded = (total > 0) & (jnp.abs(totals[0] - totals[1]) <= 4 * rounding * total)
    of_a, of_b = jnp.where(is_rounded, total / jnp.where(is_rounded, totals, 1), 1)
    return a * of_a, b * of_b


def _allowed(similarity, a, b):
    """Return the entries of T that may be positive."""
    return ~jnp.isneginf(similarity) & (a > 0)[:, None] & (b > 0)[None]


def _tolerance(similarity, tol):
    return 16 * jnp.finfo(similarity.dtype).eps if tol is None else tol


def _with_checked_sums(plan, a, b):
    sums = jnp.concatenate([a, b])
    violation = jnp.maximum(jnp.abs(jnp.concatenate([plan.sum(1), plan.sum(0)]) - sums), -sums)
    return nan_if_violated(plan, violation, jnp.max(sums))


def _inverse_curvature(weights):
    """Return the pseudo-inverse of the matrix that :func:`_curvature` returns.

    That matrix is singular, because T does not change if a constant moves from α to β. It is singular along more
    directions if the weights fall into blocks.
    """
    return jnp.linalg.pinv(_curvature(weights), hermitian=True)


def _solve_for_potentials(inverse, rows, columns):
    """Return the (α, β) of least norm for which the matrix weights∘(α1ᵀ + 1βᵀ) has these row and column sums."""
    potentials = inverse @ jnp.concatenate([rows, columns])
    return potentials[: rows.size], potentials[rows.size :]


def _curvature(weights):
    """Return the matrix that takes (α, β) to the row and column sums of weights∘(α1ᵀ + 1βᵀ)."""
    return jnp.block([[jnp.diag(weights.sum(1)), weights], [weights.T, jnp.diag(weights.sum(0))]])


def _interior_point(similarity, a, b, allowed):
    """Return potentials (α, β) near those of :func:`transport`, by Mehrotra's predictor-corrector method.

    The unknowns are T, the multipliers M of T ≥ 0, α and β, with T − M = S + α1ᵀ + 1βᵀ, the given sums, and T∘M = 0.
    The iteration ends when the mean of T∘M is at most 10·eps times the square of the largest entry of T, or after
    ``INTERIOR_STEPS`` steps.
    """
    eps = jnp.finfo(similarity.dtype).eps
    total = jnp.where(a.sum() > 0, a.sum(), 1)
    plan = jnp.where(allowed, a[:, None] * b[None] / total, 0)
    beta = -jnp.max(similarity - plan, 0)
    slack = plan - similarity - beta[None]
    slack = slack + jnp.maximum(_mean(slack, allowed), 1e-3 * _mean(plan, allowed)) + (1 - allowed)
    start = jnp.zeros_like(a), beta, plan, slack

    def gap(plan, slack):
        return _mean(plan * slack, allowed)

    def is_open(state):
        count, (_, _, plan, slack) = state
        return (count < INTERIOR_STEPS) & (gap(plan, slack) > 10 * eps * jnp.max(plan) ** 2)

    def step(state):
        count, point = state
        alpha, beta, plan, slack = point
        weights = plan / (plan + slack)
        system = _curvature(weights)
        diagonal = jnp.sqrt(jnp.where(jnp.diag(system) > 0, jnp.diag(system), 1))
        system = system / (diagonal[:, None] * diagonal[None]) + 8 * eps * jnp.eye(diagonal.size, dtype=plan.dtype)
        factors = jax.scipy.linalg.lu_factor(system)
        dual_residual = plan - similarity - alpha[:, None] - beta[None] - slack

        def direction(complementarity):
            known = -weights * dual_residual - complementarity / (plan + slack)
            sums = jnp.concatenate([a - plan.sum(1) - known.sum(1), b - plan.sum(0) - known.sum(0)])
            potentials = jax.scipy.linalg.lu_solve(factors, sums / diagonal) / diagonal
            d_alpha, d_beta = potentials[: a.size], potentials[a.size :]
            lifted = d_alpha[:, None] + d_beta[None]
            d_plan = weights * lifted + known
            return d_alpha, d_beta, d_plan, jnp.where(allowed, d_plan - lifted + dual_residual, 0)

        _, _, d_plan, d_slack = direction(plan * slack)
        length = jnp.minimum(_step_inside(plan, d_plan), _step_inside(slack, d_slack))
        centring = (gap(plan + length * d_plan, slack + length * d_slack) / gap(plan, slack)) ** 3
        target = jnp.where(allowed, plan * slack + d_plan * d_slack - centring * gap(plan, slack), 0)
        change = direction(target)
        length = jnp.minimum(1, 0.99 * jnp.minimum(_step_inside(plan, change[2]), _step_inside(slack, change[3])))
        return count + 1, jax.tree.map(lambda value, d: value + length * d, point, change)

    _, (alpha, beta, _, _) = while_loop(is_open, step, (0, start), similarity)
    return alpha, beta


def _mean(values, where):
    return jnp.sum(jnp.where(where, values, 0)) / jnp.maximum(jnp.sum(where), 1).astype(values.dtype)


def _step_inside(value, change):
    """Return the largest step of at most 1 for which ``value + step·change`` has no negative entry."""
    return jnp.minimum(1, jnp.min(jnp.where(change < 0, -value / jnp.where(change < 0, change, -1), jnp.inf)))


def _positive_entries(centred, a, b, allowed, tol):
    """Return the mask of the positive entries of T, and the matrix α1ᵀ + 1βᵀ with T = ``centred`` + α1ᵀ + 1βᵀ there.

    Each semismooth Newton step solves for the potentials with which the entries that are positive now would have the
    given row and column sums.
    """
    eps = jnp.finfo(centred.dtype).eps
    size = jnp.maximum(jnp.max(a), jnp.max(b))
    sums = jnp.concatenate([a, b])

    def plan(shift):
        return jnp.where(allowed, jax.nn.relu(centred + shift), 0)

    def excess(shift):
        return jnp.concatenate([plan(shift).sum(1), plan(shift).sum(0)]) - sums

    def is_open(state):
        count, shift, _, _ = state
        return (count < FACE_STEPS) & (_largest(excess(shift)) > tol * size)

    def step(state):
        count, shift, least, best = state
        gradient = excess(shift)
        # If the positive entries fall into blocks, the system is singular. The damping then permits long steps along
        # its null directions, to where another entry becomes positive.
        damping = jnp.clip(1e-3 * _largest(gradient) / jnp.where(size > 0, size, 1), 4 * eps, 1e-3)
        system = _curvature((plan(shift) > 0).astype(shift.dtype)) + damping * jnp.eye(sums.size, dtype=shift.dtype)
        change = -jnp.linalg.solve(system, gradient)
        lift = change[: a.size, None] + change[None, a.size :]
        length = _step_length(lambda length: change @ excess(shift + length * lift), change @ gradient)
        shift = shift + length * lift
        error = _largest(excess(shift))
        return count + 1, shift, jnp.minimum(error, least), jnp.where(error < least, shift, best)

    start = jnp.zeros_like(centred)
    _, _, _, best = while_loop(is_open, step, (0, start, _largest(excess(start)), start), sums)
    return plan(best) > 0, best


def _largest(vector):
    return jnp.max(jnp.abs(vector))


def _step_length(slope_at, first):
    """Return a step in (0, 1] at which the slope of a convex function has at most half of its first absolute value.

    A step of 1 is also taken if the function still decreases there. At most 30 bisections are made. They use the slope,
    because the slope has smaller rounding errors than the function's value.
    """

    def is_too_long(search):
        number, _, length, slope = search
        return (number < 30) & (jnp.abs(slope) > 0.5 * jnp.abs(first)) & ((slope > 0) | (length < 1))

    def bisect(search):
        number, (low, high), length, slope = search
        low, high = jnp.where(slope > 0, low, length), jnp.where(slope > 0, length, high)
        length = 0.5 * (low + high)
        return number + 1, (low, high), length, slope_at(length)

    one = jnp.ones((), first.dtype)
    return while_loop(is_too_long, bisect, (0, (0 * one, one), one, slope_at(one)), first)[2]


def _kl_logarithm(similarity, a, b, allowed, tol):
    """Return log T of :func:`kl_transport`.

    Scaling each column to its sum eliminates β, and no exponential overflows. Newton's method minimises the rest of the
    dual problem over α. A bisection of the slope along each step makes the method converge from any start.
    """
    eps = jnp.finfo(similarity.dtype).eps
    size = jnp.maximum(jnp.max(b), jnp.finfo(b.dtype).tiny)
    log_a, log_b = (jnp.log(jnp.where(sums > 0, sums, 1)) for sums in (a, b))

    def plan(logarithm):
        return jnp.where(allowed, jnp.exp(logarithm), 0)

    def scale_columns(logarithm):
        scaled = logarithm + (log_b - jax.nn.logsumexp(logarithm, 0, where=allowed))[None]
        return jnp.where(allowed, scaled, 0)

    def scale_rows_and_columns(logarithm):
        scaled = logarithm + (log_a - jax.nn.logsumexp(logarithm, 1, where=allowed))[:, None]
        return scale_columns(jnp.where(allowed, scaled, 0))

    def raise_rows(logarithm, change):
        return scale_columns(logarithm + change[:, None])

    def excess(logarithm):
        return plan(logarithm).sum(1) - a

    spread = jnp.max(jnp.where(allowed, similarity, -jnp.inf)) - jnp.min(jnp.where(allowed, similarity, jnp.inf))
    stages = jnp.ceil(jnp.log(jnp.maximum(spread, 1)) / jnp.log(4.0)).astype(int)

    def is_open(state):
        count, _, stage, logarithm = state
        return (count < KL_STEPS) & ((stage > 0) | (jnp.max(jnp.abs(excess(logarithm))) > tol * size))

    def step(state):
        count, taken, stage, logarithm = state
        weights, gradient = plan(logarithm), excess(logarithm)
        curvature = -(weights / jnp.where(b > 0, b, 1)[None]) @ weights.T
        # A diagonal entry is minus the sum of the other entries of its row. Computed as a difference of nearly equal
        # numbers, it would lose all digits.
        curvature = jnp.where(jnp.eye(a.size, dtype=bool), 0, curvature)
        curvature = curvature - jnp.diag(curvature.sum(1))
        damping = size * jnp.clip(1e-3 * jnp.max(jnp.abs(gradient)) / size, 4 * eps, 1e-3)
        change = -jnp.linalg.solve(curvature + damping * jnp.eye(a.size, dtype=a.dtype), gradient)
        slope_at = lambda length: change @ excess(raise_rows(logarithm, length * change))  # noqa: E731
        logarithm = raise_rows(logarithm, _step_length(slope_at, change @ gradient) * change)
        # The scaling also corrects rows that have underflowed to zero. Newton's method cannot: their curvature is zero.
        logarithm = scale_rows_and_columns(logarithm)
        is_last = (taken >= 9) | (jnp.max(jnp.abs(excess(logarithm))) <= 1e-2 * size)
        is_next = (stage > 0) & is_last
        logarithm = jnp.where(is_next, scale_rows_and_columns(4 * logarithm), logarithm)
        return count + 1, jnp.where(is_next, 0, taken + 1), jnp.where(is_next, stage - 1, stage), logarithm

    start = scale_rows_and_columns(similarity * (4.0 ** -stages.astype(similarity.dtype)))
    return while_loop(is_open, step, (0, 0, stages, start), similarity)[3]
