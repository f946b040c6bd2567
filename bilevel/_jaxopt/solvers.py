"""jaxopt's solvers on the conditions of `bilevel`: which fits what, and what each is made of and run on."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel._jaxopt.library import jaxopt
from bilevel.types import PyTree


def run_solver(solver, options, condition, init, theta, data):
    """w, the steps taken and the tolerance that stopped it, of any jaxopt solver on a condition."""
    cls = _solver_class(solver)
    name, make = _fitting(cls, condition)
    if name.startswith("Scipy"):
        _check_concrete(name, (init, theta, data))
    fields = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    setting = make(condition, init, theta, data)
    given = setting.given | ({"implicit_diff": False} if "implicit_diff" in fields else {})  # bilevel differentiates
    # By jaxopt's default a loop that it does not differentiate is a scan of all its steps, for someone else to.
    defaults = setting.defaults | ({"unroll": False} if "unroll" in fields else {})
    solver = cls(**given, **(defaults | options))
    if isinstance(solver, jaxopt.OSQP):  # it always tells the solver inside of it to differentiate, backwards only
        solver._box_osqp.implicit_diff = False
    w, state = solver.run(setting.start, *setting.arguments)
    counts = (getattr(state, name, None) for name in ("iter_num", "num_fun_eval"))
    steps = next((count for count in counts if count is not None), 0)
    tol = options.get("tol", fields.get("tol"))  # by 0, the default of some, they spend their budget
    return setting.unpack(w), steps, float(tol) if tol else None


def _check_concrete(name, values):
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        raise ValueError(
            f"jaxopt's {name} runs SciPy, which no trace can hold, and a hypergradient traces its solver: find w "
            "before, by bl.solve(bl.Jaxopt(...), condition, init, theta, data).w, and differentiate there, with that w "
            "as init and lambda condition, init, theta, data: init as the solver; or use a solver that is all JAX"
        )


class _Setting(NamedTuple):
    """What one of jaxopt's solvers is made of and run on."""

    given: dict
    """The functions that its constructor is given."""
    arguments: tuple
    """Of ``run``, after the start; by position, as θ and data have other names in the user's functions."""
    start: PyTree
    unpack: Callable[[PyTree], PyTree] = lambda w: w
    """From what it returns to w."""
    defaults: dict = {}  # noqa: RUF012  # nobody writes to it
    """Options that hold unless the user sets them."""


def _solver_class(solver):
    if not isinstance(solver, str):
        return solver
    if not hasattr(jaxopt, solver):
        raise ValueError(f"jaxopt has no solver {solver!r}; it has {', '.join(solver_names())}")
    return getattr(jaxopt, solver)


def solver_names():
    """What jaxopt offers as solvers, by name."""
    return [name for name in dir(jaxopt) if name[0].isupper() and name != "OptStep"]


def _fitting(cls, condition):
    """A solver's name in jaxopt, and what makes its setting; ValueError where it does not fit the condition."""
    kind = next(name for name in _SETTINGS if hasattr(condition, name))
    fitting = _SETTINGS[kind]
    for name in (base.__name__ for base in cls.__mro__):
        if name in fitting and cls.__name__ not in _REFUSED:
            return name, fitting[name]
    reason = f": {_REFUSED[cls.__name__]}" if cls.__name__ in _REFUSED else ""
    raise ValueError(
        f"jaxopt's {cls.__name__} does not solve {type(condition).__name__}{reason}: use {', '.join(fitting)}, or a "
        "function (condition, init, theta, data) -> w"
    )


def _with(function, argument="fun", **defaults):
    """The setting of a solver that is given one of the condition's functions and nothing else."""

    def make(condition, init, theta, data):
        given = {argument: getattr(condition, function)}
        return _Setting(given, (theta, data), init, defaults=defaults)

    return make


