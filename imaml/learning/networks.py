"""Networks as pairs of pure functions, with convolutions that stay fast when every task has its own weights.

XLA's own convolution of a few small images is some ten times slower on a CPU than the same arithmetic as one
matrix product, and under ``vmap`` over tasks, each with its own kernel, it becomes a grouped one, slower still.
So a convolution is written here as patches times a matrix, and the patches are slices (at stride 2, of a reshape
into even and odd rows and columns): no gather, hence no scatter in the gradient.
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
    """``init(key) -> parameters`` and ``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``.

    Attributes:
        init: draws parameters.
        apply: where there is batch normalisation, over the batch ``x``.
        apply_beside: ``apply_beside(parameters, x, support_x)``: the same, with each normalisation's mean and variance
            taken of ``support_x`` alone, so that an output hangs on no other row of ``x``; None without normalisation.
    """

    init: Callable[[jax.Array], Parameters]
    apply: Callable[[Parameters, jax.Array], jax.Array]
    apply_beside: Callable[[Parameters, jax.Array, jax.Array], jax.Array] | None = None


def smooth_relu(x: jax.Array) -> jax.Array:
    """softplus(10x)/10: within 0.07 of max(0, x), and without its kink."""
    return jax.nn.softplus(10 * x) / 10


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2×2 square, ``[batch, ⌊height/2⌋, ⌊width/2⌋, channels]``."""
    return _squares(x).max((2, 4))


def mean_pool(x: jax.Array) -> jax.Array:
    """The mean of each 2×2 square: what stands for :func:`max_pool` where there shall be no kinks."""
    return _squares(x).mean((2, 4))


def _squares(x):
    batch, height, width, channels = x.shape
    rows, columns = height // 2, width // 2
    return x[:, : 2 * rows, : 2 * columns].reshape(batch, rows, 2, columns, 2, channels)


