"""Inner solvers: how w*(θ) is found.

A solver is a frozen value, called as ``solver(condition, init, theta, data) -> Solution``. An iterative one
also shows its single step (``start``, ``update``), from which a method that differentiates through the
iterations builds its own loop: the numbers are then those of the solver, step for step.

Any function with the same arguments that returns w, or a Solution, is a solver too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel import tree
from bilevel.conditions import Condition
from bilevel.types import MatVec, PyTree, Solution, Status

if TYPE_CHECKING:
    import optax

InnerSolver = Callable[[Condition, PyTree, PyTree, PyTree], PyTree | Solution]
"""``solver(condition, init, theta, data) -> w``, or a :class:`Solution`; any function of that kind is one."""


@runtime_checkable
class IterativeSolver(Protocol):
    """A solver that can be taken apart into at most ``steps`` updates of a state ``(w, memory)`` by the residual."""

    @property
    def steps(self) -> int: ...

    @property
    def tol(self) -> float | None: ...

    def check(self, condition: Condition) -> None:
        """Raise ValueError for a condition that these updates cannot solve."""
        ...

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]: ...

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]: ...

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution: ...


@dataclass(frozen=True)
class Optax:
    """Descent on the inner objective with any optax transformation.

    Args:
        transformation: an ``optax.GradientTransformation``; it is given F, the inner gradient, and w.
        steps: the budget, in gradients.
        tol: stop at ‖F‖ ≤ tol; None spends the budget, which is then no failure. With a tol the loop's
            length is known only at run time, so its iterations cannot be differentiated backwards.

    Raises:
        ValueError: for a negative budget or tol, and, when called, for a condition that is no gradient and a
            transformation that asks for the objective's value.
    """

    transformation: "optax.GradientTransformation"
    steps: int
    tol: float | None = None

    def __post_init__(self):
        _check_budget("Optax", self.steps, self.tol)

    def check(self, condition: Condition) -> None:
        _check_descends("Optax", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, self.transformation.init(init)

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        import optax  # optax takes a while to import: only when it is used

        w, memory = state
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
            updates, memory = self._transformed(residual, memory, w)
        return optax.apply_updates(w, updates), memory

    def _transformed(self, residual, memory, w):
        try:
            return self.transformation.update(residual, memory, w)
        except TypeError as error:
            if "required keyword-only argument" not in str(error):
                raise
            raise ValueError(
                f"Optax gives a transformation the gradient and w, and this one asks for more ({error}): use one that "
                'does not, such as optax.adam, or HessianFree or Jaxopt("LBFGS") for a line search'
            ) from error

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


@dataclass(frozen=True)
class GradientDescent:
    """w ← w − step_size · F(w, θ, data), from ``init``.

    Args:
        step_size: the rate; it converges below 2 / (largest eigenvalue of ∂F/∂w).
        steps: the budget, in gradients.
        tol: stop at ‖F‖ ≤ tol; None spends the budget, which is then no failure.
        momentum: Polyak's heavy ball: m ← momentum·m + F, w ← w − step_size·m.

    Raises:
        ValueError: for a step size that is not positive and finite, a momentum outside [0, 1), a negative budget or
            tol, and, when called, for a condition that is no gradient.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> solution = GradientDescent(0.5, steps=2)(condition, jnp.float32(0.0), jnp.float32(1.0), None)
        >>> float(solution.w), float(solution.residual_norm)
        (0.75, 0.25)
    """

    step_size: float
    steps: int
    tol: float | None = None
    momentum: float = 0.0

    def __post_init__(self):
        _check_budget("GradientDescent", self.steps, self.tol)
        if not 0 < self.step_size < float("inf") or not 0 <= self.momentum < 1:
            raise ValueError(
                "GradientDescent needs a finite step_size above 0 and a momentum in [0, 1), "
                f"got {self.step_size} and {self.momentum}"
            )

    def check(self, condition: Condition) -> None:
        _check_descends("GradientDescent", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, jax.tree.map(jnp.zeros_like, init) if self.momentum else None

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        w, memory = state
        if self.momentum:
            residual = memory = tree.add(tree.scale(self.momentum, memory), residual)
        return tree.subtract(w, tree.scale(self.step_size, residual)), memory

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


@dataclass(frozen=True)
class FixedPointIteration:
    """w ← mapping(w, θ, data), from ``init``: for a mapping that contracts.

    Args:
        maxiter: the budget, in evaluations of the mapping.
        tol: stop at ‖w − mapping(w)‖ ≤ tol; None spends the budget, which is then no failure.

    Raises:
        ValueError: for a negative budget or tol, and, when called, for a condition that has no mapping.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import FixedPoint
        >>> halve = FixedPoint(lambda w, theta, data: 0.5 * w + theta)
        >>> float(FixedPointIteration(3)(halve, jnp.float32(0.0), jnp.float32(1.0), None).w)  # 1 + ½ + ¼
        1.75
    """

    maxiter: int
    tol: float | None = None

    def __post_init__(self):
        _check_budget("FixedPointIteration", self.maxiter, self.tol)

    @property
    def steps(self) -> int:
        return self.maxiter

    def check(self, condition: Condition) -> None:
        _check_maps("FixedPointIteration", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        return init, None

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        # w − (w − mapping): rounding is monotone, so that what maps above zero stays above zero.
        return tree.subtract(state[0], residual), None

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


@dataclass(frozen=True)
class Anderson:
    """Fixed-point iteration with Anderson's acceleration: the mix of past steps with the least residual.

    It converges where the plain iteration circles, and on an affine mapping it is GMRES in disguise.

    Args:
        maxiter: the budget, in evaluations of the mapping.
        tol: stop at ‖w − mapping(w)‖ ≤ tol; None spends the budget, which is then no failure.
        history: past differences that are mixed, at most as many as w has entries; each costs two vectors like w.

    Raises:
        ValueError: for a negative budget or tol, a history below one, and, when called, for a condition that
            has no mapping.

    Source: Walker and Ni (2011), Anderson acceleration for fixed-point iterations, algorithm AA.

    Example:
        A quarter turn about (0.5, 0.5), which the plain iteration would circle for ever:

        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import FixedPoint
        >>> turn = FixedPoint(lambda w, theta, data: jnp.array([-w[1], w[0]]) + theta)
        >>> solution = Anderson(10, tol=1e-4)(turn, jnp.zeros(2), jnp.array([1.0, 0.0]), None)
        >>> [round(float(entry), 3) for entry in solution.w], int(solution.status)
        ([0.5, 0.5], 0)
    """

    maxiter: int
    tol: float | None = None
    history: int = 5

    def __post_init__(self):
        _check_budget("Anderson", self.maxiter, self.tol)
        if self.history < 1:
            raise ValueError(f"Anderson needs a history of at least 1, got {self.history}")

    @property
    def steps(self) -> int:
        return self.maxiter

    def check(self, condition: Condition) -> None:
        _check_maps("Anderson", condition)

    def start(self, init: PyTree) -> tuple[PyTree, PyTree]:
        flat = ravel_pytree(tree.widened(init))[0]
        # More differences than unknowns depend on each other, and their mix is undetermined.
        differences = jnp.zeros((max(1, min(self.history, flat.size)), flat.size), flat.dtype)
        return init, (flat, jnp.zeros_like(flat), differences, differences, jnp.int32(0))

    def update(self, state: tuple[PyTree, PyTree], residual: PyTree) -> tuple[PyTree, PyTree]:
        w, (last_w, last_residual, steps_w, steps_residual, count) = state
        flat, unravel = ravel_pytree(tree.widened(w))
        slope = ravel_pytree(tree.widened(residual))[0]
        known = count > 0  # the first residual has no predecessor to differ from
        slot = (count - 1) % steps_w.shape[0]
        steps_w = steps_w.at[slot].set(jnp.where(known, flat - last_w, steps_w[slot]))
        steps_residual = steps_residual.at[slot].set(jnp.where(known, slope - last_residual, steps_residual[slot]))
        mix = _least_squares(steps_residual, slope)
        step = slope + mix @ (steps_w - steps_residual)
        return tree.like(unravel(flat - step), w), (flat, slope, steps_w, steps_residual, count + 1)

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        return iterate(self, condition, init, theta, data)


def _least_squares(rows, target):
    """argmin_c ‖target − c·rows‖, by normal equations in rows of unit length with a ridge of rounding size."""
    lengths = jnp.sum(rows**2, axis=1)
    scale = jnp.where(lengths > 0, jax.lax.rsqrt(jnp.where(lengths > 0, lengths, jnp.ones_like(lengths))), 0)
    unit = rows * scale[:, None].astype(rows.dtype)
    ridge = 10 * jnp.finfo(rows.dtype).eps * jnp.eye(rows.shape[0], dtype=rows.dtype)
    return jnp.linalg.solve(unit @ unit.T + ridge, unit @ target) * scale.astype(rows.dtype)


@dataclass(frozen=True)
class HessianFree:
    """Newton's method with directions from a few CG steps, and a backtracking line search.

    CG on H d = −F stops at a direction of negative curvature and keeps what it has, the gradient at first, so
    that d always descends. The step is halved until the objective falls by 10⁻⁴ of what the slope promises.

    Args:
        steps: the budget, in Newton steps: each a gradient, ``cg_steps`` products and the line search's values.
        cg_steps: products for a direction.
        tol: stop at ‖F‖ ≤ tol; None spends the budget, which is then no failure.
        halvings: how often a step is halved before it is given up.

    Raises:
        ValueError: for a budget, number of CG steps or tol that makes no sense, and, when called, for a
            condition that is no gradient.

    Source: Martens (2010); Nocedal and Wright (2006), algorithm 7.1.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2)
        >>> float(HessianFree(steps=1)(condition, jnp.float32(0.0), jnp.float32(3.0), None).w)
        3.0
    """

    steps: int
    cg_steps: int = 5
    tol: float | None = None
    halvings: int = 20

    def __post_init__(self):
        _check_budget("HessianFree", self.steps, self.tol)
        if self.cg_steps < 1 or self.halvings < 0:
            raise ValueError(
                "HessianFree needs cg_steps of at least 1 and halvings of at least 0, "
                f"got {self.cg_steps} and {self.halvings}"
            )

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        _check_descends("HessianFree", condition)

        def residual(w):
            return condition.residual(w, theta, data)

        def potential(w):
            return condition.potential(w, theta, data)  # type: ignore[attr-defined]  # as checked above

        def unfinished(carry):
            _, slope, steps = carry
            return (steps < self.steps) & (tree.norm(slope) > (0.0 if self.tol is None else self.tol))

        def advance(carry):
            w, slope, steps = carry
            direction = truncated_newton(jax.linearize(residual, w)[1], slope, self.cg_steps)
            w = _line_search(potential, w, slope, direction, self.halvings)
            return w, residual(w), steps + 1

        w, slope, steps = jax.lax.while_loop(unfinished, advance, (init, residual(init), jnp.int32(0)))
        return report(slope, w, steps, self.tol)


def truncated_newton(matvec: MatVec, slope: PyTree, steps: int) -> PyTree:
    """A descent direction d ≈ −H⁻¹ slope by CG, cut off where the curvature turns out not to be positive."""
    eps = float(jnp.finfo(tree.norm(slope).dtype).eps)
    start = jax.tree.map(jnp.zeros_like, slope)
    size = tree.norm(slope)
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))
    minus = tree.scale(-1 / unit, slope)  # so that no square overflows or vanishes
    first = tree.vdot(minus, minus)

    def unfinished(carry):
        _, _, _, squared, step, positive = carry
        return (step < steps) & positive & (squared > eps**2 * first)

    def advance(carry):
        x, r, p, squared, step, _ = carry
        product = matvec(p)
        curvature = tree.vdot(p, product)
        positive = curvature > 0
        length = jnp.where(positive, squared / jnp.where(positive, curvature, jnp.ones_like(curvature)), 0)
        fallback = jnp.where((step == 0) & ~positive, jnp.ones_like(length), length)  # steepest descent
        x = tree.add(x, tree.scale(fallback, p))
        r = tree.subtract(r, tree.scale(length, product))
        now = tree.vdot(r, r)
        return x, r, tree.add(r, tree.scale(now / squared, p)), now, step + 1, positive

    carry = tree.varying_alike(start, minus, minus, first, jnp.int32(0), jnp.bool_(True))
    return tree.scale(unit, jax.lax.while_loop(unfinished, advance, carry)[0])


def _line_search(potential, w, slope, direction, halvings):
    """The first of w + d, w + d/2, … that falls by 10⁻⁴ of what the slope promises; w itself where none does."""
    here, promise = potential(w), tree.vdot(slope, direction)
    # At the minimum values agree to rounding: a rise of that size is none.
    slack = 4 * jnp.finfo(here.dtype).eps * jnp.abs(here)

    def moved(size):
        return tree.add(w, tree.scale(size, direction))

    def too_far(carry):
        size, tries = carry
        return (tries < halvings) & ~(potential(moved(size)) <= here + 1e-4 * size * promise + slack)

    _, *start = tree.varying_alike(w, jnp.ones((), promise.dtype), jnp.int32(0))
    size, tries = jax.lax.while_loop(too_far, lambda carry: (0.5 * carry[0], carry[1] + 1), tuple(start))
    found = (tries < halvings) | (potential(moved(size)) <= here)
    return jax.tree.map(lambda new, old: jnp.where(found, new, old), moved(size), w)


@dataclass(frozen=True, init=False)
class Jaxopt:
    """Any solver of jaxopt, on the condition it fits.

    ===================================================  ================================================
    condition                                            jaxopt solvers
    ===================================================  ================================================
    Stationary, Proximal                                 GradientDescent, LBFGS, BFGS, NonlinearCG, ArmijoSGD,
                                                         PolyakSGD, OptaxSolver, ScipyMinimize
    Root                                                 Broyden, LevenbergMarquardt, GaussNewton, Bisection,
                                                         ScipyRootFinding, ScipyLeastSquares
    FixedPoint                                           FixedPointIteration, AndersonAcceleration
    Projected                                            ProjectedGradient, MirrorDescent; onto a box LBFGSB,
                                                         ScipyBoundedMinimize and, for a quadratic, BoxCDQP
    ProximalGradient                                     ProximalGradient; BlockCoordinateDescent for a
                                                         composite linear objective and one prox for all entries
    KKT with a quadratic objective, affine constraints   OSQP, BoxOSQP, EqualityConstrainedQP
    ===================================================  ================================================

    A box's bounds are read off its projection. MirrorDescent steps as its option ``projection_grad(w, slope, step,
    (theta, data))`` says. SciPy's run outside of a trace only: solve with them first, and differentiate there.

    jaxopt's own ``tol`` stops it; the status judges the condition's true residual by the same number.

    Args:
        solver: the class, or its name (``"LBFGS"``), which spares an import of jaxopt.
        options: what its constructor takes beside the function: ``maxiter``, ``tol``, ``stepsize``, …

    Raises:
        ValueError: for a name that jaxopt does not have, and, when called, for a solver that does not fit
            the condition, with those that do.

    Example:
        >>> import jax.numpy as jnp
        >>> from bilevel.conditions import Stationary
        >>> condition = Stationary(lambda w, theta, data: jnp.sum((w - theta) ** 2))
        >>> solution = Jaxopt("LBFGS", maxiter=20, tol=1e-4)(condition, jnp.zeros(2), jnp.ones(2), None)
        >>> [round(float(entry), 3) for entry in solution.w]
        [1.0, 1.0]
    """

    solver: Callable | str
    options: tuple[tuple[str, object], ...]

    def __init__(self, solver: Callable | str, **options: object):
        object.__setattr__(self, "solver", solver)
        object.__setattr__(self, "options", tuple(options.items()))

    def __call__(self, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
        from bilevel import _jaxopt_solvers  # jaxopt takes a second to import: only when it is used

        init = tree.arrays(init)
        with jax.numpy_dtype_promotion("standard"):  # jaxopt mixes dtypes in its arithmetic
            w, steps, tol = _jaxopt_solvers.run_solver(self.solver, dict(self.options), condition, init, theta, data)
            w = jax.tree.map(lambda leaf, start: leaf.astype(start.dtype), w, init)
        return report(condition.residual(w, theta, data), w, steps, tol)


def iterate(solver: IterativeSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
    """All steps of an iterative solver: a loop of fixed length without ``tol``, until ‖F‖ ≤ tol with it."""
    solver.check(condition)

    def residual(w):
        return condition.residual(w, theta, data)

    if solver.tol is None:
        state = jax.lax.fori_loop(0, solver.steps, lambda _, s: solver.update(s, residual(s[0])), solver.start(init))
        return report(residual(state[0]), state[0], steps=solver.steps)
    return _until_converged(solver, residual, init)


def _until_converged(solver, residual, init):
    def unfinished(carry):
        _, slope, steps = carry
        return (steps < solver.steps) & (tree.norm(slope) > solver.tol)

    def advance(carry):
        state, slope, steps = carry
        state = solver.update(state, slope)
        return state, residual(state[0]), steps + 1

    (w, _), slope, steps = jax.lax.while_loop(unfinished, advance, (solver.start(init), residual(init), jnp.int32(0)))
    return report(slope, w, steps, solver.tol)


def report(residual: PyTree, w: PyTree, steps: int | jax.Array, tol: float | None = None) -> Solution:
    """A Solution from the true residual F(w, θ), and the status that follows from it."""
    residual_norm = tree.norm(jax.lax.stop_gradient(residual))
    if tol is None:
        status = jnp.int32(Status.BUDGET_USED)
    else:
        status = jnp.where(residual_norm <= tol, jnp.int32(Status.CONVERGED), jnp.int32(Status.MAX_STEPS))
    status = jnp.where(jnp.isfinite(residual_norm), status, jnp.int32(Status.NONFINITE))
    return Solution(w, residual_norm, jnp.asarray(steps, jnp.int32), status)


def with_residual(solution: Solution, solver: InnerSolver, residual: PyTree) -> Solution:
    """The same report by a residual that is known anyway, so that the compiler leaves out the solver's own."""
    if isinstance(solver, IterativeSolver) and solver.tol is None:
        return report(residual, solution.w, solution.steps)
    return solution


