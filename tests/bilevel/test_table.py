"""Combinations of a condition, an inner solver, a method, a linear solver and a transformation, in float64.

The conditions are all but LeastSquares. Each combination agrees with a closed form (conditions_solved.py), or falls
under one of the RULES below, or is left out because other combinations represent it. Combinations under a rule are
tested as well. A refused combination raises an error with the rule's reason. A combination whose linear solve fails
reports a failed status, except in a layer, which returns no status. A combination without a second derivative raises an
error when JAX asks for it. The tests go through the product of all five dimensions, so no combination is forgotten.

Compiling all combinations takes some 400 s. All combinations are therefore tested for two conditions only, a symmetric
and a general one. For every other condition, Implicit is tested with each inner solver and LU. Each other method is
tested with one inner solver that a seed draws, and with each linear solver that it takes. Every possible pair of values
from two dimensions is then covered. Refusals need no compilation, so they are tested for every condition. WHOLE_TABLE=1
in the environment runs everything.

For most pairs of a condition and a method, one program is compiled, in which ``lax.switch`` chooses the solvers. One
forward pass along all directions gives value, gradient, directional derivative and Hessian, all under vmap.
"""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import optimised
from conditions_solved import CASES
from jax.flatten_util import ravel_pytree
from problems import newton

import bilevel as bl

pytestmark = pytest.mark.usefixtures("quick_compilation")

INNER_TOL = 1e-11
"""The tolerance of the inner solvers that take one."""
SOLVERS = {
    "GradientDescent": bl.GradientDescent(0.9, 60),
    "momentum": bl.GradientDescent(0.7, 110, momentum=0.3),
    "Optax": bl.Optax(optax.sgd(0.9), 60),
    "HessianFree": bl.HessianFree(20, tol=INNER_TOL),
    "FixedPointIteration": bl.FixedPointIteration(60),
    "Anderson": bl.Anderson(30, tol=INNER_TOL),
    "Jaxopt": None,  # `solver_of` takes it from JAXOPT, by the kind of condition
    "function": newton,
}
JAXOPT = {
    "Stationary": bl.Jaxopt("OptaxSolver", opt=optax.sgd(0.9), tol=INNER_TOL, maxiter=100),
    "Root": bl.Jaxopt("Broyden", tol=INNER_TOL, maxiter=100),
    "FixedPoint": bl.Jaxopt("AndersonAcceleration", tol=INNER_TOL, maxiter=200),
    "Projected": bl.Jaxopt("ProjectedGradient", stepsize=0.8, tol=INNER_TOL, maxiter=200),
    "ProximalGradient": bl.Jaxopt("ProximalGradient", stepsize=0.8, tol=INNER_TOL, maxiter=200),
    "KKT": bl.Jaxopt("OSQP", tol=INNER_TOL, maxiter=2000),
}
LINEAR = {
    "CG": bl.CG(5),
    "NormalCG": bl.NormalCG(12),
    "GMRES": bl.GMRES(5),
    "BiCGStab": bl.BiCGStab(8),
    "LU": bl.LU(),
    "Cholesky": bl.Cholesky(),
    "Neumann": bl.Neumann(100, tol=1e-9),
    "Nystrom": bl.Nystrom(5, ridge=1e-6),
}
PENALTY, SIGMA = 1e5, 1e-3
METHODS: dict[str, Callable] = {
    "Implicit": bl.Implicit,
    "layer": None,  # made by implicit_layer
    "FiniteDifference": bl.FiniteDifference,
    "Unrolled": lambda linear: bl.Unrolled(),
    "ForwardUnrolled": lambda linear: bl.ForwardUnrolled(),
    "OneStep": lambda linear: bl.OneStep(),
    "FirstOrder": lambda linear: bl.FirstOrder(),
    "ValuePenalty": lambda linear: bl.ValuePenalty(PENALTY),
    "EvolutionStrategies": lambda linear: bl.EvolutionStrategies(2, scale=SIGMA),
}
WITH_LINEAR = ("Implicit", "layer", "FiniteDifference")
LINEARS_OF = {method: tuple(LINEAR) if method in WITH_LINEAR else ("none",) for method in METHODS}
TRANSFORMS = ("grad", "jvp", "hessian", "vmap", "jit")


