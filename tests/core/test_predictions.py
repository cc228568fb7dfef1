"""`predict`: outputs joined in memory, and in a folder that is filled as they are made."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from pa_core import Trainer
from pa_core.predictions import PaddedRows, Predictions, join
from tests.helpers import tiny_data, tiny_model


def make(trainer_class=Trainer):
    return trainer_class(tiny_model(), None, None, callbacks=(), plugins=())


class Everything(Trainer):
    """Returns outputs of every kind that can be joined."""

    def calculate_predictions(self, batch):
        outputs = self.model(batch[0])
        longest = int(batch[1].max()) + 1
        rows = torch.zeros(len(outputs), longest, dtype=torch.long)
        for row, label in zip(rows, batch[1].tolist(), strict=True):
            row[: label + 1] = 7
        return {
            "outputs": outputs.bfloat16(),
            "pair": (outputs, [2 * outputs, None]),
            "texts": [f"number {label}" for label in batch[1].tolist()],
            "array": outputs.numpy(),
            "rows": PaddedRows(rows, -1),
            3: outputs > 0,
        }


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


def test_a_folder_has_what_predict_returns(tmp_path, monkeypatch):
    monkeypatch.setattr("pa_core.predictions._MAX_BATCHES", 2)  # several files
    trainer, data = make(trainer_class=Everything), tiny_data(11)
    expected = trainer.predict(data, 2)
    found = trainer.predict(data, 2, to=tmp_path / "made" / "here")
    assert len(found) == 11
    assert len(list(found.folder.glob("*.safetensors"))) == 3
    assert_equal(found.load(), expected)
    again = Predictions(str(tmp_path / "made" / "here"))
    assert_equal(again.load(), expected)
    sizes = [len(batch["texts"]) for batch in again.batches()]
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["here"]


def test_padded_rows_do_not_depend_on_the_batches():
    trainer, data = make(trainer_class=Everything), tiny_data(11)
    labels = data.tensors[1]
    expected = torch.full((11, int(labels.max()) + 1), -1)
    whole = [trainer.predict(data, size)["rows"] for size in (1, 3, 11)]
    for row, label in zip(expected, labels.tolist(), strict=True):
        row[: label + 1] = 7
    # Within a batch, the rows have the padding of the batch.
    for rows in whole:
        assert torch.equal(rows.where(rows == 7, -1), expected)
    values = [torch.ones(2, 1, 3), torch.ones(1, 4, 2)]
    padded = join([PaddedRows(value, 5) for value in values], [2, 1])
    assert padded.shape == (3, 4, 3)
    assert padded.eq(1).sum() == 6 + 8
    assert padded.eq(5).sum() == 36 - 14


class Endless(Dataset):
    """Samples whose predictions don't fit in memory together; fails at one of them."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == self.fails_at:
            raise RuntimeError("unreadable")
        return torch.full((2,), float(index))


class Large(Trainer):
    watched: Path | None = None

    def calculate_predictions(self, batch):
        if self.watched is not None:
            self.counts.append(sum(1 for _ in self.watched.rglob("part-*.safetensors")))
        return (batch if isinstance(batch, torch.Tensor) else batch[0]).repeat(1, 1000)


def test_predictions_are_written_as_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr("pa_core.predictions._MAX_BYTES", 20_000)
    trainer = make(trainer_class=Large)
    trainer.watched, trainer.counts = tmp_path, []
    found = trainer.predict(Endless(), 1, to=tmp_path / "large")
    assert trainer.counts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert found.load()[:, 0].tolist() == list(range(12))


def test_a_failure_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("pa_core.predictions._MAX_BATCHES", 1)
    trainer, folder = make(trainer_class=Large), tmp_path / "made"
    with pytest.raises(RuntimeError, match="unreadable"):
        trainer.predict(Endless(fails_at=9), 4, to=folder)
    assert not list(tmp_path.iterdir())
    trainer.predict(Endless(), 4, to=folder)
    with pytest.raises(RuntimeError, match="unreadable"):
        trainer.predict(Endless(fails_at=9), 4, to=folder)
    assert Predictions(folder).load()[:, 0].tolist() == list(range(12))

    calls = itertools.count()

    def full(path, chunks):
        if next(calls) > 1:
            raise OSError(28, "No space left on device")
        return path.write_bytes(b"".join(chunks))

    monkeypatch.setattr("pa_core.checkpoint.atomic_io.write_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.predict(Endless(), 4, to=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert len(Predictions(folder)) == 12
    monkeypatch.undo()
    found = trainer.predict(tiny_data(3), 4, to=folder)  # earlier predictions are replaced
    assert len(found) == 3


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    trainer = make()
    with pytest.raises(ValueError, match=r"already exists and has no predictions; not overwritten"):
        trainer.predict(tiny_data(3), to=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ValueError, match="has no complete predictions"):
        Predictions(tmp_path)
    with pytest.raises(ValueError, match="is an address, not a path"):
        trainer.predict(tiny_data(3), to="s3://bucket/made")
    (tmp_path / "predictions.json").write_text('{"format": 1, "parts": {"../x": [[0, 1]]}}')
    with pytest.raises(ValueError, match="is damaged"):
        Predictions(tmp_path)


@pytest.mark.parametrize("to", [None, "made"])
def test_outputs_that_cannot_be_joined_are_an_error_at_the_first_batch(tmp_path, to):
    class Outputs(Trainer):
        batches = 0

        def calculate_predictions(self, batch):
            self.batches += 1
            outputs = self.model(batch[0])
            return {"outputs": outputs, "heads": [outputs, outputs.mean()]}

    trainer = make(trainer_class=Outputs)
    with pytest.raises(TypeError, match=r"the entry \['heads'\]\[1\] is a scalar tensor"):
        trainer.predict(tiny_data(8), 4, to=to and tmp_path / to)
    assert trainer.batches == 1
    assert not list(tmp_path.iterdir())


def test_a_list_as_long_as_its_batch_is_taken_for_samples_only_if_that_is_clear():
    pair = [torch.ones(2, 3), torch.zeros(2, 3)]
    with pytest.raises(ValueError, match="unclear whether .* Return a tuple of outputs"):
        join([pair, pair], [2, 2])
    assert join([tuple(pair), tuple(pair)], [2, 2])[0].shape == (4, 3)
    joined = join([pair, [torch.ones(1, 3), torch.zeros(1, 3)]], [2, 1])  # two outputs
    assert [one.shape for one in joined] == [(3, 3), (3, 3)]
    assert len(join([pair, pair[:1]], [2, 1])) == 3  # three samples


def test_batches_with_different_outputs_are_an_error():
    parts = [{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}]
    with pytest.raises(ValueError, match="of some batches have b, and those of others don't"):
        join(parts, [2, 2])
    assert join([np.ones((2, 1)), np.zeros((1, 1))], [2, 1]).tolist() == [[1], [1], [0]]
