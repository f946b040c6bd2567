"""Reference derivatives, in float64, that share no gradient code with the methods they check.

Three oracles, three questions. With G(θ) = outer(w*(θ), θ), w* the solution near the one that the solver finds:

- :func:`finite_differences`: what is dG/dθ? w* is followed by Newton's method while θ moves, and G is
  differenced. Where Newton's method cannot follow (a singular or a large system) the solver itself is run again
  at every θ, and the question is that of ``unrolled``, asked by differences.
- :func:`dense`: what does the implicit function theorem say at this w? A = ∂F/∂w and B = ∂F/∂θ are written out,
  and numpy solves. At w* the answer is dG/dθ; at another w it is what an exact method should return from there.
- :func:`unrolled`: how does what the solver computed depend on θ? Tangents are carried through its iterations.
  Where those have converged the answer is dG/dθ.

Each :class:`Reference` says which question it answers, and how far its own numbers may be off. These functions run
on the host, on concrete values; they cast everything inexact to float64 and leave integers and keys alone.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.conditions import Condition
from bilevel.problem import Problem
from bilevel.types import PyTree, Solution

COORDINATES = 64
"""Up to so many entries of θ each has a derivative of its own; beyond, random directions stand for them."""
DIRECTIONS = 8
"""Random directions, where none are given."""
DENSE = 1000
"""Unknowns up to which A is written out: 8 MB, and 1000 tangents at once."""
POLISHED = 400
"""Unknowns up to which Newton's method follows the solution: a dense solve for every step at every θ."""
EPS = float(np.finfo(np.float64).eps)

Question = Literal["the solution", "the formula at this w", "the solver's output"]
"""Of what a reference is the derivative."""


class OracleError(ValueError):
    """An oracle that cannot answer here, and why."""


@dataclass(frozen=True)
class Reference:
    """Derivatives in θ along some directions, each with its own uncertainty.

    Attributes:
        name: of the oracle.
        question: of what they are the derivatives.
        directions: unit vectors in the flattened inexact leaves of θ, ``[m, entries of θ]``.
        labels: what each direction is called: ``theta['a'][0]``, or ``direction 3``.
        derivatives: along each, ``[m]``.
        uncertainty: how far each may be off, ``[m]``; infinite where nothing is known.
        gradient: a tree like θ, zero at integer leaves; None where the directions are no coordinates.
        w: the inner solution it was taken at, a tree in float64.
        residual_norm: ‖F(w, θ)‖₂ there.
        condition_number: of A, for ``dense``; else None.
    """

    name: str
    question: Question
    directions: np.ndarray
    labels: tuple[str, ...]
    derivatives: np.ndarray
    uncertainty: np.ndarray
    gradient: PyTree | None
    w: PyTree
    residual_norm: float
    condition_number: float | None = None


