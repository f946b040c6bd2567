"""The public names of :mod:`imaml`. The package imports this module, and JAX with it, when a name is first used."""

from imaml.datasets.images import ImageDataset
from imaml.datasets.registry import register_dataset
from imaml.errors import InputError
from imaml.learning.algorithms import Learner
from imaml.learning.meta_gradient import MetaGradient, meta_gradient
from imaml.learning.modules import equinox_network, linen_network, nnx_network
from imaml.learning.networks import Network
from imaml.learning.tasks import Curve, Episode, Task
from imaml.reports.comparison import Comparison, compare
from imaml.reports.run_report import report
from imaml.runs.diagnosis import Bin, Calibration, Diagnosis, diagnose
from imaml.runs.evaluation import evaluate
from imaml.runs.learner import Adapted, TrainedLearner, load
from imaml.runs.loggers import Logger, TensorBoard, WeightsAndBiases
from imaml.runs.results import Evaluation, Run
from imaml.runs.sweep import Sweep, Trial, sweep
from imaml.runs.training import train
from imaml.runs.verification import Verification, verify
from imaml.settings.preset import Preset, replace
from imaml.settings.published_presets import preset, presets, register_preset

__all__ = [
    "Adapted",
    "Bin",
    "Calibration",
    "Comparison",
    "Curve",
    "Diagnosis",
    "Episode",
    "Evaluation",
    "ImageDataset",
    "InputError",
    "Learner",
    "Logger",
    "MetaGradient",
    "Network",
    "Preset",
    "Run",
    "Sweep",
    "Task",
    "TensorBoard",
    "TrainedLearner",
    "Trial",
    "Verification",
    "WeightsAndBiases",
    "compare",
    "diagnose",
    "equinox_network",
    "evaluate",
    "linen_network",
    "load",
    "meta_gradient",
    "nnx_network",
    "preset",
    "presets",
    "register_dataset",
    "register_preset",
    "replace",
    "report",
    "sweep",
    "train",
    "verify",
]
