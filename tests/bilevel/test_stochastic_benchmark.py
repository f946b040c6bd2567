"""The benchmark of stochastic algorithms: exact values of its problems, its record of a run, and a small run.

A worker process runs its solver in turns. A turn ends when the total processor time reaches a requested number of
seconds. The process records the solver's variables at scheduled times.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from benchmarks.bilevel import __main__ as suites
from benchmarks.bilevel import contenders, report, turns
from benchmarks.bilevel.problems import CLASSES, PROBLEMS, Data
from benchmarks.bilevel.race import Peer
from benchmarks.children import Missing

pytestmark = pytest.mark.usefixtures("quick_compilation")
SMOOTH = ("tiny-quadratic", "tiny-logistic")


def declared(problem):
    """Return the benchmark's problem as a bl.Problem whose data are a dict of the inner and the outer samples."""
    return bl.Problem(
        bl.Stationary(lambda z, x, data: problem.inner(z, x, data["inner"])),
        lambda z, x, data: problem.outer(z, x, data["outer"]),
    )


def in_float64(data):
    inner, outer = (
        {name: jnp.asarray(a, jnp.float64 if a.dtype == np.float32 else a.dtype) for name, a in part.items()}
        for part in (data.inner, data.outer)
    )
    return {"inner": inner, "outer": outer}


def test_shuffled_samples_keep_their_rows_together_and_their_positions():
    data = PROBLEMS["tiny-cleaning"].data(seed=1)
    shuffled = data.shuffled(seed=2)
    for before, after in ((data.inner, shuffled.inner), (data.outer, shuffled.outer)):
        rows = [{tuple(row): label for row, label in zip(a["image"], a["label"], strict=True)} for a in (before, after)]
        assert rows[0] == rows[1] and not np.array_equal(before["image"], after["image"])
    np.testing.assert_array_equal(shuffled.inner["index"], np.arange(data.sizes[0]))
    assert not np.array_equal(shuffled.outer["image"], data.shuffled(seed=3).outer["image"])


@pytest.mark.parametrize("name", SMOOTH)
def test_the_exact_gradient_equals_central_differences_of_the_exact_value(name):
    data = PROBLEMS[name].data(seed=1)
    reference, x = PROBLEMS[name].reference(data), np.asarray(data.x, np.float64)
    step = 1e-5
    differences = [
        (reference.value_and_gradient(x + e)[0] - reference.value_and_gradient(x - e)[0]) / (2 * step)
        for e in step * np.eye(len(x))
    ]
    # Central differences have errors of step² (third derivatives are of order one) and of eps/step.
    np.testing.assert_allclose(reference.value_and_gradient(x)[1], differences, rtol=1e-6, atol=1e-9)


@pytest.mark.slow("compiles an inner solve for each problem")
@pytest.mark.parametrize("name", SMOOTH)
def test_the_exact_value_and_gradient_equal_those_of_the_losses(name):
    problem = PROBLEMS[name]
    data = problem.data(seed=1)
    solver, method = bl.HessianFree(max_steps=30, cg_steps=30), bl.Implicit(bl.CG(max_steps=40, tol=1e-13))
    z, x = (jnp.asarray(start, jnp.float64) for start in (data.z, data.x))
    out = bl.value_and_hypergradient(declared(problem), solver, method, on_failure="ignore")(x, z, in_float64(data))
    value, gradient = problem.reference(data).value_and_gradient(data.x)
    assert float(out.value) == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(out.gradient, gradient, rtol=1e-8, atol=1e-11)


def test_the_gap_of_the_quadratic_is_the_difference_of_values_and_zero_at_the_minimiser():
    data = PROBLEMS["tiny-quadratic"].data(seed=1)
    reference = PROBLEMS["tiny-quadratic"].reference(data)
    least = reference.value_and_gradient(reference.minimiser)[0]
    gap = reference.value_and_gradient(data.x)[0] - least
    assert reference.measure(data.z, data.x)["gap"] == pytest.approx(gap, rel=1e-10)
    assert reference.measure(data.z, reference.minimiser) == {"gap": 0.0, "gradient": 0.0}
    assert np.linalg.eigvalsh(reference.hessian)[0] > 0


