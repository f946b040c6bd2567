"""Networks as pairs of pure functions, with convolutions that stay fast when every task has its own weights.

On a CPU, XLA's convolution of a few small images takes about ten times as long as the same arithmetic written as one
matrix product. Under ``vmap`` over tasks that each have their own kernel, XLA uses a grouped convolution, which is
slower still. A convolution is therefore written here as a product of patches and a matrix. The patches are concatenated
slices of the image. At stride 2, a slice takes every second row. Without a gather, the gradient has no slow scatter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

Parameters = dict
"""The parameters of a network: nested dictionaries of arrays."""


@dataclass(frozen=True)
class Network:
    """A network as a pair of pure functions, ``init`` and ``apply``, and variants of ``apply``.

    Attributes:
        init: ``init(key) -> parameters`` draws initial parameters.
        apply: ``apply(parameters, x [batch, ...]) -> outputs [batch, ...]``. Batch normalisation, if any, takes the
            mean and variance of ``x``. Each output then depends on all rows of ``x``.
        apply_with_support_statistics: a function ``(parameters, x, support_x) -> outputs [batch, ...]`` that normalises
            with the mean and variance of ``support_x`` instead. An output then depends on its own row of ``x`` and on
            ``support_x``. None for a network without batch normalisation.
        features: ``features(parameters, x [batch, ...]) -> [batch, features]``, the last hidden layer, of which the
            outputs are a linear function. None if it is not known.
        features_with_support_statistics: a function ``(parameters, x, support_x) -> [batch, features]``, the last
            hidden layer of ``apply_with_support_statistics``. None if it is not known.
    """

    init: Callable[[jax.Array], Parameters]
    apply: Callable[[Parameters, jax.Array], jax.Array]
    apply_with_support_statistics: Callable[[Parameters, jax.Array, jax.Array], jax.Array] | None = None
    features: Callable[[Parameters, jax.Array], jax.Array] | None = None
    features_with_support_statistics: Callable[[Parameters, jax.Array, jax.Array], jax.Array] | None = None


def smooth_relu(x: jax.Array) -> jax.Array:
    """Return softplus(10x)/10, a smooth function that differs from max(0, x) by at most ln(2)/10 < 0.07."""
    return jax.nn.softplus(10 * x) / 10


def max_pool(x: jax.Array) -> jax.Array:
    """Return the maximum of each 2×2 square of ``x`` [batch, height, width, channels].

    The result has the shape ``[batch, ⌊height/2⌋, ⌊width/2⌋, channels]``: a last odd row or column is dropped.
    """
    return _squares(x).max((2, 4))


def mean_pool(x: jax.Array) -> jax.Array:
    """Return the mean of each 2×2 square of ``x``, a smooth replacement for :func:`max_pool`."""
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
    convolutions: str = "patches",
    products: str = "float32",
) -> Network:
    """Build a network of four convolutional blocks and a linear layer.

    A block is a 3×3 convolution, batch normalisation and the activation. Finn et al. (2017) use two such networks.
    Without ``pool``, this is their network for Omniglot, with stride 2. Odd sides are zero-padded to even ones, as in
    the public iMAML code, so 28×28 images give maps of side 14, 7 (padded to 8), 4 and 2. With :func:`max_pool`, this
    is their network for Mini-ImageNet, with stride 1: 84×84 images give maps of side 42, 21, 10 and 5.

    Batch normalisation uses the statistics of the current batch and keeps no running averages. On a query set, a logit
    therefore depends on all query images (the published, *transductive* protocol).
    ``Network.apply_with_support_statistics`` takes the statistics of a support set instead.

    Args:
        ways: number of classes, N.
        filters: channels of each block.
        image_shape: height, width and channels of an image.
        kernel_gain: factor on Glorot's initial kernels. The normalisation cancels this factor in the outputs. A gain k
            divides the gradient with respect to the kernels by k, and the curvature by k². With a large gain,
            adaptation changes mostly the linear layer, and the matrix of implicit MAML's adjoint system is better
            conditioned.
        activation: the activation at the end of each block, before pooling. If the activation and ``pool`` are
            smooth, the network is smooth.
        head_gain: factor on Glorot's initial matrix of the linear layer.
        head_bias: the initial biases of the linear layer are uniform between 0 and this number.
        pool: the pooling that halves the maps after each block. None for convolutions of stride 2.
        convolutions: how convolutions are computed, see :func:`convolution`.
        products: the precision of convolutions and of the linear layer, a key of :data:`PRODUCTS`.

    Returns:
        A :class:`Network` from images ``[batch, height, width, channels]`` to logits ``[batch, ways]``.

    Source: Finn, Abbeel, Levine (2017), section 5.2.
    """
    height, width, channels = image_shape
    last = filters * math.prod(side // 16 if pool else -(-side // 16) for side in (height, width))
    inputs = (channels, filters, filters, filters)
    stride = 1 if pool else 2

    def init(key):
        keys = jax.random.split(key, 5)
        parameters = {f"block{i}": _block_init(keys[i], c, filters, kernel_gain) for i, c in enumerate(inputs)}
        return parameters | {"head": _dense_init(keys[4], last, ways, head_gain, head_bias)}

    def features(parameters, x, counted=None):
        for i in range(len(inputs)):
            block = parameters[f"block{i}"]
            # The convolution has no bias, because the normalisation would subtract it together with the mean.
            x = convolution(x, block["kernel"], stride, convolutions, products)
            x = activation(batch_normalise(x, block["scale"], block["offset"], counted=counted))
            x = pool(x) if pool else x
        return x.reshape(len(x), -1)

    def forward(parameters, x, counted=None):
        return _dense(parameters["head"], features(parameters, x, counted), products)

    def with_support_statistics(function):
        def apply(parameters, x, support_x):
            both = jnp.concatenate([support_x, x])
            return function(parameters, both, counted=len(support_x))[len(support_x) :]

        return apply

    return Network(init, forward, with_support_statistics(forward), features, with_support_statistics(features))


def mlp(sizes: tuple[int, ...], activation: Callable[[jax.Array], jax.Array] = jax.nn.relu) -> Network:
    """Build a network of linear layers with an activation between them.

    Args:
        sizes: widths of the input, of each hidden layer, and of the output.
        activation: the function between two layers.

    Returns:
        A :class:`Network` from inputs ``[batch, sizes[0]]`` to outputs ``[batch, sizes[-1]]``.
    """

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        return {f"layer{i}": _dense_init(k, *sizes[i : i + 2]) for i, k in enumerate(keys)}

    last = len(sizes) - 2

    def features(parameters, x):
        for i in range(last):
            x = activation(_dense(parameters[f"layer{i}"], x))
        return x

    def apply(parameters, x):
        return _dense(parameters[f"layer{last}"], features(parameters, x))

    return Network(init, apply, features=features)


PRODUCTS = {
    "float32": jax.lax.Precision.HIGHEST,
    "tensorfloat32": jax.lax.Precision.HIGH,
    "bfloat16": jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
}
"""Precisions of a product of float32 matrices, by name. Sums are in float32.

