"""The records that training and evaluation return."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any

from imaml.settings.preset import Preset

QUERY_BATCH, SUPPORT_SET, NO_NORMALISATION = "query batch", "support set", "none"
"""What batch normalisation takes its mean and variance of, when the query set is judged."""
_EXPLAINED = {
    QUERY_BATCH: "; batch normalisation over the query batch, as published (transductive)",
    SUPPORT_SET: "; batch normalisation by the support set's statistics",
    NO_NORMALISATION: "",
}


@dataclass(frozen=True)
class Evaluation:
    """How well the query examples of held-out tasks are answered.

    Attributes:
        metric: what is measured: ``"accuracy"``, in [0, 1], or ``"mean squared error"``.
        value: its mean over tasks.
        interval: half the width of its 95 % interval, 1.96 · standard deviation / √tasks.
        chance: the accuracy of guessing, 1 / ways; None for an error.
        tasks: how many tasks.
        normalisation: what batch normalisation took its statistics of when it judged the query set:
            ``"query batch"``, as published, ``"support set"``, or ``"none"`` for a network without.
        beside: the same tasks judged by the other normalisation, the support set's, where this is the published one.
    """

    metric: str
    value: float
    interval: float
    chance: float | None
    tasks: int
    normalisation: str
    beside: "Evaluation | None" = None

    @property
    def each(self) -> "tuple[Evaluation, ...]":
        """This one and the one beside it, each alone."""
        return (replace(self, beside=None), *(() if self.beside is None else (self.beside,)))

    def records(self) -> list[dict[str, Any]]:
        """Each as a plain dictionary, for JSON."""
        fields = [asdict(evaluation) for evaluation in self.each]
        return [{name: value for name, value in entry.items() if name != "beside"} for entry in fields]

    @property
    def accuracy(self) -> float:
        """The value where it is an accuracy, else NaN."""
        return self.value if self.metric == "accuracy" else float("nan")

    def __str__(self) -> str:
        return "\n".join(evaluation._sentence() for evaluation in self.each)

    def _sentence(self):
        if self.chance is None:
            what, level = f"{self.value:.3f} ± {self.interval:.3f} on {self.tasks} tasks", ""
        else:
            what = f"{self.value:.2%} ± {self.interval:.2%} on {self.tasks} tasks of held-out classes"
            level = f" (chance {self.chance:.0%})"
        return f"test {self.metric} {what}{level}{_EXPLAINED[self.normalisation]}"


@dataclass(frozen=True)
class Run:
    """A run that has come to an end or was stopped.

    Attributes:
        directory: its folder: checkpoints, ``metrics.jsonl``, ``result.json``.
        preset: its settings.
        theta: the learned parameters.
        step: meta-steps done.
        finished: whether all meta-steps were done; if not, the same call resumes.
        stopped_by: the signal that stopped it, or None.
        evaluation: on held-out tasks, where it finished; else None.
    """

    directory: Path
    preset: Preset
    theta: dict
    step: int
    finished: bool
    stopped_by: Signals | None
    evaluation: Evaluation | None
