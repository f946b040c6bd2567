"""What the host does about a solve that did not end well: raise, warn, or leave it to the caller.

Under a trace a status is data. Where numbers are concrete it is looked at here: the first stage that failed, in which
task of a batch, its cause and its remedy in a sentence, and for an operator that is not positive definite by how much.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bilevel.conditions.protocol import Condition
from bilevel.types import Hypergradient, MatVec, PyTree, Status

Policy = Literal["raise", "warn", "ignore"]


class HypergradientError(RuntimeError):
    """A solve that did not end well, where numbers were concrete enough to see it.

    Attributes:
        result: the :class:`Hypergradient` that was refused.
    """

    def __init__(self, message: str, result: Hypergradient):
        super().__init__(message)
        self.result = result

    def __reduce__(self):  # an exception is pickled as the arguments it hands on, which lack the result
        return type(self), (str(self), self.result)


def check_policy(on_failure: Policy) -> None:
    """Raise ValueError for a policy that does not exist."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f'on_failure must be "raise", "warn" or "ignore", got {on_failure!r}')


def check_status(
    out: Hypergradient, on_failure: Policy = "raise", advise: Callable[[Hypergradient], str] | None = None
) -> None:
    """Raise or warn about a failed status, naming the stage and, in a batch, the tasks.

    For a batch that ``vmap`` computed, whose statuses were data until now, or for one that was told to ignore them.

    Args:
        out: a :class:`Hypergradient`, of one task or of a batch of them.
        on_failure: "raise", "warn" or "ignore".
        advise: a sentence on this very operator, asked for only where a solve of one task failed.

    Raises:
        HypergradientError: on a failed status, with ``on_failure="raise"``.
        ValueError: for a policy that does not exist.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilevel import CG, GradientDescent, Implicit, Problem, Stationary, value_and_hypergradient
        >>> condition = Stationary(lambda w, theta, data: 0.5 * data * w**2 - theta * w)
        >>> problem = Problem(condition, lambda w, theta, data: w)
        >>> function = value_and_hypergradient(problem, GradientDescent(0.5, max_steps=20, tol=1e-4), Implicit(CG(1)))
        >>> out = jax.vmap(function, in_axes=(None, None, 0))(1.0, 0.0, jnp.array([1.0, 0.01, 2.0]))
        >>> check_status(out)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        bilevel.failures.HypergradientError: inner solve, MAX_STEPS in 1 of 3 tasks (1): tol was not met ...
    """
    check_policy(on_failure)
    if on_failure == "ignore" or isinstance(out.value, Tracer):
        return
    failures = [_sentence(stage, np.asarray(status)) for stage, status in _stages(out) if not _worst(status).ok]
    if not failures:
        return
    hint = advise(out) if advise is not None and jnp.ndim(out.value) == 0 else ""
    message = "; ".join(failures) + hint
    if on_failure == "raise":
        raise HypergradientError(message, out)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def succeeded(status: jax.Array) -> bool:
    """Whether one number, the worst status, leaves nothing to look at; so it is under a trace."""
    return isinstance(status, Tracer) or Status(int(status)).ok


def _stages(out: Hypergradient) -> Iterator[tuple[str, jax.Array]]:
    """The stages in their order, each with its status; what an earlier one did to a later one is left out."""
    gone = jnp.zeros(jnp.shape(out.value), bool)
    nothing = jnp.zeros(jnp.shape(out.value), jnp.int32)
    steps = [("inner solve", out.inner.status), ("outer function", _nonfinite(out, out.value))]
    if out.linear is not None:
        steps.append(("linear solve", out.linear.status))
    for stage, status in [*steps, ("gradient", _nonfinite(out, out.gradient))]:
        yield stage, jnp.where(gone, nothing, status)
        gone = gone | (status == Status.NONFINITE)


def _nonfinite(out, numbers):
    return jnp.where(out.finite(numbers), jnp.int32(0), jnp.int32(Status.NONFINITE))


def _worst(status):
    return Status(int(jnp.max(status)))


def _sentence(stage, status):
    worst = Status(int(status.max()))
    if status.ndim == 0:
        return f"{stage}, {worst.name}: {worst.message}"
    failed = np.flatnonzero(status > Status.BUDGET_USED)
    listed = ", ".join(map(str, failed[:8])) + (", …" if failed.size > 8 else "")
    return f"{stage}, {worst.name} in {failed.size} of {status.size} tasks ({listed}): {worst.message}"


LANCZOS_STEPS = 30
"""Products spent on the curvature of an operator that failed: enough for an end of the spectrum to show."""


def advise(condition: Condition, theta: PyTree, data: PyTree, out: Hypergradient) -> str:
    """By how much an operator misses positive definiteness, where a solve found that it does."""
    status = Status.CONVERGED if out.linear is None else Status(int(out.linear.status))
    if not condition.symmetric or status not in (Status.NEGATIVE_CURVATURE, Status.SINGULAR):
        return ""
    matvec = jax.jit(jax.linearize(lambda w: condition.residual(w, theta, data), out.inner.w)[1])
    smallest = smallest_ritz_value(matvec, out.inner.w, LANCZOS_STEPS)
    if not smallest < 0:
        return ""
    return (
        f" Its smallest eigenvalue is at most {smallest:.3g}: a λ larger by {-smallest:.3g}, or such a ridge, mends it."
    )


def smallest_ritz_value(matvec: MatVec, like: PyTree, steps: int) -> float:
    """An upper bound of a symmetric operator's smallest eigenvalue, by Lanczos with full reorthogonalisation.

    Source: Golub and Van Loan (2013), section 10.1.
    """
    flat, unravel = ravel_pytree(like)
    basis = [np.random.default_rng(0).normal(size=flat.size)]
    basis[0] /= np.linalg.norm(basis[0])
    products = []
    for _ in range(min(steps, flat.size)):
        products.append(np.asarray(ravel_pytree(matvec(unravel(jnp.asarray(basis[-1], flat.dtype))))[0], np.float64))
        rest = products[-1]
        for _ in range(2):  # once leaves rounding errors that the second time removes
            rest = rest - np.stack(basis).T @ (np.stack(basis) @ rest)
        size = np.linalg.norm(rest)
        if size <= np.finfo(flat.dtype).eps * np.linalg.norm(products[-1]):
            break
        basis.append(rest / size)
    projected = np.stack(basis[: len(products)]) @ np.stack(products).T
    return float(np.linalg.eigvalsh(0.5 * (projected + projected.T))[0])
