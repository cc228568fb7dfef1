"""Accumulated gradients are those of the mean over the whole accumulated batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pa_core import Trainer
from tests.helpers import largest_difference, tiny_data, tiny_model, weights_of


def train(batch_size, accumulation, *, data=None, trainer_class=Trainer, lr=0.1, **kwargs):
    model = tiny_model()
    trainer = trainer_class(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        callbacks=(),
        plugins=(),
    )
    trainer.train(
        data if data is not None else tiny_data(44),  # 44 = 32 + 12: 8 and 4 in the last group
        num_epochs=2,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **kwargs,
    )
    return trainer


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_norm": 0.2}, {"gradient_clip_value": 0.05}])
def test_eight_times_four_equals_thirty_two_times_one(clip):
    accumulated, whole = train(8, 4, **clip), train(32, 1, **clip)
    assert accumulated.updates == whole.updates == 4
    assert largest_difference(weights_of(accumulated), weights_of(whole)) < 1e-6
    losses = [t.run_history.get_metric_values("train_loss_epoch") for t in (accumulated, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_clipping_changes_the_weights():
    """Guards the test above: the bounds that it takes do clip."""
    free, clipped = train(32, 1), train(32, 1, gradient_clip_norm=0.2)
    assert largest_difference(weights_of(free), weights_of(clipped)) > 1e-3


class Stream(IterableDataset):
    """The samples in their order, with no length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_stream_of_unknown_length_accumulates_exactly_too():
    accumulated = train(8, 4, data=Stream(tiny_data(44)))
    whole = train(32, 1, data=Stream(tiny_data(44)))
    assert accumulated.updates == whole.updates == 4
    assert largest_difference(weights_of(accumulated), weights_of(whole)) < 1e-6


def test_a_ready_loader_accumulates_exactly_too():
    accumulated = train(8, 4, data=DataLoader(tiny_data(44), batch_size=8))
    whole = train(32, 1, data=DataLoader(tiny_data(44), batch_size=32))
    assert largest_difference(weights_of(accumulated), weights_of(whole)) < 1e-6


class TokenTrainer(Trainer):
    """A loss over some of the items of a batch, as language models have."""

    def calculate_train_batch_loss(self, batch):
        x, y = batch
        wanted = y != 0
        outputs = self.model(x)
        loss = nn.functional.cross_entropy(outputs[wanted], y[wanted])
        return {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(y),
            "num_items_in_batch": wanted.sum(),
        }


def test_a_17_token_weighted_loss_equals_that_of_the_big_batch():
    accumulated = train(8, 4, trainer_class=TokenTrainer)
    whole = train(32, 1, trainer_class=TokenTrainer)
    assert largest_difference(weights_of(accumulated), weights_of(whole)) < 1e-6
    losses = [t.run_history.get_metric_values("train_loss_epoch") for t in (accumulated, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_15_the_recorded_loss_is_the_mean_over_samples_whatever_the_accumulation():
    trainer = train(8, 4, lr=0.0)  # with fixed weights the mean can be calculated afterwards
    x, y = tiny_data(44).tensors
    expected = nn.functional.cross_entropy(trainer.get_model()(x), y).item()
    assert trainer.run_history.get_latest_metric("train_loss_epoch") == pytest.approx(
        expected, abs=1e-6
    )
