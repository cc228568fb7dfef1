"""Training states on disk: complete or absent, and every byte verified."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from pa_core.checkpoint.codec import decode, encode
from pa_core.checkpoint.storage import MANIFEST, StateReader, StateWriter, find_states, verify
from pa_core.errors import TrainingStateError


def write(target, **manifest):
    with StateWriter(target) as writer:
        writer.write_json("state.json", {"a": [1, 2]})
        writer.write_tensors("model.safetensors", {"w": torch.arange(6.0).reshape(2, 3).T})
        writer.commit(manifest)


def test_a_committed_state_contains_everything_that_was_written(tmp_path):
    write(tmp_path / "one", note="x")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert verify(tmp_path / "one") == []
    reader = StateReader(tmp_path / "one")
    assert reader.manifest["note"] == "x"
    assert reader.read_json("state.json") == {"a": [1, 2]}
    assert reader.read_tensors("model.safetensors")["w"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_after_an_error_the_old_state_is_unchanged(tmp_path):
    write(tmp_path / "one", note="old")
    with pytest.raises(TrainingStateError, match="not a plain data type"):
        write(tmp_path / "one", note=encode({"x": print}, {}, "note"))
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(tmp_path / "one", note=object())  # fails in the commit, after all other files
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert StateReader(tmp_path / "one").manifest["note"] == "old"


def test_a_state_is_replaced_as_a_whole_and_anything_else_is_not_overwritten(tmp_path):
    write(tmp_path / "one", note="old")
    write(tmp_path / "one", note="new")
    assert StateReader(tmp_path / "one").manifest["note"] == "new"
    precious = tmp_path / "photos" / "cat.png"
    precious.parent.mkdir()
    precious.write_bytes(b"cat")
    with pytest.raises(TrainingStateError, match=r"photos already exists and is not a training"):
        write(tmp_path / "photos")
    assert precious.read_bytes() == b"cat"


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", MANIFEST])
def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path, name):
    write(tmp_path / "one")
    path = tmp_path / "one" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert verify(tmp_path / "one"), f"bit flipped at {place}"
        path.write_bytes(whole[:place])
        assert verify(tmp_path / "one"), f"cut at {place}"
    path.write_bytes(whole)
    assert verify(tmp_path / "one") == []


def test_missing_unlisted_and_linked_files_are_reported(tmp_path):
    write(tmp_path / "one")
    folder = tmp_path / "one"
    (folder / "more.bin").write_bytes(b"")
    (folder / "state.json").rename(tmp_path / "elsewhere.json")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    problems = " ".join(verify(folder))
    assert "more.bin isn't listed" in problems
    assert "state.json is missing" in problems
    assert "model.safetensors is not a regular file" in problems


def test_a_manifest_that_points_outside_is_refused(tmp_path):
    write(tmp_path / "one")
    (tmp_path / "secret").write_bytes(b"s")
    path = tmp_path / "one" / MANIFEST
    content = json.loads(path.read_text())
    content["files"]["../secret"] = {"size": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(content))
    assert verify(tmp_path / "one")


def test_states_are_found_newest_first_without_leftovers(tmp_path):
    for number, name in enumerate(("b", "c", "a")):
        write(tmp_path / name, saved_at=float(number))
    (tmp_path / ".tmp-d-1234").mkdir()
    (tmp_path / "notes").mkdir()
    assert [path.name for path in find_states(tmp_path)] == ["a", "c", "b"]


def test_plain_data_survives_encoding_and_decoding():
    value: dict[Any, Any] = {
        "numbers": (1, 2.5, float("inf"), None, True),
        7: {"tensor": torch.arange(3), "array": np.array([[1.5]])},
        "$odd": [np.float32(0.5), "text"],
    }
    tensors: dict = {}
    text = json.dumps(encode(value, tensors, "plugin"), allow_nan=False)
    back = decode(json.loads(text), tensors)
    assert back["numbers"] == value["numbers"]
    assert back["$odd"] == [0.5, "text"]
    assert torch.equal(back[7]["tensor"], value[7]["tensor"])
    assert isinstance(back[7]["array"], np.ndarray)
    assert back[7]["array"].tolist() == [[1.5]]


@pytest.mark.parametrize("value", [print, object(), {1, 2}, b"bytes"])
def test_other_data_is_refused_naming_its_place(value):
    with pytest.raises(TrainingStateError, match=r"plugin 'x'.a.0 can't be saved"):
        encode({"a": [value]}, {}, "plugin 'x'")