def conv4(
    ways: int,
    filters: int = 64,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    kernel_gain: float = 1.0,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    head_gain: float = 1.0,
    head_bias: float = 0.0,
    pool: Callable[[jax.Array], jax.Array] | None = None,
) -> Network:
    """Four blocks of 3×3 convolution, batch normalisation and ReLU, then a linear layer.

    The network of Finn et al. (2017). Without ``pool`` it is theirs for Omniglot, with stride 2, as the public iMAML
    code sizes it: odd maps are zero-padded to even ones, so that 28×28 gives maps of 14, 7 (8), 4 and 2. With
    :func:`max_pool` after each block it is theirs for Mini-ImageNet, with stride 1: 84×84 gives 42, 21, 10 and 5.

    Batch normalisation uses the statistics of the batch it is given and keeps none: evaluated on a query set, it sees
    all of it (the published, *transductive*, protocol), unless it is applied beside a support set.

    Args:
        ways: number of classes N.
        filters: channels of each block.
        image_shape: height, width, channels.
        kernel_gain: factor on Glorot's initial kernels. The normalisation takes it out of the outputs; what
            it changes is how far a kernel is from being another one. At a larger gain the kernels' gradients
            and curvature are smaller (by the gain, and by its square), so that a task adapts more by its
            linear layer, and I + H/λ is better conditioned.
        activation: what ends each block, before the pooling; a smooth one gives a network without kinks.
        head_gain: factor on Glorot's initial matrix of the linear layer.
        head_bias: the linear layer's biases start uniform between 0 and this.
        pool: what halves the maps; None for convolutions of stride 2.

    Returns:
        A :class:`Network` from images ``[batch, height, width, channels]`` to logits ``[batch, ways]``.
    """
    height, width, channels = image_shape
    features = filters * math.prod(side // 16 if pool else -(-side // 16) for side in (height, width))
    inputs = (channels, filters, filters, filters)
    stride = 1 if pool else 2

    def init(key):
        keys = jax.random.split(key, 5)
        parameters = {f"block{i}": _block_init(keys[i], c, filters, kernel_gain) for i, c in enumerate(inputs)}
        return parameters | {"head": _dense_init(keys[4], features, ways, head_gain, head_bias)}

    def forward(parameters, x, counted=None):
        for i in range(len(inputs)):
            x = activation(_block(parameters[f"block{i}"], x, stride, counted))
            x = pool(x) if pool else x
        return _dense(parameters["head"], x.reshape(len(x), -1))

    def apply_beside(parameters, x, support_x):
        both = jnp.concatenate([support_x, x])
        return forward(parameters, both, counted=len(support_x))[len(support_x) :]

    return Network(init, forward, apply_beside)


def mlp(sizes: tuple[int, ...], activation: Callable[[jax.Array], jax.Array] = jax.nn.relu) -> Network:
    """Linear layers with ReLU between them; ``sizes`` lists the width of input, hidden and output layers."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return {f"layer{i}": _dense_init(k, *sizes[i : i + 2]) for i, k in enumerate(keys)}

    def apply(parameters, x):
        for i in range(len(sizes) - 1):
            x = _dense(parameters[f"layer{i}"], activation(x) if i else x)
        return x

    return Network(init, apply)


def convolution(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
    """A 3×3 convolution with one row and column of zeros around the image.

    Args:
        x: ``[batch, height, width, channels]``; at stride 2 an odd side is first padded to an even one at its end.
        kernel: ``[filters, 9 · channels]``, the 3×3 positions row by row, channels innermost.
        stride: 1 or 2.

    Returns:
        ``[batch, ⌈height/stride⌉, ⌈width/stride⌉, filters]``.
    """
    neighbours = patches(x) if stride == 2 else dense_patches(x)
    # As one matrix: with its axes apart, the kernel's gradient takes a tenth longer.
    filters, inputs = kernel.shape
    rows = neighbours.reshape(-1, inputs)
    if inputs < filters:  # a narrow kernel's gradient is made faster in the layout of its transpose
        product = rows @ jax.lax.optimization_barrier(kernel.T)
    else:  # not rows @ kernel.T, of which a linearisation keeps a copy
        product = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())))
    return product.reshape(*neighbours.shape[:-1], -1)


def dense_patches(x: jax.Array) -> jax.Array:
    """The 3×3 neighbourhoods at stride 1: ``[batch, height, width, 9 · channels]``."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


def patches(x: jax.Array) -> jax.Array:
    """The 3×3 neighbourhoods at stride 2: ``[batch, ⌈height/2⌉, ⌈width/2⌉, 9 · channels]``."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padding = ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0))
    halves = jnp.pad(x, padding).reshape(batch, rows + 1, 2, columns + 1, 2 * channels)
    # Position i = 0, 1, 2 of a neighbourhood: the even row, the odd row, the next even row. Of each its first two
    # positions, which lie side by side, and the third, the next even column.
    neighbours = []
    for i in range(3):
        row = halves[:, i // 2 : i // 2 + rows, i % 2]
        neighbours += [row[:, :, :columns], row[:, :, 1:, :channels]]
    return jnp.concatenate(neighbours, axis=-1)


def batch_normalise(
    x: jax.Array, scale: jax.Array, offset: jax.Array, epsilon: float = 1e-5, counted: int | None = None
) -> jax.Array:
    """Each channel to mean ``offset`` and deviation ``scale`` over all other axes of the first ``counted`` rows.

    None counts all rows. The others are shifted and scaled as those are, and do not count.
    """
    axes = tuple(range(x.ndim - 1))
    seen = x if counted is None else x[:counted]
    mean = seen.mean(axes)
    # Recomputed, so that a linearisation keeps the deviations alone.
    variance = jax.checkpoint(lambda deviation: (deviation * deviation).mean(axes), prevent_cse=False)(seen - mean)
    return (x - mean) * (scale * jax.lax.rsqrt(variance + epsilon)) + offset


def _block_init(key, channels, filters, gain):
    kernel = gain * _xavier(key, 9 * channels, filters, 9 * filters)
    return {"kernel": kernel.T, "scale": jnp.ones(filters), "offset": jnp.zeros(filters)}


def _block(parameters, x, stride, counted):
    # No bias before a batch normalisation: it would be subtracted with the mean.
    x = convolution(x, parameters["kernel"], stride)
    return batch_normalise(x, parameters["scale"], parameters["offset"], counted=counted)


def _dense_init(key, inputs, outputs, gain=1.0, most_bias=0.0):
    bias = jax.random.uniform(jax.random.fold_in(key, 1), (outputs,), maxval=most_bias) if most_bias else 0
    return {"kernel": gain * _xavier(key, inputs, outputs, outputs), "bias": jnp.zeros(outputs) + bias}


def _dense(parameters, x):
    return x @ parameters["kernel"] + parameters["bias"]


def _xavier(key, inputs, outputs, fan_out):
    """Glorot and Bengio (2010): uniform with variance 2 / (fan in + fan out)."""
    limit = math.sqrt(6 / (inputs + fan_out))
    return jax.random.uniform(key, (inputs, outputs), minval=-limit, maxval=limit)
