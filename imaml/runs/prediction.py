"""Prediction for image files, by a learner that is adapted to a folder of images for each class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imaml.datasets import folders
from imaml.datasets.omniglot_alphabets import SPLITS
from imaml.errors import InputError
from imaml.learning.tasks import Episode
from imaml.runs.learner import TrainedLearner
from imaml.runs.results import NO_NORMALISATION, QUERY_BATCH, SUPPORT_SET

DRAWINGS = ("glyphs", *SPLITS)
"""The datasets of drawings, whose arrays have ink 255 and paper 0. In image files, ink is usually dark."""


@dataclass(frozen=True)
class Predictions:
    """Predicted classes of image files.

    Attributes:
        preset: the name of the learner's preset.
        normalisation: the images from which batch normalisation took its statistics, as in
            ``normalisation`` of :class:`imaml.Evaluation`.
        labels: the classes.
        files: the image files.
        probabilities: ``[files, classes]``.
    """

    preset: str
    normalisation: str
    labels: tuple[str, ...]
    files: tuple[Path, ...]
    probabilities: np.ndarray

    def records(self) -> dict[str, Any]:
        """Return the predictions in JSON types: for each file its label, and the probability of every class."""
        rows = [
            {"file": str(file), "label": label, "probability": most, "probabilities": each}
            for (file, label, most), each in zip(self._rows(), self._by_label(), strict=True)
        ]
        return {"preset": self.preset, "normalisation": self.normalisation, "predictions": rows}

    def __str__(self) -> str:
        rows = [("file", "label", "probability"), *((str(f), label, f"{p:.1%}") for f, label, p in self._rows())]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(f"{f:<{widths[0]}}  {label:<{widths[1]}}  {p:>{widths[2]}}" for f, label, p in rows)

    def _rows(self):
        best = self.probabilities.argmax(-1)
        for file, index, each in zip(self.files, best, self.probabilities, strict=True):
            yield file, self.labels[index], float(each[index])

    def _by_label(self):
        return [dict(zip(self.labels, map(float, each), strict=True)) for each in self.probabilities]


def predict_files(
    learner: TrainedLearner,
    support: str | Path,
    query: str | Path,
    transductive: bool = False,
    invert: bool | None = None,
) -> Predictions:
    """Adapt a learner to image files in one folder for each class, and predict the classes of other image files.

    If the learner was trained on a folder of images, the files are read as those images were. Otherwise an image that
    is not square is stretched to the size that the network takes.

    Args:
        learner: a learner of image classes.
        support: a folder with one subfolder of images for each class. The number of subfolders is the preset's number
            of ways. The name of a subfolder is the label of its images.
        query: a folder of image files, or one image file.
        transductive: see :meth:`.Adapted.predict`.
        invert: whether to replace each value v by 255 − v. If the run was trained on a folder of images, None means the
            choice that was made for this folder. Otherwise None means True for :data:`DRAWINGS`, whose arrays have
            bright ink, and False for any other dataset.

    Raises:
        InputError: if a folder or a file cannot be used, if the number of classes is not the preset's, if the learner
            does not classify images, or if the inner steps diverge.
    """
    preset = learner.preset
    shape = getattr(preset.network, "image_shape", None)
    if not isinstance(preset.episode, Episode) or shape is None:
        raise InputError(
            f"{preset.name} does not classify images of a known size: in Python, use imaml.load(run).adapt(x, y)"
        )
    reading = folders.Reading(shape[0], shape[2], "stretch", preset.dataset in DRAWINGS)
    if (source := learner.facts.get("source") or {}).get("kind") == "folder":
        reading = folders.Reading(*(source[name] for name in folders.Reading._fields))
    reading = reading if invert is None else reading._replace(invert=invert)
    reading.check()
    classes = folders.classes_of(Path(support))
    asked = [Path(query)] if Path(query).is_file() else folders.images_in(Path(query))
    labels = [label for label, paths in classes.items() for _ in paths]

    def read(paths):
        return np.stack([folders.read_image(path, reading) for path in paths])

    adapted = learner.adapt(read([path for paths in classes.values() for path in paths]), labels)
    found = adapted.probabilities(read(asked), transductive)
    normalisation = QUERY_BATCH if transductive else SUPPORT_SET
    if preset.functions.apply_with_support_statistics is None:
        normalisation = NO_NORMALISATION
    return Predictions(preset.name, normalisation, tuple(adapted.labels), tuple(asked), found)
