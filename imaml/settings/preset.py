"""The settings of a run as one frozen record.

A preset holds the objects that do the work (``bl.GradientDescent``, ``bl.CG``, ``Episode``) instead of copies of their
options. :mod:`imaml.settings.overrides` changes single options of these objects by their dotted paths.
:meth:`Preset.config` returns all settings as plain data, and :meth:`Preset.types` returns the types of the objects.
:mod:`imaml.settings.saved` converts both back to a preset.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

import bilevel as bl
from imaml.errors import InputError, check, check_choice
from imaml.learning import networks
from imaml.learning.algorithms import ALGORITHMS, Learner, make_learner, reference_learner
from imaml.learning.problem import cross_entropy, squared_error
from imaml.learning.tasks import Curve, Episode
from imaml.settings.meanings import NO_SETTINGS
from imaml.settings.parts import MLP, NO_VALIDATION, Baselines, Conv4, Outer, Rotations, Validation
from imaml.settings.types import plain, type_name, types_of

FINN = "Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation, ICML 2017 (arXiv 1703.03400)"
NICHOL = "Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018 (arXiv 1803.02999)"
RAJESWARAN = "Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, NeurIPS 2019 (arXiv 1909.04630)"

CITATIONS = {"imaml": RAJESWARAN, "maml": FINN, "fomaml": FINN, "reptile": NICHOL}
FIDELITIES = ("paper", "reference-code")
LOSSES = {"accuracy": cross_entropy, "mean squared error": squared_error}
"""The loss on the support and query sets, by the metric that tasks are evaluated with."""

SAVED_IF_CHANGED = {"validation": NO_VALIDATION}
"""Fields that :meth:`Preset.config` leaves out while they have these defaults.