Each factor is rounded to 23, 10 or 7 explicit bits of the mantissa: ``"float32"`` rounds nothing. A CPU rounds only in
XLA's convolution with ``"bfloat16"``, whose operands and result are rounded. It computes all other products in float32.
A float64 product is computed in float64, except with ``"bfloat16"``.
"""


def convolution(
    x: jax.Array, kernel: jax.Array, stride: int = 2, method: str = "patches", products: str = "float32"
) -> jax.Array:
    """Return the 3×3 convolution of images that are padded with one row or column of zeros on each side.

    Args:
        x: images ``[batch, height, width, channels]``. At stride 2, an odd side gets another zero at its end.
        kernel: ``[filters, 9 · channels]``: the 3×3 positions row by row, with the channels innermost.
        stride: 1 or 2.
        method: ``"patches"`` for a product of patches and a matrix, ``"xla"`` for XLA's convolution.
        products: the precision, a key of :data:`PRODUCTS`.

    Returns:
        ``[batch, ⌈height/stride⌉, ⌈width/stride⌉, filters]``.
    """
    if method == "xla":
        return _xla_convolution(x, kernel, stride, products)
    neighbours = patches(x) if stride == 2 else dense_patches(x)
    # Merge the axes into one matrix: the kernel's gradient takes 10 % longer if batch, rows and columns stay separate.
    filters, inputs = kernel.shape
    rows, precision = neighbours.reshape(-1, inputs), PRODUCTS[products]
    if inputs < filters:  # the kernel's gradient is then faster in the transposed layout, which the barrier keeps
        product = jnp.matmul(rows, jax.lax.optimization_barrier(kernel.T), precision=precision)
    else:  # contract in place: a linearisation of rows @ kernel.T stores a transposed copy of the kernel
        product = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), precision=precision)
    return product.reshape(*neighbours.shape[:-1], -1)


def _xla_convolution(x, kernel, stride, products):
    _, height, width, channels = x.shape
    padding = [(1, 1) if stride == 1 else (1, side % 2) for side in (height, width)]
    weights = kernel.T.reshape(3, 3, channels, -1)
    # A convolution does not accept the algorithm of bfloat16 products, so round its operands and its result instead.
    rounded = products == "bfloat16"
    dtype, precision = (jnp.bfloat16, None) if rounded else (x.dtype, PRODUCTS[products])
    convolved = jax.lax.conv_general_dilated(
        x.astype(dtype), weights.astype(dtype), (stride, stride), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision,
    )  # fmt: skip
    return convolved.astype(x.dtype)


def dense_patches(x: jax.Array) -> jax.Array:
    """Return the 3×3 neighbourhoods of each pixel at stride 1, ``[batch, height, width, 9 · channels]``."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=-1)