class Flat(NamedTuple):
    """The inexact leaves of a tree as one vector, and the way back."""

    vector: jax.Array
    rebuild: Callable[[jax.Array], PyTree]
    names: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each inexact leaf."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What each entry is called."""
        places = ((leaf, index) for leaf, shape in self.names for index in np.ndindex(shape))
        return tuple(f"{leaf}{list(index) if index else ''}" for leaf, index in places)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The name of the leaf that each entry belongs to."""
        return tuple(leaf for leaf, shape in self.names for _ in range(math.prod(shape)))


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Computes in float64; float32 constants that a user's function has captured are promoted, not refused."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def as_double(tree: PyTree) -> PyTree:
    """Inexact leaves in float64; integers, booleans and keys as they are. Within :func:`double_precision`.

    Raises:
        TypeError: for a complex leaf.
    """

    def cast(path, leaf):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(
                f"the leaf {jax.tree_util.keystr(path) or 'itself'} is complex: hypergradients are of real variables, "
                "so split it into its real and imaginary parts"
            )
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


def flatten(tree: PyTree, name: str = "") -> Flat:
    """The inexact leaves of ``tree`` as one vector; ``rebuild`` puts the others back as they are."""
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    moving = [number for number, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    ends = np.cumsum([leaves[number].size for number in moving])[:-1]
    names = tuple((f"{name}{jax.tree_util.keystr(path)}", leaf.shape) for path, leaf in (paths[i] for i in moving))

    def rebuild(vector):
        parts = dict(zip(moving, jnp.split(vector, ends) if moving else [], strict=True))
        new = [parts[i].reshape(leaf.shape) if i in parts else leaf for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, new)

    vector = jnp.concatenate([leaves[number].ravel() for number in moving]) if moving else jnp.zeros(0)
    return Flat(vector, rebuild, names)


def vector_of(tree: PyTree) -> np.ndarray:
    """The inexact leaves of ``tree`` as one numpy vector in float64."""
    with double_precision():
        return np.asarray(flatten(as_double(tree)).vector)


def derivatives_of(gradient: PyTree, theta: PyTree) -> np.ndarray:
    """The entries of ``gradient``, a tree like θ, where θ is inexact: those of integer leaves are no numbers."""
    moves = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) for leaf in jax.tree.leaves(theta)]
    return vector_of([leaf for leaf, moving in zip(jax.tree.leaves(gradient), moves, strict=True) if moving])


def eps_of(tree: PyTree) -> float:
    """Of the narrowest float in ``tree``; of float64 where it has none."""
    floats = [jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(tree)]
    return max((float(jnp.finfo(d).eps) for d in floats if jnp.issubdtype(d, jnp.inexact)), default=EPS)


def solve(condition: Condition, solver: Callable, theta: PyTree, init: PyTree | Callable, data: PyTree) -> PyTree:
    """w as the solver returns it, whether bare or in a Solution, started at ``init`` or ``init(theta, data)``."""
    start = init(theta, data) if callable(init) else init
    found = solver(condition, start, theta, data)
    return as_double(found.w if isinstance(found, Solution) else found)


def finite_differences(
    problem: Problem,
    solver: Callable,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    directions: np.ndarray | None = None,
    step: float | None = None,
    polish: bool | None = None,
) -> Reference:
    """Central differences of θ ↦ outer(w*(θ), θ), extrapolated.

    With D(h) = (G(θ + hd) − G(θ − hd)) / 2h the extrapolation (4D(h/2) − D(h)) / 3 is off by O(h⁴). It is taken
    at five h, each half a decade below the last; the uncertainty is the smallest difference of two that stand next
    to each other, and the rounding of G over h. Where left and right slopes keep apart as h
    shrinks, there is a kink: half the jump is then part of the uncertainty.

    Args:
        problem: the condition and the outer function.
        solver: any inner solver that can be traced.
        theta: where.
        init: the solver's start, or ``init(theta, data)``.
        data: of the problem.
        directions: unit vectors ``[m, entries of θ]``; None for each coordinate of a small θ, and for random ones
            of a large θ.
        step: the largest h; None for a tenth of ‖θ‖ over the entries that move (of one, where θ is zero).
        polish: follow the solution w* by Newton's method, whatever the solver left undone; False differences what
            the solver returns; None to do the former wherever it can be done.

    Raises:
        OracleError: with ``polish=True``, where Newton's method does not solve the condition.

    Source: Richardson (1911); the choice among step sizes: Ridders (1982).

    Example:
        >>> from bilevel import GradientDescent, Problem, Stationary
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta**2) ** 2), lambda w, theta, data: w)
        >>> found = finite_differences(problem, GradientDescent(0.5, 1), 3.0, 0.0, None)
        >>> round(float(found.gradient), 8), found.question
        (6.0, 'the solution')
    """
    with double_precision():
        theta, data, start = as_double(theta), as_double(data), _start(init)
        point = flatten(theta, "theta")
        directions, labels = choose_directions(directions, point)
        w = jax.jit(lambda theta, data: solve(problem.condition, solver, theta, start, data))(theta, data)
        solution = _polished(problem.condition, w, theta, data) if polish in (None, True) else None
        if polish and solution is None:
            raise OracleError("Newton's method does not solve the condition near the solver's output")
        base = w if solution is None else solution
        place = flatten(base)

        def value(vector):
            theta = point.rebuild(vector)
            if solution is None:
                found, last = solve(problem.condition, solver, theta, start, data), 0.0
                return _outer(problem)(found, theta, data), last
            flat, change = _newton(problem.condition, place, theta, data)
            here, before = (_outer(problem)(place.rebuild(v), theta, data) for v in (flat, flat - change))
            return here, jnp.abs(here - before)

        reach = [_reach(step, np.asarray(point.vector), d) for d in directions]
        derivatives, uncertainty = _differences(value, point.vector, directions, np.array(reach))
        question: Question = "the solver's output" if solution is None else "the solution"
        return _reference(
            "finite_differences", question, theta, data, problem, base, directions, labels, derivatives, uncertainty
        )


def unrolled(
    problem: Problem,
    solver: Callable,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    directions: np.ndarray | None = None,
) -> Reference:
    """Tangents carried through the solver's own iterations: dw/dθ of what it returned.

    Forward mode, so that loops whose length is known only at run time can be followed. The uncertainty is that of
    rounding in the iterations: 100·eps of the terms that are added.

    Args:
        problem, solver, theta, init, data, directions: as for :func:`finite_differences`. Where ``init`` is a
            function of θ, its derivative counts.

    Raises:
        OracleError: for a solver that JAX cannot differentiate forwards.

    Example:
        >>> from bilevel import GradientDescent, Problem, Stationary
        >>> problem = Problem(Stationary(lambda w, theta, data: 0.5 * (w - theta) ** 2), lambda w, theta, data: w)
        >>> float(unrolled(problem, GradientDescent(0.5, max_steps=2), 1.0, 0.0, None).gradient)  # 1 − ½²
        0.75
    """
    with double_precision():
        theta, data, start = as_double(theta), as_double(data), _start(init)
        point = flatten(theta, "theta")
        directions, labels = choose_directions(directions, point)

        def run(vector):
            theta = point.rebuild(vector)
            w = solve(problem.condition, solver, theta, start, data)
            return flatten(w).vector, (w, theta)

        def along(direction):
            (flat, (w, _)), (moved, _) = jax.jvp(run, (point.vector,), (direction,))
            place = flatten(w)

            def outer(flat, vector):
                return _outer(problem)(place.rebuild(flat), point.rebuild(vector), data)

            still = jnp.zeros_like(direction), jnp.zeros_like(moved)
            through_w = jax.jvp(outer, (flat, point.vector), (moved, still[0]))[1]
            direct = jax.jvp(outer, (flat, point.vector), (still[1], direction))[1]
            return through_w + direct, jnp.abs(through_w) + jnp.abs(direct), w

        try:
            derivatives, size, ws = jax.jit(lambda ds: jax.lax.map(along, ds))(jnp.asarray(directions))
        except TypeError as error:  # a solver with a backward rule of its own
            raise OracleError(f"JAX cannot differentiate this solver forwards: {error}") from error
        w = jax.tree.map(lambda leaf: leaf[0], ws)
        derivatives, uncertainty = np.asarray(derivatives), 100 * EPS * np.asarray(size)
        return _reference(
            "unrolled", "the solver's output", theta, data, problem, w, directions, labels, derivatives, uncertainty
        )


def dense(
    problem: Problem,
    solver: Callable | None,
    theta: PyTree,
    init: PyTree | Callable,
    data: PyTree,
    directions: np.ndarray | None = None,
    w: PyTree | None = None,
) -> Reference:
    """The implicit function theorem, h·d − g·A⁻¹(Bd), with A written out and solved by numpy.

    A and Bd are made of tangents (``jax.jacfwd``), column by column. The uncertainty is that of the solve:
    100·eps·κ(A) of the terms that are added, and infinite where A is singular.

    Args:
        problem, solver, theta, init, data, directions: as for :func:`finite_differences`.
        w: where the theorem is applied, a tree like ``init``; None for the solution near the solver's output, by
            Newton's method. Given, ``solver`` and ``init`` are not looked at.

    Raises:
        OracleError: for more than :data:`DENSE` unknowns.

    Example:
        At w = 2, which is not the solution, the theorem has an answer too:

        >>> from bilevel import Problem, Root
        >>> problem = Problem(Root(lambda w, theta, data: w**3 - theta), lambda w, theta, data: w)
        >>> round(float(dense(problem, None, 1.0, None, None, w=2.0).gradient), 6)  # 1 / 3w²
        0.083333
    """
    with double_precision():
        theta, data = as_double(theta), as_double(data)
        point = flatten(theta, "theta")
        directions, labels = choose_directions(directions, point)
        question: Question = "the formula at this w"
        if w is None:
            if solver is None:
                raise ValueError("dense needs a solver, or the w at which the theorem is applied")
            start = _start(init)
            w = jax.jit(lambda theta, data: solve(problem.condition, solver, theta, start, data))(theta, data)
            solution = _polished(problem.condition, w, theta, data)
            if solution is not None:
                w, question = solution, "the solution"
        w = as_double(w)
        parts = linearise(problem, w, theta, data, directions)
        v, kappa = adjoint(parts.a, parts.g)
        slack = 100 * EPS * kappa * parts.size(v) if kappa < math.inf else np.full(len(directions), math.inf)
        return _reference("dense", question, theta, data, problem, w, directions, labels, parts.total(v), slack, kappa)


class Linearised(NamedTuple):
    """The derivatives that the implicit function theorem is made of, at one point, as numpy arrays.

    Attributes:
        a: ∂F/∂w, ``[n, n]``.
        b: ∂F/∂θ along the directions, ``[n, m]``.
        g: ∂outer/∂w, ``[n]``.
        h: ∂outer/∂θ along the directions, ``[m]``.
    """

    a: np.ndarray
    b: np.ndarray
    g: np.ndarray
    h: np.ndarray

    def total(self, adjoint: np.ndarray) -> np.ndarray:
        """h − Bᵀ·adjoint along the directions, ``[m]``."""
        return self.h - adjoint @ self.b

    def size(self, adjoint: np.ndarray) -> np.ndarray:
        """The size of the terms that :meth:`total` adds, ``[m]``."""
        return np.abs(self.h) + np.linalg.norm(adjoint) * np.linalg.norm(self.b, axis=0)


def linearise(problem: Problem, w: PyTree, theta: PyTree, data: PyTree, directions: np.ndarray) -> Linearised:
    """A, Bd, g and h·d at ``w``, column by column from tangents, in float64.

    Raises:
        OracleError: for more than :data:`DENSE` unknowns.
    """
    with double_precision():
        w, theta, data = as_double(w), as_double(theta), as_double(data)
        place, point = flatten(w), flatten(theta)
        if place.vector.size > DENSE:
            raise OracleError(f"A is {place.vector.size} × {place.vector.size}: it is written out up to {DENSE}")
        parts = _parts(problem, place, point, data, jnp.asarray(directions))
        return Linearised(*(np.asarray(part) for part in parts))


def adjoint(a: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, float]:
    """A⁻ᵀg and the condition number of A, infinite where A is singular; the least solution stands in there."""
    if not a.size:
        return g, 1.0
    if not (np.isfinite(a).all() and np.isfinite(g).all()):
        return np.full_like(g, math.nan), math.inf
    kappa = float(np.linalg.cond(a))
    if kappa * EPS < 1:
        return np.linalg.solve(a.T, g), kappa
    return np.linalg.lstsq(a.T, g)[0], math.inf


def random_directions(entries: int, count: int, seed: int = 0) -> np.ndarray:
    """``[count, entries]`` orthonormal rows (as many as there are entries, at most)."""
    normal = np.random.default_rng(seed).normal(size=(entries, min(count, entries)))
    return np.linalg.qr(normal)[0].T


ORACLES: dict[str, Callable[..., Reference]] = {
    "finite_differences": finite_differences,
    "unrolled": unrolled,
    "dense": dense,
}


def chosen(against: str | Sequence[str]) -> dict[str, Callable[..., Reference]]:
    """The oracles of one or several names.

    Raises:
        ValueError: for an oracle that does not exist, or none.
    """
    names = (against,) if isinstance(against, str) else tuple(against)
    if not names or not set(names) <= set(ORACLES):
        raise ValueError(f"against takes {', '.join(ORACLES)}, got {against!r}")
    return {name: ORACLES[name] for name in names}


# --- What the oracles share ----------------------------------------------------------------------------------------


def _start(init):
    """``init`` in float64; a function is called with what is float64 already, and its result cast."""
    if callable(init):
        return lambda theta, data: as_double(init(theta, data))
    return as_double(init)


def _outer(problem) -> Callable[..., Any]:
    if not problem.has_aux:
        return problem.outer
    return lambda w, theta, data: problem.outer(w, theta, data)[0]


def _flat_residual(condition, place, theta, data):
    return lambda vector: flatten(condition.residual(place.rebuild(vector), theta, data)).vector


def choose_directions(directions, point):
    """Directions as an array, and what they are called; None stands for coordinates, or random ones of a large θ."""
    entries = point.vector.size
    if directions is None and entries <= COORDINATES:
        directions = np.eye(entries)
    directions = random_directions(entries, DIRECTIONS) if directions is None else np.asarray(directions, np.float64)
    if directions.ndim != 2 or directions.shape[1] != entries:
        raise ValueError(f"directions need the shape [m, {entries}], one entry for each of θ, got {directions.shape}")
    if _are_coordinates(directions):
        return directions, point.labels
    return directions, tuple(f"direction {number}" for number in range(len(directions)))


def _are_coordinates(directions):
    return len(directions) == directions.shape[1] and np.array_equal(directions, np.eye(len(directions)))


def _reference(name, question, theta, data, problem, w, directions, labels, derivatives, uncertainty, kappa=None):
    residual = jax.jit(lambda w, t, d: flatten(problem.condition.residual(w, t, d)).vector)(w, theta, data)
    gradient = None
    if _are_coordinates(directions):
        zeros = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0 * leaf, theta)
        gradient = jax.tree.map(np.asarray, flatten(zeros).rebuild(jnp.asarray(derivatives)))
    return Reference(
        name,
        question,
        directions,
        labels,
        np.asarray(derivatives),
        np.asarray(uncertainty),
        gradient,
        jax.tree.map(np.asarray, w),
        float(np.linalg.norm(residual)),
        kappa,
    )


def _polished(condition, w, theta, data):
    """The solution of F = 0 near ``w`` to rounding, or None where Newton's method finds none."""
    place = flatten(w)
    if place.vector.size > POLISHED:
        return None
    flat, _ = jax.jit(lambda theta, data: _newton(condition, place, theta, data))(theta, data)
    return place.rebuild(flat) if bool(jnp.isfinite(flat).all()) else None


