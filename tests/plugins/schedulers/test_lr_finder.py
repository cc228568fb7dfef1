"""The learning-rate finder: recorded losses, suggestions, and that it restores everything."""

import random
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_schedulers import LearningRateResult, SchedulersPlugin, find_learning_rate
from tests.plugins.schedulers.runs import data, new_trainer


class Everything(TrainerCallback):
    """Records each event; the finder must never call it."""

    def __init__(self):
        self.called = []

    def on_training_run_start(self, trainer):
        self.called.append("start")

    def on_train_step_end(self, trainer):
        self.called.append("step")
        trainer.run_history.update_metric("seen", 1)

    @hookimpl(wrapper=True)
    def run_training(self, trainer):
        self.called.append("run")
        return (yield)


def test_it_records_the_losses_of_a_growing_learning_rate():
    trainer = new_trainer(plugins=[])
    result = find_learning_rate(
        trainer, data(80), start_lr=1e-4, end_lr=1e-2, num_updates=21, stop_factor=None
    )
    assert result.lrs == pytest.approx([1e-4 * 10 ** (n / 10) for n in range(21)])

    # By hand: the same batches and model, groups in the ratio 10 : 1.
    by_hand = new_trainer(plugins=[])
    losses = []

    class Hand(TrainerCallback):
        def on_optimizer_step_start(self, trainer):
            for group, ratio in zip(trainer.optimizer.param_groups, (1, 0.1), strict=True):
                group["lr"] = result.lrs[trainer.updates] * ratio

        def on_train_step_end(self, trainer, batch_output):
            losses.append(batch_output["loss"].item())

    by_hand.callback_handler.add_callback(Hand())
    by_hand.train(data(80), "21 updates")
    assert result.losses == pytest.approx(losses, rel=1e-6)
    average, expected = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = 0.98 * average + 0.02 * loss
        expected.append(average / (1 - 0.98**count))
    assert result.smoothed == pytest.approx(expected)