def _bisection(condition, init, theta, data):
    if jnp.shape(init) != ():
        raise ValueError(f"jaxopt's Bisection finds a scalar w, got {jax.tree.map(jnp.shape, init)}: use Broyden")
    # Its check reads a number, which no trace has; the residual tells.
    return _with("residual", "optimality_fun", check_bracket=False)(condition, init, theta, data)


def _proximal_gradient(condition, init, theta, data):
    def prox(w, outer, scaling=1.0):
        return condition.prox(w, *outer, scaling)

    arguments = (theta, data), theta, data
    return _Setting({"fun": condition.objective, "prox": prox}, arguments, init)


def _block_coordinate_descent(condition, init, theta, data):
    if not isinstance(condition.objective, jaxopt.objective.CompositeLinearFunction):
        raise ValueError(
            "jaxopt's BlockCoordinateDescent needs an objective that is a jaxopt.objective.CompositeLinearFunction, "
            f"with make_linop, subfun and columnwise_lipschitz_const, got {condition.objective}: use ProximalGradient"
        )

    def prox(block, outer, scaling=1.0):
        moved = condition.prox(block, *outer, scaling)
        if jnp.shape(moved) != jnp.shape(block):
            raise ValueError(
                "jaxopt's BlockCoordinateDescent tells prox no index, so that it must be the same for each entry of w, "
                f"got {jnp.shape(moved)} for one of {jnp.shape(block)}: use ProximalGradient"
            )
        return moved

    arguments = (theta, data), theta, data
    return _Setting({"fun": condition.objective, "block_prox": prox}, arguments, init)


def _projected_gradient(condition, init, theta, data):
    arguments = (theta, data), theta, data
    given = {"fun": condition.objective, "projection": lambda w, outer: condition.projection(w, *outer)}
    return _Setting(given, arguments, init)


def _mirror_descent(condition, init, theta, data):
    def euclidean(w, slope, step, outer):
        return condition.projection(tree.subtract(w, tree.scale(step, slope)), *outer)

    arguments = (theta, data), theta, data
    defaults = {"projection_grad": euclidean, "stepsize": condition.step_size}
    return _Setting({"fun": condition.objective}, arguments, init, defaults=defaults)


def _box(condition, init, theta, data):
    """The bounds of a box: where its projection sends ∓∞. The residual tells if it is no box, mostly by a NaN."""
    return tuple(
        condition.projection(jax.tree.map(lambda leaf, end=end: jnp.full_like(leaf, end), init), theta, data)
        for end in (-jnp.inf, jnp.inf)
    )


def _bounded(condition, init, theta, data):
    arguments = _box(condition, init, theta, data), theta, data
    return _Setting({"fun": condition.objective}, arguments, init)


def _box_quadratic(condition, init, theta, data):
    start, unravel = ravel_pytree(init)
    objective = _quadratic(lambda w: condition.objective(unravel(w), theta, data), start)
    bounds = tuple(ravel_pytree(bound)[0] for bound in _box(condition, init, theta, data))
    return _Setting({}, (objective, bounds), start, unravel)


def _quadratic(objective, like):
    """Q and c of ½xᵀQx + cᵀx + constant, read off at zero; the residual tells if it is none."""
    zero = jnp.zeros_like(like)
    return jax.hessian(objective)(zero), jax.grad(objective)(zero)


def _affine(constraint, init, theta, data):
    """The matrix and the right-hand side of an affine constraint Ax − b on the raveled x, read off at zero."""
    primal, unravel = ravel_pytree(init)

    def flat(x):
        return ravel_pytree(constraint(unravel(x), theta, data))[0]

    return jax.jacobian(flat)(jnp.zeros_like(primal)), -flat(jnp.zeros_like(primal))


def _program(condition, init, theta, data):
    """Q and c, A and b, G and h of min ½xᵀQx + cᵀx, Ax = b, Gx ≤ h; None for a constraint there is not."""
    primal, unravel = ravel_pytree(init[0])
    objective = _quadratic(lambda x: condition.objective(unravel(x), theta, data), primal)
    constraints = (condition.equality, condition.inequality)
    program = objective, *(None if c is None else _affine(c, init[0], theta, data) for c in constraints)
    return jax.tree.map(lambda leaf: leaf.astype(float), program)  # OSQP mixes in the default dtype


