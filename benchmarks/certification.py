"""Study the quality of certificates: certify thousands of random problems and compare with exact hypergradients.

    python -m benchmarks.certification [--cases 10000] [--seed 0] [--out FILE] [--families …] [--sizes …]

Each case draws:

- 40 training and 30 validation rows with 3 or 20 features (3 or 6 where there are four classes);
- standard normal features, with feature j of n, counted from 0, multiplied by s^(−2j/(n−1)), s log-uniform in [1, 30];
- targets from a linear model with noise: the sign of its output for the logistic loss, the argmax for four classes;
- a penalty or proximal strength, log-uniform in [1e-3, 10];
- a standard normal initial point, and 1 to 999 (log-uniform) steps of gradient descent with step size 1/L, where L is
  an upper bound of the largest eigenvalue of the inner Hessian;
- 1 to 12 (uniform) steps of conjugate gradients for the adjoint system.

There are six families with about equally many cases. If a family names one loss, the inner objective is this loss on
the training rows plus the penalty, and the outer objective is this loss on the validation rows:

- logistic: cross-entropy and one penalty ½e^θ‖w‖²;
- penalties: cross-entropy and one penalty per feature;
- ridge: half squared error and one penalty;
- softmax: cross-entropy of four classes and one penalty;
- imaml quadratic: inner objective half squared error and ½λ‖w − θ‖², outer objective cross-entropy;
- imaml logistic: inner objective cross-entropy and ½λ‖w − θ‖², outer objective cross-entropy.

Everything is float64. The reference takes 40 Newton steps, each with the best of 12 step sizes, then two full Newton
steps, and solves the adjoint system directly. It calls no code of the library. The norm of its inner gradient must be
at most 1e-12·L·(1 + ‖w‖). Violations of the bound are counted in every case. A case is left out of the ratios if its
true error is at most 1000·eps·(L/μ)·(‖G‖ + ‖g‖), with the strong convexity μ, the exact hypergradient G and
g = ∂outer/∂w: rounding in the reference may be as large. The number of these cases is printed ("at rounding").

The study passes if every reference converged, if every case is certified, if no bound is violated before or after
correction, if the median of bound/true is at most 20, and if estimate/true is in [½, 2] for at least 98 % of the cases
in which ``Certificate.first_order`` is True. "order of correction" is the p in (relative error after correction) ≈
c·(relative error before)ᵖ. It is fitted by least squares on logarithmic scales, over the cases in which
``first_order`` is True and both errors are above rounding.
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
from imaml.runs.versions import versions

TRAIN, VALIDATION, CLASSES, BACKTRACKS = 40, 30, 4, 12


@dataclass(frozen=True)
class Family:
    """A family of problems: the inner and outer losses with their Lipschitz constants, and the kind of θ and of w."""

    inner: Callable
    outer: Callable
    inner_constants: bl.LinearLoss
    outer_constants: bl.LinearLoss
    proximal: bool = False
    penalties: bool = False
    classes: int | None = None

    def condition(self):
        if self.proximal:
            return bl.Proximal(lambda w, theta, data: self.inner(w, data["x"], data["y"]), lambda _, data: data["lam"])
        return bl.Stationary(self.potential)

    def potential(self, w, theta, data):
        """Evaluate the inner objective with its penalty or proximal term."""
        pull = data["lam"] * (w - theta) ** 2 if self.proximal else jnp.exp(theta) * w**2
        return self.inner(w, data["x"], data["y"]) + 0.5 * jnp.sum(pull)

    def validate(self, w, theta, data):
        return self.outer(w, data["x_val"], data["y_val"])

    def strong_convexity(self, theta, data):
        return data["lam"] if self.proximal else jnp.min(jnp.exp(theta))

    @property
    def constants(self):
        return bl.Lipschitz(
            outer_w=lambda ball, theta, data: self.outer_constants.gradient(data["x_val"]),
            adjoint=lambda ball, theta, data: self.inner_constants.hessian_times(data["x"], ball.v),
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
    """Draw θ, the initial point and the data of one case."""
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
    data["smoothness"] = family.inner_constants.gradient(data["x"]) + largest
    return theta, jax.random.normal(next(keys), shape), data


def descend(condition, init, theta, data):
    """Take ``data["steps"]`` steps of gradient descent with step size 1/``data["smoothness"]``."""
    return jax.lax.fori_loop(
        0, data["steps"], lambda _, w: w - condition.residual(w, theta, data) / data["smoothness"], init
    )


def conjugate_gradients(steps):
    """Make a linear solver whose number of steps may be traced; :class:`bilevel.CG` needs a Python integer."""

    def solve(matvec, b, init=None):
        def advance(_, state):
            x, r, p = state
            product = matvec(p)
            squared = jnp.vdot(r, r)
            moves = squared > 1e-28 * jnp.vdot(b, b)  # once r is zero, step_size and momentum would be 0/0
            step_size = jnp.where(moves, squared / jnp.where(moves, jnp.vdot(p, product), 1.0), 0.0)
            residual = r - step_size * product
            momentum = jnp.where(moves, jnp.vdot(residual, residual) / jnp.where(moves, squared, 1.0), 0.0)
            return x + step_size * p, residual, residual + momentum * p

        x = jnp.zeros_like(b) if init is None else init
        r = b - matvec(x)
        x = jax.lax.fori_loop(0, steps, advance, (x, r, r))[0]
        relative_residual = jnp.linalg.norm(b - matvec(x)) / jnp.linalg.norm(b)
        return x, bl.LinearInfo(x, relative_residual, steps, jnp.int32(bl.Status.BUDGET_USED))

    return solve


def reference(family, theta, init, data):
    """Compute the exact hypergradient, ‖∂outer/∂w‖, and the inner gradient's norm divided by its tolerance."""
    unravel = lambda flat: flat.reshape(init.shape)  # noqa: E731

    def potential(flat):
        return family.potential(unravel(flat), theta, data)

    def newton(_, w):
        direction = jnp.linalg.solve(jax.hessian(potential)(w), jax.grad(potential)(w))
        step_sizes = 0.5 ** jnp.arange(float(BACKTRACKS))
        values = jax.vmap(lambda step_size: potential(w - step_size * direction))(step_sizes)
        return w - step_sizes[jnp.argmin(values)] * direction

    def polish(_, w):  # near the minimum rounding hides differences of the objective, so the full step is taken
        return w - jnp.linalg.solve(jax.hessian(potential)(w), jax.grad(potential)(w))

    w = jax.lax.fori_loop(0, 2, polish, jax.lax.fori_loop(0, 40, newton, init.ravel()))
    slope = jax.grad(lambda w: family.validate(unravel(w), theta, data))(w)
    v = jnp.linalg.solve(jax.hessian(potential)(w), slope)
    exact = -jax.grad(lambda theta: jnp.vdot(jax.grad(lambda w: family.potential(unravel(w), theta, data))(w), v))(
        theta
    )
    tolerance = 1e-12 * data["smoothness"] * (1 + jnp.linalg.norm(w))
    return exact, jnp.linalg.norm(slope), jnp.linalg.norm(jax.grad(potential)(w)) / tolerance


