"""The checks of a preset's meta-gradient, on a network small enough for a test, and with faults planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from imaml import Learner, Task, networks, verification
from imaml.cli import main


@pytest.fixture(scope="module", autouse=True)
def in_float64(quick_compilation, double_precision):
    """All of this module; there is little to run."""
    with double_precision():
        yield


STEPS = (4, 16, 64, 256)


def smooth_learner(method=None):
    """A tiny twin: two filters, 6×6 images, 3 classes; λ makes its inner problem convex enough."""
    network = networks.conv4(3, filters=2, image_shape=(6, 6, 1), activation=verification._softplus)
    return network, Learner(network.apply, bl.GradientDescent(0.1, steps=16), method or bl.Implicit(bl.CG(5)), 1.0)


@pytest.fixture(scope="module")
def setting(in_float64):
    network, learner = smooth_learner()
    random = np.random.default_rng(0)
    x, y = random.random((2, 6, 6, 6, 1)), np.tile(np.arange(3, dtype=np.int32), 2)
    task = Task(*(jnp.asarray(array) for array in (x[0], y, x[1], y)))
    theta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.init(jax.random.key(0)))
    return learner, theta, task


def solution_checks(setting):
    return verification.check_solution(*setting, STEPS, directions=2, on_event=lambda message: None)


def test_the_meta_gradient_of_a_tiny_twin_is_right(setting):
    checks = {check.name: check for check in (*verification.check_system(*setting), *solution_checks(setting))}
    assert all(check.ok for check in checks.values()), list(checks.values())
    assert 1e-6 < checks["CG at its budget"].value < 1  # five steps leave something
    assert checks["finite differences"].value < 1e-6
    assert checks["unrolled MAML"].value < 1e-3
    report = str(verification.Verification("tiny", 100, tuple(checks.values()), 1.0))
    assert report.endswith("ok, 1 seconds") and "FAILED" not in report


def faulty(change):
    """The adjoint v replaced by ``change(v, b)`` in every implicit gradient."""
    from bilevel import hypergradients

    real = hypergradients.solve_scaled

    def planted(linear, matvec, b, *rest):
        v, info = real(linear, matvec, b, *rest)
        return jax.tree.map(change, v, b), info

    return planted


@pytest.mark.parametrize("change", [lambda v, b: 1.01 * v, lambda v, b: b], ids=["1.01 v", "b"])
def test_another_adjoint_does_not_solve_the_system(setting, monkeypatch, change):
    monkeypatch.setattr("bilevel.hypergradients.solve_scaled", faulty(change))
    assert not any(check.ok for check in verification.check_system(*setting))


def test_a_wrong_sign_is_caught_by_differences_and_by_unrolling(setting, monkeypatch):
    monkeypatch.setattr("bilevel.hypergradients.solve_scaled", faulty(lambda v, b: -v))
    _, differences, unrolled = solution_checks(setting)
    assert not differences.ok and not unrolled.ok


def test_gaps_must_fall_to_the_end():
    for gaps, ok in (([0.5, 0.2, 0.04], True), ([0.5, 0.2, 0.3], False), ([0.5, 0.4, 0.3], False)):
        assert verification._check_gaps(np.array(gaps), (1, 2, 3)).ok is ok


@pytest.mark.parametrize("sound", [True, False])
def test_the_command_prints_what_was_found_and_exits_by_it(monkeypatch, capsys, sound):
    monkeypatch.setattr("imaml.cli._start_jax", lambda: None)
    rows = (bl.Check("a row", sound, "a figure", "a remedy."),)

    def verify(preset, data=None, on_event=print):
        on_event("a stage")
        return verification.Verification(preset.name, 5, rows, 1.0)

    monkeypatch.setattr(verification, "verify", verify)
    assert main(["verify"]) == (0 if sound else 1)
    printed = capsys.readouterr().out
    assert "a stage" in printed and "glyphs-5way-1shot-gd" in printed
    assert ("a row: a remedy." in printed) is not sound


def test_a_preset_that_does_not_exist_is_a_mistake(capsys):
    assert main(["verify", "glyph-5way-1shot-gd"]) == 2
    assert "glyphs-5way-1shot-gd" in capsys.readouterr().err