def _like(init, *parts):
    """The raveled x, ν and μ as w."""

    def unravel(like, part):
        flat, back = ravel_pytree(like)
        return back(part.astype(flat.dtype))

    return tuple(None if like is None else unravel(like, part) for like, part in zip(init, parts, strict=True))


def _quadratic_program(condition, init, theta, data):
    arguments = _program(condition, init, theta, data)
    return _Setting({}, arguments, None, lambda w: _like(init, w.primal, w.dual_eq, w.dual_ineq))


def _equality_program(condition, init, theta, data):
    if condition.inequality is not None:
        raise ValueError("jaxopt's EqualityConstrainedQP knows no inequality: use OSQP or BoxOSQP")
    setting = _quadratic_program(condition, init, theta, data)
    return setting._replace(arguments=setting.arguments[:2])


def _two_sided_program(condition, init, theta, data):
    """Both kinds of constraints as l ≤ Ax ≤ u, an equality with l = u."""
    objective, equal, unequal = _program(condition, init, theta, data)
    rows = [part for part in (equal, unequal) if part is not None]
    count = 0 if equal is None else equal[1].size
    upper = jnp.concatenate([bound for _, bound in rows])
    lower = jnp.where(jnp.arange(upper.size) < count, upper, -jnp.inf)
    arguments = objective, jnp.concatenate([matrix for matrix, _ in rows]), (lower, upper)

    def unpack(solution):
        above, below = solution.dual_ineq
        return _like(init, solution.primal[0], (above - below)[:count], above[count:])

    return _Setting({}, arguments, None, unpack)


# Which solvers fit a condition, and by which of a condition's functions it is told apart.
_SETTINGS = {
    "potential": dict.fromkeys(
        (
            "GradientDescent",
            "LBFGS",
            "BFGS",
            "NonlinearCG",
            "ArmijoSGD",
            "PolyakSGD",
            "OptaxSolver",
            "ScipyMinimize",
        ),
        _with("potential"),
    ),
    "prox": {"ProximalGradient": _proximal_gradient, "BlockCoordinateDescent": _block_coordinate_descent},
    "projection": {
        "ProjectedGradient": _projected_gradient,
        "MirrorDescent": _mirror_descent,
        "LBFGSB": _bounded,
        "BoxCDQP": _box_quadratic,
        "ScipyBoundedMinimize": _bounded,
    },
    "mapping": dict.fromkeys(("FixedPointIteration", "AndersonAcceleration"), _with("mapping", "fixed_point_fun")),
    "equality": {
        "OSQP": _quadratic_program,
        "BoxOSQP": _two_sided_program,
        "EqualityConstrainedQP": _equality_program,
    },
    "residual": {
        "Broyden": _with("residual"),
        "LevenbergMarquardt": _with("residual", "residual_fun"),
        "GaussNewton": _with("residual", "residual_fun"),
        "Bisection": _bisection,
        "ScipyRootFinding": _with("residual", "optimality_fun", method="hybr"),
        "ScipyLeastSquares": _with("residual", method="trf"),
    },
}
# What no condition of ours asks for, and why.
_REFUSED = {
    "AndersonWrapper": "it wraps a solver that holds its function already (bl.Anderson accelerates any mapping)",
    "BacktrackingLineSearch": "it searches along a line",
    "CvxpyQP": "cvxpy works on NumPy arrays, which no trace can hold (OSQP solves the same programs)",
    "HagerZhangLineSearch": "it searches along a line",
    "IterativeRefinement": "it solves linear systems (bl.LU and its like do, for the adjoint)",
    "ScipyBoundedLeastSquares": "it wants a sum of squares in a box (a Projected objective, with ScipyBoundedMinimize)",
    "ZoomLineSearch": "it searches along a line",
}
