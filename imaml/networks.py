"""Networks as pairs of pure functions, with convolutions that stay fast when every task has its own weights.

XLA's own convolution of a few small images is some ten times slower on a CPU than the same arithmetic as one
matrix product, and under ``vmap`` over tasks, each with its own kernel, it becomes a grouped one, slower still.
So a stride-2 convolution is written here as patches times a matrix, and the patches are slices of a reshape
into even and odd rows and columns: no gather, hence no scatter in the gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Parameters = dict
"""A dictionary of arrays, or of such dictionaries."""


@dataclass(frozen=True)
class Network:
    """``init(key) -> parameters`` and ``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``."""

    init: Callable[[jax.Array], Parameters]
    apply: Callable[[Parameters, jax.Array], jax.Array]


def conv4(
    ways: int,
    filters: int = 64,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    kernel_gain: float = 1.0,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
) -> Network:
    """Four blocks of 3×3 convolution (stride 2), batch normalisation and ReLU, then a linear layer.

    The network of Finn et al. (2017) for Omniglot, as the public iMAML code sizes it: odd maps are
    zero-padded to even ones, so that 28×28 gives maps of 14, 7 (8), 4 and 2. Batch normalisation uses the
    statistics of the batch it is given and keeps none: evaluated on a query set, it sees all of it
    (the published, *transductive*, protocol).

    Args:
        ways: number of classes N.
        filters: channels of each block.
        image_shape: height, width, channels.
        kernel_gain: factor on Glorot's initial kernels. The normalisation takes it out of the outputs; what
            it changes is how far a kernel is from being another one. At a larger gain the kernels' gradients
            and curvature are smaller (by the gain, and by its square), so that a task adapts more by its
            linear layer, and I + H/λ is better conditioned.
        activation: what ends each block; a smooth one gives a network without kinks.

    Returns:
        A :class:`Network` from images ``[batch, height, width, channels]`` to logits ``[batch, ways]``.
    """
    height, width, channels = image_shape
    features = filters * math.prod(-(-side // 16) for side in (height, width))
    inputs = (channels, filters, filters, filters)

    def init(key):
        keys = jax.random.split(key, 5)
        parameters = {f"block{i}": _block_init(keys[i], c, filters, kernel_gain) for i, c in enumerate(inputs)}
        return parameters | {"head": _dense_init(keys[4], features, ways)}

    def apply(parameters, x):
        for i in range(len(inputs)):
            x = activation(_block(parameters[f"block{i}"], x))
        return _dense(parameters["head"], x.reshape(len(x), -1))

    return Network(init, apply)


def mlp(sizes: tuple[int, ...]) -> Network:
    """Linear layers with ReLU between them; ``sizes`` lists the width of input, hidden and output layers."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return {f"layer{i}": _dense_init(k, *sizes[i : i + 2]) for i, k in enumerate(keys)}

    def apply(parameters, x):
        for i in range(len(sizes) - 1):
            x = _dense(parameters[f"layer{i}"], jax.nn.relu(x) if i else x)
        return x

    return Network(init, apply)


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3×3 convolution with stride 2 and one row and column of zeros around the (even) image.

    Args:
        x: ``[batch, height, width, channels]``; an odd side is first padded to an even one at its end.
        kernel: ``[9 · channels, filters]``, the 3×3 positions row by row, channels innermost.

    Returns:
        ``[batch, ⌈height/2⌉, ⌈width/2⌉, filters]``.
    """
    neighbours = patches(x)
    # As one matrix: with its axes apart, the kernel's gradient takes a tenth longer.
    product = neighbours.reshape(-1, neighbours.shape[-1]) @ kernel
    return product.reshape(*neighbours.shape[:-1], -1)


def patches(x: jax.Array) -> jax.Array:
    """The 3×3 neighbourhoods at stride 2: ``[batch, ⌈height/2⌉, ⌈width/2⌉, 9 · channels]``."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padding = ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0))
    halves = jnp.pad(x, padding).reshape(batch, rows + 1, 2, columns + 1, 2, channels)
    # Position d = 0, 1, 2 of a neighbourhood: the even row, the odd row, the next even row.
    neighbours = [
        halves[:, i // 2 : i // 2 + rows, i % 2, j // 2 : j // 2 + columns, j % 2] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(neighbours, axis=-1)


def batch_normalise(x: jax.Array, scale: jax.Array, offset: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Each channel to mean ``offset`` and deviation ``scale`` over all other axes of this batch."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    variance = jnp.square(x - mean).mean(axes)
    return (x - mean) * (scale * jax.lax.rsqrt(variance + epsilon)) + offset


def _block_init(key, channels, filters, gain):
    kernel = gain * _xavier(key, 9 * channels, filters, 9 * filters)
    return {"kernel": kernel, "scale": jnp.ones(filters), "offset": jnp.zeros(filters)}


def _block(parameters, x):
    # No bias before a batch normalisation: it would be subtracted with the mean.
    x = convolution(x, parameters["kernel"])
    return batch_normalise(x, parameters["scale"], parameters["offset"])


def _dense_init(key, inputs, outputs):
    return {"kernel": _xavier(key, inputs, outputs, outputs), "bias": jnp.zeros(outputs)}


def _dense(parameters, x):
    return x @ parameters["kernel"] + parameters["bias"]


def _xavier(key, inputs, outputs, fan_out):
    """Glorot and Bengio (2010): uniform with variance 2 / (fan in + fan out)."""
    limit = math.sqrt(6 / (inputs + fan_out))
    return jax.random.uniform(key, (inputs, outputs), minval=-limit, maxval=limit)
