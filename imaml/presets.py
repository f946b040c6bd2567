"""One frozen record for each published setting, with its citation and, in words, where it departs from it.

A preset holds the very objects that do the work (``bl.GradientDescent``, ``bl.CG``, ``Episode``), so there
is no second list of options to keep in step: every number and switch of every one of them can be set on the
command line as ``--field.subfield VALUE``.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

import bilevel as bl
from imaml import networks
from imaml.algorithms import Learner
from imaml.errors import InputError
from imaml.tasks import Episode

RAJESWARAN = "Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, NeurIPS 2019 (arXiv 1909.04630)"


@dataclass(frozen=True)
class Conv4:
    """The four-block convolutional network of Finn et al. (2017); see :func:`imaml.networks.conv4`.

    Args:
        filters: channels of each block.
        kernel_gain: factor on Glorot's initial kernels; see :func:`imaml.networks.conv4`.
    """

    filters: int = 64
    kernel_gain: float = 1.0

    def __post_init__(self):
        _check(self.filters >= 1, f"network.filters must be at least 1, got {self.filters}")
        _check(self.kernel_gain > 0, f"network.kernel_gain must be above 0, got {self.kernel_gain}")

    def build(self, ways: int, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu) -> networks.Network:
        """The pair of functions for ``ways`` classes."""
        return networks.conv4(ways, self.filters, kernel_gain=self.kernel_gain, activation=activation)


@dataclass(frozen=True)
class Rotations:
    """Whether each class of each task is turned by a random multiple of 90°.

    Args:
        train: in training, where it makes four classes of one.
        test: in evaluation.
    """

    train: bool = False
    test: bool = False


@dataclass(frozen=True)
class Outer:
    """The outer loop: Adam on the meta-gradient.

    Args:
        learning_rate: Adam's rate at the first meta-step.
        final_fraction: the rate at the last meta-step as a fraction of the first, along half a cosine; 1 for a
            constant rate.
        tasks: tasks in a meta-step.
        queries: query images of each class of a training task.
        steps: meta-steps of a run.
    """

    learning_rate: float
    tasks: int
    queries: int
    steps: int
    final_fraction: float = 1.0

    def __post_init__(self):
        _check(self.learning_rate > 0, f"outer.learning_rate must be above 0, got {self.learning_rate}")
        _check(self.tasks >= 1, f"outer.tasks must be at least 1, got {self.tasks}")
        _check(self.queries >= 1, f"outer.queries must be at least 1, got {self.queries}")
        _check(self.steps >= 1, f"outer.steps must be at least 1, got {self.steps}")
        _check(0 <= self.final_fraction <= 1, f"outer.final_fraction must lie in [0, 1], got {self.final_fraction}")


class Keys(NamedTuple):
    """The three independent streams of random numbers of a run.

    Attributes:
        init: of the first parameters.
        train: of the training tasks; with the number of a meta-step it decides that step's tasks.
        test: of the evaluation tasks, which are the same at every evaluation.
    """

    init: jax.Array
    train: jax.Array
    test: jax.Array


@dataclass(frozen=True)
class Preset:
    """Everything that decides the numbers of a run.

    Args:
        name: what to type.
        dataset: ``"glyphs"`` (embedded) or ``"omniglot"`` (needs its archives).
        episode: ways, shots and queries of a task; in training ``outer.queries`` stands for its queries.
        rotations: of the images, in training and in evaluation.
        network: the network's size.
        strength: λ of the proximal term, on the mean support loss.
        inner: the inner solver.
        linear: the solver of (I + H/λ)g = v.
        outer: optimiser, meta-batch, length.
        seed: of the parameters, the tasks, everything.
        citation: the publication it follows.
        departures: where it does something else, and why, a sentence each.
    """

    name: str
    dataset: str
    episode: Episode
    rotations: Rotations
    network: Conv4
    strength: float
    inner: bl.GradientDescent
    linear: bl.CG
    outer: Outer
    seed: int = 0
    citation: str = RAJESWARAN
    departures: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self):
        _check(0 < self.strength < float("inf"), f"strength (λ) must be above 0 and finite, got {self.strength}")
        _check(type(self.inner) is bl.GradientDescent, f"inner must be a GradientDescent, got {self.inner}")
        plain = type(self.linear) is bl.CG and self.linear.preconditioner is None
        _check(plain, f"linear must be a CG without a preconditioner, got {self.linear}")
        _check(self.inner.tol is None, "inner.tol must be None: a preset spends its budget of inner steps")
        # JAX drops what lies above 32 bits: a larger seed would silently be another one.
        _check(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2**32, got {self.seed}")

    @property
    def training_episode(self) -> Episode:
        """The tasks of the outer loop."""
        return dataclasses.replace(self.episode, queries=self.outer.queries)

    @property
    def learner(self) -> Learner:
        """The network and algorithm, ready for :func:`imaml.meta_gradient`."""
        return Learner(
            apply=self.network.build(self.episode.ways).apply,
            solver=self.inner,
            method=bl.Implicit(self.linear),
            strength=self.strength,
        )

    @property
    def keys(self) -> Keys:
        """All randomness of a run, split from the seed here and nowhere else."""
        return Keys(*jax.random.split(jax.random.key(self.seed), 3))

    def deviations(self) -> tuple[str, ...]:
        """Where the preset of this name departs from its citation, a sentence each.

        They speak of the preset as it is published here, not of settings that were changed since.
        """
        return self.departures

    def config(self) -> dict[str, Any]:
        """The settings as plain nested dictionaries, for JSON and for comparison."""
        settings = dataclasses.asdict(self)
        del settings["citation"], settings["departures"]
        return settings


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: for an unknown name, with the nearest ones.
    """
    if name in _PRESETS:
        return _PRESETS[name]
    near = difflib.get_close_matches(name, _PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else ""
    raise InputError(f"there is no preset {name!r}: {hint} known: {', '.join(_PRESETS)}".replace(":  known", ": known"))


def presets() -> tuple[str, ...]:
    """The names of all presets, the default first."""
    return tuple(_PRESETS)


def restore(name: str, config: dict[str, Any]) -> Preset:
    """The preset of that name with the settings that :meth:`Preset.config` once gave.

    Raises:
        InputError: for an unknown name, or settings this version does not know.
    """
    try:
        restored = _with_settings(preset(name), config)
    except (TypeError, AttributeError) as error:
        raise InputError(f"the settings of {name} were saved by another version: {error}") from error
    _check(restored.config() == config, f"the settings of {name} were saved by another version, which had others")
    return restored


def _with_settings(record, config):
    changes = {
        key: _with_settings(getattr(record, key), value) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    return dataclasses.replace(record, **changes)


def override(chosen: Preset, path: str, text: str) -> Preset:
    """``chosen`` with the field at ``path`` ("strength", "inner.steps") read from ``text``.

    Raises:
        InputError: for a path that does not exist, with those that do, and for a value of another type.
    """
    paths = settings(chosen)
    if path not in paths:
        near = difflib.get_close_matches(path, paths, n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise InputError(f"there is no setting --{path}: {hint}known: {', '.join(f'--{p}' for p in paths)}")
    return _replace(chosen, path.split("."), _parse(path, text, paths[path]))


def settings(chosen: Preset) -> dict[str, Any]:
    """Every setting that can be overridden, by its dotted path, with its present value."""
    found: dict[str, Any] = {}
    for name, value in _fields(chosen).items():
        if name in ("name", "dataset", "citation", "departures"):
            continue
        if dataclasses.is_dataclass(value):
            found |= {f"{name}.{inner}": v for inner, v in _fields(value).items() if isinstance(v, bool | int | float)}
        else:
            found[name] = value
    return found


def _fields(record):
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _parse(path, text, present):
    if isinstance(present, bool):
        values = {"true": True, "false": False}
        _check(text.lower() in values, f"--{path} takes true or false, got {text!r}")
        return values[text.lower()]
    kind, what = (int, "a whole number") if isinstance(present, int) else (float, "a number")
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"--{path} takes {what}, got {text!r}") from None
    # Beyond this no count fits the compiled loops, and no seed a key.
    _check(math.isfinite(value) if kind is float else abs(value) < 2**32, f"--{path} is out of range: {text!r}")
    return value


def _replace(record, path, value):
    if len(path) > 1:
        value = _replace(getattr(record, path[0]), path[1:], value)
    try:
        return dataclasses.replace(record, **{path[0]: value})
    except InputError:
        raise
    except ValueError as error:  # the generic layer's own checks
        raise InputError(str(error)) from error


def _check(condition, message):
    if not condition:
        raise InputError(message)


_STIFF_KERNELS = (
    "Kernels start at ten times Glorot's size, so that a task adapts mostly by its last layer and I + H/λ is better "
    "conditioned: with --network.kernel_gain 1 the log's linear_residual is about twice as large from the start."
)
_SMALL_STRENGTH = (
    "λ = 0.1 on the mean support loss and an inner rate of 0.2, where the paper gives λ = 2 for Omniglot and no rate "
    "in its tables; 16 inner steps and 5 CG steps are the paper's."
)
_SHORT = (
    "Sized for minutes on two cores: 32 filters for 64, 4 tasks in a meta-step, 15 query images of each class in "
    "training (evaluation takes 1, as published), Adam from 0.005 to 0 along half a cosine in some thousand meta-steps."
)

_GLYPHS = Preset(
    name="glyphs-5way-1shot-gd",
    dataset="glyphs",
    episode=Episode(ways=5, shots=1, queries=1),
    rotations=Rotations(),
    network=Conv4(filters=32, kernel_gain=10.0),
    strength=0.1,
    inner=bl.GradientDescent(step_size=0.2, steps=16),
    linear=bl.CG(maxiter=5),
    outer=Outer(learning_rate=5e-3, tasks=4, queries=15, steps=3000, final_fraction=0.0),
    departures=(
        "Characters drawn from fonts stand for Omniglot's handwriting, and whole scripts are held out.",
        _STIFF_KERNELS,
        _SMALL_STRENGTH,
        _SHORT,
    ),
)

_OMNIGLOT = dataclasses.replace(
    _GLYPHS,
    name="omniglot-5way-1shot-gd",
    dataset="omniglot",
    rotations=Rotations(train=True, test=True),
    outer=dataclasses.replace(_GLYPHS.outer, steps=4000),
    departures=(_STIFF_KERNELS, _SMALL_STRENGTH, _SHORT),
)

_PRESETS = {chosen.name: chosen for chosen in (_GLYPHS, _OMNIGLOT)}
