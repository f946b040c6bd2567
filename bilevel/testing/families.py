"""Families of cases: each function draws the numbers of one problem from a seed.

Every matrix has eigenvalues or singular values between 1/κ and 1, so that one step size serves all of a
family. Where a solution lies in a corner it is chosen first, with its distance from the next kink, and the
problem is made to fit.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel._jaxopt.operators import jaxopt_projection
from bilevel.conditions import KKT, Condition, FixedPoint, Projected, Proximal, ProximalGradient, Root, Stationary
from bilevel.problem import Problem
from bilevel.testing.cases import LAYOUTS, Case, ClosedForm, arrange, flatten, outer
from bilevel.types import PyTree


@dataclass(frozen=True)
class Options:
    """What every family is drawn from.

    Attributes:
        size: entries of w, at least 3.
        condition: κ that is aimed at, at least 1; ``case.condition_number`` is what came of it.
        dtype: ``"float32"`` or ``"float64"``.
        w: the layout of the inner variables, one of :data:`~bilevel.testing.cases.LAYOUTS`.
        theta: that of the outer ones, which may also be a single ``"scalar"``.
        seed: of all numbers.
    """

    size: int = 3
    condition: float = 10.0
    dtype: str = "float64"
    w: str = "flat"
    theta: str = "flat"
    seed: int = 0

    def __post_init__(self):
        if self.size < 3 or not self.condition >= 1 or self.dtype not in ("float32", "float64"):
            raise ValueError(f"a case needs size ≥ 3, condition ≥ 1 and dtype float32 or float64, got {self}")
        if self.w not in LAYOUTS or self.theta not in (*LAYOUTS, "scalar"):
            raise ValueError(f'the layouts are {", ".join(LAYOUTS)}, and "scalar" for theta, got {self}')

    @property
    def outer_size(self) -> int:
        """Entries of θ where nothing ties them to those of w: another number, so that a transpose shows."""
        return 1 if self.theta == "scalar" else self.size + 1


def quadratic(**options) -> Case:
    """½⟨w, A(θ)w⟩ − ⟨w, Bθ + c⟩ with A(θ) = A₀ + sin⟨u, θ⟩·A₁ symmetric: w = A⁻¹(Bθ + c)."""
    return _affine("quadratic", Options(**options), symmetric_matrix, _descent)


def root(**options) -> Case:
    """A(θ)w − Bθ − c = 0 with A(θ) = A₀ + sin⟨u, θ⟩·A₁ that is not symmetric."""
    return _affine("root", Options(**options), general_matrix, lambda _: newton)


def fixed_point(**options) -> Case:
    """w = M(θ)w + Bθ + c with M(θ) = M₀ − sin⟨u, θ⟩·A₁ a contraction that is not symmetric: A = I − M."""
    return _affine("fixed_point", Options(**options), contraction_complement, _iteration)


def ridge(**options) -> Case:
    """½‖Xw − y‖²/n + ½Σ exp(θ_j)w_j², one penalty for each feature or a scalar θ for all of them."""
    return _regression("ridge", Options(**options), _solve_ridge)


def logistic(**options) -> Case:
    """The mean of log(1 + exp(−y⟨x, w⟩)) + ½Σ exp(θ_j)w_j²; w by Newton's method in NumPy, until it stands still."""
    return _regression("logistic", Options(**options), _solve_logistic)


def imaml(strength: str = "one", **options) -> Case:
    """½⟨φ − t, H(φ − t)⟩ + ½λ‖φ − θ‖²: the meta-gradient is (I + H/λ)⁻¹∇outer.

    Args:
        strength: ``"one"`` λ, a number, or ``"each"``: one for each parameter. θ is laid out like w.
        options: see :class:`Options`.
    """
    if strength not in ("one", "each"):
        raise ValueError(f'strength is "one" λ or one for "each" parameter, got {strength!r}')
    options = Options(**({"theta": options.get("w", "flat")} | options))
    if options.theta != options.w:
        raise ValueError(f"imaml has θ laid out like w, got {options}")
    rng, n = np.random.default_rng(options.seed), options.size
    strengths = np.full(n, 1 / options.condition)
    if strength == "each":
        strengths *= rng.uniform(0.5, 2.0, n)
    numbers = {
        "hessian": symmetric_matrix(rng, n, options.condition),
        "target": rng.normal(size=n),
        "strength": arrange(strengths, options.w) if strength == "each" else strengths[0],
    }
    problem = _imaml_problem(options.w)
    return _case("imaml", options, problem, numbers, _solve_imaml, _descent, n, extra={"strength": strength})


