"""Plugins that watch a metric get each value once, whenever it is recorded."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from pa_core import StopTrainingError, TrainerCallback
from pa_core.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    StepBasedEvaluationCallback,
)
from tests.builtin_trainer import Records, make_trainer
from tests.core.test_tracking import MinimalHistory
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

DATA = tiny_data(24)  # six updates per epoch


def train(trainer, epochs=2, **arguments):
    given = {"train_dataset": DATA, "num_epochs": epochs, "per_device_batch_size": 4}
    trainer.train(**(given | arguments))
    return trainer


def loss_of(weights) -> float:
    """The loss of the whole of the data, calculated by hand."""
    model = tiny_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(DATA.tensors[0]), DATA.tensors[1]).item()


class Told(TrainerCallback):
    """Notes the values it gets, with the number of updates at that time; a plugin with state."""

    def __init__(self, *metrics, weights=False):
        self.watched_metrics = metrics
        self.told, self.weights = [], [] if weights else None

    def on_watched_metric(self, trainer, metric, value):
        self.told.append((metric, value, trainer.updates))
        if self.weights is not None:
            self.weights.append(weights_of(trainer))

    def state_dict(self):
        return {"told": [list(one) for one in self.told]}

    def load_state_dict(self, state):
        self.told = [tuple(one) for one in state["told"]]


class RecordsIn(TrainerCallback):
    """Records the number of its calls, in one event."""

    def __init__(self, event, metric="score"):
        self.calls = 0

        def record(trainer):
            self.calls += 1
            trainer.run_history.update_metric(metric, float(self.calls))

        setattr(self, event, record)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


# -- When plugins are called ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "updates"),
    [
        ("on_training_run_start", [0]),
        ("on_train_epoch_start", [1, 7]),
        ("on_optimizer_step_end", list(range(1, 13))),
        ("on_train_step_end", list(range(1, 13))),
        ("on_train_epoch_end", [6, 12]),
        ("on_eval_epoch_end", [3, 6, 6, 9, 12, 12]),
        ("on_training_run_epoch_end", [6, 12]),
    ],
)
def test_a_value_of_any_event_is_told_once_before_the_next_update(event, updates):
    told = Told("score")
    trainer = make_trainer(told, RecordsIn(event), StepBasedEvaluationCallback(3))
    train(trainer, eval_dataset=DATA)
    assert told.told == [("score", float(n + 1), at) for n, at in enumerate(updates)]


def test_the_weights_are_those_of_the_evaluation():
    told = Told("intermediate_eval_loss", "eval_loss_epoch", weights=True)
    train(make_trainer(told, StepBasedEvaluationCallback(4)), eval_dataset=DATA)
    assert [at for _, _, at in told.told] == [4, 6, 8, 12, 12]
    losses = [loss_of(weights) for weights in told.weights]
    assert [value for _, value, _ in told.told] == pytest.approx(losses)
    assert len({round(loss, 6) for loss in losses}) == 4


def test_several_datasets_and_models_are_watched_by_their_names():
    other = tiny_model()

    class Other:
        @staticmethod
        def register_eval_models(trainer):
            return {"other": other}

    from pa_core import hookimpl

    Other.register_eval_models = staticmethod(hookimpl(Other.register_eval_models))
    told = Told("b_intermediate_eval_loss", "other_a_intermediate_eval_loss", weights=True)
    trainer = make_trainer(told, StepBasedEvaluationCallback(4), plugins=[Other()])
    train(trainer, 1, eval_dataset={"a": tiny_data(8), "b": DATA})
    assert [name for name, _, _ in told.told] == list(told.watched_metrics)
    assert told.told[0][1] == pytest.approx(loss_of(told.weights[0]))


def test_the_rest_is_told_at_the_end_of_a_run_that_is_stopped(tmp_path):
    class Stops(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.control.stop("enough")

    told, best = Told("score"), SaveBestModelCallback(tmp_path / "best.pt", "score")
    train(make_trainer(told, best, Records([3.0]), Stops()), 4)
    assert told.told == [("score", 3.0, 6)]
    assert best.best_metric == torch.load(tmp_path / "best.pt", weights_only=True)["score"] == 3.0


def test_a_plugin_that_stops_the_run_keeps_no_value_from_the_others():
    class Raises(TrainerCallback):
        watched_metrics = "score"

        def on_watched_metric(self, metric, value):
            if metric == "score":
                raise StopTrainingError(f"{metric} is {value}")

    told = Told("score", "other")
    trainer = make_trainer(told, Raises(), Records([1.0]), Records([2.0], "other"))
    train(trainer, 4)
    assert (trainer.updates, trainer.stop_reason) == (6, "score is 1.0")
    assert [name for name, _, _ in told.told] == ["score", "other"]


def test_values_of_earlier_runs_and_of_evaluations_outside_runs_are_not_told():
    told = Told("score")
    trainer = train(make_trainer(told, Records([1.0, 2.0]), RecordsIn("on_eval_epoch_end")), 1)
    trainer.run_history.update_metric("score", 7.0)
    trainer.evaluate(DATA)
    assert len(trainer.run_history.get_metric_values("score")) == 3
    train(trainer, 1, reset_run_history=False)
    assert [value for _, value, _ in told.told] == [1.0, 2.0]


def test_an_evaluation_within_a_run_counts_only_under_its_own_names():
    class Tests(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 2:
                trainer.evaluate(tiny_data(8))

        def on_eval_epoch_end(self, trainer):
            trainer.run_history.update_metric("accuracy", float(trainer.updates + trainer.in_run))

    told = Told("accuracy", "evaluation_loss")
    trainer = train(make_trainer(told, Tests()), 1, eval_dataset=DATA)
    loss = trainer.run_history.get_latest_metric("evaluation_loss")
    assert told.told == [("evaluation_loss", loss, 2), ("accuracy", 7.0, 6)]


def test_deleted_values_and_an_emptied_history_are_noticed():
    class Keeps(TrainerCallback):
        """Keeps the last value only."""

        def on_train_epoch_end(self, trainer):
            history, epoch = trainer.run_history, trainer.position.epoch
            if epoch == 2:
                history.delete_metric("score")
            if epoch == 3:
                records = history.current_epoch
                history.reset()
                history._set_epoch(records)
            history.update_metric("score", float(epoch))

    for history in (None, MinimalHistory()):
        told = Told("score")
        epochs = 3 if history is None else 1
        train(make_trainer(told, Keeps(), run_history=history), epochs)
        assert [value for _, value, _ in told.told] == [1.0, 2.0, 3.0][:epochs]


# -- Resuming -------------------------------------------------------------------------------------


class SavesAll(TrainerCallback):
    """Saves a state at every boundary."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0

    def _save(self, trainer):
        self.count += 1
        trainer.control.save(self.folder / str(self.count))

    def on_train_step_end(self, trainer):
        self._save(trainer)

    def on_train_epoch_end(self, trainer):
        self._save(trainer)

    def on_training_run_epoch_end(self, trainer):
        self._save(trainer)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


