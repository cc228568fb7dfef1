"""Runs in TensorBoard, MLflow and W&B, read back from their files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pa_core import hookimpl
from pa_core.callbacks import EarlyStoppingCallback
from pa_tracking import TrackingPlugin
from tests.distributed.launch import ROOT
from tests.helpers import tiny_data
from tests.plugins.tracking.runs import (
    Fail,
    SaveAt,
    new_trainer,
    points,
    recorded,
    rows,
    scalars,
    tracked,
    train,
)

PLACE = {"epoch", "samples", "seconds", "samples_per_second", "updates_per_second", "memory_gib"}


class ShowSamples:
    """Logs images after each epoch."""

    @hookimpl
    def on_train_epoch_end(self, trainer):
        images = torch.zeros(2, 3, 4, 6)
        images[:, 0] = 1.0
        trainer.callback_handler.call_event("log_images", trainer, name="shown", images=images)


TAGS = {
    "train_loss": "train/loss",
    "train_loss_epoch": "train/loss_epoch",
    "eval_loss_epoch": "eval/loss_epoch",
    "evaluation_loss": "evaluation/loss",
}


def as_sent(trainer):
    """The history's numbers in the precision of event files, by their tags."""
    return sorted(
        (TAGS.get(name, name), update, np.float32(value))
        for name, update, value in recorded(trainer)
    )


# -- TensorBoard ----------------------------------------------------------------------------------


def on_board(folder, name="run"):
    measured = PLACE | {"gradient_norm"}
    return sorted(
        (tag, step, np.float32(value))
        for tag, step, value in scalars(folder / "pa-core" / name)
        if tag not in measured and not (tag == "learning_rate" and step % 2)
    )


def test_tensorboard_has_the_history_the_settings_and_the_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin = tracked(tmp_path, service="tensorboard", every=2, tags=["first"])
    trainer = train(new_trainer(ShowSamples(), plugin), 2)
    assert on_board(tmp_path) == as_sent(trainer)
    trainer.evaluate(tiny_data(9))  # in a second file of the same folder
    assert on_board(tmp_path) == as_sent(trainer)

    (folder,) = (tmp_path / "pa-core").iterdir()
    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    norms = found.Scalars("gradient_norm")
    assert [event.step for event in norms] == [2, 4, 6, 8, 10, 12]
    pictures = found.Images("shown")  # side by side
    assert [(event.step, event.width, event.height) for event in pictures] == [
        (6, 12, 4),
        (12, 12, 4),
    ]
    assert b"run_config.train_total_batch_size | 8 |" in _text(found, "config/text_summary")
    assert _text(found, "tags/text_summary") == b"first"
    settings = HParamsPluginData.FromString(
        found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    columns = {name: value.number_value for name, value in settings.items()}
    assert (columns["seed"], columns["lr"], columns["batch_size"]) == (42, pytest.approx(0.1), 8)
    assert settings["optimizer"].string_value == "SGD"
    assert not any("." in name for name in settings)
    layout = Layout.FromString(_text(found, "custom_scalars__config__"))
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {"loss_epoch": ["^train/loss_epoch$", "^eval/loss_epoch$"]}


def test_tensorboard_compares_runs_by_their_settings_and_final_metrics(tmp_path):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    best = EarlyStoppingCallback(early_stopping_patience=9)
    given = [{}, {"callbacks": [best], "seed": 7}]
    trainers = [
        train(new_trainer(tracked(tmp_path, service="tensorboard"), **arguments), 2)
        for arguments in given
    ]
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "pa-core"))
    runs.Reload()
    context = backend_context.Context(
        TBContext(data_provider=MultiplexerDataProvider(runs, str(tmp_path)))
    )
    request, content = RequestContext(), context.hparams_metadata(RequestContext(), "")
    columns = context.experiment_from_metadata(request, "", True, content, [])
    shown = {column.name for column in columns.hparam_infos}
    assert {"lr", "batch_size", "early_stopping.early_stopping_patience"} <= shown
    wanted = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS]
    )
    wanted.col_params.extend(
        api_pb2.ColParams(metric=column.name) for column in columns.metric_infos
    )
    table = list_session_groups.Handler(request, context, "", wanted).run()
    found = {
        group.hparams["seed"].number_value: {
            value.name.tag: value.value for value in group.metric_values
        }
        for group in table.session_groups
    }
    assert found.keys() == {42, 7}
    for trainer, seed in zip(trainers, (42, 7), strict=True):
        for name in ("train_loss_epoch", "eval_loss_epoch"):
            latest = trainer.run_history.get_latest_metric(name)
            assert found[seed][TAGS[name]] == pytest.approx(latest, rel=1e-6)


