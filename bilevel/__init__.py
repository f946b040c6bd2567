"""Bilevel optimisation in JAX: declare what holds at the inner solution, and get a hypergradient to trust.

Example:
    The penalty of a ridge regression that serves validation data best: where does its loss fall?

    >>> import jax.numpy as jnp
    >>> import bilevel as bl
    >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([1.0, 2.0])
    >>> def fit(w, theta, data):
    ...     return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(w**2)
    >>> problem = bl.Problem(bl.Stationary(fit), outer=lambda w, theta, data: jnp.sum((data - w) ** 2))
    >>> solver = bl.GradientDescent(step_size=0.3, steps=200, tol=1e-5)
    >>> hypergradient = bl.value_and_hypergradient(problem, solver, bl.Implicit(bl.CG(maxiter=10, tol=1e-5)))
    >>> out = hypergradient(0.0, jnp.zeros(2), jnp.ones(2))
    >>> round(float(out.value), 4), round(float(out.gradient), 4)
    (0.29, 0.314)
    >>> bl.Status(int(out.status))
    <Status.CONVERGED: 0>
"""

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
    Problem,
    Projected,
    Proximal,
    ProximalGradient,
    Root,
    Stationary,
    jaxopt_projection,
    jaxopt_prox,
    theta_itself,
)
from bilevel.estimators import EvolutionStrategies, FiniteDifference, ValuePenalty
from bilevel.failures import HypergradientError, check_status
from bilevel.hypergradients import (
    FirstOrder,
    ForwardUnrolled,
    Implicit,
    Method,
    OneStep,
    Unrolled,
    implicit_layer,
    value_and_hypergradient,
)
from bilevel.linear import (
    CG,
    GMRES,
    LU,
    BiCGStab,
    Cholesky,
    LinearChoice,
    Neumann,
    NormalCG,
    Nystrom,
    choose_linear,
)
from bilevel.outer import History, Minimum, minimize
from bilevel.solvers import (
    Anderson,
    FixedPointIteration,
    GradientDescent,
    HessianFree,
    InnerSolver,
    Jaxopt,
    Optax,
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

__all__ = [
    "CG",
    "GMRES",
    "HALF_SQUARED",
    "KKT",
    "LOGISTIC",
    "LU",
    "SOFTMAX",
    "Anderson",
    "Ball",
    "BiCGStab",
    "Certificate",
    "CertificateKind",
    "Check",
    "Cholesky",
    "Comparison",
    "Condition",
    "ConditionReport",
    "EvolutionStrategies",
    "Finding",
    "FiniteDifference",
    "FirstOrder",
    "FixedPoint",
    "FixedPointIteration",
    "ForwardUnrolled",
    "GradientDescent",
    "HessianFree",
    "History",
    "Hypergradient",
    "HypergradientError",
    "HypergradientReport",
    "Implicit",
    "InnerSolver",
    "Jaxopt",
    "LinearChoice",
    "LinearInfo",
    "LinearLoss",
    "LinearSolver",
    "Lipschitz",
    "Method",
    "MethodComparison",
    "MethodReport",
    "Minimum",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "OneStep",
    "Optax",
    "Problem",
    "Projected",
    "Proximal",
    "ProximalGradient",
    "Root",
    "Solution",
    "Stationary",
    "Status",
    "Unrolled",
    "ValuePenalty",
    "certify",
    "check_condition",
    "check_hypergradient",
    "check_status",
    "choose_linear",
    "compare_methods",
    "implicit_layer",
    "jaxopt_projection",
    "jaxopt_prox",
    "minimize",
    "solve",
    "theta_itself",
    "value_and_hypergradient",
]
