"""Help and completion: what they say, and that they import no plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from pa_core.cli import completion
from pa_core.cli.app import app
from pa_core.cli.entry_points import with_commands
from pa_core.cli.source_reading import command_summary, settings_fields
from pa_core.plugins.discovery import find_claims, load_plugin
from pa_core.settings.validation import _fields, _holds_secret, _is_write_only, settings_model
from tests.fake_plugins import Site, site_in

ROOT = Path(__file__).parents[3]
IMPORTED = """
import os, sys
from pa_core.cli import completion
from pa_core.cli.app import app, main
from pa_core.cli.entry_points import with_commands

def call(words):
    try:
        with_commands(app, words)(words, prog_name="pa")
    except SystemExit as end:
        assert not end.code, (words, end.code)

own = [command.name or command.callback.__name__ for command in app.registered_commands]
for words in ([], *([name] for name in own)):
    call([*words, "--help"])
print("imported by the core's own help:", *sorted({"torch", "rich.table"} & {*sys.modules}))
for name in ("check", "verify-resume", "report", "schedule"):
    call([name, "--help"])
for line in ("pa ", "pa run --plugin ", "pa run --set ", "pa check --", "pa explain --hook "):
    os.environ |= {"_PA_COMPLETE": "complete_bash", "COMP_WORDS": line}
    os.environ["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    print(line, end="\\n\\n")
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
plugins = {"pa_metrics", "pa_models", "pa_tracking", "pa_core.trainer"}
print("imported:", *sorted({"torch", "numpy", "accelerate", *plugins} & {*sys.modules}))
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    with site_in(tmp_path / "site", monkeypatch) as site:
        yield site


def test_help_and_completion_import_neither_torch_nor_a_plugin(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", IMPORTED],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert "imported by the core's own help:" in [line.strip() for line in lines]
    assert lines[-1].strip() == "imported:"
    for candidate in ("verify-resume", "ema", "terminate_on_nan.limit=", "--help", "on_init_end"):
        assert candidate in lines, candidate


def test_each_command_option_and_argument_has_help_and_each_summary_fits_the_list():
    assert CliRunner().invoke(app, []).exit_code in (0, 2)
    group = get_command(with_commands(app, []))
    listed = CliRunner().invoke(with_commands(app, []), ["--help"], env={"COLUMNS": "80"}).output
    rows = listed.partition("Commands:\n")[2]
    assert "..." not in rows
    assert "Provided by" not in rows
    for name, command in group.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", ""), (name, parameter.name)
    for name in ("check", "verify-resume", "report", "schedule"):
        command = get_command(with_commands(app, [name])).commands[name]
        row = next(line for line in rows.splitlines() if line.split()[0] == name)
        assert row.partition(name)[2].strip() == (command.help or "").partition("\n")[0]
        for parameter in command.params:
            assert getattr(parameter, "help", ""), (name, parameter.name)


def test_the_summary_of_a_command_is_read_from_its_source(site: Site):
    site.module("pa_rain", "def falls():\n    'It falls.'\n")
    site.module(
        "pa_sky",
        '''
        import typer
        from pa_rain import falls
        raise SystemExit("imported")

        group = typer.Typer(help="About the sky.")
        single = typer.Typer()
        named = typer.Typer()

        @group.command()
        def sun(): "It shines."

        @group.command()
        def moon(): "It is full."

        @single.command()
        def stars():
            """Show the
            stars.

            All of them.
            """

        @named.command("rays", help="Count the rays.")
        def rays(): "Not this."
        ''',
    )
    assert command_summary("pa_sky:group") == "About the sky."
    assert command_summary("pa_sky:single") == "Show the stars."
    assert command_summary("pa_sky:named") == "Count the rays."
    assert command_summary("pa_sky:falls") == "It falls."
    for unknown in ("pa_sky:nowhere", "nowhere:x", "pa_sky", "os:getcwd", "pa_core.nowhere:x"):
        assert command_summary(unknown) == ""


def test_a_command_whose_source_says_nothing_is_provided_by_its_distribution(site: Site):
    site.module("pa_rain", "def rain():\n    print('drops')\n")
    site.install("pa-rain", group="pa_core.commands", rain="pa_rain:rain")
    output = CliRunner().invoke(with_commands(typer.Typer(callback=lambda: None), []), ["--help"])
    assert "Provided by pa-rain." in output.output


def test_the_fields_of_settings_are_read_as_they_are():
    for name, (source, *_) in find_claims().items():
        model = settings_model(load_plugin(source))
        fields = settings_fields(source.target)
        if model is None:
            assert fields is None, name
            continue
        secret = {
            key: _holds_secret(info.annotation) or _is_write_only(info)
            for key, info in _fields(model).items()
        }
        assert {key: field.is_secret for key, field in (fields or {}).items()} == secret, name


SHELL = """
source <(pa --show-completion)
words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _pa_completion pa; echo "${COMPREPLY[@]}"; }
words pa run --plugin early
words pa run --set early_stopping.watch
"""


def test_completion_works_in_bash(tmp_path):
    (tmp_path / "pyproject.toml").write_text("[tool.pa-core]\nplugins = ['early_stopping']\n")
    script = tmp_path / "pa"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pa_core "$@"\n')
    script.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", SHELL],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.splitlines() == ["early_stopping", "early_stopping.watch_metric="], (
        result.stderr
    )


def test_words_to_complete_are_those_of_the_shell(monkeypatch):
    assert completion.words_to_complete() is None
    monkeypatch.setenv("_PA_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "pa check 'a b")
    assert completion.words_to_complete() == ["check", "'a", "b"]
    monkeypatch.setenv("COMP_WORDS", "pa check 'a b'")
    assert completion.words_to_complete() == ["check", "a b"]
