"""A few-shot task as a bilevel problem: the inner problem fits the support set, the outer function is the query loss.

    φ*(θ) = argmin_φ  loss(φ, support) + ½ λ‖φ − θ‖²,      outer(φ*) = loss(φ*, query)

θ denotes the meta-parameters and φ the parameters of one task. The meta-gradient of implicit MAML is the hypergradient
of this problem (Rajeswaran et al. 2019, equations 3 to 6). The adjoint system is (I + H/λ)g = v, where H is the Hessian
of the support loss and v the gradient of the query loss, both at φ*. MAML drops the proximal term and differentiates
through the inner steps, which start from θ. For Reptile, see :func:`reptile_problem`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import bilevel as bl

Apply = Callable[..., jax.Array]
"""``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``."""
Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""``loss(outputs [batch, ...], y [batch, ...]) -> scalar``, a mean over the batch."""


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats, of integer ``labels`` [batch] under ``logits`` [batch, ways]."""
    import optax  # imported here, because importing optax is slow and most commands do not need it

    # Indexing the logits by label would have a scatter as its derivative, which is slow and prevents fusion.
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.losses.softmax_cross_entropy(logits, one_hot).mean()


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the mean squared error of ``outputs`` against ``targets``, both [batch, ...]."""
    return jnp.square(outputs - targets).mean()


def support_loss(apply: Apply, loss: Loss) -> Callable:
    """Return ``objective(phi, theta, task)``, the loss of φ on the support set. The argument θ is ignored.

    Objectives of the same network and loss are equal, so ``jit`` compiles a program with such an objective once.
    """
    return _SupportLoss(apply, loss)


@dataclass(frozen=True)
class _SupportLoss:
    apply: Apply
    loss: Loss

    def __call__(self, phi, theta, task):
        del theta
        return self.loss(self.apply(phi, task.support_x), task.support_y)


def task_problem(apply: Apply, loss: Loss, strength: float | None) -> bl.Problem:
    """Return the bilevel problem of one task.

    Args:
        apply: the network, ``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``.
        loss: the loss on the support set and on the query set, ``loss(outputs, y) -> scalar``.
        strength: λ of the proximal term ½ λ‖φ − θ‖². None leaves the term out.

    Returns:
        A problem whose ``data`` is a :class:`imaml.Task`. The ``aux`` of its outer function is the query loss and the
        network's outputs on the query set, ``[ways · queries, ...]``.

    Source: Rajeswaran et al. (2019), equations 3 and 4.
    """

    def outer(phi, theta, task):
        value, outputs = _query_loss(apply, loss, phi, task)
        return value, (value, outputs)

    objective = support_loss(apply, loss)
    condition = bl.Stationary(objective) if strength is None else bl.Proximal(objective, strength)
    return bl.Problem(condition, outer, has_aux=True)


def reptile_problem(apply: Apply, loss: Loss) -> bl.Problem:
    """Return Reptile's update as a bilevel problem with the outer function ½‖φ − θ‖².

    φ counts as a constant in the outer function, so the gradient with respect to θ is θ − φ. Reptile does not split the
    examples of a training task, so φ is adapted to the support and query examples together. ``aux`` is the same as in
    :func:`task_problem`, but its loss and outputs belong to examples that φ was adapted to.

    Args:
        apply: the network, as in :func:`task_problem`.
        loss: the loss, as in :func:`task_problem`.

    Source: Nichol, Achiam, Schulman (2018), algorithm 2.
    """

    def loss_on_both_sets(phi, theta, task):
        outputs = apply(phi, jnp.concatenate([task.support_x, task.query_x]))
        return loss(outputs, jnp.concatenate([task.support_y, task.query_y]))

    def outer(phi, theta, task):
        phi = jax.lax.stop_gradient(phi)
        squares = jax.tree.map(lambda t, p: jnp.sum(jnp.square(t - p)), theta, phi)
        return 0.5 * sum(jax.tree.leaves(squares)), _query_loss(apply, loss, phi, task)

    return bl.Problem(bl.Stationary(loss_on_both_sets), outer, has_aux=True)


def _query_loss(apply, loss, phi, task):
    outputs = apply(phi, task.query_x)
    return loss(outputs, task.query_y), outputs
