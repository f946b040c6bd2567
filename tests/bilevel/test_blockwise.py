"""Blockwise solves block-diagonal systems as a dense solve of each block does, and other operators give BREAKDOWN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

COUNT, SIZE = 5, 3
RANDOM = np.random.default_rng(0)
GENERAL = RANDOM.normal(size=(COUNT, SIZE, SIZE)) + 4 * np.eye(SIZE)
DEFINITE = GENERAL @ GENERAL.transpose(0, 2, 1)
B = RANDOM.normal(size=(COUNT, SIZE))


def as_tree(vectors):
    """Return vectors ``[count, 3]`` as a tree with two leaves."""
    return {"pair": vectors[:, :2], "one": vectors[:, 2]}


def operator(blocks, coupling=0.0):
    """Return the function that multiplies each vector by its block and adds ``coupling`` times the previous vector."""

    def matvec(v):
        vectors = jnp.concatenate([v["pair"], v["one"][:, None]], axis=1)
        product = jnp.einsum("mij,mj->mi", jnp.asarray(blocks, vectors.dtype), vectors)
        return as_tree(product + coupling * jnp.roll(vectors, 1, axis=0))

    return matvec


@pytest.mark.parametrize(
    ("linear", "blocks", "dtype"),
    [(bl.LU(), GENERAL, jnp.float64), (bl.LU(0.5), GENERAL, jnp.float32), (bl.Cholesky(0.5), DEFINITE, jnp.float64)],
)
def test_the_solution_is_that_of_a_dense_solve_of_each_block(linear, blocks, dtype):
    x, info = jax.jit(lambda b: bl.Blockwise(linear)(operator(blocks), b))(as_tree(jnp.asarray(B, dtype)))
    shifted = blocks + linear.ridge * np.eye(SIZE)
    expected = as_tree(np.linalg.solve(shifted, B[..., None])[..., 0])
    # The relative error is at most about eps times the condition number, which is below 20 for GENERAL and below 400
    # for DEFINITE.
    rtol = 1e3 * float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda found, exact: np.testing.assert_allclose(found, exact, rtol, rtol), x, expected)
    assert x["one"].dtype == dtype and bl.Status(int(info.status)).name == "CONVERGED"
    assert float(info.relative_residual) < rtol
    rcond = min(1 / np.linalg.cond(block, 1) for block in shifted)
    assert 0.99 * rcond < float(info.rcond) < 3 * rcond


def test_ten_thousand_blocks_need_no_large_matrix():
    slopes = jnp.linspace(1.0, 2.0, 20_000).reshape(10_000, 2)  # as one dense matrix, 3.2 GB
    x, _ = jax.jit(lambda b: bl.Blockwise(bl.LU())(lambda v: slopes * v, b))(jnp.ones((10_000, 2)))
    np.testing.assert_allclose(x, 1 / slopes, rtol=1e-12)


def test_an_operator_that_couples_the_blocks_breaks_down():
    def status(coupling):
        return bl.Blockwise(bl.LU())(operator(GENERAL, coupling), as_tree(jnp.asarray(B)))[1].status

    found = jax.jit(jax.vmap(status))(jnp.array([0.0, 1e-5, 1.0, 1e3]))
    assert [bl.Status(int(status)).name for status in found] == ["CONVERGED", *["BREAKDOWN"] * 3]


def test_one_bad_block_decides_the_status():
    indefinite, singular, broken = DEFINITE.copy(), DEFINITE.copy(), DEFINITE.copy()
    indefinite[1, 0, 0], singular[2, 0], broken[3, 1, 1] = -1.0, singular[2, 1], np.nan
    for linear, matrices, names in (
        (bl.Cholesky(), [indefinite], ["NEGATIVE_CURVATURE"]),
        (bl.LU(), [singular, broken], ["SINGULAR", "NONFINITE"]),
    ):

        def status(blocks, linear=linear):
            return bl.Blockwise(linear)(operator(blocks), as_tree(jnp.asarray(B)))[1].status

        found = jax.jit(jax.vmap(status))(jnp.array(matrices))
        assert [bl.Status(int(status)).name for status in found] == names


X, Y = (RANDOM.normal(size=size) for size in ((COUNT, 6, SIZE), (COUNT, 6)))


def one_fit(w, theta, data):
    """Return the objective of one ridge regression."""
    x, y = data
    return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)


def fits(w, theta, data):
    return jnp.sum(jax.vmap(one_fit, (0, None, 0))(w, theta, data))


def outer(w, theta, data):
    return jnp.sum(jnp.sin(w).sum(axis=0) ** 2)  # depends on all problems together


CONDITIONS = {
    "Stationary": bl.Stationary(fits),
    "Proximal": bl.Proximal(fits, lambda theta, data: jnp.exp(theta), lambda theta, data: jnp.ones((COUNT, SIZE))),
}


@pytest.mark.slow("compiles a hypergradient for each condition", fast="Stationary")
@pytest.mark.parametrize("name", CONDITIONS)
def test_the_hypergradient_of_many_regressions_equals_central_differences(name):
    theta, start = jnp.array([-1.0, 0.0, 0.5]), jnp.zeros((COUNT, SIZE))
    problem, solver = bl.Problem(CONDITIONS[name], outer), bl.HessianFree(3, cg_steps=30, tol=1e-10)
    out = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.Blockwise(bl.Cholesky())))(theta, start, (X, Y))

    def value(theta):
        penalty, pull = np.exp(theta), (np.exp(theta) if name == "Proximal" else np.zeros(SIZE))
        hessian = np.asarray(X).transpose(0, 2, 1) @ np.asarray(X) + np.diag(penalty + pull)
        right = np.einsum("mki,mk->mi", X, Y) + pull
        return np.sum(np.sin(np.linalg.solve(hessian, right[..., None])[..., 0]).sum(axis=0) ** 2)

    unit = 1e-5 * np.eye(SIZE)
    differences = [(value(theta + e) - value(theta - e)) / 2e-5 for e in unit]
    np.testing.assert_allclose(out.value, value(np.asarray(theta)), rtol=1e-8)
    np.testing.assert_allclose(out.gradient, differences, rtol=1e-6)  # differences in float64 have about 8 digits


@pytest.mark.slow("compiles two layers in both modes")
def test_a_layer_has_the_jacobian_of_a_batch_of_layers():
    theta, solver = jnp.array([-1.0, 0.0, 0.5]), bl.HessianFree(3, cg_steps=30, tol=1e-10)
    whole = bl.implicit_layer(bl.Stationary(fits), solver, bl.Blockwise(bl.LU()))
    single = bl.implicit_layer(bl.Stationary(one_fit), solver, bl.LU())
    batch = lambda theta: jax.vmap(single, (None, None, 0))(theta, jnp.zeros(SIZE), (X, Y))  # noqa: E731
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jacobian(whole)(theta, jnp.zeros((COUNT, SIZE)), (X, Y))
        np.testing.assert_allclose(found, jacobian(batch)(theta), rtol=1e-8)


def test_what_cannot_be_divided_into_blocks_is_refused():
    with pytest.raises(TypeError, match=r"factorises each block by LU\(\) or Cholesky\(\), got CG"):
        bl.Blockwise(bl.CG(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Blockwise needs a w whose leaves have one common leading axis"):
        bl.Blockwise(bl.LU())(lambda v: v, {"a": jnp.ones((2, 3)), "b": jnp.ones(3)})
    problem = bl.Problem(bl.Root(lambda w, theta, data: w - theta), outer)
    with pytest.raises(ValueError, match="Blockwise needs a symmetric operator"):
        method = bl.Implicit(bl.Blockwise(bl.Cholesky()))
        bl.value_and_hypergradient(problem, bl.GaussNewton(1), method)(B, jnp.asarray(B), None)
