"""The assertions of `bilevel.testing` pass right results, and explain a failure by coordinate, numbers and cause."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel import testing
from bilevel.testing import families

pytestmark = pytest.mark.usefixtures("quick_compilation")
CASE = families.fixed_point(w="dict", theta="dict", condition=2.0)
EXACT = bl.Implicit(bl.LU())


def check(method, solver=None, case=CASE, **options):
    solver = solver or case.solver
    options = {"against": "dense"} | options
    testing.assert_hypergradient(case.problem, case.theta, case.init, case.data, solver, method, **options)


def faulty(change):
    """Return a method whose gradient is ``change(right, direct)`` of the right gradient and ∂outer/∂θ."""

    def method(problem, solver, theta, init, data):
        out = EXACT(problem, solver, theta, init, data)
        direct = jax.grad(problem.outer, argnums=1)(out.inner.w, theta, data)
        return jax.tree.map(change, out.gradient, direct)

    return method


def untransposed(problem, solver, theta, init, data):
    """Return the gradient of a method that forgets a transpose: it solves Av = g in place of Aᵀv = g."""
    w, back = ravel_pytree(bl.solve(solver, problem.condition, init, theta, data).w)
    flat = lambda w: ravel_pytree(problem.condition.residual(back(w), theta, data))[0]  # noqa: E731
    g, direct = jax.grad(problem.outer, argnums=(0, 1))(back(w), theta, data)
    v = back(jnp.linalg.solve(jax.jacfwd(flat)(w), ravel_pytree(g)[0]))
    pull = jax.vjp(lambda theta: problem.condition.residual(back(w), theta, data), theta)[1]
    return jax.tree.map(jnp.subtract, direct, pull(v)[0])


@pytest.mark.slow("compiles each reference", fast="dense")
@pytest.mark.parametrize("against", ["finite_differences", "dense", "unrolled", ("dense", "unrolled")])
def test_a_right_gradient_passes(against):
    check(EXACT, against=against)


FAULTS = {
    "the sign of the whole gradient is flipped": faulty(lambda right, direct: -right),
    "the sign of the term through w is flipped": faulty(lambda right, direct: 2 * direct - right),
    "the term through w is missing": faulty(lambda right, direct: direct),
    "the direct term ∂outer/∂θ is missing": faulty(lambda right, direct: right - direct),
    "the term through w is multiplied by 0.5": faulty(lambda right, direct: direct + 0.5 * (right - direct)),
    "the whole gradient is multiplied by 3": faulty(lambda right, direct: 3 * right),
    "with ∂F/∂w in place of its transpose": untransposed,
    "unknown; none of the known mistakes": faulty(lambda right, direct: right**2 + 1),
    "the gradient is not finite: θ, w, F": faulty(lambda right, direct: right * jnp.nan),
}


@pytest.mark.slow("compiles a reference once for each planted fault", fast="the sign of the term through w is flipped")
@pytest.mark.parametrize("cause", FAULTS)
def test_a_wrong_gradient_fails_with_its_cause(cause):
    with pytest.raises(AssertionError, match=f"likely cause: .*{re.escape(cause)}"):
        check(FAULTS[cause])


@pytest.mark.slow("compiles a reference and the likely causes")
def test_the_message_names_leaf_coordinate_numbers_reference_and_error():
    def one_off(problem, solver, theta, init, data):
        gradient = EXACT(problem, solver, theta, init, data).gradient
        return {**gradient, "weight": gradient["weight"].at[1, 0].add(1.0)}

    expected = float(CASE.gradient["weight"][1, 0])
    with pytest.raises(AssertionError) as caught:
        check(one_off)
    message = str(caught.value)
    pattern = r"wrong at theta\['weight'\]\[1, 0\]: got (\S+), expected (\S+) \(reference dense for the solution\)"
    got, wanted = (float(number) for number in re.search(pattern, message).groups())
    assert got == pytest.approx(expected + 1, rel=1e-7) and wanted == pytest.approx(expected, rel=1e-7)
    assert "1 of 4 entries are off" in message


@pytest.mark.slow("compiles a reference and the likely causes")
@pytest.mark.parametrize("method", [EXACT, faulty(lambda right, direct: right)], ids=["reported", "bare gradient"])
def test_an_unfinished_inner_solve_is_distinguished_from_a_wrong_method(method):
    with pytest.raises(AssertionError, match=r"the inner problem is not solved: ‖F‖ = .* allow more steps"):
        check(method, solver=bl.FixedPointIteration(2))


@pytest.mark.slow("compiles a reference and the likely causes")
def test_an_unfinished_linear_solve_is_distinguished_from_a_wrong_method():
    with pytest.raises(AssertionError, match=r"the linear solve is not finished: its true residual is"):
        check(bl.Implicit(bl.GMRES(1)))


def test_a_reference_that_cannot_decide_is_a_failure():
    """The Hessian is singular, so the dense reference has an infinite uncertainty."""
    singular = bl.Stationary(lambda w, theta, data: 0.5 * w[0] ** 2 - w[0] * theta)
    problem = bl.Problem(singular, lambda w, theta, data: w[0] + w[1])
    with pytest.raises(AssertionError, match="cannot decide at theta: its own uncertainty"):
        testing.assert_hypergradient(
            problem, 1.0, jnp.zeros(2), None, bl.GradientDescent(1.0, 2), bl.OneStep(), against="dense"
        )


def test_a_gradient_of_another_shape_fails():
    with pytest.raises(AssertionError, match="the gradient is not a tree like theta: got"):
        check(lambda problem, solver, theta, init, data: jnp.zeros(4))


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match="against takes finite_differences, unrolled, dense, got 'sense'"):
        check(EXACT, against="sense")


def test_the_old_name_of_a_checks_reference_is_deprecated():
    found = testing.Check("problem", "method", "dense", 0.0, 1e-3)
    with pytest.warns(DeprecationWarning, match=r"Check.oracle is deprecated.* use reference"):
        assert found.oracle == found.reference


def test_a_case_distinguishes_a_wrong_solution_from_a_wrong_gradient():
    with pytest.raises(AssertionError, match=r"the inner solution is wrong at w\['"):
        testing.assert_case(CASE, solver=bl.FixedPointIteration(3))
    with pytest.raises(AssertionError, match="the sign of the term through w is flipped"):
        testing.assert_case(CASE, method=FAULTS["the sign of the term through w is flipped"])


@pytest.mark.slow("differentiates along many directions")
def test_more_than_64_outer_variables_are_checked_along_directions():
    condition = bl.Stationary(lambda w, theta, data: 0.5 * jnp.sum((w - jnp.sum(jnp.sin(theta))) ** 2))
    problem = bl.Problem(condition, lambda w, theta, data: jnp.sum(w**3))
    arguments = problem, jnp.linspace(0.0, 1.0, 70), jnp.zeros(2), None, bl.GradientDescent(1.0, 1)
    testing.assert_hypergradient(*arguments, EXACT, against="dense")
    with pytest.raises(
        AssertionError, match=r"wrong at direction \d.*of 8 entries are off[^@]*the sign of the whole gradient"
    ):
        testing.assert_hypergradient(*arguments, faulty(lambda right, direct: -right), against="dense")


A = np.array([[2.0, 1.0], [0.0, 2.0]])


def affine(w, theta, data):
    return {"a": A @ w["a"] - theta}


def point(w):
    """Return (θ, w, data) for `affine`, whose solution at this θ is (1, 1)."""
    return jnp.array([3.0, 2.0]), {"a": jnp.asarray(w)}, None


def test_a_condition_with_true_declarations_passes():
    testing.assert_condition(bl.Root(affine, positive_definite=True, strong_convexity=1.5), *point([1.0, 1.0]))
    testing.assert_condition(bl.Problem(bl.Root(affine), lambda w, theta, data: 0.0), *point([5.0, 1.0]), solved=False)


def stretched(w, theta, data):
    return {"a": jnp.array([1.0, -0.5]) * (w["a"] - 1)}


CONDITIONS = {
    "residual: ‖F‖ = 0.2; ‖A⁻¹F‖ / (1 + ‖w‖) = 0.0402, above 1e-05\n  solve the inner problem until": (
        bl.Root(affine),
        [1.1, 1.0],
    ),
    "declared symmetric and is not: ∂F/∂w is 1.0 at (w['a'][0], w['a'][1]) and 0.0": (
        bl.Root(affine, symmetric=True),
        [1.0, 1.0],
    ),
    "declared positive definite, but ⟨u, Au⟩ = -0.5‖u‖² for some u": (
        bl.Root(stretched, positive_definite=True),
        [1.0, 1.0],
    ),
    "strong convexity: declared 1.6; the smallest eigenvalue found is 1.5": (
        bl.Root(affine, strong_convexity=1.6),
        [1.0, 1.0],
    ),
    "F (inf at w['a'][1])": (bl.Root(lambda w, theta, data: {"a": w["a"] / (w["a"] - theta)}), [1.0, 2.0]),
    "finite: NaN or infinite: (∂F/∂w)ᵀF": (
        bl.Root(lambda w, theta, data: {"a": jnp.sqrt(jnp.abs(w["a"]))}),
        [0.0, 1.0],
    ),
    "the residual is not a tree like w": (bl.Root(lambda w, theta, data: w["a"]), [1.0, 1.0]),
}


@pytest.mark.parametrize("message", CONDITIONS)
def test_a_condition_with_a_false_declaration_fails(message):
    condition, w = CONDITIONS[message]
    theta = jnp.array([3.0, 2.0])
    with pytest.raises(AssertionError, match=re.escape(message)):
        testing.assert_condition(condition, theta, {"a": jnp.asarray(w)}, None)


@pytest.mark.slow("runs every check of a large condition")
def test_a_large_condition_is_checked_by_products():
    size = 1200
    weights = jnp.linspace(1.0, 2.0, size)
    right = bl.Root(lambda w, theta, data: weights * w, symmetric=True, positive_definite=True)
    testing.assert_condition(right, None, jnp.zeros(size), None)
    twisted = bl.Root(lambda w, theta, data: weights * w + 0.1 * jnp.roll(w, 1), symmetric=True)
    with pytest.raises(AssertionError, match=r"declared symmetric and is not: \|⟨u, Av⟩ − ⟨Au, v⟩\| = "):
        testing.assert_condition(twisted, None, jnp.zeros(size), None)