def solve(solver: InnerSolver, condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> Solution:
    """Run any solver; what returns a bare w is given its residual here."""
    found = solver(condition, init, theta, data)
    if isinstance(found, Solution):
        return replace(found, w=_like_start(found.w, init))
    w = _like_start(found, init)
    return report(condition.residual(w, theta, data), w, steps=0)


def _like_start(w, init):
    """w in the dtypes of the start; ValueError where it is another tree or has other shapes."""
    got, expected = (jax.tree.map(jnp.shape, variables) for variables in (w, init))
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(variables)] for variables in (w, init)]
    if jax.tree.structure(w) != jax.tree.structure(init) or shapes[0] != shapes[1]:
        raise ValueError(
            f"an inner solver returns w, a pytree like init of shapes {expected}, or a bl.Solution that holds one; "
            f"got shapes {got}: return w alone, and give init the shapes of the solution"
        )
    return tree.like(tree.arrays(w), tree.arrays(init))


def _check_budget(name, steps, tol):
    if steps < 0 or (tol is not None and not tol >= 0):
        raise ValueError(f"{name} needs steps and tol of at least 0, got {steps} and {tol}")


def _check_descends(name, condition):
    if hasattr(condition, "potential"):
        return
    if hasattr(condition, "mapping"):
        remedy = "FixedPointIteration, Anderson, a fitting Jaxopt solver,"
    else:
        remedy = "a fitting Jaxopt solver"
    raise ValueError(
        f"{name} follows the gradient of an objective, and {type(condition).__name__} is not one: use a "
        f"condition that is (Stationary, Proximal), or {remedy} or a function (condition, init, theta, data) -> w"
    )


def _check_maps(name, condition):
    if not hasattr(condition, "mapping"):
        raise ValueError(
            f"{name} repeats a mapping, and {type(condition).__name__} has none: use a condition that has one "
            "(FixedPoint, Projected, ProximalGradient), or GradientDescent, Optax or HessianFree for Stationary "
            "and Proximal, or a function (condition, init, theta, data) -> w"
        )