def _newton(condition, place, theta, data, steps=25):
    """Newton's method from ``place``, and the size of one step more at the end; NaN where it does not converge.

    It has converged where a step is of rounding size: √eps of w is enough to stop at, since the next step, which
    is always taken, squares it.
    """
    residual = _flat_residual(condition, place, theta, data)

    def step(flat):
        return -jnp.linalg.solve(jax.jacfwd(residual)(flat), residual(flat))

    def unfinished(carry):
        flat, change, count = carry
        return (count < steps) & (jnp.linalg.norm(change) > EPS**0.5 * (1 + jnp.linalg.norm(flat)))

    def advance(carry):
        flat, change, count = carry
        return flat + change, step(flat + change), count + 1

    flat, change, count = jax.lax.while_loop(unfinished, advance, (place.vector, step(place.vector), 0))
    flat = flat + change
    change = step(flat)
    return jnp.where(count < steps, flat + change, jnp.nan), change


def _reach(step, theta, direction):
    """The largest h: a tenth of ‖θ‖ over the entries that move, so that a small entry is moved a little."""
    if step is not None:
        return step
    size = float(np.linalg.norm(theta[direction != 0]))
    return 0.1 * size if size > 0 else 0.1


SHRINK = 10**0.5
"""From one step size to the next."""
PAIRS = 5
"""Step sizes at which differences are extrapolated."""


