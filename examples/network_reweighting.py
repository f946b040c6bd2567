"""Data reweighting for a network of 1.1 million parameters: seconds and memory of stochastic and of implicit steps.

Half of the labels of 1,000 digits are redrawn at random. Each digit has a weight, and θ holds the logits of the
weights. A step of SOBA uses 50 training and 50 validation digits, and a step of F2SA uses 100 of each. A step of
`Implicit` uses all digits, in 20 steps of the inner solver and 10 steps of CG. At the start the Hessian is indefinite,
and the penalty on w helps to keep the adjoint of SOBA bounded. F2SA needs neither an adjoint nor second derivatives.
"""

import sys
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import bilevel as bl


def load():
    """Return 1,000 training and 300 validation digits, and a mask of the wrong training labels."""
    rng, (x, y) = np.random.default_rng(0), load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order])
    given = jnp.where(rng.random(1000) < 0.5, rng.integers(0, 10, 1000), y[:1000])
    train = {"x": x[:1000], "y": given, "number": jnp.arange(1000)}
    return {"inner": train, "outer": (x[1000:1300], y[1000:1300])}, given != y[:1000]


def network(width):
    layers = zip(jax.random.split(jax.random.key(1), 3), (64, width, width), (width, width, 10), strict=True)
    return [(jax.random.normal(key, (m, n)) / jnp.sqrt(m), jnp.zeros(n)) for key, m, n in layers]


def losses(w, x, y):
    for kernel, bias in w[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    return optax.softmax_cross_entropy_with_integer_labels(x @ w[-1][0] + w[-1][1], y)


def fit(w, theta, batch):
    weighted = jax.nn.sigmoid(theta[batch["number"]]) * losses(w, batch["x"], batch["y"])
    return jnp.mean(weighted) + 5e-3 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))


def validate(w, theta, batch):
    return jnp.mean(losses(w, *batch))


def megabytes(compiled):
    """Return the size of the temporary buffers and results of a compiled function, in megabytes."""
    memory = compiled.memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6


def stochastic(algorithm, w, data, steps):
    """Return the seconds and losses after every 25 steps, the seconds of a step, the megabytes of a loop, and θ."""
    (inner, outer), theta = data.values(), jnp.zeros(1000)
    problem, samples = bl.Problem(bl.Stationary(fit), validate), bl.stochastic.Samples
    run = lambda steps: bl.stochastic.minimize(  # noqa: E731
        problem, theta, w, inner, outer, algorithm, steps, evaluate=evaluate, evaluate_every=25
    )
    evaluate = lambda theta, w: validate(w, theta, outer)  # noqa: E731
    state, start = run(1).state, time.perf_counter()  # the first call includes the compilation
    found = run(steps)
    seconds = (time.perf_counter() - start) / steps

    @jax.jit
    def loop(state, inner, outer, count):
        oracle = bl.stochastic.Oracle(problem, samples(inner, 1000, 50), samples(outer, 300, 50))
        draws = bl.stochastic.Draws(*(jnp.zeros(number, int) for number in algorithm.draws))
        return jax.lax.fori_loop(0, count, lambda _, state: algorithm.step(oracle, state, draws), state)

    size, history = megabytes(loop.lower(state, inner, outer, steps).compile()), found.history
    return np.asarray(history.step) * seconds, history.evaluations, seconds, size, found.theta


def implicit(w, data, steps):
    """Take steps of `Implicit` with warm starts; return what `stochastic` returns, with a loss for every step."""
    condition = bl.Stationary(lambda w, theta, data: fit(w, theta, data["inner"]))
    problem = bl.Problem(condition, lambda w, theta, data: validate(w, theta, data["outer"]))
    solver, method = bl.GradientDescent(0.3, max_steps=20, momentum=0.9), bl.Implicit(bl.CG(max_steps=10))
    theta, adjoint, adam, times, values = jnp.zeros(1000), jax.tree.map(jnp.zeros_like, w), optax.adam(1.0), [], []
    step = jax.jit(bl.value_and_hypergradient(problem, solver, method)).lower(theta, w, data, adjoint).compile()
    state, start = adam.init(theta), time.perf_counter()
    for _ in range(steps):
        out = step(theta, w, data, adjoint)
        w, adjoint, (updates, state) = out.inner.w, out.linear.solution, adam.update(out.gradient, state)
        theta = theta + updates
        values.append(float(out.value))
        times.append(time.perf_counter() - start)
    return np.asarray(times), values, times[-1] / steps, megabytes(step), theta


def main(picture="network_reweighting.png", width=1024, steps=300):
    (data, wrong), w, batches = load(), network(width), {"inner_batch": 50, "outer_batch": 50}
    runs = {
        "SOBA": stochastic(bl.stochastic.SOBA(0.1, 0.1, 30.0, **batches), w, data, steps),
        "F2SA": stochastic(bl.stochastic.F2SA(0.1, 30.0, penalty=10.0, **batches), w, data, steps),
        "Implicit(CG)": implicit(w, data, steps // 50),
    }
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(w)):,} weights")
    print("              s/step    MB  validation loss  weights on the right side")
    rows = {}
    for name, (times, values, seconds, size, theta) in runs.items():
        left.plot(times, values, ".-", label=name)
        rows[name] = seconds, size, float(values[-1]), float(jnp.mean((theta < 0) == wrong))
        print("{:12} {:7.3f} {:5.0f} {:16.3f} {:26.1%}".format(name, *rows[name]))
    left.set(xlabel="seconds", ylabel="validation loss")
    left.legend()
    right.bar_label(right.bar(list(rows), [row[1] for row in rows.values()]), fmt="%.0f")
    right.margins(y=0.1)
    right.set(ylabel="temporary buffers and results, MB")
    plt.savefig(picture, dpi=120)
    return tuple(rows.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
