"""Inner solvers of other libraries: Jaxopt."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from bilevel import tree
from bilevel.conditions.protocol import Condition
from bilevel.solvers.protocol import report
from bilevel.types import PyTree, Solution


@dataclass(frozen=True, init=False)
class Jaxopt:
    """Any solver of jaxopt, on a condition that it can solve.

    ===================================================  ================================================
    condition                                            jaxopt solvers
    ===================================================  ================================================
    Stationary, Proximal                                 GradientDescent, LBFGS, BFGS, NonlinearCG, ArmijoSGD,
                                                         PolyakSGD, OptaxSolver, ScipyMinimize
    Root                                                 Broyden, LevenbergMarquardt, GaussNewton, Bisection,
                                                         ScipyRootFinding, ScipyLeastSquares
    FixedPoint                                           FixedPointIteration, AndersonAcceleration
    Projected                                            ProjectedGradient, MirrorDescent; onto a box LBFGSB,
                                                         ScipyBoundedMinimize and, for a quadratic, BoxCDQP
    ProximalGradient                                     ProximalGradient; BlockCoordinateDescent for a
                                                         composite linear objective and one prox for all entries
    KKT with a quadratic objective, affine constraints   OSQP, BoxOSQP, EqualityConstrainedQP
    ===================================================  ================================================

    The bounds of a box are computed from its projection. The step of MirrorDescent is its option
    ``projection_grad(w, gradient, step, (theta, data))``. The SciPy solvers run outside of a trace only: find w with
    them first, and differentiate at that w.

    jaxopt's ``tol`` stops the solver by jaxopt's own error measure. The status compares the condition's true residual
    with the same number.

    Args:
        solver: the class, or its name (``"LBFGS"``), which does not import jaxopt before it is used.
        options: the options of its constructor: ``maxiter``, ``tol``, ``stepsize``, …

    Raises:
        ValueError: for a name that jaxopt does not have, and, when called, for a solver that cannot solve the
            condition; the message lists those that can.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
        >>> solution = Jaxopt("LBFGS", maxiter=20, tol=1e-4)(condition, jnp.zeros(2), jnp.ones(2), None)
        >>> [round(float(entry), 3) for entry in solution.w]
        [1.0, 1.0]
    """

    solver: Callable | str
    options: tuple[tuple[str, object], ...]

    def __init__(self, solver: Callable | str, **options: object):
        object.__setattr__(self, "solver", solver)
        object.__setattr__(self, "options", tuple(options.items()))

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        from bilevel._jaxopt import adapters  # imports jaxopt

        init = tree.arrays(init)
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            w, steps, tol = adapters.run_solver(self.solver, dict(self.options), condition, init, theta, data)
            w = jax.tree.map(lambda leaf, start: leaf.astype(start.dtype), w, init)
        return report(condition.residual(w, theta, data), w, steps, tol)
