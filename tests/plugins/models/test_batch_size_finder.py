"""The batch-size finder: the largest size, timings, and that the trainer is restored."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pa_core import Trainer, TrainerCallback
from pa_core.errors import is_out_of_memory
from pa_models import BatchSizeResult, BatchSizeTrial, find_batch_size
from tests.helpers import NoisyData, NoisyModel, assert_identical, tiny_data, tiny_model, weights_of

ABSURD = 2**50  # bytes, more than any machine has


class Greedy(nn.Module):
    """Allocates too much memory from some batch size on: a real error of the allocator."""

    def __init__(self, bound: int) -> None:
        super().__init__()
        self.model: nn.Module = NoisyModel()
        self.bound = bound
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.sizes: list[int] = []

    def forward(self, x):
        self.sizes.append(len(x))
        self.calls = self.calls + 1  # replaces the tensor, as some modules do
        if len(x) > self.bound:
            torch.empty(ABSURD, dtype=torch.uint8)
        return self.model(x)


class NoEvents(TrainerCallback):
    """Fails at any event of a run."""

    def on_training_run_start(self, trainer) -> None:
        raise AssertionError

    on_train_step_end = on_optimizer_step_end = on_train_epoch_start = on_training_run_start


def trainer_of(model: nn.Module, *callbacks, **arguments) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Trainer(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=(), **arguments
    )


@pytest.mark.parametrize(("bound", "found"), [(100, 96), (37, 36), (64, 64), (7, 7), (1, 1)])
def test_it_doubles_until_memory_is_full_and_bisects_to_within_an_eighth(bound, found):
    model = Greedy(bound)
    model.model = tiny_model()  # a batch norm can't be trained with one sample
    result = find_batch_size(trainer_of(model), tiny_data(400), max_batch_size=300)
    assert result.batch_size == found
    assert found > bound - max(1, bound // 8) - 1
    assert [t.batch_size for t in result.trials] == sorted(t.batch_size for t in result.trials)
    assert all(trial.fits == (trial.batch_size <= bound) for trial in result.trials)
    assert all((trial.samples_per_second or 0) > 0 for trial in result.trials if trial.fits)


def test_max_batch_size_or_the_dataset_limits_it_if_memory_does_not():
    sizes = [
        t.batch_size
        for t in find_batch_size(
            trainer_of(tiny_model()), tiny_data(44), max_batch_size=1000
        ).trials
    ]
    assert sizes == [8, 16, 32, 44]
    result = find_batch_size(
        trainer_of(tiny_model()), tiny_data(400), max_batch_size=20, initial_batch_size=3
    )
    assert [trial.batch_size for trial in result.trials] == [3, 6, 12, 20]


def test_every_batch_is_full_and_each_size_is_tried_num_steps_times():
    model = Greedy(10**9)
    find_batch_size(trainer_of(model), tiny_data(44), max_batch_size=44, num_steps=4)
    assert model.sizes == [8] * 4 + [16] * 4 + [32] * 4 + [44] * 4


@pytest.mark.parametrize("is_fresh", [True, False])
def test_it_restores_everything(is_fresh):
    model = Greedy(20)
    trainer = trainer_of(model)
    if not is_fresh:  # with optimizer state, history, scheduler and position
        trainer.train(tiny_data(), 2, per_device_batch_size=16, create_scheduler_fn=None)
    trainer.callback_handler.add_callback(NoEvents)
    model.get_submodule("model.layers.1").eval()
    model.get_parameter("model.layers.0.weight").grad = torch.ones(8, 6)
    before: dict = {
        "weights": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "modes": [module.training for module in model.modules()],
        "python": random.getstate(),
        "history": trainer.run_history.state_dict(),
        "position": copy.deepcopy(trainer.position),
    }
    array, generator = (
        np.random.get_state(legacy=False)["state"]["key"].copy(),
        torch.get_rng_state(),
    )
    attributes = dict(vars(trainer))
    objects = [id(p) for p in model.parameters()], [id(b) for b in model.buffers()]

    result = find_batch_size(trainer, NoisyData(60), max_batch_size=60)
    assert result.batch_size == 20

    assert_identical(model.state_dict(), before["weights"])
    after: dict = trainer.optimizer.state_dict()
    assert after["param_groups"] == before["optimizer"]["param_groups"]
    for key, state in before["optimizer"]["state"].items():
        assert_identical(after["state"][key], state)
    assert after["state"].keys() == before["optimizer"]["state"].keys()
    assert [module.training for module in model.modules()] == before["modes"]
    assert random.getstate() == before["python"]
    assert (np.random.get_state(legacy=False)["state"]["key"] == array).all()
    assert torch.equal(torch.get_rng_state(), generator)
    assert trainer.run_history.state_dict() == before["history"]
    assert trainer.position == before["position"]
    assert vars(trainer) == attributes
    assert objects == ([id(p) for p in model.parameters()], [id(b) for b in model.buffers()])
    assert torch.equal(model.get_parameter("model.layers.0.weight").grad, torch.ones(8, 6))


def test_a_run_after_it_gives_the_same_weights_as_without_it():
    runs = []
    for is_searched in (True, False):
        trainer = trainer_of(NoisyModel())
        if is_searched:
            find_batch_size(trainer, tiny_data(), max_batch_size=32)
        trainer.train(NoisyData(), 2, create_scheduler_fn=None)
        runs.append(weights_of(trainer))
    assert_identical(*runs)


def test_other_errors_propagate_and_everything_is_restored():
    class Broken(Greedy):
        def forward(self, x):
            if len(x) > 8:
                raise RuntimeError("shapes don't fit")
            return super().forward(x)

    trainer = trainer_of(Broken(100))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        find_batch_size(trainer, tiny_data(), max_batch_size=32)
    assert_identical(trainer.model.state_dict(), before)


def test_under_mixed_precision_it_trains_as_the_trainer_does():
    trainer = trainer_of(tiny_model(), mixed_precision="bf16")
    before = weights_of(trainer)
    assert find_batch_size(trainer, tiny_data(), max_batch_size=16).batch_size == 16
    assert_identical(weights_of(trainer), before)
    trainer.train(tiny_data(), 1)


def test_a_stream_limits_the_size_to_its_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(tiny_data(40))

    result = find_batch_size(trainer_of(tiny_model()), Stream(), max_batch_size=500)
    assert 36 <= result.batch_size <= 40


def test_a_collate_function_and_loader_arguments_are_used():
    seen = []

    def collate(samples):
        seen.append(len(samples))
        return torch.utils.data.default_collate(samples)

    find_batch_size(
        trainer_of(tiny_model()),
        [tiny_data(20)[i] for i in range(20)],
        max_batch_size=16,
        collate_fn=collate,
        train_dataloader_kwargs={"batch_size": 5, "shuffle": False},
    )
    assert set(seen) == {8, 16}


# -- Errors ---------------------------------------------------------------------------------------


def test_an_error_if_not_even_one_sample_fits():
    with pytest.raises(RuntimeError, match="Not even a batch of one sample"):
        find_batch_size(trainer_of(Greedy(0)), tiny_data(), max_batch_size=8)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (tiny_data(), {}, "needs max_batch_size on a CPU"),
        (tiny_data(), {"max_batch_size": 0}, "max_batch_size must be an integer of at least 1"),
        (tiny_data(), {"initial_batch_size": 1.5}, "initial_batch_size must be an integer"),
        (tiny_data(), {"num_steps": 1}, "num_steps must be an integer of at least 2, got 1"),
        (tiny_data(0), {"max_batch_size": 8}, "has fewer samples than processes"),
        (DataLoader(tiny_data()), {"max_batch_size": 8}, "needs a dataset"),
        (
            tiny_data(),
            {"max_batch_size": 8, "train_dataloader_kwargs": {"batch_sampler": [[0]]}},
            "which a batch_sampler has fixed",
        ),
    ],
)
def test_invalid_arguments_are_rejected(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_batch_size(trainer_of(tiny_model()), data, **arguments)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error, expected):
    assert is_out_of_memory(error) is expected


# -- The result -----------------------------------------------------------------------------------

RESULT = BatchSizeResult(
    (
        BatchSizeTrial(8, True, 100.0, 2**30),
        BatchSizeTrial(16, True, 150.0),
        BatchSizeTrial(24, True, 120.0),
        BatchSizeTrial(32, False),
    )
)


def test_the_result_has_the_largest_and_the_fastest_size_and_prints_a_table():
    assert (RESULT.batch_size, RESULT.fastest) == (24, 16)
    assert str(RESULT).splitlines() == [
        "batch size  samples/s  peak memory",
        "         8      100.0     1.00 GiB",
        "        16      150.0            -",
        "        24      120.0            -",
        "        32  doesn't fit",
    ]


def test_the_result_is_plotted(tmp_path: Path):
    import matplotlib

    matplotlib.use("agg")
    axes = RESULT.plot()
    (line,) = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(line.get_ydata()) == [100.0, 150.0, 120.0]
    axes.figure.savefig(tmp_path / "plot.png")
    assert RESULT.plot(axes) is axes


def test_without_matplotlib_the_error_has_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "pa-models\[plot\]"'):
        RESULT.plot()
