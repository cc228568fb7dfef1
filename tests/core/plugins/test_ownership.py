"""Settings and plugin files of another user are reported before they are used."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from pa_core import Trainer
from pa_core.plugins.discovery import file_source, load_plugin
from pa_core.settings.table import find_settings_file, read_settings
from pa_core.testing import tiny_model

OTHER = 54321


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with settings and a plugin file of another user."""
    (tmp_path / "pyproject.toml").write_text('[tool.pa-core]\nplugins = ["watch.py"]\n')
    (tmp_path / "watch.py").write_text(
        "import warnings\n"
        "from pa_core import hookimpl\n"
        'warnings.warn("the file runs")\n'
        "@hookimpl\ndef on_init_end(): ...\n"
    )
    if os.geteuid() == 0:
        for file in tmp_path.iterdir():
            os.chown(file, OTHER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    return tmp_path


def _texts(folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny_model()
        Trainer(model, None, None, callbacks=(), settings=folder / "pyproject.toml")
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_they_are_reported_before_their_code_runs(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    settings, plugin, runs = _texts(folder)
    assert settings.startswith(f"{folder / 'pyproject.toml'} belongs to another user")
    assert plugin.startswith(f"{folder / 'watch.py'} belongs to another user")
    assert runs == "the file runs"


def test_a_folder_in_which_only_its_owner_writes_is_trusted(folder: Path) -> None:
    folder.chmod(0o755)
    assert _texts(folder) == ["the file runs"]


def test_own_files_in_an_open_folder_are_trusted(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pa-core]\n")
    (tmp_path / "own.py").write_text(
        "from pa_core import hookimpl\n@hookimpl\ndef on_init_end(): ...\n"
    )
    tmp_path.chmod(0o777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_settings(find_settings_file(script=tmp_path)).plugins == ()
        load_plugin(file_source(tmp_path / "own.py"))
