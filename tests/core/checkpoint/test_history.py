"""The run history in a training state: numbers by column, everything else as JSON."""

import copy
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.checkpoint import codec
from pa_core.checkpoint.codec import decode, encode
from pa_core.checkpoint.restore import TrainingState
from pa_core.checkpoint.safetensors_io import read_tensors, tensor_bytes
from pa_core.checkpoint.storage import StateReader, StateWriter, compact_json_bytes, parse_json
from pa_core.durations import Progress
from pa_core.errors import TrainingStateError
from pa_core.tracking import InMemoryRunHistory
from tests.helpers import tiny_data, tiny_model

NAN_WITH_PAYLOAD = struct.unpack("d", struct.pack("Q", 0x7FF8_0000_0000_0123))[0]
VALUES = [
    *(0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD),
    *(7, -1, 0, 2**53, 2**53 + 1, -(2**63), 2**70, True, False, None),
    *("", "two\nlines", "ünï", [], [1, 2.5, [math.nan, None]], {}, {"cat": 0.5, "n": 1}),
]


def bits(value):
    """What tells any two values apart, 1 from 1.0 and each NaN from the others."""
    return (float, struct.pack("d", value)) if type(value) is float else (type(value), repr(value))


def at(updates, history):
    history.follow(lambda: Progress(0.5, updates, 8 * updates, updates / 4, 0.1))


def in_a_file(state):
    """What is read of a history's state that was written to files."""
    tensors = {}
    encoded = compact_json_bytes(encode(state, tensors, "run_history"))
    return decode(parse_json(encoded), read_tensors(tensor_bytes(tensors)))


def restored(history):
    again = InMemoryRunHistory()
    again.load_state_dict(in_a_file(history.snapshot()))
    return again


def test_each_value_is_restored_as_it_was():
    history = InMemoryRunHistory()
    for number, value in enumerate(VALUES):
        if number == 5:
            at(3, history)
        history.update_metric(f"metric_{number % 3}", value)
    again = restored(restored(history))
    assert [bits(record["value"]) for record in again.records] == [bits(value) for value in VALUES]
    assert [record["metric"] for record in again.records][:4] == [
        *("metric_0", "metric_1", "metric_2", "metric_0"),
    ]
    places = [tuple(record.values())[2:] for record in again.records]
    assert places == [(1, None, None, None)] * 5 + [(1, 3, 24, 0.75)] * (len(VALUES) - 5)
    assert list(map(bits, again.get_metric_values("metric_1"))) == list(map(bits, VALUES[1::3]))
    again.update_metric("metric_1", 1)
    assert bits(again.get_latest_metric("metric_1")) == (int, "1")
    assert len(again.records) == len(VALUES) + 1


@pytest.mark.parametrize("place", [0.5, 2**64, -(2**64), True, "late"])
def test_a_place_of_an_unexpected_type_is_restored_too(place):
    history = InMemoryRunHistory()
    history.follow(lambda: Progress(0.5, place, 8, 3, 0.1))
    history.update_metric("loss", 1.5)
    (record,) = restored(history).records
    assert (record["value"], record["samples"]) == (1.5, 8)
    assert bits(record["update"]) == bits(place)
    assert bits(record["seconds"]) == (int, "3")


