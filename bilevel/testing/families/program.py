"""The quadratic program ½⟨w, Qw⟩ − ⟨w, Bθ + c⟩, which the families with constraints share."""

from typing import Any

import jax
import numpy as np

from bilevel.testing.cases import flatten
from bilevel.testing.families.building_blocks import Options, draw_direction, draw_theta, symmetric_matrix
from bilevel.types import PyTree


def draw_program(rng: np.random.Generator, options: Options) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Draw θ and the program's Q and B, and a vector u for constraints that depend on ⟨u, θ⟩; c is chosen later."""
    m = options.outer_size
    return draw_theta(rng, m), {
        "matrix": symmetric_matrix(rng, options.size, options.condition),
        "slope": rng.normal(size=(options.size, m)),
        "direction": draw_direction(rng, m),
    }


def program(w: PyTree, theta: PyTree, data: dict[str, Any]) -> jax.Array:
    """Evaluate ½⟨w, Qw⟩ − ⟨w, Bθ + c⟩."""
    flat = flatten(w)
    return 0.5 * flat @ data["matrix"] @ flat - flat @ (data["slope"] @ flatten(theta) + data["offset"])