def test_the_least_value_of_the_logistic_problem_is_below_every_value_nearby():
    data = PROBLEMS["tiny-logistic"].data(seed=1)
    reference = PROBLEMS["tiny-logistic"].reference(data)
    rng = np.random.default_rng(0)
    assert np.isfinite(reference.least)
    points = np.concatenate([rng.normal(0, 3, (200, 5)), reference.minimiser + rng.normal(0, 0.1, (50, 5))])
    assert min(reference.measure(data.z, x)["gap"] for x in points) > -1e-13
    assert reference.measure(data.z, reference.minimiser)["gradient"] < 1e-9


@pytest.mark.slow("makes the data of a problem")
def test_hyper_cleaning_has_standardised_images_and_a_weight_for_each_image():
    problem = PROBLEMS["tiny-cleaning"]
    data = problem.data(seed=1)
    varying = data.inner["image"].std(axis=0) > 0
    np.testing.assert_allclose(data.inner["image"].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(data.inner["image"].std(axis=0)[varying], 1, rtol=1e-4)
    arrays, z = in_float64(data), jnp.full(28 * 28 * CLASSES, 0.01, jnp.float64)
    # x_i sets the weight of image i alone, so ∂inner/∂x_i is sigmoid′(x_i) times the loss of image i, divided by n.
    x = jnp.linspace(-2, 2, len(data.x), dtype=jnp.float64)
    slope = jax.grad(problem.inner, argnums=1)(z, x, arrays["inner"])
    expected = jax.nn.sigmoid(x) * jax.nn.sigmoid(-x) * problem.losses(z, arrays["inner"]) / len(x)
    np.testing.assert_allclose(slope, expected, rtol=1e-10)
    measured = problem.reference(data).measure(np.asarray(z), np.asarray(x))
    assert measured["validation_loss"] == pytest.approx(float(problem.outer(z, x, arrays["outer"])), rel=1e-12)
    # A constant z predicts the same class for all images, which is wrong for most of the test images.
    assert 0.7 < measured["test_error"] < 1


def test_arrays_survive_a_folder(tmp_path):
    data = PROBLEMS["tiny-cleaning"].data(seed=1)
    data.save(tmp_path)
    loaded = Data.load(tmp_path)
    for group in ("inner", "outer", "test"):
        for name, array in getattr(data, group).items():
            np.testing.assert_array_equal(array, getattr(loaded, group)[name])
    np.testing.assert_array_equal(data.x, loaded.x)


def test_a_recorder_keeps_the_last_point_before_each_scheduled_time():
    recorder = turns.Recorder()
    times = np.arange(1, 2000) * 0.00173
    for number, seconds in enumerate(times):
        recorder.add(seconds, number, np.zeros(1), np.zeros(1), 0.0)
    kept = np.array([point[0] for point in recorder.points])
    due = turns.schedule()
    due = due[(due > times[0]) & (due < times[-1])]
    expected = sorted({max(t for t in times if t <= moment) for moment in due})
    np.testing.assert_array_equal(kept, expected)


class Counter:
    """A solver that counts its blocks of steps, with the interface of benchmark_bilevel's solvers.

    Its ``outer_var`` becomes NaN in the block after ``broken_after`` blocks.
    """

    def __init__(self, broken_after=10**9):
        self._broken_after = broken_after

    def run(self, callback):
        self.inner_var = self.outer_var = np.zeros(1)
        while callback():
            self.inner_var = self.outer_var = self.outer_var + 1
            if self.outer_var[0] > self._broken_after:
                self.outer_var = np.full(1, np.nan)


def answered(solver, requests):
    answers, pending = [], iter(requests)
    run = turns.Turns(solver, 5, lambda: next(pending), answers.append)
    run.start()
    solver.run(run)
    return answers


def test_a_turn_ends_after_the_block_that_passes_its_time_and_the_next_one_goes_on(tmp_path):
    answers = answered(Counter(), [{"seconds": 0.01}, {"seconds": 0.02}, {"save": str(tmp_path / "points.npz")}])
    assert [answer["seconds"] >= until for answer, until in zip(answers, (0.01, 0.02), strict=True)] == [True, True]
    assert answers[0]["steps"] < answers[1]["steps"]
    with np.load(tmp_path / "points.npz") as points:
        np.testing.assert_array_equal(points["steps"], 5 * points["x"][:, 0])
        assert points["steps"][-1] == answers[1]["steps"] and points["seconds"][-1] == answers[1]["seconds"]


def test_a_run_that_diverges_says_so_at_once(tmp_path):
    answers = answered(Counter(broken_after=3), [{"seconds": 60.0}, {"save": str(tmp_path / "points.npz")}])
    assert answers[-1]["finite"] is False and answers[-1]["steps"] == 4 * 5


def test_a_measure_at_a_time_is_that_of_the_last_point_before_it():
    run = {"seconds": [0.1, 0.9, 1.1], "gap": [3.0, 2.0, 1.0], "steps": [1, 2, 3]}
    assert report.at(run, "gap", 1.0) == 2.0 and report.at(run, "gap", 8.0) == 1.0
    assert np.isnan(report.at(run, "gap", 0.05))
    assert report.seconds_until(run, "gap", 2.0) == 0.9 and report.seconds_until(run, "gap", 0.5) == float("inf")


def test_a_missing_peer_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(Missing, match=r"needs --peer, and .*soba.py does not exist: git clone"):
        Peer(tmp_path, tmp_path).check()
    with pytest.raises(Missing, match="needs --peer: git clone"):
        Peer().check()


def test_the_page_has_the_tables_of_the_records():
    page = report.PAGE.read_text()
    assert report.recorded(report.RESULTS) and report.in_page(page) == report.table(report.RESULTS)
    assert report.in_page(report.fill(page, "| other |")) == "| other |"


def test_the_readme_has_the_ratios_of_the_records():
    ratios = {
        name: [found["steps"] for found in report.comparisons(report.load(report.RESULTS, name)).values()]
        for name in ("quadratic", "logistic", "cleaning")
    }
    quadratic, others = ratios["quadratic"], ratios["logistic"] + ratios["cleaning"]
    expected = (
        f"take {min(quadratic):.1f} to {max(quadratic):.1f} times as many steps a second "
        "as those of benchmark_bilevel on a quadratic, and "
        f"{min(others):.2f} to {max(others):.0f} times as many on two other problems"
    )
    assert expected in " ".join((report.ROOT / "README.md").read_text().split())


def test_oracle_calls_of_a_step():
    assert contenders.oracles_of_a_step("SOBA", 1024, 1024) == 5 * 64
    # SRBA passes over all samples in one of 16 steps. Each of the other 15 steps evaluates its batch twice.
    assert contenders.oracles_of_a_step("SRBA", 1024, 1024) == (5 * 1024 + 15 * 10 * 64) / 16


@pytest.mark.slow("starts a process for each contender")
@pytest.mark.parametrize("name", ["tiny-quadratic", "tiny-logistic"])
def test_the_benchmark_runs_without_the_peer(name, tmp_path, monkeypatch, capsys):
    rates = {"SOBA": {"step_size": 0.05, "outer_ratio": 1.0}}
    full = {"optimizer": "adam", "rate": 0.1, "newton_steps": 2}
    plan = contenders.Plan({"SOBA": 16}, (0.05,), (1.0,), full_batch=(full,))
    monkeypatch.setitem(contenders.PLANS, name, plan)
    report.save(tmp_path, "rates", {name: {"chosen": rates | {"full batch adam": full}}})
    arguments = ["run", "--problems", name, "--seconds", "0.5", "--seeds", "1", "--core", "0", "--block", "8"]
    folders = {"--rates": tmp_path, "--out": tmp_path, "--images": tmp_path / "images", "--arrays": tmp_path / "arrays"}
    assert suites.main([*arguments, *(str(word) for pair in folders.items() for word in pair)]) == 0
    printed = capsys.readouterr()
    assert "benchmark_bilevel needs --peer" in printed.err and f"### {name}" in printed.out
    record = json.loads((tmp_path / f"bilevel-{name}.json").read_text())
    assert record["contenders"]["SOBA, bilevel"]["block"] == 8
    for contender in record["contenders"].values():
        (run,) = contender["runs"]
        assert run["seconds"][-1] >= 0.5 and run["gap"][-1] < run["gap"][0]
    assert (tmp_path / "images" / f"stochastic-{name}.png").stat().st_size > 0
