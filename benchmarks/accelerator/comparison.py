"""Comparison of the ways to compute a meta-gradient on this machine, by time and by distance from float64."""

import dataclasses
import json
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel.verify.precision import as_double, double_precision
from imaml.learning.meta_gradient import meta_gradient
from imaml.learning.networks import PRODUCTS
from imaml.runs.meta_step import initial_state
from imaml.runs.versions import versions
from imaml.settings.parts import CONVOLUTIONS
from imaml.settings.preset import Preset
from imaml.storage.files import write_whole

TOGETHER = ("one", "groups", "all")
"""Which tasks are computed together, see :class:`Way`."""
GROUP = 8
"""Greatest number of tasks in a group that is computed together."""
LARGEST_DISTANCE = 0.05
"""A way counts as accurate if its meta-gradient has at most this relative distance from the one in float64.

This distance is small: the meta-gradient of a few tasks differs far more from its expectation over tasks.
"""


@dataclass(frozen=True)
class Way:
    """A way to compute the same meta-gradient.

    Attributes:
        together: which tasks are computed together: only ``"one"``, ``"groups"`` of at most :data:`GROUP` tasks, or
            ``"all"``.
        convolutions: see :func:`imaml.learning.networks.convolution`.
        products: a key of :data:`imaml.learning.networks.PRODUCTS`.
    """

    together: str
    convolutions: str
    products: str

    @classmethod
    def parse(cls, text: str) -> "Way":
        """Return the way that ``TOGETHER:CONVOLUTIONS:PRODUCTS`` describes.

        Raises:
            ValueError: if ``text`` describes no way.
        """
        words = text.split(":")
        choices = (TOGETHER, CONVOLUTIONS, tuple(PRODUCTS))
        if len(words) != 3 or any(word not in known for word, known in zip(words, choices, strict=True)):
            known = ":".join("{" + ",".join(names) + "}" for names in choices)
            raise ValueError(f"there is no way {text!r}: the words are {known}")
        return cls(*words)

    def of(self, preset: Preset) -> Preset:
        """Return ``preset`` computed in this way."""
        network = dataclasses.replace(preset.network, convolutions=self.convolutions, products=self.products)
        outer = dataclasses.replace(preset.outer, at_once=self.at_once(preset.outer.tasks))
        return dataclasses.replace(preset, network=network, outer=outer)

    def at_once(self, tasks: int) -> int:
        """Return the number of tasks that are computed together, for meta-steps of ``tasks`` tasks."""
        return {"one": 1, "groups": min(GROUP, tasks), "all": tasks}[self.together]

    def options(self, tasks: int) -> list[str]:
        """Return the options of ``imaml train`` that select this way, for meta-steps of ``tasks`` tasks."""
        chosen = {
            "network.convolutions": self.convolutions,
            "network.products": self.products,
            "outer.at_once": self.at_once(tasks),
        }
        return [word for path, value in chosen.items() for word in (f"--{path}", str(value))]


@dataclass(frozen=True)
class Measurement:
    """Time and accuracy of one way.

    Attributes:
        way: the way.
        seconds: seconds of one task, the median over calls. Infinite if the way failed.
        distance: ‖g − g₆₄‖/‖g₆₄‖ for the meta-gradient g and its float64 value g₆₄. Infinite if the way failed, or if
            no task has a usable gradient.
        compilation: seconds of the compilation. Several ways are compiled at the same time.
        error: the error with which the way failed, otherwise empty.
    """

    way: Way
    seconds: float
    distance: float
    compilation: float
    error: str = ""


def compare(preset: Preset, source: Any, seconds: float = 1.0) -> list[Measurement]:
    """Measure ways to compute the meta-gradient of one batch of tasks at the preset's initial θ.

    First all pairs of a grouping and a convolution are compared in float32. Then the fastest pair is measured in the
    other precisions.

    Args:
        preset: the settings. ``preset.outer.tasks`` is the number of tasks.
        source: the training classes' pixels, uint8 ``[classes, samples, height, width, channels]``.
        seconds: least total time of the timed calls of each way. Compilation and the first call are not timed.
    """
    keys = jax.random.split(preset.keys.train, preset.outer.tasks)
    batch = jax.jit(lambda source, keys: preset.training_episode.batch(source, keys, preset.turns(training=True)))
    tasks = batch(source, keys)
    theta = initial_state(preset).theta
    exact = _in_float64(preset, theta, tasks)
    in_float32 = [Way(together, method, "float32") for together in TOGETHER for method in CONVOLUTIONS]
    measured = _measured(in_float32, preset, theta, tasks, exact, seconds)
    fastest = min(measured, key=lambda each: each.seconds).way
    others = [dataclasses.replace(fastest, products=products) for products in PRODUCTS if products != "float32"]
    return measured + _measured(others, preset, theta, tasks, exact, seconds)


