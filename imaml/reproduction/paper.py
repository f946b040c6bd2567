"""The paper's printed numbers, once: what ours stand beside.

Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019 (arXiv 1909.04630),
table 2, Omniglot. Its rows for MAML, first-order MAML and Reptile are copied there from Finn et al. (2017) and Nichol
et al. (2018). The ranges are 95 % intervals over test tasks.
"""

from typing import NamedTuple

SOURCE = "Rajeswaran et al. (2019), arXiv 1909.04630, table 2"


class Printed(NamedTuple):
    """A number of the paper's, in per cent: accuracy, half the width of its interval, and both as they are printed."""

    accuracy: float
    interval: float
    text: str


class Cell(NamedTuple):
    """Where a number stands in table 2.

    Attributes:
        algorithm: ``"maml"``, ``"fomaml"``, ``"reptile"``, ``"imaml-gd"`` or ``"imaml-hf"``.
        ways: classes of a task.
        shots: support images of each.
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
"""The rows of table 2 and their names, in its order."""
COLUMNS = ((5, 1), (5, 5), (20, 1), (20, 5))
"""The columns of table 2: ways and shots."""

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
"""Table 2, cell by cell, column after column within each row."""

REFERENCE_CODE_5WAY_1SHOT = 98.204
"""Per cent that a user of the authors' public code reports for 5-way 1-shot after 200,000 tasks (its issue 3)."""
