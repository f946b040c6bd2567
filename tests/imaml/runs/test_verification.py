"""Verification: correct meta-gradients of a small network pass the checks, and planted faults fail them."""

import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
import imaml
from imaml import Learner, Task
from imaml.cli import main
from imaml.runs import results, verification
from imaml.runs.task_derivatives import conjugate_gradients
from imaml.settings.parts import Conv4


@pytest.fixture(scope="module", autouse=True)
def in_float64(quick_compilation, double_precision):
    """Run the tests of this module in float64, with quick compilation because the programs are small."""
    with double_precision():
        yield


STEPS = (4, 16, 64, 256)


def apply(theta, x):
    """A smooth network of twelve inputs, four tanh units and three classes."""
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


@pytest.mark.slow("takes central differences of a long inner solve")
def test_the_meta_gradient_of_a_smooth_learner_is_right(setting):
    checks = {check.name: check for check in (*verification.check_system(*setting), *solution_checks(setting))}
    assert all(check.ok for check in checks.values()), list(checks.values())
    assert 1e-6 < checks["CG at its budget"].value < 1  # Six CG steps do not solve the system exactly.
    budget = checks["CG at its budget"]
    # Twelve CG steps bring the relative error of the gradient below verification.NEAR, so no larger budget is tried.
    assert [steps for steps, *_ in budget.longer] == [12]
    assert budget.longer[0][1] < budget.residual < 1 and budget.longer[0][2] < budget.value
    assert 0 < budget.inner_residual < 1 and budget.inner_steps == 16
    learner, theta, task = setting
    phi, unravel = ravel_pytree(learner.adapt(theta, task).w)
    loss = jax.hessian(lambda phi: learner.loss(learner.apply(unravel(phi), task.support_x), task.support_y))
    assert budget.indefinite == (np.linalg.eigvalsh(loss(phi))[0] < -learner.strength)
    assert checks["finite differences"].value < 1e-6
    # With step size 0.1 and λ = 1, a step multiplies the inner error by about 1 − √0.1 = 0.68, and 0.68^256 = 1e-43.
    assert checks["unrolled MAML"].value < 1e-3
    report = str(verification.Verification("tiny", 100, tuple(checks.values()), 1.0))
    assert report.endswith("ok, 1 seconds") and "FAILED" not in report


def faulty(change):
    """Return a ``solve_scaled`` that replaces each leaf v of the solution for right-hand side b by ``change(v, b)``."""
    from bilevel.methods import implicit

    real = implicit.solve_scaled

    def planted(linear, matvec, b, *rest):
        v, info = real(linear, matvec, b, *rest)
        return jax.tree.map(change, v, b), info

    return planted


@pytest.mark.slow("forms the adjoint system of a network")
@pytest.mark.parametrize("change", [lambda v, b: 1.01 * v, lambda v, b: b], ids=["1.01 v", "b"])
def test_a_wrong_adjoint_solution_fails_both_checks_of_the_system(setting, monkeypatch, change):
    monkeypatch.setattr("bilevel.methods.implicit.solve_scaled", faulty(change))
    assert not any(check.ok for check in verification.check_system(*setting))


@pytest.mark.slow("forms the adjoint system of a network")
def test_a_cg_solve_with_a_residual_above_1_fails_its_check_with_a_remedy(setting):
    learner, theta, task = setting
    # With a small strength, I + H/λ is ill-conditioned and indefinite, and two CG steps end far from its solution.
    learner = replace(learner, strength=1e-3, method=bl.Implicit(bl.CG(2)))
    _, row = verification.check_system(learner, theta, task)
    assert (
        not row.ok and "worse than that of the zero vector" in row.found and "increase linear.max_steps" in row.remedy
    )


@pytest.mark.slow("unrolls the inner steps of a network")
def test_a_wrong_sign_is_caught_by_differences_and_by_unrolling(setting, monkeypatch):
    monkeypatch.setattr("bilevel.methods.implicit.solve_scaled", faulty(lambda v, b: -v))
    _, differences, unrolled = solution_checks(setting)
    assert not differences.ok and not unrolled.ok


def test_the_last_gap_of_unrolled_maml_must_be_the_smallest_and_a_tenth_of_the_first():
    right = [0.5, 0.2, 0.04], [0.5, 0.6, 0.04], [0.5, 1e-6, 2e-6]
    wrong = [0.5, 0.01, 0.04], [0.5, 0.2, 0.3], [0.5, 0.4, 0.3], [0.5, 0.4, float("nan")]
    for gaps, ok in (*((gaps, True) for gaps in right), *((gaps, False) for gaps in wrong)):
        assert verification._check_gaps(np.array(gaps), (1, 2, 3)).ok is ok


def test_presets_that_cannot_be_verified_are_refused_before_the_data_are_read():
    preset = imaml.preset("glyphs-5way-1shot-gd")
    with pytest.raises(imaml.InputError, match="choose a preset with the algorithm imaml and the fidelity paper"):
        imaml.verify(preset.using("maml"))

    @dataclass(frozen=True)
    class Kinked:
        def build(self, outputs):
            raise AssertionError("verify refuses the network before it builds it")

    with pytest.raises(imaml.InputError, match="Kinked has no method smooth_variant: add one"):
        imaml.verify(replace(preset, network=Kinked()))


