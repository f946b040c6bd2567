"""Tests of presets: their settings, overriding a setting, saving and restoring, and refused values."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable

import jax
import pytest

import bilevel as bl
import imaml
from imaml.errors import InputError
from imaml.learning.tasks import Curve
from imaml.runs.evaluation import normalisations, task_scores
from imaml.runs.meta_step import initial_state, meta_step
from imaml.settings.overrides import override, settings
from imaml.settings.parts import MLP
from imaml.settings.published_presets import restore

NAMES = imaml.presets()
DEFAULT = NAMES[0]
SHARED_SETTINGS = {
    "episode.shots", "episode.queries", "strength", "inner.max_steps", "linear.max_steps", "linear.ridge",
    "linear.engine", "outer.learning_rate", "outer.queries", "outer.tasks", "outer.steps", "outer.final_fraction",
    "outer.epsilon", "outer.at_once", "seed", "algorithm", "test_steps",
    "validation.every", "validation.tasks", "validation.patience", "validation.held_out",
}  # fmt: skip
IMAGE_SETTINGS = {
    "episode.ways", "episode.bright_paper", "network.filters", "network.kernel_gain", "network.head_gain",
    "network.head_bias", "network.pooling", "network.convolutions", "network.products",
}  # fmt: skip
DESCENT_SETTINGS, NEWTON_SETTINGS = {"inner.step_size", "inner.momentum"}, {"inner.cg_steps", "inner.halvings"}
SETTINGS = SHARED_SETTINGS | IMAGE_SETTINGS | DESCENT_SETTINGS | {"rotations.train", "rotations.test"}
"""The settings of the default preset."""
IMAGE_PRESETS = [name for name in NAMES if not name.startswith("sinusoid")]


def test_the_default_preset_comes_first_and_needs_no_data_files():
    assert DEFAULT == "glyphs-5way-1shot-gd"
    assert imaml.preset(DEFAULT).dataset == "glyphs"


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_found_by_its_name_and_has_a_citation(name):
    chosen = imaml.preset(name)
    assert chosen.name == name
    assert "arXiv" in chosen.citation
    assert all(sentence.strip() for sentence in chosen.deviations())


@pytest.mark.parametrize("name", IMAGE_PRESETS)
def test_the_name_of_a_preset_contains_its_ways_and_shots(name):
    chosen = imaml.preset(name)
    assert f"{chosen.dataset}-{chosen.episode.ways}way-{chosen.episode.shots}shot-" in name
    assert chosen.episode.queries == chosen.episode.shots  # the published protocol


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_frozen_and_hashable(name):
    chosen = imaml.preset(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.strength = 1.0  # ty: ignore
    assert hash(chosen) == hash(dataclasses.replace(chosen))
    assert chosen != dataclasses.replace(chosen, strength=chosen.strength * 2)


def test_the_learner_has_the_parts_of_the_preset():
    chosen = imaml.preset(DEFAULT)
    learner = chosen.learner
    assert (learner.solver, learner.method.linear, learner.strength) == (chosen.inner, chosen.linear, chosen.strength)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_evaluation_tasks_differ_only_in_the_number_of_queries(name):
    chosen = override(imaml.preset(name), "outer.queries", "7")
    assert chosen.training_episode == dataclasses.replace(chosen.episode, queries=7)


def test_the_streams_of_a_run_share_no_key_and_depend_only_on_the_seed():
    chosen = imaml.preset(DEFAULT)
    streams = [chosen.keys, dataclasses.replace(chosen, seed=1).keys]
    # Also compare the keys of the first meta-steps, and the keys that the other two streams are split into.
    derived = [jax.random.fold_in(streams[0].train, step) for step in range(3)]
    split = [key for stream in (streams[0].init, streams[0].test) for key in jax.random.split(stream, 3)]
    keys = [*streams[0], *streams[1], *derived, *split]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys)
    assert all((a == b).all() for a, b in zip(streams[0], imaml.preset(DEFAULT).keys, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_each_preset_has_the_listed_settings(name):
    expected = SHARED_SETTINGS | (IMAGE_SETTINGS if name in IMAGE_PRESETS else {"network.hidden"})
    expected |= NEWTON_SETTINGS if name.endswith("-hf") else DESCENT_SETTINGS
    if "glyphs" in name or "omniglot" in name:
        expected |= {"rotations.train", "rotations.test"}
    assert set(settings(imaml.preset(name))) == expected


@pytest.mark.parametrize("path", sorted(SETTINGS))
def test_overriding_a_setting_with_its_present_value_changes_nothing(path):
    chosen = imaml.preset(DEFAULT)
    assert override(chosen, path, str(settings(chosen)[path])) == chosen


@pytest.mark.parametrize(
    "path, text, value",
    [("inner.max_steps", "3", 3), ("strength", "2", 2.0), ("rotations.test", "True", True), ("seed", "4", 4),
     ("outer.learning_rate", "1e-4", 1e-4), ("episode.ways", "20", 20)],
)  # fmt: skip
def test_override_changes_only_that_setting(path, text, value):
    chosen = imaml.preset(DEFAULT)
    changed = settings(override(chosen, path, text))
    assert changed.pop(path) == value and type(value) is type(settings(chosen)[path])
    assert changed == {other: present for other, present in settings(chosen).items() if other != path}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_restores_its_preset_through_json(name):
    chosen = override(override(imaml.preset(name), "inner.max_steps", "3"), "outer.learning_rate", "0.1")
    assert restore(name, json.loads(json.dumps(chosen.config()))) == chosen


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile"])
@pytest.mark.parametrize("name", ["glyphs-5way-1shot-hf", "sinusoid-5shot-gd"])
def test_a_config_with_another_algorithm_restores_that_algorithm(algorithm, name):
    chosen = override(imaml.preset(name).using(algorithm), "inner.max_steps", "3")
    assert restore(name, json.loads(json.dumps(chosen.config()))) == chosen


@pytest.mark.parametrize("algorithm", ["imaml", "maml", "reptile"])
@pytest.mark.parametrize("name", ["glyphs-5way-1shot-hf", "sinusoid-5shot-gd", "miniimagenet-5way-1shot-gd"])
def test_a_preset_with_a_name_of_its_own_is_restored_from_its_config_and_types(algorithm, name):
    own = dataclasses.replace(imaml.preset(name).using(algorithm), name="mine", seed=3)
    restored = restore("mine", *(json.loads(json.dumps(saved)) for saved in (own.config(), own.types())))
    assert (restored.config(), restored.types(), restored.name) == (own.config(), own.types(), "mine")
    assert restored.citation == own.citation and restored.learner.solver == own.learner.solver


@pytest.mark.parametrize("name", NAMES)
def test_the_types_of_a_published_preset_restore_it(name):
    chosen = imaml.preset(name)
    assert restore(name, chosen.config(), chosen.types()) == chosen


def test_parts_of_other_types_than_those_of_the_published_preset_are_restored():
    chosen = dataclasses.replace(imaml.preset(DEFAULT), network=MLP(hidden=3), inner=bl.HessianFree(2, cg_steps=4))
    assert restore(DEFAULT, chosen.config(), chosen.types()) == chosen


@dataclasses.dataclass(frozen=True)
class Flipped(Curve):
    """A subclass with the fields of :class:`Curve`."""


class OtherPreset(imaml.Preset):
    """A subclass with the fields of :class:`imaml.Preset`."""


def activate(x):
    return jax.nn.relu(x)


@dataclasses.dataclass(frozen=True)
class Layers:
    """A network with a function and a nested record among its fields."""

    activation: Callable = activate
    sizes: tuple = (MLP(3),)


def test_types_distinguish_subclasses_that_have_the_same_config():
    chosen = imaml.preset("sinusoid-5shot-gd")
    fields = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    others = {"episode": dataclasses.replace(chosen, episode=Flipped(5, 100)), "preset": OtherPreset(**fields)}
    for part, other in others.items():
        assert other.config() == chosen.config()
        assert {path for path, name in other.types().items() if chosen.types()[path] != name} == {part}
        with pytest.raises(InputError, match=rf"type that imaml does not define \({part} is .*(Flipped|OtherPreset)\)"):
            restore(other.name, other.config(), other.types())


def test_functions_are_saved_by_name_and_nested_records_by_type():
    chosen = dataclasses.replace(imaml.preset(DEFAULT), network=Layers())
    assert chosen.config()["network"] == {"activation": f"{__name__}.activate", "sizes": [{"hidden": 3}]}
    types = {path: name for path, name in chosen.types().items() if path.startswith("network")}
    assert types == {"network": f"{__name__}.Layers", "network.sizes.0": "imaml.MLP"}
    other = dataclasses.replace(chosen, network=Layers(jax.nn.relu))
    assert other.config() != chosen.config()


@pytest.mark.parametrize("module", [[], ["-m"]])
def test_a_type_has_the_same_name_in_a_script_and_in_an_import_of_it(module, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom imaml.settings.types import plain, type_name\n"
        "class Network: pass\ndef activate(x): return x\nprint(type_name(Network), plain(activate))\n"
    )
    for words in ([*module, "mine" if module else "mine.py"], ["-c", "import mine"]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == "mine.Network mine.activate\n"


@pytest.mark.parametrize("value", [lambda x: x, MLP(3).build, 3j], ids=["lambda", "bound method", "complex number"])
def test_a_value_that_cannot_be_saved_by_name_is_refused(value):
    chosen = dataclasses.replace(imaml.preset(DEFAULT), network=Layers(value))
    with pytest.raises(InputError, match=r"the settings contain .* which a run's folder cannot store"):
        chosen.config()


FORMER = {
    "name": "omniglot-5way-1shot-gd", "dataset": "omniglot", "episode": {"ways": 5, "shots": 1, "queries": 1},
    "rotations": {"train": True, "test": True}, "network": {"filters": 64, "kernel_gain": 10.0}, "strength": 0.1,
    "inner": {"step_size": 0.01, "steps": 16, "tol": None, "momentum": 0.8},
    "linear": {"maxiter": 5, "tol": None, "ridge": 0.0, "preconditioner": None},
    "outer": {
        "learning_rate": 0.003, "tasks": 8, "queries": 15, "steps": 7000, "final_fraction": 0.0,
    },
    "seed": 0,
}  # fmt: skip
"""A config of the first version, which had one algorithm, one fidelity and one kind of network."""


def test_a_config_saved_before_a_field_existed_restores_the_same_preset():
    assert restore(FORMER["name"], FORMER) == imaml.preset(FORMER["name"])


def test_a_field_that_was_not_saved_gets_its_default_and_not_the_value_of_the_preset():
    reference = imaml.preset("omniglot-5way-1shot-reference-code")
    restored = restore(reference.name, FORMER | {"name": reference.name})
    assert (restored.network.head_bias, restored.outer.epsilon, restored.fidelity) == (0.0, 1e-8, "paper")
    assert reference.network.head_bias > 0 and reference.outer.epsilon > 1e-8


def test_another_algorithm_changes_only_the_inner_loop_citation_and_departures():
    chosen = imaml.preset("omniglot-20way-1shot-gd")
    maml = chosen.using("maml")
    assert (maml.inner, maml.algorithm) == (bl.GradientDescent(0.1, 5), "maml")
    changed = {name for name, value in chosen.config().items() if maml.config()[name] != value}
    assert changed == {"algorithm", "inner"}
    assert "1703.03400" in maml.citation and "comparison" in maml.deviations()[0]
    assert maml.using("maml") is maml


def test_settings_that_an_algorithm_does_not_use_cannot_be_overridden():
    maml = imaml.preset(DEFAULT).using("maml")
    assert set(settings(maml)) == {path for path in SETTINGS if path != "strength" and not path.startswith("linear.")}
    with pytest.raises(InputError, match="there is no setting --strength"):
        override(maml, "strength", "1")


def test_published_inner_loops_differ_between_training_and_evaluation():
    maml, reptile = (imaml.preset(DEFAULT).using(algorithm) for algorithm in ("maml", "reptile"))
    assert (maml.learner.solver.max_steps, maml.test_learner.solver.max_steps) == (1, 3)
    assert (reptile.learner.solver.max_steps, reptile.test_learner.solver.max_steps) == (5, 50)


def test_combinations_of_settings_that_do_not_fit_are_refused():
    hessian_free = imaml.preset("glyphs-5way-1shot-hf")
    with pytest.raises(InputError, match="inner must be a GradientDescent for MAML, got HessianFree"):
        dataclasses.replace(hessian_free, algorithm="maml")
    reference = imaml.preset("omniglot-5way-1shot-reference-code")
    with pytest.raises(InputError, match="has no inner loop for maml"):
        reference.using("maml")
    with pytest.raises(InputError, match="the reference code has only implicit MAML, got algorithm reptile"):
        dataclasses.replace(reference, algorithm="reptile")
    with pytest.raises(InputError, match="start from a published preset with one"):
        hessian_free.using("maml").using("reptile")
    with pytest.raises(InputError, match="there is no fidelity 'papers': did you mean paper"):
        dataclasses.replace(reference, fidelity="papers")


@pytest.mark.parametrize(
    "config", [{"sharpness": 1}, {"inner": {"sharpness": 1}}, {"sampler": {"size": 3}}, {"strength": {"value": 3}}]
)
def test_settings_of_another_version_are_refused(config):
    with pytest.raises(InputError, match="were saved by another version"):
        restore(DEFAULT, config)


@pytest.mark.parametrize("name, near", [("glyphs-5way-1shot-dg", f"did you mean {DEFAULT}? "), ("???", "")])
def test_the_message_for_an_unknown_preset_has_the_nearest_name_and_says_what_lists_all(name, near):
    with pytest.raises(InputError) as error:
        imaml.preset(name)
    listed = "'imaml presets' lists all of them (in Python, imaml.presets())"
    assert str(error.value) == f"there is no preset {name!r}: {near}{listed}"


@pytest.mark.parametrize(
    "path, near", [("inner.max_step", "inner.max_steps"), ("strenght", "strength"), ("outer.task", "outer.tasks")]
)
def test_the_message_for_an_unknown_setting_has_the_nearest_path(path, near):
    with pytest.raises(InputError, match=f"no setting --{path}: did you mean --{near}\\?$"):
        override(imaml.preset(DEFAULT), path, "1")


def test_the_message_for_a_path_like_no_setting_has_all_paths():
    with pytest.raises(InputError, match=r"no setting --verbose: known: --episode\.ways, --episode\.shots, "):
        override(imaml.preset(DEFAULT), "verbose", "1")


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "dataset",
        "fidelity",
        "citation",
        "departures",
        "baselines",
        "inner",
        "linear.tol",
        "",
        "inner.max_steps.x",
    ],
)
def test_a_path_that_is_not_a_setting_cannot_be_overridden(path):
    with pytest.raises(InputError, match="there is no setting"):
        override(imaml.preset(DEFAULT), path, "1")


@pytest.mark.parametrize(
    "path, text, message",
    [
        ("algorithm", "mmal", "there is no algorithm 'mmal': did you mean maml? known: imaml, maml, fomaml, reptile"),
        ("outer.at_once", "0", "outer.at_once must be at least 1, got 0"),
        ("outer.epsilon", "0", "outer.epsilon must be above 0, got 0.0"),
        ("network.head_gain", "0", "network.head_gain must be above 0, got 0.0"),
        ("network.head_bias", "-1", "network.head_bias must be at least 0, got -1.0"),
        ("test_steps", "-1", "test_steps must be at least 0, got -1"),
        ("inner.max_steps", "many", "--inner.max_steps takes a whole number, got 'many'"),
        ("inner.max_steps", "1.5", "--inner.max_steps takes a whole number, got '1.5'"),
        ("strength", "", "--strength takes a number, got ''"),
        ("rotations.train", "1", "--rotations.train takes true or false, got '1'"),
        ("strength", "0", "strength (λ) must be above 0 and finite, got 0.0"),
        ("strength", "nan", "--strength is out of range: 'nan'"),
        ("outer.learning_rate", "inf", "--outer.learning_rate is out of range: 'inf'"),
        ("inner.step_size", "inf", "--inner.step_size is out of range: 'inf'"),
        ("inner.max_steps", "9" * 30, f"--inner.max_steps is out of range: '{'9' * 30}'"),
        ("seed", "9" * 30, f"--seed is out of range: '{'9' * 30}'"),
        ("seed", "-1", "seed must be at least 0 and below 2**32, got -1"),
        ("network.filters", "0", "network.filters must be at least 1, got 0"),
        ("network.kernel_gain", "0", "network.kernel_gain must be above 0, got 0.0"),
        ("network.products", "float16", "--network.products takes float32 or tensorfloat32 or bfloat16, got 'float16'"),
        ("outer.tasks", "0", "outer.tasks must be at least 1, got 0"),
        ("outer.queries", "0", "outer.queries must be at least 1, got 0"),
        ("outer.steps", "0", "outer.steps must be at least 1, got 0"),
        ("outer.learning_rate", "-1", "outer.learning_rate must be above 0, got -1.0"),
        ("outer.final_fraction", "1.5", "outer.final_fraction must lie in [0, 1], got 1.5"),
        ("episode.ways", "1", "at least 2 ways"),
        # Values that the solvers of bilevel refuse with a ValueError:
        ("inner.max_steps", "-1", "GradientDescent needs max_steps"),
        ("inner.step_size", "0", "GradientDescent needs a finite step_size above 0"),
        ("inner.momentum", "1", "a momentum in [0, 1)"),
        ("linear.max_steps", "0", "CG needs max_steps of at least 1, got 0"),
        ("linear.ridge", "-1", "CG needs ridge of at least 0, got -1.0"),
    ],
)
def test_values_that_cannot_be_used_are_refused_with_the_value(path, text, message):
    with pytest.raises(InputError) as error:
        override(imaml.preset(DEFAULT), path, text)
    assert message in str(error.value)


KINDS = (
    "glyphs-5way-1shot-hf", "omniglot-5way-1shot-reference-code",
    "miniimagenet-5way-1shot-gd", "sinusoid-10shot-gd",
)  # fmt: skip


@pytest.mark.slow("traces each preset at its real size", fast="sinusoid-*")
@pytest.mark.parametrize(
    "name, algorithm", [*((name, "imaml") for name in KINDS), ("miniimagenet-5way-1shot-gd", "maml")]
)
def test_a_meta_step_and_an_evaluation_can_be_traced_for_a_preset_at_its_real_size(name, algorithm):
    chosen = imaml.preset(name).using(algorithm)
    state = jax.eval_shape(lambda: initial_state(chosen))
    source = ()
    if name in IMAGE_PRESETS:
        source = jax.ShapeDtypeStruct((100, 40, *chosen.network.image_shape), "uint8")
    after, report = jax.eval_shape(meta_step(chosen), state, source)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(lambda leaf: leaf.shape, state)
    assert report.status.shape == (chosen.outer.tasks,)
    keys = jax.eval_shape(lambda: jax.random.split(chosen.keys.test, 6))
    scores = jax.eval_shape(task_scores(chosen), (state.theta, source), keys)
    assert scores.shape == (6, len(normalisations(chosen)))


def test_a_seed_of_more_than_32_bits_is_refused():
    with pytest.raises(InputError, match="below"):
        dataclasses.replace(imaml.preset(DEFAULT), seed=2**32)


def test_an_inner_tolerance_is_refused():
    chosen = imaml.preset(DEFAULT)
    with pytest.raises(InputError, match=r"inner\.tol must be None"):
        dataclasses.replace(chosen, inner=dataclasses.replace(chosen.inner, tol=1e-3))


@pytest.mark.parametrize("change", [{"linear": bl.NormalCG(5)}, {"linear": bl.CG(5, preconditioner=lambda r: r)}])
def test_a_linear_solver_that_a_config_cannot_store_is_refused(change):
    with pytest.raises(InputError, match="linear must be a CG without a preconditioner"):
        dataclasses.replace(imaml.preset(imaml.presets()[0]), **change)


def test_a_config_without_a_required_setting_is_refused():
    preset = imaml.preset(imaml.presets()[0])
    config = preset.config()
    del config["strength"]
    with pytest.raises(InputError, match="saved by another version"):
        restore(preset.name, config)
