"""How good certificates are: thousands of drawn problems, each certified and compared with its exact hypergradient.

    python -m benchmarks.certification [--cases 10000] [--seed 0] [--out FILE] [--families …] [--sizes …]

Drawn for each case: standard normal features, the j-th scaled by κ^(−j/(n−1)) with √κ log-uniform in [1, 30], a linear
truth with noise, 40 training and 30 validation rows (3 or 20 unknowns, with four classes 3 × 4 or 6 × 4), a penalty or
proximal strength log-uniform in [1e-3, 10], a standard normal start, 1 to 1000 inner steps (log-uniform) of gradient
descent at rate 1/L, and 1 to 12 steps (uniform) of conjugate gradients for the adjoint. Families, equally many of each:

- logistic: cross-entropy and one penalty ½e^θ‖w‖²; penalties: the same with one penalty a feature;
- ridge: half squares and one penalty; softmax: four classes and one penalty;
- imaml quadratic: half squares and ½λ‖w − θ‖², with a logistic outer loss; imaml logistic: cross-entropy inside too.

Everything is float64. The reference is Newton's method with backtracking to convergence, written apart from the
library; a case whose reference misses ‖F‖ ≤ 1e-12·L·(1 + ‖w‖) fails the study. Every case counts for violations of
the bound. Ratios leave out those with a true error below 1000·eps·(L/μ)·(‖G‖ + ‖g‖): there the reference has as few
digits as the figure it judges. Their number is printed.

Required: no violation, before or after correction; median bound/true at most 20; estimate/true in [½, 2] for 98 % of
what passed its own test. The order of the correction is that of a least-squares line through unlike problems.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl

TRAIN, VALIDATION, CLASSES, BACKTRACKS = 40, 30, 4, 12


@dataclass(frozen=True)
class Family:
    """A kind of problem: its condition and outer function, its constants, and the shape of w and θ."""

    inner: Callable
    outer: Callable
    inner_loss: bl.LinearLoss
    outer_loss: bl.LinearLoss
    proximal: bool = False
    penalties: bool = False
    classes: int | None = None

    def condition(self):
        if self.proximal:
            return bl.Proximal(lambda w, theta, data: self.inner(w, data["x"], data["y"]), lambda _, data: data["lam"])
        return bl.Stationary(self.potential)

    def potential(self, w, theta, data):
        """What the inner solution minimises, written out for the reference."""
        pull = data["lam"] * (w - theta) ** 2 if self.proximal else jnp.exp(theta) * w**2
        return self.inner(w, data["x"], data["y"]) + 0.5 * jnp.sum(pull)

    def validate(self, w, theta, data):
        return self.outer(w, data["x_val"], data["y_val"])

    def strong_convexity(self, theta, data):
        return data["lam"] if self.proximal else jnp.min(jnp.exp(theta))

    @property
    def constants(self):
        return bl.Lipschitz(
            outer_w=lambda ball, theta, data: self.outer_loss.gradient(data["x_val"]),
            adjoint=lambda ball, theta, data: self.inner_loss.hessian_times(data["x"], ball.v),
            mixed=None if self.proximal else lambda ball, theta, data: jnp.max(jnp.exp(theta)),
        )


def half_squared(w, x, y):
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def logistic(w, x, y):
    return jnp.mean(jax.nn.softplus(-jnp.sign(y) * (x @ w)))


def softmax(w, x, y):
    logits = x @ w
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0])


FAMILIES = {
    "logistic": Family(logistic, logistic, bl.LOGISTIC, bl.LOGISTIC),
    "penalties": Family(logistic, logistic, bl.LOGISTIC, bl.LOGISTIC, penalties=True),
    "ridge": Family(half_squared, half_squared, bl.HALF_SQUARED, bl.HALF_SQUARED),
    "softmax": Family(softmax, softmax, bl.SOFTMAX, bl.SOFTMAX, classes=CLASSES),
    "imaml quadratic": Family(half_squared, logistic, bl.HALF_SQUARED, bl.LOGISTIC, proximal=True),
    "imaml logistic": Family(logistic, logistic, bl.LOGISTIC, bl.LOGISTIC, proximal=True),
}


def draw(family, features, key):
    """θ, a start and the data of one case."""
    keys = iter(jax.random.split(key, 12))
    shape = (features, family.classes) if family.classes else (features,)
    spread = 10 ** (jax.random.uniform(next(keys)) * jnp.log10(30.0))
    scales = spread ** (-2.0 * jnp.arange(float(features)) / (features - 1.0))
    x = jax.random.normal(next(keys), (TRAIN + VALIDATION, features)) * scales
    noise = jax.random.normal(next(keys), (TRAIN + VALIDATION, *shape[1:]))
    score = x @ (2 * jax.random.normal(next(keys), shape) / scales.reshape(-1, *[1] * (len(shape) - 1)) ** 0.5) + noise
    y = jnp.argmax(score, axis=1) if family.classes else score
    lam = 10 ** jax.random.uniform(next(keys), minval=-3.0, maxval=1.0)
    theta = jnp.log(lam)
    if family.penalties:
        theta = jnp.log(10 ** jax.random.uniform(next(keys), shape, minval=-3.0, maxval=1.0))
    if family.proximal:
        theta = jax.random.normal(next(keys), shape)
    data = {
        "x": x[:TRAIN], "y": y[:TRAIN], "x_val": x[TRAIN:], "y_val": y[TRAIN:], "lam": lam,
        "steps": jnp.floor(10 ** (3 * jax.random.uniform(next(keys)))).astype(jnp.int32),
        "cg_steps": jax.random.randint(next(keys), (), 1, 13),
    }  # fmt: skip
    largest = lam if family.proximal else jnp.max(jnp.exp(theta))
    data["smoothness"] = family.inner_loss.gradient(data["x"]) + largest
    return theta, jax.random.normal(next(keys), shape), data


def descend(condition, init, theta, data):
    """Gradient descent at rate 1/L, for as many steps as the case has."""
    return jax.lax.fori_loop(
        0, data["steps"], lambda _, w: w - condition.residual(w, theta, data) / data["smoothness"], init
    )


def conjugate_gradients(steps):
    """A linear solver of as many steps as the case has, which :class:`bilevel.CG` takes as a constant."""

    def solve(matvec, b, init=None):
        def advance(_, state):
            x, r, p = state
            product = matvec(p)
            size = jnp.vdot(r, r)
            moves = size > 1e-28 * jnp.vdot(b, b)
            rate = jnp.where(moves, size / jnp.where(moves, jnp.vdot(p, product), 1.0), 0.0)
            rest = r - rate * product
            return (
                x + rate * p,
                rest,
                rest + jnp.where(moves, jnp.vdot(rest, rest) / jnp.where(moves, size, 1.0), 0.0) * p,
            )

        x = jnp.zeros_like(b) if init is None else init
        r = b - matvec(x)
        x = jax.lax.fori_loop(0, steps, advance, (x, r, r))[0]
        left = jnp.linalg.norm(b - matvec(x)) / jnp.linalg.norm(b)
        return x, bl.LinearInfo(x, left, steps, jnp.int32(bl.Status.BUDGET_USED))

    return solve


def reference(family, theta, init, data):
    """The exact hypergradient, ‖g‖, and ‖F‖ against its tolerance."""
    unravel = lambda flat: flat.reshape(init.shape)  # noqa: E731

    def potential(flat):
        return family.potential(unravel(flat), theta, data)

    def newton(_, w):
        direction = jnp.linalg.solve(jax.hessian(potential)(w), jax.grad(potential)(w))
        rates = 0.5 ** jnp.arange(float(BACKTRACKS))
        values = jax.vmap(lambda rate: potential(w - rate * direction))(rates)
        return w - rates[jnp.argmin(values)] * direction

    def polish(_, w):  # values no longer tell steps apart, gradients still do
        return w - jnp.linalg.solve(jax.hessian(potential)(w), jax.grad(potential)(w))

    w = jax.lax.fori_loop(0, 2, polish, jax.lax.fori_loop(0, 40, newton, init.ravel()))
    slope = jax.grad(lambda w: family.validate(unravel(w), theta, data))(w)
    v = jnp.linalg.solve(jax.hessian(potential)(w), slope)
    exact = -jax.grad(lambda theta: jnp.vdot(jax.grad(lambda w: family.potential(unravel(w), theta, data))(w), v))(
        theta
    )
    left = jnp.linalg.norm(jax.grad(potential)(w)) / (1e-12 * data["smoothness"] * (1 + jnp.linalg.norm(w)))
    return exact, jnp.linalg.norm(slope), left


def judge(family, features, key):
    """One case: what was certified and what was true."""
    theta, init, data = draw(family, features, key)
    problem = bl.Problem(family.condition(), family.validate)
    method = bl.Implicit(conjugate_gradients(data["cg_steps"]))
    out = bl.value_and_hypergradient(problem, descend, method)(theta, init, data)
    certificate = bl.certify(problem, theta, out, data, family.strong_convexity, family.constants)
    exact, slope, left = reference(family, theta, init, data)
    distance = lambda gradient: jnp.linalg.norm(jnp.ravel(gradient - exact))  # noqa: E731
    kappa = data["smoothness"] / family.strong_convexity(theta, data)
    floor = 1000 * jnp.finfo(slope.dtype).eps * kappa * (jnp.linalg.norm(jnp.ravel(exact)) + slope)
    return {
        "true": distance(out.gradient), "corrected": distance(certificate.gradient), "floor": floor, "left": left,
        "size": jnp.linalg.norm(jnp.ravel(exact)), "estimate": certificate.estimate, "bound": certificate.bound,
        "corrected_bound": certificate.corrected_bound, "kind": certificate.kind, "first": certificate.first_order,
    }  # fmt: skip


def certify_all(cases, seed, families, sizes):
    """Every case's figures, ``{family: {figure: [cases]}}``."""
    rows, groups = {}, len(families) * len(sizes)
    for i, (name, family) in enumerate((name, FAMILIES[name]) for name in families):
        parts = []
        for j, features in enumerate(sizes):
            index = i * len(sizes) + j
            count = cases // groups + (index < cases % groups)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), count)
            unknowns = min(features, 6) if family.classes else features
            one = partial(judge, family, unknowns)
            # Not vmapped: XLA's threads can wait for each other for good in factorisations of many small matrices.
            parts.append(jax.jit(partial(jax.lax.map, one))(keys))
        print(f"{name}: done", file=sys.stderr, flush=True)
        rows[name] = {figure: np.concatenate([np.asarray(part[figure]) for part in parts]) for figure in parts[0]}
    return rows


