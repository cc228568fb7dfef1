"""The time of a run: training, evaluation, saving and hooks, also across a resume."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from pa_core import TrainerCallback
from pa_core.durations import Every
from pa_core.tracking import Position
from tests.builtin_trainer import make_trainer
from tests.helpers import tiny_data

STEP, EVALUATION, SAVING, HOOK, END = 1, 10, 100, 1000, 10_000


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the events below advance."""
    clock = SimpleNamespace(now=50.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("pa_core.tracking.time", clock)
    return clock


class Takes(TrainerCallback):
    """Takes some time in several events, and keeps what the run's clock says in some of them."""

    changes_training = False

    def __init__(self, clock):
        self.clock, self.seen = clock, {}

    def on_train_step_end(self, trainer):
        self.clock.now += STEP

    def on_eval_step_end(self, trainer):
        self.clock.now += EVALUATION

    def on_save_training_state(self, trainer):
        self.clock.now += SAVING

    def on_training_run_epoch_end(self, trainer):
        self.clock.now += HOOK
        self.see("epoch end", trainer)

    def on_training_run_end(self, trainer):
        self.clock.now += END
        self.see("run end", trainer)

    def see(self, event, trainer):
        assert trainer.position.seconds == trainer.progress.seconds
        self.seen[event] = trainer.progress.seconds


def train(clock, *callbacks, epochs=1, **options):
    takes = Takes(clock)
    trainer = make_trainer(takes, *callbacks)
    options = {"eval_dataset": tiny_data(8), "per_device_batch_size": 4, **options}
    trainer.train(tiny_data(12), epochs, **options)
    return trainer, takes


def test_everything_that_a_run_does_is_in_its_time(clock):
    trainer, takes = train(clock, epochs=2)
    epoch = 3 * STEP + 2 * EVALUATION
    assert takes.seen == {
        "epoch end": 2 * (epoch + HOOK),
        "run end": 2 * (epoch + HOOK) + END,
    }
    assert trainer.progress.seconds == trainer.position.seconds == 2 * (epoch + HOOK) + END
    seconds = {(one["metric"], one["epoch"]): one["seconds"] for one in trainer.run_history.records}
    assert seconds["train_loss_epoch", 1] == 3 * STEP
    assert seconds["eval_loss_epoch", 1] == epoch
    assert seconds["train_loss_epoch", 2] == epoch + HOOK + 3 * STEP
    clock.now += 7  # after the run
    trainer.evaluate(tiny_data(8))
    assert trainer.progress.seconds == 2 * (epoch + HOOK) + END


def test_saving_is_in_the_time_and_a_resumed_run_continues_it(clock, tmp_path):
    whole, takes = train(clock, Saves(tmp_path), epochs=2)
    saved = 3 * STEP + 2 * EVALUATION + HOOK
    state = tmp_path / "1"
    for file in ("manifest.json", "state.json"):
        at_save = json.loads((state / file).read_text())["position"]["seconds"]
        assert at_save in (saved, saved + SAVING)  # before or after the event
    total = 2 * (saved + SAVING) + END
    assert whole.progress.seconds == takes.seen["run end"] == total
    clock.now += 777  # between the runs
    resumed, _ = train(clock, epochs=2, resume_from=state)
    assert resumed.progress.seconds == at_save + saved + END


def test_the_clock_stops_with_a_run_that_fails(clock):
    class Fails(TrainerCallback):
        def on_eval_epoch_end(self, trainer):
            raise ZeroDivisionError

    takes = Takes(clock)
    trainer = make_trainer(takes, Fails)
    with pytest.raises(ZeroDivisionError):
        trainer.train(tiny_data(12), 1, eval_dataset=tiny_data(8), per_device_batch_size=4)
    clock.now += 5
    assert trainer.progress.seconds == 3 * STEP + 2 * EVALUATION


def test_a_time_limit_includes_evaluations(clock):
    trainer, _ = train(clock, epochs="20 seconds")
    assert (trainer.updates, trainer.run_history.current_epoch) == (3, 2)
    within, _ = train(clock, EvaluatesAfter(2), epochs="20 seconds")
    assert within.updates == 2  # the limit is reached by the evaluation inside the epoch


class Saves(TrainerCallback):
    """Saves a state at the end of each epoch."""

    changes_training = False

    def __init__(self, folder):
        self.folder = folder

    def on_training_run_epoch_end(self, trainer):
        trainer.control.save(self.folder / str(trainer.position.epoch))


class EvaluatesAfter(TrainerCallback):
    def __init__(self, update):
        self.update = update

    def on_optimizer_step_end(self, trainer):
        if trainer.updates == self.update:
            trainer.control.evaluate()


def test_a_time_limit_that_is_reached_between_two_boundaries_ends_at_the_next(clock):
    class Late(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            if trainer.position.epoch == 2:
                clock.now += 1_000_000

    trainer, _ = train(clock, Late, epochs="1 hour")
    assert trainer.updates == 4  # not an epoch without a batch
    assert trainer.run_history.current_epoch == 3


def test_a_run_whose_time_is_up_has_nothing_left_to_train(clock, tmp_path):
    first, _ = train(clock, Saves(tmp_path), epochs="20 seconds")
    resumed, _ = train(clock, epochs="20 seconds", resume_from=tmp_path / "1")
    assert resumed.updates == first.updates == 3


def test_a_duration_in_minutes_counts_evaluations_and_hooks(clock):
    class Logs(TrainerCallback):
        def __init__(self):
            self.every, self.due = Every("15 minutes"), []

        def on_train_step_end(self, trainer):
            if self.every.due(trainer.progress):
                self.due.append(trainer.updates)

    logs = Logs()
    train(clock, logs, epochs=3)  # an epoch takes about 1000 seconds outside training
    assert logs.due == [4, 7]


def test_a_copy_of_the_position_has_no_running_clock(clock):
    position = Position(seconds=3.0)
    position.start_clock()
    clock.now += 4
    assert vars(position).keys() == asdict(position).keys()  # nothing but the fields
    copied = copy.deepcopy(position)
    clock.now += 1
    assert (position.seconds, copied.seconds, copy.copy(position).seconds) == (8, 7, 8)
    position.seconds = 1.0
    clock.now += 2
    position.stop_clock()
    clock.now += 9
    assert position.seconds == 3
    assert position == Position(seconds=3.0)
