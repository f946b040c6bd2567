"""A few-shot task as a bilevel problem: adapt to the support set near θ, be judged on the query set.

    φ*(θ) = argmin_φ  loss(φ, support) + ½ λ‖φ − θ‖²,      outer(φ*) = loss(φ*, query)

Nothing more is needed: the meta-gradient of implicit MAML is this problem's hypergradient (Rajeswaran et
al. 2019, equations 3 to 6). Its adjoint system is (I + H/λ)g = v, H the Hessian of the support loss.
"""

from collections.abc import Callable

import jax

import bilevel as bl

Apply = Callable[..., jax.Array]
"""``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``."""
Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""``loss(outputs [batch, ...], y [batch, ...]) -> scalar``, a mean over the batch."""


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats, of integer ``labels`` [batch] under ``logits`` [batch, ways]."""
    import optax  # optax takes a while to import: only when it is used

    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def support_loss(apply: Apply, loss: Loss) -> Callable:
    """``objective(φ, θ, task)``: the loss on the support set; θ does not enter."""
    return lambda phi, theta, task: loss(apply(phi, task.support_x), task.support_y)


def task_problem(apply: Apply, loss: Loss, strength: float) -> bl.Problem:
    """The bilevel problem of one task; its ``aux`` is the outputs on the query set, ``[ways · queries, ...]``.

    Args:
        apply: the network.
        loss: of both sets.
        strength: λ of the proximal term.
    """

    def outer(phi, theta, task):
        outputs = apply(phi, task.query_x)
        return loss(outputs, task.query_y), outputs

    return bl.Problem(bl.Proximal(support_loss(apply, loss), strength), outer, has_aux=True)
