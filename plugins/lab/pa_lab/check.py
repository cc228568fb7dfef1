"""``pa check``: find what would make a run fail, before it starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from pa_core.errors import PluginError, SettingsError
from pa_core.plugin import (
    FAST_DEV_RUN_VARIABLE,
    PLUGINS_VARIABLE,
    PluginManager,
    build_all_plugins,
    find_settings_file,
    loop_as_text,
    read_settings,
    readable_size,
)

PLUGIN = "pa_lab.check_plugin:CheckPlugin"
"""The plugin that `check_script` adds to the script's run."""

REPORT_VARIABLE = "PA_LAB_CHECK_REPORT"
"""The environment variable that names the file for this plugin's report."""


def check_settings(place: Path) -> list[str]:
    """Build and register the plugins that a script would have.

    Args:
        place: the script, or a folder.

    Returns:
        Every problem with the settings and the plugins.
    """
    folder = str(place if place.is_dir() else place.parent)
    if folder not in sys.path:  # a script there can import the classes that its settings name
        sys.path.append(folder)
    problems = []
    manager = PluginManager()
    try:
        settings = read_settings(find_settings_file(script=place))
        for name, plugin, source in build_all_plugins(settings):
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
    """Run a script for one update, one batch of each evaluation, and one save and load.

    Args:
        script: the script.
        arguments: the script's arguments.

    Returns:
        A description of the run, as text; and every problem found.
    """
    added = filter(None, (os.environ.get(PLUGINS_VARIABLE), PLUGIN))
    with tempfile.TemporaryDirectory(prefix="pa-lab-check-") as folder:
        file = Path(folder, "report.json")
        environment = {
            FAST_DEV_RUN_VARIABLE: "1",
            PLUGINS_VARIABLE: "\n".join(added),
            REPORT_VARIABLE: str(file),
        }
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        report: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    problems = list(report.get("problems", ()))
    if done.returncode:
        # Mostly progress bars come before the traceback.
        error = "".join(done.stderr.rpartition("Traceback (most recent call last)")[1:]).rstrip()
        how = (
            f"was killed by signal {-done.returncode}"
            if done.returncode < 0
            else f"failed with exit code {done.returncode}"
        )
        problems.append(f"{script} {how}:\n{error}" if error else f"{script} {how}")
    elif "run" not in report:
        problems.append(f"{script} doesn't train: it never called Trainer.train()")
    return _report_text(report), problems


def _report_text(report: dict[str, Any]) -> str:
    if "run" not in report:
        return ""
    run = report["run"] | {"plugins": ", ".join(report["run"]["plugins"])}
    if "state bytes" in report:
        run["training state"] = f"{readable_size(report['state bytes'])}, saved and loaded"
    if (file := Path(run["settings"] or "")).is_relative_to(Path.cwd()):
        run["settings"] = str(file.relative_to(Path.cwd()))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    width = max(map(len, run))
    lines = []
    for name, value in run.items():
        line = f"{name.ljust(width)}  {'none' if value is None else value}"
        pad = " " * (width + 2)
        lines += textwrap.wrap(
            line, columns or 10_000, subsequent_indent=pad, break_long_words=False
        ) or [line]
    return "\n".join([loop_as_text(report["explained"], columns), "", *lines, ""])