def summarise(row):
    """The study's figures for some cases, as numbers that go into JSON."""
    above = row["true"] > row["floor"]
    bound = row["bound"][above] / row["true"][above]
    tested = above & row["first"]
    ratio = row["estimate"][tested] / row["true"][tested]
    gain = tested & (row["corrected"] > row["floor"])  # the corrected gradient has an error that can be measured
    relative, after = (np.log10(row[name][gain] / row["size"][gain]) for name in ("true", "corrected"))
    return {
        "cases": len(above),
        "certified": int(np.sum(row["kind"] == bl.CertificateKind.CERTIFIED)),
        "reference not converged": int(np.sum(~(row["left"] <= 1))),
        "at rounding": int(np.sum(~above)),
        "violations": int(np.sum(~(row["true"] <= row["bound"]))),
        "violations after correction": int(np.sum(~(row["corrected"] <= row["corrected_bound"]))),
        "bound/true": _quantiles(bound, (0.01, 0.5, 0.9, 0.99, 1)),
        "tested": int(np.sum(tested)),
        "estimate/true": _quantiles(ratio, (0.01, 0.5, 0.99)),
        "estimate within 2": float(np.mean((ratio >= 0.5) & (ratio <= 2))) if ratio.size else None,
        "gain of correction": _quantiles(row["true"][gain] / row["corrected"][gain], (0.1, 0.5, 0.9)),
        "order of correction": _slope(relative, after),
    }


