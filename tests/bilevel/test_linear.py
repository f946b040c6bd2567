"""Linear solvers solve systems on pytrees in float32 and float64, and report each failure."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import symmetric_with

import bilevel as bl

SYMMETRIC = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]])
GENERAL = np.array([[4.0, 1.0, 0.0], [-2.0, 3.0, 0.5], [0.0, 1.5, 2.0]])
WATCHED = bl.CG(10, engine="watched")
DEFINITE_ONLY = {"CG": bl.CG(10), "watched CG": WATCHED, "Cholesky": bl.Cholesky()}
ANY = {
    "NormalCG": bl.NormalCG(20),
    "GMRES": bl.GMRES(10),
    "BiCGStab": bl.BiCGStab(10),
    "LU": bl.LU(),
    "Neumann": bl.Neumann(400, step_size=0.2),  # the terms decay like 0.67ᵏ
}
ITERATIVE = {
    "CG": bl.CG(10),
    "watched CG": WATCHED,
    "NormalCG": bl.NormalCG(10),
    "GMRES": bl.GMRES(10),
    "BiCGStab": bl.BiCGStab(10),
}
ALL = DEFINITE_ONLY | ANY
EPS = float(np.finfo(np.float64).eps)


def operator(matrix):
    """Return the matrix as a map on trees {pair: (2,), one: ()}."""

    def matvec(v):
        product = jnp.asarray(matrix, v["one"].dtype) @ jnp.append(v["pair"], v["one"])
        return {"pair": product[:2], "one": product[2]}

    return matvec


def tree(vector, dtype=jnp.float64):
    vector = jnp.asarray(vector, dtype)
    return {"pair": vector[:2], "one": vector[2]}


def flat(v):
    return np.append(np.asarray(v["pair"], np.float64), float(v["one"]))


def tolerance(matrix, eps=EPS, power=1):
    return 100 * eps * np.linalg.cond(matrix) ** power


@pytest.mark.slow("compiles the derivatives of each solver")
@pytest.mark.parametrize("name", ALL)
def test_the_solution_of_a_call_by_itself_is_differentiable(name):
    b, inverse = jnp.array([1.0, -2.0, 0.5]), np.linalg.inv(SYMMETRIC)

    def solve(b, shift):
        return ALL[name](lambda v: jnp.asarray(SYMMETRIC) @ v + shift * v, b)[0]

    modes = [jax.jacfwd] if name == "watched CG" else [jax.jacfwd, jax.jacrev]
    for mode in modes:
        np.testing.assert_allclose(mode(solve)(b, 0.0), inverse, rtol=1e-9)
        np.testing.assert_allclose(mode(solve, 1)(b, 0.0), -inverse @ inverse @ b, rtol=1e-9)


@pytest.mark.slow("compiles each solver", fast=("CG", "LU", "GMRES"))
@pytest.mark.parametrize("name", ALL)
def test_solves_a_definite_system_on_a_tree(name):
    b = np.array([1.0, -2.0, 0.5])
    x, info = jax.jit(lambda b: ALL[name](operator(SYMMETRIC), b))(tree(b))
    np.testing.assert_allclose(flat(x), np.linalg.solve(SYMMETRIC, b), rtol=tolerance(SYMMETRIC))
    assert float(info.relative_residual) < tolerance(SYMMETRIC) and bl.Status(int(info.status)).ok


@pytest.mark.slow("compiles each solver", fast=("GMRES", "BiCGStab", "Neumann"))
@pytest.mark.parametrize("name", ANY)
def test_solves_a_general_system_and_not_its_transpose(name):
    b = np.array([1.0, -2.0, 0.5])
    x, _ = ANY[name](operator(GENERAL), tree(b))
    np.testing.assert_allclose(flat(x), np.linalg.solve(GENERAL, b), rtol=tolerance(GENERAL))


@pytest.mark.slow("compiles each solver in each precision", fast=("*-CG", "*-LU"))
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_keeps_the_dtype_and_accepts_scalars(name, dtype):
    x, info = jax.jit(lambda b: ALL[name](lambda v: jnp.asarray(4.0, dtype) * v, b))(jnp.asarray(2.0, dtype))
    assert x.dtype == dtype and x.shape == () and float(x) == pytest.approx(0.5, rel=100 * float(jnp.finfo(dtype).eps))
    assert bl.Status(int(info.status)).ok


@pytest.mark.slow("compiles a batch of dense solves")
def test_one_unknown_is_divided_and_not_factorised():
    def solve(a, b):
        return bl.LU()(lambda v: a * v, b)

    def primitives(unknowns):
        shapes = [jnp.ones((256, *unknowns))] * 2
        return set(re.findall(r"= (\w+)", str(jax.make_jaxpr(jax.vmap(solve))(*shapes))))

    assert {"custom_linear_solve", "lu"} & primitives((2,)) and not {"custom_linear_solve", "lu"} & primitives(())
    x, info = jax.vmap(solve)(jnp.array([2.0, 0.0, jnp.inf]), jnp.ones(3))
    assert float(x[0]) == 0.5
    assert [bl.Status(int(status)).name for status in info.status] == ["CONVERGED", "SINGULAR", "NONFINITE"]


@pytest.mark.slow("compiles the loop of each solver", fast=("CG", "LU", "Cholesky", "Neumann"))
@pytest.mark.parametrize("name", ALL)
def test_a_zero_right_hand_side_and_a_multiple_of_the_identity_are_exact(name):
    x, info = ALL[name](operator(SYMMETRIC), tree(np.zeros(3)))
    assert not flat(x).any() and float(info.relative_residual) == 0 and bl.Status(int(info.status)).ok
    x, info = ALL[name](operator(4 * np.eye(3)), tree([4.0, 8.0, 2.0]))
    np.testing.assert_allclose(flat(x), [1.0, 2.0, 0.5], rtol=100 * EPS)


@pytest.mark.slow(
    "compiles each solver in two precisions", fast=("1e-20-float32-CG", "1e-20-float32-LU", "1e+20-float64-CG")
)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scales_with_the_right_hand_side(name, dtype, scale):
    eps = float(jnp.finfo(dtype).eps)
    solve = jax.jit(lambda b: ALL[name](operator(SYMMETRIC), b)[0])
    one, scaled = solve(tree([1.0, -2.0, 0.5], dtype)), solve(tree([scale, -2 * scale, 0.5 * scale], dtype))
    np.testing.assert_allclose(flat(scaled) / scale, flat(one), rtol=tolerance(SYMMETRIC, eps))


@pytest.mark.slow("compiles each solver twice", fast=("*-CG", "*-LU", "*-Cholesky", "*-Neumann"))
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("where", ["b", "A"])
def test_nan_is_nonfinite(name, where):
    b = tree([1.0, np.nan if where == "b" else 1.0, 1.0])
    _, info = ALL[name](operator(SYMMETRIC * (np.nan if where == "A" else 1.0)), b)
    assert int(info.status) == bl.Status.NONFINITE


@pytest.mark.parametrize("name", DEFINITE_ONLY)
@pytest.mark.parametrize("diagonal", [(1.0, -1.0, 1.0), (-1.0, -2.0, -0.5), (2.0, -9.0, 1.0)])
def test_indefinite_is_negative_curvature(name, diagonal):
    _, info = DEFINITE_ONLY[name](operator(np.diag(diagonal)), tree([1.0, 3.0, 0.0]))
    assert int(info.status) == bl.Status.NEGATIVE_CURVATURE


def test_a_breakdown_of_cg_is_negative_curvature_and_not_nonfinite():
    _, info = bl.CG(5)(
        operator(np.diag([1.0, -1.0, 1.0])), tree([1.0, 1.0, 0.0])
    )  # the first direction is b, with ⟨b, Ab⟩ = 0
    assert int(info.status) == bl.Status.NEGATIVE_CURVATURE


def test_cholesky_reports_a_saddle_that_its_solution_does_not_show():
    _, info = bl.Cholesky()(operator(np.diag([2.0, -1.0, 0.5])), tree([1.0, 1.0, 1.0]))
    assert int(info.status) == bl.Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("matrix", [np.diag([1.0, 0.0, 1.0]), np.zeros((3, 3)), np.ones((3, 3))])
def test_lu_reports_a_singular_matrix(matrix):
    _, info = bl.LU()(operator(matrix), tree([1.0, 2.0, 0.0]))
    assert int(info.status) == bl.Status.SINGULAR


def test_a_budget_too_small_for_tol_is_max_steps_with_the_true_residual():
    diagonal = jnp.logspace(0, 6, 40)
    b = jnp.ones(40)
    x, info = bl.CG(5, tol=1e-8)(lambda v: diagonal * v, b)
    assert int(info.status) == bl.Status.MAX_STEPS
    assert float(info.relative_residual) == pytest.approx(
        float(jnp.linalg.norm(b - diagonal * x) / jnp.sqrt(40)), rel=1e-12
    )
    # Without tol: the relative residual after 5 steps is 3.6, and that of x = 0 is 1. More steps bring it below 1.
    assert int(bl.CG(5)(lambda v: diagonal * v, b)[1].status) == bl.Status.MAX_STEPS
    assert int(bl.CG(500)(lambda v: diagonal * v, b)[1].status) == bl.Status.BUDGET_USED


@pytest.mark.slow("compiles CG on a matrix of large condition")
def test_a_recursive_residual_below_the_true_one_is_stagnation():
    # κ = 1e6 in float32: the residual of CG's recursion falls below tol. The true residual stays near eps·κ.
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(symmetric_with(np.logspace(0, 6, 60), rng), jnp.float32)
    b = jnp.asarray(rng.normal(size=60), jnp.float32)
    _, info = bl.CG(3000, tol=1e-5, engine="watched")(lambda v: matrix @ v, b)
    assert float(info.relative_residual) > 1e-5 and int(info.status) == bl.Status.STAGNATION


@pytest.mark.slow("compiles each solver", fast=("CG", "LU", "Cholesky", "Neumann"))
@pytest.mark.parametrize("name", ALL)
def test_ridge_is_added_to_the_operator(name):
    solver = dataclasses.replace(ALL[name], ridge=0.5)
    b = np.array([1.0, -2.0, 0.5])
    expected = np.linalg.solve(SYMMETRIC + 0.5 * np.eye(3), b)
    np.testing.assert_allclose(flat(solver(operator(SYMMETRIC), tree(b))[0]), expected, rtol=tolerance(SYMMETRIC))


@pytest.mark.slow("compiles each solver with a start", fast=("CG", "BiCGStab"))
@pytest.mark.parametrize("name", ITERATIVE)
def test_starts_from_the_given_init(name):
    b = np.array([1.0, -2.0, 0.5])
    exact = np.linalg.solve(SYMMETRIC, b)
    solver = dataclasses.replace(ITERATIVE[name], max_steps=1, tol=1e-10)
    _, info = solver(operator(SYMMETRIC), tree(b), tree(exact))
    assert int(info.status) == bl.Status.CONVERGED
    assert int(solver(operator(SYMMETRIC), tree(b))[1].status) == bl.Status.MAX_STEPS


@pytest.mark.slow("compiles each iterative solver", fast="CG")
@pytest.mark.parametrize("name", ITERATIVE)
def test_the_inverse_as_a_preconditioner_solves_in_one_step(name):
    diagonal = jnp.logspace(0, 4, 8)
    power = 2 if name == "NormalCG" else 1  # NormalCG preconditions AᵀA
    solver = dataclasses.replace(ITERATIVE[name], max_steps=1, preconditioner=lambda r: r / diagonal**power)
    np.testing.assert_allclose(solver(lambda v: diagonal * v, jnp.ones(8))[0], 1 / diagonal, rtol=1e-12)


@pytest.mark.slow("compiles each solver with a large budget", fast="CG")
@pytest.mark.parametrize("name", ITERATIVE)
def test_a_large_budget_on_an_easy_system_keeps_the_solution(name):
    # If CG did not stop at the limit of rounding, it would compute with denormal numbers, and ⟨p, Ap⟩ of a direction p
    # could become 0 before the residual does.
    matrix = SYMMETRIC * 1e-3
    x, info = dataclasses.replace(ITERATIVE[name], max_steps=500)(operator(matrix), tree([1.0, -2.0, 0.5], jnp.float32))
    np.testing.assert_allclose(flat(x), np.linalg.solve(matrix, [1.0, -2.0, 0.5]), rtol=tolerance(matrix, 1.2e-7))
    assert bl.Status(int(info.status)).ok


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl.CG(0),
        lambda: bl.NormalCG(3, tol=-1.0),
        lambda: bl.GMRES(3, ridge=-1.0),
        lambda: bl.GMRES(3, restart=0),
        lambda: bl.LU(ridge=-1.0),
        lambda: bl.Neumann(0),
        lambda: bl.Nystrom(0),
    ],
)
def test_invalid_options_are_refused_and_the_message_names_the_number(make):
    with pytest.raises(ValueError, match=r"needs .* of at least .*, got -?\d"):
        make()


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_neumann_is_the_sum_of_its_terms(terms):
    b, step = np.array([1.0, -2.0, 0.5]), 0.2
    powers = [np.linalg.matrix_power(np.eye(3) - step * GENERAL, k) for k in range(terms)]
    x, info = bl.Neumann(terms, step_size=step)(operator(GENERAL), tree(b))
    expected = step * sum(powers) @ b
    np.testing.assert_allclose(flat(x), expected, rtol=100 * EPS)
    residual = np.linalg.norm(b - GENERAL @ expected) / np.linalg.norm(b)
    assert float(info.relative_residual) == pytest.approx(residual, rel=1e-12) and int(info.iterations) == terms


def test_neumann_that_diverges_is_a_breakdown_and_one_with_too_few_terms_is_max_steps():
    b = tree([1.0, -2.0, 0.5])
    for terms in (5, 2000):  # with 2000 terms, x overflows
        _, info = bl.Neumann(terms, step_size=5.0)(operator(SYMMETRIC), b)
        assert int(info.status) == bl.Status.BREAKDOWN
    assert int(bl.Neumann(2, step_size=0.2, tol=1e-6)(operator(SYMMETRIC), b)[1].status) == bl.Status.MAX_STEPS


@pytest.mark.parametrize("tol", [None, 1e-6])
def test_a_nan_in_a_neumann_series_is_not_reported_as_a_divergence(tol):
    solver = bl.Neumann(3, step_size=0.2, tol=tol)
    _, info = solver(lambda v: 2 * v, jnp.array([1.0, np.nan]))
    assert bl.Status(int(info.status)) is bl.Status.NONFINITE
    _, info = solver(lambda v: jnp.nan * v, jnp.ones(2))
    assert bl.Status(int(info.status)) is bl.Status.NONFINITE


@pytest.mark.parametrize("rank", [3, 8])
def test_nystrom_at_full_rank_is_the_regularised_inverse(rank):
    b, solver = np.array([1.0, -2.0, 0.5]), bl.Nystrom(rank=rank, ridge=0.3)
    expected = np.linalg.solve(SYMMETRIC + 0.3 * np.eye(3), b)
    x, info = solver(operator(SYMMETRIC), tree(b))
    # Woodbury's formula subtracts nearly equal vectors: errors grow by the largest eigenvalue over the ridge, about 15.
    np.testing.assert_allclose(flat(x), expected, rtol=tolerance(SYMMETRIC) * 20)
    assert float(info.relative_residual) < tolerance(SYMMETRIC) * 20


@pytest.mark.slow("compiles two preconditioned solves")
def test_nystrom_reports_an_answer_that_outgrew_its_residual():
    factor = np.random.default_rng(0).normal(size=(6, 8))
    matrix = factor.T @ factor  # of rank 6, so in bfloat16 x moves far along the null space
    b = jnp.asarray(matrix @ np.ones(8), jnp.bfloat16)
    x, info = bl.Nystrom(8, 1e-3)(lambda v: jnp.asarray(matrix, jnp.bfloat16) @ v, b)
    assert np.linalg.norm(np.asarray(x, float)) > 50 and info.relative_residual < 1
    assert bl.Status(int(info.status)) is bl.Status.BREAKDOWN


@pytest.mark.slow("compiles a sketch of each rank")
def test_nystrom_is_exact_for_an_operator_of_its_rank():
    factor = np.random.default_rng(0).normal(size=(9, 2))
    matrix, b = factor @ factor.T, np.arange(1.0, 10.0)
    x, info = bl.Nystrom(rank=2, ridge=0.1, tol=1e-8)(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b))
    np.testing.assert_allclose(x, np.linalg.solve(matrix + 0.1 * np.eye(9), b), rtol=1e-9)
    assert int(info.status) == bl.Status.CONVERGED
    _, info = bl.Nystrom(rank=1, ridge=0.1, tol=1e-8)(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b))
    assert int(info.status) == bl.Status.MAX_STEPS


def test_choose_linear_counts_a_number_as_one_unknown():
    condition = bl.Root(lambda w, theta, data: w["a"] - theta)
    assert " has 3 unknowns" in bl.choose_linear(condition, {"a": 0.0, "b": np.zeros(2)}).reason


def test_choose_linear_follows_the_structure_and_gives_a_reason():
    def objective(w, theta, data):
        return jnp.sum(w**2)

    small, large = jnp.zeros(3), jax.ShapeDtypeStruct((10**6,), jnp.float32)
    assert isinstance(bl.choose_linear(bl.Stationary(objective), large).solver, bl.CG)
    assert isinstance(bl.choose_linear(bl.Stationary(objective), small).solver, bl.LU)
    assert isinstance(bl.choose_linear(bl.Stationary(objective, positive_definite=True), small).solver, bl.Cholesky)
    solver, reason = bl.choose_linear(bl.Root(objective), large)
    assert isinstance(solver, bl.GMRES) and reason.startswith("Root is not symmetric")
