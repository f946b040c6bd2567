"""The public names of :mod:`imaml`. The package imports this module, and JAX with it, when a name is first used."""

from imaml.datasets.images import ImageDataset
from imaml.datasets.registry import register_dataset
from imaml.errors import InputError
from imaml.learning.algorithms import Learner
from imaml.learning.meta_gradient import MetaGradient, meta_gradient
from imaml.learning.tasks import Curve, Episode, Task
from imaml.runs.evaluation import evaluate
from imaml.runs.learner import Adapted, TrainedLearner, load
from imaml.runs.results import Evaluation, Run
from imaml.runs.training import train
from imaml.runs.verification import Verification, verify
from imaml.settings.preset import Preset
from imaml.settings.published_presets import preset, presets, register_preset

__all__ = [
    "Adapted",
    "Curve",
    "Episode",
    "Evaluation",
    "ImageDataset",
    "InputError",
    "Learner",
    "MetaGradient",
    "Preset",
    "Run",
    "Task",
    "TrainedLearner",
    "Verification",
    "evaluate",
    "load",
    "meta_gradient",
    "preset",
    "presets",
    "register_dataset",
    "register_preset",
    "train",
    "verify",
]
