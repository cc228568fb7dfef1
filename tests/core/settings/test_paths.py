"""Addresses with a scheme are refused wherever a path on this machine is needed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from pydantic import BaseModel

from pa_core import TrainerCallback, hookimpl
from pa_core.callbacks import PreemptionCallback, SaveBestModelCallback, SaveTrainingStateCallback
from pa_core.checkpoint.storage import state_folders, verify
from pa_core.errors import AddressError, PaCoreError, SettingsError
from pa_core.plugin import local_path, save_file
from pa_core.settings.build import build_from_table
from pa_core.settings.paths import is_address
from pa_core.settings.table import find_settings_file, read_settings
from pa_core.testing import tiny_data, tiny_trainer
from pa_lab.profile import ProfileCallback
from pa_report import ReportPlugin
from pa_report.plots import plot_history
from pa_schedulers.wsd_checkpoint import WSDCheckpointCallback
from pa_tracking import TrackingPlugin

ADDRESSES = ["s3://bucket/run", "gs://bucket", "hf://me/model", "file:///tmp/x", "az+v2://c/b"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(address: str) -> None:
    assert is_address(address)
    assert is_address(Path(address))
    with pytest.raises(AddressError, match="is an address, not a path on this machine"):
        local_path(address)


@pytest.mark.parametrize(
    "path", ["states", "/a/b", "C:/states", "c:\\states", "run:1/states", "./s3://x", "a/b:/c", ""]
)
def test_paths_are_paths(path: str) -> None:
    assert local_path(path) == Path(path)


class _Saves(TrainerCallback):
    def on_train_step_end(self, trainer):
        trainer.control.save("s3://bucket/state")


def _train(*plugins, **arguments):
    tiny_trainer(*plugins).train(tiny_data(8), 1, **arguments)


PLACES = {
    "checkpoint": SaveTrainingStateCallback,
    "preemption": lambda a: PreemptionCallback(save_dir=a),
    "save_best_model": SaveBestModelCallback,
    "wsd_checkpoint": lambda a: WSDCheckpointCallback(save_dir=a),
    "profile": lambda a: ProfileCallback(trace=a),
    "tracking": lambda a: TrackingPlugin(logging_dir=a),
    "report": lambda a: ReportPlugin(folder=a),
    "plot_history": plot_history,
    "settings": lambda a: read_settings(Path(a)),
    "resume_from": lambda a: _train(resume_from=a),
    "control.save": lambda a: _train(_Saves()),
    "save_training_state": lambda a: tiny_trainer().save_training_state(a),
    "load_training_state": lambda a: tiny_trainer().load_training_state(a),
    "save_checkpoint": lambda a: tiny_trainer().save_checkpoint(a),
    "load_checkpoint": lambda a: tiny_trainer().load_checkpoint(a),
    "save_file": lambda a: save_file(a, lambda path: path.touch()),
    "state_folders": state_folders,
    "verify": verify,
}


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("place", PLACES)
def test_addresses_are_refused(place, kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")
    with pytest.raises((PaCoreError, ValueError), match="'s3:/.* is an address"):
        PLACES[place](kind("s3://bucket/run"))
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_settings_is_no_address(monkeypatch) -> None:
    monkeypatch.setenv("PA_CORE_CONFIG", "s3://bucket/settings.toml")
    with pytest.raises(SettingsError, match="'s3://bucket/settings.toml' is an address"):
        find_settings_file()


class _Own:
    """Another project's plugin, with a plain path."""

    class Settings(BaseModel):
        class Inner(BaseModel):
            file: Path | None = None

        folder: Path = Path("x")
        inner: Inner = Inner()
        url: str = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @hookimpl
    def on_init_end(self) -> None: ...


def test_paths_in_any_plugins_settings_are_checked() -> None:
    table = {"folder": "s3://b/f", "inner": {"file": "gs://b/f"}, "url": "s3://b/f"}
    with pytest.raises(PaCoreError) as caught:
        build_from_table(_Own, table)
    folder, file = caught.value.problems
    assert folder.startswith("folder: 's3://b/f' is an address")
    assert file.startswith("inner.file: 'gs://b/f' is an address")
    built = build_from_table(_Own, {"folder": "states", "url": "s3://b/f"})
    assert built.settings.folder == Path("states")


def test_the_table_of_a_builtin_plugin_is_checked() -> None:
    with pytest.raises(PaCoreError, match=r"save_dir: 's3://b' is an address"):
        build_from_table(SaveTrainingStateCallback, {"save_dir": "s3://b"})


def test_a_password_in_an_address_is_not_shown() -> None:
    with pytest.raises(PaCoreError, match=r"\*{10}@host") as caught:
        build_from_table(SaveTrainingStateCallback, {"save_dir": "sftp://me:hush@host/x"})
    assert "hush" not in str(caught.value)
