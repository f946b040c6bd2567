"""What holds at the inner solution: a condition is a residual F(w, θ, data) that vanishes there.

Everything else follows from the residual: the inner solver drives it to zero, and the implicit function
theorem differentiates it, dw*/dθ = −(∂F/∂w)⁻¹ ∂F/∂θ. A condition also says what it knows of its own
structure, so that a solver that cannot work on it is refused before anything runs.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.types import Objective, PyTree

Residual = Callable[[PyTree, PyTree, PyTree], PyTree]
"""``residual(w, theta, data)``, a pytree like w."""
StrongConvexity = float | Callable[[PyTree, PyTree], jax.Array] | None
"""μ > 0 with ⟨u, Au⟩ ≥ μ‖u‖² wherever the solver may come; a number, ``f(theta, data)``, or None: not known."""


class Condition(Protocol):
    """What solvers and methods ask of a condition."""

    @property
    def symmetric(self) -> bool:
        """Whether ∂F/∂w is symmetric everywhere: F is then the gradient in w of some function."""
        ...

    @property
    def positive_definite(self) -> bool:
        """Whether the user knows ⟨u, (∂F/∂w)u⟩ > 0 for all u ≠ 0; False where it is not known."""
        ...

    @property
    def strong_convexity(self) -> StrongConvexity:
        """μ where the user knows it."""
        ...

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """F(w, θ, data), a pytree like w."""
        ...

    def scaling(self, theta: PyTree, data: PyTree) -> PyTree | None:
        """D, a scalar or a pytree like w: the adjoint system is solved as (D A D)u = D g, v = D u."""
        ...


def _no_scaling(self, theta: PyTree, data: PyTree) -> None:
    """A condition that knows no better scaling than none."""
    del self, theta, data


def _check_strong_convexity(name: str, strong_convexity: StrongConvexity) -> None:
    if strong_convexity is not None and not callable(strong_convexity) and not 0 < strong_convexity < float("inf"):
        raise ValueError(
            f"{name} needs a strong_convexity above 0, got {strong_convexity}; leave it None where none is known"
        )


@dataclass(frozen=True)
class Stationary:
    """∇_w objective(w, θ, data) = 0: an unconstrained minimum, or any other stationary point.

    Args:
        objective: ``objective(w, theta, data) -> scalar``.
        positive_definite: whether its Hessian in w is known to be; nothing is assumed where it is not.
        strong_convexity: μ, the smallest eigenvalue of that Hessian, where it is known: a number above 0,
            or ``f(theta, data)``.

    Raises:
        ValueError: for a strong convexity that is not positive and finite, where it is a number.

    Example:
        >>> import jax.numpy as jnp
        >>> ridge = Stationary(lambda w, theta, data: 0.5 * (w - data) ** 2 + 0.5 * theta * w**2)
        >>> float(ridge.residual(jnp.float32(1.0), jnp.float32(1.0), jnp.float32(2.0)))
        0.0
    """

    objective: Objective
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = True
    scaling = _no_scaling

    def __post_init__(self):
        _check_strong_convexity("Stationary", self.strong_convexity)

    def potential(self, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
        """The function whose gradient in w is the residual, a scalar."""
        return self.objective(w, theta, data)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return jax.grad(self.objective)(w, theta, data)


def theta_itself(theta: PyTree, data: PyTree) -> PyTree:
    """The centre of a proximal term that pulls w towards θ."""
    del data
    return theta


@dataclass(frozen=True)
class Proximal:
    """∇_w objective + λ(w − c) = 0: the minimum of objective(w, θ, data) + ½ λ‖w − c‖².

    With A = H + λI its adjoint system Av = g is solved in the scaled form (I + H/λ)u = g, whose
    eigenvalues gather at one where H is small against λ.

    Args:
        objective: ``objective(w, theta, data) -> scalar``, without the proximal term.
        strength: λ, a positive float; or ``strength(theta, data)``, a scalar or a pytree like w with one
            λ per parameter, which may be learned.
        center: ``center(theta, data)``, a pytree like w; θ itself by default.
        positive_definite: whether H + λI is known to be; it is where the objective is convex.
        strong_convexity: μ of objective and proximal term together, where it is known: λ for a convex
            objective; a number above 0, or ``f(theta, data)``.

    Raises:
        ValueError: for a λ or μ that is not positive and finite, where it is a number.

    Source: Rajeswaran, Finn, Kakade, Levine (2019), equation 3; for a λ per parameter the scaling is
    symmetric, (I + Λ^-½ H Λ^-½).
    """

    objective: Objective
    strength: float | Callable[[PyTree, PyTree], PyTree]
    center: Callable[[PyTree, PyTree], PyTree] = theta_itself
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = True

    def __post_init__(self):
        _check_strong_convexity("Proximal", self.strong_convexity)
        if not callable(self.strength) and not 0 < self.strength < float("inf"):
            raise ValueError(
                f"Proximal needs a strength λ above 0, got {self.strength}; for none at all use Stationary(objective)"
            )

    def potential(self, w: PyTree, theta: PyTree, data: PyTree) -> jax.Array:
        """The function whose gradient in w is the residual, a scalar."""
        away = self._away(w, theta, data)
        pull = tree.vdot(away, tree.scale(self._strength(theta, data), away))
        value = self.objective(w, theta, data)
        return value + 0.5 * pull.astype(value.dtype)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        pull = tree.scale(self._strength(theta, data), self._away(w, theta, data))
        return tree.add(jax.grad(self.objective)(w, theta, data), pull)

    def scaling(self, theta: PyTree, data: PyTree) -> PyTree:
        # Where a learned λ is not positive the system is left as it is, and its status tells.
        return jax.tree.map(
            lambda strength: jnp.where(strength > 0, strength, jnp.ones_like(strength)) ** -0.5,
            tree.arrays(self._strength(theta, data)),
        )

    def _away(self, w, theta, data):
        center = self.center(theta, data)
        expected, got = jax.tree.structure(w), jax.tree.structure(center)
        if got != expected:
            raise ValueError(
                f"Proximal pulls w towards a centre that is a tree like it, {expected}, got {got}: give "
                "center(theta, data), which is theta itself by default"
            )
        return tree.subtract(w, center)

    def _strength(self, theta, data):
        return self.strength(theta, data) if callable(self.strength) else self.strength


@dataclass(frozen=True)
class Root:
    """residual(w, θ, data) = 0: any system of as many equations as unknowns, A = ∂residual/∂w.

    Args:
        residual: ``residual(w, theta, data)``, a pytree like w.
        symmetric: whether A is known to be symmetric everywhere, which admits CG.
        positive_definite: whether ⟨u, Au⟩ > 0 is known to hold for all u ≠ 0.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖², where it is known: a number above 0, or ``f(theta, data)``.

    Raises:
        ValueError: for a strong convexity that is not positive and finite, where it is a number.

    Example:
        >>> import jax.numpy as jnp
        >>> root = Root(lambda w, theta, data: w**3 - theta)
        >>> float(root.residual(jnp.float32(2.0), jnp.float32(8.0), None))
        0.0
    """

    residual: Residual
    symmetric: bool = False
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    scaling = _no_scaling

    def __post_init__(self):
        _check_strong_convexity("Root", self.strong_convexity)


@dataclass(frozen=True)
class FixedPoint:
    """w = mapping(w, θ, data), with residual w − mapping and A = I − ∂mapping/∂w.

    Args:
        mapping: ``mapping(w, theta, data)``, a pytree like w.
        symmetric: whether ∂mapping/∂w is known to be symmetric everywhere, which admits CG.
        positive_definite: whether ⟨u, Au⟩ > 0 is known to hold for all u ≠ 0, as it does for a contraction.
        strong_convexity: μ with ⟨u, Au⟩ ≥ μ‖u‖², where it is known: 1 − c for a contraction by c.

    Raises:
        ValueError: for a strong convexity that is not positive and finite, where it is a number.

    Example:
        >>> import jax.numpy as jnp
        >>> half = FixedPoint(lambda w, theta, data: 0.5 * w + theta)
        >>> float(half.residual(jnp.float32(2.0), jnp.float32(1.0), None))
        0.0
    """

    mapping: Residual
    symmetric: bool = False
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    scaling = _no_scaling

    def __post_init__(self):
        _check_strong_convexity("FixedPoint", self.strong_convexity)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w, self.mapping(w, theta, data))


@dataclass(frozen=True)
class Projected:
    """w = P(w − η∇_w objective): the minimum of a function over a convex set, both of which may depend on θ.

    Where the solution lies on a kink of the projection the derivative is that of one side.

    Args:
        objective: ``objective(w, theta, data) -> scalar``.
        projection: ``projection(w, theta, data)`` onto the set; :func:`jaxopt_projection` makes one.
        step_size: η > 0. The solution does not depend on it; fixed-point iteration converges below
            2 / (largest eigenvalue of the Hessian).
        positive_definite: as for :class:`FixedPoint`.
        strong_convexity: as for :class:`FixedPoint`.

    Raises:
        ValueError: for a step size or μ that is not positive and finite.

    Source: Blondel et al. (2022), Efficient and modular implicit differentiation, section 2.2.

    Example:
        >>> import jax.numpy as jnp
        >>> positive = lambda w, theta, data: jnp.maximum(w, theta)
        >>> condition = Projected(lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2), positive)
        >>> [float(r) for r in condition.residual(jnp.array([0.0, 2.0]), jnp.float32(0.0), jnp.array([-1.0, 2.0]))]
        [0.0, 0.0]
    """

    objective: Objective
    projection: Residual
    step_size: float = 1.0
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = False
    scaling = _no_scaling

    def __post_init__(self):
        _check_step_size("Projected", self.step_size)
        _check_strong_convexity("Projected", self.strong_convexity)

    def mapping(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """P(w − η∇objective), whose fixed point is the solution."""
        return _both_ways(self.projection, _descend(self, w, theta, data), theta, data)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w, self.mapping(w, theta, data))


@dataclass(frozen=True)
class ProximalGradient:
    """w = prox_ηr(w − η∇_w objective): the minimum of objective + r, for an r with a proximal operator.

    Where the solution lies on a kink of the operator the derivative is that of one side.

    Args:
        objective: ``objective(w, theta, data) -> scalar``, the smooth part.
        prox: ``prox(w, theta, data, step_size)`` = argmin_u ½‖u − w‖² + η·r(u, θ); :func:`jaxopt_prox` makes one.
        step_size: η > 0. The solution does not depend on it; fixed-point iteration converges below
            2 / (largest eigenvalue of the Hessian).
        positive_definite: as for :class:`FixedPoint`.
        strong_convexity: as for :class:`FixedPoint`.

    Raises:
        ValueError: for a step size or μ that is not positive and finite.

    Source: Bertrand et al. (2020), Implicit differentiation of Lasso-type models.

    Example:
        >>> import jax.numpy as jnp
        >>> shrink = lambda w, theta, data, step_size: jnp.sign(w) * jnp.maximum(jnp.abs(w) - step_size * theta, 0.0)
        >>> condition = ProximalGradient(lambda w, theta, data: 0.5 * jnp.sum((w - data) ** 2), shrink)
        >>> [float(r) for r in condition.residual(jnp.array([0.0, 2.0]), jnp.float32(1.0), jnp.array([0.5, 3.0]))]
        [0.0, 0.0]
    """

    objective: Objective
    prox: Callable[[PyTree, PyTree, PyTree, float], PyTree]
    step_size: float = 1.0
    positive_definite: bool = False
    strong_convexity: StrongConvexity = None

    symmetric = False
    scaling = _no_scaling

    def __post_init__(self):
        _check_step_size("ProximalGradient", self.step_size)
        _check_strong_convexity("ProximalGradient", self.strong_convexity)

    def mapping(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        """prox(w − η∇objective), whose fixed point is the solution."""

        def prox(w, theta, data):
            return self.prox(w, theta, data, self.step_size)

        return _both_ways(prox, _descend(self, w, theta, data), theta, data)

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        return tree.subtract(w, self.mapping(w, theta, data))


@dataclass(frozen=True)
class KKT:
    """The first-order conditions of min objective subject to equality = 0 and inequality ≤ 0.

    With w = (x, ν, μ) and the Lagrangian L = objective + ⟨ν, equality⟩ + ⟨μ, inequality⟩ the residual is
    (∇_x L, equality, μ·inequality). An inactive inequality has μ = 0 and leaves the derivative unchanged. The
    system is singular where an active one has μ = 0, or where the active gradients depend on each other. The
    residual does not see signs: that μ ≥ 0 and inequality ≤ 0 hold is for the solver to ensure.

    Args:
        objective: ``objective(x, theta, data) -> scalar``.
        equality: ``equality(x, theta, data)``, any pytree, or None; w's second entry is then None.
        inequality: ``inequality(x, theta, data)``, any pytree, or None; w's third entry is then None.

    Raises:
        ValueError: when called, for a w that is not such a triple.

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
    scaling = _no_scaling

    def residual(self, w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        x, equal, unequal = self._parts(w)
        value, pull_back = jax.vjp(lambda x: self._functions(x, theta, data), x)
        objective, equality, inequality = value
        (stationarity,) = pull_back((jnp.ones_like(objective), equal, unequal))
        residual = stationarity, equality, jax.tree.map(jnp.multiply, unequal, inequality)
        return jax.tree.unflatten(jax.tree.structure(w), jax.tree.leaves(residual))  # a named tuple stays one

    def _functions(self, x, theta, data):
        constraints = [None if f is None else f(x, theta, data) for f in (self.equality, self.inequality)]
        return self.objective(x, theta, data), *constraints

    def _parts(self, w):
        given = [constraint is not None for constraint in (self.equality, self.inequality)]
        if not isinstance(w, tuple) or len(w) != 3 or [part is not None for part in w[1:]] != given:
            names = [name if there else "None" for name, there in zip(("ν", "μ"), given, strict=True)]
            raise ValueError(f"this KKT condition needs w = (x, {names[0]}, {names[1]}), got {jax.tree.structure(w)}")
        return w


def jaxopt_projection(
    projection: Callable | str,
    params: Callable[[PyTree, PyTree], PyTree] | None = None,
    tol: float | None = None,
) -> Residual:
    """A projection of `jaxopt.projection` as :class:`Projected` takes it.

    By name those that have no formula (polyhedron, affine set, box section, transport, Birkhoff and their KL
    kin) are exact to rounding and differentiable to any order; where no point satisfies the constraints they give
    NaN. A function is taken as it is.

    Args:
        projection: its name (``"projection_simplex"``), which spares an import of jaxopt; or the function, or a
            ``functools.partial`` of it.
        params: ``params(theta, data)``, what jaxopt calls ``hyperparams`` (a radius, a pair of bounds, …);
            None for the function's own default.
        tol: for a name that has no formula: how far the iteration goes that finds which constraints hold with
            equality; None for √eps of w's dtype. A constraint nearer than this is on one side or the other.

    Returns:
        ``projection(w, theta, data)``.

    Raises:
        ValueError: for a name that `jaxopt.projection` does not have, and for a ``tol`` that nothing takes.

    Example:
        >>> import jax.numpy as jnp
        >>> ball = jaxopt_projection("projection_l2_ball", params=lambda theta, data: theta)
        >>> [round(float(entry), 2) for entry in ball(jnp.array([3.0, 4.0]), jnp.float32(1.0), None)]
        [0.6, 0.8]
    """
    function = _from_jaxopt(projection, "projection")
    if tol is not None:
        if "tol" not in inspect.signature(function).parameters:
            raise ValueError(f"{projection} iterates to no tolerance, got tol={tol}: leave it None")
        function = functools.partial(function, tol=tol)

    def project(w: PyTree, theta: PyTree, data: PyTree) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            return function(w) if params is None else function(w, params(theta, data))

    return project


def jaxopt_prox(
    prox: Callable | str, params: Callable[[PyTree, PyTree], PyTree] | None = None
) -> Callable[[PyTree, PyTree, PyTree, float], PyTree]:
    """A proximal operator of `jaxopt.prox` as :class:`ProximalGradient` takes it.

    Args:
        prox: the function, or its name (``"prox_lasso"``), which spares an import of jaxopt.
        params: ``params(theta, data)``, the strength of the penalty as the function wants it; None for its
            own default.

    Returns:
        ``prox(w, theta, data, step_size)``.

    Raises:
        ValueError: for a name that `jaxopt.prox` does not have.

    Example:
        >>> import jax.numpy as jnp
        >>> shrink = jaxopt_prox("prox_lasso", params=lambda theta, data: theta)
        >>> [float(entry) for entry in shrink(jnp.array([3.0, 0.5]), jnp.float32(2.0), None, 0.5)]
        [2.0, 0.0]
    """
    function = _from_jaxopt(prox, "prox")

    def operate(w: PyTree, theta: PyTree, data: PyTree, step_size: float) -> PyTree:
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            return function(w, None if params is None else params(theta, data), step_size)

    return operate


def _from_jaxopt(function, module):
    if callable(function):
        return function
    from bilevel import _jaxopt, _projections  # jaxopt takes a second to import: only when it is used

    known = getattr(_jaxopt, module)
    if not hasattr(known, function):
        names = [name for name in dir(known) if name.startswith(module) or name.startswith("kl_" + module)]
        raise ValueError(f"jaxopt.{module} has no {function!r}; it has {', '.join(names)}")
    return _projections.BY_NAME.get(function) or getattr(known, function)


def _both_ways(function, *arguments):
    """``function(*arguments)``, differentiable forwards too where a ``jax.custom_vjp`` in it knows the way back alone.

    jaxopt's projections that solve a problem of their own are such functions, and JAX can neither push a tangent
    through one nor transpose its vjp. The tangent is then the Jacobian's, which is pulled back row by row: n vjps,
    and first derivatives only.
    """
    if not _holds_custom_vjp(jax.make_jaxpr(function)(*arguments).jaxpr):
        return function(*arguments)
    function, captured = jax.closure_convert(function, *arguments)  # a custom_jvp may close over no tracer

    @jax.custom_jvp
    def both(*arguments):
        return function(*arguments)

    @both.defjvp
    def push_forward(primals, tangents):
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its rules too
            out, pull_back = jax.vjp(function, *primals)
            flat, unravel = ravel_pytree(out)
            rows = jax.vmap(lambda row: pull_back(unravel(row)))(jnp.eye(flat.size, dtype=flat.dtype))
        moved = [
            jnp.tensordot(row, t.astype(row.dtype), axes=t.ndim).astype(flat.dtype)
            for row, t in zip(jax.tree.leaves(rows), jax.tree.leaves(tangents), strict=True)
            if t.dtype != jax.dtypes.float0  # of an integer
        ]
        return out, unravel(functools.reduce(jnp.add, moved))

    return both(*arguments, *captured)


def _holds_custom_vjp(jaxpr):
    """Whether a jaxpr calls a ``jax.custom_vjp``, at whatever depth."""
    for equation in jaxpr.eqns:
        inner = jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns"))
        if equation.primitive.name.startswith("custom_vjp_call") or any(
            _holds_custom_vjp(value) for value in inner if hasattr(value, "eqns")
        ):
            return True
    return False


def _check_step_size(name, step_size):
    if not 0 < step_size < float("inf"):
        raise ValueError(f"{name} needs a step_size above 0, got {step_size}")


def _descend(condition, w, theta, data):
    slope = jax.grad(condition.objective)(w, theta, data)
    return tree.subtract(w, tree.scale(condition.step_size, slope))


@dataclass(frozen=True)
class Problem:
    """An outer function at the solution of an inner condition: min over θ of outer(w*(θ), θ, data).

    Args:
        condition: what holds at w*.
        outer: ``outer(w, theta, data) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.
        has_aux: whether ``outer`` returns something beside its value.
    """

    condition: Condition
    outer: Callable[[PyTree, PyTree, PyTree], object]
    has_aux: bool = False
