"""The outer loop: descent on θ, with warm starts of the inner and the adjoint solve.

θ changes little between two outer steps, so the previous w and the previous adjoint are good starts. From them, each
solver needs only a few steps. From cold starts, it would need many steps for the same accuracy. The outer steps run in
a compiled loop. The state of the loop is a pytree, so a loop can be saved and resumed.
"""

from bilevel.outer.driver import initial_state, minimize
from bilevel.outer.records import History, Minimum, OuterState, StepRecord

__all__ = ["History", "Minimum", "OuterState", "StepRecord", "initial_state", "minimize"]
