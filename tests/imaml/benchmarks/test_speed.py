"""The speed benchmark: ratios of times, the processes of contenders, exact gradients, and refused arguments."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from benchmarks.children import Child, Missing
from benchmarks.speed import __main__ as suites
from benchmarks.speed import harness, report, workloads

SMALL = {"features": 12, "samples": 9, "validation": 7}
# With Gaussian features of these sizes, each step of gradient descent reduces the inner error by well over a tenth, so
# 400 steps are enough.
STEPS = {"steps": 400, "iterations": 40, "tol": 1e-6}
OURS = harness.Contender("ours", "ours", "hypergradient", ours=True)


def small(name):
    return dataclasses.replace(workloads.ITEMS[name], **SMALL, **STEPS)


def test_a_ratio_compares_two_times_of_the_same_round():
    # The second round is slower for both contenders, which does not affect its ratio.
    assert harness.ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == {"median": 3.0, "least": 2.0, "largest": 4.0}


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_the_exact_hypergradient_equals_central_differences(name):
    item = dataclasses.replace(workloads.ITEMS[name], features=4, samples=6, validation=5)
    arrays = {key: value.astype(np.float64) for key, value in item.arrays("float32").items()}

    def value(theta):
        x, y, penalty, w = arrays["x"], arrays["y"], np.exp(theta), np.zeros(4)
        for _ in range(4000):  # Gradient descent is independent of the Newton steps in item.exact().
            margin = x @ w
            slope = margin - y if name == "ridge" else -y / (1 + np.exp(y * margin))
            w = w - 0.02 * (x.T @ slope / len(y) + penalty * w)
        margin, y = arrays["x_val"] @ w, arrays["y_val"]
        return np.mean((margin - y) ** 2) / 2 if name == "ridge" else np.mean(np.log1p(np.exp(-y * margin)))

    theta, step = arrays["theta"], 1e-4
    differences = [(value(theta + e) - value(theta - e)) / (2 * step) for e in step * np.eye(4)]
    # Central differences have errors of step² (third derivatives are of order one) and of eps/step.
    np.testing.assert_allclose(item.exact(), differences, rtol=1e-5, atol=1e-9)


@pytest.mark.slow("starts a process for each contender")
def test_contenders_run_alternately_in_separate_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    item = small("ridge")
    again = dataclasses.replace(OURS, label="with more steps", changes=(("steps", 500),))
    record = harness.alternate(item, [OURS, again], rounds=3)
    assert {label: len(times) for label, times in record["seconds"].items()} == {"ours": 3, "with more steps": 3}
    assert record["ratios"]["ours"] == {"median": 1.0, "least": 1.0, "largest": 1.0}
    assert "jax" in record["versions"]["ours"] and "torch" not in record["versions"]["ours"]
    report.save("speed-ridge", record)
    assert json.loads((tmp_path / "speed-ridge.json").read_text()) == report.load("speed-ridge")
    assert len(report.rows(record)) == 2 + 2
    assert "### ridge" in report.table()


@pytest.mark.slow("starts a process for a contender")
def test_the_gradient_from_a_contenders_process_equals_the_exact_one(tmp_path):
    item = small("logistic")
    with harness.Process(item, OURS) as process:
        found = process.gradient("hypergradient", tmp_path)["theta"]
    # There are twelve unknowns, the condition number is below ten, and the system is solved to tol = 1e-6.
    np.testing.assert_allclose(found, item.exact(), rtol=0, atol=1e-4 * np.abs(item.exact()).max())


def test_a_request_to_a_process_that_has_ended_is_refused_with_its_status():
    with Child("the peer", [sys.executable, "-c", "import sys; sys.exit(3)"], {}) as child:
        for _ in range(2):  # the second time, the pipe is closed
            with pytest.raises(Missing, match="the peer ended with status 3"):
                child.ask(step=1)


def test_a_peer_whose_python_is_missing_is_refused(monkeypatch):
    monkeypatch.setenv("SPEED_PEERS_PYTHON", "/nowhere/python")
    theirs = harness.Contender("theirs", "jaxopt_root", "hypergradient")
    with pytest.raises(Missing, match=r"jaxopt_root: there is no /nowhere/python"):
        harness.Process(small("ridge"), theirs)


def test_an_unknown_item_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        suites.main(["few-shot", "W3"])
    assert stopped.value.code == 2 and "no item W3; the items are W1, W2" in capsys.readouterr().err


def test_the_floor_counts_every_gradient_and_product():
    item = workloads.ITEMS["W1"]
    # In milliseconds, a gradient takes 1, an outer gradient 1, a product 2, and linearising 3.
    least = {"20 gradients": 20, "20 outer gradients": 20, "linearise, 1": 5, "linearise, 21": 45, "meta-gradient": 400}
    found = report.floor(item, {name: [time / 1e3, time] for name, time in least.items()})
    assert found["sum of parts"] == pytest.approx(16 * 1 + 1 + 3 + 6 * 2)
    assert found["share"] == pytest.approx(32 / 50)


def test_pytorch_computes_the_same_gradient_of_the_same_operator(tmp_path):
    if not harness.PEERS.exists():
        pytest.skip(f"PyTorch has no environment here: there is no {harness.PEERS}")
    item = dataclasses.replace(workloads.ITEMS["W1"], tasks=1, steps=2, products=2)
    found = {}
    for contender in (
        dataclasses.replace(suites.OURS, label="ours"),
        harness.Contender("theirs", "reference_torch", "paper's operator"),
    ):
        with harness.Process(item, contender, "float64") as process:
            found[contender.label] = process.gradient(contender.program, tmp_path)
    assert suites._relative(found["theirs"], found["ours"]) < suites.TOLERANCE


@pytest.mark.slow("compiles the item W1 at its real size")
def test_a_meta_gradient_of_w1_needs_at_most_6_4_mib():
    from benchmarks.speed.peers import ours

    assert ours.memory(workloads.ITEMS["W1"]) <= 6.4 * 2**20
