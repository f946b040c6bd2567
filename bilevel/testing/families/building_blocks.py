"""The options of a family, the random numbers that families share, and the assembly of a case from them."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from bilevel.problem import Problem
from bilevel.testing.cases import LAYOUTS, Case, ClosedForm, arrange
from bilevel.types import PyTree


@dataclass(frozen=True)
class Options:
    """The arguments that all families take.

    Attributes:
        size: the number of entries of w, at least 3.
        condition: the condition number κ that the matrices are drawn for, at least 1. The system that determines the
            solution has ``case.condition_number``, which may differ.
        dtype: ``"float32"`` or ``"float64"``.
        w: the layout of the inner variables, one of :data:`~bilevel.testing.cases.LAYOUTS`.
        theta: the layout of the outer variables, one of the same or ``"scalar"``.
        seed: the seed of all random numbers.
    """

    size: int = 3
    condition: float = 10.0
    dtype: str = "float64"
    w: str = "flat"
    theta: str = "flat"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 3 or not self.condition >= 1 or self.dtype not in ("float32", "float64"):
            raise ValueError(f"a case needs size ≥ 3, condition ≥ 1 and dtype float32 or float64, got {self}")
        if self.w not in LAYOUTS or self.theta not in (*LAYOUTS, "scalar"):
            raise ValueError(f'the layouts are {", ".join(LAYOUTS)}, and "scalar" for theta, got {self}')

    @property
    def outer_size(self) -> int:
        """The number of entries of θ, which differs from that of w, so that a missing transpose raises a shape error.

        A family with one entry of θ for each entry of w, such as a penalty, sets its own number.
        """
        return 1 if self.theta == "scalar" else self.size + 1


# --- Random numbers ------------------------------------------------------------------------------------------------


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw an orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def symmetric_matrix(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """Draw a symmetric positive definite matrix with eigenvalues from 1/κ to 1."""
    basis = orthogonal(rng, size)
    return (basis * np.geomspace(1 / condition, 1, size)) @ basis.T


def general_matrix(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """Draw a matrix with singular values from 1/κ to 1 and independent left and right singular vectors."""
    return (orthogonal(rng, size) * np.geomspace(1 / condition, 1, size)) @ orthogonal(rng, size).T


def contraction_complement(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """Draw I − cU with an orthogonal U and c = (κ − 1)/(κ + 1). The condition number is at most κ.

    U rotates planes by angles of 0.7 to 2.4 radians, so the matrix is far from symmetric.
    """
    rotation = np.eye(size)
    for i in range(0, size - 1, 2):
        angle = rng.uniform(0.7, 2.4)
        rotation[i : i + 2, i : i + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    basis = orthogonal(rng, size)
    return np.eye(size) - (condition - 1) / (condition + 1) * basis @ rotation @ basis.T


def draw_theta(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw outer variables, normal with standard deviation ½."""
    return 0.5 * rng.normal(size=size)


def draw_direction(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a vector u of expected squared length 1, for terms in ⟨u, θ⟩."""
    return rng.normal(size=size) / np.sqrt(size)


# --- Assembly ------------------------------------------------------------------------------------------------------


def make_case(
    family: str,
    options: Options,
    problem: Problem,
    numbers: dict[str, Any],
    closed_form: ClosedForm,
    suggest_solver: Callable[[Options], Callable[..., Any]],
    theta: np.ndarray | int,
    *,
    margin: float = np.inf,
    init: np.ndarray | None = None,
    arrange_w: Callable[[np.ndarray], PyTree] | None = None,
    extra: dict[str, Any] | None = None,
) -> Case:
    """Assemble a case and round all its numbers to the dtype; the closed form is evaluated on the rounded numbers.

    Args:
        family: the name of the family's function, for the recipe.
        options: the options of the case.
        problem: the condition and the outer function.
        numbers: the data of the condition; the numbers of the outer function are added.
        closed_form: maps data and θ to the exact solution.
        suggest_solver: maps options to an inner solver.
        theta: θ as a vector, or the number of entries to draw.
        margin: the distance of the solution from the nearest kink.
        init: the initial point as a vector; None for a standard normal one.
        arrange_w: lays a vector out as the inner variables; None for the layout in the options.
        extra: further arguments of the family, for the recipe.
    """
    rng = np.random.default_rng([options.seed, 1])
    theta = draw_theta(rng, theta) if isinstance(theta, int) else theta
    init = rng.normal(size=options.size) if init is None else init
    numbers = numbers | {"outer": _outer_numbers(rng, init.size, theta.size)}
    arrange_w = arrange_w or functools.partial(arrange, layout=options.w)

    def suggest():
        import bilevel  # Only this function uses the methods under test, so only it imports them.

        linear = bilevel.choose_linear(problem.condition, arrange_w(init)).solver
        return suggest_solver(options), bilevel.Implicit(linear)

    def rounded(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf, options.dtype), tree)

    shown = ", ".join(f"{name}={value!r}" for name, value in (asdict(options) | (extra or {})).items())
    return Case(
        recipe=f"{family}({shown})",
        problem=problem,
        theta=rounded(arrange(theta, options.theta)),
        init=rounded(arrange_w(init)),
        data=rounded(numbers),
        margin=float(margin),
        _closed_form=closed_form,
        _arrange=arrange_w,
        _suggest=suggest,
    )


def _outer_numbers(rng, w_size, theta_size):
    return {
        "target": rng.normal(size=w_size),
        "center": rng.normal(size=theta_size),
        "weight_w": rng.normal(size=w_size),
        "weight_theta": rng.normal(size=theta_size),
    }