def test_the_loss_of_an_update_is_the_mean_over_its_accumulated_batch():
    whole = find_learning_rate(
        new_trainer(plugins=[]), data(80), num_updates=10, per_device_batch_size=16
    )
    parts = find_learning_rate(
        new_trainer(plugins=[]),
        data(80),
        num_updates=10,
        per_device_batch_size=4,
        gradient_accumulation_steps=4,
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_it_stops_when_the_loss_grows_or_is_nan():
    result = find_learning_rate(new_trainer(plugins=[]), data(80), end_lr=1e6)
    assert 10 < len(result.lrs) < 100
    assert max(result.smoothed) <= 4 * min(result.smoothed)
    further = find_learning_rate(new_trainer(plugins=[]), data(80), end_lr=1e6, stop_factor=None)
    assert len(result.lrs) < len(further.lrs) < 100
    assert np.isfinite(further.losses).all()


# -- Everything is restored -----------------------------------------------------------------------


def test_an_update_without_items_has_no_loss_and_its_learning_rate_is_tried_with_the_next():
    class Labelled(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return output | {"num_items_in_batch": int((batch[1] >= 0).sum())}

    x, y = torch.randn(12, 6), torch.arange(12) % 3
    y[4:8] = -100
    model = nn.Linear(6, 3)
    trainer = Labelled(model, nn.CrossEntropyLoss(), SGD(model.parameters(), 0.1), callbacks=())
    result = find_learning_rate(
        trainer,
        TensorDataset(x, y),
        num_updates=7,
        stop_factor=None,
        per_device_batch_size=4,
        train_dataloader_kwargs={"shuffle": False},
    )
    assert len(result.lrs) == len(result.losses) == 7
    assert np.isfinite(result.losses).all()


class WithBuffers(nn.Module):
    """Draws random numbers and changes buffers: saved, unsaved and replaced ones."""

    unsaved: torch.Tensor
    replaced: torch.Tensor

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(2), nn.Dropout(0.3)
        self.layer = nn.Linear(2, 1)
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.unsaved += 1
            self.replaced = self.replaced + random.random() + np.random.rand()
        return self.layer(self.dropout(self.norm(x)))


def used_trainer(optimizer) -> Trainer:
    """A trainer that has trained: with a history, momentum, gradients and modules in two modes."""
    torch.manual_seed(0)
    model = WithBuffers()
    trainer = Trainer(model, nn.MSELoss(), optimizer(model.parameters()), callbacks=[], plugins=[])
    trainer.train(data(), 1)
    model(data().tensors[0]).sum().backward()
    model.norm.eval()
    return trainer


def state_of(trainer: Trainer) -> dict:
    model = trainer.model
    array: Any = np.random.get_state()
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "gradients": [p.grad.clone() for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "modes": [module.training for module in model.modules()],
        "optimizer": deepcopy(trainer.optimizer.state_dict()["param_groups"]),
        "moments": [
            torch.as_tensor(value).clone()
            for state in trainer.optimizer.state.values()
            for value in state.values()
        ],
        "history": trainer.run_history.state_dict(),
        "python": random.getstate(),
        "numpy": array[1].tolist(),
        "torch": torch.get_rng_state(),
        "trainer": {name: value for name, value in vars(trainer).items() if name != "_hooks"},
    }


def assert_the_same(before: dict, after: dict) -> None:
    for name, value in before.items():
        if name == "trainer":
            assert value.keys() == after[name].keys()
            assert all(after[name][key] is item for key, item in value.items())
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, after[name]), name
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            pairs = zip(value, after[name], strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), name
        else:
            assert value == after[name], name


OPTIMIZERS = [
    partial(SGD, lr=0.1, momentum=0.9),
    partial(AdamW, lr=torch.tensor(0.01), foreach=False),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_restores_everything(optimizer):
    trainer = used_trainer(optimizer)
    rate = trainer.optimizer.param_groups[0]["lr"]
    before = state_of(trainer)
    find_learning_rate(trainer, data(), num_updates=12)
    assert_the_same(before, state_of(trainer))
    assert trainer.optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_restores_everything_if_something_is_raised(optimizer):
    trainer = used_trainer(optimizer)
    before = state_of(trainer)

    class Broken(TensorDataset):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

        __getitems__ = __getitem__

    with pytest.raises(OSError, match="the disk is gone"):
        find_learning_rate(trainer, Broken(*data().tensors), num_updates=12)
    assert_the_same(before, state_of(trainer))
    calls = []

    def loss_func(outputs, targets):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return nn.functional.mse_loss(outputs, targets)

    trainer.loss_func = loss_func
    before = state_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(trainer, data(), num_updates=12)
    assert_the_same(before, state_of(trainer))


def test_training_afterwards_gives_the_same_weights_as_without_it():
    plain, found = used_trainer(OPTIMIZERS[0]), used_trainer(OPTIMIZERS[0])
    find_learning_rate(found, data(), num_updates=12)
    for trainer in (plain, found):
        trainer.train(data(), 2, eval_dataset=data(8))
    for one, other in zip(plain.model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_generator_of_a_loader_is_restored():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(data(), batch_size=4, shuffle=True, generator=generator)
    before = generator.get_state()
    find_learning_rate(new_trainer(plugins=[]), loader, num_updates=4)
    assert torch.equal(generator.get_state(), before)


def test_no_event_is_called_and_no_scheduler_created_but_providers_are_called():
    class Halved:
        @hookimpl
        def calculate_train_batch_loss(self, trainer, batch):
            outputs = trainer.model(batch[0])
            loss = nn.functional.mse_loss(outputs, batch[1]) / 2
            return {"loss": loss, "model_outputs": outputs, "batch_size": len(batch[0])}

    plugin, callback = SchedulersPlugin(name="cosine", warmup=0.5), Everything()
    plain = find_learning_rate(new_trainer(plugins=[]), data(), num_updates=3)
    trainer = new_trainer(callback, plugins=[plugin, Halved()])
    halved = find_learning_rate(trainer, data(), num_updates=3)
    assert callback.called == []
    assert trainer.run_history.state_dict()["records"] == []
    assert halved.losses == pytest.approx([loss / 2 for loss in plain.losses], rel=1e-3)
    assert all("initial_lr" not in group for group in trainer.optimizer.param_groups)


# -- Suggestions ----------------------------------------------------------------------------------


def result(losses: list[float], method: str = "valley") -> LearningRateResult:
    lrs = tuple(10.0 ** (n / 10 - 5) for n in range(len(losses)))
    return LearningRateResult(lrs, tuple(losses), tuple(losses), method)


def test_the_suggestions_are_fastais():
    # 60 values: flat, a steady fall with one steep step, flat, and a rise
    losses = [5.0 - n / 1000 for n in range(20)]
    losses += [4.9 - n / 10 for n in range(10)]
    losses += [3.0 - n / 10 for n in range(10)]
    losses += [2.0] * 10 + [3.0 + n for n in range(10)]
    found = result(losses)
    # The first 6 and the last 5 are ignored. The longest decrease is 6..40, with 35 values. The
    # suggestion is at a third plus half a third of it, in fastai's integers: 0 + 11 + 5.
    assert found.suggest("valley") == found.lrs[6 + 11 + 5]
    assert found.suggest("steep") == found.lrs[29]
    assert found.suggest("minimum") == pytest.approx(found.lrs[40] / 10)
    assert result(losses, "steep").suggestion == found.suggest("steep")
    assert str(found).startswith("60 updates up to 7.94e+00: valley 1.58e-03, steep")


def longest_decrease(losses: list[float]) -> int:
    """By trying all subsequences."""
    best = 0
    for mask in range(1 << len(losses)):
        part = [loss for i, loss in enumerate(losses) if mask >> i & 1]
        if all(one > other for one, other in pairwise(part)):
            best = max(best, len(part))
    return best


def test_the_valley_is_in_the_longest_decrease():
    from pa_schedulers.lr_finder import _valley

    generator = np.random.default_rng(0)
    for _ in range(20):
        losses = generator.random(9)
        lrs = np.arange(9.0)
        length = longest_decrease(losses.tolist())
        ends = [i for i in range(9) if longest_decrease(losses[: i + 1].tolist()) == length]
        third = length / 3
        assert _valley(lrs, losses) == max(0, ends[0] - length) + int(third) + int(third / 2)


def test_a_plot_shows_the_losses_and_the_suggestions():
    import matplotlib

    matplotlib.use("agg")
    found = find_learning_rate(new_trainer(plugins=[]), data(80), end_lr=1.0)
    axes = found.plot()
    assert axes.get_xscale() == "log"
    assert list(axes.get_lines()[0].get_ydata()) == list(found.losses)
    assert len(axes.get_legend().get_texts()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_lr": 0}, "start_lr must be positive and below end_lr"),
        ({"start_lr": 1, "end_lr": 0.1}, "start_lr must be positive and below end_lr"),
        ({"num_updates": 2}, "num_updates must be 3 or more"),
        ({"smoothing": 1}, "smoothing must be"),
        ({"stop_factor": 0.5}, "stop_factor must be above 1"),
        ({"suggest": "valey"}, "Did you mean 'valley'"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_learning_rate(new_trainer(plugins=[]), data(), **arguments)
    with pytest.raises(ValueError, match="2 updates are too few to suggest"):
        _ = result([1.0, 2.0]).suggestion
