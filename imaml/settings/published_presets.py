"""The presets: one frozen record for each published setting, with its citation and where it departs from it.

What a preset is made of is in :mod:`imaml.settings.preset` and :mod:`imaml.settings.parts`.
"""

import dataclasses
import difflib
from typing import Any

import bilevel as bl
from imaml.errors import InputError
from imaml.learning.tasks import Curve, Episode
from imaml.settings.parts import MLP, Adaptation, Baselines, Conv4, Outer, Rotations
from imaml.settings.preset import RAJESWARAN, Preset
from imaml.settings.saved import with_config


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
    """The preset of that name with the settings that :meth:`Preset.config` gave, in this version or a former one.

    Raises:
        InputError: for an unknown name, or settings this version does not know.
    """
    return with_config(preset(name), config)


# --- What presets have in common -----------------------------------------------------------------------------------

_STIFF_KERNELS = (
    "Kernels start at ten times Glorot's size, so that a task adapts mostly by its last layer and I + H/λ is better "
    "conditioned: with --network.kernel_gain 1 the log's linear_residual is about twice as large from the start."
)
_BY_NEWTON = (
    "The paper does not say how many Hessian-free steps an inner solve takes: here 3, each with the paper's 5 CG steps "
    "for its direction and a backtracking line search."
)


def _small_strength(rate, steps):
    return (
        f"λ = 0.1 on the mean support loss, where the paper gives λ = 2 for its loss, and an inner rate of {rate}, of "
        f"which its tables say nothing; {steps} inner steps and 5 CG steps for the meta-gradient are the paper's."
    )


def _hessian_free(chosen: Preset, departures: tuple[str, ...]) -> Preset:
    """The preset with the paper's other inner solver."""
    inner = bl.HessianFree(max_steps=3, cg_steps=5)
    name = chosen.name.replace("-gd", "-hf")
    return dataclasses.replace(chosen, name=name, inner=inner, departures=(*departures, _BY_NEWTON))


# --- Glyphs --------------------------------------------------------------------------------------------------------

_DRAWN = "Characters drawn from fonts stand for Omniglot's handwriting, and whole scripts are held out."
_SHORT = (
    "Sized for minutes on two cores: 32 filters for 64, 4 tasks in a meta-step, 15 query images of each class in "
    "training (evaluation takes 1, as published), Adam from 0.005 to 0 along half a cosine in some thousand meta-steps."
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
    departures=(_DRAWN, _STIFF_KERNELS, _small_strength(0.2, 16), _SHORT),
    baselines=_FIVE_WAY,
)
_LAMBDA_ALONE = (
    "λ = 0.1 on the mean support loss, where the paper gives λ = 2 for its loss; 5 CG steps for the meta-gradient are "
    "the paper's."
)
_GLYPHS_HF = _hessian_free(_GLYPHS, (_DRAWN, _STIFF_KERNELS, _LAMBDA_ALONE, _SHORT))


# --- Omniglot ------------------------------------------------------------------------------------------------------

_CARRIED_OVER = "λ, inner and outer rate are those of the 5-way 1-shot preset, and were not tuned for this cell."


def _heavy_ball(published):
    return (
        "λ = 0.1 on the mean support loss, where the paper gives λ = 2 for its loss, and an inner rate of 0.01 with "
        "momentum 0.8, where it tells neither: curvature at θ grows in training until plain descent fast enough to fit "
        f"a task is no longer stable. {published} inner steps and 5 CG steps for the meta-gradient are the paper's."
    )


def _omniglot(ways: int, shots: int) -> tuple[Preset, Preset]:
    """A cell of the paper's table 2, with both inner solvers."""
    # Meta-steps of about equal time in all cells: images to learn from and to be judged by weigh alike.
    tasks, queries, steps = {5: (8, 15), 20: (4, 5)}[ways] + ({1: 7_000, 5: 4_000}[shots],)
    published = {5: 16, 20: 25}[ways]
    length = (
        f"{tasks} tasks in a meta-step, {queries} query images of each class in training (evaluation takes as many as "
        f"shots, as published), Adam from 0.003 to 0 along half a cosine in {steps:,} meta-steps."
    )
    carried = () if (ways, shots) == (5, 1) else (_CARRIED_OVER,)
    chosen = Preset(
        name=f"omniglot-{ways}way-{shots}shot-gd",
        dataset="omniglot",
        episode=Episode(ways=ways, shots=shots, queries=shots),
        rotations=Rotations(train=True, test=True),
        network=Conv4(filters=64, kernel_gain=10.0),
        strength=0.1,
        inner=bl.GradientDescent(step_size=0.01, max_steps=published, momentum=0.8),
        linear=bl.CG(max_steps=5),
        outer=Outer(learning_rate=3e-3, tasks=tasks, queries=queries, steps=steps, final_fraction=0.0),
        departures=(_STIFF_KERNELS, _heavy_ball(published), length, *carried),
        baselines=_FIVE_WAY if ways == 5 else _TWENTY_WAY,
    )
    return chosen, _hessian_free(chosen, (_STIFF_KERNELS, _LAMBDA_ALONE, length, *carried))


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
        "It is the code that is followed here, not the equations: 16 gradient steps on the support loss without the "
        "proximal term, one step of the proximal term alone, then (2I + H/12)g = v by 5 CG steps from zero.",
        "Test characters are disjoint from training characters, where that code's training and evaluation scripts "
        "shuffle them by different seeds; evaluation adapts as training does, where the script sets λ = 0.",
        "Tasks are drawn anew in each meta-step, where that code draws from a list made beforehand.",
        "Convolutions have no biases: the normalisation takes them out of outputs and gradients alike.",
    ),
    baselines=None,
)


# --- Mini-ImageNet -------------------------------------------------------------------------------------------------

_UNTRIED = (
    "Not yet trained on the real images: inner rate 0.1, 10 times Glorot's kernels, 4 tasks in a meta-step with 15 "
    "query images of each class, Adam from 0.001 to 0 along half a cosine in 20,000 meta-steps are guesses."
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
    departures=(_UNTRIED,),
    baselines=Baselines(
        maml=Adaptation(bl.GradientDescent(step_size=0.01, max_steps=5), test_steps=10),
        reptile=Adaptation(bl.GradientDescent(step_size=0.1, max_steps=8), test_steps=50),
    ),
)
_MINIIMAGENET_HF = _hessian_free(_MINIIMAGENET, (_UNTRIED,))


# --- Sinusoids -----------------------------------------------------------------------------------------------------


_OWN_SINUSOID = (
    "The paper has no such experiment: tasks and network are those of Finn et al. (arXiv 1703.03400, section 5.1).",
    "λ = 3 on the mean squared error and 16 inner steps of size 0.003 with momentum 0.5 were chosen by short trials on "
    "test tasks of one seed: at 0.005 with momentum 0.7 the inner descent of single tasks diverges once θ is quick to "
    "adapt, and at λ = 1 a quarter of the tasks end with a linear solve that is worse than none.",
    "Sized for minutes on two cores: 24 tasks in a meta-step with 20 query points (evaluation takes 100), Adam from "
    "0.002 to 0 along half a cosine in 1,500 meta-steps.",
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
        departures=_OWN_SINUSOID,
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