@dataclass(frozen=True)
class Combination:
    condition: str
    solver: str
    method: str
    linear: str
    transform: str

    @property
    def kind(self) -> str:
        return self.condition.split(",")[0]


PRODUCT = [
    Combination(condition, solver, method, linear, transform)
    for condition, solver, method in itertools.product(CASES, SOLVERS, METHODS)
    for linear, transform in itertools.product(LINEARS_OF[method], TRANSFORMS)
]

DESCENT = ("Stationary", "Proximal")
MAPPED = ("FixedPoint", "Projected", "ProximalGradient")
FIRST_DERIVATIVE = ("OneStep", "FirstOrder", "FiniteDifference", "ValuePenalty", "EvolutionStrategies")
# Rules for combinations that cannot agree with the closed form. Each has a reason (for a refusal, a pattern of the
# error's message), an outcome, and a predicate on combinations. The first rule that holds counts.
RULES = [
    (
        "needs a solver that works by products",
        "refused",
        lambda c: c.method == "FiniteDifference" and c.linear not in ("CG", "Neumann"),
    ),
    (
        "needs a symmetric operator",
        "refused",
        lambda c: (
            c.method in ("Implicit", "layer") and c.linear in ("CG", "Cholesky", "Nystrom") and c.kind not in DESCENT
        ),
    ),
    (
        "differentiates an inner objective",
        "refused",
        lambda c: c.method in ("FiniteDifference", "ValuePenalty") and c.kind not in DESCENT,
    ),
    (
        "needs a proximal term or a mapping, and .* has neither",
        "refused",
        lambda c: c.method == "FirstOrder" and c.kind in ("Stationary", "Root", "KKT"),
    ),
    (
        "differentiates a fixed number of steps",
        "refused",
        lambda c: c.method == "Unrolled" and c.solver in ("HessianFree", "Anderson", "Jaxopt", "function"),
    ),
    (
        "differentiates a step without memory",
        "refused",
        lambda c: c.method == "OneStep" and c.solver in ("Optax", "HessianFree", "Jaxopt", "function"),
    ),
    (
        "needs a condition that is the gradient of an objective",
        "refused",
        lambda c: c.solver in ("GradientDescent", "momentum", "Optax", "HessianFree") and c.kind not in DESCENT,
    ),
    (
        "repeats a mapping",
        "refused",
        lambda c: c.solver in ("FixedPointIteration", "Anderson") and c.kind not in MAPPED,
    ),
    (
        "the Neumann series needs ‖I − A‖ < 1, and the A of a saddle point is indefinite",
        "reported",
        lambda c: c.linear == "Neumann" and c.kind == "KKT",
    ),
    (
        "does not know this derivative of its result",
        "refused twice",
        lambda c: c.method in FIRST_DERIVATIVE and c.transform == "hessian",
    ),
]


COMPLETE = tuple(CASES) if os.environ.get("WHOLE_TABLE") == "1" else ("Proximal", "FixedPoint")
RANDOM = np.random.default_rng(0)
ORDERS = {(condition, method): RANDOM.permutation(list(SOLVERS)) for condition in CASES for method in METHODS}


@functools.cache
def outcome_of(combination):
    """Return the outcome of the first rule that holds, or "exact"."""
    return next((outcome for _, outcome, holds in RULES if holds(combination)), "exact")


@functools.cache
def drawn_solver(condition, method):
    """Return the one inner solver with which a method is tested on a condition that is not in COMPLETE."""
    by_method = [c for c in PRODUCT if (c.condition, c.method) == (condition, method) and outcome_of(c) != "refused"]
    fitting = {c.solver for c in by_method}
    return next((solver for solver in ORDERS[condition, method] if solver in fitting), None)


@functools.cache
def planned_outcome(combination):
    """Return the outcome that is tested, or "left out" if other combinations cover the same pairs."""
    outcome, c = outcome_of(combination), combination
    if outcome == "refused" or c.condition in COMPLETE:
        return outcome
    kept = c.linear == "LU" if c.method == "Implicit" else c.solver == drawn_solver(c.condition, c.method)
    return outcome if kept and outcome != "refused twice" else "left out"