def best(measured: Iterable[Measurement]) -> Way:
    """Return the fastest way whose distance from float64 is at most :data:`LARGEST_DISTANCE`.

    If there is none, return the fastest way in float32.
    """
    measured = sorted(measured, key=lambda each: each.seconds)
    accurate = [each for each in measured if each.distance <= LARGEST_DISTANCE]
    return (accurate or [each for each in measured if each.way.products == "float32"])[0].way


def saved(path: Path, preset: Preset, source: Any) -> Way:
    """Return the best way on this machine, from the file ``path`` if it has the same device, versions and settings.

    Otherwise compare the ways, print the table and write the file.
    """
    machine = {"device": jax.devices()[0].device_kind, "versions": versions(), "config": preset.config()}
    if path.exists() and (content := json.loads(path.read_text()))["machine"] == machine:
        return Way(**content["chosen"])
    measured = compare(preset, source)
    chosen = best(measured)
    print(table(measured, preset.outer.tasks), flush=True)
    content = {"machine": machine, "chosen": asdict(chosen), "measured": [asdict(each) for each in measured]}
    write_whole(path, lambda stream: stream.write(json.dumps(content, indent=1).encode()))
    return chosen


def table(measured: list[Measurement], tasks: int) -> str:
    """Return one line for each way, the fastest first."""
    lines = [f"{'together':10}{'convolutions':14}{'products':15}{'ms a task':>10}{'tasks/s':>9}{'from float64':>14}"]
    for each in sorted(measured, key=lambda each: each.seconds):
        words = f"{each.way.together:10}{each.way.convolutions:14}{each.way.products:15}"
        numbers = f"{1e3 * each.seconds:10.3f}{1 / each.seconds:9.0f}{each.distance:14.1e}  compiled in "
        lines.append(words + (each.error or numbers + f"{each.compilation:.0f} s"))
    return "\n".join([*lines, f"({tasks} tasks in a meta-step)"])


def _measured(ways, preset, theta, tasks, exact, seconds):
    with ThreadPoolExecutor(len(ways)) as threads:
        programs = [threads.submit(_compiled, way.of(preset), theta, tasks) for way in ways]
    return [_timed(way, program, theta, tasks, exact, seconds) for way, program in zip(ways, programs, strict=True)]


def _compiled(preset, theta, tasks):
    begun = time.monotonic()
    program = jax.jit(meta_gradient(preset.learner, at_once=preset.outer.at_once)).lower(theta, tasks).compile()
    return program, time.monotonic() - begun


def _timed(way, future, theta, tasks, exact, seconds):
    try:
        program, compilation = future.result()
        gradient = jax.block_until_ready(program(theta, tasks)).gradient
        times = []
        while sum(times) < seconds or len(times) < 3:
            begun = time.perf_counter()
            jax.block_until_ready(program(theta, tasks))
            times.append(time.perf_counter() - begun)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory, or an unsupported product
        return Measurement(way, float("inf"), float("inf"), 0.0, str(error).split("\n")[0][:100])
    return Measurement(way, statistics.median(times) / len(tasks.query_y), _distance(gradient, exact), compilation)


def _in_float64(preset, theta, tasks):
    with double_precision():
        double = as_double((theta, tasks))
        gradient = jax.jit(meta_gradient(preset.learner, at_once=preset.outer.tasks))(*double).gradient
        return jax.tree.map(np.asarray, gradient)


def _distance(gradient, exact):
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True))
    difference = sum(float(np.sum((np.asarray(a, np.float64) - b) ** 2)) for a, b in pairs)
    size = sum(float(np.sum(b**2)) for _, b in pairs)
    return (difference / size) ** 0.5 if size else float("inf")