def box(**options) -> Case:
    """½⟨w, Qw⟩ − ⟨w, Bθ + c⟩ over −ρ ≤ w ≤ ρ with ρ = exp⟨u, θ⟩: one entry at each bound, the others free."""
    options = Options(**options)
    rng, n = np.random.default_rng(options.seed), options.size
    theta, numbers = _quadratic_program(rng, options)
    side = rng.permutation(np.array([-1.0, 1.0] + [0.0] * (n - 2)))
    radius = np.exp(numbers["direction"] @ theta)
    w = np.where(side == 0, rng.uniform(-0.5, 0.5, n), side) * radius
    pressure = rng.uniform(0.5, 1.5, n) * side  # −∇ at a bound points outwards
    numbers["offset"] = numbers["matrix"] @ w + pressure - numbers["slope"] @ theta
    problem = _projected_problem(options.w, options.theta, _project_on_box)
    margin = min(np.min(np.abs(pressure[side != 0])), np.min(radius - np.abs(w[side == 0])))
    return _case("box", options, problem, numbers, _solve_box(side), _iteration, theta, margin=margin)


def simplex(**options) -> Case:
    """½⟨w, Qw⟩ − ⟨w, Bθ + c⟩ over w ≥ 0, Σw = exp⟨u, θ⟩: one entry is zero, the others are not."""
    options = Options(**options)
    rng, n = np.random.default_rng(options.seed), options.size
    theta, numbers = _quadratic_program(rng, options)
    inside = rng.permutation(n) > 0
    weights = rng.uniform(0.5, 1.5, n) * inside
    w = np.exp(numbers["direction"] @ theta) * weights / np.sum(weights)
    pressure = np.where(inside, 0.0, rng.uniform(0.5, 1.5, n))
    numbers["offset"] = numbers["matrix"] @ w + rng.normal() - pressure - numbers["slope"] @ theta
    problem = _projected_problem(options.w, options.theta, _project_on_simplex)
    margin = min(np.min(w[inside]), np.min(pressure[~inside]))
    return _case("simplex", options, problem, numbers, _solve_simplex(inside), _iteration, theta, margin=margin)


def lasso(**options) -> Case:
    """½⟨w, Qw⟩ − ⟨w, Bθ + c⟩ + λ‖w‖₁ with λ = exp⟨u, θ⟩: one entry is zero, the others are not."""
    options = Options(**options)
    rng, n = np.random.default_rng(options.seed), options.size
    theta, numbers = _quadratic_program(rng, options)
    sign = rng.choice([-1.0, 1.0], n) * (rng.permutation(n) > 0)
    strength = np.exp(numbers["direction"] @ theta)
    w = rng.uniform(0.5, 1.5, n) * sign
    subgradient = np.where(sign == 0, rng.uniform(-0.5, 0.5, n), sign)
    numbers["offset"] = numbers["matrix"] @ w + strength * subgradient - numbers["slope"] @ theta
    problem = _lasso_problem(options.w, options.theta)
    margin = min(np.min(np.abs(w[sign != 0])), strength * np.min(1 - np.abs(subgradient[sign == 0])))
    return _case("lasso", options, problem, numbers, _solve_lasso(sign), _iteration, theta, margin=margin)


