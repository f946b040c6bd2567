"""The safetensors format: files written by hand as the format's description requires, and damaged files."""

import json

import numpy as np
import pytest

from imaml.storage import safetensors
from imaml.storage.arrays import DamagedFile


def file_of(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_file_written_by_hand_is_read(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [1, 17]},
        "flag": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]},
    }
    path = tmp_path / "hand.safetensors"
    path.write_bytes(file_of(header, b"\x01" + np.array([1.5, -2.0, 0.25, 3.0], "<f4").tobytes()))
    found = safetensors.read(path)
    assert found.keys() == {"weight", "flag"} and found["flag"] == np.True_
    np.testing.assert_array_equal(found["weight"], np.array([[1.5, -2.0], [0.25, 3.0]], np.float32))


def test_a_written_file_follows_the_description_and_is_read_bit_for_bit(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "a/kernel": random.normal(size=(3, 4)).astype(np.float32).T,  # not in C order
        "b": np.array(-0.0),
        "empty": np.zeros((0, 2), np.int32),
        "bytes": random.integers(0, 256, 5, dtype=np.uint8),
    }
    path = tmp_path / "written.safetensors"
    safetensors.write(path, arrays, {"format": "imaml"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 8 == 0 and header.pop("__metadata__") == {"format": "imaml"}
    assert header["a/kernel"] == {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    assert content[start : start + 48] == np.ascontiguousarray(arrays["a/kernel"]).tobytes()
    assert len(content) == start + sum(array.nbytes for array in arrays.values())
    found = safetensors.read(path)
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("name, array", [("x", np.zeros(2, complex)), ("__metadata__", np.zeros(2))])
def test_an_array_that_the_format_cannot_hold_is_refused(name, array, tmp_path):
    with pytest.raises(ValueError, match="cannot write the array"):
        safetensors.write(tmp_path / "file", {name: array})


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        file_of({"x": ENTRY}, b"1234567"),
        file_of({"x": ENTRY | {"shape": [3]}}, bytes(8)),
        file_of({"x": ENTRY | {"dtype": "F8"}}, bytes(8)),
        file_of({"x": ENTRY | {"data_offsets": [-8, 0]}}, bytes(8)),
        file_of({"x": {"dtype": "F32"}}, bytes(8)),
        file_of([1], b""),
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(DamagedFile):
        safetensors.read(path)
