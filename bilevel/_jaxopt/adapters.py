"""Adapters from jaxopt's solvers to the conditions of `bilevel`.

``_ADAPTERS`` lists, for each kind of condition, the solvers that can solve it. Each entry is a function
``(condition, init, theta, data) -> _Call`` that prepares the arguments of the solver's constructor and of ``run``.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel._jaxopt.converted import Converted
from bilevel._jaxopt.library import jaxopt, option_defaults, solver_class, without_division_by_zero
from bilevel.types import PyTree


def run_solver(solver, options, condition, init, theta, data):
    """Solve a condition with a solver of jaxopt.

    Args:
        solver: a solver class of jaxopt, or its name.
        options: keyword arguments of the solver's constructor.
        condition: the condition to solve.
        init: the initial w, a pytree of arrays.
        theta: hyperparameters, a pytree of arrays.
        data: passed to the condition.

    Returns:
        Three values. The first is w, with the tree structure of ``init`` and possibly other dtypes. The second is the
        number of steps taken. A solver that does not count steps gives its function evaluations, or 0 if it does
        not count these either. The third is whether the solver stopped before its budget ended: False for a solver that
        counts no steps or has no budget.

    Raises:
        ValueError: if jaxopt has no such solver, if the solver does not fit the condition, if an option sets a function
            that the condition gives (such as ``fun``) or says what that function returns (``has_aux``,
            ``value_and_grad``), or if a solver that runs SciPy is called under a trace.
    """
    cls = solver_class(solver)
    name, prepare = _adapter(cls, condition)
    if name.startswith("Scipy"):
        _check_concrete(name, (init, theta, data))
    fields = option_defaults(cls)
    dtype = jnp.result_type(float) if name in _OF_DEFAULT_DTYPE else _common_dtype(init)
    if name not in _OF_ANY_DTYPE:
        condition = Converted(condition, init, dtype)
        init = condition.packed(jax.tree.map(lambda leaf: leaf.astype(dtype), init))
    call = prepare(condition, init, theta, data)
    described = {option for option in ("has_aux", "value_and_grad") if options.get(option)}
    if clash := sorted(set(call.given) & set(options) | described):
        raise ValueError(f"jaxopt's {name} gets its function from the condition: leave out {', '.join(clash)}")
    # Bilevel differentiates the solution itself, so jaxopt's own implicit differentiation is switched off.
    options = {option: value for option, value in options.items() if option != "implicit_diff"}
    given = call.given | ({"implicit_diff": False} if "implicit_diff" in fields else {})
    # Without implicit_diff, jaxopt would by default run a scan over all maxiter steps, which cannot stop early.
    defaults = call.defaults | ({"unroll": False} if "unroll" in fields else {})
    solver = without_division_by_zero(cls)(**given, **(defaults | options))
    if isinstance(solver, jaxopt.OSQP):  # OSQP does not pass the option on to its inner solver
        solver._box_osqp.implicit_diff = False
    w, state = solver.run(call.start, *call.arguments)
    counts = (getattr(state, name, None) for name in ("iter_num", "num_fun_eval"))
    steps = next((count for count in counts if count is not None), 0)
    budget, taken = getattr(solver, "maxiter", None), getattr(state, "iter_num", None)
    w = call.unpack(w)
    w = condition.unpacked(w) if isinstance(condition, Converted) else w
    return w, steps, False if budget is None or taken is None else taken < budget


# Solvers that make arrays of JAX's default dtype, so that a loop with a float32 w would fail where float64 is enabled.
_OF_DEFAULT_DTYPE = ("AndersonAcceleration", "LevenbergMarquardt")
# Solvers whose condition is not wrapped in `Converted`. The solvers of quadratic programs get matrices that
# `_program` has already cast, and BlockCoordinateDescent needs an objective that is still a CompositeLinearFunction.
_OF_ANY_DTYPE = ("OSQP", "BoxOSQP", "EqualityConstrainedQP", "BlockCoordinateDescent")


def _common_dtype(init):
    """Return the dtype that holds all leaves, float32 at least: jaxopt fails or diverges in half precision."""
    return functools.reduce(jnp.promote_types, (leaf.dtype for leaf in jax.tree.leaves(init)), jnp.dtype("float32"))


def _check_concrete(name, values):
    if tree.is_traced(values):
        raise ValueError(
            f"jaxopt's {name} runs SciPy, but a hypergradient or jit would have to trace it. Solve first, by "
            "w = bl.solve(bl.Jaxopt(...), condition, init, theta, data).w, and pass init=w with a solver that returns "
            "its start: `lambda condition, init, theta, data: init`. Or use a solver that is written in JAX"
        )


class _Call(NamedTuple):
    """The arguments for the constructor and the ``run`` method of a jaxopt solver."""

    given: dict
    """The functions that the constructor takes, by keyword."""
    arguments: tuple
    """Arguments of ``run`` after the start. They are positional, because a user's function may rename θ and data."""
    start: PyTree
    """The first argument of ``run``."""
    unpack: Callable[[PyTree], PyTree] = lambda w: w
    """A function from the result of ``run`` to w."""
    defaults: dict = {}  # noqa: RUF012  # never modified
    """Options that the user's options override."""


