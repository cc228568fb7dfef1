"""Faults of pytorch-accelerated that the core must not repeat, named as in its list of faults."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from pa_core import StopTrainingError, Trainer, TrainerCallback, TrainerPlaceholderValues
from pa_core.callbacks import StepBasedEvaluationCallback
from tests.helpers import NoisyData, assert_identical, tiny_data, tiny_model, weights_of


def make(callbacks=(), model=None, trainer_class=Trainer, lr=0.1, **kwargs):
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return trainer_class(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=(), **kwargs
    )


def test_a1_a_mistyped_attribute_in_a_callback_is_an_error():
    class Mistyped(TrainerCallback):
        def on_train_step_end(self, trainer, **kwargs):
            self.metrcs.update(1)

    with pytest.raises(AttributeError, match="metrcs") as caught:
        make([Mistyped]).train(tiny_data(), 1)
    assert any(
        "Mistyped" in note and "on_train_step_end" in note for note in caught.value.__notes__
    )


def test_a2_the_model_trains_on_in_training_mode_after_an_evaluation_within_an_epoch():
    modes = []

    class Watch(TrainerCallback):
        def on_train_step_start(self, trainer):
            modes.append((trainer.model.training, trainer.model[1].training))

    class FreezesPart(Trainer):
        def train_epoch_start(self):
            super().train_epoch_start()
            self.model[1].eval()  # the user's choice survives the evaluation too

    trainer = make([StepBasedEvaluationCallback(2), Watch], trainer_class=FreezesPart)
    trainer.train(tiny_data(), 1, eval_dataset=tiny_data(8))
    assert "intermediate_eval_loss" in trainer.run_history.get_metric_names()
    assert set(modes) == {(True, False)}


def test_a2_an_evaluation_within_an_epoch_does_not_shift_training():
    def train(callbacks):
        trainer = make(callbacks, model=nn.Sequential(tiny_model(), nn.Dropout(0.5)))
        trainer.train(NoisyData(), 2, eval_dataset=NoisyData())
        return weights_of(trainer)

    assert_identical(train(()), train([StepBasedEvaluationCallback(1)]))


def test_a3_events_within_a_step_fire_outside_the_graph_of_another():
    order = []

    class Watch(TrainerCallback):
        def on_eval_epoch_start(self, trainer, is_intermediate):
            order.append(
                ("eval", [p.grad for p in trainer.model.parameters() if p.grad is not None])
            )

    make([StepBasedEvaluationCallback(1), Watch]).train(tiny_data(8), 1, eval_dataset=tiny_data(8))
    assert order
    assert all(gradients == [] for _, gradients in order)


def test_a12_a_second_run_without_reset_trains_all_its_epochs():
    trainer = make()
    trainer.train(tiny_data(), 2)
    trainer.train(tiny_data(), 3, reset_run_history=False)
    assert len(trainer.run_history.get_metric_values("train_loss_epoch")) == 5
    assert trainer.run_history.current_epoch == 6


def test_a14_the_smaller_of_epochs_and_steps_ends_the_run_and_schedules_see_it():
    for steps, expected in ((4, 4), (1000, 12)):
        trainer = make()
        trainer.train(tiny_data(44), 2, max_num_train_steps=steps)
        assert trainer.updates == trainer.num_updates == expected


def test_a14_a_run_that_ends_in_an_epoch_evaluates_still():
    trainer = make()
    trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(8), max_num_train_steps=8)
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2


def test_a18_gradients_are_clipped_once_per_update_when_they_are_whole():
    calls = []

    class Counts(Trainer):
        def clip_gradients(self):
            calls.append(self.updates)
            super().clip_gradients()

    trainer = make(trainer_class=Counts)
    trainer.train(tiny_data(44), 1, gradient_accumulation_steps=4, gradient_clip_norm=1.0)
    assert calls == [0, 1]
    assert trainer.grad_norm > 0


def test_a20_the_seed_can_be_set_and_drives_every_draw():
    def train(seed):
        trainer = make(seed=seed)
        trainer.train(NoisyData(), 1)
        return weights_of(trainer)

    torch.manual_seed(1)
    first = train(3)
    torch.manual_seed(2)
    assert_identical(first, train(3))
    other = train(4)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a20_epochs_have_different_orders():
    seen = []

    class Watch(TrainerCallback):
        def on_train_step_start(self, trainer, batch):
            seen.append(batch[1].tolist())

    make([Watch]).train(tiny_data(44), 2)
    assert seen[:6] != seen[6:]
    assert sorted(chain(*seen[:6])) == sorted(chain(*seen[6:]))


def test_a23_a_second_run_keeps_model_and_optimizer_together():
    trainer = make()
    trainer.train(tiny_data(), 1)
    before, optimizer, accelerator = weights_of(trainer), trainer.optimizer, trainer._accelerator
    trainer.train(tiny_data(), 1)
    assert trainer.optimizer is optimizer
    assert trainer._accelerator is accelerator
    assert not torch.equal(before["0.weight"], weights_of(trainer)["0.weight"])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(tiny_data(20))


def test_b10_streams_train_evaluate_and_stop_by_updates():
    trainer = make()
    trainer.train(Stream(), 2, eval_dataset=Stream())
    assert trainer.updates == 6
    trainer.train(Stream(), "4 updates")
    assert trainer.updates == 4


def test_b10_a_batch_sampler_and_a_sampler_of_the_users_work():
    data = tiny_data(20)
    trainer = make()
    trainer.train(
        data,
        1,
        train_dataloader_kwargs={
            "batch_sampler": BatchSampler(SequentialSampler(data), 5, drop_last=False)
        },
    )
    assert trainer.updates == 4
    trainer.train(data, 1, train_dataloader_kwargs={"sampler": SequentialSampler(data)})
    assert trainer.updates == 3


def test_b13_two_callbacks_of_one_class_and_copies_of_callbacks_work():
    import copy

    class Counts(TrainerCallback):
        def __init__(self):
            self.epochs = 0

        def on_train_epoch_end(self, trainer):
            self.epochs += 1

    first = Counts()
    second = copy.deepcopy(first)
    assert not hasattr(first, "nonesuch")
    make([first, second]).train(tiny_data(), 1)
    assert first.epochs == second.epochs == 1


def test_c1_the_loss_is_not_read_on_the_host_within_the_loop_beyond_the_cpu():
    """On the meta device nothing can be read at all, so a read would raise."""
    from pa_core.tracking import LossTracker

    tracker = LossTracker()
    for _ in range(3):
        tracker.update(torch.zeros((), device="meta"), 4)


def test_c3_no_worker_is_started_unless_asked_for():
    trainer = make()
    trainer.train(tiny_data(), 1)
    assert trainer.train_dataloader.num_workers == 0


def test_c4_evaluate_returns_its_metrics_and_keeps_history_and_collate_function():
    trainer = make()
    collated = []

    def collate(samples):
        collated.append(len(samples))
        return torch.utils.data.default_collate(samples)

    trainer.train(tiny_data(), 1, collate_fn=collate)
    collated.clear()
    metrics = trainer.evaluate(tiny_data(10))
    assert metrics == {"evaluation_loss": trainer.run_history.get_latest_metric("evaluation_loss")}
    assert "train_loss_epoch" in trainer.run_history.get_metric_names()
    assert collated == [8, 2]


def test_stop_training_error_ends_the_run_with_its_event():
    seen = []

    class Stops(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            raise StopTrainingError("enough")

        def on_stop_training_error(self, trainer, error):
            seen.append(str(error))

        def on_training_run_end(self, trainer):
            seen.append("end")

    trainer = make([Stops])
    trainer.train(tiny_data(), 5)
    assert seen == ["enough", "end"]
    assert trainer.stop_reason == "enough"


def test_best_model_files_with_numpy_scalars_load_again(tmp_path):
    trainer = make()
    path = tmp_path / "deep" / "model.pt"
    trainer.save_checkpoint(path, {"f1": np.float64(0.5), "per_class": np.array([1.0, 2.0])})
    content = trainer.load_checkpoint(path)
    assert content["f1"] == 0.5
    assert content["per_class"].tolist() == [1.0, 2.0]
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


def test_placeholders_have_the_runs_numbers():
    seen = {}

    def schedule(optimizer, **numbers):
        seen.update(numbers)
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    from functools import partial

    values = TrainerPlaceholderValues
    make().train(
        tiny_data(44),
        3,
        eval_dataset=tiny_data(10),
        gradient_accumulation_steps=2,
        create_scheduler_fn=partial(
            schedule,
            epochs=values.NUM_EPOCHS,
            updates=values.NUM_UPDATE_STEPS_PER_EPOCH,
            train=values.TRAIN_DATALOADER_LEN,
            evaluation=values.EVAL_DATALOADER_LEN,
            total=values.NUM_EPOCHS * values.NUM_UPDATE_STEPS_PER_EPOCH,
        ),
    )
    assert seen == {"epochs": 3, "updates": 3, "train": 6, "evaluation": 2, "total": 9}


def test_ready_loaders_train_and_replay_exactly():
    def train():
        torch.manual_seed(torch.seed() % 1000)
        trainer = make()
        loader = DataLoader(NoisyData(), batch_size=4, shuffle=True)
        trainer.train(loader, 2, eval_dataset=DataLoader(tiny_data(6), batch_size=4))
        return weights_of(trainer)

    assert_identical(train(), train())


def test_b13_a_trainer_can_be_copied_deeply():
    import copy

    trainer = make()
    trainer.train(tiny_data(), 1)
    twin = copy.deepcopy(trainer)
    assert_identical(weights_of(trainer), weights_of(twin))
    assert twin.model is not trainer.model
