"""``pa schema``: the JSON Schema of the settings, for editors."""

from __future__ import annotations

from pathlib import Path

from pa_core.cli.console import (
    as_json,
    console,
    print_error,
    print_json,
    prints_to_stderr,
)
from pa_core.cli.here import read_here
from pa_core.errors import PluginError, SettingsError
from pa_core.plugins.discovery import find_claims
from pa_core.settings.paths import short_path
from pa_core.settings.schema import json_schema, own_plugins, pyproject_schema
from pa_core.settings.table import Settings


def show_schema(*, whole_file: bool, output: Path | None) -> None:
    """Print the schema; what is wrong with a plugin or with the settings goes to standard error.

    Args:
        whole_file: whether it is that of ``pyproject.toml`` rather than of ``[tool.pa-core]``.
        output: a file to write it to.

    Raises:
        SettingsError: if the file can't be written.
    """

    def report(error: PluginError | SettingsError) -> None:
        print_error(str(error), "yellow")

    try:
        settings = read_here()
    except SettingsError as error:
        report(error)
        settings = Settings()
    folder = settings.file.parent if settings.file else Path.cwd()
    with prints_to_stderr():
        schema = json_schema(find_claims(), own_plugins(settings.plugins, folder), report)
    if whole_file:
        schema = pyproject_schema(schema)
    if output is None:
        print_json(schema)
        return
    try:
        output.write_text(as_json(schema))
    except OSError as error:
        raise SettingsError([f"Can't write {output}: {error.strerror}"]) from None
    console().print(f"Written to {short_path(output)}")
