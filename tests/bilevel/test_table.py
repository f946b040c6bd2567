"""Every combination that makes sense, against closed forms in float64; what is known to fail stands in a table.

A tolerance is 100·eps·κ of the condition for one solve, κ once more for each further solve in a row, and what a
solver that stops early leaves over: its residual divided by the smallest eigenvalue, all of which are above 0.3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems import CASES, newton

import bilevel as bl

SYMMETRIC = ("ridge", "quadratic", "imaml")
LINEAR = {
    "CG": bl.CG(8),
    "Cholesky": bl.Cholesky(),
    "LU": bl.LU(),
    "NormalCG": bl.NormalCG(30),
    "GMRES": bl.GMRES(8),
    "BiCGStab": bl.BiCGStab(12),
    "Neumann": bl.Neumann(60),
}
DESCENT = {
    "GradientDescent": bl.GradientDescent(0.05, 4000, tol=1e-12),
    "momentum": bl.GradientDescent(0.05, 2000, tol=1e-12, momentum=0.8),
    "HessianFree": bl.HessianFree(30, tol=1e-11),
    "Jaxopt LBFGS": bl.Jaxopt("LBFGS", tol=1e-11, maxiter=200),
}
MAPPING = {
    "FixedPointIteration": bl.FixedPointIteration(100, tol=1e-13),
    "Anderson": bl.Anderson(50, tol=1e-13),
    "Jaxopt AndersonAcceleration": bl.Jaxopt("AndersonAcceleration", tol=1e-12, maxiter=200),
}
SOLVERS = dict.fromkeys(SYMMETRIC, DESCENT) | {
    "contraction": MAPPING,
    "affine root": {"Newton": newton, "Jaxopt Broyden": bl.Jaxopt("Broyden", tol=1e-11, maxiter=200)},
}
# (case, transform or method, linear solver or inner solver): the reason it cannot work.
KNOWN_FAILURES = {
    ("contraction", "refused", "CG"): "CG needs a symmetric operator",
    ("contraction", "refused", "Cholesky"): "Cholesky needs a symmetric operator",
    ("affine root", "refused", "CG"): "CG needs a symmetric operator",
    ("affine root", "refused", "Cholesky"): "Cholesky needs a symmetric operator",
}
# The series at rate 1 diverges unless A is near the identity.
WITHOUT_NEUMANN = ("ridge", "quadratic", "imaml", "affine root")


@functools.cache
def case_of(name):
    return CASES[name]()


def assert_close(actual, expected, rtol):
    actual, expected = ravel_pytree(actual)[0], ravel_pytree(expected)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(float(jnp.abs(expected).max()), 1e-3))


def applicable(case, linear):
    if linear == "Neumann":
        return case not in WITHOUT_NEUMANN
    return (case, "refused", linear) not in KNOWN_FAILURES


LINEAR_ROWS = [(case, linear) for case in CASES for linear in LINEAR if applicable(case, linear)]


@pytest.mark.parametrize(("case", "linear"), LINEAR_ROWS)
def test_condition_by_linear_solver(case, linear):
    declared = case_of(case)
    function = bl.value_and_hypergradient(declared.problem, newton, bl.Implicit(LINEAR[linear]))
    out = function(declared.theta, declared.init, declared.data)
    power = 2 if linear == "NormalCG" else 1
    assert_close(out.gradient, declared.gradient, declared.tolerance * declared.kappa ** (power - 1))
    assert_close(out.value, declared.value(declared.theta), declared.tolerance)


@pytest.mark.parametrize(("case", "linear"), [(row[0], row[2]) for row in KNOWN_FAILURES])
def test_what_cannot_work_is_refused(case, linear):
    declared = case_of(case)
    with pytest.raises(ValueError, match=KNOWN_FAILURES[case, "refused", linear]):
        bl.implicit_layer(declared.condition, newton, LINEAR[linear])


@pytest.mark.parametrize(("case", "solver"), [(case, solver) for case in SOLVERS for solver in SOLVERS[case]])
def test_condition_by_inner_solver(case, solver):
    declared = case_of(case)
    function = bl.value_and_hypergradient(declared.problem, SOLVERS[case][solver], bl.Implicit(bl.LU()))
    out = function(declared.theta, declared.init, declared.data)
    # What a residual of 1e-11 leaves in w, times κ for what the adjoint makes of it.
    assert_close(out.gradient, declared.gradient, declared.tolerance + 1e-10 * declared.kappa)


METHODS = {"Implicit": bl.Implicit(bl.LU()), "Unrolled": bl.Unrolled(), "ForwardUnrolled": bl.ForwardUnrolled()}
CHECKPOINTED = {"Unrolled, checkpoint": bl.Unrolled(checkpoint=True), "Unrolled, last 60": bl.Unrolled(last=60)}


@pytest.mark.parametrize("method", METHODS | CHECKPOINTED)
@pytest.mark.parametrize("case", ["ridge", "imaml", "contraction"])
def test_condition_by_method(case, method):
    declared = case_of(case)
    # Each contracts by less than 0.85 a step: 0.85^200 is below rounding, 0.85^60 · 60 below 4e-3.
    rate = 0.1 if case == "imaml" else 0.2
    solver = bl.FixedPointIteration(200) if case == "contraction" else bl.GradientDescent(rate, 200)
    function = bl.value_and_hypergradient(declared.problem, solver, (METHODS | CHECKPOINTED)[method])
    out = function(declared.theta, declared.init, declared.data)
    assert_close(out.gradient, declared.gradient, 4e-3 if "last" in method else 1e-10)


def gradient(value, theta):
    return jax.grad(value)(theta)


def directional(value, theta):
    return jax.jvp(value, (theta,), (jax.tree.map(jnp.ones_like, theta),))[1]


def hessian(value, theta):
    return jax.jacfwd(jax.grad(value))(theta)


def mapped(value, theta):
    thetas = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.05]), theta)
    return jax.vmap(jax.value_and_grad(value))(thetas)


TRANSFORMS = {"grad": gradient, "jvp": directional, "hessian": hessian, "vmap": mapped}
TRANSFORM_ROWS = [
    (case, transform, linear)
    for case, linears in {"imaml": ("CG", "LU"), "contraction": ("GMRES", "LU"), "ridge": ("NormalCG",)}.items()
    for linear in linears
    for transform in TRANSFORMS
]


@pytest.mark.parametrize(("case", "transform", "linear"), TRANSFORM_ROWS)
def test_layer_by_transformation_under_jit(case, transform, linear):
    declared = case_of(case)
    layer = bl.implicit_layer(declared.condition, newton, LINEAR[linear])

    def value(theta):
        return declared.outer(layer(theta, declared.init, declared.data), theta, declared.data)

    transformed = TRANSFORMS[transform]
    actual = jax.jit(functools.partial(transformed, value))(declared.theta)
    power = {"hessian": 2}.get(transform, 1) * (2 if linear == "NormalCG" else 1)
    expected = jax.jit(functools.partial(transformed, declared.value))(declared.theta)
    assert_close(actual, expected, declared.tolerance * declared.kappa ** (power - 1))
