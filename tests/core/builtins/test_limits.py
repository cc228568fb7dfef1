"""limit_batches, limit_eval_steps and step_evaluation: batches per epoch, and evaluations."""

import pytest

from pa_core import TrainerCallback
from pa_core.callbacks import (
    LimitBatchesCallback,
    LimitEvalStepsCallback,
    StepBasedEvaluationCallback,
)
from tests.builtin_trainer import Interrupts, make_trainer
from tests.helpers import tiny_data


class Counts(TrainerCallback):
    """Counts the steps of each evaluation, and keeps the update at which it runs."""

    def __init__(self):
        self.evaluations, self.places = [], []

    def on_eval_epoch_start(self, trainer, is_intermediate):
        self.evaluations.append([is_intermediate, 0])
        self.places.append(trainer.updates)

    def on_eval_step_end(self, trainer):
        self.evaluations[-1][1] += 1


def test_every_epoch_runs_only_its_first_batches():
    counts = Counts()
    trainer = make_trainer(LimitBatchesCallback(2), counts)
    trainer.train(tiny_data(44), 3, eval_dataset=tiny_data(44))
    assert trainer.updates == trainer.num_updates == 6
    assert counts.evaluations == [[False, 2]] * 3
    trainer.evaluate(tiny_data(44))
    assert counts.evaluations[-1] == [False, 2]


def test_a27_a_limit_beyond_the_data_changes_nothing():
    trainer = make_trainer(LimitBatchesCallback(100))
    trainer.train(tiny_data(44), 1, gradient_accumulation_steps=4)
    assert trainer.updates == 2  # the last, incomplete group of micro-batches made an update too


def test_a4_intermediate_evaluations_are_limited():
    counts = Counts()
    trainer = make_trainer(counts, StepBasedEvaluationCallback(3), LimitEvalStepsCallback(2))
    trainer.train(tiny_data(44), 1, eval_dataset=tiny_data(44))
    assert counts.evaluations == [[True, 2], [True, 2], [False, 6]]


def test_a4_all_evaluations_are_limited_if_requested():
    counts = Counts()
    trainer = make_trainer(
        LimitEvalStepsCallback(2, limit_intermediate_only=False),
        StepBasedEvaluationCallback(4),
        counts,
    )
    trainer.train(tiny_data(44), 1, eval_dataset=tiny_data(44))
    assert counts.evaluations == [[True, 2], [False, 2]]
    trainer.evaluate(tiny_data(44))
    assert counts.evaluations[-1] == [False, 2]


def test_the_limit_of_an_evaluation_is_removed_even_after_an_error():
    class Fails(TrainerCallback):
        def on_eval_step_end(self, trainer):
            raise RuntimeError("in the evaluation")

    trainer = make_trainer(LimitEvalStepsCallback(2, limit_intermediate_only=False), Fails)
    with pytest.raises(RuntimeError, match="in the evaluation"):
        trainer.train(tiny_data(16), 1, eval_dataset=tiny_data(44))
    assert trainer.eval_batch_limit is None


def test_the_smaller_of_two_limits_applies():
    counts = Counts()
    trainer = make_trainer(LimitBatchesCallback(1), LimitEvalStepsCallback(4, False), counts)
    trainer.train(tiny_data(44), 1, eval_dataset=tiny_data(44))
    assert counts.evaluations == [[False, 1]]
    assert trainer.eval_batch_limit == 1


def test_evaluations_run_every_so_many_updates():
    counts = Counts()
    trainer = make_trainer(StepBasedEvaluationCallback(4), counts)
    trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(8))
    # 6 updates per epoch: an evaluation at each end, and after 4, 8 and 12 updates
    assert counts.places == [4, 6, 8, 12, 12]
    assert len(trainer.run_history.get_metric_values("intermediate_eval_loss")) == 3


def test_evaluations_count_updates_under_gradient_accumulation():
    counts = Counts()
    trainer = make_trainer(StepBasedEvaluationCallback(2), counts)
    trainer.train(tiny_data(44), 2, eval_dataset=tiny_data(8), gradient_accumulation_steps=2)
    assert counts.places == [2, 3, 4, 6, 6]


@pytest.mark.parametrize(("every", "places"), [("50%", [3, 6, 6]), ("16 samples", [2, 4, 6])])
def test_evaluations_run_by_any_duration(every, places):
    counts = Counts()
    make_trainer(StepBasedEvaluationCallback(every), counts).train(
        tiny_data(44), 1, eval_dataset=tiny_data(8)
    )
    assert counts.places == places


@pytest.mark.parametrize(("steps", "places"), [(4, [4, 6]), (1, [1, 2, 3, 4, 5, 6, 6])])
def test_each_run_counts_from_its_start(steps, places):
    counts = Counts()
    trainer = make_trainer(StepBasedEvaluationCallback(steps), counts)
    for _ in range(2):
        trainer.train(tiny_data(44), 1, eval_dataset=tiny_data(8))
    assert counts.places == places * 2


def test_a24_a_resumed_run_evaluates_where_the_uninterrupted_one_does(tmp_path):
    class Saves(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 5:
                trainer.control.save(tmp_path / "state")

    arguments = {"num_epochs": 2, "eval_dataset": tiny_data(8)}
    trainer = make_trainer(StepBasedEvaluationCallback(4), Saves, Interrupts(5))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(tiny_data(44), **arguments)
    counts = Counts()
    trainer = make_trainer(StepBasedEvaluationCallback(4), Saves, counts)
    trainer.train(tiny_data(44), **arguments, resume_from=tmp_path / "state")
    assert counts.places == [6, 8, 12, 12]


def test_evaluating_without_data_is_an_error_before_training():
    trainer = make_trainer(StepBasedEvaluationCallback(4))
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.train(tiny_data(44), 1)
    assert trainer.updates == 0


def test_an_invalid_duration_is_an_error_in_the_constructor():
    with pytest.raises(ValueError, match="10 meters"):
        StepBasedEvaluationCallback("10 meters")
