"""Bilevel optimisation in JAX: declare what holds at the inner solution, and get a hypergradient you can trust.

A newcomer needs about 30 names:

- declare: ``Problem``, and one of ``Stationary``, ``Proximal``, ``LeastSquares``, ``Root``, ``FixedPoint``,
  ``Projected``, ``ProximalGradient``, ``KKT``
- solve the inner problem: ``GradientDescent``, ``HessianFree``, ``LevenbergMarquardt``, ``FixedPointIteration``,
  ``Anderson``, ``Optax``, ``Jaxopt``, ``Optimistix``
- differentiate: ``Unrolled``, or ``Implicit`` with a linear solver (``CG``, ``GMRES``, ``LU``; ``choose_linear`` picks
  one)
- call: ``value_and_hypergradient``, ``implicit_layer``, ``custom_root``, ``minimize``; ``stochastic`` has loops on
  batches of samples
- trust: ``Status``, ``HypergradientError``, ``check_condition``, ``check_hypergradient``, ``certify``

The other names are documented by group in the API pages.

Example:
    Differentiate ‖data − w‖² in θ, where w are the coefficients of a ridge regression with the penalty exp(θ):

    >>> import jax.numpy as jnp
    >>> import bilevel as bl
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1.0, 2.0])
    >>> def fit(w, theta, data):
    ...     return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)
    >>> problem = bl.Problem(bl.Stationary(fit), outer=lambda w, theta, data: jnp.sum((data - w) ** 2))
    >>> solver = bl.GradientDescent(step_size=0.3, max_steps=200, tol=1e-5)
    >>> hypergradient = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(max_steps=10, tol=1e-5)))
    >>> out = hypergradient(0.0, jnp.zeros(2), jnp.ones(2))
    >>> round(float(out.value), 4), round(float(out.gradient), 4)
    (0.29, 0.314)
    >>> bl.Status(int(out.status))
    <Status.CONVERGED: 0>
"""

from bilevel import stochastic
from bilevel._jaxopt.operators import jaxopt_projection, jaxopt_prox
from bilevel.certificates import (
    HALF_SQUARED,
    LOGISTIC,
    SOFTMAX,
    Ball,
    Certificate,
    CertificateKind,
    Finding,
    LinearLoss,
    Lipschitz,
    certify,
)
from bilevel.conditions import (
    KKT,
    Condition,
    FixedPoint,
    LeastSquares,
    Projected,
    Proximal,
    ProximalGradient,
    Root,
    Stationary,
    identity_center,
    theta_itself,
)
from bilevel.decorators import custom_fixed_point, custom_root
from bilevel.errors import HypergradientError, check_status
from bilevel.hypergradients import implicit_layer, value_and_hypergradient
from bilevel.linear import (
    CG,
    GMRES,
    LU,
    BiCGStab,
    Blockwise,
    Cholesky,
    LinearChoice,
    Lineax,
    Neumann,
    NormalCG,
    Nystrom,
    choose_linear,
)
from bilevel.methods import (
    EvolutionStrategies,
    FiniteDifference,
    FirstOrder,
    ForwardUnrolled,
    Implicit,
    Method,
    OneStep,
    Unrolled,
    ValuePenalty,
)
from bilevel.notebook import html_table
from bilevel.outer import History, Minimum, OuterState, StepRecord, initial_state, minimize
from bilevel.problem import Problem
from bilevel.solvers import (
    FISTA,
    Anderson,
    FixedPointIteration,
    GaussNewton,
    GradientDescent,
    HessianFree,
    InnerSolver,
    Jaxopt,
    LevenbergMarquardt,
    Minibatches,
    Optax,
    Optimistix,
    solve,
)
from bilevel.types import Hypergradient, LinearInfo, LinearSolver, Solution, Status
from bilevel.verify import (
    Check,
    Comparison,
    ConditionReport,
    HypergradientReport,
    MethodComparison,
    MethodReport,
    check_condition,
    check_hypergradient,
    compare_methods,
)

__all__ = [  # noqa: RUF022  # by task
    # Declare a problem
    "Problem",
    "Condition",
    "Stationary",
    "Proximal",
    "LeastSquares",
    "Root",
    "FixedPoint",
    "Projected",
    "ProximalGradient",
    "KKT",
    "identity_center",
    "theta_itself",
    "jaxopt_projection",
    "jaxopt_prox",
    # Solve the inner problem
    "InnerSolver",
    "GradientDescent",
    "Optax",
    "HessianFree",
    "GaussNewton",
    "LevenbergMarquardt",
    "Minibatches",
    "FixedPointIteration",
    "FISTA",
    "Anderson",
    "Jaxopt",
    "Optimistix",
    "solve",
    # Differentiate
    "Method",
    "Implicit",
    "Unrolled",
    "ForwardUnrolled",
    "OneStep",
    "FirstOrder",
    "FiniteDifference",
    "ValuePenalty",
    "EvolutionStrategies",
    # Solve the adjoint system
    "LinearSolver",
    "CG",
    "NormalCG",
    "GMRES",
    "BiCGStab",
    "LU",
    "Cholesky",
    "Blockwise",
    "Neumann",
    "Nystrom",
    "Lineax",
    "choose_linear",
    "LinearChoice",
    # Call
    "value_and_hypergradient",
    "implicit_layer",
    "custom_root",
    "custom_fixed_point",
    "minimize",
    "initial_state",
    "Minimum",
    "History",
    "StepRecord",
    "OuterState",
    "stochastic",
    # Read the results
    "Hypergradient",
    "Solution",
    "LinearInfo",
    "Status",
    "HypergradientError",
    "check_status",
    "html_table",
    # Trust
    "check_condition",
    "ConditionReport",
    "Check",
    "check_hypergradient",
    "HypergradientReport",
    "Comparison",
    "compare_methods",
    "MethodComparison",
    "MethodReport",
    "certify",
    "Certificate",
    "CertificateKind",
    "Finding",
    "Lipschitz",
    "LinearLoss",
    "Ball",
    "HALF_SQUARED",
    "LOGISTIC",
    "SOFTMAX",
]