def _differences(value, point, directions, reach):
    """Extrapolated central differences along ``directions`` from steps of ``reach`` downwards; uncertainty."""
    sizes = np.outer(reach, [scale / SHRINK**k for k in range(PAIRS) for scale in (1.0, 0.5)])  # [m, 2·PAIRS]
    moves = np.stack([sizes, -sizes], -1)[..., None] * directions[:, None, None, :]
    points = jnp.concatenate([point[None], point + jnp.asarray(moves.reshape(-1, point.size))])
    values, slack = (np.asarray(part) for part in jax.jit(lambda points: jax.lax.map(value, points))(points))
    here, values = values[0], values[1:].reshape(*sizes.shape, 2)
    slack = np.asarray(slack)[1:].reshape(*sizes.shape, 2).max(-1)
    slopes = (values[..., 0] - values[..., 1]) / (2 * sizes)
    rounding = (10 * EPS * np.abs(values).max(-1) + slack) / sizes
    extrapolated = (4 * slopes[:, 1::2] - slopes[:, 0::2]) / 3  # [m, PAIRS]
    noise = rounding[:, 0::2] + 2 * rounding[:, 1::2]
    apart = np.abs(np.diff(extrapolated, axis=1)) + noise[:, 1:]
    apart = np.where(np.isfinite(apart), apart, np.inf)
    best, rows = apart.argmin(axis=1), np.arange(len(directions))
    jump = _kink(here, values[:, 1::2], sizes[:, 1::2], noise)
    return extrapolated[rows, best + 1], apart[rows, best] + jump


