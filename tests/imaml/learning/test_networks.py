"""Tests of networks: convolution against XLA's, normalisation against NumPy, shapes, and the effect of the gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml.learning.networks import (
    PRODUCTS,
    batch_normalise,
    conv4,
    convolution,
    max_pool,
    mean_pool,
    mlp,
    smooth_relu,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPS = np.finfo(np.float64).eps
SHAPES = [(2, 6, 6, 1), (2, 7, 5, 3), (1, 1, 1, 2), (2, 8, 7, 1)]
FILTERS = 3


def reference_convolution(x, kernel):
    """Return XLA's convolution at stride 2. Odd sides get a zero at their end, and then zeros surround the image."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    weights = kernel.reshape(-1, 3, 3, x.shape[-1])
    layout = ("NHWC", "OHWI", "NHWC")
    return jax.lax.conv_general_dilated(x, weights, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)


def value_and_pull_back(function, x, kernel):
    value, pull_back = jax.vjp(function, x, kernel)
    return value, *pull_back(jnp.cos(value))


# With more filters than the 9 numbers of a neighbourhood, the product is computed in another way.
@pytest.mark.parametrize("shape, filters", [*((shape, FILTERS) for shape in SHAPES), ((2, 6, 6, 1), 12)])
def test_convolution_equals_xlas_in_value_and_derivative(shape, filters, x64):
    random = np.random.default_rng(sum(shape))
    x, kernel = random.normal(size=shape), random.normal(size=(filters, 9 * shape[-1]))
    ours, theirs = (
        jax.jit(lambda *inputs, f=f: value_and_pull_back(f, *inputs))(x, kernel)
        for f in (convolution, reference_convolution)
    )
    # Each result is a sum of products of numbers below 5, with at most one product for each entry of x or of the
    # kernel. The factor of 100 allows for the errors of the cotangents, which are computed from the outputs.
    tolerance = 100 * 25 * max(x.size, kernel.size) * EPS
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_at_stride_1_equals_xlas_in_value_and_derivative(shape, x64):
    random = np.random.default_rng(sum(shape))
    x, kernel = random.normal(size=shape), random.normal(size=(FILTERS, 9 * shape[-1]))

    def reference(x, kernel):
        weights = kernel.reshape(-1, 3, 3, x.shape[-1])
        return jax.lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))

    ours = jax.jit(lambda *inputs: value_and_pull_back(lambda x, k: convolution(x, k, stride=1), *inputs))(x, kernel)
    theirs = jax.jit(lambda *inputs: value_and_pull_back(reference, *inputs))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * 25 * max(x.size, kernel.size) * EPS)


@pytest.mark.slow("compiles two convolutions for each shape", fast="shape2-1")
@pytest.mark.parametrize("shape, stride", [((2, 7, 5, 3), 2), ((2, 6, 6, 1), 2), ((2, 7, 5, 3), 1)])
def test_xlas_convolution_equals_the_product_of_patches_in_value_and_derivative(shape, stride, x64):
    random = np.random.default_rng(sum(shape))
    x, kernel = random.normal(size=shape), random.normal(size=(FILTERS, 9 * shape[-1]))
    ours, theirs = (
        value_and_pull_back(lambda x, k, method=method: convolution(x, k, stride, method), x, kernel)
        for method in ("patches", "xla")
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=100 * 25 * max(x.size, kernel.size) * EPS)


def test_products_in_bfloat16_round_the_operands_of_xlas_convolution():
    x, kernel = jnp.full((1, 1, 1, 1), 1.01), jnp.zeros((1, 9)).at[0, 4].set(1.0)
    rounded = float(jnp.bfloat16(1.01))
    assert rounded != float(x[0, 0, 0, 0])
    assert float(convolution(x, kernel, 1, "xla", "bfloat16")[0, 0, 0, 0]) == rounded
    assert convolution(x, kernel, 1, "xla", "float32")[0, 0, 0, 0] == x[0, 0, 0, 0]


@pytest.mark.slow("compiles a network in each precision", fast=("xla-*", "patches-bfloat16"))
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("method", ["patches", "xla"])
def test_each_precision_computes_a_network_within_its_rounding_error(products, method):
    network = conv4(3, 4, (8, 8, 1), convolutions=method, products=products)
    parameters, x = network.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (6, 8, 8, 1))
    exact = conv4(3, 4, (8, 8, 1)).apply(parameters, x)
    assert network.apply(parameters, x).dtype == jnp.float32
    np.testing.assert_allclose(network.apply(parameters, x), exact, atol=0.1)


