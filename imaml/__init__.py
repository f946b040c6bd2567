"""Implicit MAML: few-shot learning whose meta-gradient needs no memory of the inner loop.

The algorithm of Rajeswaran, Finn, Kakade and Levine (2019), as an instance of :mod:`bilevel`.
"""

from imaml.algorithms import Learner, MetaGradient, meta_gradient
from imaml.errors import InputError
from imaml.evaluation import Evaluation, evaluate
from imaml.presets import preset, presets
from imaml.settings import Preset
from imaml.tasks import Curve, Episode, Task
from imaml.training import Run, train
from imaml.verification import Verification, verify

__all__ = [
    "Curve",
    "Episode",
    "Evaluation",
    "InputError",
    "Learner",
    "MetaGradient",
    "Preset",
    "Run",
    "Task",
    "Verification",
    "evaluate",
    "meta_gradient",
    "preset",
    "presets",
    "train",
    "verify",
]
