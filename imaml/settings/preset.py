"""The settings of a run as one frozen record.

A preset holds the very objects that do the work (``bl.GradientDescent``, ``bl.CG``, ``Episode``), so there
is no second list of options to keep in step: :mod:`imaml.settings.overrides` changes every number and switch of them by
its dotted path, and :mod:`imaml.settings.saved` reads back what :meth:`Preset.config` gave.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

import bilevel as bl
from imaml.errors import check, check_choice
from imaml.learning import networks
from imaml.learning.algorithms import ALGORITHMS, Learner, learner_of, reference_learner
from imaml.learning.problem import cross_entropy, squared_error
from imaml.learning.tasks import Curve, Episode
from imaml.settings.parts import MLP, Baselines, Conv4, Outer, Rotations

FINN = "Finn, Abbeel, Levine: Model-Agnostic Meta-Learning for Fast Adaptation, ICML 2017 (arXiv 1703.03400)"
NICHOL = "Nichol, Achiam, Schulman: On First-Order Meta-Learning Algorithms, 2018 (arXiv 1803.02999)"
RAJESWARAN = "Rajeswaran, Finn, Kakade, Levine: Meta-Learning with Implicit Gradients, NeurIPS 2019 (arXiv 1909.04630)"

CITATIONS = {"imaml": RAJESWARAN, "maml": FINN, "fomaml": FINN, "reptile": NICHOL}
FIDELITIES = ("paper", "reference-code")
LOSSES = {"accuracy": cross_entropy, "mean squared error": squared_error}
"""The loss of both sets, by the metric that a task is judged by."""

NO_SETTINGS = ("citation", "departures", "baselines")
"""Fields of a preset that :meth:`Preset.config` leaves out: they do not decide the numbers of a run."""
FIXED = ("name", "dataset", "fidelity", *NO_SETTINGS)
"""Fields of a preset that the command line cannot change."""

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
        algorithm: one of :data:`imaml.learning.algorithms.ALGORITHMS`; :meth:`using` changes it together with the
            inner solver.
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
        check(0 < self.strength < float("inf"), f"strength (λ) must be above 0 and finite, got {self.strength}")
        known = type(self.inner) in (bl.GradientDescent, bl.HessianFree)
        check(known, f"inner must be a GradientDescent or HessianFree, got {self.inner}")
        plain = type(self.linear) is bl.CG and self.linear.preconditioner is None
        check(plain, f"linear must be a CG without a preconditioner, got {self.linear}")
        check(self.inner.tol is None, "inner.tol must be None: a preset spends its budget of inner steps")
        # JAX drops what lies above 32 bits: a larger seed would silently be another one.
        check(0 <= self.seed < 2**32, f"seed must be at least 0 and below 2**32, got {self.seed}")
        check(self.test_steps >= 0, f"test_steps must be at least 0, got {self.test_steps}")
        check_choice("algorithm", self.algorithm, tuple(ALGORITHMS))
        check_choice("fidelity", self.fidelity, FIDELITIES)
        literal = self.algorithm == "imaml" and self.fidelity == "paper"
        descends = type(self.inner) is bl.GradientDescent
        check(literal or descends, f"inner must be a GradientDescent for {self.title}, got {self.inner}")
        alone = self.fidelity == "paper" or self.algorithm == "imaml"
        check(alone, f"the reference code has implicit MAML alone, so no algorithm {self.algorithm}")

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
        check_choice("algorithm", algorithm, tuple(ALGORITHMS))
        if algorithm == self.algorithm:
            return self
        check(
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
        inner = dataclasses.replace(self.inner, max_steps=self.test_steps)
        return dataclasses.replace(self, inner=inner).learner

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
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NO_SETTINGS}
        return json.loads(json.dumps(shown, default=dataclasses.asdict))
