"""A resumed run restores once, and its start events leave what was restored as it is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.errors import TrainingStateError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

BATCH, PER_EPOCH = 4, 4


def make(*plugins):
    model = tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=plugins,
        plugins=(),
    )


def train(folder, *plugins, epochs=2, **options):
    checkpoint = SaveTrainingStateCallback(folder, 1, 1, save_at_end=False)
    trainer = make(*plugins, checkpoint)
    trainer.train(
        tiny_data(PER_EPOCH * BATCH),
        epochs,
        eval_dataset=tiny_data(4),
        per_device_batch_size=BATCH,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
        **options,
    )
    return trainer


class Order(TrainerCallback):
    """Records when it is set up, when it is restored, and whether the run is resuming."""

    def __init__(self):
        self.calls = []

    def on_training_run_start(self, trainer):
        self.calls.append(("run_start", trainer.is_resuming))

    def on_train_epoch_start(self, trainer):
        self.calls.append(("epoch_start", trainer.is_resuming))

    def on_load_training_state(self, trainer):
        self.calls.append(("load", trainer.is_resuming))

    def on_train_step_start(self, trainer):
        self.calls.append(("step", trainer.is_resuming))

    def on_eval_epoch_start(self, trainer):
        self.calls.append(("eval", trainer.is_resuming))

    def state_dict(self):
        return {"x": 1}

    def load_state_dict(self, state):
        self.calls.append(("state", True))


class SaveIn(TrainerCallback):
    """Requests a state after the training part of the first epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer):
        if trainer.run_history.current_epoch == 1:
            trainer.control.save(self.folder / "before_evaluation")


@pytest.mark.parametrize(
    ("state", "start"),
    [
        ("epoch_0001", ["run_start", "state", "load", "epoch_start", "step"]),
        ("before_evaluation", ["run_start", "state", "load", "eval", "epoch_start"]),
        ("update_00000002", ["run_start", "epoch_start", "state", "load", "step"]),
    ],
)
def test_plugins_are_restored_once_after_the_last_start_event(tmp_path, state, start):
    whole = train(tmp_path / "whole", Order(), SaveIn(tmp_path / "whole"))
    order = Order()
    resumed = train(tmp_path / "again", order, resume_from=tmp_path / "whole" / state)
    assert [name for name, _ in order.calls[: len(start)]] == start
    restored = start.index("load") + 1
    assert all(is_resuming for _, is_resuming in order.calls[:restored])
    assert not any(is_resuming for _, is_resuming in order.calls[restored:])
    assert [name for name, _ in order.calls].count("state") == 1
    assert_identical(weights_of(resumed), weights_of(whole))


class Changes(TrainerCallback):
    """Changes something that was restored."""

    def __init__(self, event, change):
        def call(trainer):
            if trainer.is_resuming:
                with torch.no_grad():
                    change(trainer)

        setattr(self, event, call)


def add_to_weights(trainer):
    next(trainer.model.parameters()).data.add_(1)


def halve_the_rate(trainer):
    trainer.optimizer.param_groups[0]["lr"] /= 2


def clear_the_momentum(trainer):
    for values in trainer.optimizer.state.values():
        values["momentum_buffer"].zero_()


def step_the_scheduler(trainer):
    trainer.scheduler.last_epoch += 1


@pytest.mark.parametrize(
    "change", [add_to_weights, halve_the_rate, clear_the_momentum, step_the_scheduler]
)
@pytest.mark.parametrize("event", ["on_training_run_start", "on_train_epoch_start"])
def test_what_a_start_event_changes_is_put_back_and_reported(tmp_path, event, change):
    whole = train(tmp_path / "whole", Changes(event, change))
    options = {"resume_from": tmp_path / "whole" / "update_00000002"}
    with pytest.warns(UserWarning, match="restored again: the plugin 'Changes' has changed"):
        resumed = train(tmp_path / "again", Changes(event, change), **options)
    assert_identical(weights_of(resumed), weights_of(whole))
    with pytest.raises(TrainingStateError, match="Resuming was refused: .*'Changes'"):
        train(tmp_path / "strict", Changes(event, change), strict=True, **options)


def test_a_method_of_the_trainer_is_named_as_well(tmp_path):
    class Own(Trainer):
        def training_run_start(self):
            if self.is_resuming:
                halve_the_rate(self)

    train(tmp_path / "whole")
    model = tiny_model()
    trainer = Own(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=[SaveTrainingStateCallback(tmp_path / "again", 1, 1, save_at_end=False)],
        plugins=(),
    )
    with pytest.warns(UserWarning, match="training_run_start or train_epoch_start of"):
        trainer.train(
            tiny_data(PER_EPOCH * BATCH),
            2,
            eval_dataset=tiny_data(4),
            per_device_batch_size=BATCH,
            create_scheduler_fn=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.9),
            resume_from=tmp_path / "whole" / "update_00000002",
        )


def test_events_that_change_nothing_are_not_reported_and_record_once(tmp_path):
    class Touches(TrainerCallback):
        def on_training_run_start(self, trainer):
            trainer.run_history.update_metric("begun", 1)
            for parameter in trainer.model.parameters():
                parameter.data = parameter.data.clone()  # another tensor of the same values
            trainer.optimizer.param_groups[0]["lr"] *= 1

    train(tmp_path / "whole", Touches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = train(
            tmp_path / "again", Touches(), resume_from=tmp_path / "whole" / "update_00000002"
        )
    assert resumed.run_history.get_metric_values("begun") == [1]


def test_a_failed_start_leaves_the_trainer_usable(tmp_path):
    class FailsOnce(TrainerCallback):
        failed = False

        def on_training_run_start(self, trainer):
            if not self.failed:
                self.failed = True
                raise ValueError("not now")

    whole = train(tmp_path / "whole")
    checkpoint = SaveTrainingStateCallback(tmp_path / "again", 1, 1, save_at_end=False)
    trainer = make(FailsOnce(), checkpoint)
    options = {
        "eval_dataset": tiny_data(4),
        "per_device_batch_size": BATCH,
        "create_scheduler_fn": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.9),
        "resume_from": tmp_path / "whole" / "update_00000002",
    }
    with pytest.raises(ValueError, match="not now"):
        trainer.train(tiny_data(PER_EPOCH * BATCH), 2, **options)
    assert not trainer.is_resuming
    trainer.optimizer.param_groups[0]["lr"] = 0.1  # which the first attempt has restored
    trainer.train(tiny_data(PER_EPOCH * BATCH), 2, **options)
    assert_identical(weights_of(trainer), weights_of(whole))
