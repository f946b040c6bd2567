"""A deep equilibrium model in Flax: the hidden state of each image is the fixed point of a residual block.

This example is the counterpart of jaxopt's deep_equilibrium_model.py, on the digits of scikit-learn.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn import datasets

import bilevel as bl


def load():
    images, labels = datasets.load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32).reshape(-1, 8, 8, 1), jnp.asarray(labels)


def conv(features):
    # Such small initial weights make the block a contraction.
    return nn.Conv(features, (3, 3), use_bias=False, kernel_init=nn.initializers.normal(0.01))


class Block(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        y = nn.GroupNorm(8)(nn.relu(conv(16)(z)))
        y = nn.GroupNorm(8)(conv(16)(y) + x)
        return nn.GroupNorm(8)(nn.relu(y + z))


STEM, BLOCK, HEAD = nn.Conv(16, (3, 3)), Block(), nn.Dense(10)
LAYER = bl.implicit_layer(
    bl.FixedPoint(lambda z, theta, x: BLOCK.apply(theta, z, x)), bl.Anderson(20, tol=1e-2),
    bl.NormalCG(max_steps=20, tol=1e-2),
)  # fmt: skip
OPTIMIZER = optax.adam(1e-3)


def init(key):
    features = jnp.zeros((8, 8, 16))
    return {"stem": STEM.init(key, jnp.zeros((8, 8, 1))), "block": BLOCK.init(key, features, features),
            "head": HEAD.init(key, jnp.zeros(64))}  # fmt: skip


def predict(theta, image):
    x = STEM.apply(theta["stem"], image)
    z = LAYER(theta["block"], jnp.zeros_like(x), x)
    return HEAD.apply(theta["head"], nn.avg_pool(z, (4, 4), (4, 4)).ravel())


def loss(theta, images, labels):
    outputs = jax.vmap(predict, (None, 0))(theta, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels))


@jax.jit
def step(theta, state, images, labels):
    value, gradient = jax.value_and_grad(loss)(theta, images, labels)
    updates, state = OPTIMIZER.update(gradient, state)
    return optax.apply_updates(theta, updates), state, value


def learn(data, steps=100, batch=32):
    theta, values = init(jax.random.key(0)), []
    state = OPTIMIZER.init(theta)
    for k in range(steps):
        rows = (jnp.arange(batch) + k * batch) % len(data[1])
        theta, state, value = step(theta, state, data[0][rows], data[1][rows])
        values.append(value)
    return theta, jnp.stack(values)


if __name__ == "__main__":
    images, labels = load()
    theta, values = learn((images[:1500], labels[:1500]))
    right = jax.vmap(predict, (None, 0))(theta, images[1500:]).argmax(1) == labels[1500:]
    print(f"loss {values[0]:.3f} → {values[-1]:.3f}; test accuracy {right.mean():.3f}")
