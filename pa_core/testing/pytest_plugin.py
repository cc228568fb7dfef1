"""Pytest fixtures for tests of plugins, which a project has to enable.

Either in ``pyproject.toml``, under ``[tool.pytest.ini_options]``, with
``addopts = ["-p", "pa_core.testing.pytest_plugin"]``; or in the ``conftest.py`` of the project's
root, with ``pytest_plugins = ["pa_core.testing.pytest_plugin"]``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pa_core.settings.table import CONFIG_VARIABLE
from pa_core.testing.recorder import HookRecorder

if TYPE_CHECKING:
    from pa_core import Trainer

_MARKERS = {
    "slow": "takes longer than about ten seconds; leave out with -m 'not slow'",
    "distributed": "starts more than one process",
}


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers of the conformance suite's distributed test."""
    for name, description in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {description}")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the test that starts several processes."""
    test_class = getattr(item, "cls", None)
    if test_class is not None and item.name == "test_works_on_two_processes":
        from pa_core.testing.conformance import PluginConformance

        if issubclass(test_class, PluginConformance):
            for name in _MARKERS:
                item.add_marker(name)


@pytest.fixture
def isolated_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; returns the only settings file, which has no settings.

    Write to the file to test a plugin with its own settings.
    """
    file = tmp_path / "pa-core.toml"
    file.write_text("[tool.pa-core]\n")
    monkeypatch.setenv(CONFIG_VARIABLE, str(file))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return file


@pytest.fixture
def hook_recorder() -> HookRecorder:
    """A new `HookRecorder`."""
    return HookRecorder()


@pytest.fixture
def tiny_trainer(isolated_settings: Path) -> Callable[..., Trainer]:
    """The function `pa_core.testing.tiny_trainer`, in an empty folder."""
    from pa_core.testing import tiny

    return tiny.tiny_trainer


@pytest.fixture
def run_tiny(isolated_settings: Path) -> Callable[..., Trainer]:
    """The function `pa_core.testing.run_tiny`, in an empty folder."""
    from pa_core.testing import tiny

    return tiny.run_tiny
