"""The import of jaxopt, without its deprecation warning, and its solver classes with their options.

jaxopt's linear solvers take a matrix-vector product and a right-hand side, and return the solution alone. They do not
say whether they converged. By default, ``CG`` of :mod:`bilevel.linear` runs ``solve_cg`` and computes the true residual
afterwards.
"""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp

from bilevel import tree

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


@functools.cache
def without_division_by_zero(cls):
    """Return the solver class, or for Broyden and PolyakSGD a subclass without NaN where jaxopt divides by zero.

    Broyden divides by the changes of w and of the residual, which may be zero. The subclass then discards its estimate
    of the Jacobian, and resets the step size of its line search. PolyakSGD divides by the square of the gradient norm,
    which is zero at a minimum. The subclass then keeps w.
    """

    def update_broyden(self, params, state, *arguments, **options):
        step = cls.update(self, params, state, *arguments, **options)
        fine = tree.is_finite((step.state.d_history, step.state.c_history))
        histories = _where(fine, (step.state.d_history, step.state.c_history), 0)
        stepsize = _where(fine, step.state.stepsize, self.max_stepsize)
        state = step.state._replace(d_history=histories[0], c_history=histories[1], stepsize=stepsize)
        return step._replace(state=state)

    def update_polyak(self, params, state, *arguments, **options):
        step = cls.update(self, params, state, *arguments, **options)
        divided = jnp.isfinite(step.state.stepsize) | ~jnp.isfinite(step.state.error)
        return step._replace(params=jax.tree.map(lambda new, old: jnp.where(divided, new, old), step.params, params))

    for base, update in ((jaxopt.Broyden, update_broyden), (jaxopt.PolyakSGD, update_polyak)):
        if issubclass(cls, base):
            return type(cls.__name__, (cls,), {"update": update})
    return cls


def _where(condition, values, number):
    return jax.tree.map(lambda leaf: jnp.where(condition, leaf, jnp.asarray(number, leaf.dtype)), values)
