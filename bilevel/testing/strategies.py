"""Hypothesis strategies that draw bilevel problems with known solutions, for tests of your own method or solver.

The examples have few different shapes, so that a program compiled for one example serves many. Hypothesis shrinks a
failing example towards the first value of each argument and towards seed 0. With the default arguments, these values
give a small, flat, well-conditioned problem. The example prints as the call that makes it again.

Example:
    >>> from hypothesis import given, settings
    >>> import jax, numpy as np, bilevel as bl
    >>> @settings(max_examples=3, deadline=None, derandomize=True, database=None)
    ... @given(ridge_problems(sizes=(3,), w_layouts=("flat",), theta_layouts=("flat",)))
    ... def test_my_method(case):
    ...     function = bl.value_and_hypergradient(case.problem, case.solver, bl.Implicit(bl.CG(max_steps=10)))
    ...     out = function(case.theta, case.init, case.data)
    ...     np.testing.assert_allclose(out.gradient, case.gradient, atol=case.rtol * abs(case.gradient).max())
    >>> test_my_method()
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st

from bilevel.testing import families
from bilevel.testing.cases import LAYOUTS, Case

__all__ = [
    "box_problems",
    "fixed_point_problems",
    "imaml_problems",
    "kkt_problems",
    "lasso_problems",
    "logistic_problems",
    "problems",
    "quadratic_problems",
    "ridge_problems",
    "root_problems",
    "simplex_problems",
]


@st.composite
def _problems(
    draw: st.DrawFn,
    family: Callable[..., Case],
    sizes: Sequence[int],
    conditions: Sequence[float],
    dtypes: Sequence[str] | None,
    w_layouts: Sequence[str],
    theta_layouts: Sequence[str] | None,
    more: dict[str, Sequence],
) -> Case:
    options = {"size": sizes, "condition": conditions, "dtype": dtypes or _available(), "w": w_layouts, **more}
    if theta_layouts:
        options["theta"] = theta_layouts
    drawn = {name: draw(st.sampled_from(values), label=name) for name, values in options.items()}
    return family(**drawn, seed=draw(st.integers(0, 2**32 - 1), label="seed"))


def _available():
    """Return the dtypes to draw. Without ``jax_enable_x64``, JAX would silently round float64 to float32."""
    return ("float64", "float32") if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else ("float32",)


Strategy = Callable[..., st.SearchStrategy[Case]]


def _strategy(
    family: Callable[..., Case], theta_layouts: Sequence[str] | None = (*LAYOUTS, "scalar"), **more: Sequence[Any]
) -> Strategy:
    def strategy(
        sizes: Sequence[int] = (3, 4),
        conditions: Sequence[float] = (2.0, 10.0, 100.0),
        dtypes: Sequence[str] | None = None,
        w_layouts: Sequence[str] = LAYOUTS,
        theta_layouts: Sequence[str] | None = theta_layouts,
        **choices: Sequence[Any],
    ) -> st.SearchStrategy[Case]:
        unknown = choices.keys() - more.keys()
        if unknown:
            raise TypeError(
                f"{strategy.__name__} has no option {', '.join(sorted(unknown))}; "
                f"in addition to the options of every strategy it takes: {', '.join(more) or 'none'}"
            )
        return _problems(family, sizes, conditions, dtypes, w_layouts, theta_layouts, more | choices)

    strategy.__name__ = strategy.__qualname__ = f"{family.__name__}_problems"
    strategy.__doc__ = f"""{(family.__doc__ or "").splitlines()[0]}

    Args:
        sizes: numbers of inner variables to draw from, each at least 3.
        conditions: condition numbers to draw from.
        dtypes: dtypes to draw from; None means float32 and, if ``jax_enable_x64`` is set, float64.
        w_layouts: layouts of the inner variables to draw from.
        theta_layouts: layouts of the outer variables to draw from; None leaves the layout to the family.
        choices: for each further argument of the family, the values to draw from. Further arguments: {_listed(more)}.

    Returns:
        A strategy of :class:`~bilevel.testing.Case`.

    Raises:
        TypeError: for an argument that the family does not have.
    """
    return strategy


def _listed(names):
    return ", ".join(f"``{name}``" for name in names) or "none"


quadratic_problems: Strategy = _strategy(families.quadratic)
ridge_problems: Strategy = _strategy(families.ridge)
logistic_problems: Strategy = _strategy(families.logistic)
imaml_problems: Strategy = _strategy(families.imaml, theta_layouts=None, strength=("one", "each"))
fixed_point_problems: Strategy = _strategy(families.fixed_point)
root_problems: Strategy = _strategy(families.root)
box_problems: Strategy = _strategy(families.box)
simplex_problems: Strategy = _strategy(families.simplex)
lasso_problems: Strategy = _strategy(families.lasso)
kkt_problems: Strategy = _strategy(families.kkt, inequality=(False, True))


def problems(
    sizes: Sequence[int] = (3, 4),
    conditions: Sequence[float] = (2.0, 10.0, 100.0),
    dtypes: Sequence[str] | None = None,
    w_layouts: Sequence[str] = LAYOUTS,
) -> st.SearchStrategy[Case]:
    """Draw a case of any family, by the family's own strategy.

    Args:
        sizes, conditions, dtypes, w_layouts: the values that are drawn from, as for the strategies of the families.

    Returns:
        A strategy of :class:`~bilevel.testing.Case`.
    """
    strategies = (
        quadratic_problems,
        ridge_problems,
        logistic_problems,
        imaml_problems,
        fixed_point_problems,
        root_problems,
        box_problems,
        simplex_problems,
        lasso_problems,
        kkt_problems,
    )
    return st.one_of([strategy(sizes, conditions, dtypes, w_layouts) for strategy in strategies])
