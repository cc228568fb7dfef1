"""Metric-driven schedulers: which metric, how often they step, and a missing metric."""

from functools import partial

import pytest
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pa_core import TrainerCallback
from pa_schedulers import SchedulerBase, SchedulersPlugin
from tests.plugins.schedulers.runs import data, new_trainer, seen_in


class Accuracy(TrainerCallback):
    """Records a constant accuracy in each evaluation, as metrics plugins do."""

    def on_eval_epoch_end(self, trainer, is_intermediate):
        trainer.run_history.update_metric("accuracy", 0.5)


class EvaluateWithin(TrainerCallback):
    def on_train_step_end(self, trainer):
        if trainer.updates % 5 == 0:
            trainer.control.evaluate()


def first_of_each_epoch(found: list) -> list[float]:
    assert all(found[n] == found[n - n % 10] for n in range(len(found)))
    return [found[n][0] for n in range(0, len(found), 10)]


def plateau(**options):
    return SchedulersPlugin(
        name="reduce_lr_on_plateau", patience=0, factor=0.5, watch_metric="accuracy", **options
    )


def test_it_steps_once_on_each_value_also_within_an_epoch():
    # The first value is the best; the others aren't better.
    trainer = new_trainer(Accuracy(), plugins=[plateau()])
    assert first_of_each_epoch(seen_in(trainer, 4)) == [0.01, 0.01, 0.005, 0.0025]
    # Values after 5 and 10 updates, and at the end of the epoch.
    found = seen_in(new_trainer(Accuracy(), EvaluateWithin(), plugins=[plateau()]), 2)
    rates = [0.01] * 10 + [0.0025] * 5 + [0.00125] * 5
    assert [first for first, _ in found] == rates


class Falls(TrainerCallback):
    """Records a value in each evaluation that gets better, and then doesn't."""

    def __init__(self):
        self.values = []

    def on_eval_epoch_end(self, trainer):
        value = abs(len(trainer.run_history.get_metric_values("accuracy")) - 2.0)
        self.values.append((trainer.updates, value))
        trainer.run_history.update_metric("accuracy", value)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("warmup", [0, 1])
