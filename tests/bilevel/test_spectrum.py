"""The estimates of a linear map's spectrum agree with numpy.linalg on its matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import symmetric_with

from bilevel import spectrum

pytestmark = pytest.mark.usefixtures("quick_compilation")
DTYPES = [np.float32, np.float64]


def symmetric(eigenvalues, seed=0):
    """Return a symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    return symmetric_with(eigenvalues, np.random.default_rng(seed))


def ritz_of(matrix, dtype=np.float64, **options):
    matrix = jnp.asarray(matrix, dtype)
    return np.asarray(spectrum.ritz_values(lambda u: matrix @ u, jnp.zeros(len(matrix), dtype), **options))


def rounding(matrix, dtype, factor=10):
    """Return factor·n·eps·‖matrix‖, the size of the rounding errors in products and in the factorisation."""
    return factor * len(matrix) * float(np.finfo(dtype).eps) * np.linalg.norm(matrix, 2)


class TestRitzValues:
    @pytest.mark.slow("compiles for each number of steps", fast=("3-*", "12-float32"))
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n", [1, 2, 3, 12, 30])
    def test_n_steps_give_all_eigenvalues(self, n, dtype):
        matrix = symmetric(np.linspace(-2.0, 5.0, n)).astype(dtype)
        values = ritz_of(matrix, dtype, steps=n)
        assert values.dtype == dtype and values.shape == (n,)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), rtol=0, atol=rounding(matrix, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_fewer_steps_give_the_eigenvalues_of_the_projection_onto_the_krylov_space(self, dtype):
        n, steps = 40, 6
        matrix = symmetric(np.linspace(-1.0, 3.0, n)).astype(dtype)
        start = np.random.default_rng(1).normal(size=n).astype(dtype)
        wide = matrix.astype(np.float64)
        krylov = np.stack([np.linalg.matrix_power(wide, k) @ start for k in range(steps)], axis=1)
        basis = np.linalg.qr(krylov)[0]
        expected = np.linalg.eigvalsh(basis.T @ wide @ basis)
        values = ritz_of(matrix, dtype, steps=steps, start=jnp.asarray(start))
        np.testing.assert_allclose(values, expected, rtol=0, atol=rounding(matrix, dtype, 100))

    @pytest.mark.slow("compiles for several numbers of steps", fast="float32")
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_value_lies_within_the_spectrum_and_more_steps_widen_the_range(self, dtype):
        matrix = symmetric(np.geomspace(1e-3, 10.0, 60)).astype(dtype)
        exact, slack = np.linalg.eigvalsh(matrix), rounding(matrix, dtype)
        low, high = np.inf, -np.inf
        for steps in (1, 3, 9, 27):
            values = ritz_of(matrix, dtype, steps=steps)
            assert np.all(np.diff(values) >= 0)
            assert exact[0] - slack <= values[0] <= low + slack and high - slack <= values[-1] <= exact[-1] + slack
            low, high = values[0], values[-1]
        assert high > 0.999 * exact[-1]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_value_leaves_the_spectrum_after_the_krylov_space_is_exhausted(self, dtype):
        """Three distinct eigenvalues exhaust the Krylov space in three steps. No value leaves the spectrum."""
        matrix = symmetric(np.repeat([-1.0, 2.0, 7.0], 7)).astype(dtype)
        values = ritz_of(matrix, dtype, steps=15)
        slack = rounding(matrix, dtype)
        assert values.shape == (15,)
        np.testing.assert_allclose(values[[0, -1]], [-1.0, 7.0], rtol=0, atol=slack)
        assert np.all((values >= -1.0 - slack) & (values <= 7.0 + slack))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_start_within_one_eigenspace_gives_that_eigenvalue_alone(self, dtype):
        diagonal = np.array([3.0, 3.0, -5.0, 8.0])
        start = jnp.asarray([1.0, -2.0, 0.0, 0.0], dtype)
        np.testing.assert_allclose(ritz_of(np.diag(diagonal), dtype, start=start), [3.0] * 4, rtol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("eigenvalue", "n"), [(0.0, 1), (0.0, 9), (-4.0, 1), (2.5, 9)])
    def test_a_multiple_of_the_identity_has_one_eigenvalue(self, eigenvalue, n, dtype):
        values = ritz_of(eigenvalue * np.eye(n), dtype)
        np.testing.assert_allclose(values, np.full(n, eigenvalue), rtol=10 * np.finfo(dtype).eps, atol=0)

    @pytest.mark.slow("compiles for each scale", fast="1000000000000.0")
    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_the_scale_of_the_map_does_not_matter(self, scale):
        matrix = symmetric(np.linspace(-2.0, 5.0, 20))
        for dtype in DTYPES:
            scaled = ritz_of(scale * matrix, dtype, steps=8)
            np.testing.assert_allclose(scaled / scale, ritz_of(matrix, dtype, steps=8), atol=rounding(matrix, dtype))

    def test_a_million_unknowns_in_float32_do_not_stop_the_recursion(self):
        """The recursion ends when the new vector is shorter than 10·√n·eps times the product.

        A factor of 10·n·eps would be above 1 here, and would end the recursion after one step.
        """
        n = 1_000_000
        eigenvalues = jnp.linspace(1.0, 1.5, n, dtype=jnp.float32)
        values = jax.jit(lambda: spectrum.ritz_values(lambda u: eigenvalues * u, eigenvalues, steps=6))()
        assert values[0] < 1.02 and values[-1] > 1.48

    def test_the_largest_eigenvalue_is_found_once_where_the_plain_recursion_repeats_it(self):
        matrix = symmetric([*np.linspace(0.0, 1.0, 59), 1e4])
        values = ritz_of(matrix, steps=40)
        assert np.sum(values > 100) == 1

    def test_a_map_on_a_tree_with_a_start_under_jit_and_vmap_gives_all_eigenvalues(self):
        matrix = symmetric(np.arange(6.0))

        def values_of(matrix, like, start):
            def matvec(tree):
                u = jnp.concatenate([tree["a"], tree["b"].ravel()])
                product = matrix @ u
                return {"a": product[:2], "b": product[2:].reshape(2, 2)}

            return spectrum.ritz_values(matvec, like, steps=6, start=start)

        like = {"a": jnp.zeros(2), "b": jnp.zeros((2, 2))}
        start = jax.tree.map(jnp.ones_like, like)
        one = values_of(jnp.asarray(matrix), like, start)
        batch = jax.jit(jax.vmap(values_of, in_axes=(0, None, None)))(jnp.stack([matrix, 2 * matrix]), like, start)
        np.testing.assert_allclose(one, np.arange(6.0), atol=rounding(matrix, np.float64))
        np.testing.assert_allclose(batch, np.stack([one, 2 * one]), atol=rounding(matrix, np.float64))

    def test_half_precision_products_take_a_float32_recursion(self):
        eigenvalues = jnp.asarray([1.0, 2.0, 4.0, 8.0], jnp.bfloat16)
        values = spectrum.ritz_values(lambda u: eigenvalues * u, eigenvalues)
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values[jnp.array([0, -1])], [1.0, 8.0], rtol=0.05)  # bfloat16: eps = 1/128

    def test_a_product_that_is_not_finite_gives_nan(self):
        assert np.isnan(ritz_of(np.full((3, 3), np.nan))).all()

    @pytest.mark.parametrize(("like", "steps"), [(np.zeros(3), 0), (np.zeros(0), 5)])
    def test_zero_steps_and_an_empty_vector_are_refused(self, like, steps):
        with pytest.raises(ValueError, match="steps ≥ 1 and a vector of at least 1 entry"):
            spectrum.ritz_values(lambda u: u, jnp.asarray(like), steps=steps)


