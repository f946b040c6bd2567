"""Files of trained parameters: another process reads the same bits, and a file that does not fit is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import PRESET, STEPS

import imaml
from imaml import InputError
from imaml.runs import checkpoints, parameters
from imaml.runs.meta_step import initial_state
from imaml.settings.parts import MLP, Conv4
from imaml.storage import arrays, safetensors

ROOT = Path(__file__).resolve().parents[3]
SMALL = replace(imaml.preset("glyphs-5way-1shot-gd"), network=Conv4(filters=2), strength=0.7)
SINUSOID = replace(imaml.preset("sinusoid-5shot-gd"), network=MLP(hidden=3))
SUFFIXES = (".safetensors", ".npz")


def parameters_of(preset, dtype=jnp.float32):
    """Return initial parameters with −0 and the smallest subnormal number in the first array."""
    theta = jax.tree.map(lambda leaf: leaf.astype(dtype), preset.functions.init(jax.random.key(5)))
    leaves, structure = jax.tree.flatten(theta)
    info = jnp.finfo(dtype)
    special = jnp.asarray(np.array([-0.0, info.smallest_subnormal, info.max]), dtype)
    leaves[0] = leaves[0].ravel().at[:2].set(special[:2]).reshape(leaves[0].shape)
    return jax.tree.unflatten(structure, leaves)


def bits(theta):
    """Return name, dtype and bytes of each parameter."""
    return [(name, str(leaf.dtype), np.asarray(leaf).tobytes()) for name, leaf in checkpoints.named_leaves(theta)]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_saved_parameters_are_read_bit_for_bit_with_their_preset(suffix, dtype, tmp_path):
    theta, file = parameters_of(SMALL, dtype), tmp_path / f"theta{suffix}"
    imaml.TrainedLearner(theta, SMALL, {"step": 7}).save(file)
    learner = imaml.load(str(file))
    assert learner.preset == replace(SMALL, citation=learner.preset.citation) and learner.facts == {"step": 7}
    assert bits(learner.theta) == bits(theta)
    learner.save(file)  # replaces the file
    assert bits(imaml.load(file).theta) == bits(theta)


def test_the_arrays_have_the_names_of_the_parameters_for_other_readers(tmp_path):
    theta = parameters_of(SMALL)
    for suffix in SUFFIXES:
        imaml.TrainedLearner(theta, SMALL).save(tmp_path / f"theta{suffix}")
    kernel = np.asarray(theta["block0"]["kernel"])
    with np.load(tmp_path / "theta.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["block0/kernel"], kernel)
        assert json.loads(str(archive["description"]))["config"] == SMALL.config()
    found = safetensors.read(tmp_path / "theta.safetensors")
    np.testing.assert_array_equal(found["block0/kernel"], kernel)
    names = {f"block{i}/{part}" for i in range(4) for part in ("kernel", "scale", "offset")}
    assert set(found) == names | {"head/kernel", "head/bias"}


@pytest.mark.slow("starts a process")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_process_reads_the_same_bits_and_predicts_the_same(suffix, tmp_path):
    theta, file = parameters_of(SINUSOID), tmp_path / f"theta{suffix}"
    learner = imaml.TrainedLearner(theta, SINUSOID)
    learner.save(file)
    program = (
        "import sys, imaml, numpy as np; learner = imaml.load(sys.argv[1]);"
        "print(b''.join(np.asarray(x).tobytes() for p in learner.theta.values() for x in p.values()).hex());"
        "print(learner.adapt([1.0, 2.0], [0.5, -1.0]).predict([0.5, 1.5]).tolist())"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, file], capture_output=True, text=True, env=environment, timeout=400, check=True
    )
    read, predicted = done.stdout.splitlines()
    assert read == b"".join(np.asarray(x).tobytes() for p in theta.values() for x in p.values()).hex()
    expected = learner.adapt([1.0, 2.0], [0.5, -1.0]).predict([0.5, 1.5])
    np.testing.assert_allclose(json.loads(predicted), expected, rtol=1e-5)


def test_double_precision_is_kept_where_it_is_enabled_and_never_rounded(tmp_path, double_precision):
    for suffix in SUFFIXES:
        file = tmp_path / f"theta{suffix}"
        with double_precision():
            theta = parameters_of(SINUSOID, jnp.float64)
            imaml.TrainedLearner(theta, SINUSOID).save(file)
            assert bits(imaml.load(file).theta) == bits(theta)
        with pytest.raises(InputError, match=r'in double precision .* jax.config.update\("jax_enable_x64", True\)'):
            imaml.load(file)


# --- Files that do not fit -----------------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_flipped_bit_of_a_parameter_is_read(suffix, tmp_path):
    file = tmp_path / f"theta{suffix}"
    imaml.TrainedLearner(parameters_of(SINUSOID), SINUSOID).save(file)
    content, kernel = file.read_bytes(), np.asarray(parameters_of(SINUSOID)["layer1"]["kernel"]).tobytes()
    flip(file, content.index(kernel) + 5)
    with pytest.raises(InputError, match="is damaged, or holds no parameters"):
        imaml.load(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_hold_no_parameters_are_refused_by_name(suffix, tmp_path):
    file = tmp_path / f"theta{suffix}"
    with pytest.raises(InputError, match=f"there is no file .*theta{suffix}"):
        imaml.load(file)
    file.write_bytes(b"PK\x03\x04" + bytes(40))
    with pytest.raises(InputError, match=f"theta{suffix} is damaged, or holds no parameters"):
        imaml.load(file)
    with pytest.raises(InputError, match=r"is called NAME\.safetensors or NAME\.npz"):
        imaml.TrainedLearner(parameters_of(SINUSOID), SINUSOID).save(tmp_path / "theta.pickle")
    with pytest.raises(InputError, match="there is no run in"):
        imaml.load(tmp_path / "nowhere")


def test_a_file_of_another_library_needs_the_preset_and_fits_by_its_names(tmp_path):
    theta = parameters_of(SMALL)
    named = {name: np.asarray(leaf) for name, leaf in reversed(checkpoints.named_leaves(theta))}
    file = tmp_path / "other.safetensors"
    safetensors.write(file, named, {"format": "pt"})
    with pytest.raises(InputError, match="does not name its preset: pass the preset as well"):
        imaml.load(file)
    assert bits(imaml.load(file, SMALL).theta) == bits(theta)
    with pytest.raises(InputError, match=r"do not fit the network of glyphs.*names and shapes: \('block0/kernel'"):
        imaml.load(file, replace(SMALL, network=Conv4(filters=3)))
    safetensors.write(file, named | {"more": np.zeros(1)})
    with pytest.raises(InputError, match=r"first difference in names and shapes: \('more'"):
        imaml.load(file, SMALL)


def test_a_preset_that_cannot_be_saved_or_has_other_types_is_refused(tmp_path):
    theta = PRESET.functions.init(jax.random.key(0))  # the network is TinyMLP, which imaml does not define
    imaml.TrainedLearner(theta, PRESET).save(tmp_path / "own.npz")
    with pytest.raises(InputError, match=r"\(network is tiny_preset.TinyMLP\).*imaml.load\(run, preset\)"):
        imaml.load(tmp_path / "own.npz")
    assert bits(imaml.load(tmp_path / "own.npz", PRESET).theta) == bits(theta)
    with pytest.raises(InputError, match="other types than the given preset and its components have"):
        imaml.load(tmp_path / "own.npz", SMALL)


# --- Runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow("trains a run")
@pytest.mark.usefixtures("traces")
def test_a_run_its_folder_and_its_checkpoint_are_loaded(uninterrupted, tmp_path):
    run = uninterrupted.run
    for what, preset in ((run, None), (run.directory, PRESET), (str(run.directory), PRESET)):
        learner = imaml.load(what, preset)
        assert bits(learner.theta) == bits(run.theta) and learner.preset == PRESET
        assert learner.facts["step"] == STEPS
    imaml.load(run.directory, PRESET).save(tmp_path / "theta.npz")
    assert bits(imaml.load(tmp_path / "theta.npz", PRESET).theta) == bits(run.theta)
    assert imaml.load(tmp_path / "theta.npz", PRESET).facts["versions"]["jax"] == jax.__version__
    with pytest.raises(InputError, match=r"imaml.load\(run, preset\)"):
        imaml.load(run.directory)
    with pytest.raises(InputError, match=r"another kind \(format 3\): for a checkpoint, name the folder"):
        imaml.load(next(run.directory.glob("checkpoint-*.npz")))


def test_a_checkpoint_whose_arrays_have_no_names_is_loaded(tmp_path):
    state = initial_state(SINUSOID)
    facts = {"preset": SINUSOID.name, "config": SINUSOID.config(), "data": "", "versions": {}}
    checkpoints.save(tmp_path, 1, state, facts)
    path = tmp_path / "checkpoint-00000001.npz"
    contents = arrays.read(path)
    description = json.loads(str(contents.pop("description"))) | {"format": 2}
    old = {f"leaf{index}": array for index, array in enumerate(contents.values())}
    arrays.write(path, {"description": np.array(json.dumps(description)), **old})
    learner = imaml.load(tmp_path)
    assert bits(learner.theta) == bits(state.theta) and learner.preset == SINUSOID


def test_parameters_that_are_one_array_are_named_and_restored(tmp_path):
    state = {"theta": jnp.arange(3.0), "key": jax.random.key(0)}
    checkpoints.save(tmp_path, 1, state, {})
    ((name, array),) = parameters.of_checkpoint(checkpoints.read(tmp_path / "checkpoint-00000001.npz"))
    assert name == "" and array.tolist() == [0, 1, 2]
