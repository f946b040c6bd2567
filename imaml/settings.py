"""The settings of a run as one frozen record, and how they are named, changed, saved and restored.

A preset holds the very objects that do the work (``bl.GradientDescent``, ``bl.CG``, ``Episode``), so there
is no second list of options to keep in step: every number and switch of every one of them can be set on the
command line as ``--field.subfield VALUE``.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

import bilevel as bl
from imaml import networks
from imaml.algorithms import ALGORITHMS, Learner, learner_of, reference_learner
from imaml.errors import InputError
from imaml.problem import cross_entropy, squared_error
from imaml.tasks import Curve, Episode

FINN = "Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation, ICML 2017 (arXiv 1703.03400)"
NICHOL = "Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018 (arXiv 1803.02999)"
RAJESWARAN = "Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, NeurIPS 2019 (arXiv 1909.04630)"

CITATIONS = {"imaml": RAJESWARAN, "maml": FINN, "fomaml": FINN, "reptile": NICHOL}
FIDELITIES = ("paper", "reference-code")
LOSSES = {"accuracy": cross_entropy, "mean squared error": squared_error}
"""The loss of both sets, by the metric that a task is judged by."""


@dataclass(frozen=True)
class Conv4:
    """The four-block convolutional network of Finn et al. (2017); see :func:`imaml.networks.conv4`.

    Args:
        filters: channels of each block.
        kernel_gain: factor on Glorot's initial kernels; see :func:`imaml.networks.conv4`.
        head_gain: the same of the linear layer's initial matrix.
        head_bias: the linear layer's biases start uniform between 0 and this.
        pooling: 2×2 max-pooling at stride 1, for Mini-ImageNet, in place of stride 2.
        image_shape: height, width and channels.
    """

    filters: int = 64
    kernel_gain: float = 1.0
    head_gain: float = 1.0
    head_bias: float = 0.0
    pooling: bool = False
    image_shape: tuple[int, int, int] = (28, 28, 1)

    def __post_init__(self):
        _check(self.filters >= 1, f"network.filters must be at least 1, got {self.filters}")
        _check(self.kernel_gain > 0, f"network.kernel_gain must be above 0, got {self.kernel_gain}")
        _check(self.head_gain > 0, f"network.head_gain must be above 0, got {self.head_gain}")
        _check(self.head_bias >= 0, f"network.head_bias must be at least 0, got {self.head_bias}")

    def build(self, ways: int) -> networks.Network:
        """The functions for ``ways`` classes."""
        return self._build(ways, jax.nn.relu, networks.max_pool)

    def smooth_twin(self, ways: int) -> networks.Network:
        """The same sizes without kinks: softplus for ReLU, means for maxima."""
        return self._build(ways, networks.smooth_relu, networks.mean_pool)

    def _build(self, ways, activation, pool):
        return networks.conv4(
            ways, self.filters, self.image_shape, self.kernel_gain, activation, self.head_gain, self.head_bias,
            pool if self.pooling else None,
        )  # fmt: skip


@dataclass(frozen=True)
class MLP:
    """Two hidden layers between one number and another, as Finn et al. (2017) regress with.

    Args:
        hidden: units of each hidden layer.
    """

    hidden: int = 40

    def __post_init__(self):
        _check(self.hidden >= 1, f"network.hidden must be at least 1, got {self.hidden}")

    def build(self, outputs: int) -> networks.Network:
        """The functions for ``outputs`` numbers."""
        return networks.mlp((1, self.hidden, self.hidden, outputs))

    def smooth_twin(self, outputs: int) -> networks.Network:
        """The same sizes with softplus for ReLU."""
        return networks.mlp((1, self.hidden, self.hidden, outputs), networks.smooth_relu)


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
        queries: query images of each class of a training task, or query points of a curve.
        steps: meta-steps of a run.
        epsilon: Adam's ε.
        at_once: tasks that a device computes together; see :func:`imaml.meta_gradient`.
    """

    learning_rate: float
    tasks: int
    queries: int
    steps: int
    final_fraction: float = 1.0
    epsilon: float = 1e-8
    at_once: int = 1

    def __post_init__(self):
        _check(self.learning_rate > 0, f"outer.learning_rate must be above 0, got {self.learning_rate}")
        _check(self.tasks >= 1, f"outer.tasks must be at least 1, got {self.tasks}")
        _check(self.queries >= 1, f"outer.queries must be at least 1, got {self.queries}")
        _check(self.steps >= 1, f"outer.steps must be at least 1, got {self.steps}")
        _check(0 <= self.final_fraction <= 1, f"outer.final_fraction must lie in [0, 1], got {self.final_fraction}")
        _check(self.epsilon > 0, f"outer.epsilon must be above 0, got {self.epsilon}")
        _check(self.at_once >= 1, f"outer.at_once must be at least 1, got {self.at_once}")