EVENTS = ("on_train_step_end", "on_train_epoch_end", "on_eval_epoch_end")


def test_a_resume_at_any_place_loses_and_repeats_no_value(tmp_path):
    def run(folder, **arguments):
        told = Told(*EVENTS)
        recording = [RecordsIn(event, event) for event in EVENTS]
        saves = SavesAll(folder)
        trainer = make_trainer(told, *recording, saves, StepBasedEvaluationCallback(4))
        train(trainer, eval_dataset=DATA, **arguments)
        return told.told, saves.count

    whole, count = run(tmp_path / "whole")
    assert len(whole) == len(set(whole)) == 12 + 2 + 5
    for number in range(1, count + 1):
        again, _ = run(tmp_path / "again", resume_from=tmp_path / "whole" / str(number))
        assert again == whole, number


def test_a_plugin_that_is_new_in_a_resumed_run_is_told_what_follows(tmp_path):
    train(make_trainer(Records([1.0, 2.0, 3.0, 4.0])), 2)
    trainer = make_trainer(Records([1.0, 2.0]))
    train(trainer, 2)
    trainer.save_training_state(tmp_path / "state")
    told = Told("score")
    with pytest.warns(UserWarning, match="no state of the plugin 'Told'"):
        train(make_trainer(told, Records([3.0])), 3, resume_from=tmp_path / "state")
    assert told.told == [("score", 3.0, 18)]