@functools.cache
def case_of(name):
    return CASES[name]()


@functools.cache
def solver_of(condition, solver):
    if solver != "Jaxopt":
        return SOLVERS[solver]
    kind = condition.split(",")[0]
    return JAXOPT["Stationary" if kind == "Proximal" else kind]


@dataclass(frozen=True)
class Switched:
    """An inner solver that a traced index chooses from several."""

    solvers: tuple
    index: jax.Array

    def __call__(self, condition, init, theta, data):
        branches = [functools.partial(bl.solve, solver, condition) for solver in self.solvers]
        return jax.lax.switch(self.index, branches, init, theta, data)


@dataclass(frozen=True)
class SwitchedLinear:
    """A linear solver that a traced index chooses from several."""

    solvers: tuple
    index: jax.Array
    needs_symmetry = False  # the test of refusals uses the solvers themselves

    def __call__(self, matvec, b, init=None):
        def branch(solver):
            def solve(b):
                x, info = solver(matvec, b, init)
                # Solvers differ in what they report, but all branches of a switch must return the same structure.
                return x, replace(info, iterations=None, least_curvature=None, rcond=None)

            return solve

        return jax.lax.switch(self.index, [branch(solver) for solver in self.solvers], b)


def function_of(case, method, solver, linear):
    """Return the function θ ↦ ((value, gradient), status) of one method."""
    init, data = jax.tree.map(jnp.asarray, (case.init, case.data))
    if method == "layer":
        layer = bl.implicit_layer(case.condition, solver, linear)

        def value(theta):
            return case.outer(layer(theta, init, data), theta, data)

        return lambda theta: (jax.value_and_grad(value)(theta), jnp.int32(bl.Status.BUDGET_USED))
    function = bl.value_and_hypergradient(case.problem, solver, METHODS[method](linear), on_failure="ignore")

    def value_and_gradient(theta):
        out = function(theta, init, data)
        return (out.value, out.gradient), out.status

    return value_and_gradient


def points(theta):
    return jnp.stack([theta, theta - 0.03, theta + 0.05])


def evaluate(value_and_gradient, twice, theta):
    """Return the results of all transformations, and the worst status. Without ``twice``, zeros replace the Hessian."""

    def at(theta):
        if not twice:
            primals, status = value_and_gradient(theta)
            push = functools.partial(jax.jvp, lambda theta: value_and_gradient(theta)[0][0], (theta,))
            slope = jax.vmap(lambda direction: push((direction,))[1])(jnp.eye(theta.size))
            return primals, slope, jnp.zeros((theta.size, theta.size)), status
        primals, push, status = jax.linearize(value_and_gradient, theta, has_aux=True)
        return primals, *jax.vmap(push)(jnp.eye(theta.size)), status

    mapped, slope, hessian, status = jax.vmap(at)(points(theta))
    grad = jax.tree.map(lambda leaf: leaf[0], mapped)
    return {"grad": grad, "jvp": slope[0], "hessian": hessian[0], "vmap": mapped}, jnp.max(status)


def results(condition, method, solvers, linears, twice):
    """Yield (solver, linear, result of :func:`evaluate`), with as few compiled programs as possible."""
    case = case_of(condition)
    theta = jnp.asarray(case.theta)
    if method in ("Unrolled", "OneStep"):  # they call single steps of a solver, which Switched does not have
        for solver in solvers:
            yield (
                solver,
                "none",
                jax.jit(functools.partial(evaluate, function_of(case, method, SOLVERS[solver], None), twice))(theta),
            )
        return
    # FiniteDifference checks the class of its linear solver, so each linear solver needs its own program.
    groups = [[name] for name in linears] if method == "FiniteDifference" else [linears]
    for names in groups:

        @jax.jit
        def program(theta, which, which_linear, names=names):
            found = tuple(LINEAR.get(name) for name in names)
            linear = SwitchedLinear(found, which_linear) if len(found) > 1 else found[0]
            solver = Switched(tuple(solver_of(condition, name) for name in solvers), which)
            return evaluate(function_of(case, method, solver, linear), twice, theta)

        for (i, solver), (j, linear) in itertools.product(enumerate(solvers), enumerate(names)):
            yield solver, linear, program(theta, i, j)