@dataclass(frozen=True)
class Adaptation:
    """How one of the other algorithms adapts to a support set.

    Args:
        inner: descent on the support loss alone.
        test_steps: its steps in evaluation; 0 for as many as in training.
    """

    inner: bl.GradientDescent
    test_steps: int = 0


@dataclass(frozen=True)
class Baselines:
    """The inner loops of the algorithms beside implicit MAML, which a preset becomes with another ``--algorithm``.

    Args:
        maml: of MAML and first-order MAML.
        reptile: of Reptile.
    """

    maml: Adaptation
    reptile: Adaptation

    def of(self, algorithm: str) -> Adaptation:
        """That of an algorithm."""
        return self.reptile if algorithm == "reptile" else self.maml


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

    A field with a default was added later: the default is what was done before there was the field, so that
    settings which were saved without it are still the same settings.

    Args:
        name: what to type.
        dataset: ``"glyphs"`` (embedded), ``"sinusoid"`` (drawn), ``"omniglot"`` or ``"miniimagenet"`` (need files).
        episode: what a task is; in training ``outer.queries`` stands for its queries.
        rotations: of the images, in training and in evaluation; None where there is nothing to turn.
        network: the network's size.
        strength: λ of the proximal term, on the mean support loss; implicit MAML's alone.
        inner: the inner solver.
        linear: the solver of (I + H/λ)g = v; implicit MAML's alone.
        outer: optimiser, meta-batch, length.
        seed: of the parameters, the tasks, everything.
        algorithm: one of :data:`imaml.algorithms.ALGORITHMS`; :meth:`using` changes it together with the inner solver.
        fidelity: ``"paper"``, the equations; ``"reference-code"``, what the authors' public code computes.
        test_steps: inner steps in evaluation; 0 for as many as in training.
        citation: the publication it follows.
        departures: where it does something else, and why, a sentence each.
        baselines: the other algorithms' inner loops, after what is published for this kind of task.
    """

    name: str
    dataset: str
    episode: Episode | Curve
    rotations: Rotations | None
    network: Conv4 | MLP
    strength: float
    inner: bl.GradientDescent | bl.HessianFree
    linear: bl.CG
    outer: Outer
    seed: int = 0
    algorithm: str = "imaml"
    fidelity: str = "paper"
    test_steps: int = 0
    citation: str = RAJESWARAN
    departures: tuple[str, ...] = field(default=(), repr=False)
    baselines: Baselines | None = field(default=None, repr=False)

    def __post_init__(self):
        _check(0 < self.strength < float("inf"), f"strength (λ) must be above 0 and finite, got {self.strength}")
        known = type(self.inner) in (bl.GradientDescent, bl.HessianFree)
        _check(known, f"inner must be a GradientDescent or HessianFree, got {self.inner}")
        plain = type(self.linear) is bl.CG and self.linear.preconditioner is None
        _check(plain, f"linear must be a CG without a preconditioner, got {self.linear}")
        _check(self.inner.tol is None, "inner.tol must be None: a preset spends its budget of inner steps")
        # JAX drops what lies above 32 bits: a larger seed would silently be another one.
        _check(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2**32, got {self.seed}")
        _check(self.test_steps >= 0, f"test_steps must be at least 0, got {self.test_steps}")
        _check_choice("algorithm", self.algorithm, tuple(ALGORITHMS))
        _check_choice("fidelity", self.fidelity, FIDELITIES)
        literal = self.algorithm == "imaml" and self.fidelity == "paper"
        descends = type(self.inner) is bl.GradientDescent
        _check(literal or descends, f"inner must be a GradientDescent for {self.title}, got {self.inner}")
        alone = self.fidelity == "paper" or self.algorithm == "imaml"
        _check(alone, f"the reference code has implicit MAML alone, so no algorithm {self.algorithm}")

    @property
    def title(self) -> str:
        """The algorithm's name, as a person says it."""
        name = ALGORITHMS[self.algorithm]
        return name if self.fidelity == "paper" else f"{name} as the authors' public code computes it"

    def using(self, algorithm: str) -> "Preset":
        """This preset with another algorithm, and with that one's inner loop; all else stays equal.

        Raises:
            InputError: for an unknown algorithm, or one that is not known for this preset.
        """
        _check_choice("algorithm", algorithm, tuple(ALGORITHMS))
        if algorithm == self.algorithm:
            return self
        _check(
            self.algorithm == "imaml" and self.baselines is not None,
            f"{self.name} with {self.title} has no inner loop for {algorithm}: start from another preset as published",
        )
        adaptation = self.baselines.of(algorithm)  # type: ignore[union-attr]
        return dataclasses.replace(
            self,
            algorithm=algorithm,
            inner=adaptation.inner,
            test_steps=adaptation.test_steps,
            citation=CITATIONS[algorithm],
            departures=_AS_A_BASELINE[algorithm],
        )

    @property
    def training_episode(self) -> Episode | Curve:
        """The tasks of the outer loop."""
        return dataclasses.replace(self.episode, queries=self.outer.queries)

    @property
    def functions(self) -> networks.Network:
        """The network for this preset's tasks."""
        return self.network.build(self.episode.outputs)

    @property
    def learner(self) -> Learner:
        """The network and algorithm, ready for :func:`imaml.meta_gradient`."""
        apply, loss = self.functions.apply, LOSSES[self.episode.metric]
        if self.fidelity == "reference-code":
            assert isinstance(self.inner, bl.GradientDescent)  # as checked above
            return reference_learner(apply, loss, self.inner, self.linear, self.strength)
        return learner_of(self.algorithm, apply, loss, self.inner, self.linear, self.strength)

    @property
    def test_learner(self) -> Learner:
        """The learner with as many inner steps as in evaluation."""
        if not self.test_steps:
            return self.learner
        return dataclasses.replace(self, inner=dataclasses.replace(self.inner, steps=self.test_steps)).learner

    def turns(self, training: bool) -> bool:
        """Whether images are turned by multiples of 90°, in training or in evaluation."""
        if self.rotations is None:
            return False
        return self.rotations.train if training else self.rotations.test

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
        """The settings as plain nested dictionaries, as JSON gives them back."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NO_SETTINGS}
        return json.loads(json.dumps(shown, default=dataclasses.asdict))


_NO_SETTINGS = ("citation", "departures", "baselines")
_FIXED = ("name", "dataset", "fidelity", *_NO_SETTINGS)
"""What the command line cannot change."""

_EQUAL = (
    "A comparison with the preset it is made from: network and its initialisation, outer loop, query images and length "
    "are that preset's, and the inner loop alone follows the publication."
)
_AS_A_BASELINE = {
    "maml": (_EQUAL,),
    "fomaml": (_EQUAL,),
    "reptile": (
        _EQUAL,
        "Plain descent, at a rate of ours, on all support and query examples of a training task stands for the "
        "published Adam on batches of them: accuracy and loss in the log are of examples that were learned from.",
        "Adam moves θ along the mean of θ − φ, for the published step of a fixed size.",
    ),
}


def completed(record: Any, config: dict[str, Any]) -> dict[str, Any]:
    """``config``, saved by this or a former version, with what it lacks: the default of each field that has one.

    A field that was added later has a default, which is what was done before.

    Args:
        record: a preset of the kind that the config was saved of.
        config: what its :meth:`Preset.config` was then.
    """
    filled = dict(config)
    for each in dataclasses.fields(record):
        if each.name in _NO_SETTINGS:
            continue
        if each.default is not dataclasses.MISSING and each.name not in filled:
            filled[each.name] = json.loads(json.dumps(each.default, default=dataclasses.asdict))
        present = getattr(record, each.name)
        if dataclasses.is_dataclass(present) and isinstance(filled.get(each.name), dict):
            filled[each.name] = completed(present, filled[each.name])
    return filled


def with_config(chosen: Preset, config: dict[str, Any]) -> Preset:
    """``chosen`` with the settings that :meth:`Preset.config` once gave, of this or a former version.

    Raises:
        InputError: for settings this version does not know, or that it needs and the other did not have.
    """
    foreign = f"the settings of {chosen.name} were saved by another version"
    try:
        chosen = chosen.using(config.get("algorithm", "imaml"))
        config = completed(chosen, config)
        restored = _with_settings(chosen, config)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{foreign}: {error}") from error
    _check(restored.config() == config, f"{foreign}, which had others")
    return restored


def _with_settings(record, config):
    def value_of(key, value):
        if isinstance(value, dict):
            return _with_settings(getattr(record, key), value)
        return tuple(value) if isinstance(value, list) else value

    return dataclasses.replace(record, **{key: value_of(key, value) for key, value in config.items()})


def override(chosen: Preset, path: str, text: str) -> Preset:
    """``chosen`` with the field at ``path`` ("strength", "inner.steps") read from ``text``.

    Another algorithm comes with its own inner loop, see :meth:`Preset.using`: override it first.

    Raises:
        InputError: for a path that does not exist, with those that do, and for a value of another type.
    """
    paths = settings(chosen)
    if path not in paths:
        near = difflib.get_close_matches(path, paths, n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise InputError(f"there is no setting --{path}: {hint}known: {', '.join(f'--{p}' for p in paths)}")
    if path == "algorithm":
        return chosen.using(text)
    return _replace(chosen, path.split("."), _parse(path, text, paths[path]))


def settings(chosen: Preset) -> dict[str, Any]:
    """Every setting that can be overridden and has a part in the numbers, by its dotted path, with its value."""
    found: dict[str, Any] = {}
    for name, value in _fields(chosen).items():
        idle = chosen.algorithm != "imaml" and name in ("strength", "linear")
        if name in _FIXED or idle or value is None:
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


def _check_choice(name, value, known):
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"there is no {name} {value!r}: {hint}known: {', '.join(known)}")
