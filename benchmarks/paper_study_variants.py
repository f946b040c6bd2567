"""The variants of :mod:`benchmarks.paper_study`: the paper's setting, and settings that differ from it."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

import bilevel as bl


@dataclass(frozen=True)
class Variant:
    """One setting of the study; the defaults are the base variant.

    Args:
        factor: the factor that differs from the base variant, in words.
        strength: λ of the proximal term that is added to the mean support loss.
        inner: the inner solver.
        linear: the solver of the adjoint system. The study counts the tasks in which CG meets a direction of negative
            curvature. Only the engine ``"watched"`` checks every direction. The default engine checks its answer x
            alone, by the sign of ⟨x, Ax⟩.
        epsilon: Adam's ε.
        learning_rate: Adam's learning rate.
        tasks: number of tasks in a meta-step.
        queries: number of query images of each class in training; the test uses one.
        kernel_gain: factor by which Glorot's initial kernels are multiplied.
    """

    factor: str
    strength: float = 2.0
    inner: Any = bl.GradientDescent(0.1, 16)  # noqa: RUF009  (frozen)
    linear: bl.CG = bl.CG(5, engine="watched")  # noqa: RUF009
    epsilon: float = 1e-8
    learning_rate: float = 1e-3
    tasks: int = 4
    queries: int = 1
    kernel_gain: float = 1.0

    @property
    def knobs(self) -> "Knobs":
        """Numbers of the variant that compiled programs take as arguments."""
        rate = getattr(self.inner, "step_size", 0.0)
        return Knobs(*map(jnp.float32, (self.strength, rate, self.learning_rate, self.epsilon)))


class Knobs(NamedTuple):
    """Numbers that are arguments of compiled programs, so that variants that differ only in them share a program.

    Attributes:
        strength: λ.
        inner_rate: step size of the inner gradient descent; 0 for another inner solver.
        learning_rate: Adam's learning rate.
        epsilon: Adam's ε.
    """

    strength: Any
    inner_rate: Any
    learning_rate: Any
    epsilon: Any


MOMENTUM = bl.GradientDescent(0.01, 16, momentum=0.8)
BASE = Variant("nothing: the paper's numbers, read to the letter")
VARIANTS = {
    "literal": BASE,
    "summed-loss": replace(BASE, factor="λ = 2 on the summed loss (0.4 on the mean)", strength=0.4),
    "weak-proximity": replace(BASE, factor="λ = 0.1", strength=0.1),
    "strong-proximity": replace(
        BASE,
        factor="λ = 10 (at inner rate 0.05: at 0.1 descent diverges)",
        strength=10.0,
        inner=bl.GradientDescent(0.05, 16),
    ),
    "small-inner-rate": replace(BASE, factor="inner rate 0.02", inner=bl.GradientDescent(0.02, 16)),
    "momentum": replace(BASE, factor="inner rate 0.01, momentum 0.8", inner=MOMENTUM),
    "hessian-free": replace(BASE, factor="inner solver Hessian-free, 3 steps of 5 CG", inner=bl.HessianFree(3, 5)),
    "more-cg": replace(BASE, factor="20 CG steps", linear=bl.CG(20, engine="watched")),
    "damped-cg": replace(BASE, factor="CG on (I + H/λ) + I", linear=bl.CG(5, ridge=1.0, engine="watched")),
    "adam-epsilon": replace(BASE, factor="Adam's ε = 0.001", epsilon=1e-3),
    "larger-batch": replace(BASE, factor="16 tasks in a meta-step", tasks=16),
    "kernel-gain": replace(BASE, factor="kernels start 10 times as large", kernel_gain=10.0),
    "more-queries": replace(BASE, factor="15 query images of each class", queries=15),
    "slower-outer": replace(BASE, factor="Adam at 0.0003", learning_rate=3e-4),
    "preset": Variant(
        factor="all that the preset changes: λ, momentum, kernels, tasks, queries, Adam",
        strength=0.1,
        inner=MOMENTUM,
        learning_rate=3e-3,
        tasks=8,
        queries=15,
        kernel_gain=10.0,
    ),
}


def settings(variant: Variant) -> dict:
    """Return the fields of a variant as JSON types, for its record."""
    return {field.name: _plain(getattr(variant, field.name)) for field in fields(variant)}


def _plain(value):
    return value if isinstance(value, str | int | float) else {"kind": type(value).__name__} | asdict(value)
