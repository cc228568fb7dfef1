import math

import numpy as np
import pytest
import torch

from pa_core import TrainerCallback
from pa_core.callbacks import SaveBestModelCallback
from pa_core.checkpoint import model_file
from tests.builtin_trainer import Interrupts, Records, make_trainer
from tests.helpers import assert_identical, tiny_data, weights_of


class KeepsWeights(TrainerCallback):
    """Keeps the weights at the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_training_run_epoch_end(self, trainer):
        self.epochs.append(weights_of(trainer))


def train(tmp_path, scores, *more, epochs=None, trainer=None, run=None, **kwargs):
    kwargs = {"save_path": tmp_path / "best.pt", "watch_metric": "score", **kwargs}
    best, weights = SaveBestModelCallback(**kwargs), KeepsWeights()
    trainer = trainer or make_trainer(best, Records(scores), weights, *more)
    trainer.train(tiny_data(16), epochs or len(scores), **(run or {}))
    return trainer, best, weights.epochs


@pytest.mark.parametrize(("greater", "epoch"), [(False, 2), (True, 4)])
def test_the_best_model_is_saved_and_gone_back_to(tmp_path, greater, epoch):
    trainer, best, weights = train(tmp_path, [0.5, 0.2, 0.4, 0.9, 0.3], greater_is_better=greater)
    assert best.best_metric_epoch == epoch
    assert_identical(weights_of(trainer), weights[epoch - 1])
    with pytest.raises(AssertionError):
        assert_identical(weights[epoch - 1], weights[-1])


def test_a25_the_metric_has_its_own_name_in_every_file(tmp_path):
    for scores in ([0.5], [0.5, 0.2]):
        train(tmp_path, scores)
        content = torch.load(tmp_path / "best.pt", weights_only=True)
        assert content["score"] == scores[-1]
        assert content["epoch"] == len(scores)
        assert "loss" not in content


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.2]])
def test_a25_what_is_saved_is_what_was_asked_for_from_the_first_file_on(tmp_path, scores):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    run = {"create_scheduler_fn": schedule}
    kept = {"optimizer_state_dict", "scheduler_state_dict"}
    for switches, absent in (
        ({}, set()),
        ({"save_scheduler": False}, {"scheduler_state_dict"}),
        ({"save_optimizer": False}, {"optimizer_state_dict"}),
    ):
        train(tmp_path, scores, run=run, **switches)
        content = torch.load(tmp_path / "best.pt", weights_only=True)
        assert kept - content.keys() == absent


@pytest.mark.parametrize("content", [{"score": 0.1, "epoch": 1}, {}])
def test_a25_a_file_of_another_run_is_never_loaded(tmp_path, content):
    make_trainer().save_checkpoint(tmp_path / "best.pt", content)
    trainer, best, weights = train(tmp_path, [math.nan, math.nan])
    assert best.best_metric is None
    assert_identical(weights_of(trainer), weights[-1])


def test_a_file_that_somebody_replaced_is_not_loaded(tmp_path, capsys):
    class Replaces(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "best.pt", {"score": 0.0})

    trainer, _, weights = train(tmp_path, [0.1, 0.2], Replaces)
    assert_identical(weights_of(trainer), weights[-1])
    assert "not loaded" in capsys.readouterr().out


def test_nan_is_never_the_best(tmp_path):
    _, best, _ = train(tmp_path, [math.nan, 0.5, math.nan, 0.4], greater_is_better=True)
    assert (best.best_metric, best.best_metric_epoch) == (0.5, 2)


def test_numpy_scalars_make_files_that_load_again(tmp_path):
    trainer, best, weights = train(tmp_path, [np.float64(0.5), np.float64(0.7)])
    assert best.best_metric == 0.5
    assert_identical(weights_of(trainer), weights[0])


def test_the_last_model_stays_where_loading_is_off(tmp_path):
    trainer, _, weights = train(tmp_path, [0.1, 0.2], load_saved_checkpoint=False)
    assert_identical(weights_of(trainer), weights[-1])
    assert (tmp_path / "best.pt").exists()


@pytest.mark.parametrize(("reset", "epoch"), [(True, 1), (False, 2)])
def test_a_second_run_begins_without_a_best_value_unless_told(tmp_path, reset, epoch):
    best = SaveBestModelCallback(tmp_path / "best.pt", "score", reset_on_train=reset)
    trainer = make_trainer(best, Records([0.5, 0.2, 0.3]))
    trainer.train(tiny_data(16), 2)
    trainer.train(tiny_data(16), 1)
    assert best.best_metric_epoch == epoch


def test_c6_a_metric_that_is_recorded_behind_it_at_the_same_event_counts(tmp_path):
    class RecordsLate(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            trainer.run_history.update_metric("score", -trainer.run_history.current_epoch)

    best = SaveBestModelCallback(tmp_path / "best.pt", "score")
    make_trainer(best, RecordsLate).train(tiny_data(16), 3)
    assert (best.best_metric, best.best_metric_epoch) == (-3.0, 3)


def test_a24_a_resumed_run_knows_the_best_so_far(tmp_path):
    class Saves(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                trainer.control.save(tmp_path / "state")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [0.5, 0.1, 0.3], Saves, Interrupts(5))
    saved = (tmp_path / "best.pt").read_bytes()
    trainer, best, _ = train(
        tmp_path, [0.3, 0.2], Saves, epochs=4, run={"resume_from": tmp_path / "state"}
    )
    assert (best.best_metric, best.best_metric_epoch) == (0.1, 2)
    assert (tmp_path / "best.pt").read_bytes() == saved
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert_identical(weights_of(trainer), content["model_state_dict"])


def test_watching_what_nobody_records_is_an_error(tmp_path):
    best = SaveBestModelCallback(tmp_path / "best.pt")
    with pytest.raises(ValueError, match="eval_dataset"):
        make_trainer(best).train(tiny_data(16), 1)
    best = SaveBestModelCallback(tmp_path / "best.pt", "train_los_epoch")
    with pytest.raises(ValueError, match="train_loss_epoch"):
        make_trainer(best).train(tiny_data(16), 1)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writer")])
def test_a_best_model_that_cannot_be_saved_is_a_warning(error, tmp_path, monkeypatch):
    file, real, failures = tmp_path / "best.pt", model_file.save_file, [error]

    def save_file(path, write):
        if file.exists() and failures:  # the second time
            raise failures.pop()
        real(path, write)

    monkeypatch.setattr(model_file, "save_file", save_file)
    with pytest.warns(UserWarning, match=r"epoch 2, .*score so far, 2.0.*still holds .*epoch 1"):
        _, best, _ = train(tmp_path, [3.0, 2.0, 2.5, 1.0])
    # 2.5 is better than what the file held then, and 1.0 than that.
    assert (best.best_metric, best.best_metric_epoch) == (1.0, 4)
    assert torch.load(file, weights_only=True)["epoch"] == 4


def test_a_best_model_that_must_be_saved_stops_the_run(tmp_path, monkeypatch):
    def save_file(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, [0.5], on_save_error="stop")
