"""The one place that imports jaxopt, which is no longer maintained: replace it from here.

jaxopt's linear solvers take a matrix-vector product and a right-hand side and return the solution alone.
What its solvers knew and dropped, whether they converged and by which residual, `bilevel.linear` finds out.
"""

import warnings

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
    "jaxopt",
    "projection",
    "prox",
    "solve_bicgstab",
    "solve_cg",
    "solve_cholesky",
    "solve_gmres",
    "solve_lu",
    "solve_normal_cg",
]