def test_the_columns_of_a_state_are_arrays_of_numbers(tmp_path):
    class Records(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("count", 3)
            trainer.run_history.update_metric("recall", [0.5, 1.0])

    history = InMemoryRunHistory()
    trainer = new_trainer(history, Records())
    history.update_metric("before", 0.25)
    trainer.train(tiny_data(8), 1, per_device_batch_size=4, reset_run_history=False)
    trainer.save_training_state(tmp_path / "state")
    name = "run_history.records."
    columns = {
        key.removeprefix(name): array
        for key, array in load_file(tmp_path / "state" / "state.safetensors").items()
        if key.startswith(name)
    }
    # The order: "before", then "count" and "recall" of the plugin, or the loop's own loss.
    text = (tmp_path / "state" / "state.json").read_text()
    assert "\n" not in text
    content = json.loads(text)["run_history"]["records"]["$records"]
    order = [content["metrics"][number] for number in columns["metric"]]
    count, recall = order.index("count"), order.index("recall")
    assert sorted(order) == ["before", "count", "recall", "train_loss_epoch"]
    assert order[0] == "before"
    assert {key: str(array.dtype) for key, array in columns.items()} == {
        **dict.fromkeys(("metric", "epoch", "update", "samples"), "int64"),
        **dict.fromkeys(("value", "seconds"), "float64"),
        **dict.fromkeys(("kinds", "entries"), "uint8"),
    }
    assert columns["value"][[0, count, recall]].tolist() == [0.25, 3.0, 0.0]
    assert columns["update"].tolist() == [0, 2, 2, 2]
    assert columns["samples"].tolist() == [0, 8, 8, 8]
    kinds = np.zeros((4, 5))
    kinds[0, 2:], kinds[count, 0], kinds[recall, 0] = 1, 2, 3
    assert columns["kinds"].tolist() == kinds.tolist()
    assert columns["entries"].tobytes() == b"[0.5,1.0]\n"


def test_what_was_taken_of_a_history_does_not_change_while_it_grows():
    history = InMemoryRunHistory()
    at(1, history)
    for value in (0.5, 7, [1]):
        history.update_metric("loss", value)
    tensors = {}
    encoded = encode(history.snapshot(), tensors, "run_history")
    before = copy.deepcopy(tensors)
    for _ in range(1000):  # beyond the room that there is
        for value in (2.5, 8, [2]):
            history.update_metric("other", value)
    history.delete_metric("loss")
    history.update_metric("loss", None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    values = [record["value"] for record in decode(encoded, tensors)["records"]]
    assert values == [0.5, 7, [1]]
    history.reset()
    assert history.records == []


def test_an_entry_is_encoded_by_one_save_and_not_by_the_next(monkeypatch):
    encoded = []
    original = codec._json_text

    def counted(value, owner):
        encoded.append((value, owner))
        return original(value, owner)

    monkeypatch.setattr(codec, "_json_text", counted)
    history = InMemoryRunHistory()
    at(1, history)
    history.update_metric("text", "a")
    encode(history.snapshot(), {}, "run_history")
    history.update_metric("loss", 0.5)
    history.update_metric("text", "b")
    assert [record["value"] for record in restored(history).records] == ["a", 0.5, "b"]
    assert encoded == [("a", "run_history.records.0.value"), ("b", "run_history.records.2.value")]
    again = restored(history)
    again.update_metric("text", "c")
    assert [record["value"] for record in restored(again).records] == ["a", 0.5, "b", "c"]
    assert encoded[2:] == [("c", "run_history.records.3.value")]


def test_a_value_that_can_not_be_saved_is_named_and_can_be_deleted():
    history = InMemoryRunHistory()
    for name, value in (("bad", {1}), ("good", [1]), ("bad", 2), ("other", "x"), ("good", 0.5)):
        history.update_metric(name, value)
    with pytest.raises(TrainingStateError, match=r"run_history\.records\.0\.value .*set"):
        encode(history.snapshot(), {}, "run_history")
    history.delete_metric("bad")
    records = restored(history).records
    assert [(r["metric"], r["value"]) for r in records] == [
        *(("good", [1]), ("other", "x"), ("good", 0.5)),
    ]


def test_a_deep_copy_of_a_history_grows_independently():
    history = InMemoryRunHistory()
    history.update_metric("loss", 1.0)
    copied = copy.deepcopy(history)
    copied.update_metric("loss", [2.0])
    history.update_metric("loss", 3.0)
    assert [record["value"] for record in copied.records] == [1.0, [2.0]]
    assert [record["value"] for record in history.records] == [1.0, 3.0]


def test_two_histories_that_load_one_state_grow_independently():
    first = InMemoryRunHistory()
    first.update_metric("loss", 1.0)
    state = first.snapshot()
    second = InMemoryRunHistory()
    second.load_state_dict(state)
    second.update_metric("accuracy", 2.0)
    first.update_metric("loss", 3.0)
    assert [record["value"] for record in first.records] == [1.0, 3.0]
    assert [record["value"] for record in second.records] == [1.0, 2.0]
    assert list(first.get_metric_names()) == ["loss"]


@pytest.mark.parametrize(
    "records",
    [
        [{"metric": 1, "value": 0.5, "epoch": 1, "update": 1, "samples": 1, "seconds": 1.0}],
        [{"metric": "loss", "value": 0.5, "epoch": 1}],
        [dict.fromkeys(("metric", "value", "epoch", "update", "samples", "seconds", "x"), "x")],
        ["loss"],
        None,
    ],
)
def test_records_that_make_no_sense_are_refused_and_change_nothing(records):
    history = InMemoryRunHistory()
    history.update_metric("loss", 1.0)
    before = history.records
    with pytest.raises((TypeError, ValueError, LookupError)):
        history.load_state_dict({"current_epoch": 3, "records": records})
    assert (history.records, history.current_epoch) == (before, 1)


def test_records_can_be_indexed_and_sliced():
    history = InMemoryRunHistory()
    for value in range(5):
        history.update_metric("loss", value)
    table = history.snapshot()["records"]
    assert [record["value"] for record in table] == [0, 1, 2, 3, 4]
    assert table[1]["value"] == 1
    assert table[-1]["value"] == 4
    assert [record["value"] for record in table[3:]] == [3, 4]
    assert [record["value"] for record in table[::-2]] == [4, 2, 0]
    assert table[4:2] == []
    with pytest.raises(IndexError):
        table[5]


# -- Whole states ---------------------------------------------------------------------------------


def new_trainer(history, *callbacks):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_func = nn.CrossEntropyLoss()
    return Trainer(model, loss_func, optimizer, callbacks, plugins=(), run_history=history)


class Best(InMemoryRunHistory):
    """A history with more state."""

    best = math.inf

    def update_metric(self, metric_name, metric_value):
        super().update_metric(metric_name, metric_value)
        self.best = min(self.best, metric_value)

    def state_dict(self):
        return super().state_dict() | {"best": self.best}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.best = state["best"]


@pytest.mark.parametrize("kind", [InMemoryRunHistory, Best])
def test_a_resumed_run_has_the_whole_history(tmp_path, kind):
    trainer = new_trainer(kind())
    trainer.train(tiny_data(16), 2)
    trainer.run_history.update_metric("last", -1.0)
    trainer.save_training_state(tmp_path / "state")
    resumed = new_trainer(kind())
    resumed.load_training_state(tmp_path / "state")
    assert resumed.run_history.records == trainer.run_history.records
    assert len(resumed.run_history.records) == 3
    assert resumed.run_history.current_epoch == trainer.run_history.current_epoch
    if kind is Best:
        assert resumed.run_history.best == -1.0


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A state with four records; the places of the first two are None."""
    folder = tmp_path_factory.mktemp("states") / "state"
    history = InMemoryRunHistory()
    history.update_metric("count", 3)
    history.update_metric("recall", [0.5])
    trainer = new_trainer(history)
    trainer.train(tiny_data(8), 2, reset_run_history=False)
    trainer.save_training_state(folder)
    return folder


def forged(source: Path, target: Path, change) -> Path:
    """A copy of a state with changed columns and correct hashes."""
    reader = StateReader(source)
    content, tensors = reader.read_json("state.json"), reader.read_tensors("state.safetensors")
    columns = {
        name.removeprefix("run_history.records."): tensor
        for name, tensor in tensors.items()
        if name.startswith("run_history.records.")
    }
    change(content["run_history"]["records"]["$records"], columns)
    tensors |= {f"run_history.records.{name}": tensor for name, tensor in columns.items()}
    manifest = dict(reader.manifest)
    for name in ("files", "format", "sequence"):
        manifest.pop(name)
    with StateWriter(target) as writer:
        for path in source.iterdir():
            if path.name not in ("state.json", "state.safetensors", "manifest.json"):
                writer.write(path.name, path.read_bytes())
        writer.write_json("state.json", content)
        writer.write_tensors("state.safetensors", tensors)
        writer.commit(manifest)
    return target


def with_item(name, index, value):
    def change(content, columns):
        columns[name][index] = value

    return change


def with_column(name, make):
    return lambda content, columns: columns.update({name: make(columns[name])})


def text(content: bytes):
    return lambda column: torch.tensor(list(content), dtype=torch.uint8)


FORGERIES = {
    "a metric without a name": with_item("metric", 0, 3),
    "a negative metric": with_item("metric", 0, -1),
    "a name without records": lambda content, columns: content["metrics"].append("more"),
    "a name twice": lambda content, columns: content["metrics"].__setitem__(1, "count"),
    "a name that is a number": lambda content, columns: content["metrics"].__setitem__(0, 5),
    "names that are text": lambda content, columns: content.update(metrics="abc"),
    "an unknown kind": with_item("kinds", (0, 0), 4),
    "an entry that doesn't exist": with_item("value", 1, 1.0),
    "a negative entry": with_item("value", 1, -1.0),
    "an entry between two": with_item("value", 1, 0.5),
    "an entry at NaN": with_item("value", 1, math.nan),
    "an entry that no row has": with_column("entries", text(b"[0.5]\n1\n")),
    "an entry beyond the last": with_item("kinds", (0, 0), 3),
    "an integer that is none": with_item("value", 0, 0.5),
    "an integer that is infinite": with_item("value", 0, math.inf),
    "an integer that is too large": with_item("value", 0, 2.0**60),
    "a shorter column": with_column("value", lambda column: column[:-1].clone()),
    "a table instead of a column": with_column("epoch", lambda column: column[:, None].clone()),
    "a column of another type": with_column("update", lambda column: column.double()),
    "kinds of another type": with_column("kinds", lambda column: column.long()),
    "kinds of fewer columns": with_column("kinds", lambda column: column[:, 1:].clone()),
    "a missing column": lambda content, columns: content["columns"].pop("samples"),
    "a tensor that doesn't exist": lambda content, columns: content["columns"].update(value="x"),
    "a list as the name of a tensor": lambda content, columns: content["columns"].update(value=[]),
    "entries that are missing": lambda content, columns: content["columns"].pop("entries"),
    "entries that aren't JSON": with_column("entries", text(b"[0.5\n")),
    "entries that are NaN": with_column("entries", text(b"NaN\n")),
    "entries with a key twice": with_column("entries", text(b'{"a":1,"a":2}\n')),
    "entries with an unknown tensor": with_column("entries", text(b'{"$tensor":"x"}\n')),
    "no columns": lambda content, columns: content.pop("columns"),
    "columns that are a list": lambda content, columns: content.update(columns=[]),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES.keys())
def test_columns_that_make_no_sense_are_refused(state, tmp_path, change):
    with pytest.raises(TrainingStateError):
        TrainingState(forged(state, tmp_path / "forged", change), 0)


def test_what_the_forgeries_change_is_valid_before(state, tmp_path):
    same = forged(state, tmp_path / "same", lambda content, columns: None)
    history = InMemoryRunHistory()
    history.load_state_dict(TrainingState(same, 0)._parts["run_history"])
    assert [record["value"] for record in history.records][:2] == [3, [0.5]]
    assert len(history.records) == 4
