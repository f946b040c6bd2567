"""Pictures of table 2 and figures 2a and 2b, drawn without JAX. Matplotlib is imported only when a picture is drawn.

The background is white and not transparent, so that the black labels are readable on a dark page too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from imaml.reports.plots import BLUE, GREY, ORANGE, new_figure, plain, save

GREEN = "#2f855a"
DARK_BLUE, LIGHT_BLUE, PALE_BLUE = "#1a3f6b", "#5a9bd8", "#9cc4ea"


def gradient_error(path: Path, steps: Sequence[int], curves: Mapping[str, Sequence[float]]) -> Path:
    """Draw figure 2a, the relative errors of meta-gradients over inner gradient steps, and return ``path``.

    Args:
        path: file of the PNG.
        steps: numbers of inner gradient steps.
        curves: relative errors by method, one for each entry of ``steps``; at most four methods besides ``"MAML"``.
    """
    figure, axes = _figure(6.6, 4.2)
    shades = iter((PALE_BLUE, LIGHT_BLUE, BLUE, DARK_BLUE))  # Implicit MAML: darker for more CG steps.
    for name, errors in curves.items():
        color = ORANGE if name == "MAML" else next(shades)
        axes.plot(steps, errors, marker="o", markersize=4, label=name, color=color)
    return _over_steps(
        figure, axes, steps, "Error of the meta-gradient", "‖gradient − exact‖ / ‖exact‖, mean over tasks", path
    )


def memory(path: Path, steps: Sequence[int], temporary: Mapping[str, Sequence[int]]) -> Path:
    """Draw figure 2b, the memory of meta-gradients over inner gradient steps, and return ``path``.

    Args:
        path: file of the PNG.
        steps: numbers of inner gradient steps.
        temporary: bytes by method, one number for each entry of ``steps``; at most three methods.
    """
    figure, axes = _figure(6.6, 4.2)
    colors = (BLUE, ORANGE, GREEN)
    for (name, sizes), color in zip(temporary.items(), colors, strict=False):
        axes.plot(steps, [size / 2**20 for size in sizes], marker="o", markersize=4, color=color, label=name)
    return _over_steps(figure, axes, steps, "Memory of one task's meta-gradient", "MiB", path)


def table(path: Path, lines: Sequence[tuple[str, float, float, Sequence[tuple[float, float, bool]]]]) -> Path:
    """Draw table 2 with one line for each cell: the paper's accuracy with its interval, and ours. Return ``path``.

    Args:
        path: file of the PNG.
        lines: for each cell its name, the paper's accuracy and interval, and a list of our evaluations. An evaluation
            is accuracy, interval, and whether batch normalisation used the support set's statistics. Accuracies and
            intervals are in per cent.
    """
    figure, axes = _figure(7.4, 0.28 * len(lines) + 1.4)
    for height, (_, accuracy, interval, ours) in enumerate(reversed(lines)):
        axes.errorbar(accuracy, height, xerr=interval, color=GREY, marker="o", markersize=5, capsize=3)
        for number, (value, width, by_support) in enumerate(ours, start=1):
            color, place = ORANGE if by_support else BLUE, height - 0.7 * number / (len(ours) + 1)
            axes.errorbar(value, place, xerr=width, color=color, marker="D", markersize=4, capsize=3)
    axes.set_yticks(range(len(lines)), [line[0] for line in reversed(lines)])
    axes.set_title("Omniglot, test accuracy with 95 % intervals")
    axes.set_xlabel("%")
    axes.plot([], [], color=GREY, marker="o", markersize=5, label="the paper")
    axes.plot([], [], color=BLUE, marker="D", markersize=4, label="ours, query batch's statistics")
    axes.plot([], [], color=ORANGE, marker="D", markersize=4, label="ours, support set's statistics")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return _save(figure, axes, path)


def _figure(width, height):
    figure = new_figure(width, height, facecolor="white")
    return figure, figure.subplots()


def _over_steps(figure, axes, steps, title, label, path):
    """Label the axes of a picture over inner gradient steps, make both logarithmic, and save the picture."""
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("inner gradient steps")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.minorticks_off()
    axes.legend(framealpha=0.9, edgecolor="none")
    return _save(figure, axes, path)


def _save(figure, axes, path):
    plain(axes)
    return save(figure, path)