def _adapter(cls, condition):
    """Return the name of a solver and its adapter for a condition, or raise ValueError if the solver does not fit."""
    kind = next(name for name in _ADAPTERS if hasattr(condition, name))
    fitting = _ADAPTERS[kind]
    for name in (base.__name__ for base in cls.__mro__):  # a user's subclass has the adapter of its base
        if name in fitting and cls.__name__ not in _REFUSED:
            return name, fitting[name]
    reason = f": {_REFUSED[cls.__name__]}" if cls.__name__ in _REFUSED else ""
    raise ValueError(
        f"jaxopt's {cls.__name__} does not solve {type(condition).__name__}{reason}: use {', '.join(fitting)}, or a "
        "function (condition, init, theta, data) -> w"
    )


def _from_function(function, argument="fun", **defaults):
    """Return the adapter of a solver whose constructor needs only one function of the condition.

    Args:
        function: the name of the condition's method.
        argument: the name that the constructor has for it.
        defaults: options that the user's options override.
    """

    def prepare(condition, init, theta, data):
        given = {argument: getattr(condition, function)}
        return _Call(given, (theta, data), init, defaults=defaults)

    return prepare


def _from_residuals(argument, function="residuals", **defaults):
    """Return the adapter of a solver of least squares, which takes and returns vectors.

    Args:
        argument: the name of the function in the solver's constructor.
        function: the name of the condition's method.
        defaults: options that the user's options override.
    """

    def prepare(condition, init, theta, data):
        start, unravel = ravel_pytree(init)

        def residuals(x, theta, data):
            return ravel_pytree(getattr(condition, function)(unravel(x), theta, data))[0]

        return _Call({argument: residuals}, (theta, data), start, unravel, defaults)

    return prepare


def _bisection(condition, init, theta, data):
    if jnp.shape(init) != ():
        got = jax.tree.map(jnp.shape, init)
        raise ValueError(f"jaxopt's Bisection finds a scalar w, got a w of shape {got}: use Broyden")
    # jaxopt's check of the bracket fails under a trace. If there is no sign change, the residual of w stays large.
    return _from_function("residual", "optimality_fun", check_bracket=False)(condition, init, theta, data)


def _proximal_gradient(condition, init, theta, data):
    def prox(w, outer, scaling=1.0):
        return condition.prox(w, *outer, scaling)

    arguments = (theta, data), theta, data
    return _Call({"fun": condition.objective, "prox": prox}, arguments, init)


def _block_coordinate_descent(condition, init, theta, data):
    if not isinstance(condition.objective, jaxopt.objective.CompositeLinearFunction):
        raise ValueError(
            "jaxopt's BlockCoordinateDescent needs an objective that is a jaxopt.objective.CompositeLinearFunction, "
            f"with make_linop, subfun and columnwise_lipschitz_const, got {condition.objective}: use ProximalGradient"
        )

    def prox(block, outer, scaling=1.0):
        moved = condition.prox(block[None], *outer, scaling)  # a w of one block
        if jnp.shape(moved) != (1, *jnp.shape(block)):
            raise ValueError(
                "jaxopt's BlockCoordinateDescent applies prox to one block of w without its index, so prox must be the "
                f"same for each block, but it returns the shape {jnp.shape(moved)[1:]} for a block of shape "
                f"{jnp.shape(block)}: use ProximalGradient"
            )
        return moved[0]

    if not _acts_on_blocks(prox, condition.prox, init, theta, data):
        raise ValueError(
            "jaxopt's BlockCoordinateDescent applies prox to each entry of a vector w and to each row of a matrix w, "
            "but the prox of the whole w has another result here: write prox for one row, and map it over the rows "
            "(jax.vmap(prox, in_axes=(0, None, None, None))), or use ProximalGradient"
        )
    arguments = (theta, data), theta, data
    return _Call({"fun": condition.objective, "block_prox": prox}, arguments, init)


