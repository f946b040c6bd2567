"""A preset and a dataset so small that a training run of a few steps takes seconds."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

import bilevel as bl
import imaml
from imaml.datasets.images import ImageClasses, ImageDataset
from imaml.learning import networks
from imaml.learning.tasks import Episode
from imaml.settings.parts import Outer


@dataclass(frozen=True)
class TinyMLP:
    """A small MLP that compiles in about a second. The tests that use it are not about the network."""

    hidden: int = 4

    def build(self, ways):
        network = networks.mlp((28 * 28, self.hidden, ways))
        return networks.Network(network.init, lambda p, x: network.apply(p, x.reshape(len(x), -1)))


@dataclass(frozen=True)
class Normalised:
    """A linear layer, batch normalisation, ReLU and a linear layer."""

    hidden: int = 5
    tells_features: bool = True

    def build(self, ways):
        head = networks.mlp((self.hidden, ways))
        first = networks.mlp((28 * 28, self.hidden))

        def init(key):
            keys = jax.random.split(key)
            return {"first": first.init(keys[0]), "head": head.init(keys[1])}

        def features(parameters, x, reference=None):
            hidden, other = (
                None if each is None else first.apply(parameters["first"], each.reshape(len(each), -1))
                for each in (x, reference)
            )
            other = hidden if other is None else other
            return jax.nn.relu((hidden - other.mean(0)) / jnp.sqrt(other.var(0) + 1e-5))

        def apply(parameters, x, reference=None):
            return head.apply(parameters["head"], features(parameters, x, reference))

        told = (features, features) if self.tells_features else ()
        return networks.Network(init, apply, apply, *told)


@dataclass(frozen=True)
class PermutedEpisode(Episode):
    """Tasks of an :class:`Episode`, but with the labels of the query set in reverse order."""

    def sample(self, pixels, key, rotate=False):
        task = super().sample(pixels, key, rotate)
        return replace(task, query_y=task.query_y[::-1])


def tiny_preset(steps):
    """Return the preset ``tiny``: the smallest tasks, the tiny network, and ``steps`` meta-steps."""
    return replace(
        imaml.preset("glyphs-5way-1shot-gd"),
        name="tiny",
        episode=Episode(ways=2, shots=1, queries=1),
        network=TinyMLP(),
        inner=bl.GradientDescent(0.1, max_steps=2),
        linear=bl.CG(2),
        outer=Outer(learning_rate=1e-2, tasks=2, queries=1, steps=steps),
    )


def dataset(pixels):
    """Return a dataset whose training and test classes have the same pixels."""
    names = {split: tuple(f"{split}{i}" for i in range(len(pixels))) for split in ("train", "test")}
    return ImageDataset("tiny", *(ImageClasses(pixels, names[split]) for split in ("train", "test")))
