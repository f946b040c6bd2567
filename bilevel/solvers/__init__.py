"""Inner solvers: how w*(θ) is found.

A solver is a frozen dataclass, called as ``solver(condition, init, theta, data) -> Solution``. Any function with these
arguments that returns w, or a Solution, is a solver too. An iterative solver also offers its single step (``start`` and
``update``). A method that differentiates through the iterations builds a loop of its own from that step. This loop
computes the same numbers as the solver's loop.
"""

from bilevel.solvers.descent import GradientDescent, Optax, check_transformation
from bilevel.solvers.fixed_point import FISTA, Anderson, FixedPointIteration
from bilevel.solvers.from_jaxopt import Jaxopt
from bilevel.solvers.from_optimistix import Optimistix
from bilevel.solvers.iteration import with_memory
from bilevel.solvers.least_squares import GaussNewton, LevenbergMarquardt
from bilevel.solvers.minibatches import Minibatches
from bilevel.solvers.newton import HessianFree
from bilevel.solvers.protocol import (
    InnerSolver,
    IterativeSolver,
    check_solver,
    new_memory,
    report,
    resumed,
    solve,
    with_residual,
)

__all__ = [
    "FISTA",
    "Anderson",
    "FixedPointIteration",
    "GaussNewton",
    "GradientDescent",
    "HessianFree",
    "InnerSolver",
    "IterativeSolver",
    "Jaxopt",
    "LevenbergMarquardt",
    "Minibatches",
    "Optax",
    "Optimistix",
    "check_solver",
    "check_transformation",
    "new_memory",
    "report",
    "resumed",
    "solve",
    "with_memory",
    "with_residual",
]
