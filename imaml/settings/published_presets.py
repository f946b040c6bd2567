"""The published presets: one frozen record for each, with its citation and its departures from the publication.

Presets of one's own can be registered too. :mod:`imaml.settings.preset` and :mod:`imaml.settings.parts` define the
record and its components.
"""

import dataclasses
from typing import Any

import bilevel as bl
from imaml import entry_points
from imaml.errors import InputError, check, suggestion
from imaml.learning.tasks import Curve, Episode
from imaml.settings.parts import MLP, Adaptation, Baselines, Conv4, Outer, Rotations
from imaml.settings.preset import CITATIONS, RAJESWARAN, Preset
from imaml.settings.saved import with_config

GROUP = "imaml.presets"
"""The group of the entry points by which packages offer presets."""


def preset(name: str) -> Preset:
    """Return the preset called ``name``.

    Args:
        name: one of :func:`presets`.

    Raises:
        InputError: if the name is unknown, or if the entry point that offers the preset cannot be imported or is not a
            preset of that name. For an unknown name, the message suggests a similar one if there is one, and names the
            command that lists all names.
    """
    known = _registered | _PRESETS
    if name in known:
        return known[name]
    names = presets()
    if name in names:
        return _offered(name)
    hints = [suggestion(name, names), "'imaml presets' lists all of them (in Python, imaml.presets())"]
    raise InputError(f"there is no preset {name!r}: {' '.join(filter(None, hints))}")


def presets() -> tuple[str, ...]:
    """Return the names of all presets: published, registered, and offered by installed packages.

    The first one is the default of the command line.
    """
    found = (*_PRESETS, *_registered)
    return (*found, *(name for name in entry_points.offered(GROUP) if name not in found))


def register_preset(preset: Preset) -> None:
    """Make a preset available by its name, to :func:`imaml.preset` and :func:`imaml.evaluate`.

    A run of a registered preset can be evaluated from its folder even if the preset has types of your own. A
    package offers its preset by an entry point instead, which the command line finds as well. The entry point names the
    preset, or a function without arguments that returns the preset::

        [project.entry-points."imaml.presets"]
        cards-5way = "my_package.presets:CARDS"

    Args:
        preset: the preset. No preset of this package may have its name. An earlier preset of this name is replaced.

    Raises:
        InputError: if the name is empty or taken by this package, or if ``preset`` is not a preset.

    >>> import dataclasses
    >>> import imaml
    >>> register_preset(dataclasses.replace(imaml.preset("sinusoid-5shot-gd"), name="my-sinusoids", strength=2.0))
    >>> imaml.preset("my-sinusoids").strength
    2.0
    """
    check(isinstance(preset, Preset), f"only an imaml.Preset can be registered, got {preset!r:.100}")
    check(bool(preset.name), "a preset needs a name to be registered")
    taken = preset.name in _PRESETS
    check(not taken, f"the name {preset.name!r} is taken by a preset of this package: choose another name")
    _registered[preset.name] = preset


def _offered(name):
    """Return the preset that an installed package offers under a name."""
    found = entry_points.load(GROUP, name)
    found = found() if callable(found) else found
    if not isinstance(found, Preset) or found.name != name:
        raise InputError(
            f"the entry point {name!r} of {GROUP} should be an imaml.Preset of that name, got {found!r:.100}"
        )
    return found


def restore(name: str, config: dict[str, Any], types: dict[str, str] | None = None) -> Preset:
    """Return the preset that was saved with a run.

    Args:
        name: the name of the preset, which need not be one of :func:`presets` if ``types`` is given.
        config: the result of :meth:`Preset.config`, from this or an earlier version.
        types: the result of :meth:`Preset.types`. None for a run of a version that did not save it. The types are then
            those of the preset of that name.

    Raises:
        InputError: if ``types`` is None and the name is unknown, if ``types`` has a type that neither this package nor
            the preset of that name has, or if the config does not fit this version.
    """
    if types is None or name in presets():
        return with_config(preset(name), config, types)
    citation = CITATIONS.get(config.get("algorithm", "imaml"), RAJESWARAN)
    begun = dataclasses.replace(_GLYPHS, name=name, citation=citation, departures=(), baselines=None)
    return with_config(begun, config, types)


