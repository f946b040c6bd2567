"""Ridge and logistic regression with a penalty a feature, in JAX: the objectives that all JAX libraries are handed."""

import jax
import jax.numpy as jnp


def objective(loss, w, theta, data):
    """Mean training loss with ½ Σ e^θⱼ wⱼ²."""
    return _mean(loss, data["x"] @ w, data["y"]) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)


def validation(loss, w, data):
    """Mean loss on the validation data."""
    return _mean(loss, data["x_val"] @ w, data["y_val"])


def _mean(loss, margin, y):
    return jnp.mean(jax.nn.softplus(-y * margin)) if loss == "logistic" else 0.5 * jnp.mean((margin - y) ** 2)