def judge(family, features, key):
    """Certify one case and compute its true errors."""
    theta, init, data = draw(family, features, key)
    problem = bl.Problem(family.condition(), family.validate)
    method = bl.Implicit(conjugate_gradients(data["cg_steps"]))
    out = bl.value_and_hypergradient(problem, descend, method)(theta, init, data)
    certificate = bl.certify(problem, theta, out, data, family.strong_convexity, family.constants)
    exact, slope, relative_residual = reference(family, theta, init, data)
    distance = lambda gradient: jnp.linalg.norm(jnp.ravel(gradient - exact))  # noqa: E731
    kappa = data["smoothness"] / family.strong_convexity(theta, data)
    floor = 1000 * jnp.finfo(slope.dtype).eps * kappa * (jnp.linalg.norm(jnp.ravel(exact)) + slope)
    return {
        "true": distance(out.gradient), "corrected": distance(certificate.gradient), "floor": floor,
        "reference_residual": relative_residual,
        "size": jnp.linalg.norm(jnp.ravel(exact)), "estimate": certificate.estimate, "bound": certificate.bound,
        "corrected_bound": certificate.corrected_bound, "kind": certificate.kind, "first": certificate.first_order,
    }  # fmt: skip


def certify_all(cases, seed, families, sizes):
    """Certify all cases and return the measured quantities, ``{family: {quantity: array of shape [cases]}}``."""
    rows, groups = {}, len(families) * len(sizes)
    for i, (name, family) in enumerate((name, FAMILIES[name]) for name in families):
        parts = []
        for j, features in enumerate(sizes):
            index = i * len(sizes) + j
            count = cases // groups + (index < cases % groups)
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), index), count)
            columns = min(features, 6) if family.classes else features
            one = partial(judge, family, columns)
            # lax.map instead of vmap: XLA's CPU threads can deadlock in batched factorisations of small matrices.
            parts.append(jax.jit(partial(jax.lax.map, one))(keys))
        print(f"{name}: done", file=sys.stderr, flush=True)
        rows[name] = {figure: np.concatenate([np.asarray(part[figure]) for part in parts]) for figure in parts[0]}
    return rows