def _text(accumulator, tag):
    (event,) = accumulator.Tensors(tag)
    return event.tensor_proto.string_val[0]


@pytest.mark.parametrize("saved_at", [4, 6, 9])
def test_a_resumed_run_is_one_curve_in_tensorboard(saved_at, tmp_path):
    def plugin():
        return tracked(tmp_path, service="tensorboard", every=2)

    state = tmp_path / "state"
    with pytest.raises(RuntimeError, match="the power is off"):
        train(new_trainer(SaveAt(saved_at, state), Fail(13), ShowSamples(), plugin()))
    trainer = new_trainer(SaveAt(0, state), Fail(-1), ShowSamples(), plugin())
    train(trainer, resume_from=state)
    assert on_board(tmp_path) == as_sent(trainer)
    # Files of one second are read in the order of their names, where 10 comes before 9.
    norms = sorted(
        step for tag, step, _ in scalars(tmp_path / "pa-core" / "run") if tag == "gradient_norm"
    )
    assert norms == [2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_receipts_of_a_deleted_run_do_not_count_for_a_new_one(tmp_path, monkeypatch):
    plugin = {"service": "tensorboard", "every": 2}
    train(new_trainer(tracked(tmp_path, **plugin)), 2)
    shutil.rmtree(tmp_path / "pa-core")
    state = tmp_path / "state"
    with monkeypatch.context() as killed:
        killed.setattr(TrackingPlugin, "_close", lambda *arguments: None)
        with pytest.raises(RuntimeError, match="the power is off"):
            train(new_trainer(SaveAt(1, state), Fail(1), tracked(tmp_path, **plugin)))
    trainer = new_trainer(SaveAt(0, state), Fail(-1), tracked(tmp_path, **plugin))
    train(trainer, 1, resume_from=state)
    assert on_board(tmp_path) == as_sent(trainer)


def test_two_runs_with_the_same_name_have_two_folders_in_tensorboard(tmp_path):
    for _ in range(2):
        train(new_trainer(tracked(tmp_path, service="tensorboard")), 1)
    assert sorted(path.name for path in (tmp_path / "pa-core").iterdir()) == ["run", "run-2"]


# -- MLflow ---------------------------------------------------------------------------------------


class Mlflow:
    """A folder of MLflow's runs, read by its client."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        database = folder / "mlflow" / "mlflow.db"
        has_database = database.exists()  # mlflow-skinny has none
        uri = f"sqlite:///{database}" if has_database else (folder / "mlflow").as_uri()
        self.client = MlflowClient(uri)
        self.experiment = self.client.get_experiment_by_name("pa-core")

    @property
    def runs(self):
        return self.client.search_runs([self.experiment.experiment_id])

    def points(self, run):
        return sorted(
            (name, point.step, point.value)
            for name in run.data.metrics
            if name not in PLACE | {"gradient_norm"}
            for point in self.client.get_metric_history(run.info.run_id, name)
        )


# Its database's library deprecates what it uses.
uses_mlflow = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """MLflow without settings of this machine."""
    import mlflow as module

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    yield module
    assert not module.is_tracking_uri_set()
    assert module.active_run() is None


def read(folder, monkeypatch):
    if not (folder / "mlflow" / "mlflow.db").exists():
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return Mlflow(folder)


@uses_mlflow
@pytest.mark.usefixtures("mlflow")
def test_mlflow_has_the_history_the_settings_and_the_images(tmp_path, monkeypatch):
    plugin = tracked(tmp_path, service="mlflow", every=2, tags=["first"])
    trainer = train(new_trainer(ShowSamples(), plugin), 2)
    trainer.evaluate(tiny_data(9))
    found = read(tmp_path, monkeypatch)
    (run,) = found.runs
    assert found.points(run) == recorded(trainer)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.tags["first"] == "true"
    params = run.data.params
    assert (params["lr"], params["batch_size"], params["seed"]) == ("0.1", "8", "42")
    assert "description.json" in [
        file.path for file in found.client.list_artifacts(run.info.run_id)
    ]
    files = [file.path for file in found.client.list_artifacts(run.info.run_id, "images")]
    assert sorted(files) == [
        f"images/shown-{update:06d}-{n}.png" for update in (6, 12) for n in (0, 1)
    ]


@uses_mlflow
@pytest.mark.usefixtures("mlflow")
@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_has_the_status_of_a_failed_run_and_continues_it(
    error, status, tmp_path, monkeypatch
):
    def plugin():
        return tracked(tmp_path, service="mlflow", every=2)

    state = tmp_path / "state"
    with pytest.raises(type(error)):
        train(new_trainer(SaveAt(4, state), Fail(11, error), plugin()))
    found = read(tmp_path, monkeypatch)
    (run,) = found.runs
    assert run.info.status == status

    trainer = train(new_trainer(SaveAt(0, state), Fail(-1), plugin()), resume_from=state)
    (run,) = found.runs
    assert run.info.status == "FINISHED"
    assert found.points(run) == recorded(trainer)


@uses_mlflow
def test_mlflows_own_settings_are_restored(mlflow, tmp_path, monkeypatch):
    theirs = (tmp_path / "theirs").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train(new_trainer(tracked(tmp_path / "ours", service="mlflow", offline=True)), 1)
    assert os.environ["MLFLOW_TRACKING_URI"] == mlflow.get_tracking_uri() == theirs
    assert len(Mlflow(tmp_path / "ours").runs) == 1
    train(new_trainer(tracked(tmp_path / "ours", service="mlflow")), 1)  # the variable's
    assert len(Mlflow(tmp_path / "ours").runs) == 1
    assert (tmp_path / "theirs").is_dir()
    mlflow.set_tracking_uri(None)


@uses_mlflow
def test_an_active_run_of_the_user_is_a_warning(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path / "theirs")
    mlflow.start_run()
    try:
        with pytest.warns(UserWarning, match="'mlflow' failed.*already active"):
            trainer = train(new_trainer(tracked(tmp_path, service="mlflow")), 1)
        assert mlflow.active_run() is not None
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(None)
    assert trainer.updates == 6


# -- W&B ------------------------------------------------------------------------------------------


def wandb_records(file: Path):
    """The records of an offline run: a LevelDB log after a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, block, parts = file.read_bytes(), 7, 32768, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # no room for a header
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wandb_rows(file: Path):
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = {
                "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            yield {name: value for name, value in items.items() if not name.startswith("_")}


@pytest.mark.slow
def test_wandb_has_the_history_offline_and_that_of_a_resumed_run(tmp_path):
    script = Path(__file__).with_name("wandb_run.py")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if "WANDB" not in name}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # one run
    found = [row for file in files for row in wandb_rows(file)]
    pictures = [row["update"] for row in found if "shown/count" in row]
    assert pictures == [6, 12, 18]
    numbers = [row for row in found if "shown/count" not in row]
    assert points(numbers) == points(rows(tmp_path))
    started = next(r.run for r in wandb_records(files[0]) if r.HasField("run"))
    described = started.config.update
    config = {item.key: json.loads(item.value_json) for item in described}
    assert (config["lr"], config["batch_size"], config["description.seed"]) == (0.1, 8, 42)
    ends = [[r.exit.exit_code for r in wandb_records(file) if r.HasField("exit")] for file in files]
    assert ends == [[1], [0]]
