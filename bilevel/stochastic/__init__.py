"""Stochastic bilevel optimisation on samples: single loops, variance reduction, and first-order penalties.

Each algorithm moves w and θ by steps on batches, without solving the inner problem in between. All algorithms but F2SA
also move the adjoint by steps on batches.
"""

from bilevel.stochastic.amigo import AmIGO
from bilevel.stochastic.curvature import choose_rates
from bilevel.stochastic.driver import History, StochasticMinimum, minimize
from bilevel.stochastic.f2sa import F2SA
from bilevel.stochastic.protocol import (
    Algorithm,
    Directions,
    Draws,
    InnerTerms,
    Oracle,
    OuterTerms,
    State,
    directions,
    register,
)
from bilevel.stochastic.rates import Power, descend
from bilevel.stochastic.saba import SABA
from bilevel.stochastic.samples import Samples, shuffle
from bilevel.stochastic.soba import MASOBA, SOBA
from bilevel.stochastic.srba import SRBA

__all__ = [
    "F2SA",
    "MASOBA",
    "SABA",
    "SOBA",
    "SRBA",
    "Algorithm",
    "AmIGO",
    "Directions",
    "Draws",
    "History",
    "InnerTerms",
    "Oracle",
    "OuterTerms",
    "Power",
    "Samples",
    "State",
    "StochasticMinimum",
    "choose_rates",
    "descend",
    "directions",
    "minimize",
    "register",
    "shuffle",
]