def _quantiles(values, at):
    return {f"{q:g}": float(np.quantile(values, q)) for q in at} if values.size else {}


def _slope(x, y):
    """Of the least-squares line through log error against log corrected error; None for too few."""
    return float(np.polyfit(x, y, 1)[0]) if x.size > 20 else None


def failures(total):
    """The requirements that the figures miss."""
    share = total["estimate within 2"]
    checks = {
        "a reference did not converge": total["reference not converged"] == 0,
        "a case was not certified": total["certified"] == total["cases"],
        "a bound was violated": total["violations"] == total["violations after correction"] == 0,
        "the median of bound/true is above 20": total["bound/true"]["0.5"] <= 20,
        "fewer than 98 % of tested estimates are within a factor of 2": share is not None and share >= 0.98,
    }
    return [sentence for sentence, holds in checks.items() if not holds]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[3, 20], help="features")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "certification.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # twelve programs: compiling them is most of the time
    begin = time.perf_counter()
    rows = certify_all(options.cases, options.seed, options.families, options.sizes)
    everything = {
        figure: np.concatenate([row[figure] for row in rows.values()]) for figure in rows[options.families[0]]
    }
    result = {name: summarise(row) for name, row in (rows | {"all": everything}).items()}
    record = {
        "command": " ".join(["python -m benchmarks.certification", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "bilevel": "0.1.0"},
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "seconds": round(time.perf_counter() - begin, 1),
        "failures": failures(result["all"]),
        "result": result,
    }
    for name, figures in result.items():
        print(f"{name}:", *(f"  {figure:28} {_shown(value)}" for figure, value in figures.items()), sep="\n")
    print(record["command"], record["versions"], f"{record['seconds']} s", sep="\n")
    print(*record["failures"] or ["every requirement is met"], sep="\n")
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(record["failures"]))


def _shown(value):
    return ", ".join(f"{q}: {v:.4g}" for q, v in value.items()) if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
