"""Tests of the library by its own test kit, `bilevel.testing`: a small, fixed suite that uses public functions only.

`mutations.py` runs this suite on a copy of `bilevel`, with one planted fault after another.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel.testing import families

LAYOUTS = {"w": "dict", "theta": "tuple"}
QUADRATIC = families.quadratic(**LAYOUTS)
FIXED_POINT = families.fixed_point(condition=2.0, **LAYOUTS)
IMAML = families.imaml(w="dict")
RIDGE_SHIFT = 0.05
CASES = {
    "quadratic": QUADRATIC,
    "root": families.root(**LAYOUTS),
    "fixed point": FIXED_POINT,
    "ridge": families.ridge(w="dict", theta="scalar"),
    "imaml": IMAML,
    "imaml, one λ per entry": families.imaml(strength="each", w="dict"),
    "box": families.box(**LAYOUTS),
    "simplex": families.simplex(**LAYOUTS),
    "lasso": families.lasso(**LAYOUTS),
    "kkt": families.kkt(inequality=True, **LAYOUTS),
}


def layer_method(linear, problem, solver, theta, init, data):
    """Return the gradient that jax.grad takes through implicit_layer."""
    layer = bl.implicit_layer(problem.condition, solver, linear)
    return jax.grad(lambda theta: problem.outer(layer(theta, init, data), theta, data))(theta)


def shifted(linear, problem, solver, theta, init, data):
    """Return the hypergradient for L − ½ρ‖w‖² in place of the inner objective L, by a linear solver with ridge ρ.

    The ridge adds the ρI that the Hessian lacks, so the result must be the hypergradient for L. The inner solver is
    given L itself.
    """

    def weaker(w, theta, data):
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
        return problem.condition.objective(w, theta, data) - 0.5 * RIDGE_SHIFT * squares

    def solve(condition, init, theta, data):
        return bl.solve(solver, problem.condition, init, theta, data)

    return bl.Implicit(linear)(bl.Problem(bl.Stationary(weaker), problem.outer), solve, theta, init, data)


def warm(problem, solver, theta, init, data):
    """Return the hypergradient by one CG step that starts from the exact adjoint.

    The result is wrong if the solver ignores this start.
    """
    exact = bl.Implicit(bl.Cholesky())(problem, solver, theta, init, data).linear.solution
    return bl.Implicit(bl.CG(1))(problem, solver, theta, init, data, exact)


def preconditioned(problem, solver, theta, init, data):
    """Return the hypergradient by one CG step with the preconditioner A⁻¹.

    The result is exact only if the preconditioner is applied exactly once in a step.
    """
    angle = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(theta)]) @ data["direction"]
    matrix = data["matrix"] + jnp.sin(angle) * data["tilt"]

    def invert(tree):
        flat, unravel = ravel_pytree(tree)
        return unravel(jnp.linalg.solve(matrix, flat))

    return bl.Implicit(bl.CG(1, preconditioner=invert))(problem, solver, theta, init, data)


@pytest.mark.parametrize("name", CASES)
def test_families_agree_with_their_closed_forms(hypergradient, name):
    hypergradient.assert_case(CASES[name])


COMBINATIONS = {
    "CG": (IMAML, None, bl.Implicit(bl.CG(8))),
    "CG, warm": (QUADRATIC, None, warm),
    "CG, preconditioned": (QUADRATIC, None, preconditioned),
    "CG, ridge": (QUADRATIC, None, partial(shifted, bl.CG(8, ridge=RIDGE_SHIFT))),
    "Cholesky, ridge": (QUADRATIC, None, partial(shifted, bl.Cholesky(ridge=RIDGE_SHIFT))),
    "GMRES": (FIXED_POINT, None, bl.Implicit(bl.GMRES(6))),
    "Neumann": (FIXED_POINT, None, bl.Implicit(bl.Neumann(120))),
    "layer": (FIXED_POINT, None, partial(layer_method, bl.LU())),
    "layer, Proximal's scaling": (IMAML, None, partial(layer_method, bl.Cholesky())),
    "Unrolled": (IMAML, None, bl.Unrolled()),
    "ForwardUnrolled": (FIXED_POINT, None, bl.ForwardUnrolled()),
    "Anderson": (FIXED_POINT, bl.Anderson(8), bl.Implicit(bl.LU())),
    "HessianFree": (IMAML, bl.HessianFree(8), bl.Implicit(bl.CG(8))),
    # κ = 1: Q = I, so that one step leads from any start to the solution.
    "OneStep": (families.lasso(condition=1.0), None, bl.OneStep()),
    "FirstOrder": (families.lasso(condition=1.0), None, bl.FirstOrder()),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_methods_and_solvers_agree_with_the_closed_form(hypergradient, name):
    case, solver, method = COMBINATIONS[name]
    hypergradient.assert_case(case, solver, method)


# Each tolerance is 100·κ, with κ = 10, times the order of the method's error: eps^⅔ for FiniteDifference, 1/penalty for
# ValuePenalty, ridge for Nystrom, and scale² for EvolutionStrategies.
ESTIMATORS = {
    "FiniteDifference": (bl.FiniteDifference(bl.CG(8)), 4e-8),
    "ValuePenalty": (bl.ValuePenalty(1e5), 1e-2),
    "Nystrom": (bl.Implicit(bl.Nystrom(rank=3, ridge=1e-6)), 1e-3),
    "EvolutionStrategies": (bl.EvolutionStrategies(pairs=4, scale=1e-3), 1e-3),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_an_error_of_the_documented_order(hypergradient, name):
    method, rtol = ESTIMATORS[name]
    hypergradient.assert_case(QUADRATIC, method=method, rtol=rtol)


def test_unrolling_differentiates_a_start_that_depends_on_theta(hypergradient):
    def start(theta, data):
        return jax.tree.map(lambda leaf: 3.0 * jnp.sin(leaf), theta)

    solver = bl.GradientDescent(0.5, max_steps=3)
    hypergradient.assert_hypergradient(
        IMAML.problem, IMAML.theta, start, IMAML.data, solver, bl.Unrolled(), against="unrolled", rtol=1e-10
    )


def test_truncated_unrolling_differentiates_the_last_steps(hypergradient):
    """The last two of five steps are the same as two steps that start from the third iterate."""
    problem, theta, data = QUADRATIC.problem, QUADRATIC.theta, QUADRATIC.data
    middle = bl.GradientDescent(0.5, 3)(problem.condition, *jax.tree.map(jnp.asarray, (QUADRATIC.init, theta, data))).w

    def method(problem, solver, theta, init, data):
        start = jax.tree.map(jnp.asarray, QUADRATIC.init)
        return bl.Unrolled(last=2)(problem, bl.GradientDescent(0.5, 5), theta, start, data)

    hypergradient.assert_hypergradient(
        problem, theta, middle, data, bl.GradientDescent(0.5, 2), method, against="unrolled", rtol=1e-10
    )


def test_conditions_hold_at_their_solutions(hypergradient):
    for name in ("quadratic", "ridge", "imaml, one λ per entry", "kkt"):
        case = CASES[name]
        hypergradient.assert_condition(case.problem, case.theta, case.w, case.data, rtol=1e-9)


def test_float32_stays_float32(hypergradient):
    case = families.ridge(dtype="float32")
    hypergradient.assert_case(case)
    function = bl.value_and_hypergradient(case.problem, case.solver, case.method)
    assert function(case.theta, case.init, case.data).gradient.dtype == np.float32