def _kink(here, values, sizes, noise):
    """Half the jump between left and right slope, where it does not shrink with the step; else zero.

    A smooth function's slopes close up like h, by a factor of 10^½ from one size to the next.
    """
    right, left = (values[..., 0] - here) / sizes, (here - values[..., 1]) / sizes
    jump = np.abs(right - left)
    last, first = jump[:, -1], jump[:, -3]  # a factor of ten in h
    return np.where((last > 0.5 * first) & (last > 10 * noise[:, -1]), last / 2, 0.0)


def _parts(problem, place, point, data, directions):
    """A ``[n, n]``, B·directions ``[n, m]``, g ``[n]``, h·directions ``[m]``; all by tangents."""

    def residual(flat, vector):
        return _flat_residual(problem.condition, place, point.rebuild(vector), data)(flat)

    def outer(flat, vector):
        return _outer(problem)(place.rebuild(flat), point.rebuild(vector), data)

    @jax.jit
    def parts(flat, vector, directions):
        def along(direction):
            still = jnp.zeros_like(flat), direction
            return tuple(jax.jvp(f, (flat, vector), still)[1] for f in (residual, outer))

        b, h = jax.lax.map(along, directions)
        return jax.jacfwd(residual)(flat, vector), b.T, jax.jacfwd(outer)(flat, vector), h

    return parts(place.vector, point.vector, directions)
