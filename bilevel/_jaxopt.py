"""The one place that imports jaxopt, which is no longer maintained: replace it from here.

jaxopt's linear solvers take a matrix-vector product and a right-hand side and return the solution alone.
What its solvers knew and dropped, whether they converged and by which residual, `bilevel.linear` finds out.
"""

import inspect
import warnings

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt import projection, prox
    from jaxopt.linear_solve import (
        solve_bicgstab,
        solve_cg,
        solve_cholesky,
        solve_gmres,
        solve_lu,
        solve_normal_cg,
    )

__all__ = [
    "projection",
    "prox",
    "run_solver",
    "solve_bicgstab",
    "solve_cg",
    "solve_cholesky",
    "solve_gmres",
    "solve_lu",
    "solve_normal_cg",
]

REVERSE_ONLY = {
    "kl_projection_birkhoff",
    "kl_projection_transport",
    "projection_affine_set",
    "projection_birkhoff",
    "projection_box_section",
    "projection_polyhedron",
    "projection_transport",
}
"""Projections that solve a problem of their own, which jaxopt differentiates backwards only."""

OPTIONS = {
    # Its check reads a number, which no trace has.
    "projection_polyhedron": {"check_feasible": False},
    # The semi-dual's derivative is zero: jaxopt stops the gradient of its simplex projection (`_max_l2`).
    "projection_birkhoff": {"use_semi_dual": False},
    "projection_transport": {"use_semi_dual": False},
}
"""What a function must be told where its own default cannot be traced, or not be differentiated."""

# Which of jaxopt's solvers fits a condition, and by which of a condition's functions it is told apart.
_FITTING = {
    "potential": "GradientDescent, LBFGS, BFGS, NonlinearCG and their like",
    "prox": "ProximalGradient",
    "projection": "ProjectedGradient",
    "mapping": "FixedPointIteration, AndersonAcceleration",
    "equality": "OSQP, EqualityConstrainedQP",
    "residual": "Broyden, LevenbergMarquardt, GaussNewton",
}
# They take a function too, and a constraint, a penalty or a root beside it.
_NOT_FOR_PLAIN_OBJECTIVES = {
    "BlockCoordinateDescent",
    "Broyden",
    "LBFGSB",
    "MirrorDescent",
    "ProjectedGradient",
    "ProximalGradient",
    "ScipyBoundedMinimize",
    "ScipyLeastSquares",
    "ScipyBoundedLeastSquares",
    "ScipyRootFinding",
}


def run_solver(solver, options, condition, init, theta, data):
    """w, the steps taken and the tolerance that stopped it, of any jaxopt solver on a condition."""
    if isinstance(solver, str) and not hasattr(jaxopt, solver):
        names = [name for name in dir(jaxopt) if name[0].isupper()]
        raise ValueError(f"jaxopt has no solver {solver!r}; it has {', '.join(names)}")
    cls = getattr(jaxopt, solver) if isinstance(solver, str) else solver
    fields = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    given, arguments, start, unpack = _setting(cls, fields, condition, init, theta, data)
    if "implicit_diff" in fields:
        given["implicit_diff"] = False  # bilevel differentiates
    w, state = cls(**given, **options).run(start, **arguments)
    steps = getattr(state, "iter_num", 0)
    tol = options.get("tol", fields.get("tol"))
    return unpack(w), steps, None if tol is None else float(tol)


def _setting(cls, fields, condition, init, theta, data):
    """A solver's functions, the arguments of its run, where it starts, and how its answer becomes w."""
    kind = next(name for name in _FITTING if hasattr(condition, name))
    outer = {"theta": theta, "data": data}
    fits = {
        "potential": "fun" in fields and cls.__name__ not in _NOT_FOR_PLAIN_OBJECTIVES,
        "prox": cls is jaxopt.ProximalGradient,
        "projection": cls is jaxopt.ProjectedGradient,
        "mapping": "fixed_point_fun" in fields,
        "equality": cls in (jaxopt.OSQP, jaxopt.EqualityConstrainedQP),
        "residual": cls is jaxopt.Broyden or "residual_fun" in fields,
    }
    if not fits[kind]:
        raise ValueError(
            f"jaxopt's {cls.__name__} does not solve {type(condition).__name__}: use {_FITTING[kind]}, or a function "
            "(condition, init, theta, data) -> w"
        )
    if kind == "equality":
        return _quadratic_program(condition, init, theta, data)
    if kind == "prox":

        def proximal(w, extra, scaling=1.0):
            return condition.prox(w, *extra, scaling)

        given = {"fun": condition.objective, "prox": proximal}
        return given, {"hyperparams_prox": (theta, data), **outer}, init, _unchanged
    if kind == "projection":
        given = {"fun": condition.objective, "projection": lambda w, extra: condition.projection(w, *extra)}
        return given, {"hyperparams_proj": (theta, data), **outer}, init, _unchanged
    name = {"mapping": "fixed_point_fun", "residual": "residual_fun"}.get(kind, "fun")
    name = name if name in fields else "fun"
    return {name: getattr(condition, kind)}, outer, init, _unchanged


def _unchanged(w):
    return w


def _quadratic_program(condition, init, theta, data):
    """½xᵀQx + cᵀx, Ax = b, Gx ≤ h, read off a KKT condition at zero; its residual tells if it is none."""
    primal, unravel = ravel_pytree(init[0])
    zero = jnp.zeros_like(primal)

    def affine(constraint):
        def flat(x):
            return ravel_pytree(constraint(unravel(x), theta, data))[0]

        return jax.jacobian(flat)(zero), -flat(zero)

    def objective(x):
        return condition.objective(unravel(x), theta, data)

    arguments = {"params_obj": (jax.hessian(objective)(zero), jax.grad(objective)(zero))}
    for name, constraint in (("params_eq", condition.equality), ("params_ineq", condition.inequality)):
        if constraint is not None:
            arguments[name] = affine(constraint)

    def unpack(solution):
        duals = (solution.dual_eq, solution.dual_ineq)
        parts = [
            None if like is None else ravel_pytree(like)[1](dual) for like, dual in zip(init[1:], duals, strict=True)
        ]
        return unravel(solution.primal), *parts

    return {}, arguments, None, unpack
