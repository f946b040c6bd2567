"""Ridge and logistic regression with one penalty per feature: the objectives for all JAX libraries."""

import jax
import jax.numpy as jnp


def objective(loss, w, theta, data):
    """Return the mean training loss plus the penalty ½ Σ e^θⱼ wⱼ²."""
    return _mean(loss, data["x"] @ w, data["y"]) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)


def validation(loss, w, data):
    """Return the mean loss on the validation data."""
    return _mean(loss, data["x_val"] @ w, data["y_val"])


def _mean(loss, margin, y):
    return jnp.mean(jax.nn.softplus(-y * margin)) if loss == "logistic" else 0.5 * jnp.mean((margin - y) ** 2)
