"""The numbers that the paper prints for Omniglot.

Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019 (arXiv 1909.04630),
table 2. The paper takes its rows for MAML, first-order MAML and Reptile from Finn et al. (2017) and Nichol et al.
(2018). The number after ± is half the width of a 95 % interval over test tasks.
"""

from typing import NamedTuple

SOURCE = "Rajeswaran et al. (2019), arXiv 1909.04630, table 2"


class Printed(NamedTuple):
    """A printed accuracy.

    Attributes:
        accuracy: in per cent.
        interval: half the width of its 95 % interval, in per cent.
        text: both as the paper prints them.
    """

    accuracy: float
    interval: float
    text: str


class Cell(NamedTuple):
    """A cell of table 2.

    Attributes:
        algorithm: ``"maml"``, ``"fomaml"``, ``"reptile"``, ``"imaml-gd"`` or ``"imaml-hf"``.
        ways: number of classes of a task.
        shots: number of support images of each class.
    """

    algorithm: str
    ways: int
    shots: int


ROWS = {
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
    "imaml-gd": "iMAML, gradient descent",
    "imaml-hf": "iMAML, Hessian-free",
}
"""The rows of table 2 in the paper's order, with their names in words."""
COLUMNS = ((5, 1), (5, 5), (20, 1), (20, 5))
"""The columns of table 2, as (ways, shots)."""

_TABLE_2 = {
    "maml": ("98.7 ± 0.4", "99.9 ± 0.1", "95.8 ± 0.3", "98.9 ± 0.2"),
    "fomaml": ("98.3 ± 0.5", "99.2 ± 0.2", "89.4 ± 0.5", "97.9 ± 0.1"),
    "reptile": ("97.68 ± 0.04", "99.48 ± 0.06", "89.43 ± 0.14", "97.12 ± 0.32"),
    "imaml-gd": ("99.16 ± 0.35", "99.67 ± 0.12", "94.46 ± 0.42", "98.69 ± 0.1"),
    "imaml-hf": ("99.50 ± 0.26", "99.74 ± 0.11", "96.18 ± 0.36", "99.14 ± 0.1"),
}

TABLE_2 = {
    Cell(row, *column): Printed(float(text.split(" ± ")[0]), float(text.split(" ± ")[1]), text)
    for row, line in _TABLE_2.items()
    for column, text in zip(COLUMNS, line, strict=True)
}
"""Table 2: the printed accuracy of each cell, row by row."""

REFERENCE_CODE_5WAY_1SHOT = 98.204
"""Accuracy in per cent that a user of the authors' public code reports for 5-way 1-shot after 200,000 tasks.

Source: issue 3 of github.com/aravindr93/imaml_dev.
"""
