"""Norms of trees: at scales whose squares over- or underflow, under vmap, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import tree

SCALES = (1.0, 1e-30, 1e30, 0.0)
"""Factors of a vector in float32. The squares of its entries underflow with the second, and overflow with the third."""


def vectors(scales):
    return jnp.asarray(np.outer(scales, [3.0, 0.0, 4.0]), jnp.float32)


def test_a_norm_is_right_where_squares_over_or_underflow():
    for scale, vector in zip(SCALES, vectors(SCALES), strict=True):
        np.testing.assert_allclose(tree.norm({"a": vector, "count": jnp.int32(7)}), 5 * scale, rtol=1e-6)


def test_norms_under_vmap_are_those_of_the_single_tasks():
    batch = vectors(SCALES)
    np.testing.assert_array_equal(jax.vmap(tree.norm)(batch), jnp.stack([tree.norm(task) for task in batch]))


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale])
def test_the_derivative_of_a_norm_under_vmap_is_the_unit_vector(scale):
    # The other task has squares that neither over- nor underflow.
    found = jax.vmap(jax.grad(tree.norm))(vectors([1.0, scale]))
    np.testing.assert_allclose(found, [[0.6, 0, 0.8]] * 2, rtol=1e-6)
    _, tangent = jax.jvp(jax.vmap(tree.norm), (vectors([1.0, scale]),), (jnp.ones((2, 3), jnp.float32),))
    np.testing.assert_allclose(tangent, [1.4, 1.4], rtol=1e-6)


def test_a_norm_under_vmap_divides_by_the_largest_entry_in_a_branch_only():
    compiled = jax.jit(jax.vmap(tree.norm)).lower(vectors([1.0, 2.0])).as_text()
    assert "stablehlo.case" in compiled and "stablehlo.maximum" not in compiled.split("stablehlo.case")[0]


def test_a_distance_is_the_norm_of_the_difference():
    for scale, vector in zip(SCALES, vectors(SCALES), strict=True):
        other = jnp.full(3, scale, jnp.float32)
        expected = np.linalg.norm(np.float64(vector) - np.float64(other))
        found = tree.distance({"a": vector, "count": jnp.int32(7)}, {"a": other, "count": jnp.int32(3)})
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(tree.distance)(vector[None], other[None]), [expected], rtol=1e-6)


def test_a_distance_has_the_dtype_of_the_difference():
    with jax.numpy_dtype_promotion("standard"):
        found = tree.distance(jnp.float32([1e30, 0]), jnp.float64([0, 1e300]))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, 1e300, rtol=1e-12)


def test_the_norm_of_an_empty_tree_is_zero():
    assert tree.norm({}) == 0
