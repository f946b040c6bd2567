"""Tests of renamed settings: saved configs and command lines may use the old names, and files are not rewritten."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import imaml
from imaml import InputError
from imaml.arguments import parse
from imaml.reproduction import records
from imaml.settings import overrides
from imaml.settings.overrides import override, settings
from imaml.settings.published_presets import restore
from imaml.settings.renamed import RENAMED, current_path, with_current_names
from imaml.settings.saved import completed

SAVED = {
    "name": "glyphs-5way-1shot-gd", "dataset": "glyphs",
    "episode": {"ways": 5, "shots": 1, "queries": 1, "bright_paper": False},
    "rotations": {"train": False, "test": False},
    "network": {
        "filters": 32, "kernel_gain": 10.0, "head_gain": 1.0, "head_bias": 0.0, "pooling": False,
        "image_shape": [28, 28, 1],
    },
    "strength": 0.1,
    "inner": {"step_size": 0.2, "steps": 16, "tol": None, "momentum": 0.0},
    "linear": {"maxiter": 5, "tol": None, "ridge": 0.0, "preconditioner": None},
    "outer": {
        "learning_rate": 0.005, "tasks": 4, "queries": 15, "steps": 3000, "final_fraction": 0.0, "epsilon": 1e-08,
        "at_once": 1,
    },
    "seed": 0, "algorithm": "imaml", "fidelity": "paper", "test_steps": 0,
}  # fmt: skip
"""A config that was saved when the budgets had the names ``inner.steps`` and ``linear.maxiter``."""
SAVED_HESSIAN_FREE = SAVED | {
    "name": "glyphs-5way-1shot-hf", "inner": {"steps": 3, "cg_steps": 5, "tol": None, "halvings": 20},
}  # fmt: skip


# Minimal records whose budgets have the new names. They make these tests independent of the solvers of bilevel.


@dataclass(frozen=True)
class Inner:
    step_size: float
    max_steps: int
    tol: float | None = None
    momentum: float = 0.0


@dataclass(frozen=True)
class Linear:
    max_steps: int
    tol: float | None = None
    ridge: float = 0.0
    preconditioner: None = None
    engine: str = "jaxopt"


@dataclass(frozen=True)
class Outer:
    steps: int


@dataclass(frozen=True)
class OtherInner:
    inner: Inner


@dataclass(frozen=True)
class Baselines:
    maml: OtherInner


@dataclass(frozen=True)
class Renamed:
    """A record with the fields of a preset that the tested functions read."""

    inner: Inner = Inner(0.2, 16)
    linear: Linear = Linear(5, engine="watched")
    outer: Outer = Outer(3000)
    algorithm: str = "imaml"
    baselines: Baselines | None = None


@dataclass(frozen=True)
class OldRecord:
    """A record with the old name of the inner budget."""

    @dataclass(frozen=True)
    class Inner:
        steps: int = 16

    inner: Inner = Inner()


@pytest.mark.parametrize("saved", [SAVED, SAVED_HESSIAN_FREE], ids=["descent", "hessian-free"])
def test_a_config_with_the_old_names_restores_the_same_preset(saved):
    before = json.dumps(saved)
    assert restore(saved["name"], saved) == imaml.preset(saved["name"])
    assert json.dumps(saved) == before


def test_a_config_with_the_old_names_equals_the_present_config_once_completed():
    preset = imaml.preset(SAVED["name"])
    assert completed(preset, SAVED) == preset.config()


@pytest.mark.parametrize("path", sorted(records.KEPT.glob("*.json")), ids=lambda path: path.stem)
def test_the_records_in_the_package_can_be_restored_and_are_not_rewritten(path: Path):
    content = path.read_bytes()
    record = next(found for found in records.read() if found.config == json.loads(content)["config"])
    restored = restore(record.preset, record.config)
    # Records of version 0.1 have the two budgets under their old names.
    inner, linear = record.config["inner"], record.config["linear"]
    budgets = [settings(restored).get(current_path(restored, old)) for old in ("inner.steps", "linear.maxiter")]
    assert budgets[0] == inner.get("steps", inner.get("max_steps"))
    assert budgets[1] == (linear.get("maxiter", linear.get("max_steps")) if record.algorithm == "imaml" else None)
    assert path.read_bytes() == content


def test_a_renamed_field_gets_its_present_name():
    found = with_current_names(Renamed(), SAVED)
    assert found["inner"] == {"step_size": 0.2, "max_steps": 16, "tol": None, "momentum": 0.0}
    assert found["linear"] == {"max_steps": 5, "tol": None, "ridge": 0.0, "preconditioner": None}
    assert found["outer"]["steps"] == 3000  # the outer loop's budget keeps its name
    assert list(found) == list(SAVED)


def test_present_names_are_kept():
    config = dataclasses.asdict(Renamed())
    assert with_current_names(Renamed(), config) == config
    former = dataclasses.asdict(OldRecord())
    assert with_current_names(OldRecord(), former) == former


def test_the_fields_of_a_baselines_inner_loop_are_renamed():
    record = Renamed(baselines=Baselines(OtherInner(Inner(0.4, 1))))
    found = with_current_names(record, {"baselines": {"maml": {"inner": {"step_size": 0.4, "steps": 1}}}})
    assert found == {"baselines": {"maml": {"inner": {"step_size": 0.4, "max_steps": 1}}}}


def test_a_config_with_an_old_and_a_new_name_keeps_both_so_that_it_is_refused():
    both = {"inner": {"steps": 1, "max_steps": 2}}
    assert with_current_names(Renamed(), both) == both


def test_a_linear_engine_that_was_not_saved_is_jaxopts():
    found = completed(Renamed(), {"inner": SAVED["inner"], "linear": SAVED["linear"]})
    assert found["linear"] == {
        "max_steps": 5, "tol": None, "ridge": 0.0, "preconditioner": None, "engine": "jaxopt",
    }  # fmt: skip


def test_a_linear_engine_is_a_setting_with_two_choices():
    chosen = Renamed()
    assert settings(chosen)["linear.engine"] == "watched"
    assert override(chosen, "linear.engine", "jaxopt") == dataclasses.replace(chosen, linear=Linear(5))  # ty: ignore
    with pytest.raises(InputError, match=r"--linear\.engine takes jaxopt or watched, got 'watch'"):
        override(chosen, "linear.engine", "watch")  # ty: ignore


def test_the_solver_accepts_every_choice_in_the_table():
    chosen = imaml.preset(SAVED["name"])
    for path in set(overrides.CHOICES) & set(settings(chosen)):
        assert settings(chosen)[path] in overrides.CHOICES[path]
        for word in overrides.CHOICES[path]:
            assert settings(override(chosen, path, word))[path] == word


@pytest.mark.parametrize(
    "path, current",
    [("inner.steps", "inner.max_steps"), ("linear.maxiter", "linear.max_steps"), ("inner.max_steps",) * 2,
     ("outer.steps",) * 2, ("inner.step_size",) * 2, ("inner.nothing",) * 2, ("nothing.steps",) * 2, ("seed",) * 2,
     ("",) * 2, ("inner.max_steps.steps",) * 2],
)  # fmt: skip
def test_the_present_path_of_a_setting(path, current):
    assert current_path(Renamed(), path) == current


def test_a_path_that_the_record_still_has_is_not_renamed():
    assert current_path(OldRecord(), "inner.steps") == "inner.steps"


def test_no_field_in_the_table_is_both_an_old_and_a_new_name():
    assert all(not set(names) & set(names.values()) for names in RENAMED.values())


def preset_from(arguments, monkeypatch):
    """Return the preset that ``imaml train`` makes from these arguments and a record with the new names."""
    monkeypatch.setattr("imaml.settings.published_presets.preset", lambda name: Renamed())
    return parse(["train", "renamed", *arguments]).chosen


def test_an_old_path_on_the_command_line_works_with_a_deprecation_message(monkeypatch, capsys):
    chosen = preset_from(["--inner.steps", "3", "--linear.maxiter=7"], monkeypatch)
    assert (chosen.inner.max_steps, chosen.linear.max_steps) == (3, 7)
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == (
        "",
        [
            "imaml train: --inner.steps is deprecated: use --inner.max_steps",
            "imaml train: --linear.maxiter is deprecated: use --linear.max_steps",
        ],
    )


def test_a_present_path_prints_nothing(monkeypatch, capsys):
    chosen = preset_from(["--inner.max_steps", "3", "--linear.engine", "jaxopt"], monkeypatch)
    assert (chosen.inner.max_steps, chosen.linear.engine) == (3, "jaxopt")
    assert capsys.readouterr() == ("", "")


def test_the_message_for_a_bad_value_has_the_present_path(monkeypatch):
    with pytest.raises(InputError, match=r"--inner\.max_steps takes a whole number, got 'many'"):
        preset_from(["--inner.steps", "many"], monkeypatch)


@pytest.mark.parametrize("arguments", [["--inner.steps", "3"], ["--linear.maxiter", "7"]])
def test_published_presets_accept_the_old_paths(arguments):
    chosen = parse(["train", *arguments]).chosen
    path = current_path(chosen, arguments[0].removeprefix("--"))
    assert settings(chosen)[path] == int(arguments[1])