def kkt(inequality: bool = False, **options) -> Case:
    """½⟨x, Qx⟩ − ⟨x, Bθ + c⟩ subject to ⟨e, x⟩ = ⟨u, θ⟩ + f; w is (x, ν, μ) and so are its exact solution's parts.

    Args:
        inequality: add two, Kx ≤ k, of which one is active and the other is not; μ is then (μ₁, 0), else None.
        options: see :class:`Options`.
    """
    options = Options(**options)
    rng, n = np.random.default_rng(options.seed), options.size
    theta, numbers = _quadratic_program(rng, options)
    rows = np.linalg.qr(rng.normal(size=(n, 3)))[0].T  # e and K, at right angles
    x, equal, unequal, slack = rng.normal(size=n), rng.normal(), rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5)
    numbers |= {"equality": rows[:1], "level": rows[:1] @ x - numbers["direction"] @ theta}
    pull = equal * rows[0]
    near = [x, [equal]]
    if inequality:
        numbers |= {"inequality": rows[1:], "limit": rows[1:] @ x + [0.0, slack]}
        pull, near = pull + unequal * rows[1], [*near, [unequal, 0.0]]
    numbers["offset"] = numbers["matrix"] @ x + pull - numbers["slope"] @ theta
    # Newton's method finds this corner from nearby; what is inactive starts, and stays, at zero.
    near = np.concatenate(near)
    init = near + 0.01 * rng.normal(size=near.size) * (near != 0)
    margin = min(unequal, slack) if inequality else np.inf
    return _case(
        "kkt",
        options,
        _kkt_problem(options.w, options.theta, inequality),
        numbers,
        _solve_kkt,
        lambda _: newton,
        theta,
        margin=margin,
        init=init,
        arrange_w=lambda flat: (arrange(flat[:n], options.w), flat[n : n + 1], flat[n + 1 :] if inequality else None),
        extra={"inequality": inequality},
    )


FAMILIES: dict[str, Callable[..., Case]] = {
    family.__name__: family
    for family in (quadratic, root, fixed_point, ridge, logistic, imaml, box, simplex, lasso, kkt)
}


def newton(condition: Condition, init: PyTree, theta: PyTree, data: PyTree) -> PyTree:
    """Eight Newton steps with a dense Jacobian: an inner solver for any smooth condition, in a plain function."""
    flat, unravel = ravel_pytree(init)

    def residual(w):
        return ravel_pytree(condition.residual(unravel(w), theta, data))[0]

    def step(_, w):
        return w - jnp.linalg.solve(jax.jacobian(residual)(w), residual(w))

    return unravel(jax.lax.fori_loop(0, 8, step, flat))


# --- numbers ---------------------------------------------------------------------------------------------------


