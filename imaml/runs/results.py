"""The records that training, evaluation and verification return."""

import textwrap
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from signal import Signals
from typing import Any

import bilevel as bl
from imaml.settings.preset import Preset

QUERY_BATCH, SUPPORT_SET, NO_NORMALISATION = "query batch", "support set", "none"
"""Values of :attr:`Evaluation.normalisation`."""
_EXPLAINED = {
    QUERY_BATCH: "; batch normalisation over the query batch, as published (transductive)",
    SUPPORT_SET: "; batch normalisation by the support set's statistics",
    NO_NORMALISATION: "",
}


@dataclass(frozen=True)
class Evaluation:
    """Mean query score over held-out tasks.

    Attributes:
        metric: ``"accuracy"``, in [0, 1], or ``"mean squared error"``.
        value: mean of the metric over tasks.
        interval: half the width of the mean's 95 % interval, 1.96 · standard deviation / √tasks.
        chance: accuracy of guessing, 1 / ways; None for a mean squared error.
        tasks: number of tasks.
        normalisation: examples from which batch normalisation took its statistics for the query set:
            ``"query batch"``, as published, ``"support set"``, or ``"none"`` for a network without batch normalisation.
        beside: the evaluation of the same tasks with the support set's statistics, if this evaluation uses the query
            batch's. Otherwise None.
        part: the held-out classes of the tasks, ``"test"`` or ``"validation"``.
    """

    metric: str
    value: float
    interval: float
    chance: float | None
    tasks: int
    normalisation: str
    beside: "Evaluation | None" = None
    part: str = "test"

    @property
    def each(self) -> "tuple[Evaluation, ...]":
        """This evaluation and the one in ``beside``, if any; ``beside`` is None in both."""
        return (replace(self, beside=None), *(() if self.beside is None else (self.beside,)))

    def records(self) -> list[dict[str, Any]]:
        """Return the evaluations in ``each`` as dictionaries of JSON types, without ``beside`` and ``part``."""
        fields = [asdict(evaluation) for evaluation in self.each]
        return [{name: value for name, value in entry.items() if name not in ("beside", "part")} for entry in fields]

    @property
    def accuracy(self) -> float:
        """The value if the metric is accuracy, otherwise NaN."""
        return self.value if self.metric == "accuracy" else float("nan")

    def __str__(self) -> str:
        return "\n".join(evaluation._sentence() for evaluation in self.each)

    def _repr_html_(self) -> str:
        rows = [
            (entry.metric, f"{entry.value:.4f} ± {entry.interval:.4f}", str(entry.tasks), entry.normalisation)
            for entry in self.each
        ]
        notes = [] if self.chance is None else [f"Chance: {self.chance:.4f}."]
        return bl.html_table(("metric", "value", "tasks", "batch normalisation over"), rows, notes)

    def _sentence(self):
        if self.chance is None:
            what, level = f"{self.value:.3f} ± {self.interval:.3f} on {self.tasks} tasks", ""
        else:
            what = f"{self.value:.2%} ± {self.interval:.2%} on {self.tasks} tasks of held-out classes"
            level = f" (chance {self.chance:.0%})"
        return f"{self.part} {self.metric} {what}{level}{_EXPLAINED[self.normalisation]}"


@dataclass(frozen=True)
class Run:
    """Result of a training run that has finished or was stopped.

    Attributes:
        directory: the run's folder, with checkpoints, ``metrics.jsonl`` and, of a finished run, ``result.json``.
        preset: the run's settings.
        theta: the learned parameters θ: those with the best validation or, in a run without validation, the last ones.
        step: number of meta-steps done.
        finished: whether all meta-steps are done, or the run stopped early because validation did not improve. If not,
            the same call of :func:`imaml.train` resumes the run.
        stopped_by: the signal that stopped the run, or None.
        evaluation: evaluation on held-out tasks. None if the run was stopped, even after the last meta-step, or if
            :func:`imaml.train` was called with ``evaluation_tasks=0``.
        dataset: one's own dataset, if the run was trained on one. Otherwise None.
        best_step: number of meta-steps before the best validation; None in a run without validation.
    """

    directory: Path
    preset: Preset
    theta: dict
    step: int
    finished: bool
    stopped_by: Signals | None
    evaluation: Evaluation | None
    dataset: Any = field(default=None, repr=False, compare=False)
    best_step: int | None = None