def test_pooling_reduces_each_square_and_drops_a_last_odd_row_and_column():
    x = np.random.default_rng(0).normal(size=(2, 5, 7, 3))
    squares = np.stack([x[:, i:4:2, j:6:2] for i in range(2) for j in range(2)])
    np.testing.assert_array_equal(max_pool(x), squares.max(0))
    np.testing.assert_allclose(mean_pool(x), squares.mean(0), rtol=1e-14)


def test_the_smooth_relu_differs_from_relu_by_at_most_a_tenth_of_ln_2(x64):
    x = jnp.linspace(-3, 3, 601)
    assert 0 < np.max(smooth_relu(x) - np.maximum(x, 0)) <= np.log(2) / 10 + 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_halves_each_side_and_rounds_up(shape):
    batch, height, width, channels = shape
    out = jax.eval_shape(convolution, jnp.zeros(shape), jnp.zeros((FILTERS, 9 * channels)))
    assert out.shape == (batch, (height + 1) // 2, (width + 1) // 2, FILTERS)


def test_batch_normalise_takes_moments_over_all_axes_but_the_channels(x64):
    random = np.random.default_rng(0)
    x, scale, offset = random.normal(3, 2, (4, 5, 3, 2)), np.array([0.5, 2.0]), np.array([-1.0, 7.0])
    expected = scale * (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) + offset
    # The tolerance allows for rounding in sums over 60 numbers below 10.
    np.testing.assert_allclose(batch_normalise(*map(jnp.asarray, (x, scale, offset))), expected, atol=60 * 10 * EPS)


def test_the_error_of_batch_normalise_is_a_few_roundings_of_the_mean():
    random = np.random.default_rng(0)
    x = (1000 + random.normal(size=(60, 2))).astype(np.float32)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    out = batch_normalise(jnp.asarray(x), jnp.ones(2), jnp.zeros(2))
    # The tolerance allows for rounding in the mean, the differences and the last sum, for numbers of size 1000.
    np.testing.assert_allclose(out, expected, rtol=0, atol=4 * 1000 * np.finfo(np.float32).eps)


def test_rows_after_the_counted_ones_are_normalised_by_the_statistics_of_the_counted_ones(x64):
    random = np.random.default_rng(0)
    x, scale, offset = random.normal(3, 2, (7, 5, 3, 2)), np.array([0.5, 2.0]), np.array([-1.0, 7.0])
    counted = x[:4]
    expected = scale * (x - counted.mean((0, 1, 2))) / np.sqrt(counted.var((0, 1, 2)) + 1e-5) + offset
    out = batch_normalise(*map(jnp.asarray, (x, scale, offset)), counted=4)
    np.testing.assert_allclose(out, expected, atol=60 * 10 * EPS)


@pytest.mark.slow("compiles a network for each way to shrink images")
@pytest.mark.parametrize("pool", [None, max_pool], ids=["stride", "pooling"])
def test_with_support_statistics_a_query_image_has_the_same_logits_alone_and_in_a_batch(pool, x64):
    network = conv4(3, 2, (16, 16, 1), pool=pool)
    parameters = network.init(jax.random.key(0))
    support, queries = (jax.random.uniform(jax.random.key(i), (6, 16, 16, 1)) for i in (1, 2))
    with_support, apply = jax.jit(network.apply_with_support_statistics), jax.jit(network.apply)
    together, alone = with_support(parameters, queries, support), with_support(parameters, queries[:1], support)
    np.testing.assert_allclose(together[:1], alone, rtol=0, atol=1e-10)
    # With the statistics of the query batch, the logits depend on the other images.
    assert np.abs(apply(parameters, queries)[:1] - apply(parameters, queries[:1])).max() > 1e-3
    # For the support images themselves, both functions use the same statistics.
    np.testing.assert_allclose(
        with_support(parameters, support, support), apply(parameters, support), rtol=0, atol=1e-10
    )
    assert np.abs(together - apply(parameters, queries)).max() > 1e-3


def test_batch_normalise_maps_a_constant_channel_to_its_offset():
    out = batch_normalise(jnp.full((3, 2, 2, 1), 0.5), jnp.ones(1), jnp.full(1, 0.25))
    np.testing.assert_array_equal(out, jnp.full((3, 2, 2, 1), 0.25))


@pytest.mark.parametrize(
    "image_shape, features", [((28, 28, 1), 4), ((84, 84, 3), 36), ((32, 16, 3), 2), ((20, 33, 1), 6), ((1, 1, 1), 1)]
)
def test_conv4_maps_images_of_any_size_to_one_logit_per_class(image_shape, features):
    network = conv4(ways=5, filters=2, image_shape=image_shape)
    parameters = jax.eval_shape(network.init, jax.random.key(0))
    assert parameters["head"]["kernel"].shape == (2 * features, 5)
    out = jax.eval_shape(network.apply, parameters, jnp.zeros((10, *image_shape)))
    assert (out.shape, out.dtype) == ((10, 5), jnp.float32)


def test_conv4_of_mini_imagenet_has_its_published_size():
    network = conv4(ways=5, filters=32, image_shape=(84, 84, 3), pool=max_pool)
    parameters = jax.eval_shape(network.init, jax.random.key(0))
    assert parameters["head"]["kernel"].shape == (5 * 5 * 32, 5)
    assert jax.eval_shape(network.apply, parameters, jnp.zeros((10, 84, 84, 3))).shape == (10, 5)


def test_conv4_of_the_paper_has_its_published_size():
    parameters = jax.eval_shape(conv4(ways=5).init, jax.random.key(0))
    kernels = 9 * 64 + 3 * 9 * 64 * 64
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters)) == kernels + 4 * 2 * 64 + 256 * 5 + 5


