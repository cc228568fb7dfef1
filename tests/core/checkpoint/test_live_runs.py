"""A run's files belong to it while it is live; a finished run keeps them as they are."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pa_core import StopTrainingError, Trainer, TrainerCallback
from pa_core.builtins.preemption import PreemptionCallback
from pa_core.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
)
from pa_core.checkpoint.storage import find_states, read_manifest
from pa_core.errors import PreemptedExit, TrainingStateError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of


def new_trainer(folder, *plugins, every=1, **options):
    model = tiny_model()
    save = SaveTrainingStateCallback(folder, save_every_n_epochs=every, **options)
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[save, *plugins],
        plugins=(),
    )


def train(trainer, epochs=2, **arguments):
    trainer.train(tiny_data(16), epochs, eval_dataset=tiny_data(8), **arguments)
    return trainer


def content(folder):
    """Every file below a folder, with its content and the time of its last change."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Calls(TrainerCallback):
    """Calls a function at the end of an update."""

    changes_training = False

    def __init__(self, action):
        self.action = action

    def on_optimizer_step_end(self, trainer):
        self.action(trainer)


# -- Two live runs ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* has training states of another run")
def test_a_second_run_in_the_folder_is_refused_before_it_writes(tmp_path):
    train(new_trainer(tmp_path), 1)
    leftover = tmp_path / ".tmp-x-000000-1-1-00000000"
    leftover.touch()
    found = []

    def second(trainer):
        if found:
            return
        before = content(tmp_path)
        for arguments in ({}, {"resume_from": "auto"}):
            with pytest.raises(TrainingStateError, match=f"in use by.*process {os.getpid()}") as e:
                train(new_trainer(tmp_path), 1, **arguments)
            found.append(str(e.value))
        assert content(tmp_path) == before
        # Reading needs no lock.
        train(new_trainer(tmp_path.with_name("other")), 1, resume_from=tmp_path / "final")

    train(new_trainer(tmp_path, Calls(second)), 2)
    assert len(found) == 2
    assert ".lock" not in os.listdir(tmp_path)
    train(new_trainer(tmp_path), 3, resume_from="auto", strict=True)


def raising(error):
    def action(trainer):
        raise error

    return action


@pytest.mark.filterwarnings("ignore:.* has training states of another run")
@pytest.mark.parametrize(
    ("action", "error"),
    [
        (raising(ValueError("wrong")), ValueError),
        (raising(KeyboardInterrupt()), KeyboardInterrupt),
        (raising(SystemExit(3)), SystemExit),
        (raising(StopTrainingError("enough")), None),
        (lambda trainer: trainer.control.stop("enough"), None),
    ],
)
def test_the_lock_is_removed_however_the_run_ends(action, error, tmp_path):
    trainer = new_trainer(tmp_path, Calls(action))
    if error is None:
        train(trainer)
    else:
        with pytest.raises(error):
            train(trainer)
    assert ".lock" not in os.listdir(tmp_path)
    # One trainer after the other, and a trainer that trains twice.
    trainer = new_trainer(tmp_path)
    train(train(trainer))
    assert ".lock" not in os.listdir(tmp_path)


def test_the_lock_is_removed_after_a_preemption(tmp_path):
    model = tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[
            PreemptionCallback(save_dir=tmp_path / "states"),
            Calls(lambda trainer: signal.raise_signal(signal.SIGTERM)),
        ],
        plugins=(),
    )
    with pytest.raises(PreemptedExit):
        train(trainer)
    assert [path.name for path in find_states(tmp_path / "states")] == ["update_00000001"]
    assert not [name for name in os.listdir(tmp_path / "states") if name[0] == "."]


def test_wrong_arguments_leave_no_folder(tmp_path):
    with pytest.raises(ValueError, match="num_epochs|duration"):
        new_trainer(tmp_path / "states").train(tiny_data(16), "soon")
    with pytest.raises(TrainingStateError, match="No training state at"):
        train(new_trainer(tmp_path / "states"), resume_from=tmp_path / "nothing")
    assert not (tmp_path / "states").exists()


def test_a_folder_that_cannot_be_locked_is_reported_and_training_goes_on(tmp_path):
    (tmp_path / "file").touch()
    trainer = new_trainer(tmp_path / "file" / "states", save_at_end=False, every=None)
    with pytest.warns(UserWarning, match="can't be locked, so a second run"):
        train(trainer, 1)
    assert trainer.updates == 2


def test_the_file_of_the_best_model_has_one_writer(tmp_path):
    best = tmp_path / "best.pt"
    tried = []

    def second(trainer):
        other = new_trainer(tmp_path / "b", SaveBestModelCallback(best))
        with pytest.raises(TrainingStateError, match=r"best\.pt is in use by another run"):
            train(other)
        assert not (tmp_path / "b").exists()
        tried.append(True)

    train(new_trainer(tmp_path / "a", Calls(second), SaveBestModelCallback(best)), 1)
    assert tried
    assert sorted(os.listdir(tmp_path)) == ["a", "best.pt"]


def test_a_trial_within_a_live_run_takes_no_lock(tmp_path):
    losses = []

    def probe(trainer):
        with trainer.trial() as probe:
            probe.train(tiny_data(8), "1 update")
            losses.append(probe.updates)

    train(new_trainer(tmp_path, Calls(probe)), 1)
    assert losses == [1, 1]


# -- A finished run -----------------------------------------------------------------------------