A run that does not use these fields then saves the same settings as a version that lacks the fields.
"""

_SAME_OUTER_LOOP = (
    "The run is meant for comparison with implicit MAML on the same preset: it keeps the preset's network, "
    "initialisation, outer loop, number of queries and number of meta-steps. It changes only the algorithm and its "
    "inner loop."
)
_BASELINE_DEPARTURES = {
    "maml": (_SAME_OUTER_LOOP,),
    "fomaml": (_SAME_OUTER_LOOP,),
    "reptile": (
        _SAME_OUTER_LOOP,
        "The inner loop is gradient descent on all support and query examples of a training task, with a step size of "
        "our choice; the publication uses Adam on batches of these examples. Training accuracy and loss in the log are "
        "therefore measured on examples that the parameters were adapted to.",
        "The outer loop is Adam on the mean of θ − φ; the publication moves θ by a fixed multiple of the mean.",
    ),
}


class Keys(NamedTuple):
    """The random keys of a run, one for each of its three independent streams.

    Attributes:
        init: key of the initial parameters.
        train: key of the training tasks. The tasks of a meta-step are drawn from this key and the step's number alone.
        test: key of the evaluation tasks, which are the same at every evaluation.
    """

    init: jax.Array
    train: jax.Array
    test: jax.Array


@dataclass(frozen=True)
class Preset:
    """All settings that determine the results of a run.

    Fields with a default may be missing in settings that an earlier version saved. Their defaults are the behaviour of
    that version, so the saved settings keep their meaning. In the following, θ denotes the meta-parameters and φ the
    parameters that are adapted to a task.

    Args:
        name: the name on the command line.
        dataset: ``"glyphs"`` (drawings of characters), ``"sinusoid"`` (sampled), ``"omniglot"``,
            ``"omniglot-alphabets"`` or ``"miniimagenet"`` (these three are read from files), or a name that
            :func:`imaml.register_dataset` has registered or an installed package offers. In the settings of a run on
            one's own data, it is the name of those data.
        episode: how tasks are sampled. Training tasks have ``outer.queries`` queries instead of ``episode.queries``.
        rotations: whether images are rotated in training and in evaluation. None for a dataset without rotations.
        network: the kind and size of the network.
        strength: λ of the proximal term ½ λ‖φ − θ‖², which is added to the mean support loss. Only for implicit MAML.
        inner: the inner solver.
        linear: the solver of the adjoint system; see `imaml.learning.problem`. Only for implicit MAML.
        outer: the outer optimiser, the tasks in a meta-step, and the number of meta-steps.
        seed: the seed of all random numbers, between 0 and 2**32 − 1.
        algorithm: ``"imaml"``, ``"maml"``, ``"fomaml"`` or ``"reptile"``, the keys of
            :data:`imaml.learning.algorithms.ALGORITHMS`. :meth:`using` and the command line change it together with the
            inner solver.
        fidelity: ``"paper"`` for the equations of the paper, ``"reference-code"`` for what the authors' public code
            computes.
        test_steps: inner steps in evaluation; 0 for as many as in training.
        validation: evaluations on validation classes during training; none by default.
        citation: the publication that the preset follows.
        departures: the differences from the publication.
        baselines: the inner loops of the other algorithms. None if the algorithm cannot be changed.

    Raises:
        InputError: if a value is out of range, or if two settings do not fit each other.
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
    validation: Validation = NO_VALIDATION
    citation: str = RAJESWARAN
    departures: tuple[str, ...] = field(default=(), repr=False)
    baselines: Baselines | None = field(default=None, repr=False)

    def __post_init__(self):
        check(0 < self.strength < float("inf"), f"strength (λ) must be above 0 and finite, got {self.strength}")
        supported = type(self.inner) in (bl.GradientDescent, bl.HessianFree)
        check(supported, f"inner must be a GradientDescent or HessianFree, got {self.inner}")
        plain = type(self.linear) is bl.CG and self.linear.preconditioner is None
        check(plain, f"linear must be a CG without a preconditioner, got {self.linear}")
        check(self.inner.tol is None, "inner.tol must be None: a preset always takes all of its inner steps")
        check(type(self.validation) is Validation, f"validation must be a Validation, got {self.validation!r:.100}")
        # JAX drops the bits above the 32nd: seeds that differ by 2**32 would give the same run.
        check(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2**32, got {self.seed}")
        check(self.test_steps >= 0, f"test_steps must be at least 0, got {self.test_steps}")
        check_choice("algorithm", self.algorithm, tuple(ALGORITHMS))
        check_choice("fidelity", self.fidelity, FIDELITIES)
        any_solver = self.algorithm == "imaml" and self.fidelity == "paper"
        descends = type(self.inner) is bl.GradientDescent
        check(any_solver or descends, f"inner must be a GradientDescent for {self.title}, got {self.inner}")
        available = self.fidelity == "paper" or self.algorithm == "imaml"
        check(available, f"the reference code has only implicit MAML, got algorithm {self.algorithm}")

    @property
    def title(self) -> str:
        """The name of the algorithm in reports."""
        name = ALGORITHMS[self.algorithm]
        return name if self.fidelity == "paper" else f"{name} as the authors' public code computes it"

    def using(self, algorithm: str) -> "Preset":
        """Return this preset with another algorithm and with that algorithm's inner loop, citation and departures.

        Args:
            algorithm: a key of :data:`imaml.learning.algorithms.ALGORITHMS`.

        Raises:
            InputError: if the algorithm is unknown, or if this preset has no inner loop for it.
        """
        check_choice("algorithm", algorithm, tuple(ALGORITHMS))
        if algorithm == self.algorithm:
            return self
        check(
            self.algorithm == "imaml" and self.baselines is not None,
            f"{self.name} with {self.title} has no inner loop for {algorithm}: start from a published preset with one",
        )
        adaptation = self.baselines.of(algorithm)  # type: ignore[union-attr]
        return dataclasses.replace(
            self,
            algorithm=algorithm,
            inner=adaptation.inner,
            test_steps=adaptation.test_steps,
            citation=CITATIONS[algorithm],
            departures=_BASELINE_DEPARTURES[algorithm],
        )

    @property
    def training_episode(self) -> Episode | Curve:
        """How training tasks are sampled: as in evaluation, but with ``outer.queries`` queries."""
        return dataclasses.replace(self.episode, queries=self.outer.queries)

    @property
    def functions(self) -> networks.Network:
        """The network for this preset's tasks."""
        return self.network.build(self.episode.outputs)

    @property
    def learner(self) -> Learner:
        """The learner of this preset, for :func:`imaml.meta_gradient`."""
        apply, loss = self.functions.apply, LOSSES[self.episode.metric]
        if self.fidelity == "reference-code":
            assert isinstance(self.inner, bl.GradientDescent)  # checked in __post_init__
            return reference_learner(apply, loss, self.inner, self.linear, self.strength)
        return make_learner(self.algorithm, apply, loss, self.inner, self.linear, self.strength)

    @property
    def test_learner(self) -> Learner:
        """The learner with the number of inner steps for evaluation."""
        if not self.test_steps:
            return self.learner
        inner = dataclasses.replace(self.inner, max_steps=self.test_steps)
        return dataclasses.replace(self, inner=inner).learner

    def turns(self, training: bool) -> bool:
        """Return True if images are rotated: in training if ``training`` is True, in evaluation if it is False."""
        if self.rotations is None:
            return False
        return self.rotations.train if training else self.rotations.test

    @property
    def keys(self) -> Keys:
        """The random keys of a run, from which all random numbers of the run derive."""
        return Keys(*jax.random.split(jax.random.key(self.seed), 3))

    def deviations(self) -> tuple[str, ...]:
        """Return the differences between the preset and its citation, one text for each.

        The texts describe the preset of this name. They do not mention settings that were overridden.
        """
        return self.departures

    def config(self) -> dict[str, Any]:
        """Return the settings as nested dictionaries of JSON values.

        Raises:
            InputError: if a setting cannot be stored, such as a lambda; see ``imaml.settings.types.plain``.
        """
        return json.loads(json.dumps(self._saved_fields(), default=plain))

    def types(self) -> dict[str, str]:
        """Return the names of the types of this preset and of its components, which are the records in its fields.

        The key of the preset is ``"preset"``, and the key of a component is its dotted path. ``validation`` has no key,
        because it can have no other type.
        Two presets with equal configs and different types can give different runs.
        """
        parts = {name: value for name, value in self._saved_fields().items() if name not in SAVED_IF_CHANGED}
        return {"preset": type_name(type(self)), **dict(types_of(parts))}

    def _saved_fields(self):
        saved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NO_SETTINGS}
        return {name: value for name, value in saved.items() if SAVED_IF_CHANGED.get(name, ...) != value}