@pytest.mark.slow("evaluates a preset's convolutional network and its smooth variant")
def test_a_preset_is_checked_with_its_own_network_and_its_smooth_variant(monkeypatch):
    """``check_system`` gets the preset's network, and ``check_solution`` gets its smooth variant.

    Both get the same θ and task. The two checks are replaced by functions that record their arguments, because for a
    convolutional network they take too long to compile in a test.
    """
    calls = []
    for name in ("check_system", "check_solution"):
        monkeypatch.setattr(verification, name, lambda *arguments: calls.append(arguments) or ())
    preset = imaml.preset("glyphs-5way-1shot-gd")
    preset = replace(preset, network=Conv4(filters=2), outer=replace(preset.outer, queries=1))
    found = imaml.verify(preset, steps=(1, 2), directions=3)
    (own, theta, task, _), (variant, *same, steps, directions, _, _) = calls
    assert found.ok and (steps, directions) == ((1, 2), 3) and same == [theta, task]
    assert {leaf.dtype for leaf in jax.tree.leaves((theta, task.query_x))} == {jnp.dtype("float64")}
    assert own.solver == variant.solver == preset.inner and own.strength == variant.strength == preset.strength
    outputs, smooth = own.apply(theta, task.query_x), variant.apply(theta, task.query_x)
    assert outputs.shape == smooth.shape == (5, 5) and 0 < jnp.abs(outputs - smooth).max() < 1


@pytest.mark.slow("runs every stage of a verification, on a small learner")
def test_each_computation_is_announced_with_its_number(setting, monkeypatch):
    """The preset's learner is replaced by a small one, on which the checks themselves run."""
    system, solution = verification.check_system, verification.check_solution
    learner, theta, task = setting
    monkeypatch.setattr(verification, "check_system", lambda *arguments: system(learner, theta, task, arguments[-1]))
    monkeypatch.setattr(
        verification, "check_solution", lambda *arguments: solution(learner, theta, task, *arguments[3:])
    )
    preset = imaml.preset("sinusoid-5shot-gd")
    messages = []
    assert imaml.verify(preset, steps=STEPS, on_event=messages.append).ok
    assert [message.split(": ")[0] for message in messages] == [f"{i} of 7" for i in range(1, 8)]


@pytest.mark.parametrize("error, explained", [(0.98, True), (0.001, False)])
@pytest.mark.parametrize("indefinite", [True, False])
def test_the_error_of_the_truncated_gradient_is_explained_in_words(error, explained, indefinite):
    row = results.BudgetCheck(
        verification.TRUNCATED, True, "a figure", value=error, residual=0.53, cosine=0.2, inner_steps=16,
        inner_residual=0.07, longer=((10, 2.33, 1.33), (20, 0.4, 0.3)), indefinite=indefinite,
    )  # fmt: skip
    report = " ".join(str(verification.Verification("tiny", 100, (row,), 1.0)).split())
    sentences = [
        f"differs from the exact solution of the same system by {error:.0%} of that solution's norm",
        "cosine 0.20, and the relative residual of g is 53%.",
        "(--linear.max_steps). On this task, 10 steps give a residual of 233% and a distance of 133%; 20 steps",
        "is indefinite here" if indefinite else "A larger --strength makes the system easier",
        "its 16 steps leave 7% of the norm of the inner gradient at the start. More steps (--inner.max_steps)",
    ]
    assert all((sentence in report) is explained for sentence in sentences), report
    assert report.endswith("ok, 1 seconds")
    failed = replace(row, ok=False, remedy="a remedy.")
    assert "differs from" not in str(verification.Verification("tiny", 100, (failed,), 1.0))


def test_conjugate_gradients_solve_a_system_in_as_many_steps_as_it_has_eigenvalues():
    values, b = np.array([1.0, 2.0, 5.0, -1.5]), np.array([1.0, -2.0, 3.0, 0.5])
    *_, (x, residual, _) = itertools.islice(conjugate_gradients(lambda u: values * u, b), 4)
    np.testing.assert_allclose(x, b / values, rtol=1e-12)
    assert residual < 1e-12
    assert any(curvature < 0 for *_, curvature in itertools.islice(conjugate_gradients(lambda u: -u, b), 1))


def test_the_command_verifies_a_preset_with_other_settings_and_is_quiet_if_asked(monkeypatch, capsys):
    monkeypatch.setattr("imaml.cli.start_jax", lambda: None)
    chosen = []

    def verify(preset, data=None, dataset=None, on_event=print, on_progress=None):
        chosen.append(preset)
        on_event("a stage")
        return verification.Verification(preset.name, 5, (bl.Check("a row", True, "a figure"),), 1.0)

    monkeypatch.setattr(verification, "verify", verify)
    for words, stages in (([], 1), (["--quiet"], 0)):
        assert main(["verify", "glyphs-5way-1shot-hf", "--linear.max_steps", "7", "--network.filters=2", *words]) == 0
        printed = capsys.readouterr().out
        assert printed.count("a stage …") == stages and "a row" in printed
        assert (chosen[-1].linear.max_steps, chosen[-1].network.filters) == (7, 2)


@pytest.mark.parametrize("sound", [True, False])
def test_the_command_prints_the_checks_and_exits_with_1_if_one_fails(monkeypatch, capsys, sound):
    monkeypatch.setattr("imaml.cli.start_jax", lambda: None)
    rows = (bl.Check("a row", sound, "a figure", "a remedy."),)

    def verify(preset, data=None, dataset=None, on_event=print, on_progress=None):
        on_event("a stage")
        return verification.Verification(preset.name, 5, rows, 1.0)

    monkeypatch.setattr(verification, "verify", verify)
    assert main(["verify"]) == (0 if sound else 1)
    printed = capsys.readouterr().out
    assert "a stage" in printed and "glyphs-5way-1shot-gd" in printed
    assert ("a row: a remedy." in printed) is not sound


def test_an_unknown_preset_is_refused_with_a_suggestion(capsys):
    assert main(["verify", "glyph-5way-1shot-gd"]) == 2
    assert "glyphs-5way-1shot-gd" in capsys.readouterr().err
