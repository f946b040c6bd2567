"""The import of jaxopt, without its deprecation warning, and its solver classes with their options.

jaxopt's linear solvers take a matrix-vector product and a right-hand side, and return the solution alone. They do not
say whether they converged. ``CG`` of :mod:`bilevel.linear` runs ``solve_cg`` and computes the true residual afterwards.
"""

import inspect
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt import projection, prox
    from jaxopt.linear_solve import solve_cg

__all__ = [
    "jaxopt",
    "projection",
    "prox",
    "solve_cg",
]


def solver_class(solver):
    """Return jaxopt's solver class of this name; a class is returned unchanged. An unknown name raises ValueError."""
    if not isinstance(solver, str):
        return solver
    if not hasattr(jaxopt, solver):
        raise ValueError(f"jaxopt has no solver {solver!r}; it has {', '.join(solver_names())}")
    return getattr(jaxopt, solver)


def solver_names():
    """Return the names of all solvers in jaxopt."""
    return [name for name in dir(jaxopt) if name[0].isupper() and name != "OptStep"]


def option_defaults(solver):
    """Return the options of a solver class of jaxopt, given by itself or its name, with their default values."""
    cls = solver_class(solver)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    if issubclass(cls, jaxopt.OSQP):  # OSQP passes tol on to BoxOSQP in its **kwargs
        defaults["tol"] = option_defaults("BoxOSQP")["tol"]
    return defaults