def _acts_on_blocks(block_prox, prox, init, theta, data):
    """Return whether prox of a random w equals the prox of its blocks, with ones in place of θ and data.

    θ and data may be traced, so their values are not known. The answer is True as well if the result at ones is not
    finite, or depends on a traced array that prox captures.
    """
    theta, data = jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), leaf.dtype), (theta, data))
    with jax.ensure_compile_time_eval():
        w = 3 * jax.random.normal(jax.random.key(0), jnp.shape(init), init.dtype)
        blocks = jax.vmap(lambda block: block_prox(block, (theta, data)))(w)
        whole = prox(w, theta, data, 1.0)
        agree = jnp.allclose(whole, blocks, rtol=1e-3, atol=1e-3) | ~jnp.isfinite(whole).all()
    return isinstance(agree, Tracer) or bool(agree)


def _projected_gradient(condition, init, theta, data):
    arguments = (theta, data), theta, data
    given = {"fun": condition.objective, "projection": lambda w, outer: condition.projection(w, *outer)}
    return _Call(given, arguments, init)


def _mirror_descent(condition, init, theta, data):
    def euclidean(w, slope, step, outer):
        return condition.projection(tree.subtract(w, tree.scale(step, slope)), *outer)

    arguments = (theta, data), theta, data
    defaults = {"projection_grad": euclidean, "stepsize": condition.step_size}
    return _Call({"fun": condition.objective}, arguments, init, defaults=defaults)


def _box(condition, init, theta, data):
    """Return the lower and upper bounds of a box, which are the projections of −∞ and +∞.

    If the set is not a box, the bounds are wrong, and the residual of the result shows it, in most cases as a NaN.
    """
    return tuple(
        condition.projection(jax.tree.map(lambda leaf, end=end: jnp.full_like(leaf, end), init), theta, data)
        for end in (-jnp.inf, jnp.inf)
    )


def _bounded(condition, init, theta, data):
    arguments = _box(condition, init, theta, data), theta, data
    return _Call({"fun": condition.objective}, arguments, init)


def _box_quadratic(condition, init, theta, data):
    start, unravel = ravel_pytree(init)
    objective = _quadratic(lambda w: condition.objective(unravel(w), theta, data), start)
    bounds = tuple(ravel_pytree(bound)[0] for bound in _box(condition, init, theta, data))
    return _Call({}, (objective, bounds), start, unravel)


def _quadratic(objective, like):
    """Return Q and c of ½xᵀQx + cᵀx + constant, by derivatives at zero.

    If the objective is not quadratic, the residual of the result shows it.
    """
    zero = jnp.zeros_like(like)
    return jax.hessian(objective)(zero), jax.grad(objective)(zero)


def _affine(constraint, init, theta, data):
    """Return A and b of an affine constraint Ax − b on the raveled x, by value and Jacobian at zero."""
    primal, unravel = ravel_pytree(init)

    def flat(x):
        return ravel_pytree(constraint(unravel(x), theta, data))[0]

    return jax.jacobian(flat)(jnp.zeros_like(primal)), -flat(jnp.zeros_like(primal))


def _program(condition, init, theta, data):
    """Return (Q, c), (A, b) and (G, h) of the program min ½xᵀQx + cᵀx with Ax = b and Gx ≤ h.

    A pair is None if the condition has no such constraint.
    """
    primal, unravel = ravel_pytree(init[0])
    objective = _quadratic(lambda x: condition.objective(unravel(x), theta, data), primal)
    constraints = (condition.equality, condition.inequality)
    program = objective, *(None if c is None else _affine(c, init[0], theta, data) for c in constraints)
    return jax.tree.map(lambda leaf: leaf.astype(float), program)  # OSQP creates arrays of the default float dtype


