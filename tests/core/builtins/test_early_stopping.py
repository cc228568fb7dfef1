import math

import pytest

from pa_core import TrainerCallback
from pa_core.callbacks import EarlyStoppingCallback
from tests.builtin_trainer import Interrupts, Records, make_trainer
from tests.helpers import tiny_data


def epochs_of(scores, **kwargs):
    """The number of epochs that a run with these scores has."""
    kwargs = {"watch_metric": "score", "early_stopping_threshold": 0.0, **kwargs}
    trainer = make_trainer(EarlyStoppingCallback(**kwargs), Records(scores))
    trainer.train(tiny_data(16), len(scores))
    return len(trainer.run_history.get_metric_values("score"))


@pytest.mark.parametrize(
    ("scores", "patience", "epochs"),
    [
        ([3, 2, 1, 0], 1, 4),
        ([3, 2, 2, 0], 1, 3),
        ([3, 4, 5, 0, 0], 2, 3),
        ([3, 4, 2, 5, 6, 0], 2, 5),
    ],
)
def test_the_run_stops_after_patience_epochs_without_improvement(scores, patience, epochs):
    assert epochs_of(scores, early_stopping_patience=patience) == epochs


def test_greater_is_better_is_respected():
    assert epochs_of([1, 2, 3, 2, 9], greater_is_better=True) == 4


def test_a_change_within_the_threshold_is_not_an_improvement():
    assert epochs_of([1.0, 0.95, 0.5, 0.1], early_stopping_threshold=0.1) == 2
    assert epochs_of([1.0, 0.85, 0.5, 0.1], early_stopping_threshold=0.1) == 4
    assert epochs_of([1.0, 0.5, 0.0], early_stopping_threshold=0.5) == 2


def test_small_improvements_add_up_until_they_exceed_the_threshold():
    scores = [1.0, 0.94, 0.88, 0.82]
    assert epochs_of(scores, early_stopping_threshold=0.1, early_stopping_patience=2) == 4


def test_nan_is_never_an_improvement_nor_the_best_value():
    assert epochs_of([math.nan, 1.0, 0.5, 0.2], early_stopping_patience=2) == 4
    assert epochs_of([1.0, math.nan, math.nan, 0.5], early_stopping_patience=2) == 3


def test_the_loop_stops_the_run_and_calls_its_end_events():
    events = []

    class Notes(TrainerCallback):
        def on_stop_training_error(self, trainer, error):
            events.append("stopped")

        def on_training_run_end(self, trainer):
            events.append("end")

    stopping = EarlyStoppingCallback(watch_metric="score")
    trainer = make_trainer(stopping, Notes, Records([1, 2, 3]))
    trainer.train(tiny_data(16), 3)
    assert events == ["stopped", "end"]
    assert "score has not improved on 1.0 for 1 of 1 values" in trainer.stop_reason
    assert stopping.early_stopping_patience_counter == 1


def test_other_callbacks_finish_the_epoch_in_which_the_run_stops():
    seen = []

    class Notes(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            seen.append(trainer.run_history.current_epoch)

    make_trainer(EarlyStoppingCallback(watch_metric="score"), Notes, Records([1, 2, 3])).train(
        tiny_data(16), 3
    )
    assert seen == [1, 2]


@pytest.mark.parametrize(("reset", "epochs"), [(True, 2), (False, 1)])
def test_a_second_run_starts_without_a_best_value_unless_reset_is_off(reset, epochs):
    stopping = EarlyStoppingCallback(watch_metric="score", reset_on_train=reset)
    trainer = make_trainer(stopping, Records([1, 2, 3, 4, 5]))
    trainer.train(tiny_data(16), 3)
    trainer.train(tiny_data(16), 3)
    assert len(trainer.run_history.get_metric_values("score")) == epochs


def test_a24_a_resumed_run_keeps_best_value_and_patience(tmp_path):
    class Saves(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                trainer.control.save(tmp_path / "state")

    def run(scores, *more, **kwargs):
        stopping = EarlyStoppingCallback(2, watch_metric="score")
        trainer = make_trainer(stopping, Records(scores), Saves, *more)
        trainer.train(tiny_data(16), 6, **kwargs)
        return trainer

    with pytest.raises(KeyboardInterrupt):
        run([1.0, 2.0, 0.0], Interrupts(4))
    trainer = run([1.5, 0.0, 0.0, 0.0], resume_from=tmp_path / "state")
    assert len(trainer.run_history.get_metric_values("score")) == 3
    assert "improved on 1.0 for 2 of 2" in trainer.stop_reason


def test_a_stopped_run_that_is_resumed_stays_stopped(tmp_path):
    def run(**kwargs):
        trainer = make_trainer(EarlyStoppingCallback(watch_metric="score"), Records([1, 2, 3, 4]))
        trainer.train(tiny_data(16), 4, **kwargs)
        return trainer

    run().save_training_state(tmp_path / "state")
    trainer = run(resume_from=tmp_path / "state")
    assert trainer.updates == 4


def test_watching_the_evaluation_loss_needs_an_evaluation_set():
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(EarlyStoppingCallback()).train(tiny_data(16), 1)
