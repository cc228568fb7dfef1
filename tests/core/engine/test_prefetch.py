"""Prefetching keeps the order, loses no batch, delays errors, and counts no batch too early."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.data.loader import mark_last
from pa_core.engine.prefetch import StreamCopier, _has_only_cpu_tensors, prefetched
from tests.helpers import (
    NoisyData,
    NoisyModel,
    assert_identical,
    tiny_data,
    tiny_model,
    weights_of,
)

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class LoggedCopier:
    """Replaces a stream: records when a copy starts and when it is handed over."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self, batch):
        self.log.append(f"begin {batch}")
        return [batch]

    def hand_over(self, copy):
        self.log.append(f"hand over {copy[0]}")
        return copy[0]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_each_batch_is_yielded_once_and_in_order(count):
    assert list(prefetched(range(count), LoggedCopier())) == list(range(count))


def test_the_next_copy_starts_before_a_batch_is_yielded():
    copier = LoggedCopier()
    for batch in prefetched("abc", copier):
        copier.log.append(f"compute {batch}")
    assert copier.log == [
        *("begin a", "hand over a", "begin b", "compute a"),
        *("hand over b", "begin c", "compute b", "hand over c", "compute c"),
    ]


def test_an_error_of_the_data_is_raised_after_the_batches_before_it():
    def broken():
        yield 1
        yield 2
        raise KeyError("damaged")

    copied = prefetched(broken(), LoggedCopier())
    assert [next(copied), next(copied)] == [1, 2]
    with pytest.raises(KeyError, match="damaged"):
        next(copied)


def test_at_most_one_batch_is_fetched_ahead():
    fetched = []

    def source():
        for number in range(10):
            fetched.append(number)
            yield number

    copied = prefetched(source(), LoggedCopier())
    assert [next(copied), next(copied)] == [0, 1]
    copied.close()
    assert fetched == [0, 1, 2]


def test_the_last_batch_is_marked_as_the_last():
    assert list(mark_last(prefetched("ab", LoggedCopier()))) == [("a", False), ("b", True)]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(2), True),
        ({"a": [torch.ones(2), 3], "b": ("text", None)}, True),
        ([torch.ones(2), nn.Linear(1, 1)], False),  # can be moved, but its memory is unknown
        ([torch.ones(2, device="meta")], False),
    ],
)
def test_only_tensors_on_the_cpu_are_copied_on_another_stream(batch, expected):
    assert _has_only_cpu_tensors(batch) is expected


def trained(prefetches: bool, monkeypatch, **options) -> Trainer:
    """A run on the CPU, with or without a replacement for the stream."""
    model = tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(),
        plugins=(),
    )
    if prefetches:
        monkeypatch.setattr(
            trainer._engine, "moved", lambda items: prefetched(items, LoggedCopier())
        )
    trainer.train(tiny_data(), 2, tiny_data(8), **options)
    return trainer


@pytest.mark.parametrize("options", [{}, {"max_num_train_steps": 3}])
def test_prefetching_changes_neither_a_run_nor_its_position(options, monkeypatch):
    ahead, plain = trained(True, monkeypatch, **options), trained(False, monkeypatch, **options)
    for name in ("epoch", "batch", "updates", "samples", "phase"):
        assert getattr(ahead.position, name) == getattr(plain.position, name), name
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights_of(ahead).values(), weights_of(plain).values(), strict=True)
    )
    name = "eval_loss_epoch"
    assert ahead.run_history.get_metric_values(name) == plain.run_history.get_metric_values(name)


class AddNoise(TrainerCallback):
    """Adds numbers of all generators to each batch, draws after it too, and saves each update."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def on_train_step_start(self, batch):
        batch[0].add_(random.random() + np.random.rand() + torch.rand(()).item())

    def on_train_step_end(self, trainer):
        random.random(), np.random.rand(), torch.rand(())
        if self.folder is not None:
            trainer.save_training_state(self.folder / f"{trainer.updates}")


@pytest.fixture
def noisy_run(monkeypatch):
    """Trains with dropout and augmentation; returns the weights."""

    def run(ahead, data, *callbacks, workers=0, resume_from=None):
        model = NoisyModel()
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=callbacks,
            plugins=(),
        )
        if ahead:
            monkeypatch.setattr(
                trainer._engine, "moved", lambda items: prefetched(items, LoggedCopier())
            )
        trainer.train(
            data, 2, per_device_batch_size=4, resume_from=resume_from,
            train_dataloader_kwargs={"num_workers": workers},
        )  # fmt: skip
        return weights_of(trainer)

    return run


@pytest.mark.parametrize("workers", [0, 1])
def test_prefetching_changes_neither_augmentation_nor_dropout(workers, noisy_run):
    expected = noisy_run(False, NoisyData(22))
    assert_identical(noisy_run(True, NoisyData(22), workers=workers), expected)


@pytest.mark.parametrize("data", [tiny_data(22), NoisyData(22)], ids=["tensors", "noisy"])
def test_noise_of_a_hook_is_the_same_with_prefetching_and_after_a_resume(data, noisy_run, tmp_path):
    expected = noisy_run(False, data, AddNoise())
    assert_identical(noisy_run(True, data, AddNoise(tmp_path)), expected)
    for updates in (1, 4, 5, 6, 11):  # around the end of an epoch of six updates
        state = tmp_path / str(updates)
        assert_identical(noisy_run(True, data, AddNoise(), resume_from=state), expected)


@pytest.mark.gpu
@on_gpu
def test_the_next_batch_is_copied_while_the_gpu_computes():
    device = torch.device("cuda", torch.cuda.current_device())
    copier = StreamCopier(device, lambda batch: batch.to(device, non_blocking=True))
    sent = torch.ones(1 << 20).pin_memory()
    for _ in range(2):  # the first time, allocating memory may synchronise
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)  # cycles: a second or so
        computed = torch.cuda.current_stream(device).record_event()
        copy, copied = copier.begin(sent)
        copied.synchronize()
        is_computing = not computed.query()
        del copy
    assert is_computing


@pytest.mark.gpu
@on_gpu
def test_batches_are_copied_whole_while_the_gpu_is_busy():
    device = torch.device("cuda", torch.cuda.current_device())
    sent = [torch.full((1 << 20,), float(number)).pin_memory() for number in range(8)]
    copier = StreamCopier(device, lambda batch: batch.to(device, non_blocking=True))
    square = torch.randn(2048, 2048, device=device)
    sums = []
    for batch in prefetched(sent, copier):
        square = (square @ square).clamp(-1, 1)  # the current stream lags behind the host
        sums.append(batch.double().mean())
        del batch
    assert [float(total) for total in sums] == list(range(8))
