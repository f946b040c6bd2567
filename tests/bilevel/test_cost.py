"""A hypergradient costs little more than its parts: inner solve, adjoint solve, outer gradient and pull-back to θ."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxopt.linear_solve import solve_cg

import bilevel as bl

SAMPLES, FEATURES = 400, 300
STEPS = 3  # so few that one superfluous product would break the bound of 5 %


def fit(w, theta, data):
    x, y = data
    return jnp.mean(jax.nn.softplus(-y * (x @ w))) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)


def outer(w, theta, data):
    x, y = data
    return jnp.mean(jax.nn.softplus(-y[:100] * (x[:100] @ w)))


def descend(condition, init, theta, data):
    """Run gradient descent as unrolled steps, because XLA's cost analysis counts the body of a loop only once."""
    w = init
    for _ in range(STEPS):
        w = w - 0.1 * condition.residual(w, theta, data)
    return w


def flops(function, *arguments):
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert cost is not None
    return cost["flops"]


@pytest.mark.slow("compiles a gradient and its parts to count operations")
def test_a_hypergradient_costs_at_most_five_percent_more_than_its_parts():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, FEATURES))
    data = jnp.asarray(x), jnp.asarray(np.sign(x @ rng.normal(size=FEATURES)))
    theta, w = jnp.full(FEATURES, -3.0), jnp.asarray(rng.normal(size=FEATURES))
    condition = bl.Stationary(fit)

    def inner(theta, w):
        found = descend(condition, w, theta, data)
        return found, condition.residual(found, theta, data)

    def adjoint(theta, w, b):  # XLA counts one iteration of CG, here and in the hypergradient
        matvec = jax.linearize(lambda w: condition.residual(w, theta, data), w)[1]
        v = solve_cg(matvec, b, maxiter=20, tol=0.0)
        return v, b - matvec(v)

    def pull_back(theta, w, v):
        return jax.vjp(lambda theta: condition.residual(w, theta, data), theta)[1](v)

    hypergradient = bl.value_and_hypergradient(bl.Problem(condition, outer), descend, bl.Implicit(bl.CG(20)))
    total = flops(lambda theta, w: hypergradient(theta, w, data), theta, w)
    product = 4 * SAMPLES * FEATURES  # one product with x and one with its transpose
    parts = {
        "inner": flops(inner, theta, w),
        "adjoint": flops(adjoint, theta, w, w) - product,  # jaxopt spends a product on its zero start
        "outer": flops(lambda theta, w: jax.value_and_grad(outer, (0, 1))(w, theta, data), theta, w),
        "pull back": flops(pull_back, theta, w, w),
    }
    assert total <= 1.05 * sum(parts.values()), (total, parts)
    assert total > parts["inner"] + parts["outer"]  # the flops of both parts are counted
    assert total + product > 1.05 * sum(parts.values())  # one more product would break the bound


@pytest.mark.slow("compiles once for each number of iterations", fast="7")
@pytest.mark.parametrize("maxiter", [1, 7])
def test_an_adjoint_solve_costs_its_iterations_and_one_product(maxiter):
    products = []
    diagonal = jnp.linspace(1.0, 50.0, 300)

    def matvec(v):
        jax.debug.callback(lambda: products.append(None))
        return diagonal * v

    bl.CG(maxiter)(matvec, jnp.ones(300))
    jax.effects_barrier()
    assert len(products) == maxiter + 1  # one product an iteration, and one for the true residual


LINEAR_SOLVERS = {
    "CG": bl.CG(5),
    "watched CG": bl.CG(5, engine="watched"),
    "NormalCG": bl.NormalCG(5),
    "GMRES": bl.GMRES(5),
    "BiCGStab": bl.BiCGStab(5),
    "Neumann": bl.Neumann(5),
    "Nystrom": bl.Nystrom(5),
}


@pytest.mark.slow("compiles a batch for each linear solver")
@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_data_that_all_tasks_of_a_batch_share_are_not_copied_for_each_task(name):
    tasks, samples, features = 7, 41, 31
    x = jnp.asarray(np.random.default_rng(0).normal(size=(samples, features)))
    problem = bl.Problem(
        bl.Stationary(lambda w, theta, x: jnp.mean(jax.nn.softplus(x @ w)) + jnp.exp(theta) * w @ w),
        lambda w, theta, x: jnp.sum((x @ w) ** 2),
    )
    solver, linear = bl.GradientDescent(0.1, 5), LINEAR_SOLVERS[name]
    hypergradient = bl.value_and_hypergradient(problem, solver, bl.Implicit(linear))
    layer = bl.implicit_layer(problem.condition, solver, linear)
    thetas, init = jnp.linspace(-1, 1, tasks), jnp.zeros(features)

    def solve(theta):
        return linear(lambda v: x.T @ (x @ v) / samples + jnp.exp(theta) * v, jnp.ones(features), init)

    def derivative_of_the_layer(theta):
        return jax.grad(lambda theta: problem.outer(layer(theta, init, x), theta, x))(theta)

    for of_a_task in (lambda theta: hypergradient(theta, init, x), derivative_of_the_layer, solve):
        program = jax.jit(jax.vmap(of_a_task)).lower(thetas).compile().as_text()
        assert f"[{tasks},{features}]" in program
        shapes = itertools.permutations((tasks, samples, features))
        assert not [shape for shape in shapes if f"[{','.join(map(str, shape))}]" in program]