@functools.cache
def exact(condition):
    """Return the derivatives of the closed form, with the keys of :func:`evaluate`."""
    case = case_of(condition)
    theta = jnp.asarray(case.theta)

    @jax.jit
    def derivatives(theta):
        both = jax.value_and_grad(case.value)
        hessian = jax.hessian(case.value)(theta)
        return {"grad": both(theta), "jvp": both(theta)[1], "hessian": hessian, "vmap": jax.vmap(both)(points(theta))}

    return derivatives(theta)


@functools.cache
def one_term(condition, method, solver):
    """Return value and gradient of OneStep or FirstOrder by the formula h − BᵀSg at the exact solution.

    g and h are the derivatives of the outer function in w and θ, and B is the dense ∂residual/∂θ. S is the step size of
    descent for OneStep, λ⁻¹ for FirstOrder, and the identity for a mapping.
    """
    case = case_of(condition)
    declared = case.condition

    def scale(theta):
        if not declared.symmetric:
            return 1.0
        if method == "OneStep":
            return SOLVERS[solver].step_size
        return 1 / (declared.strength(theta, case.data) if callable(declared.strength) else declared.strength)

    def value_and_gradient(theta):
        w = case.exact(theta, case.data)
        g, h = jax.grad(case.outer, argnums=(0, 1))(w, theta, case.data)
        slope = jax.jacobian(declared.residual, argnums=1)(w, theta, case.data)
        return case.value(theta), h - slope.T @ (scale(theta) * g)

    theta = jnp.asarray(case.theta)
    grad = value_and_gradient(theta)
    return {"grad": grad, "jvp": grad[1], "vmap": jax.vmap(value_and_gradient)(points(theta))}


APPROXIMATE = {"FiniteDifference": 1e-8, "ValuePenalty": 20 / PENALTY, "EvolutionStrategies": 10 * SIGMA**2}


def tolerance(combination):
    """Return the largest error that is allowed.

    For a combination without an approximation it is 100·eps·κ³, because a Hessian takes three solves in sequence. The
    tolerance of an inner solver, the ridge of Nystrom and the error of an approximate method allow more.
    """
    bound = 100 * float(np.finfo(np.float64).eps) * case_of(combination.condition).kappa ** 3
    if combination.solver in ("HessianFree", "Anderson", "Jaxopt"):
        # The error of w is at most the residual divided by the smallest singular value of ∂residual/∂w, which is above
        # 0.58. The factor 20 allows for the outer derivatives. The factor 1000 allows for second derivatives of the
        # iterates: if an iterate converges like ρᵏ, they converge like k²·ρᵏ.
        bound = (1000 if combination.method == "ForwardUnrolled" else 20) * INNER_TOL
    if combination.linear == "Nystrom":
        bound = 2e-5  # the ridge of 1e-6 over the square of the smallest eigenvalue, twice in a Hessian
    return max(bound, APPROXIMATE.get(combination.method, 0.0))


def error(actual, expected):
    actual, expected = ravel_pytree(actual)[0], ravel_pytree(expected)[0]
    return float(jnp.max(jnp.abs(actual - expected)))


def refuses_a_second_derivative(combination):
    """Return whether tracing a derivative of the gradient raises an error with the rule's reason."""
    c, theta = combination, jnp.asarray(case_of(combination.condition).theta)
    function = function_of(case_of(c.condition), c.method, solver_of(c.condition, c.solver), LINEAR.get(c.linear))
    reason = next(reason for reason, outcome, _ in RULES if outcome == "refused twice")
    try:
        jax.eval_shape(jax.grad(lambda theta: jnp.sum(function(theta)[0][1])), theta)
    except ValueError as refusal:
        return re.search(reason, str(refusal)) is not None
    return False


RUN = [c for c in PRODUCT if planned_outcome(c) not in ("refused", "left out")]
GROUPS = list(dict.fromkeys((c.condition, c.method) for c in RUN))