TRUNCATED = "CG at its budget"
"""Name of the check of the preset's own CG solve."""
EXPLAINED = 0.01
"""A :class:`Verification` prints the explanation of a :class:`BudgetCheck` whose ``value`` is above this number."""


@dataclass(frozen=True)
class BudgetCheck(bl.Check):
    """The check of the preset's own CG solve, with the numbers that explain the distance to the exact solution.

    Attributes:
        value: ‖g − g*‖ / ‖g*‖ for the meta-gradient g of the preset and the exact solution g* of the same system.
        residual: the relative residual of g.
        cosine: the cosine of the angle between g and g*.
        inner_steps: the budget of the inner solver.
        inner_residual: the norm of the inner gradient at φ, relative to its norm at θ, where the inner solver starts.
        longer: longer budgets of CG, each with the relative residual and the distance that it leaves.
        indefinite: whether one of these budgets met a search direction of negative curvature.
    """

    residual: float = 0.0
    cosine: float = 1.0
    inner_steps: int = 0
    inner_residual: float = 0.0
    longer: tuple[tuple[int, float, float], ...] = ()
    indefinite: bool = False

    def explained(self) -> str:
        """Return paragraphs on what the distance means, and on the settings that lower it."""
        distance = float(self.value or 0)
        tried = [
            f"{steps} steps give a residual of {left:.0%} and a distance of {far:.0%}"
            for steps, left, far in self.longer
        ]
        paragraphs = [
            f"{TRUNCATED}: the preset stops CG early on purpose, as the paper does. Its meta-gradient g differs from "
            f"the exact solution of the same system by {distance:.0%} of that solution's norm. The zero vector would "
            f"differ by 100%. The angle between g and the exact solution has the cosine {self.cosine:.2f}, and the "
            f"relative residual of g is {self.residual:.0%}. This is the price of the budget and not a mistake: the "
            "row checks only that the residual that CG reports is the true one.",
            "The distance depends on the number of CG steps (--linear.max_steps)."
            + (f" On this task, {'; '.join(tried)}." if tried else ""),
        ]
        if self.indefinite:
            paragraphs[-1] += (
                " I + H/λ is indefinite here, so the residual may rise before it falls. A larger --strength makes the "
                "system positive definite, and changes the inner problem."
            )
        else:
            paragraphs[-1] += " A larger --strength makes the system easier, and changes the inner problem."
        paragraphs.append(
            f"The inner solver stops early too: its {self.inner_steps} steps leave {self.inner_residual:.0%} of the "
            "norm of the inner gradient at the start. More steps (--inner.max_steps) bring φ nearer to the inner "
            "solution. The distance above does not measure this: both gradients are taken at the same φ."
        )
        return "\n".join(textwrap.fill(text, 100, subsequent_indent="  ") for text in paragraphs)


@dataclass(frozen=True)
class Verification:
    """Report of :func:`imaml.verify`.

    Attributes:
        preset: name of the preset.
        parameters: number of parameters of its network.
        checks: one :class:`bilevel.Check` for each comparison.
        seconds: wall time of the verification.
    """

    preset: str
    parameters: int
    checks: tuple[bl.Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """True if every comparison passed."""
        return all(check.ok for check in self.checks)

    def records(self) -> dict[str, Any]:
        """Return the report in JSON types."""
        checks = [asdict(check) for check in self.checks]
        report = {"preset": self.preset, "parameters": self.parameters, "ok": self.ok, "seconds": self.seconds}
        return report | {"checks": checks}

    def _repr_html_(self) -> str:
        rows = [(check.name, "ok" if check.ok else "FAILED", check.found) for check in self.checks]
        notes = [f"{self.preset}, {self.parameters} parameters, {'ok' if self.ok else 'NOT OK'}, {self.seconds:.0f} s"]
        return bl.html_table(("check", "", "found"), rows, notes)

    def __str__(self) -> str:
        title = f"{self.preset}: meta-gradient of one task, {self.parameters} parameters, float64"
        notes = [
            check.explained()
            for check in self.checks
            if isinstance(check, BudgetCheck) and check.ok and (check.value or 0) > EXPLAINED
        ]
        result = f"{'ok' if self.ok else 'NOT OK'}, {self.seconds:.0f} seconds"
        return "\n".join([title, str(bl.ConditionReport(self.checks)), *notes, result])
