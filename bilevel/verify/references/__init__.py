"""Reference derivatives, in float64, that share no gradient code with the methods they check.

Let w*(θ) be the inner solution near the solver's output, and G(θ) = outer(w*(θ), θ). The three references answer
different questions:

- :func:`finite_differences` approximates dG/dθ. Newton's method finds w* at each shifted θ, and G is differenced. If
  Newton's method fails (a singular system, or more than 400 unknowns), the solver runs at each shifted θ instead, and
  the result approximates the derivative that ``unrolled`` computes.
- :func:`dense` evaluates the implicit function theorem at a given w. A = ∂F/∂w and B = ∂F/∂θ are written out, and
  numpy solves the adjoint system. At w* the result is dG/dθ. At another w it is what an exact implicit method returns
  there.
- :func:`unrolled` differentiates the solver's output by tangents through the iterations. If the iterations have
  converged, the result is dG/dθ.

Each :class:`Reference` names the question it answers and carries a bound on its own error.
"""

from collections.abc import Callable, Sequence

from bilevel.verify.references.differences import finite_differences
from bilevel.verify.references.directions import (
    MAX_COORDINATES,
    RANDOM_DIRECTIONS,
    choose_directions,
    random_directions,
)
from bilevel.verify.references.matrices import MAX_UNKNOWNS, Linearisation, dense, linearise, solve_adjoint
from bilevel.verify.references.record import (
    Reference,
    ReferenceUnavailable,
    init_in_double,
    inner_program,
    outer_value,
    residual_program,
)
from bilevel.verify.references.tangents import unrolled

__all__ = [
    "MAX_COORDINATES",
    "MAX_UNKNOWNS",
    "RANDOM_DIRECTIONS",
    "REFERENCES",
    "Linearisation",
    "Reference",
    "ReferenceUnavailable",
    "choose_directions",
    "dense",
    "finite_differences",
    "init_in_double",
    "inner_program",
    "linearise",
    "outer_value",
    "random_directions",
    "residual_program",
    "select_references",
    "solve_adjoint",
    "unrolled",
]

REFERENCES: dict[str, Callable[..., Reference]] = {
    "finite_differences": finite_differences,
    "unrolled": unrolled,
    "dense": dense,
}


def select_references(against: str | Sequence[str]) -> dict[str, Callable[..., Reference]]:
    """Return the references with these names.

    Raises:
        ValueError: for an unknown name, or for none.
    """
    names = (against,) if isinstance(against, str) else tuple(against)
    if not names or not set(names) <= set(REFERENCES):
        raise ValueError(f"against takes {', '.join(REFERENCES)}, got {against!r}")
    return {name: REFERENCES[name] for name in names}