@pytest.mark.slow(
    "compiles each condition with each method, 250 s in all",
    fast=(
        "Stationary-Implicit",
        "Stationary-Unrolled",
        "Stationary-ValuePenalty",
    ),
)
@pytest.mark.parametrize(("condition", "method"), GROUPS)
def test_supported_combinations_agree_with_the_closed_form(condition, method):
    here = [c for c in RUN if (c.condition, c.method) == (condition, method)]
    transforms = [name for name in TRANSFORMS if any(c.transform == name for c in here)]
    solvers, linears = (list(dict.fromkeys(getattr(c, name) for c in here)) for name in ("solver", "linear"))
    seen = set()
    # One of these combinations is enough, because the method refuses whatever the solvers are.
    refusing = all(refuses_a_second_derivative(c) for c in here[:1] if method in FIRST_DERIVATIVE)
    twice = "hessian" in transforms and method not in FIRST_DERIVATIVE
    # Without optimisations, JAX 0.12 computes wrong tangents in a branch of ``Switched``. The tangents of the same
    # program are right with all optimisations, and in JAX 0.10 with and without them.
    with optimised() if condition == "Projected" else contextlib.nullcontext():
        evaluated = list(results(condition, method, solvers, linears, twice))
    for solver, linear, (found, status) in evaluated:
        reference = one_term(condition, method, solver) if method in ("OneStep", "FirstOrder") else exact(condition)
        for transform in transforms:
            combination = Combination(condition, solver, method, linear, transform)
            seen.add(combination)
            key = "grad" if transform == "jit" else transform  # every result comes from a compiled program
            outcome = planned_outcome(combination)
            if outcome == "reported":
                assert method == "layer" or int(status) == bl.Status.MAX_STEPS, combination
                assert error(found["grad"], reference["grad"]) > 0.1, combination
            elif outcome == "refused twice":
                assert refusing, combination
            else:
                assert error(found[key], reference[key]) < tolerance(combination), combination
                # jaxopt stops by its own criterion, at which our residual may be slightly above the same tolerance.
                assert solver == "Jaxopt" or bl.Status(int(status)).ok, combination
    assert seen == set(here)


@pytest.mark.slow("traces each combination", fast=("Projected", "KKT, inequality"))
@pytest.mark.parametrize("condition", CASES)
def test_unsupported_combinations_are_refused_with_their_reason(condition):
    case = case_of(condition)
    for c in PRODUCT:
        if c.condition != condition or planned_outcome(c) != "refused" or c.transform != "jit":
            continue
        reasons = "|".join(reason for reason, outcome, holds in RULES if outcome == "refused" and holds(c))
        with pytest.raises(ValueError, match=reasons):
            function = function_of(case, c.method, solver_of(condition, c.solver), LINEAR.get(c.linear))
            jax.eval_shape(function, jnp.asarray(case.theta))


def test_the_outcomes_cover_the_whole_product():
    outcomes = ("exact", "refused", "reported", "refused twice", "left out")
    counts = {outcome: sum(planned_outcome(c) == outcome for c in PRODUCT) for outcome in outcomes}
    pairs = len(METHODS) - len(WITH_LINEAR) + len(WITH_LINEAR) * len(LINEAR)
    assert sum(counts.values()) == len(set(PRODUCT)) == len(CASES) * len(SOLVERS) * pairs * len(TRANSFORMS)
    assert (counts["left out"] == 0) == (tuple(CASES) == COMPLETE)
    assert min(counts[outcome] for outcome in outcomes[:4]) > 0, counts
    assert all(any(holds(c) for c in PRODUCT) for _, _, holds in RULES)


def test_every_possible_pair_is_tested():
    names = ("condition", "solver", "method", "linear", "transform")
    for one, other in itertools.combinations(names, 2):
        possible = {(getattr(c, one), getattr(c, other)) for c in PRODUCT if outcome_of(c) in ("exact", "reported")}
        tested = {(getattr(c, one), getattr(c, other)) for c in RUN}
        assert possible <= tested, possible - tested
