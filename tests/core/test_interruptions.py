"""Runs that are stopped, interrupted, resumed and started anew: each says where it stands."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.callbacks import (
    LimitBatchesCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from pa_core.errors import TrainingStateError
from tests.helpers import NoisyModel, assert_identical, tiny_data, tiny_model, weights_of


def new_trainer(*callbacks, model=None) -> Trainer:
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=())


class Interrupt(TrainerCallback):
    """Presses ctrl-C after the gradients of a micro-batch."""

    def __init__(self, step):
        self.step = step

    def on_backward_end(self, trainer, step):
        if step == self.step:
            raise KeyboardInterrupt


def test_a_run_after_an_interrupted_one_begins_without_its_gradients():
    interrupt = Interrupt(0)
    trainer = new_trainer(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_data(), 1)
    interrupt.step = None
    trainer.train(tiny_data(), 1)
    fresh = new_trainer()
    fresh.train(tiny_data(), 1)
    assert_identical(weights_of(trainer), weights_of(fresh))


def test_no_state_is_saved_of_the_middle_of_an_update(tmp_path):
    trainer = new_trainer(Interrupt(4), model=NoisyModel())
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_data(), 1, per_device_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(TrainingStateError, match="in the middle of an update"):
        trainer.save_training_state(tmp_path / "state")
    assert not list(tmp_path.iterdir())
    trainer.train(tiny_data(4), 1)
    trainer.save_training_state(tmp_path / "state")


def test_a_state_saved_as_an_exception_passes_goes_on_exactly(tmp_path):
    class SaveAndFail(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 5:
                raise KeyboardInterrupt

        def on_exception(self, trainer, exception):
            trainer.save_training_state(tmp_path / "emergency")

    with pytest.raises(KeyboardInterrupt):
        new_trainer(SaveAndFail()).train(tiny_data(), 1, per_device_batch_size=4)
    resumed, whole = new_trainer(), new_trainer()
    resumed.train(tiny_data(), 1, per_device_batch_size=4, resume_from=tmp_path / "emergency")
    whole.train(tiny_data(), 1, per_device_batch_size=4)
    assert_identical(weights_of(resumed), weights_of(whole))


def test_a_run_that_stopped_within_an_epoch_ends_the_same_when_it_is_started_again(tmp_path):
    class Stop(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 27:
                trainer.control.stop("enough")

    def run():
        save = SaveTrainingStateCallback(tmp_path / "states")
        best = SaveBestModelCallback(tmp_path / "best.pt")
        trainer = new_trainer(best, Stop(), save)
        data, held_out = tiny_data(44), tiny_data(8)
        trainer.train(data, 5, eval_dataset=held_out, per_device_batch_size=4, resume_from="auto")
        return trainer, best

    (first, best), (again, best_again) = run(), run()
    assert again.stop_reason == "enough"
    assert best_again.best_metric == best.best_metric is not None
    assert_identical(weights_of(again), weights_of(first))


def test_what_an_evaluation_asks_for_is_granted_where_it_was_asked(tmp_path):
    class StopWhenGood(TrainerCallback):
        def on_eval_epoch_end(self, trainer, is_intermediate):
            if is_intermediate and trainer.updates == 4:
                trainer.control.stop("good enough")

    def run(folder, resume_from=None):
        save = SaveTrainingStateCallback(folder, save_every_n_steps=4)
        trainer = new_trainer(StepBasedEvaluationCallback(2), StopWhenGood(), save)
        trainer.train(
            tiny_data(44),
            2,
            eval_dataset=tiny_data(8),
            per_device_batch_size=4,
            resume_from=resume_from,
        )
        return trainer

    first = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a" / "update_00000004")
    assert (first.updates, resumed.updates) == (4, 4)
    assert resumed.stop_reason == "good enough"
    assert_identical(weights_of(resumed), weights_of(first))


@pytest.mark.parametrize(
    "event", ["on_backward_start", "on_backward_end", "on_optimizer_step_start"]
)
def test_an_update_is_skipped_wherever_before_it_that_is_asked(event):
    updated = []

    class Skip(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            updated.append(trainer.updates)

    callback = type("SkipIn", (Skip,), {event: lambda self, trainer: trainer.control.skip_update()})
    trainer = new_trainer(callback())
    before = weights_of(trainer)
    trainer.train(tiny_data(), 1)
    assert_identical(weights_of(trainer), before)
    assert trainer.updates == 0
    assert trainer.position.skipped > 0
    assert not updated


def test_a_record_in_the_middle_of_an_epoch_says_where_it_was_made():
    class Record(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            trainer.run_history.update_metric("updates", trainer.updates)

    trainer = new_trainer(Record())
    trainer.train(tiny_data(16), 2, per_device_batch_size=4)
    records = [r for r in trainer.run_history.records if r["metric"] == "updates"]
    assert [r["value"] for r in records] == list(range(1, 9))
    assert [r["update"] for r in records] == list(range(1, 9))
    assert [r["samples"] for r in records] == list(range(4, 36, 4))
    assert [r["epoch"] for r in records] == [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("data", "batch_size", "loader", "callbacks"),
    [
        pytest.param(DataLoader(tiny_data(20), batch_size=4), 8, {}, (), id="ready loader"),
        pytest.param(tiny_data(10), 4, {"drop_last": True}, (), id="drop_last"),
        pytest.param(tiny_data(10), 4, {}, (LimitBatchesCallback(1),), id="limit"),
        pytest.param(
            tiny_data(20),
            4,
            {"sampler": WeightedRandomSampler(torch.ones(20), 100)},
            (),
            id="sampler of another length",
        ),
    ],
)
def test_a_run_of_so_many_samples_counts_those_that_it_sees(data, batch_size, loader, callbacks):
    trainer = new_trainer(*callbacks)
    trainer.train(
        data, "20 samples", per_device_batch_size=batch_size, train_dataloader_kwargs=loader
    )
    assert trainer.position.samples == 20


def test_a_ready_loader_says_its_batch_size():
    trainer = new_trainer()
    trainer.train(DataLoader(tiny_data(20), batch_size=4), 1)
    assert trainer.run_config.train_per_device_batch_size == 4


def test_an_evaluation_within_a_run_leaves_the_run_as_it_was(tmp_path):
    class TestAndStop(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                trainer.control.stop("enough")
            trainer.evaluate(tiny_data(4), collate_fn=lambda items: items)

    class Collated(Trainer):
        def calculate_eval_batch_loss(self, batch):
            if isinstance(batch, list) and isinstance(batch[0], tuple):
                batch = torch.utils.data.default_collate(batch)
            return super().calculate_eval_batch_loss(batch)

    def run(*callbacks, epochs):
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Collated(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=())
        trainer.train(tiny_data(16), epochs, eval_dataset=tiny_data(8))
        return trainer

    tested, plain = run(TestAndStop(), epochs=5), run(epochs=2)
    assert tested.stop_reason == "enough"
    assert_identical(weights_of(tested), weights_of(plain))
    for name in ("eval_loss_epoch", "train_loss_epoch"):
        values = [trainer.run_history.get_metric_values(name) for trainer in (tested, plain)]
        assert values[0] == values[1]
    assert len(tested.run_history.get_metric_values("evaluation_loss")) == 2


def test_a_run_within_a_run_is_refused():
    class Again(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.train(tiny_data(4), 1)

    with pytest.raises(RuntimeError, match="within a run"):
        new_trainer(Again()).train(tiny_data(4), 1)


def test_what_the_first_events_of_a_run_change_does_not_change_a_resumed_one(tmp_path):
    class Begin(TrainerCallback):
        def on_training_run_start(self, trainer):
            for parameter in trainer.get_model().parameters():
                nn.init.constant_(parameter, 0.1)
            trainer.optimizer.param_groups[0]["lr"] /= 2
            trainer.run_history.update_metric("begun", 1)

    def run(folder, **options):
        save = SaveTrainingStateCallback(folder, save_every_n_steps=3, save_at_end=False)
        trainer = new_trainer(Begin(), save)
        trainer.train(tiny_data(16), 2, per_device_batch_size=4, **options)
        return trainer

    whole = run(tmp_path / "whole")
    for update in (3, 6):
        with pytest.warns(UserWarning, match="the plugin 'Begin' has changed"):
            resumed = run(tmp_path, resume_from=tmp_path / "whole" / f"update_{update:08d}")
        assert_identical(weights_of(resumed), weights_of(whole))
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
        assert resumed.run_history.get_metric_values("begun") == [1]


def test_an_iterator_that_is_used_up_is_told_rather_than_gone_over_forever():
    batches = list(DataLoader(tiny_data(8), batch_size=4))
    with pytest.raises(ValueError, match="train_loss_epoch: the data yielded no batch"):
        new_trainer().train(iter(batches), "5 updates")
    with pytest.raises(ValueError, match="eval_loss_epoch: the data yielded no batch"):
        new_trainer().train(tiny_data(8), 2, eval_dataset=iter(batches))
    with pytest.raises(ValueError, match="Nothing to predict"):
        new_trainer().predict(iter([]))


def test_each_epoch_of_a_loader_with_an_order_of_its_own_is_keyed():
    class Stream(torch.utils.data.IterableDataset):
        def __init__(self):
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __iter__(self):
            return iter(tiny_data(8))

    stream = Stream()
    new_trainer().train(stream, 2)
    assert stream.epochs == [1, 2]

    seen = []

    class See(TrainerCallback):
        def on_train_step_start(self, batch):
            seen.append(batch[1].tolist())

    for draws in (1, 2):
        order = torch.utils.data.RandomSampler(
            tiny_data(20), generator=torch.Generator().manual_seed(draws)
        )
        sampler = torch.utils.data.BatchSampler(order, 10, drop_last=False)
        loader = {"batch_sampler": sampler}
        new_trainer(See()).train(tiny_data(20), 2, train_dataloader_kwargs=loader)
    assert seen[:4] == seen[4:]
    assert seen[:2] != seen[2:4]


def test_what_fails_as_an_exception_passes_hides_neither_it_nor_the_other_plugins():
    told = []

    class Cause(TrainerCallback):
        def on_train_step_end(self, trainer):
            raise ZeroDivisionError("the cause")

    class Broken(TrainerCallback):
        def on_exception(self, trainer, exception):
            raise OSError("the disk is full")

    class Tells(TrainerCallback):
        def on_exception(self, trainer, exception):
            told.append(str(exception))

    with pytest.raises(ZeroDivisionError, match="the cause") as caught:
        new_trainer(Cause(), Broken(), Tells()).train(tiny_data(4), 1)
    assert told == ["the cause"]
    assert any("'Broken'" in note and "disk is full" in note for note in caught.value.__notes__)


def test_a_plugin_that_comes_or_goes_within_a_run_does_so_for_all_events_alike():
    log = []

    class Late(TrainerCallback):
        def on_train_step_start(self, trainer, step):
            log.append(("start", step))

        def on_train_step_end(self, trainer, step):
            log.append(("end", step))
            if step == 3:
                trainer.plugins.unregister("Late")

    class Inviting(TrainerCallback):
        def on_train_step_end(self, trainer, step):
            if step == 1:
                trainer.plugins.register(Late)

    new_trainer(Inviting()).train(tiny_data(24), 1, per_device_batch_size=4)
    assert log == [("start", 2), ("end", 2), ("start", 3), ("end", 3)]


def test_a_requested_evaluation_without_data_asks_no_plugin_for_models():
    class Evaluates:
        @hookimpl
        def on_train_step_end(self, trainer):
            trainer.control.evaluate()

        @hookimpl
        def register_eval_models(self, trainer):
            asked.append(trainer.updates)
            return {}

    asked = []
    trainer = new_trainer()
    trainer.plugins.register(Evaluates())
    trainer.train(tiny_data(16), 1, per_device_batch_size=4)
    assert asked == [4]  # at the end of the epoch, and not after each update