@pytest.mark.parametrize("dtype", DTYPES)
class TestSpectrumOfAGeneralMap:
    def test_the_spectrum_of_a_matrix_bounds_its_singular_values_and_its_curvature(self, dtype):
        matrix = np.random.default_rng(0).normal(size=(7, 7)).astype(dtype)
        singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        found = spectrum.Spectrum(*map(float, spectrum.dense_spectrum(jnp.asarray(matrix))))
        lowest = np.linalg.eigvalsh((matrix + matrix.T).astype(np.float64) / 2)[0]
        slack = 2 * rounding(matrix, dtype, 1) * 7**0.5  # the Frobenius norm is up to √n times ‖A‖
        assert singular[0] <= found.norm <= 7**0.5 * singular[0] + slack
        assert singular[-1] - slack <= found.smallest <= singular[-1]
        assert lowest <= found.lowest <= lowest + slack

    def test_a_probe_stays_within_the_spectrum(self, dtype):
        matrix = np.random.default_rng(0).normal(size=(30, 30)).astype(dtype)
        operator = jnp.asarray(matrix)
        probed = spectrum.probed_spectrum(lambda u: operator @ u, lambda u: operator.T @ u, jnp.zeros(30, dtype))
        assert all(figure.dtype == dtype for figure in probed)
        found = spectrum.Spectrum(*map(float, probed))
        singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        lowest = np.linalg.eigvalsh((matrix + matrix.T).astype(np.float64) / 2)[0]
        assert 0.95 * singular[0] <= found.norm <= singular[0] + rounding(matrix, dtype)
        assert found.smallest >= singular[-1] and found.lowest >= lowest

    def test_the_norm_of_a_map_between_two_spaces_is_that_of_its_matrix(self, dtype):
        matrix = np.random.default_rng(0).normal(size=(5, 9)).astype(dtype)
        operator = jnp.asarray(matrix)
        found = spectrum.operator_norm(lambda u: {"image": operator @ u}, jnp.zeros(9, dtype))
        np.testing.assert_allclose(found, np.linalg.norm(matrix, 2), rtol=100 * np.finfo(dtype).eps)

    def test_a_map_on_a_tree_is_written_out_as_its_matrix(self, dtype):
        matrix = np.random.default_rng(0).normal(size=(3, 3)).astype(dtype)

        def linear(tree):
            image = jnp.asarray(matrix) @ jnp.concatenate([tree[0][None], tree[1]])
            return image[0], image[1:]

        written_out = spectrum.matrix(linear, (jnp.zeros((), dtype), jnp.zeros(2, dtype)))
        np.testing.assert_allclose(written_out, matrix, rtol=10 * np.finfo(dtype).eps)
