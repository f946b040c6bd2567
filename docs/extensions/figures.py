"""Draw the figures and print the tables of the page about methods from the records in benchmarks/results.

Each figure is drawn as NAME-light.svg and NAME-dark.svg in docs/generated, and each table is NAME.md there. The labels
are large enough for the width of a phone.
"""

import json
import statistics
from pathlib import Path

DOCS = Path(__file__).parents[1]
GENERATED = DOCS / "generated"
RESULTS = DOCS.parent / "benchmarks" / "results"
STYLE = {
    "figure.figsize": (5, 4), "figure.constrained_layout.use": True, "font.size": 12, "legend.fontsize": 10.5,
    "axes.grid": True, "grid.alpha": 0.3, "savefig.transparent": True, "svg.hashsalt": "figures",
}  # fmt: skip
MIB = 2**20


def setup(app):
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(app):
    """Write all figures and tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    GENERATED.mkdir(exist_ok=True)
    colours = plt.rcParams["axes.prop_cycle"]  # the same for both modes, so that a page can mention them
    for name, (table, draw) in FIGURES.items():
        (GENERATED / f"figure-{name}.md").write_text(table())
        for mode, style in (("light", []), ("dark", ["dark_background", {"axes.prop_cycle": colours}])):
            with plt.style.context([*style, STYLE]):
                figure, axes = plt.subplots()
                draw(axes)
                figure.legend(loc="outside upper center", ncols=2)  # above the axes, where it covers no line
                figure.savefig(GENERATED / f"figure-{name}-{mode}.svg", metadata={"Date": None})
                plt.close(figure)


def record(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(header, lines, words=1):
    """Return a Markdown table. Its first columns have words, and the others have numbers, aligned at the right."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines]) + "\n"


def error_table():
    found = record("figure2a")["result"]
    chosen = [found["steps"].index(step) for step in (1, 4, 16, 64, 256)]
    header = ["relative error after", *(f"{found['steps'][k]} steps" for k in chosen)]
    return rows(header, [[_method(name), *(f"{curve[k]:.1e}" for k in chosen)] for name, curve in found["curves"]])


def error_figure(axes):
    found = record("figure2a")["result"]
    for name, curve in found["curves"]:
        axes.loglog(found["steps"], curve, "o-", ms=4, label=_method(name).replace("`", ""))
    axes.set(xlabel="inner steps", ylabel="relative error of the gradient")


def _method(name):
    """Return the call of this library for a curve of figure 2."""
    budget = name.removeprefix("iMAML, ").partition(" ")[0]
    calls = {
        "MAML": "Unrolled()",
        "MAML, unrolled": "Unrolled()",
        "MAML, steps recomputed": "Unrolled(checkpoint=True)",
    }
    return f"`{calls.get(name) or f'Implicit(CG({budget}))'}`"


def memory_table():
    found = record("figure2b")["result"]
    header = ["MiB for", *(f"{step} steps" for step in found["steps"])]
    lines = [[_method(name), *(f"{size / MIB:,.0f}" for size in sizes)] for name, sizes in found["temporary"].items()]
    return rows(header, lines)


def memory_figure(axes):
    found = record("figure2b")["result"]
    for name, sizes in found["temporary"].items():
        axes.loglog(found["steps"], [size / MIB for size in sizes], "o-", ms=4, label=_method(name).replace("`", ""))
    axes.set(xlabel="inner steps", ylabel="temporary memory, MiB")


SPEEDS = {"W1": "5-way 1-shot", "W2": "20-way 5-shot", "ridge": "ridge", "logistic": "logistic"}


def seconds():
    """Return the computation, the contender, its median seconds, and their ratio to ours, for each timing."""
    for item, computation in SPEEDS.items():
        found = record(f"speed-{item}")
        for who, times in found["seconds"].items():
            yield computation, who, statistics.median(times), found["ratios"][who]["median"]


def seconds_table():
    header = ["computation", "library", "seconds", "ratio to ours"]
    return rows(header, [[what, who, f"{time:.3f}", f"{ratio:.2f}"] for what, who, time, ratio in seconds()], words=2)


def seconds_figure(axes):
    bars = list(seconds())
    for number, computation in enumerate(SPEEDS.values()):
        places = [place for place, (what, *_) in enumerate(bars) if what == computation]
        axes.barh(places, [bars[place][3] for place in places], color=f"C{number}", label=computation)
    axes.set_yticks(range(len(bars)), [who.partition(",")[0] for _, who, *_ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="seconds, relative to ours")


AFTER = (0.3, 1.0, 3.0, 8.0)


def samples():
    """Return, for each of our algorithms on the logistic problem, the median gap h − h* after some seconds."""
    found = record("bilevel-logistic")
    ours = {name: entry["runs"] for name, entry in found["contenders"].items() if entry["ours"]}
    return {
        name.removesuffix(", bilevel"): [statistics.median(_last(run, limit) for run in runs) for limit in AFTER]
        for name, runs in ours.items()
    }


def _last(run, limit):
    """Return the gap of the last point of a run that was reached within a number of seconds."""
    reached = [gap for time, gap in zip(run["seconds"], run["gap"], strict=True) if time <= limit]
    return reached[-1]


def samples_table():
    header = ["gap after", *(f"{limit:g} s" for limit in AFTER)]
    return rows(header, [[name, *(f"{gap:.1e}" for gap in gaps)] for name, gaps in samples().items()])


def samples_figure(axes):
    for name, gaps in samples().items():
        axes.loglog(AFTER, gaps, "o-", ms=4, label=name)
    axes.set_xticks(AFTER, [f"{limit:g}" for limit in AFTER])
    axes.minorticks_off()
    axes.set(xlabel="seconds", ylabel="h(θ) − h*")


FIGURES = {
    "error": (error_table, error_figure),
    "memory": (memory_table, memory_figure),
    "seconds": (seconds_table, seconds_figure),
    "samples": (samples_table, samples_figure),
}