# --- Shared departures and variants --------------------------------------------------------------------------------

_LARGE_KERNELS = (
    "Initial kernels are ten times Glorot's size. Adaptation then changes mostly the last layer, and I + H/λ is better "
    "conditioned. With --network.kernel_gain 1, linear_residual in the log is about twice as large from the start."
)


def _hessian_free_steps(steps):
    return (
        f"An inner solve takes {steps} Hessian-free steps, a number that the paper does not give. Each has the paper's "
        "5 CG steps for its direction, and a backtracking line search."
    )


_STRENGTH = "λ is 0.1 for the mean support loss; the paper gives λ = 2 for its loss."


def _inner_rate(rate, steps):
    return (
        f"{_STRENGTH} The inner step size is {rate}; the paper does not give one. {steps} inner steps and 5 CG steps "
        "for the meta-gradient are the paper's numbers."
    )


def _hessian_free(chosen: Preset, departures: tuple[str, ...], steps: int = 3) -> Preset:
    """Return a variant of ``chosen`` with Hessian-free Newton steps, the other inner solver of the paper."""
    departures = (*departures, _hessian_free_steps(steps))
    inner = bl.HessianFree(max_steps=steps, cg_steps=5)
    return dataclasses.replace(chosen, name=chosen.name.replace("-gd", "-hf"), inner=inner, departures=departures)


# --- Glyphs --------------------------------------------------------------------------------------------------------

_FONT_GLYPHS = (
    "Characters drawn from fonts replace Omniglot's handwritten ones. The test classes come from other scripts."
)
_SHORT_RUN = (
    "A run is sized to take minutes on two cores: 32 filters instead of 64, 4 tasks in a meta-step, 15 query images of "
    "each class in training (evaluation uses 1, as published), and Adam with a learning rate that falls from 0.005 to "
    "0 along half a cosine in 3,000 meta-steps."
)
_FIVE_WAY = Baselines(
    maml=Adaptation(bl.GradientDescent(step_size=0.4, max_steps=1), test_steps=3),
    reptile=Adaptation(bl.GradientDescent(step_size=0.1, max_steps=5), test_steps=50),
)
_TWENTY_WAY = Baselines(
    maml=Adaptation(bl.GradientDescent(step_size=0.1, max_steps=5)),
    reptile=Adaptation(bl.GradientDescent(step_size=0.1, max_steps=10), test_steps=50),
)

_GLYPHS = Preset(
    name="glyphs-5way-1shot-gd",
    dataset="glyphs",
    episode=Episode(ways=5, shots=1, queries=1),
    rotations=Rotations(),
    network=Conv4(filters=32, kernel_gain=10.0),
    strength=0.1,
    inner=bl.GradientDescent(step_size=0.2, max_steps=16),
    linear=bl.CG(max_steps=5),
    outer=Outer(learning_rate=5e-3, tasks=4, queries=15, steps=3000, final_fraction=0.0),
    departures=(_FONT_GLYPHS, _LARGE_KERNELS, _inner_rate(0.2, 16), _SHORT_RUN),
    baselines=_FIVE_WAY,
)
_CG = "5 CG steps for the meta-gradient are the paper's number."
_GLYPHS_HF = _hessian_free(_GLYPHS, (_FONT_GLYPHS, _LARGE_KERNELS, _STRENGTH, _CG, _SHORT_RUN))


# --- Omniglot ------------------------------------------------------------------------------------------------------

_MORE_IMAGES = (
    "λ is 0.5 for the mean support loss; the paper gives λ = 2 for its loss. With the λ and the inner step size of the "
    "5-way 1-shot preset, 0.1 and 0.01, CG ends with a relative residual above 1 for every task at the initial "
    "parameters. No task then has a usable gradient, and training by gradient descent does not begin. The learning "
    "rate was not tuned for this number of ways and shots."
)
_PAPERS_STRENGTH = (
    "λ is the paper's 2, for the mean support loss. With λ = 0.1 or 0.5 and 3 Hessian-free steps, the gradient of the "
    "inner objective grew in training, and the accuracy fell."
)


