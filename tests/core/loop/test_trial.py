"""A trial run calls what was asked for, and leaves no trace, whatever happens in it."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback, hookimpl, hookspec
from tests.builtin_trainer import make_trainer
from tests.helpers import NoisyData, NoisyModel, assert_identical, tiny_data, weights_of


class Forbidden(TrainerCallback):
    """Fails when an event, a run or the scheduler of the trainer's own plugins is called."""

    def on_training_run_start(self, trainer):
        raise AssertionError("an event of the trainer's own plugin")

    on_train_step_end = on_train_epoch_end = on_save_training_state = on_training_run_start
    anything = on_training_run_start

    @hookimpl(wrapper=True)
    def run_training(self, trainer):
        yield
        raise AssertionError("a wrapper of a run")

    @hookimpl
    def create_scheduler(self, trainer):
        raise AssertionError("a scheduler")


class Doubles:
    """Provides the loss."""

    @hookimpl
    def calculate_train_batch_loss(self, trainer, batch):
        outputs = trainer.model(batch[0])
        loss = 2 * trainer.loss_func(outputs, batch[1])
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(batch[0])}


class Losses(TrainerCallback):
    def __init__(self):
        self.losses: list[float] = []
        self.events: list[str] = []

    def on_training_run_start(self, trainer):
        self.events.append("start")

    def on_train_step_end(self, trainer, batch_output):
        self.losses.append(batch_output["loss"].item())

    def on_training_run_end(self, trainer):
        self.events.append("end")

    def anything(self, trainer, value):
        self.events.append(value)


def state_of(trainer: Trainer) -> dict[str, Any]:
    array: Any = np.random.get_state()
    return {
        "weights": weights_of(trainer),
        "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
        "modes": [module.training for module in trainer.model.modules()],
        "generators": (random.getstate(), array[1].tolist(), torch.get_rng_state().tolist()),
        "attributes": dict(vars(trainer)),
        "history": trainer.run_history.state_dict(),
        "position": copy.deepcopy(trainer.position),
        "plugins": list(trainer.plugins.by_name),
        "version": trainer.plugins.version,
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_identical(before.pop("weights"), after.pop("weights"))
    optimizers = before.pop("optimizer"), after.pop("optimizer")
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    assert optimizers[0]["state"].keys() == optimizers[1]["state"].keys()
    for key, values in optimizers[0]["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), optimizers[1]["state"][key][name])
    attributes = before.pop("attributes"), after.pop("attributes")
    assert attributes[0].keys() == attributes[1].keys()
    assert all(attributes[1][name] is value for name, value in attributes[0].items())
    assert before == after


def used_trainer(*plugins: Any) -> Trainer:
    """A trainer with a history, with momentum and with modules in different modes."""
    model = NoisyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.train(NoisyData(), 1)
    model.layers[1].eval()
    for plugin in plugins:
        trainer.plugins.register(plugin)
    return trainer


def test_only_the_given_plugins_get_events_and_the_others_still_provide(capsys):
    losses, plain = Losses(), Losses()
    trainer = used_trainer(Forbidden(), Doubles())
    capsys.readouterr()
    with trainer.trial([losses]) as probe:
        probe.train(NoisyData(), 2)
        assert probe.scheduler is None
        assert probe.updates == 6
        assert len(probe.run_history.get_metric_values("train_loss_epoch")) == 2
        assert probe.run_history.current_epoch == 3
        probe.callback_handler.call_event("anything", probe, value="custom")
        assert list(probe.plugins.by_name) == ["Forbidden", "Doubles", "Losses"]
    assert losses.events == ["start", "end", "custom"]
    assert capsys.readouterr().out == ""
    again = used_trainer()
    with again.trial([plain]) as probe:
        probe.train(NoisyData(), 2)
    assert losses.losses[0] == pytest.approx(2 * plain.losses[0])


@pytest.mark.parametrize("alone", [False, True])
def test_everything_is_restored(alone):
    trainer = used_trainer(Forbidden())
    before = state_of(trainer)
    with trainer.trial([Losses()], data=NoisyData(), alone=alone) as probe:
        probe.train(NoisyData(), 2, eval_dataset=tiny_data(9), create_scheduler_fn=_halving)
        assert not torch.equal(*(weights["layers.0.weight"] for weights in _both(before, probe)))
        probe.control.stop("never seen by the trainer")
    assert_same_state(before, state_of(trainer))
    assert trainer.stop_reason is None


def _halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def _both(before, probe):
    return before["weights"], weights_of(probe)


def test_everything_is_restored_after_an_exception():
    class Interrupts(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.updates == 2:
                raise KeyboardInterrupt

    trainer = used_trainer()
    before = state_of(trainer)
    with pytest.raises(KeyboardInterrupt), trainer.trial([Interrupts()]) as probe:
        probe.train(NoisyData(), 2)
    assert_same_state(before, state_of(trainer))


def test_a_trial_before_the_first_run_and_within_a_run_does_not_change_training():
    class Tries(TrainerCallback):
        def on_training_run_start(self, trainer):
            self._try(trainer)

        def on_train_epoch_end(self, trainer):
            self._try(trainer)

        def _try(self, trainer):
            with trainer.trial() as probe:
                probe.train(tiny_data(16), "3 updates")
                assert probe.updates == 3
            assert trainer.in_run

    runs = [make_trainer(model=NoisyModel()), make_trainer(Tries(), model=NoisyModel())]
    with runs[1].trial() as probe:
        probe.train(tiny_data(16), 1)
    for trainer in runs:
        trainer.train(NoisyData(), 2, eval_dataset=tiny_data(9))
    assert_identical(*map(weights_of, runs))
    first, second = (trainer.run_history.state_dict()["records"] for trainer in runs)
    clock = {"seconds": 0.0}
    assert [record | clock for record in first] == [record | clock for record in second]


def test_a_trial_that_saves_a_state_does_so_for_itself(tmp_path):
    trainer = used_trainer(Forbidden())
    with trainer.trial() as probe:
        probe.train(NoisyData(), 1)
        probe.save_training_state(tmp_path / "state")
    other = used_trainer()
    other.load_training_state(tmp_path / "state")
    assert other.updates == 3
    assert trainer.position.updates == 3  # of its own run


def test_requests_of_a_trial_stop_the_trial():
    class Stops(TrainerCallback):
        def on_optimizer_step_start(self, trainer):
            if trainer.updates == 1:
                trainer.control.stop("enough", everywhere=True)

    trainer = used_trainer()
    with trainer.trial([Stops()]) as probe:
        probe.train(NoisyData(), 5)
        assert (probe.updates, probe.stop_reason) == (2, "enough")
    assert trainer.stop_reason is None


def test_a_process_can_not_train_alone_with_a_shard_of_the_model():
    trainer = make_trainer()
    trainer._engine.sharded_by = "FSDP"
    assert not trainer.has_whole_gradients
    with (
        pytest.raises(ValueError, match="can't train alone: FSDP shards the model"),
        trainer.trial(alone=True),
    ):
        pass


def test_plugins_that_add_hooks_in_a_trial_leave_the_others_quiet():
    class AddsHook(TrainerCallback):
        @hookimpl
        @hookspec
        def on_something_new(self, trainer):
            """Something new."""

        def on_training_run_start(self, trainer):
            trainer.plugins.hook.on_something_new(trainer=trainer)

    trainer = used_trainer(Forbidden())
    with trainer.trial([AddsHook()]) as probe:
        probe.train(NoisyData(), 1)
    assert "on_something_new" not in trainer.plugins.hooks
