"""A few-shot task as a bilevel problem: adapt to the support set near θ, be judged on the query set.

    φ*(θ) = argmin_φ  loss(φ, support) + ½ λ‖φ − θ‖²,      outer(φ*) = loss(φ*, query)

Nothing more is needed: the meta-gradient of implicit MAML is this problem's hypergradient (Rajeswaran et
al. 2019, equations 3 to 6). Its adjoint system is (I + H/λ)g = v, H the Hessian of the support loss. MAML's problem is
the one without the proximal term, differentiated through its steps from θ; Reptile's has another outer function.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

import bilevel as bl

Apply = Callable[..., jax.Array]
"""``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``."""
Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""``loss(outputs [batch, ...], y [batch, ...]) -> scalar``, a mean over the batch."""


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats, of integer ``labels`` [batch] under ``logits`` [batch, ways]."""
    import optax  # optax takes a while to import: only when it is used

    # By one-hot labels: the derivative of picking an entry is a scatter, which is slow and hinders fusion.
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.losses.softmax_cross_entropy(logits, one_hot).mean()


def squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of ``outputs`` against ``targets``, both [batch, ...]."""
    return jnp.square(outputs - targets).mean()


def support_loss(apply: Apply, loss: Loss) -> Callable:
    """``objective(φ, θ, task)``: the loss on the support set; θ does not enter."""
    return lambda phi, theta, task: loss(apply(phi, task.support_x), task.support_y)


def task_problem(apply: Apply, loss: Loss, strength: float | None) -> bl.Problem:
    """The bilevel problem of one task.

    Its ``aux`` is what is reported of the query set: the loss, and the outputs ``[ways · queries, ...]``.

    Args:
        apply: the network.
        loss: of both sets.
        strength: λ of the proximal term; None for none.
    """

    def outer(phi, theta, task):
        value, outputs = _query_loss(apply, loss, phi, task)
        return value, (value, outputs)

    objective = support_loss(apply, loss)
    condition = bl.Stationary(objective) if strength is None else bl.Proximal(objective, strength)
    return bl.Problem(condition, outer, has_aux=True)


def reptile_problem(apply: Apply, loss: Loss) -> bl.Problem:
    """Reptile as a bilevel problem: its outer function is ½‖φ − θ‖², φ a constant, so its gradient is θ − φ.

    φ is adapted to support and query images together, as published (Nichol, Achiam, Schulman 2018: a training task
    has no query set), so that ``aux``, as in :func:`task_problem`, tells of examples that were learned from.
    """

    def everything(phi, theta, task):
        outputs = apply(phi, jnp.concatenate([task.support_x, task.query_x]))
        return loss(outputs, jnp.concatenate([task.support_y, task.query_y]))

    def outer(phi, theta, task):
        phi = jax.lax.stop_gradient(phi)
        apart = jax.tree.map(lambda t, p: jnp.sum(jnp.square(t - p)), theta, phi)
        return 0.5 * sum(jax.tree.leaves(apart)), _query_loss(apply, loss, phi, task)

    return bl.Problem(bl.Stationary(everything), outer, has_aux=True)


def _query_loss(apply, loss, phi, task):
    outputs = apply(phi, task.query_x)
    return loss(outputs, task.query_y), outputs
