"""Checkpoints: the same bits back, nothing damaged taken for whole, and the old file when writing fails."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml import checkpoints
from imaml.errors import InputError

DESCRIPTION = {"preset": "some", "config": {"strength": 0.1, "inner": {"steps": 3}}, "data": "abc"}


def state(seed=0):
    """Also the numbers that a sloppy round trip would change: NaN, infinity, −0 and the smallest one."""
    random = np.random.default_rng(seed)
    special = np.array([np.nan, np.inf, -0.0, np.float32(1e-45)], np.float32)
    theta = {"block": {"kernel": jnp.asarray(random.normal(size=(3, 2)), jnp.float32)}, "special": jnp.asarray(special)}
    return theta, (jnp.int32(7), jnp.asarray([True, False]))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(map(np.asarray, jax.tree.leaves(one)), map(np.asarray, jax.tree.leaves(other)), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def saved(tmp_path):
    checkpoints.save(tmp_path, state(), DESCRIPTION)
    return tmp_path


def test_round_trip_keeps_every_bit_and_the_description(saved):
    loaded, description = checkpoints.load(saved, like=state(seed=1))
    assert_same_bits(loaded, state())
    assert description == {"format": checkpoints.FORMAT} | DESCRIPTION
    assert checkpoints.describe(saved) == description


def test_saving_again_replaces_the_file_and_leaves_nothing_else(saved):
    checkpoints.save(saved, state(seed=5), DESCRIPTION)
    assert_same_bits(checkpoints.load(saved, state())[0], state(seed=5))
    assert [path.name for path in saved.iterdir()] == [checkpoints.FILE]


def test_no_checkpoint_is_described_as_none_and_cannot_be_loaded(tmp_path):
    assert checkpoints.describe(tmp_path) is None
    with pytest.raises(InputError, match=f"there is no checkpoint {tmp_path / checkpoints.FILE}"):
        checkpoints.load(tmp_path, state())


def refused_or_same(directory):
    """Whether loading raised an InputError that names the file; if not, the state must be the saved one."""
    try:
        loaded, description = checkpoints.load(directory, state())
    except InputError as error:
        assert str(directory / checkpoints.FILE) in str(error)
        return True
    assert_same_bits(loaded, state())
    assert description["config"] == DESCRIPTION["config"]
    return False


def test_a_truncated_file_is_refused(saved):
    file = saved / checkpoints.FILE
    whole = file.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert refused_or_same(saved), length


def test_no_flipped_byte_changes_what_is_loaded(saved):
    file = saved / checkpoints.FILE
    whole = file.read_bytes()
    refused = 0
    for position in range(0, len(whole), 5):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        refused += refused_or_same(saved)
    # Dates and attributes of a zip's members carry nothing; most other bytes do.
    assert refused > len(whole) / 5 / 2


def write_text(path):
    path.write_text("not an archive")


def write_array(path):
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


def write_other_archive(path):
    with path.open("wb") as stream:
        np.savez(stream, leaf0=np.zeros(3))


def write_other_format(path):
    with path.open("wb") as stream:
        np.savez(stream, description=np.array('{"format": 99}'))


def write_pickle(path):
    with path.open("wb") as stream:
        np.savez(stream, description=np.array([{"format": 1}], dtype=object))


@pytest.mark.parametrize("write", [write_text, write_array, write_other_archive, write_other_format, write_pickle])
def test_a_foreign_file_is_refused_by_name(write, tmp_path):
    file = tmp_path / checkpoints.FILE
    write(file)
    with pytest.raises(InputError, match=f"{file} cannot be read as a checkpoint"):
        checkpoints.describe(tmp_path)


def without_a_leaf(theta, rest):
    return theta, rest[0]


def of_another_shape(theta, rest):
    return {**theta, "special": jnp.zeros(5)}, rest


def of_another_dtype(theta, rest):
    return theta, (jnp.float32(7), rest[1])


@pytest.mark.parametrize("change", [without_a_leaf, of_another_shape, of_another_dtype])
def test_a_state_of_another_kind_is_refused(change, saved):
    with pytest.raises(InputError, match="holds a state of another shape"):
        checkpoints.load(saved, like=change(*state()))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_no_temporary(function, saved, monkeypatch):
    before = (saved / checkpoints.FILE).read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(saved, state(seed=5), DESCRIPTION)
    assert [path.name for path in saved.iterdir()] == [checkpoints.FILE]
    assert (saved / checkpoints.FILE).read_bytes() == before


def test_the_file_is_whole_on_disk_before_it_takes_its_place(saved, monkeypatch):
    order = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)
        monkeypatch.setattr(checkpoints.os, function, lambda *a, f=function, real=real: (order.append(f), real(*a)))
    checkpoints.save(saved, state(), DESCRIPTION)
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder
