"""What ``pa check`` looks at before a run: the settings, and one update of a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pa_core.checkpoint.listing import readable_size
from pa_core.errors import PluginError, SettingsError
from pa_core.loop.environment import CHECK_VARIABLE, FAST_DEV_RUN_VARIABLE
from pa_core.plugins.explain import loop_as_text
from pa_core.plugins.manager import PluginManager
from pa_core.settings.build import build_plugins
from pa_core.settings.table import find_settings_file, read_settings


def check_settings(place: Path) -> list[str]:
    """All that is wrong with the settings and plugins that a script would have.

    Args:
        place: the script, or a folder.
    """
    try:
        settings = read_settings(find_settings_file(script=place))
        manager, problems = PluginManager(), []
        for name, plugin, source in build_plugins(settings):
            try:
                manager.register(plugin, name, source)
            except PluginError as error:
                problems.append(str(error))
    except SettingsError as error:
        return error.problems
    except PluginError as error:
        return [str(error)]
    return problems


def check_script(script: Path, arguments: list[str]) -> tuple[str, list[str]]:
    """Run a script with one update, one batch of each evaluation, and a state saved and loaded.

    Args:
        script: the script.
        arguments: what it is called with.

    Returns:
        What the run would be, as text; and all that is wrong with it.
    """
    with tempfile.TemporaryDirectory(prefix="pa-core-check-") as folder:
        file = Path(folder, "report.json")
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env=os.environ | {FAST_DEV_RUN_VARIABLE: "1", CHECK_VARIABLE: str(file)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    problems = list(report.get("problems", ()))
    if done.returncode:
        # What comes before the traceback is of progress bars, mostly.
        error = "".join(done.stderr.rpartition("Traceback (most recent call last)")[1:]).rstrip()
        problems.append(f"{script} ends with exit code {done.returncode}:\n{error}")
    elif "run" not in report:
        problems.append(f"{script} doesn't train: no Trainer's train() was called")
    return _as_text(report), problems


def _as_text(report: dict[str, Any]) -> str:
    if "run" not in report:
        return ""
    run = report["run"] | {"plugins": ", ".join(report["run"]["plugins"])}
    if "state bytes" in report:
        run["a training state"] = f"{readable_size(report['state bytes'])}, saved and loaded"
    width = max(map(len, run))
    lines = [
        f"{name.ljust(width)}  {'none' if value is None else value}" for name, value in run.items()
    ]
    return "\n".join([*lines, "", loop_as_text(report["explained"]), ""])