def orthogonal(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def symmetric_matrix(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """Symmetric, with eigenvalues from 1/κ to 1."""
    basis = orthogonal(rng, size)
    return (basis * np.geomspace(1 / condition, 1, size)) @ basis.T


def general_matrix(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """With singular values from 1/κ to 1, and bases that have nothing to do with each other."""
    return (orthogonal(rng, size) * np.geomspace(1 / condition, 1, size)) @ orthogonal(rng, size).T


def contraction_complement(rng: np.random.Generator, size: int, condition: float) -> np.ndarray:
    """I − cU with c = (κ − 1)/(κ + 1), so that κ bounds its condition number; U turns planes by 0.7 to 2.4 radians."""
    turn = np.eye(size)
    for i in range(0, size - 1, 2):
        angle = rng.uniform(0.7, 2.4)
        turn[i : i + 2, i : i + 2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    basis = orthogonal(rng, size)
    return np.eye(size) - (condition - 1) / (condition + 1) * basis @ turn @ basis.T


def _theta(rng, size):
    return 0.5 * rng.normal(size=size)


def _direction(rng, size):
    return rng.normal(size=size) / np.sqrt(size)


def _quadratic_program(rng, options):
    """θ, and the numbers that a quadratic objective with a linear dependence on θ has in common."""
    m = options.outer_size
    return _theta(rng, m), {
        "matrix": symmetric_matrix(rng, options.size, options.condition),
        "slope": rng.normal(size=(options.size, m)),
        "direction": _direction(rng, m),
    }


def _outer_numbers(rng, w_size, theta_size):
    return {
        "target": rng.normal(size=w_size),
        "center": rng.normal(size=theta_size),
        "weight_w": rng.normal(size=w_size),
        "weight_theta": rng.normal(size=theta_size),
    }


def _case(
    family, options, problem, numbers, closed_form: ClosedForm, suggest_solver, theta, *,
    margin=np.inf, init=None, arrange_w=None, extra=None,
) -> Case:  # fmt: skip
    """Round all numbers to the dtype; the closed form is later evaluated on what they became."""
    rng = np.random.default_rng([options.seed, 1])
    theta = _theta(rng, theta) if isinstance(theta, int) else theta
    init = rng.normal(size=options.size) if init is None else init
    numbers = numbers | {"outer": _outer_numbers(rng, init.size, theta.size)}
    arrange_w = arrange_w or functools.partial(arrange, layout=options.w)

    def suggest():
        import bilevel  # the methods under test, only when they are asked for

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


def _steps(options):
    """Until an error shrinks to rounding, e⁻⁴⁰, where each step of ½ takes off half the smallest eigenvalue, ½/κ."""
    return int(160 * options.condition)


def _descent(options):
    import bilevel

    return bilevel.GradientDescent(0.5, _steps(options))


def _iteration(options):
    import bilevel

    return bilevel.FixedPointIteration(_steps(options))


# --- one problem for each family and layout, and the closed form of its solution --------------------------------------


def _affine(family, options, make_matrix, suggest_solver):
    rng, n, m = np.random.default_rng(options.seed), options.size, options.outer_size
    numbers = {
        "matrix": make_matrix(rng, n, options.condition),
        "tilt": make_matrix(rng, n, 1.0 + rng.uniform()) / (4 * options.condition),  # leaves 1/κ − 2 · 1/(4κ) at least
        "slope": rng.normal(size=(n, m)),
        "direction": _direction(rng, m),
    }
    theta = _theta(rng, m)
    left = numbers["matrix"] + np.sin(numbers["direction"] @ theta) * numbers["tilt"]
    numbers["offset"] = left @ rng.normal(size=n) - numbers["slope"] @ theta  # a solution of size one
    problem = _affine_problem(family, options.w, options.theta)
    return _case(family, options, problem, numbers, _solve_affine, suggest_solver, theta)


@functools.cache
def _affine_problem(family, w_layout, theta_layout):
    del theta_layout  # the cache tells layouts apart, so that each problem is compiled for one

    def residual(w, theta, data):
        flat, outer_flat = flatten(w), flatten(theta)
        left = data["matrix"] + jnp.sin(data["direction"] @ outer_flat) * data["tilt"]
        return arrange(left @ flat - data["slope"] @ outer_flat - data["offset"], w_layout)

    def mapping(w, theta, data):
        return jax.tree.map(jnp.subtract, w, residual(w, theta, data))

    def objective(w, theta, data):
        # A is symmetric, and ½⟨w, Aw⟩ − ⟨w, r⟩ = ½⟨w, Aw − 2r⟩.
        flat, outer_flat = flatten(w), flatten(theta)
        right = data["slope"] @ outer_flat + data["offset"]
        return 0.5 * flat @ (flatten(residual(w, theta, data)) - right)

    conditions = {"quadratic": Stationary(objective), "root": Root(residual), "fixed_point": FixedPoint(mapping)}
    return Problem(conditions[family], outer)


def _solve_affine(data, theta):
    angle = data["direction"] @ theta
    left = data["matrix"] + np.sin(angle) * data["tilt"]
    w = np.linalg.solve(left, data["slope"] @ theta + data["offset"])
    through_matrix = np.outer(np.cos(angle) * data["tilt"] @ w, data["direction"])
    return w, np.linalg.solve(left, data["slope"] - through_matrix), left


def _regression(family, options, closed_form):
    rng, n = np.random.default_rng(options.seed), options.size
    samples = 2 * n
    left = np.linalg.qr(rng.normal(size=(samples, n)))[0]
    x = np.sqrt(samples) * (left * np.geomspace(1 / options.condition, 1, n) ** 0.5) @ orthogonal(rng, n).T
    y = x @ rng.normal(size=n) + 0.5 * rng.normal(size=samples)
    if family == "logistic":
        x, y = 2 * x, np.sign(y)  # the curvature of the logistic loss is ¼ at most
    m = 1 if options.theta == "scalar" else n
    theta = 0.3 * rng.normal(size=m) - np.log(options.condition)
    problem = _regression_problem(family, options.w, options.theta)
    return _case(family, options, problem, {"x": x, "y": y}, closed_form, _descent, theta)


@functools.cache
def _regression_problem(family, w_layout, theta_layout):
    del w_layout, theta_layout
    losses = {
        "ridge": lambda predicted, y: 0.5 * (predicted - y) ** 2,
        "logistic": lambda predicted, y: jnp.logaddexp(0.0, -y * predicted),
    }

    def objective(w, theta, data):
        flat = flatten(w)
        loss = losses[family](data["x"] @ flat, data["y"])
        return jnp.mean(loss) + 0.5 * jnp.sum(jnp.exp(flatten(theta)) * flat**2)

    return Problem(Stationary(objective, positive_definite=True), outer)


def _through_penalties(left, w, theta):
    """w, ∂w/∂θ = −A⁻¹diag(λw)P and A, where P gives each entry its penalty: the identity, or a column of ones."""
    which = np.eye(w.size) if theta.size == w.size else np.ones((w.size, 1))
    penalties = which @ np.exp(theta)
    return w, -np.linalg.solve(left, (penalties * w)[:, None] * which), left


def _solve_ridge(data, theta):
    x, y = data["x"], data["y"]
    left = x.T @ x / len(y) + np.exp(theta) * np.eye(x.shape[1])
    return _through_penalties(left, np.linalg.solve(left, x.T @ y / len(y)), theta)


def _solve_logistic(data, theta):
    x, y = data["x"], data["y"]
    w = np.zeros(x.shape[1])

    def slope(w):
        return -x.T @ (y / (1 + np.exp(y * (x @ w)))) / len(y) + np.exp(theta) * w

    while True:
        wrong = 1 / (1 + np.exp(y * (x @ w)))
        left = (x.T * (wrong * (1 - wrong))) @ x / len(y) + np.exp(theta) * np.eye(w.size)
        step = -np.linalg.solve(left, slope(w))
        # Halved until the slope falls: the objective is strictly convex, so that this ends at its minimum.
        while np.linalg.norm(slope(w + step)) > np.linalg.norm(slope(w)) and np.any(w + step != w):
            step = step / 2
        if np.linalg.norm(step) <= 4 * np.finfo(np.float64).eps * np.linalg.norm(w):
            return _through_penalties(left, w, theta)
        w = w + step


@functools.cache
def _imaml_problem(layout):
    del layout

    def objective(w, theta, data):
        away = flatten(w) - data["target"]
        return 0.5 * away @ data["hessian"] @ away

    return Problem(Proximal(objective, strength=lambda theta, data: data["strength"], positive_definite=True), outer)


def _solve_imaml(data, theta):
    pull = flatten(data["strength"], np) * np.ones(theta.size)
    left = data["hessian"] + np.diag(pull)
    w = np.linalg.solve(left, data["hessian"] @ data["target"] + pull * theta)
    return w, np.linalg.solve(left, np.diag(pull)), left


def _program(w, theta, data):
    """½⟨w, Qw⟩ − ⟨w, Bθ + c⟩."""
    flat = flatten(w)
    return 0.5 * flat @ data["matrix"] @ flat - flat @ (data["slope"] @ flatten(theta) + data["offset"])


def _exponential(theta, data):
    return jnp.exp(data["direction"] @ flatten(theta))


@functools.cache
def _projected_problem(w_layout, theta_layout, project):
    del theta_layout

    def projection(w, theta, data):
        return arrange(project(flatten(w), theta, data), w_layout)

    return Problem(Projected(_program, projection), outer)


def _project_on_box(flat, theta, data):
    radius = _exponential(theta, data)
    return jnp.clip(flat, -radius, radius)


def _project_on_simplex(flat, theta, data):
    return jaxopt_projection("projection_simplex", params=_exponential)(flat, theta, data)


@functools.cache
def _lasso_problem(w_layout, theta_layout):
    del theta_layout

    def shrink(w, theta, data, step_size):
        flat = flatten(w)
        size = jnp.maximum(jnp.abs(flat) - step_size * _exponential(theta, data), 0.0)
        return arrange(jnp.sign(flat) * size, w_layout)

    return Problem(ProximalGradient(_program, shrink), outer)


@functools.cache
def _kkt_problem(w_layout, theta_layout, inequality):
    del w_layout, theta_layout

    def equality(x, theta, data):
        return data["equality"] @ flatten(x) - data["direction"] @ flatten(theta) - data["level"]

    def below(x, theta, data):
        return data["inequality"] @ flatten(x) - data["limit"]

    return Problem(KKT(_program, equality, below if inequality else None), outer)


def _solve_box(side):
    def closed_form(data, theta):
        radius = np.exp(data["direction"] @ theta)
        held = side != 0
        left = np.where(held[:, None], np.eye(side.size), data["matrix"])
        right = np.where(held, side * radius, data["slope"] @ theta + data["offset"])
        moves = np.where(held[:, None], np.outer(side * radius, data["direction"]), data["slope"])
        return np.linalg.solve(left, right), np.linalg.solve(left, moves), left

    return closed_form


def _solve_simplex(inside):
    def closed_form(data, theta):
        total = np.exp(data["direction"] @ theta)
        one = np.ones((np.sum(inside), 1))
        left = np.block([[data["matrix"][np.ix_(inside, inside)], one], [one.T, np.zeros((1, 1))]])
        right = np.append((data["slope"] @ theta + data["offset"])[inside], total)
        moves = np.vstack([data["slope"][inside], total * data["direction"]])
        return *_padded(left, right, moves, inside), left

    return closed_form


def _solve_lasso(sign):
    def closed_form(data, theta):
        inside, strength = sign != 0, np.exp(data["direction"] @ theta)
        left = data["matrix"][np.ix_(inside, inside)]
        right = data["slope"] @ theta + data["offset"] - strength * sign
        moves = data["slope"] - np.outer(strength * sign, data["direction"])
        return *_padded(left, right[inside], moves[inside], inside), left

    return closed_form


def _padded(left, right, moves, inside):
    """The solution and its derivative on a support, zero elsewhere; a multiplier that came along is left out."""
    w, jacobian = np.zeros(inside.size), np.zeros((inside.size, moves.shape[1]))
    kept = np.sum(inside)
    w[inside], jacobian[inside] = np.linalg.solve(left, right)[:kept], np.linalg.solve(left, moves)[:kept]
    return w, jacobian


def _solve_kkt(data, theta):
    """The system with the active inequality, the first, as another equality; the second's multiplier is zero."""
    inequality = "inequality" in data
    rows = np.vstack([data["equality"], data["inequality"][:1]]) if inequality else data["equality"]
    levels = data["direction"] @ theta + data["level"]
    moves = [data["slope"], data["direction"][None]]
    if inequality:
        levels, moves = np.append(levels, data["limit"][0]), [*moves, np.zeros((1, theta.size))]
    left = np.block([[data["matrix"], rows.T], [rows, np.zeros((len(rows), len(rows)))]])
    right = np.append(data["slope"] @ theta + data["offset"], levels)
    inactive = int(inequality)
    w = np.append(np.linalg.solve(left, right), np.zeros(inactive))
    jacobian = np.vstack([np.linalg.solve(left, np.vstack(moves)), np.zeros((inactive, theta.size))])
    return w, jacobian, left
