"""The process that runs the algorithms of this library.

    python -m benchmarks.bilevel.our_worker CORE

The stochastic algorithms go through ``bl.stochastic.minimize``, one call for each block of steps. The full-batch
methods take the same hypergradients as ``bl.minimize``, in one compiled scan for each block.
"""

import os
import sys
from functools import partial
from pathlib import Path

ADJOINT_STEPS, DIRECTION_STEPS = 10, 5
"""Iterations of conjugate gradients for the hypergradient and for a Newton direction, in the full-batch methods."""
STOP = 3e-8
"""The norm of the hypergradient at which a full-batch method stops."""


class Stochastic:
    """A stochastic algorithm with the interface of the solvers of benchmark_bilevel, the peer.

    The interface is ``run(callback)``, ``inner_var`` and ``outer_var``; see :mod:`benchmarks.bilevel.turns`.
    """

    def __init__(self, problem, data, settings: dict):
        import jax
        import jax.numpy as jnp

        import bilevel as bl

        options = settings["options"]
        self._problem = bl.Problem(bl.Stationary(problem.inner), problem.outer)
        self._inner, self._outer = (jax.tree.map(jnp.asarray, arrays) for arrays in (data.inner, data.outer))
        self._z, self._x = jnp.asarray(data.z), jnp.asarray(data.x)
        self._algorithm = algorithm(settings["algorithm"], options, data)
        self._block, self._key = settings["block"], jax.random.key(settings["seed"])

    def run(self, callback) -> None:
        """Take blocks of steps while ``callback()`` is true."""
        import bilevel as bl

        self.outer_var, self.inner_var, state = self._x, self._z, None
        while callback():
            found = bl.stochastic.minimize(
                self._problem, self._x, self._z, inner=self._inner, outer=self._outer, algorithm=self._algorithm,
                steps=self._block, key=self._key, evaluate_every=self._block, state=state, on_failure="ignore",
            )  # fmt: skip
            self.outer_var, self.inner_var, state = found.theta, found.w, found.state


def algorithm(name: str, options: dict, data):
    """Return the algorithm of ``bl.stochastic`` that equals the peer's with the same options.

    The peer's outer rate is the inner rate divided by ``outer_ratio``. The rates of SOBA and MASOBA fall as 1/√t. The
    rates of the other algorithms are constant.
    """
    import bilevel as bl

    stochastic = bl.stochastic
    inner, outer = options["step_size"], options["step_size"] / options["outer_ratio"]
    batch = options.get("batch_size", 64)
    if name in ("SOBA", "MASOBA"):
        inner, outer = stochastic.Power(inner, 0.5), stochastic.Power(outer, 0.5)
    rates = {"inner_rate": inner, "linear_rate": inner, "outer_rate": outer}
    extra = {}
    if name == "SRBA":
        extra = {"period": int(sum(data.sizes) * options["period_frac"] / batch)}
    if name == "AmIGO":
        extra = dict.fromkeys(("inner_steps", "linear_steps"), options["n_inner_steps"])
    batches = {"inner_batch": batch, "outer_batch": batch, "sampling": "without_replacement"}
    return getattr(stochastic, name)(**rates, **batches, **extra)


class FullBatch:
    """Descent on x by optax, with hypergradients over all samples.

    One outer step takes a few Newton-CG steps on z and ten iterations of conjugate gradients on the adjoint system,
    both from a warm start. Where the hypergradient's norm is at most ``STOP``, x is kept: L-BFGS may leave the minimum
    again in float32, where differences of such gradients are rounding noise. ``options`` has the outer ``rate``, the
    ``optimizer`` (``"adam"`` or ``"lbfgs"``) and the number of Newton steps, ``newton_steps``.
    """

    def __init__(self, problem, data, settings: dict):
        import jax
        import jax.numpy as jnp
        import optax

        import bilevel as bl

        options = settings["options"]
        arrays = {"inner": jax.tree.map(jnp.asarray, data.inner), "outer": jax.tree.map(jnp.asarray, data.outer)}
        declared = bl.Problem(
            bl.Stationary(lambda z, x, data: problem.inner(z, x, data["inner"])),
            lambda z, x, data: problem.outer(z, x, data["outer"]),
        )
        hypergradient = bl.value_and_hypergradient(
            declared,
            bl.HessianFree(max_steps=options["newton_steps"], cg_steps=DIRECTION_STEPS),
            bl.Implicit(bl.CG(max_steps=ADJOINT_STEPS)),
            on_failure="ignore",
        )
        if options["optimizer"] == "adam":
            optimizer = optax.adam(options["rate"])
        else:
            # Clip each entry of a step to [−1, 1]. In the logistic problem, x holds logarithms of penalties, and the
            # outer value is flat where a penalty is very large or very small. A longer step could leave x there.
            optimizer = optax.chain(optax.scale_by_lbfgs(), optax.scale(-options["rate"]), optax.clip(1.0))
        self._z, self._x = jnp.asarray(data.z), jnp.asarray(data.x)
        self._start = optimizer.init(self._x)

        @jax.jit
        def block(z, x, adjoint, state, arrays):
            def step(carry, _):
                z, x, adjoint, state = carry
                out = hypergradient(x, z, arrays, linear_init=adjoint)
                update, moved = optimizer.update(out.gradient, state, x)
                goes_on = jnp.linalg.norm(out.gradient) > STOP
                x, state = jax.tree.map(partial(jnp.where, goes_on), (x + update, moved), (x, state))
                return (out.inner.w, x, out.linear.solution, state), None

            return jax.lax.scan(step, (z, x, adjoint, state), length=settings["block"])[0]

        self._block = lambda *carry: block(*carry, arrays)
        inner, outer = data.sizes
        products = options["newton_steps"] * DIRECTION_STEPS + ADJOINT_STEPS + 1
        self._cost = settings["block"] * (inner * (products + options["newton_steps"] + 2) + 2 * outer)

    def run(self, callback) -> None:
        """Take blocks of steps while ``callback()`` is true."""
        self.inner_var, self.outer_var, self.oracles = self._z, self._x, 0
        adjoint, state = 0 * self._z, self._start
        while callback():
            self.inner_var, self.outer_var, adjoint, state = self._block(
                self.inner_var, self.outer_var, adjoint, state
            )  # fmt: skip
            self.oracles += self._cost


def build(settings: dict):
    """Return our solver for settings, which have the same keys as those of the peer's worker."""
    from benchmarks.bilevel.problems import PROBLEMS, Data

    problem = PROBLEMS[settings["problem"]]
    data = Data.load(Path(settings["arrays"])).shuffled(settings["seed"])
    return (FullBatch if settings["algorithm"] == "full batch" else Stochastic)(problem, data, settings)


if __name__ == "__main__":
    core = int(sys.argv[1])
    os.sched_setaffinity(0, {core})
    from benchmarks.bilevel.turns import serve

    serve(build, core)