def _like(init, *parts):
    """Return the flat vectors x, ν and μ as trees with the structure and dtypes of ``init``."""

    def unravel(like, part):
        flat, back = ravel_pytree(like)
        return back(part.astype(flat.dtype))

    return tuple(None if like is None else unravel(like, part) for like, part in zip(init, parts, strict=True))


def _quadratic_program(condition, init, theta, data):
    arguments = _program(condition, init, theta, data)
    return _Call({}, arguments, None, lambda w: _like(init, w.primal, w.dual_eq, w.dual_ineq))


def _equality_program(condition, init, theta, data):
    if condition.inequality is not None:
        raise ValueError("jaxopt's EqualityConstrainedQP does not take inequalities: use OSQP or BoxOSQP")
    call = _quadratic_program(condition, init, theta, data)
    return call._replace(arguments=call.arguments[:2])


def _two_sided_program(condition, init, theta, data):
    """Prepare BoxOSQP, which takes both kinds of constraints as l ≤ Ax ≤ u; an equality has l = u."""
    objective, equal, unequal = _program(condition, init, theta, data)
    rows = [part for part in (equal, unequal) if part is not None]
    count = 0 if equal is None else equal[1].size
    upper = jnp.concatenate([bound for _, bound in rows])
    lower = jnp.where(jnp.arange(upper.size) < count, upper, -jnp.inf)
    arguments = objective, jnp.concatenate([matrix for matrix, _ in rows]), (lower, upper)

    def unpack(solution):
        above, below = solution.dual_ineq
        return _like(init, solution.primal[0], (above - below)[:count], above[count:])

    return _Call({}, arguments, None, unpack)


_OF_OBJECTIVES = dict.fromkeys(
    ("GradientDescent", "LBFGS", "BFGS", "NonlinearCG", "ArmijoSGD", "PolyakSGD", "OptaxSolver", "ScipyMinimize"),
    _from_function("potential"),
)
_OF_RESIDUALS = {
    **dict.fromkeys(("LevenbergMarquardt", "GaussNewton"), _from_residuals("residual_fun")),
    "ScipyLeastSquares": _from_residuals("fun", method="trf"),
}
# For each kind of condition, its solvers with their adapters. A key is an attribute of conditions. The first key that a
# condition has as an attribute, in this order, decides its kind.
_ADAPTERS = {
    "residuals": _OF_RESIDUALS | _OF_OBJECTIVES,
    "potential": _OF_OBJECTIVES,
    "prox": {"ProximalGradient": _proximal_gradient, "BlockCoordinateDescent": _block_coordinate_descent},
    "projection": {
        "ProjectedGradient": _projected_gradient,
        "MirrorDescent": _mirror_descent,
        "LBFGSB": _bounded,
        "BoxCDQP": _box_quadratic,
        "ScipyBoundedMinimize": _bounded,
    },
    "mapping": dict.fromkeys(
        ("FixedPointIteration", "AndersonAcceleration"), _from_function("mapping", "fixed_point_fun")
    ),
    "equality": {
        "OSQP": _quadratic_program,
        "BoxOSQP": _two_sided_program,
        "EqualityConstrainedQP": _equality_program,
    },
    "residual": {
        "Broyden": _from_function("residual"),
        **dict.fromkeys(("LevenbergMarquardt", "GaussNewton"), _from_residuals("residual_fun", "residual")),
        "Bisection": _bisection,
        "ScipyRootFinding": _from_function("residual", "optimality_fun", method="hybr"),
        "ScipyLeastSquares": _from_function("residual", method="trf"),
    },
}
# Solvers that fit no condition of this library, with the reason.
_REFUSED = {
    "AndersonWrapper": "it wraps a solver that already has its function (bl.Anderson accelerates any mapping)",
    "BacktrackingLineSearch": "it is a line search, not a solver",
    "CvxpyQP": "cvxpy works on NumPy arrays, which JAX cannot trace (OSQP solves the same programs)",
    "HagerZhangLineSearch": "it is a line search, not a solver",
    "IterativeRefinement": "it solves linear systems (for the adjoint system use bl.LU or another linear solver)",
    "ScipyBoundedLeastSquares": "it needs a sum of squares in a box (solve a Projected by ScipyBoundedMinimize)",
    "ZoomLineSearch": "it is a line search, not a solver",
}
