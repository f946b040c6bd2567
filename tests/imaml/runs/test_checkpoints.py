"""Checkpoints: saved bits are restored, damaged files are refused, and a failing write keeps the older files."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml.errors import InputError
from imaml.runs import checkpoints
from imaml.storage import arrays

DESCRIPTION = {"preset": "some", "config": {"strength": 0.1, "inner": {"max_steps": 3}}, "data": "abc"}


def state(seed=0):
    """Return a state with NaN, infinity, −0 and a subnormal number. A careless round trip would change them."""
    random = np.random.default_rng(seed)
    special = np.array([np.nan, np.inf, -0.0, np.float32(1e-45)], np.float32)
    theta = {"block": {"kernel": jnp.asarray(random.normal(size=(3, 2)), jnp.float32)}, "special": jnp.asarray(special)}
    return theta, (jnp.int32(7), jnp.asarray([True, False])), jax.random.key(seed)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert [bits(leaf) for leaf in jax.tree.leaves(one)] == [bits(leaf) for leaf in jax.tree.leaves(other)]


def save(directory, step, loss=float("inf"), **options):
    """Save a checkpoint whose state is determined by its step."""
    checkpoints.save(directory, step, state(seed=step), DESCRIPTION, loss=loss, **options)


def file(directory, step=7):
    return directory / f"checkpoint-{step:08}.npz"


def steps(directory):
    return sorted(int(path.stem.removeprefix("checkpoint-")) for path in directory.iterdir())


@pytest.fixture
def saved(tmp_path):
    save(tmp_path, 7, loss=0.25)
    return tmp_path


def test_round_trip_keeps_every_bit_and_the_description(saved):
    found = checkpoints.newest(saved)
    assert_same_bits(found.restore(like=state(seed=1)), state(seed=7))
    assert (found.path, found.step, found.loss) == (file(saved), 7, 0.25)
    assert {name: found.description[name] for name in DESCRIPTION} == DESCRIPTION


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int4", "uint8", "bool", "int32", "float32"])
def test_leaves_of_any_type_keep_every_bit(dtype, tmp_path):
    numbers = jnp.asarray([0.0, -1.5, 3.0, 1e-2]).astype(dtype)
    tree = {"array": numbers, "scalar": numbers[1]}
    checkpoints.save(tmp_path, 1, tree, {})
    assert_same_bits(checkpoints.newest(tmp_path).restore(tree), tree)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_restored_keys_give_the_same_random_numbers(implementation, tmp_path):
    keys = jax.random.split(jax.random.key(3, impl=implementation), 2)
    checkpoints.save(tmp_path, 1, keys, {})
    restored = checkpoints.newest(tmp_path).restore(jax.random.split(jax.random.key(0, impl=implementation), 2))
    assert_same_bits(restored, keys)
    assert jax.random.bits(restored[1]) == jax.random.bits(keys[1])


def test_float64_keeps_every_bit(tmp_path, x64):
    tree = jnp.asarray([1 / 3, 1e-300])
    checkpoints.save(tmp_path, 1, tree, {})
    assert_same_bits(checkpoints.newest(tmp_path).restore(tree), tree)


def test_saving_a_step_again_replaces_its_file(saved):
    checkpoints.save(saved, 7, state(seed=5), DESCRIPTION)
    assert_same_bits(checkpoints.newest(saved).restore(state()), state(seed=5))
    assert list(saved.iterdir()) == [file(saved)]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint-7.npz.damaged").write_text("")
    for directory in (tmp_path, tmp_path / "nowhere"):
        assert checkpoints.newest(directory) is None and checkpoints.best(directory) is None


def test_the_arrays_have_the_names_of_the_parameters(saved):
    with np.load(file(saved)) as archive:
        kernel = archive["0/block/kernel"]
        assert set(archive.files) == {"sha256", "description", "0/block/kernel", "0/special", "1/0", "1/1", "2"}
    np.testing.assert_array_equal(kernel, state(seed=7)[0]["block"]["kernel"])


def test_a_checkpoint_of_the_format_with_numbered_arrays_is_read(saved):
    contents = arrays.read(file(saved))
    description = json.loads(str(contents["description"])) | {"format": 2}
    numbered = {f"leaf{i}": contents[path] for i, (path, _, _) in enumerate(description["leaves"])}
    arrays.write(file(saved), {"description": np.array(json.dumps(description)), **numbered})
    assert_same_bits(checkpoints.newest(saved).restore(like=state(seed=1)), state(seed=7))


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": jnp.zeros(2), "a": {"b": jnp.ones(2)}},  # two leaves with the same path
        {"description": jnp.zeros(2), "sha256": jnp.ones(2)},
        {"file": jnp.zeros(2), "allow_pickle": jnp.ones(2)},  # parameters of numpy.savez
        jnp.ones(2),  # a leaf without a path
        {"x.npy": jnp.ones(2), "x": jnp.zeros(2)},  # numpy.load drops this ending
    ],
)
def test_leaves_whose_paths_cannot_be_names_are_saved_and_restored(tree, tmp_path):
    checkpoints.save(tmp_path, 1, tree, {})
    assert_same_bits(checkpoints.newest(tmp_path).restore(tree), tree)


# --- Deletion of old checkpoints ----------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.0)):
        save(tmp_path, step, loss, keep=2)
    assert steps(tmp_path) == [2, 4, 5]
    assert (checkpoints.newest(tmp_path).step, checkpoints.best(tmp_path).step) == (5, 2)
    save(tmp_path, 6, loss=0.5, keep=2)
    assert steps(tmp_path) == [5, 6] and checkpoints.best(tmp_path).step == 6


def test_without_losses_the_last_is_the_best(tmp_path):
    for step in (9, 10, 100):  # As text, these numbers have another order.
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == [100] and checkpoints.best(tmp_path).step == 100


def test_no_old_checkpoint_is_deleted_before_the_new_one_is_on_disk(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("imaml.storage.files.os.replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [1]


def test_a_damaged_checkpoint_is_not_kept_as_the_best(tmp_path):
    save(tmp_path, 1, loss=0.1)
    save(tmp_path, 2, loss=0.2)
    file(tmp_path, 1).write_bytes(file(tmp_path, 1).read_bytes()[:-30])
    save(tmp_path, 3, loss=0.3, keep=1)
    assert steps(tmp_path) == [2, 3]


# --- Damage --------------------------------------------------------------------------------------------------------


def refused_or_same(directory):
    """Load the newest checkpoint, and return True if it is refused.

    If loading raises InputError, check that the message names the file, and return True. Otherwise check that the state
    and the config are the saved ones, and return False.
    """
    try:
        found = checkpoints.newest(directory)
        restored = found.restore(state())
    except InputError as error:
        assert str(file(directory)) in str(error)
        return True
    assert_same_bits(restored, state(seed=7))
    assert found.description["config"] == DESCRIPTION["config"]
    return False


def test_a_truncated_file_is_refused(saved):
    content = file(saved).read_bytes()
    for length in (0, 1, 10, len(content) // 2, len(content) - 1):
        file(saved).write_bytes(content[:length])
        assert refused_or_same(saved), length


def test_no_flipped_byte_changes_what_is_loaded(saved):
    content = file(saved).read_bytes()
    refused = 0
    positions = range(0, len(content), 5)
    for position in positions:
        file(saved).write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        refused += refused_or_same(saved)
    # Dates and attributes of the zip's members do not affect the arrays; most other bytes do.
    assert refused > len(positions) / 2


def test_a_changed_number_in_a_valid_archive_is_refused(saved):
    with np.load(file(saved)) as archive:
        contents = dict(archive)
    contents["0/block/kernel"][0, 0] += 1e-6
    with file(saved).open("wb") as stream:
        np.savez(stream, **contents)
    with pytest.raises(InputError, match="its checksum does not match its contents"):
        checkpoints.newest(saved)


def test_the_checkpoint_before_damaged_ones_is_returned_and_the_damaged_ones_are_reported(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        file(tmp_path, step).write_bytes(file(tmp_path, step).read_bytes()[:-30])
    reported = []
    found = checkpoints.newest(tmp_path, lambda path, message: reported.append((path, message)))
    assert_same_bits(found.restore(state()), state(seed=1))
    assert [path for path, _ in reported] == [file(tmp_path, 3), file(tmp_path, 2)]
    assert all(message.startswith(f"{path} is damaged (") for path, message in reported)


def test_if_all_are_damaged_no_file_is_changed(saved):
    file(saved).write_bytes(b"")
    reported = []
    with pytest.raises(InputError, match=f"{saved} holds no intact checkpoint: {file(saved)} is damaged"):
        checkpoints.newest(saved, lambda path, message: reported.append(path))
    assert reported == [] and list(saved.iterdir()) == [file(saved)]


def test_a_checkpoint_set_aside_is_ignored_but_its_content_is_kept(saved):
    content = file(saved).read_bytes()
    checkpoints.set_aside(file(saved))
    assert checkpoints.newest(saved) is None
    assert [path.read_bytes() for path in saved.iterdir()] == [content]


def test_an_error_of_the_disk_is_raised_and_not_taken_for_damage(saved, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.newest(saved)


def test_a_checkpoint_replaced_during_the_search_gives_the_newer_one(saved, monkeypatch):
    read, calls = arrays.read, []

    def read_during_saves(path):
        calls.append(path)
        if len(calls) == 1:  # Between listing and reading the folder, the run saves newer checkpoints.
            save(saved, 8)
            save(saved, 9, keep=1)
            file(saved).unlink(missing_ok=True)
        return read(path)

    monkeypatch.setattr(checkpoints.arrays, "read", read_during_saves)
    assert checkpoints.newest(saved).step == 9


def write_text(path):
    path.write_text("not an archive")


def write_array(path):
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def write_other_archive(path):
    with path.open("wb") as stream:
        np.savez(stream, leaf0=np.zeros(3))


def write_leaf_only(path):
    arrays.write(path, {"leaf0": np.zeros(3)})


def write_pickle(path):
    with path.open("wb") as stream:
        np.savez(stream, description=np.array([{"format": 1}], dtype=object))


@pytest.mark.parametrize("write", [write_text, write_array, write_other_archive, write_leaf_only, write_pickle])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_named(write, tmp_path):
    write(file(tmp_path))
    with pytest.raises(InputError, match=f"{file(tmp_path)} is damaged"):
        checkpoints.newest(tmp_path)


def test_another_format_is_reported_as_another_version_not_as_damage(saved):
    save(saved, 8)
    arrays.write(file(saved, 8), {"description": np.array(json.dumps({"format": 99}))})
    with pytest.raises(InputError, match=r"another version of imaml \(format 99; this version reads 2 and 3\)"):
        checkpoints.newest(saved)


def without_a_leaf(theta, rest, key):
    return theta, rest, ()


def of_another_shape(theta, rest, key):
    return {**theta, "special": jnp.zeros(5)}, rest, key


def of_another_dtype(theta, rest, key):
    return theta, (jnp.float32(7), rest[1]), key


def of_another_name(theta, rest, key):
    return {"Block": theta["block"], "special": theta["special"]}, rest, key


def of_another_generator(theta, rest, key):
    return theta, rest, jax.random.key(0, impl="rbg")


@pytest.mark.parametrize(
    "change, difference",
    [
        (without_a_leaf, "number of leaves"),
        (of_another_shape, "0/special float32[4] → 0/special float32[5]"),
        (of_another_dtype, "1/0 int32[] → 1/0 float32[]"),
        (of_another_name, "0/block/kernel float32[3, 2] → 0/Block/kernel float32[3, 2]"),
        (of_another_generator, "2 key<fry>[] → 2 key<rbg>[]"),
    ],
)
def test_a_state_with_other_leaves_is_refused_and_the_difference_named(change, difference, saved):
    with pytest.raises(InputError) as caught:
        checkpoints.newest(saved).restore(like=change(*state()))
    assert f"whose leaves differ from the expected ones ({difference})" in str(caught.value)


# --- Disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_write_keeps_the_old_file_and_leaves_no_temporary_file(function, saved, monkeypatch):
    before = file(saved).read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"imaml.storage.files.os.{function}", fail)
    with pytest.raises(OSError, match="No space left"):
        save(saved, 8)
    assert list(saved.iterdir()) == [file(saved)] and file(saved).read_bytes() == before


def test_a_full_disk_keeps_the_old_checkpoint(small_disk):
    save(small_disk, 1)
    before = file(small_disk, 1).read_bytes()
    with pytest.raises(OSError) as caught:
        checkpoints.save(small_disk, 2, jnp.zeros(1_000_000), DESCRIPTION)
    assert caught.value.errno == errno.ENOSPC
    assert list(small_disk.iterdir()) == [file(small_disk, 1)] and file(small_disk, 1).read_bytes() == before


def test_a_read_only_folder_keeps_the_old_checkpoint(saved, sealed):
    with sealed({file(saved).name: file(saved).read_bytes()}) as folder:
        with pytest.raises(OSError) as caught:
            save(folder, 8)
        assert caught.value.errno in (errno.EROFS, errno.EACCES)
        assert list(folder.iterdir()) == [file(folder)]
        assert_same_bits(checkpoints.newest(folder).restore(state()), state(seed=7))