@pytest.mark.slow("draws and compiles networks with several gains")
def test_kernel_gain_scales_the_kernels_and_changes_outputs_only_through_epsilon(x64):
    x = jax.random.uniform(jax.random.key(1), (6, 8, 8, 1))
    networks = {gain: conv4(3, 2, (8, 8, 1), kernel_gain=gain) for gain in (1.0, 4.0, 1e6)}
    parameters = {gain: network.init(jax.random.key(0)) for gain, network in networks.items()}
    apply = jax.jit(networks[1.0].apply)
    out = {gain: apply(parameters[gain], x) for gain in networks}
    np.testing.assert_array_equal(4 * parameters[1.0]["block2"]["kernel"], parameters[4.0]["block2"]["kernel"])
    np.testing.assert_array_equal(parameters[1.0]["head"]["kernel"], parameters[4.0]["head"]["kernel"])
    # Batch normalisation adds epsilon to a variance. At a gain of 1e6 epsilon is negligible and the gain cancels. The
    # effect of epsilon falls with the gain's square.
    error = {gain: np.abs(out[gain] - out[1e6]).max() for gain in (1.0, 4.0)}
    assert 0 < error[1.0] < 0.05 * np.abs(out[1e6]).max()
    assert error[4.0] == pytest.approx(error[1.0] / 16, rel=0.2)


def test_initial_kernels_have_glorots_variance():
    kernel = conv4(ways=5, filters=64, kernel_gain=3.0).init(jax.random.key(0))["block1"]["kernel"]
    # The standard error of the variance of 36,864 uniform numbers is about 0.5 %. The tolerance is ten standard errors.
    assert float(kernel.var()) == pytest.approx(9.0 * 2 / (9 * 64 + 9 * 64), rel=0.05)
    assert abs(float(kernel.mean())) < 5 * 3.0 * np.sqrt(2 / 1152) / 192


def test_an_mlp_is_relu_between_linear_layers(x64):
    network = mlp((3, 4, 2))
    parameters = network.init(jax.random.key(0))
    parameters["layer0"]["bias"] = jnp.array([0.5, -0.5, 0.1, 0.0])
    parameters["layer1"]["bias"] = jnp.array([1.0, -1.0])
    x = np.random.default_rng(0).normal(size=(5, 3))
    first, second = ({k: np.asarray(v) for k, v in parameters[f"layer{i}"].items()} for i in range(2))
    hidden = np.maximum(x @ first["kernel"] + first["bias"], 0)
    expected = hidden @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(network.apply(parameters, jnp.asarray(x)), expected, atol=100 * EPS)