def _momentum(rate, momentum, steps):
    return (
        f"The inner step size is {rate} and the inner momentum {momentum}; the paper gives neither. Momentum is needed "
        "because the curvature at θ grows in training: plain descent with a step size large enough to fit a task "
        f"becomes unstable. {steps} inner steps and 5 CG steps for the meta-gradient are the paper's numbers."
    )


def _omniglot(ways: int, shots: int) -> tuple[Preset, Preset]:
    """Return two presets for a result in the paper's table 2: with gradient descent, and with Hessian-free steps."""
    # Tasks and queries are chosen so that a meta-step takes about equally long for each number of ways and shots.
    tasks, queries, steps = {5: (8, 15), 20: (4, 5)}[ways] + ({1: 7_000, 5: 4_000}[shots],)
    inner_steps = {5: 16, 20: 25}[ways]
    # At 0.02 and 0.8, the inner descent of 20-way 1-shot became unstable late in training.
    chosen_numbers = {(5, 1): (0.1, 0.01, 0.8), (20, 1): (0.5, 0.01, 0.9)}
    strength, rate, momentum = chosen_numbers.get((ways, shots), (0.5, 0.02, 0.8))
    of_strength = _STRENGTH if (ways, shots) == (5, 1) else _MORE_IMAGES
    length = (
        f"A meta-step has {tasks} tasks with {queries} query images of each class (evaluation uses as many as shots, "
        f"as published). Adam's learning rate falls from 0.003 to 0 along half a cosine in {steps:,} meta-steps."
    )
    chosen = Preset(
        name=f"omniglot-{ways}way-{shots}shot-gd",
        dataset="omniglot",
        episode=Episode(ways=ways, shots=shots, queries=shots),
        rotations=Rotations(train=True, test=True),
        network=Conv4(filters=64, kernel_gain=10.0),
        strength=strength,
        inner=bl.GradientDescent(step_size=rate, max_steps=inner_steps, momentum=momentum),
        linear=bl.CG(max_steps=5),
        outer=Outer(learning_rate=3e-3, tasks=tasks, queries=queries, steps=steps, final_fraction=0.0),
        departures=(_LARGE_KERNELS, of_strength, _momentum(rate, momentum, inner_steps), length),
        baselines=_FIVE_WAY if ways == 5 else _TWENTY_WAY,
    )
    stronger = dataclasses.replace(chosen, strength=2.0)
    return chosen, _hessian_free(stronger, (_LARGE_KERNELS, _PAPERS_STRENGTH, _CG, length), steps=4)


_REFERENCE = dataclasses.replace(
    _omniglot(5, 1)[0],
    name="omniglot-5way-1shot-reference-code",
    fidelity="reference-code",
    episode=Episode(ways=5, shots=1, queries=1, bright_paper=True),
    network=Conv4(filters=64, kernel_gain=1.73, head_gain=1.73, head_bias=0.05),
    strength=2.0,
    inner=bl.GradientDescent(step_size=0.1, max_steps=16),
    linear=bl.CG(max_steps=5, ridge=1.0),
    outer=Outer(learning_rate=1e-3, tasks=32, queries=1, steps=20_000, epsilon=1e-3),
    citation=f"The authors' public code, aravindr93/imaml_dev, of {RAJESWARAN}",
    departures=(
        "This preset follows the authors' code and not the paper's equations. An inner solve takes 16 gradient steps "
        "on the support loss without the proximal term, and one step on the proximal term alone. The meta-gradient "
        "solves (2I + H/12)g = v by 5 CG steps from zero.",
        "Test characters are disjoint from training characters; the training and evaluation scripts of that code "
        "shuffle the characters by different seeds, so that some test characters are also training characters. "
        "Evaluation uses the same inner loop as training; the evaluation script of that code sets λ = 0.",
        "Tasks are sampled anew in each meta-step; that code draws them from a list that is made beforehand.",
        "Convolutions have no biases, because batch normalisation cancels a bias in outputs and gradients.",
    ),
    baselines=None,
)


