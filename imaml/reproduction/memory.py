"""Figure 2b: the memory of one task's meta-gradient as a function of the number of inner steps.

XLA reports the bytes of temporary buffers that a compiled program allocates, without its arguments and results. The
program is not run.

Source: Rajeswaran et al. (2019), figure 2b.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import bilevel as bl
from imaml.errors import InputError
from imaml.learning.networks import Network, conv4
from imaml.learning.problem import cross_entropy, task_problem
from imaml.learning.tasks import Task

STEPS = (16, 128, 1000)
WAYS, SHOTS, IMAGE = 20, 5, (28, 28, 1)
METHODS: Mapping[str, bl.Method] = {
    "iMAML, 5 CG steps": bl.Implicit(bl.CG(5)),
    "MAML, unrolled": bl.Unrolled(),
    "MAML, steps recomputed": bl.Unrolled(checkpoint=True),
}


@dataclass(frozen=True)
class Memory:
    """Temporary memory of meta-gradients, in bytes.

    Attributes:
        steps: numbers of inner gradient steps.
        temporary: bytes by method, one number for each entry of ``steps``.
        problem: description of the problem.
    """

    steps: tuple[int, ...]
    temporary: dict[str, tuple[int, ...]]
    problem: str


def memory(
    steps: Sequence[int] = STEPS,
    network: Network | None = None,
    ways: int = WAYS,
    shots: int = SHOTS,
    on_event: Callable[[str], None] = lambda message: None,
) -> Memory:
    """Compile the meta-gradient of one task for each method and number of steps, and read its temporary memory.

    Args:
        steps: numbers of inner gradient steps.
        network: a network for images of shape ``(28, 28, 1)``; by default the published one, four blocks of 64 filters.
        ways: number of classes of the task.
        shots: number of support images, and of query images, of each class.
        on_event: called with a message before the programs of a method are compiled.

    Raises:
        InputError: if XLA does not report a program's memory on this backend.
    """
    network = network or conv4(ways)
    problem = task_problem(network.apply, cross_entropy, 2.0)  # Memory does not depend on the value of λ.
    shapes = jax.eval_shape(network.init, jax.random.key(0)), _task_shapes(ways * shots)
    found = {name: [] for name in METHODS}
    for name, method in METHODS.items():
        on_event(f"compiling {name}, with {', '.join(map(str, steps))} inner steps")
        for count in steps:
            found[name].append(_temporary(problem, bl.GradientDescent(0.1, count), method, shapes))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes[0]))
    words = f"one task of {ways}-way {shots}-shot, {size:,} parameters, {jax.default_backend().upper()}, float32"
    return Memory(tuple(steps), {name: tuple(values) for name, values in found.items()}, words)


def _task_shapes(images):
    x: Any = jax.ShapeDtypeStruct((images, *IMAGE), jnp.float32)
    y: Any = jax.ShapeDtypeStruct((images,), jnp.int32)
    return Task(x, y, x, y)


def _temporary(problem, solver, method, shapes):
    hypergradient = bl.value_and_hypergradient(problem, solver, method, on_failure="ignore")
    program = jax.jit(lambda theta, task: hypergradient(theta, bl.identity_center, task).gradient)
    analysis = program.lower(*shapes).compile().memory_analysis()
    if analysis is None:
        raise InputError(f"XLA reports no program memory on {jax.default_backend()}: try JAX_PLATFORMS=cpu")
    return int(analysis.temp_size_in_bytes)


def shown(found: Memory) -> str:
    """Format the memory as a text table in MiB with one line for each method."""
    width = max(map(len, found.temporary))
    lines = [f"{'inner steps':{width}}" + "".join(f"{count:>12}" for count in found.steps)]
    lines += [
        f"{name:{width}}" + "".join(f"{size / 2**20:12.2f}" for size in sizes)
        for name, sizes in found.temporary.items()
    ]
    return "\n".join([f"Temporary memory of a meta-gradient, MiB: {found.problem}", *lines])
