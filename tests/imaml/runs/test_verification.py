"""The checks of a preset's meta-gradient, on a network small enough for a test, and with faults planted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
import imaml
from imaml import Learner, Task
from imaml.cli import main
from imaml.runs import verification
from imaml.settings.parts import Conv4


@pytest.fixture(scope="module", autouse=True)
def in_float64(quick_compilation, double_precision):
    """All of this module; there is little to run."""
    with double_precision():
        yield


STEPS = (4, 16, 64, 256)


def apply(theta, x):
    """Twelve inputs, four tanh units, three classes: smooth, as the twin is, and compiled in no time."""
    return jnp.tanh(x @ theta["hidden"]) @ theta["head"]


@pytest.fixture(scope="module")
def setting(in_float64):
    random = np.random.default_rng(0)
    y = np.tile(np.arange(3, dtype=np.int32), 2)
    task = Task(*(jnp.asarray(array) for array in (random.normal(size=(6, 12)), y, random.normal(size=(6, 12)), y)))
    theta = {"hidden": jnp.asarray(random.normal(size=(12, 4))), "head": jnp.asarray(random.normal(size=(4, 3)))}
    return Learner(apply, bl.GradientDescent(0.1, max_steps=16), bl.Implicit(bl.CG(6)), strength=1.0), theta, task


def solution_checks(setting):
    return verification.check_solution(*setting, STEPS, directions=2, on_event=lambda message: None)


def test_the_meta_gradient_of_a_smooth_learner_is_right(setting):
    checks = {check.name: check for check in (*verification.check_system(*setting), *solution_checks(setting))}
    assert all(check.ok for check in checks.values()), list(checks.values())
    assert 1e-6 < checks["CG at its budget"].value < 1  # six steps leave something
    assert checks["finite differences"].value < 1e-6
    assert checks["unrolled MAML"].value < 1e-3  # the slowest error falls by 1 − 0.1·λ at least: 0.9^256 is 2e-12
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


def test_a_preset_is_checked_with_its_own_network_and_its_smooth_twin(monkeypatch):
    """What is handed to the checks above, which are too slow to compile for a convolutional network in a test."""
    handed = []
    for name in ("check_system", "check_solution"):
        monkeypatch.setattr(verification, name, lambda *arguments: handed.append(arguments) or ())
    preset = imaml.preset("glyphs-5way-1shot-gd")
    preset = replace(preset, network=Conv4(filters=2), outer=replace(preset.outer, queries=1))
    found = imaml.verify(preset, steps=(1, 2), directions=3)
    (own, theta, task), (twin, *same, steps, directions, _) = handed
    assert found.ok and (steps, directions) == ((1, 2), 3) and same == [theta, task]
    assert {leaf.dtype for leaf in jax.tree.leaves((theta, task.query_x))} == {jnp.dtype("float64")}
    assert own.solver == twin.solver == preset.inner and own.strength == twin.strength == preset.strength
    outputs, smooth = own.apply(theta, task.query_x), twin.apply(theta, task.query_x)
    assert outputs.shape == smooth.shape == (5, 5) and 0 < jnp.abs(outputs - smooth).max() < 1


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