def replace(preset: Preset, **changes: Any) -> Preset:
    """Return a copy of a preset with other values in some of its fields, such as a name and a network of your own.

    Args:
        preset: the preset to start from.
        **changes: new values of fields of :class:`Preset`. A network is a frozen dataclass with a method
            ``build(outputs) -> Network``; its fields are settings of the run. Give a changed preset a name of its own.

    Raises:
        InputError: for a field that a preset does not have, for a network that is not a frozen dataclass with that
            method, or if the preset refuses a value.

    >>> import imaml
    >>> from imaml.settings.parts import Conv4
    >>> small = imaml.replace(imaml.preset("glyphs-5way-1shot-gd"), name="small", network=Conv4(filters=8))
    >>> small.name, small.network.filters
    ('small', 8)
    """
    for name in changes:
        check_choice("field of a preset", name, [field.name for field in dataclasses.fields(preset)])
    network = changes.get("network", preset.network)
    parameters = getattr(network, "__dataclass_params__", None)  # a dataclass and its instances have this
    if isinstance(network, type) or not (
        parameters and parameters.frozen and callable(getattr(network, "build", None))
    ):
        raise InputError(
            "network should be a frozen dataclass with a method build(outputs) that returns an imaml.Network, got "
            f"{network!r:.100}"
        )
    return dataclasses.replace(preset, **changes)