def test_timms_scheduler_steps_within_an_epoch_as_at_its_end(warmup):
    from timm.scheduler import PlateauLRScheduler

    options = {"patience_t": 0, "decay_rate": 0.5, "warmup_t": warmup, "mode": "min"}
    build = partial(PlateauLRScheduler, **options, noise_range_t=[0, 9], noise_seed=3)
    falls = Falls()
    plugin = SchedulersPlugin(watch_metric="accuracy")
    trainer = new_trainer(falls, EvaluateWithin(), plugins=[plugin])
    found = seen_in(trainer, 3, create_scheduler_fn=build)

    target = new_trainer(plugins=()).optimizer
    scheduler, rates, values = build(target), [], falls.values
    assert [updates for updates, _ in values] == [5, 10, 10, 15, 20, 20, 25, 30, 30]
    for update in range(1, 31):
        rates.append([group["lr"] for group in target.param_groups])
        epoch = (update - 1) // 10 + 1
        if update % 5 == 0 and epoch > warmup:  # the evaluation within the epoch
            scheduler.step(epoch, values[update // 5 - 1 + epoch - 1][1])
        if update % 10 == 0:
            scheduler.step(epoch, values[3 * epoch - 1][1])
    assert found == rates
    assert len({rate for rate, _ in found}) > 4


def test_settings_choose_the_metric_and_whether_greater_is_better(tmp_path):
    class Falling(TrainerCallback):
        def on_eval_epoch_end(self, trainer, is_intermediate):
            trainer.run_history.update_metric("accuracy", 1 / trainer.position.epoch)

    text = """
        [tool.pa-core]
        plugins = ["schedulers"]
        [tool.pa-core.schedulers]
        name = "reduce_lr_on_plateau"
        watch_metric = "accuracy"
        greater_is_better = true
        patience = 0
        factor = 0.5
    """
    trainer = new_trainer(Falling(), settings=text, folder=tmp_path)
    assert first_of_each_epoch(seen_in(trainer)) == [0.01, 0.01, 0.005]
    text = text.replace("greater_is_better = true", "greater_is_better = false")
    trainer = new_trainer(Falling(), settings=text, folder=tmp_path)
    assert first_of_each_epoch(seen_in(trainer)) == [0.01, 0.01, 0.01]


def test_it_works_for_a_scheduler_built_in_code():
    create = partial(ReduceLROnPlateau, patience=0, factor=0.5)
    trainer = new_trainer(Accuracy(), plugins=[SchedulersPlugin(watch_metric="accuracy")])
    found = seen_in(trainer, create_scheduler_fn=create)
    assert first_of_each_epoch(found) == [0.01, 0.01, 0.005]
    trainer = new_trainer(Accuracy(), plugins=[SchedulersPlugin(watch_metric="accuracy")])
    found = seen_in(trainer, create_scheduler_fn="reduce_lr_on_plateau")
    assert first_of_each_epoch(found) == [0.01] * 3  # torch's default patience is 10


def test_a_metric_of_training_needs_no_evaluation():
    plugin = SchedulersPlugin(
        name="reduce_lr_on_plateau", patience=0, threshold=0.99, watch_metric="train_loss_epoch"
    )
    found = seen_in(new_trainer(plugins=[plugin]), eval_dataset=None)
    assert len(set(first_of_each_epoch(found))) == 2


def test_a_missing_metric_raises():
    plugin = SchedulersPlugin(name="reduce_lr_on_plateau")
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        seen_in(new_trainer(plugins=[plugin]), eval_dataset=None)
    with pytest.raises(ValueError, match="SchedulersPlugin watches 'accuracy', .* no value"):
        seen_in(new_trainer(plugins=[plateau()]), 1)
    with pytest.warns(UserWarning, match="SchedulersPlugin watches 'accuracy', .* no value"):
        seen_in(new_trainer(plugins=[plateau()]), 2)


def test_an_epoch_that_records_no_value_does_not_count_as_a_bad_one():
    class Sometimes(TrainerCallback):
        def on_eval_epoch_end(self, trainer, is_intermediate):
            if trainer.position.epoch != 2:
                trainer.run_history.update_metric("accuracy", 0.5)

    found = first_of_each_epoch(seen_in(new_trainer(Sometimes(), plugins=[plateau()]), 4))
    assert found == [0.01, 0.01, 0.01, 0.005]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize(
    "options",
    [
        {"name": "reduce_lr_on_plateau", "patience": 1, "factor": 0.5, "cooldown": 1},
        {"name": "transformers/greedy", "patience": 1, "factor": 0.5, "min_lr": 1e-6},
        {"name": "timm/plateau", "patience_epochs": 1, "decay_rate": 0.5, "noise": 0.5},
    ],
)
@pytest.mark.parametrize("event", ["on_train_epoch_end", "on_eval_epoch_end"])
def test_a_resume_at_any_place_loses_and_repeats_no_value(options, event, tmp_path):
    class Records(TrainerCallback):
        """Records a value that never gets better, in the training or the evaluation part."""

        def on_train_epoch_end(self, trainer):
            if event == "on_train_epoch_end":
                trainer.run_history.update_metric("accuracy", 0.5)

        def on_eval_epoch_end(self, trainer):
            if event == "on_eval_epoch_end":
                trainer.run_history.update_metric("accuracy", 0.5)

    class Save(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 25:
                trainer.control.save(tmp_path / "25")

        def on_train_epoch_end(self, trainer):
            trainer.control.save(tmp_path / f"{trainer.updates}")

        def on_training_run_epoch_end(self, trainer):
            trainer.control.save(tmp_path / f"{trainer.updates}-evaluated")

    def new():
        plugin = SchedulersPlugin(watch_metric="accuracy", **options)
        return new_trainer(Records(), EvaluateWithin(), plugins=[plugin])

    trainer = new()
    trainer.callback_handler.add_callback(Save())
    whole = seen_in(trainer, 5)
    for place in ("10", "10-evaluated", "20", "25", "30-evaluated", "40"):
        resumed = seen_in(new(), 5, resume_from=tmp_path / place)
        assert resumed == whole[int(place.partition("-")[0]) :], place
    assert whole[45] != whole[25]


def test_a_second_run_uses_only_its_own_values():
    trainer = new_trainer(Accuracy(), plugins=[plateau()])
    seen_in(trainer, 4)
    for group, rate in zip(trainer.optimizer.param_groups, (0.01, 0.001), strict=True):
        group.update(lr=rate, initial_lr=rate)
    assert first_of_each_epoch(seen_in(trainer, 3)) == [0.01, 0.01, 0.005]
    trainer = new_trainer(Accuracy(), plugins=[plateau()])
    seen_in(trainer, 1)
    trainer.train(data(), 1, eval_dataset=data(8), reset_run_history=False)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01  # one value per run, so none is worse


class WithoutCount(SchedulerBase):
    def get_updated_values(self, num_updates):
        return [lr / (1 + num_updates) for lr in self.base_lr_values]


def test_a_scheduler_that_keeps_no_count_gets_the_number_of_updates():
    trainer = new_trainer(plugins=[SchedulersPlugin()])
    found = seen_in(trainer, "5 updates", create_scheduler_fn=WithoutCount)
    assert [first for first, _ in found] == [0.01 / (1 + n) for n in range(5)]
