"""Turn a failed status into an exception or a warning, outside of ``jit``.

Under a trace a status is data and cannot be inspected. For a concrete result, :func:`check_status` names each failed
stage, the tasks of a batch in which it failed, and the cause with the remedy (``Status.message``). The module
:mod:`bilevel.advice` adds the numbers of the remedy, such as a step size.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.types import Hypergradient, Status

Policy = Literal["raise", "warn", "ignore"]


class HypergradientError(RuntimeError):
    """Error raised for a failed status.

    Attributes:
        result: the complete :class:`Hypergradient`, with the failed status. In an error of :func:`implicit_layer`, it
            is the :class:`Solution` of a failed inner solve, or None after a failed linear solve. In an error of
            ``stochastic.minimize``, it is the :class:`StochasticMinimum` with the state of the last evaluation that did
            not fail, or with the first state if the first evaluation failed.
        state: from :func:`minimize`, the :class:`OuterState` before the failed step; otherwise None.
    """

    def __init__(self, message: str, result: Any, state: Any = None):
        super().__init__(message)
        self.result = result
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, pickle would call the constructor with the message alone.
        return type(self), (str(self), self.result, self.state)


def check_policy(on_failure: Policy) -> None:
    """Raise ValueError unless the policy is "raise", "warn" or "ignore"."""
    if on_failure not in ("raise", "warn", "ignore"):
        raise ValueError(f'on_failure must be "raise", "warn" or "ignore", got {on_failure!r}')


def check_status(
    out: Hypergradient, on_failure: Policy = "raise", advise: Callable[[Hypergradient], str] | None = None
) -> None:
    """Raise an error or warn about a failed status, naming the stage and, in a batch, the tasks.

    Call it on the result of ``jit`` or ``vmap``, inside of which no status can be inspected, or on a result that was
    computed with ``on_failure="ignore"``. For a traced result nothing happens.

    Args:
        out: a :class:`Hypergradient` of one task or of a batch of them.
        on_failure: "raise", "warn" or "ignore".
        advise: ``advise(out)`` returns a sentence that is added to the message. It is called only if a stage failed and
            ``out`` is the result of one task.

    Raises:
        HypergradientError: on a failed status, with ``on_failure="raise"``.
        ValueError: if ``on_failure`` is none of the three.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilevel import CG, GradientDescent, Implicit, Problem, Stationary, value_and_hypergradient
        >>> condition = Stationary(lambda w, theta, data: 0.5 * data * w**2 - theta * w)
        >>> problem = Problem(condition, lambda w, theta, data: w)
        >>> function = value_and_hypergradient(problem, GradientDescent(0.5, max_steps=20, tol=1e-4), Implicit(CG(1)))
        >>> out = jax.vmap(function, in_axes=(None, None, 0))(1.0, 0.0, jnp.array([1.0, 0.01, 2.0]))
        >>> check_status(out)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        bilevel.errors.HypergradientError: inner solve, MAX_STEPS in 1 of 3 tasks (1): the true residual ...
    """
    check_policy(on_failure)
    if on_failure == "ignore" or isinstance(out.value, Tracer):
        return
    failures = [_sentence(stage, np.asarray(status)) for stage, status in _stages(out) if not _worst(status).ok]
    if not failures:
        return
    hint = advise(out) if advise is not None and jnp.ndim(out.value) == 0 else ""
    message = "; ".join(failures) + hint
    raise_or_warn(message, out, on_failure)


def raise_or_warn(message: str, result: Any, on_failure: Policy) -> None:
    """Raise :class:`HypergradientError`, warn, or do nothing.

    The warning names the line three calls up the stack. If a hypergradient function called :func:`check_status`, that
    is the user's line that called the hypergradient function.
    """
    if on_failure == "raise":
        raise HypergradientError(message, result)
    if on_failure == "warn":
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def succeeded(status: jax.Array) -> bool:
    """Return True if a scalar status is ok, or if it is traced and cannot be inspected."""
    return isinstance(status, Tracer) or Status(int(status)).ok


def _stages(out: Hypergradient) -> Iterator[tuple[str, jax.Array]]:
    """Yield the stages in order, each with its status.

    A task that is NONFINITE in one stage is reported as 0 (ok) in all later ones, which only inherit the NaN.
    """
    masked = jnp.zeros(jnp.shape(out.value), bool)
    ok = jnp.zeros(jnp.shape(out.value), jnp.int32)
    stages = [("inner solve", out.inner.status), ("outer function", _nonfinite(out, out.value))]
    if out.linear is not None:
        stages.append(("linear solve", out.linear.status))
    for stage, status in [*stages, ("gradient", _nonfinite(out, out.gradient))]:
        yield stage, jnp.where(masked, ok, status)
        masked = masked | (status == int(Status.NONFINITE))


def _nonfinite(out, numbers):
    """Return NONFINITE for each task in which an entry of ``numbers`` is not finite, else 0 (ok)."""
    return jnp.where(out.finite(numbers), jnp.int32(0), jnp.int32(Status.NONFINITE))


def _worst(status):
    return Status(int(jnp.max(status)))


def _sentence(stage, status):
    worst = Status(int(status.max()))
    if status.ndim == 0:
        return f"{stage}, {worst.name}: {worst.message}"
    failed = np.flatnonzero(status > Status.ILL_CONDITIONED)
    listed = ", ".join(map(str, failed[:8])) + (", …" if failed.size > 8 else "")
    return f"{stage}, {worst.name} in {failed.size} of {status.size} tasks ({listed}): {worst.message}"