# --- Mini-ImageNet -------------------------------------------------------------------------------------------------

_NEVER_TRAINED = (
    "This preset was never trained on the real images. These settings are guesses: an inner step size of 0.1 for "
    "gradient descent, initial kernels of 10 times Glorot's size, 4 tasks in a meta-step, 15 query images of each "
    "class in training, and Adam with a learning rate that falls from 0.001 to 0 along half a cosine in 20,000 "
    "meta-steps."
)

_MINIIMAGENET = Preset(
    name="miniimagenet-5way-1shot-gd",
    dataset="miniimagenet",
    episode=Episode(ways=5, shots=1, queries=1),
    rotations=None,
    network=Conv4(filters=32, kernel_gain=10.0, pooling=True, image_shape=(84, 84, 3)),
    strength=0.5,
    inner=bl.GradientDescent(step_size=0.1, max_steps=10),
    linear=bl.CG(max_steps=5),
    outer=Outer(learning_rate=1e-3, tasks=4, queries=15, steps=20_000, final_fraction=0.0),
    departures=(_NEVER_TRAINED,),
    baselines=Baselines(
        maml=Adaptation(bl.GradientDescent(step_size=0.01, max_steps=5), test_steps=10),
        reptile=Adaptation(bl.GradientDescent(step_size=0.1, max_steps=8), test_steps=50),
    ),
)
_MINIIMAGENET_HF = _hessian_free(_MINIIMAGENET, (_NEVER_TRAINED,))


# --- Sinusoids -----------------------------------------------------------------------------------------------------


_SINUSOID_DEPARTURES = (
    "The paper has no regression experiment. Tasks and network are those of Finn et al. (arXiv 1703.03400, section "
    "5.1).",
    "λ = 3 for the mean squared error, 16 inner steps, an inner step size of 0.003 and momentum 0.5 were chosen by "
    "short trials on test tasks of one seed. At a step size of 0.005 with momentum 0.7, the inner descent of some "
    "tasks diverges once training has made θ quick to adapt. At λ = 1, the linear solve of a quarter of the tasks ends "
    "with a relative residual above 1.",
    "A run is sized to take minutes on two cores: 24 tasks in a meta-step, 20 query points in training (evaluation "
    "uses 100), and Adam with a learning rate that falls from 0.002 to 0 along half a cosine in 1,500 meta-steps.",
)


def _sinusoid(shots: int) -> Preset:
    return Preset(
        name=f"sinusoid-{shots}shot-gd",
        dataset="sinusoid",
        episode=Curve(shots=shots, queries=100),
        rotations=None,
        network=MLP(hidden=40),
        strength=3.0,
        inner=bl.GradientDescent(step_size=0.003, max_steps=16, momentum=0.5),
        linear=bl.CG(max_steps=5),
        outer=Outer(learning_rate=2e-3, tasks=24, queries=20, steps=1500, final_fraction=0.0, at_once=12),
        departures=_SINUSOID_DEPARTURES,
        baselines=Baselines(
            maml=Adaptation(bl.GradientDescent(step_size=0.01, max_steps=1)),
            reptile=Adaptation(bl.GradientDescent(step_size=0.02, max_steps=10), test_steps=32),
        ),
    )


_CELLS = [chosen for ways in (5, 20) for shots in (1, 5) for chosen in _omniglot(ways, shots)]
_ALL = (
    _GLYPHS, _GLYPHS_HF, *_CELLS, _REFERENCE, _MINIIMAGENET, _MINIIMAGENET_HF, _sinusoid(5), _sinusoid(10),
)  # fmt: skip
_PRESETS = {chosen.name: chosen for chosen in _ALL}
_registered: dict[str, Preset] = {}