def summarise(row):
    """Summarise some cases as numbers that can be written to JSON."""
    above = row["true"] > row["floor"]
    bound = row["bound"][above] / row["true"][above]
    passed = above & row["first"]
    ratio = row["estimate"][passed] / row["true"][passed]
    measurable = passed & (row["corrected"] > row["floor"])  # where the error after correction exceeds rounding
    relative, after = (np.log10(row[name][measurable] / row["size"][measurable]) for name in ("true", "corrected"))
    return {
        "cases": len(above),
        "certified": int(np.sum(row["kind"] == bl.CertificateKind.CERTIFIED)),
        "reference not converged": int(np.sum(~(row["reference_residual"] <= 1))),
        "at rounding": int(np.sum(~above)),
        "violations": int(np.sum(~(row["true"] <= row["bound"]))),
        "violations after correction": int(np.sum(~(row["corrected"] <= row["corrected_bound"]))),
        "bound/true": _quantiles(bound, (0.01, 0.5, 0.9, 0.99, 1)),
        "tested": int(np.sum(passed)),
        "estimate/true": _quantiles(ratio, (0.01, 0.5, 0.99)),
        "estimate within 2": float(np.mean((ratio >= 0.5) & (ratio <= 2))) if ratio.size else None,
        "gain of correction": _quantiles(row["true"][measurable] / row["corrected"][measurable], (0.1, 0.5, 0.9)),
        "order of correction": _slope(relative, after),
    }


def _quantiles(values, at):
    return {f"{q:g}": float(np.quantile(values, q)) for q in at} if values.size else {}


def _slope(x, y):
    """Return the slope of the least-squares line through the points (x, y), or None for 20 points or fewer."""
    return float(np.polyfit(x, y, 1)[0]) if x.size > 20 else None


def failures(total):
    """List the requirements that the summary of all cases does not meet."""
    share = total["estimate within 2"]
    checks = {
        "a reference did not converge": total["reference not converged"] == 0,
        "a case was not certified": total["certified"] == total["cases"],
        "a bound was violated": total["violations"] == total["violations after correction"] == 0,
        "the median of bound/true is above 20": total["bound/true"]["0.5"] <= 20,
        "fewer than 98 % of the estimates with first_order True are within a factor of 2": share is not None
        and share >= 0.98,
    }
    return [sentence for sentence, holds in checks.items() if not holds]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[3, 20], help="numbers of features; families with classes use at most 6"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "certification.json")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    # Most of the time is compilation: there is one program for each family and size.
    jax.config.update("jax_disable_most_optimizations", True)
    begin = time.perf_counter()
    rows = certify_all(options.cases, options.seed, options.families, options.sizes)
    everything = {
        figure: np.concatenate([row[figure] for row in rows.values()]) for figure in rows[options.families[0]]
    }
    result = {name: summarise(row) for name, row in (rows | {"all": everything}).items()}
    record = {
        "command": " ".join(["python -m benchmarks.certification", *sys.argv[1:]]),
        "versions": versions(),
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "seconds": round(time.perf_counter() - begin, 1),
        "failures": failures(result["all"]),
        "result": result,
    }
    for name, figures in result.items():
        print(f"{name}:", *(f"  {figure:28} {_shown(value)}" for figure, value in figures.items()), sep="\n")
    print(record["command"], record["versions"], f"{record['seconds']} s", sep="\n")
    print(*record["failures"] or ["all requirements are met"], sep="\n")
    options.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(record["failures"]))


def _shown(value):
    return ", ".join(f"{q}: {v:.4g}" for q, v in value.items()) if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
