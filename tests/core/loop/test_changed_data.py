"""Data that plugins change between epochs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from pa_core import Trainer, TrainerCallback
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.errors import TrainingStateError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

DATA = tiny_data(64)


def part(samples):
    return Subset(DATA, range(samples))


def make(*plugins):
    model = tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=plugins,
        plugins=(),
    )


class Seen(TrainerCallback):
    """Counts the samples of each epoch and evaluation."""

    def __init__(self):
        self.train, self.evaluated, self.fractions, self.lengths = {}, [], [], []

    def on_train_epoch_start(self, trainer):
        self.train[trainer.run_history.current_epoch] = 0

    def on_train_step_end(self, trainer, batch):
        self.train[trainer.run_history.current_epoch] += len(batch[0])

    def on_train_epoch_end(self, trainer):
        self.fractions.append(trainer.progress.fraction)
        self.lengths.append((trainer.num_updates, trainer.run_config.num_update_steps_per_epoch))

    def on_eval_epoch_start(self, trainer):
        self.evaluated.append(0)

    def on_eval_step_end(self, trainer, batch):
        self.evaluated[-1] += len(batch[0])


class Grows(TrainerCallback):
    """Trains on 8 samples more in each epoch."""

    def __init__(self, event="on_train_epoch_start", ahead=0):
        def assign(trainer, **arguments):
            trainer.train_dataset = part(8 * (trainer.run_history.current_epoch + ahead))

        setattr(self, event, assign)


@pytest.mark.parametrize(
    ("event", "ahead"),
    [
        ("on_train_epoch_start", 0),
        ("on_training_run_epoch_end", 1),
        ("on_train_step_end", 1),
        ("on_train_epoch_end", 1),
    ],
)
def test_an_assigned_dataset_is_used_from_that_epoch_or_the_next(event, ahead):
    seen = Seen()
    trainer = make(Grows(event, ahead), seen)
    trainer.train(part(8), 4, per_device_batch_size=4)
    assert seen.train == {1: 8, 2: 16, 3: 24, 4: 32}
    assert trainer.updates == 2 + 4 + 6 + 8
    # The rest of the run is counted with the data of the epoch.
    assert seen.lengths == [(8, 2), (2 + 3 * 4, 4), (2 + 4 + 2 * 6, 6), (20, 8)]
    assert seen.fractions == [2 / 8, 6 / 14, 12 / 18, 1]


def test_a_dataset_assigned_as_the_run_starts_is_used_at_once():
    class Replaces(TrainerCallback):
        def on_training_run_start(self, trainer):
            trainer.train_dataset = part(24)

    seen = Seen()
    trainer = make(Replaces(), seen)
    trainer.train(part(8), 2, per_device_batch_size=4)
    assert seen.train == {1: 24, 2: 24}
    assert seen.lengths[0] == (12, 6)
    assert trainer.updates == 12


@pytest.mark.parametrize(
    ("length", "updates"),
    [("10 updates", 10), ("60 samples", 2 + 4 + 9), ("2.5 epochs", 2 + 4 + 3)],
)
def test_lengths_in_any_unit_follow_the_data(length, updates):
    trainer = make(Grows())
    trainer.train(part(8), length, per_device_batch_size=4)
    assert trainer.updates == updates


def test_the_numbers_are_those_of_runs_over_each_dataset():
    trainer = make(Grows())
    trainer.train(part(8), 3, per_device_batch_size=4, gradient_accumulation_steps=3)
    again = make()
    for epoch in (1, 2, 3):
        again.train(
            part(8 * epoch),
            1,
            per_device_batch_size=4,
            gradient_accumulation_steps=3,
            reset_run_history=False,
        )
    assert_identical(weights_of(trainer), weights_of(again))
    name = "train_loss_epoch"
    assert trainer.run_history.get_metric_values(name) == again.run_history.get_metric_values(name)


class Growing(Dataset):
    """Grows in place."""

    def __init__(self):
        self.samples = 8

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        return DATA[index]


@pytest.mark.parametrize("asks", [True, False])
def test_data_that_grow_in_place_are_loaded_again_and_reported_unless_that_was_requested(asks):
    class Grow(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.train_dataset.samples += 8
            trainer.eval_dataset.samples += 4
            if asks:
                trainer.control.reload_data()

    seen = Seen()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(Grow(), seen).train(Growing(), 3, eval_dataset=Growing(), per_device_batch_size=4)
    assert seen.train == {1: 8, 2: 16, 3: 24}
    assert seen.evaluated == [12, 16, 20]
    texts = [str(warning.message) for warning in caught]
    assert any("length of the train data has changed" in text for text in texts) == (not asks)
    assert any("length of the eval data has changed" in text for text in texts)


class Shrinks(TrainerCallback):
    """Leaves the first sample of the data, in the middle of an epoch or of an evaluation."""

    def __init__(self, which):
        def shrink(trainer):
            getattr(trainer, f"{which}_dataset").samples = 1

        setattr(self, f"on_{which}_step_start", shrink)


class Short(Growing):
    """Has as many samples as it says."""

    def __init__(self, samples):
        self.samples = samples

    def __getitem__(self, index):
        if index >= self.samples:
            raise IndexError("list index out of range")
        return DATA[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_shrink_in_place_are_cut_in_the_next_epoch_with_a_report(workers):
    class Cut(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 1:
                trainer.train_dataset.samples, trainer.eval_dataset.samples = 8, 5

    seen = Seen()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(Cut(), seen)
        trainer.train(
            Short(24),
            3,
            eval_dataset=Short(10),
            per_device_batch_size=4,
            train_dataloader_kwargs={"num_workers": workers},
        )
    assert seen.train == {1: 24, 2: 8, 3: 8}
    assert seen.evaluated == [10, 5, 5]
    assert seen.lengths == [(18, 6), (10, 2), (10, 2)]
    texts = [str(warning.message) for warning in caught]
    assert (
        sum("the train data has changed since they were loaded (24 → 8)" in t for t in texts) == 1
    )
    assert sum("the eval data has changed since they were loaded (10 → 5)" in t for t in texts) == 1
    assert trainer.manifest["run"]["dataset_length"] == 8


@pytest.mark.parametrize("which", ["train", "eval"])
def test_an_error_of_data_that_shrink_within_an_epoch_says_so(which):
    with pytest.raises(IndexError) as raised:
        make(Shrinks(which)).train(Short(24), 1, eval_dataset=Short(24), per_device_batch_size=4)
    assert f"The {which} data have changed their length (24 → 1)" in raised.value.__notes__[-1]


def test_resuming_with_data_as_they_were_before_they_shrank_is_reported(tmp_path):
    class Cut(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            trainer.train_dataset.samples = 8

    def run(samples, **options):
        saver = SaveTrainingStateCallback(tmp_path, 1, save_at_end=False)
        make(Cut(), saver).train(Short(samples), 3, per_device_batch_size=4, **options)

    with pytest.warns(UserWarning, match="24 → 8"):
        run(24)
    state = tmp_path / "epoch_0002"
    with pytest.raises(TrainingStateError, match="dataset_length: 8 → 24"):
        run(24, resume_from=state, strict=True)
    run(8, resume_from=state, strict=True)


def test_an_assigned_evaluation_dataset_is_used_by_the_next_evaluation():
    class Replaces(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                trainer.eval_dataset = {"a": part(4), "b": part(12)}

    seen = Seen()
    trainer = make(Replaces(), seen)
    trainer.train(part(8), 2, eval_dataset=part(16), per_device_batch_size=4)
    assert seen.evaluated == [16, 4, 12]
    assert len(trainer.run_history.get_metric_values("b_eval_loss_epoch")) == 1


def test_a_ready_loader_can_be_replaced_by_another():
    class Replaces(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            size = 2 * trainer.run_history.current_epoch
            trainer.train_dataset = DataLoader(part(8), batch_size=size)

    trainer = make(Replaces())
    trainer.train(DataLoader(part(8), batch_size=8), 2)
    assert trainer.updates == 4 + 2


def test_a_scheduler_is_told_of_the_new_length_or_the_user_is_warned():
    lengths = []

    class Follows(torch.optim.lr_scheduler.LambdaLR):
        def set_num_updates(self, number):
            lengths.append(number)

    def create(kind):
        return lambda optimizer: kind(optimizer, lambda update: 1.0)

    trainer = make(Grows())
    trainer.train(part(8), 2, per_device_batch_size=4, create_scheduler_fn=create(Follows))
    assert lengths == [6]
    with pytest.warns(UserWarning, match=r"has 6 updates instead of 4. The scheduler \(LambdaLR\)"):
        make(Grows()).train(
            part(8),
            2,
            per_device_batch_size=4,
            create_scheduler_fn=create(torch.optim.lr_scheduler.LambdaLR),
        )


@pytest.mark.parametrize("update", [1, 2, 4, 6, 9])
def test_a_run_with_changing_data_resumes_exactly_from_any_place(tmp_path, update):
    def run(folder, **options):
        checkpoint = SaveTrainingStateCallback(folder, None, 1, save_at_end=False)
        trainer = make(Grows(), checkpoint)
        trainer.train(
            part(8), 3, per_device_batch_size=4, eval_dataset=part(8), strict=True, **options
        )
        return trainer

    whole = run(tmp_path / "whole")
    state = tmp_path / "whole" / f"update_{update:08d}"
    resumed = run(tmp_path / "resumed", resume_from=state)
    assert_identical(weights_of(resumed), weights_of(whole))
    assert resumed.updates == whole.updates == 12
    name = "train_loss_epoch"
    assert resumed.run_history.get_metric_values(name) == whole.run_history.get_metric_values(name)
    assert resumed.progress.fraction == 1


def test_resuming_in_an_epoch_without_its_data_is_refused(tmp_path):
    def run(*plugins, **options):
        checkpoint = SaveTrainingStateCallback(tmp_path, None, 1, save_at_end=False)
        trainer = make(*plugins, checkpoint)
        trainer.train(part(8), 3, per_device_batch_size=4, **options)

    run(Grows())
    with pytest.raises(TrainingStateError, match="dataset_length: 16 → 8.*assign it again"):
        run(resume_from=tmp_path / "update_00000004")


class Later(Subset):
    """The data of the later epochs, as many as of the first ones."""

    def __init__(self):
        super().__init__(DATA, range(32, 40))


class Replaces(TrainerCallback):
    """Replaces the data once."""

    def __init__(self, event, epoch):
        def assign(trainer):
            if trainer.run_history.current_epoch == epoch:
                trainer.train_dataset = Later()

        def assign_once(trainer, step):
            if step == 0:
                assign(trainer)

        setattr(self, event, assign_once if "step" in event else assign)


class Chooses(Replaces):
    """Does so again when its state is restored."""

    def on_training_run_start(self, trainer):
        self.trainer = trainer

    def state_dict(self):
        return {"is_later": isinstance(self.trainer.train_dataset, Later)}

    def load_state_dict(self, state):
        if state["is_later"]:
            self.trainer.train_dataset = Later()


@pytest.mark.parametrize(
    ("event", "epoch", "states"),
    [
        ("on_training_run_epoch_end", 1, ("epoch_0001", "epoch_0002")),
        ("on_train_epoch_end", 1, ("epoch_0001",)),
        ("on_train_step_start", 1, ("update_00000001", "epoch_0001")),  # for the next epoch
        ("on_train_epoch_start", 2, ("epoch_0002",)),
    ],
)
def test_data_that_a_plugin_does_not_choose_again_are_reported(tmp_path, event, epoch, states):
    def run(kind, every=None, **options):
        saver = SaveTrainingStateCallback(tmp_path / kind.__name__, every, every, False)
        trainer = make(kind(event, epoch), saver)
        trainer.train(part(8), 3, per_device_batch_size=4, **options)
        return weights_of(trainer)

    for kind in (Replaces, Chooses):
        whole = run(kind, every=1)
        for name in states:
            state = tmp_path / kind.__name__ / name
            if kind is Replaces:
                with pytest.raises(TrainingStateError, match=r"dataset\.type.*must do so again"):
                    run(kind, resume_from=state, strict=True)
                with pytest.warns(UserWarning, match=r"dataset\.type.*had changed the data for"):
                    run(kind, resume_from=state)
            elif name.startswith("epoch"):  # within an epoch, `load_state_dict` applies at once
                assert_identical(run(kind, resume_from=state, strict=True), whole)


def test_data_that_grow_in_place_again_in_a_resumed_epoch_resume_exactly(tmp_path):
    class Grow(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            trainer.train_dataset.samples = 8 * trainer.run_history.current_epoch

    def run(**options):
        trainer = make(Grow(), SaveTrainingStateCallback(tmp_path, 1, 1, save_at_end=False))
        with pytest.warns(UserWarning, match="length of the train data has changed"):
            trainer.train(Growing(), 3, per_device_batch_size=4, **options)
        return weights_of(trainer)

    whole = run()
    for state in ("update_00000001", "epoch_0001", "update_00000004", "epoch_0002"):
        assert_identical(run(resume_from=tmp_path / state, strict=True), whole)


def test_an_evaluation_outside_a_run_leaves_the_runs_data_alone():
    class Evaluates(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.evaluate(part(4))

    seen = Seen()
    make(Evaluates(), seen).train(part(8), 2, eval_dataset=part(16), per_device_batch_size=4)
    assert seen.evaluated == [4, 16, 4, 16]
