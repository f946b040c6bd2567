"""The condition of a constrained minimum with its multipliers: KKT."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.conditions.protocol import Residual, check_signature, like_w, no_scaling, scalar
from bilevel.conditions.stationary import NO_AUX
from bilevel.types import Objective, PyTree


@dataclass(frozen=True)
class KKT:
    """The Karush-Kuhn-Tucker conditions of min objective subject to equality = 0 and inequality ≤ 0.

    Here w = (x, ν, μ) with the multipliers ν and μ. With the Lagrangian
    L = objective + ⟨ν, equality⟩ + ⟨μ, inequality⟩ the residual is (∇_x L, equality, μ·inequality). An inactive
    inequality has μ = 0 and no effect on the derivative. The adjoint system is singular where an active inequality has
    μ = 0, or where the gradients of the active constraints are linearly dependent. The residual may also vanish at
    points with μ < 0 or inequality > 0, so the solver must ensure μ ≥ 0 and inequality ≤ 0.

    Args:
        objective: ``objective(x, theta, data) -> scalar``.
        equality: ``equality(x, theta, data)``, any pytree; where it is None, the second entry of w is None too.
        inequality: ``inequality(x, theta, data)``, any pytree; where it is None, the third entry of w is None too.

    Raises:
        ValueError: in ``residual``, for a w that is not a triple (x, ν, μ), and for a constraint that is not a tree
            like its multipliers.
        TypeError: for a function that does not take three arguments, and, in ``residual``, for an objective that
            returns no scalar.

    Source: Amos and Kolter (2017), OptNet, equation 6.

    Example:
        The point nearest to (1, 1) on the line x + y = θ.

        >>> import jax.numpy as jnp
        >>> nearest = KKT(lambda x, theta, data: 0.5 * jnp.sum((x - 1) ** 2), lambda x, theta, data: jnp.sum(x) - theta)
        >>> w = (jnp.array([0.5, 0.5]), jnp.float32(0.5), None)
        >>> [r.tolist() for r in nearest.residual(w, jnp.float32(1.0), None)[:2]]
        [[0.0, 0.0], 0.0]
    """

    objective: Objective
    equality: Residual | None = None
    inequality: Residual | None = None

    symmetric = False
    positive_definite = False
    strong_convexity = None
    scaling = no_scaling

    def __post_init__(self) -> None:
        for name in ("objective", "equality", "inequality"):
            check_signature("KKT", name, getattr(self, name), "x", "theta", "data")

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        x, equal, unequal = self._parts(w)

        def functions(x: PyTree) -> tuple[jax.Array, PyTree, PyTree]:
            objective, equality, inequality = self._functions(x, theta, data)
            return (
                scalar(objective, "objective", NO_AUX),
                _like_multipliers(equality, equal, "equality"),
                _like_multipliers(inequality, unequal, "inequality"),
            )

        (objective, equality, inequality), pull_back = jax.vjp(functions, x)
        (stationarity,) = pull_back((jnp.ones_like(objective), equal, unequal))
        residual = stationarity, equality, jax.tree.map(jnp.multiply, unequal, inequality)
        # w may be a named tuple; the residual has the same type.
        return jax.tree.unflatten(jax.tree.structure(w), jax.tree.leaves(residual))

    def _functions(self, x: PyTree, theta: PyTree, data: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """Return the values of the objective, the equality and the inequality."""
        equality, inequality = (None if f is None else f(x, theta, data) for f in (self.equality, self.inequality))
        return self.objective(x, theta, data), equality, inequality

    def _parts(self, w: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        """Return x, ν and μ, or raise ValueError if w is not a triple with these parts."""
        given = [constraint is not None for constraint in (self.equality, self.inequality)]
        if not isinstance(w, tuple) or len(w) != 3 or [part is not None for part in w[1:]] != given:
            names = [name if there else "None" for name, there in zip(("ν", "μ"), given, strict=True)]
            raise ValueError(
                f"this KKT condition needs w = (x, {names[0]}, {names[1]}), got a w with the structure "
                f"{jax.tree.structure(w)}"
            )
        return w


def _like_multipliers(value: PyTree, multipliers: PyTree, name: str) -> PyTree:
    """Return the values of constraints in the dtypes and shapes of their multipliers."""
    hint = "; or start the solver with one multiplier for each constraint"
    return like_w(value, multipliers, name, same_shapes=False, template="its multipliers", hint=hint)