def patches(x: jax.Array) -> jax.Array:
    """Return the 3×3 neighbourhoods at stride 2, ``[batch, ⌈height/2⌉, ⌈width/2⌉, 9 · channels]``."""
    batch, height, width, channels = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padding = ((0, 0), (1, 2 * rows - height + 1), (1, 2 * columns - width + 1), (0, 0))
    halves = jnp.pad(x, padding).reshape(batch, rows + 1, 2, columns + 1, 2 * channels)
    # Row i = 0, 1, 2 of a neighbourhood is an even row, the odd row after it, and the next even row. In each row the
    # first two columns are adjacent in memory and form one slice. The third column, the next even one, is a slice too.
    neighbours = []
    for i in range(3):
        row = halves[:, i // 2 : i // 2 + rows, i % 2]
        neighbours += [row[:, :, :columns], row[:, :, 1:, :channels]]
    return jnp.concatenate(neighbours, axis=-1)


def batch_normalise(
    x: jax.Array, scale: jax.Array, offset: jax.Array, epsilon: float = 1e-5, counted: int | None = None
) -> jax.Array:
    """Shift and scale each channel to mean ``offset`` and standard deviation ``scale``.

    Args:
        x: ``[rows, ..., channels]``. Mean and variance are computed over all axes but the last.
        scale: ``[channels]``.
        offset: ``[channels]``.
        epsilon: added to the variance.
        counted: mean and variance are computed from this number of leading rows and applied to all rows. None computes
            them from all rows.
    """
    axes = tuple(range(x.ndim - 1))
    reference = x if counted is None else x[:counted]
    mean = reference.mean(axes)
    # Recompute the squares in the backward pass, so that a linearisation stores only the deviations from the mean.
    variance = jax.checkpoint(lambda deviation: (deviation * deviation).mean(axes), prevent_cse=False)(reference - mean)
    return (x - mean) * (scale * jax.lax.rsqrt(variance + epsilon)) + offset


def _block_init(key, channels, filters, gain):
    kernel = gain * _xavier(key, 9 * channels, filters, 9 * filters)
    return {"kernel": kernel.T, "scale": jnp.ones(filters), "offset": jnp.zeros(filters)}


def _dense_init(key, inputs, outputs, gain=1.0, max_bias=0.0):
    bias = jax.random.uniform(jax.random.fold_in(key, 1), (outputs,), maxval=max_bias) if max_bias else 0
    return {"kernel": gain * _xavier(key, inputs, outputs, outputs), "bias": jnp.zeros(outputs) + bias}


def _dense(parameters, x, products="float32"):
    return jnp.matmul(x, parameters["kernel"], precision=PRODUCTS[products]) + parameters["bias"]


def _xavier(key, inputs, outputs, fan_out):
    """Draw Glorot's initialisation (Glorot and Bengio 2010): uniform with variance 2 / (fan in + fan out)."""
    limit = math.sqrt(6 / (inputs + fan_out))
    return jax.random.uniform(key, (inputs, outputs), minval=-limit, maxval=limit)