def test_a_finished_run_that_starts_again_leaves_its_files_alone(tmp_path, capsys):
    def start(epochs=2, **options):
        best = SaveBestModelCallback(tmp_path / "best.pt", "train_loss_epoch")
        return train(new_trainer(tmp_path / "s", best, **options), epochs, resume_from="auto")

    first = start()
    before = content(tmp_path)
    capsys.readouterr()
    for _ in range(2):
        again = start()
        assert content(tmp_path) == before
        printed = capsys.readouterr().out
        assert "Nothing is left to do: this run has already finished, after 2 epochs" in printed
        assert "give train() more epochs" in printed
        assert again.was_finished
        assert again.run_history.state_dict() == first.run_history.state_dict()
        assert_identical(weights_of(again), weights_of(first))  # the best model was loaded
    longer = start(3)
    assert not longer.was_finished
    assert longer.updates == 6
    assert read_manifest(tmp_path / "s" / "final")["position"]["updates"] == 6


def test_a_final_state_that_is_missing_is_written_by_the_next_start(tmp_path):
    for _ in range(2):
        train(new_trainer(tmp_path, save_at_end=False), resume_from="auto")
        assert not (tmp_path / "final").exists()
    train(new_trainer(tmp_path), resume_from="auto")
    assert read_manifest(tmp_path / "final")["position"]["updates"] == 4
    before = content(tmp_path)
    train(new_trainer(tmp_path), resume_from=tmp_path / "epoch_0002")
    assert content(tmp_path) == before


def test_an_early_stopped_run_continues_with_more_patience(tmp_path, capsys):
    class Worsens(TrainerCallback):
        """Records a metric that never improves after the first epoch."""

        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("score", float(trainer.run_history.current_epoch))

    def start(folder, patience, epochs=9):
        stop = [EarlyStoppingCallback(patience, watch_metric="score")] if patience else []
        trainer = new_trainer(folder, Worsens, *stop)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*early_stopping_patience: 1 → 3")
            if not patience:
                warnings.filterwarnings("ignore", message=".*early_stopping.* enabled")
            return train(trainer, epochs, resume_from="auto")

    whole = start(tmp_path / "whole", 3)
    assert whole.run_history.current_epoch == 4 + 1
    stopped = start(tmp_path / "s", 1)
    before = content(tmp_path / "s")
    capsys.readouterr()
    again = start(tmp_path / "s", 1, epochs=12)  # more epochs change nothing
    assert content(tmp_path / "s") == before
    assert again.stop_reason == stopped.stop_reason is not None
    assert "a larger early_stopping_patience" in capsys.readouterr().out
    shutil.copytree(tmp_path / "s", tmp_path / "removed")
    free = start(tmp_path / "removed", None, epochs=6)
    assert "continues, since 'early_stopping' isn't enabled any more" in capsys.readouterr().out
    assert (free.stop_reason, free.run_history.current_epoch) == (None, 6 + 1)
    assert_identical(weights_of(free), weights_of(start(tmp_path / "free", None, epochs=6)))
    continued = start(tmp_path / "s", 3)
    assert continued.stop_reason == whole.stop_reason
    assert_identical(weights_of(continued), weights_of(whole))
    assert continued.run_history.get_metric_values("score") == (
        whole.run_history.get_metric_values("score")
    )


def test_a_run_stopped_by_two_continues_only_if_both_allow_more(tmp_path):
    class Constant(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("first", 1.0)
            trainer.run_history.update_metric("second", 1.0)

    def start(*patience):
        stops = [
            EarlyStoppingCallback(number, watch_metric=metric)
            for number, metric in zip(patience, ("first", "second"), strict=True)
        ]
        trainer = new_trainer(tmp_path / "s", Constant, *stops)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*early_stopping_patience: 1 → 3")
            return train(trainer, 9, resume_from="auto").run_history.current_epoch - 1

    assert [start(1, 1), start(3, 1), start(1, 3), start(3, 3)] == [2, 2, 2, 4]


def test_removing_one_of_two_that_stopped_leaves_the_other(tmp_path):
    class Constant(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("score", 1.0)

    def start(*patience):
        stops = [EarlyStoppingCallback(number, watch_metric="score") for number in patience]
        trainer = new_trainer(tmp_path / "s", Constant, *stops)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*early_stopping")
            return train(trainer, 9, resume_from="auto").run_history.current_epoch - 1

    assert [start(1, 1), start(1), start(3)] == [2, 2, 4]


# -- The identity of a run ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* has training states of another run")
def test_a_run_that_is_killed_before_its_first_state_keeps_its_identity(tmp_path):
    seen = []

    def fail(trainer):
        seen.append(trainer.run_id)
        raise ValueError("killed")

    for arguments in ({"resume_from": "auto"}, {"resume_from": "auto"}, {}):
        with pytest.raises(ValueError, match="killed"):
            train(new_trainer(tmp_path, Calls(fail)), **arguments)
    assert seen[0] == seen[1]
    assert seen[2] not in seen[:2]  # not asked to resume, so another run
    run = train(new_trainer(tmp_path), resume_from="auto")
    assert run.run_id == seen[2]
    assert ".run.json" not in os.listdir(tmp_path)
    assert {read_manifest(path)["run_id"] for path in find_states(tmp_path)} == {seen[2]}
    assert train(new_trainer(tmp_path), 3, resume_from="auto").run_id == seen[2]
    assert train(new_trainer(tmp_path), 1).run_id not in seen


def test_a_folder_whose_states_were_removed_belongs_to_no_run(tmp_path):
    first = train(new_trainer(tmp_path, save_at_end=False, every=None), resume_from="auto")
    assert list(Path(tmp_path).iterdir()) == []
    assert train(new_trainer(tmp_path), resume_from="auto").run_id != first.run_id
