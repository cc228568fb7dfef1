"""A run that was killed before its first state is the same run when it starts again."""

from __future__ import annotations

import hashlib
import os
import signal
import warnings

import pytest
import torch
from torch import nn

from pa_core import Trainer, hookimpl
from pa_core.callbacks import SaveTrainingStateCallback
from pa_report import ReportPlugin
from pa_tracking import TrackingPlugin
from tests.helpers import tiny_data, tiny_model
from tests.plugins.tracking.runs import VARYING, Fail, description, rows, scalars, table, train


class Kill(Fail):
    """Kills the process at an update."""

    @hookimpl
    def on_train_step_start(self, trainer):
        if trainer.updates == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def start(folder, *plugins, resume_from="auto", num_epochs=2, **settings):
    model = tiny_model()
    options = {"service": "jsonl", "run_name": "run", "every": 2, **settings}
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(),
        plugins=[
            SaveTrainingStateCallback(folder / "states", save_every_n_epochs=1),
            TrackingPlugin(logging_dir=folder / "runs", **options),
            ReportPlugin(folder=folder / "reports"),
            *plugins,
        ],
        accelerator={"cpu": True},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was still locked by a run that has ended")
        return train(trainer, num_epochs, resume_from=resume_from)


def start_and_kill(folder, update, **settings):
    child = os.fork()
    if child == 0:
        try:
            start(folder, Kill(update), **settings)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def without_varying(found):
    return [{k: v for k, v in row.items() if k not in VARYING} for row in found]


def content(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("service", ["jsonl", "csv"])
def test_the_rows_of_the_killed_run_are_replaced(service, tmp_path):
    read = rows if service == "jsonl" else table
    start(tmp_path / "whole", service=service)
    whole = without_varying(read(tmp_path / "whole" / "runs"))
    folder = tmp_path / "killed"
    for update in (5, 3):  # before the end of the first epoch, and of the first state
        start_and_kill(folder, update, service=service)
        assert description(folder / "runs")["status"] == "running"
        assert len(read(folder / "runs")) == update // 2
    first = description(folder / "runs")
    start(folder, service=service)
    assert without_varying(read(folder / "runs")) == whole
    assert os.listdir(folder / "runs" / "pa-core") == ["run"]
    last = description(folder / "runs")
    assert last["status"] == "finished"
    assert (last["id"], last["run_id"]) == (first["id"], first["run_id"])
    # Now it is over: the next run is another one.
    with pytest.warns(UserWarning, match="has training states of another run"):
        start(folder, service=service, resume_from=None)
    assert sorted(os.listdir(folder / "runs" / "pa-core")) == ["run", "run-2"]


def test_a_killed_run_with_a_name_from_the_clock_keeps_it(tmp_path):
    start_and_kill(tmp_path, 3, run_name=None)
    (name,) = os.listdir(tmp_path / "runs" / "pa-core")
    start(tmp_path, run_name=None)
    assert os.listdir(tmp_path / "runs" / "pa-core") == [name]


def test_a_run_that_was_not_asked_to_resume_is_another_one(tmp_path):
    start_and_kill(tmp_path, 3)
    start(tmp_path, resume_from=None)
    assert sorted(os.listdir(tmp_path / "runs" / "pa-core")) == ["run", "run-2"]


def test_tensorboard_has_one_curve_of_a_killed_run(tmp_path):
    start_and_kill(tmp_path, 5, service="tensorboard")
    start(tmp_path, service="tensorboard")
    assert os.listdir(tmp_path / "runs" / "pa-core") == ["run"]
    found = scalars(tmp_path / "runs" / "pa-core" / "run")
    updates = [update for name, update, _ in found if name == "learning_rate"]
    assert len(updates) == len(set(updates))  # in any order: two files may be of one second
    assert max(updates) == 12


def test_a_finished_run_that_starts_again_leaves_its_records_alone(tmp_path):
    start(tmp_path)
    before = content(tmp_path)
    trainer = start(tmp_path)
    assert trainer.was_finished
    assert content(tmp_path) == before
    trainer.evaluate(tiny_data(8))  # belongs to the same run
    assert os.listdir(tmp_path / "runs" / "pa-core") == ["run"]
    assert "evaluation_loss" in rows(tmp_path / "runs")[-1]


def test_a_live_run_keeps_its_file_when_another_resumes_from_its_state(tmp_path):
    def resume():
        model = tiny_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracking = TrackingPlugin(
            service="jsonl", logging_dir=tmp_path / "runs", run_name="run", every=2
        )
        other = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            callbacks=(),
            plugins=[tracking],
            accelerator={"cpu": True},
        )
        train(other, 2, resume_from=tmp_path / "states" / "epoch_0001")

    class Second(Fail):
        @hookimpl
        def on_train_step_start(self, trainer):
            if trainer.updates == self.update:
                trainer.wait_for_saves()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    resume()
                told.extend(str(one.message) for one in caught)

    told = []
    start(tmp_path / "plain")
    start(tmp_path, Second(8))
    assert any("'jsonl' failed" in text and "in use by another run" in text for text in told)
    expected = without_varying(rows(tmp_path / "plain" / "runs"))
    assert without_varying(rows(tmp_path / "runs")) == expected


def test_the_report_of_a_killed_run_keeps_its_name(tmp_path):
    start_and_kill(tmp_path, 3)
    (note,) = (tmp_path / "reports").iterdir()
    name = f"{note.read_text()}.html"
    start(tmp_path)
    assert os.listdir(tmp_path / "reports") == [name]
