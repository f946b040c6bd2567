"""The import of jaxopt, without its deprecation warning.

jaxopt's linear solvers take a matrix-vector product and a right-hand side, and return the solution alone. They do not
say whether they converged. ``CG`` of :mod:`bilevel.linear` runs ``solve_cg`` and computes the true residual afterwards.
"""

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