def test_the_best_value_and_the_patience_survive_a_resume_within_an_epoch(tmp_path):
    class Saves(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 9:
                trainer.control.save(tmp_path / "state")

    def run(*more, **arguments):
        watch = {"watch_metric": "on_eval_epoch_end"}
        stops, best = (
            EarlyStoppingCallback(6, 0.0, **watch),
            SaveBestModelCallback(tmp_path / "best.pt", **watch),
        )
        counts = RecordsIn("on_eval_epoch_end", "on_eval_epoch_end")
        trainer = make_trainer(stops, best, counts, StepBasedEvaluationCallback(4), *more)
        train(trainer, 5, eval_dataset=DATA, **arguments)
        assert (best.best_metric, best.best_metric_epoch) == (1.0, 1)
        return trainer.updates, stops.early_stopping_patience_counter, weights_of(trainer)

    # Evaluations after 4, 6, 8, 12, 12, 16 and 18 updates, the first with the best value.
    updates, waited, weights = run(Saves())
    assert (updates, waited) == (18, 6)
    again = run(resume_from=tmp_path / "state")
    assert again[:2] == (18, 6)
    assert_identical(again[2], weights)


# -- Decisions within an epoch --------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        while True:
            yield from DATA


def test_the_best_model_within_an_epoch_has_the_value_that_its_file_claims(tmp_path):
    def rates(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 if n < 5 else 300.0)

    name = "intermediate_eval_loss"
    best = SaveBestModelCallback(tmp_path / "best.pt", name)
    trainer = make_trainer(best, StepBasedEvaluationCallback(2))
    train(trainer, 1, eval_dataset=DATA, create_scheduler_fn=rates)
    values = trainer.run_history.get_metric_values(name)
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert saved[name] == min(values) < values[-1]
    assert loss_of(saved["model_state_dict"]) == pytest.approx(min(values))
    assert_identical(weights_of(trainer), saved["model_state_dict"])


def test_early_stopping_acts_within_the_epoch_of_a_stream():
    name = "intermediate_eval_loss"
    stops = EarlyStoppingCallback(2, watch_metric=name)
    trainer = make_trainer(stops, StepBasedEvaluationCallback(5))
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    train(trainer, "100 updates", train_dataset=Stream(), eval_dataset=DATA)
    assert trainer.updates == 15
    assert "intermediate_eval_loss has not improved" in trainer.stop_reason


def test_a_value_that_is_logged_within_an_epoch_is_watched():
    class Logs(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                trainer.control.log()

    told = Told("train_loss")
    trainer = train(make_trainer(told, Logs()), 1)
    assert told.told == [("train_loss", trainer.run_history.get_latest_metric("train_loss"), 3)]


@pytest.mark.parametrize(
    ("values", "patience", "updates"),
    [
        ([3.0, None, 2.0, None, 1.0, None], 1, 36),  # each value is better
        ([None, 3.0, None, 2.0, None, 1.0], 1, 36),
        ([1.0, None, None, 2.0, None, None], 1, 24),  # not counted where there is none
        ([1.0, None, math.nan, None, 2.0, None], 2, 30),
    ],
)
def test_epochs_without_a_value_decide_nothing(tmp_path, values, patience, updates):
    class Sometimes(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            value = values[trainer.position.epoch - 1]
            if value is not None:
                trainer.run_history.update_metric("score", value)

    stops = EarlyStoppingCallback(patience, 0.0, watch_metric="score")
    best = SaveBestModelCallback(tmp_path / "best.pt", "score")
    trainer = make_trainer(stops, best, Sometimes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no value in the first epoch
        train(trainer, 6)
    assert trainer.updates == updates
    finite = [one for one in values[: updates // 6] if one is not None and math.isfinite(one)]
    assert (best.best_metric, best.best_metric_epoch) == (
        min(finite),
        values.index(min(finite)) + 1,
    )


# -- Mistakes -------------------------------------------------------------------------------------


def test_a_metric_that_never_appears_is_reported_with_those_that_did():
    stops = EarlyStoppingCallback(watch_metric="acuracy")
    found = r"early_stopping watches 'acuracy', .* no value .*Did you mean 'accuracy'.* train_loss_"
    with pytest.raises(ValueError, match=found):
        train(make_trainer(stops, Records([1.0], "accuracy")), 1)
    epochs = []

    class Notes(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            epochs.append(trainer.position.epoch)
            if epochs[-1] == 2:
                raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=found), pytest.raises(KeyboardInterrupt):
        train(make_trainer(stops, Records([1.0], "accuracy"), Notes()), 3)
    assert epochs == [1, 2]
    with pytest.warns(UserWarning, match=found) as warned:
        train(make_trainer(stops, Records([1.0] * 3, "accuracy")), 3)
    assert len(warned) == 2  # after the first epoch, and at the end


def test_a_metric_of_an_evaluation_within_an_epoch_is_missed_at_the_first_one():
    best = SaveBestModelCallback("best.pt", "intermediate_eval_los")

    class Notes(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.updates == 3:
                raise KeyboardInterrupt

    trainer = make_trainer(best, StepBasedEvaluationCallback(2), Notes())
    with (
        pytest.warns(UserWarning, match="'intermediate_eval_los'.* Did you mean 'intermediate_eva"),
        pytest.raises(KeyboardInterrupt),
    ):
        train(trainer, "20 updates", train_dataset=Stream(), eval_dataset=DATA)


@pytest.mark.parametrize("name", ["eval_loss_epoch", "intermediate_eval_loss"])
def test_a_metric_of_evaluations_needs_an_evaluation_set(name):
    with pytest.raises(ValueError, match=f"early_stopping watches {name}, .* an eval_dataset"):
        train(make_trainer(EarlyStoppingCallback(watch_metric=name)))


def test_a_value_that_is_not_a_number_raises_with_the_metric():
    class ListRecords(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("score", [1, 2])

    best = SaveBestModelCallback("best.pt", "score")
    with pytest.raises(ValueError, match=r"watches 'score', whose value is not a number: \[1, 2\]"):
        train(make_trainer(best, ListRecords()), 1)


def test_nobody_watches_in_a_trial():
    told = Told("train_loss_epoch")
    trainer = make_trainer(told)
    with trainer.trial() as probe:
        train(probe, 1)
    assert told.told == []
