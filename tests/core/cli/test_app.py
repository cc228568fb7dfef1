"""The command ``pa``, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from textwrap import dedent

import pytest
import typer

from pa_core import __version__, hookspecs
from pa_core.cli.doctor import check_requirement, check_versions
from pa_core.cli.entry_points import with_commands
from pa_core.errors import PluginNotFoundError
from pa_core.plugins.builtin_names import BUILTINS, DEFAULTS
from pa_core.plugins.manager import PluginManager
from tests.fake_plugins import Site
from tests.warm import Ended, start_warm

ROOT = Path(__file__).parents[3]
WEATHER = """
from pydantic import BaseModel
from pa_core import hookimpl

class Weather:
    class Settings(BaseModel):
        degrees: int = 20

    def __init__(self, settings): ...

    @hookimpl(tryfirst=True)
    def on_train_epoch_end(self, trainer): ...

    @hookimpl(wrapper=True)
    def run_training(self, trainer):
        return (yield)
"""


class Shell:
    """A project's folder, and packages beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "project"
        self.folder.mkdir()
        (folder / "site").mkdir()
        self.site = Site(folder / "site")

    def settings(self, text: str) -> None:
        self.folder.joinpath("pyproject.toml").write_text(dedent(text))

    def run(self, *arguments: str) -> Ended:
        path = {"PYTHONPATH": str(self.site.folder)}
        (ended,) = start_warm("pa_core", *arguments, folder=self.folder, environment=path)
        return ended

    def out(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stderr == ""
        return result.stdout

    def error(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.returncode == 1, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result.stderr


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path)
    shell.site.module("pa_weather", WEATHER)
    shell.site.install("pa-weather", "2.1", weather="pa_weather:Weather")
    shell.settings("[tool.pa-core]\nplugins = ['weather']\ndisable = ['progress_bar']\n")
    return shell


def test_it_says_its_version(shell):
    assert shell.out("--version") == f"pa-core {__version__}\n"


def test_plugins_says_what_is_installed_and_what_is_enabled_and_by_whom(shell):
    shell.site.install("pa-idle", "0.5", idle="pa_idle:Idle")
    lines = shell.out("plugins").splitlines()
    assert lines[:2] == ["Settings: pyproject.toml", ""]
    header, *rows = [line.split() for line in lines[2:] if line]
    assert header == ["plugin", "state", "package", "version", "by"]
    enabled = [row[0] for row in rows if row[1] == "enabled"]
    assert enabled == [*(name for name in DEFAULTS if name != "progress_bar"), "weather"]
    assert ["weather", "enabled", "pa-weather", "2.1", "pyproject.toml"] in rows
    assert ["idle", "available", "pa-idle", "0.5"] in rows
    assert ["progress_bar", "disabled", "pa-core", __version__, "pyproject.toml"] in rows
    every = {line.split()[0] for line in shell.out("plugins", "--all").splitlines() if line}
    assert set(BUILTINS) <= every


def test_plugins_as_json_has_a_row_for_each_with_its_hooks_where_they_are_asked_for(shell):
    shell.folder.joinpath("watch.py").write_text(
        "from pa_core import hookimpl\n@hookimpl\ndef on_init_end(trainer): ...\n"
    )
    shell.settings("[tool.pa-core]\nplugins = ['weather:cold', 'watch.py', 'progress_bar']\n")
    found = json.loads(shell.out("plugins", "--json"))
    assert found["file"] == str(shell.folder / "pyproject.toml")
    rows = {row["name"]: row for row in found["plugins"]}
    assert rows["weather:cold"] == {
        "name": "weather:cold",
        "state": "enabled",
        "by": "pyproject.toml",
        "enabled": True,
        "origin": "installed",
        "distribution": "pa-weather",
        "version": "2.1",
        "target": "pa_weather:Weather",
        "hooks": None,
        "runs_on": None,
    }
    assert [row["name"] for row in found["plugins"] if row["enabled"]] == [
        *(name for name in DEFAULTS if name != "progress_bar"),
        *("weather:cold", "watch", "progress_bar"),
    ]
    found = json.loads(shell.out("plugins", "--json", "--hooks"))
    rows = {row["name"]: row for row in found["plugins"]}
    assert rows["weather:cold"]["hooks"] == ["on_train_epoch_end", "run_training"]
    assert rows["watch"]["hooks"] == ["on_init_end"]
    assert "on_training_run_start" in rows["move_modules_to_device"]["hooks"]
    assert {rows[name]["runs_on"] for name in ("weather:cold", "watch")} == {"all"}
    assert rows["progress_bar"]["runs_on"] == "main"
    parts = "'print_progress', 'progress_bar', 'log_metrics'"
    shell.settings(f"[tool.pa-core]\ndisable = [{parts}]\n")  # nothing of the table is left
    found = json.loads(shell.out("plugins", "--json"))
    enabled = [row["name"] for row in found["plugins"] if row["enabled"]]
    assert enabled == [name for name in DEFAULTS if name != "progress_table"]


def test_plugins_imports_neither_torch_nor_a_plugin(shell):
    shell.site.module("pa_explosive", "raise SystemExit('imported')")
    shell.site.install("pa-explosive", explosive="pa_explosive:Plugin")
    shell.settings("[tool.pa-core]\nplugins = ['explosive', 'weather']\n")
    code = (
        "import sys\n"
        "from pa_core.cli.app import app\n"
        "app(['plugins', '--all'], standalone_mode=False)\n"
        "heavy = ('torch', 'accelerate', 'numpy', 'pa_weather', 'pa_core.callbacks')\n"
        "print('imported:', *[name for name in heavy if name in sys.modules])\n"
    )
    shell.site.module("look", code)
    path = os.pathsep.join([str(ROOT), str(shell.site.folder)])
    result = subprocess.run(
        [sys.executable, "-m", "look"],
        cwd=shell.folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "explosive" in result.stdout
    assert result.stdout.splitlines()[-1] == "imported:"


def test_a_class_of_a_module_beside_the_settings_and_one_of_a_distribution_are_shown(shell):
    (shell.folder / "own").mkdir()
    (shell.folder / "own/watch.py").write_text(
        "from pa_core import TrainerCallback\nclass Watch(TrainerCallback):\n"
        "    def on_train_epoch_end(self, trainer): ...\n"
    )
    shell.settings("[tool.pa-core]\nplugins = ['own.watch:Watch', 'pa-weather/weather:b']\n")
    rows = {
        row["name"]: row for row in json.loads(shell.out("plugins", "--json", "--hooks"))["plugins"]
    }
    assert rows["Watch"]["enabled"]
    assert rows["Watch"]["hooks"] == ["on_train_epoch_end"]
    assert rows["weather:b"]["enabled"]
    assert rows["weather:b"]["distribution"] == "pa-weather"
    assert "weather" not in rows


def test_plugins_names_what_is_listed_and_not_installed(shell):
    shell.settings("[tool.pa-core]\nplugins = ['wether']\n")
    assert "lists 'wether': unknown plugin 'wether'. Did you mean 'weather'?" in shell.error(
        "plugins"
    )


def test_plugins_that_the_environment_adds_are_listed_first_and_explained(shell, monkeypatch):
    shell.settings("[tool.pa-core]\nplugins = []\n")
    monkeypatch.setenv("PA_CORE_PLUGINS", "weather,terminate_on_nan")
    lines = shell.out("plugins").splitlines()
    assert lines[1] == "PA_CORE_PLUGINS: weather, terminate_on_nan"
    enabled = [line.split()[0] for line in lines[2:] if " enabled " in line]
    assert enabled == ["weather", *DEFAULTS]
    assert lines[4].split() == ["weather", "enabled", "pa-weather", "2.1", "PA_CORE_PLUGINS"]
    lines = shell.out("explain", "--hook", "on_train_epoch_end").splitlines()
    assert lines[1] == "PA_CORE_PLUGINS: weather, terminate_on_nan"
    assert lines[4].split()[1] == "weather"
    monkeypatch.setenv("PA_CORE_PLUGINS", "wether")
    error = shell.error("plugins")
    assert "PA_CORE_PLUGINS lists 'wether': unknown plugin 'wether'." in error


def test_hooks_prints_the_contract_of_each(shell):
    text = shell.out("hooks")
    places = [text.index(f"\n{name}(") for name in PluginManager().hooks]
    assert places == sorted(places)
    assert "on_train_step_end(trainer, batch, batch_output, step)" in text
    lines = [line.strip() for line in (hookspecs.create_scheduler.__doc__ or "").splitlines()]
    assert all(line in text for line in lines)
    one = shell.out("hooks", "on_exception")
    assert "on_exception(trainer, exception)" in one
    assert "on_init_end" not in one
    assert "Did you mean 'on_exception'?" in shell.error("hooks", "on_exeption")
    found = json.loads(shell.out("hooks", "--json"))
    assert [hook["name"] for hook in found] == list(PluginManager().hooks)
    assert all("When:" in hook["doc"] for hook in found)
    assert all(len(hook["contract"]) == 4 for hook in found)


def test_explain_says_who_is_called_in_order_with_distribution_file_and_line(shell):
    lines = shell.out("explain", "--hook", "on_train_epoch_end").splitlines()
    assert lines[2] == "on_train_epoch_end"
    rows = [line.split() for line in lines[3:]]
    assert [row[0] for row in rows] == [f"{n}." for n in range(1, len(rows) + 1)]
    assert [row[1] for row in rows] == ["weather", "terminate_on_nan", "progress_table"]
    file = shell.site.folder / "pa_weather.py"
    (line,) = [n for n, text in enumerate(file.read_text().splitlines(), 1) if "tryfirst" in text]
    assert rows[0][2:] == ["pa-weather", "2.1", f"pa_weather.py:{line}", "(tryfirst)"]
    assert rows[1][-1].endswith(tuple("0123456789"))
    assert "(trylast" in " ".join(rows[2])


def test_explain_shows_the_loop_in_order_with_all_who_are_called_the_core_last(shell):
    text = shell.out("explain")
    run = text.partition("\n    run_training  # to wrap\n")[2].partition("        training_run_")[0]
    names = [line.split()[1] for line in run.splitlines()]
    assert "weather" in names
    assert names[-1] == "pa_core"
    assert next(line for line in run.splitlines() if "weather" in line).endswith(
        "(wraps the others)"
    )
    order = ["on_training_run_start", "calculate_train_batch_loss", " optimizer_step ", "predict("]
    places = [text.index(name) for name in order]
    assert places == sorted(places)
    assert shell.out("explain", "--hook", "on_init_end").endswith(
        "No plugin implements on_init_end.\n"
    )


def test_explain_as_json_says_the_same(shell):
    data = json.loads(shell.out("explain", "--json"))
    assert data["settings"] == str(shell.folder / "pyproject.toml")
    (step,) = [step for step in data["loop"] if step["name"] == "on_train_epoch_end"]
    first = step["implementations"][0]
    assert (first["plugin"], first["distribution"], first["version"]) == (
        *("weather", "pa-weather", "2.1"),
    )
    assert (first["order"], first["wrapper"], first["runs_on"]) == ("tryfirst", False, "all")
    (only,) = json.loads(shell.out("explain", "--json", "--hook", "on_train_epoch_end"))["loop"]
    assert only == step


def test_explain_and_plugins_say_what_is_called_on_the_main_process_only(shell):
    shell.settings('[tool.pa-core]\nplugins = ["progress_bar"]\n')
    (row,) = [
        line
        for line in shell.out("explain", "--hook", "on_train_step_end").splitlines()
        if "progress_bar " in line
    ]
    assert row.endswith("main process only)")
    # What surrounds a run is called everywhere.
    assert "main process" not in shell.out("explain", "--hook", "run_training")
    blocks = shell.out("plugins", "--hooks").partition("progress_bar ")[2]
    assert next(line for line in blocks.splitlines() if "processes" in line).endswith("main only")


def test_doctor_finds_nothing_wrong_here_but_perhaps_the_installation(shell):
    result = shell.run("doctor")
    wrong = [line for line in result.stdout.splitlines() if line.startswith("error")]
    # From a source tree that isn't installed, versions can't be checked.
    assert [line for line in wrong if "runs from its source tree" not in line] == []
    assert result.returncode == (1 if wrong else 0)
    assert "pyproject.toml: move_modules_to_device" in result.stdout


def test_doctor_names_all_that_is_wrong_and_what_to_do(shell):
    shell.site.install("pa-one", "1.0", requires="pa-core>=7", same="pa_weather:Weather")
    shell.site.install("pa-two", "1.0", same="pa_weather:Weather")
    shell.settings(
        """
        [tool.pa-core]
        plugins = ["weather", "wether"]
        [tool.pa-core.weather]
        degrees = "ten"
        """
    )
    result = shell.run("doctor")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    wrong = [line for line in result.stdout.splitlines() if line.startswith("error")]
    for part in (
        "'same' is claimed by pa-",
        f"pa-one 1.0 (for pa-core >=7) doesn't support pa-core {__version__}",
        "unknown plugin 'wether'. Did you mean 'weather'?",
        "degrees: expected a valid integer, got 'ten'",
    ):
        assert [line for line in wrong if part in line], part
    assert "pip install --upgrade pa-core pa-one" in result.stdout


def test_doctor_compares_versions_with_what_is_supported():
    (right,) = check_requirement("pytest>=1")
    assert right.is_right
    (old,) = check_requirement("pytest>=1000")
    assert not old.is_right
    assert old.remedy == 'Install a supported one: pip install "pytest>=1000"'
    (missing,) = check_requirement("nonesuch-library>=2")
    assert (missing.is_right, missing.what) == (False, "nonesuch-library isn't installed")
    assert list(check_requirement("nonesuch-library; extra == 'docs'")) == []
    (uninstalled,) = check_versions("nonesuch-library")
    assert not uninstalled.is_right


def test_schema_is_json_with_the_settings_of_installed_plugins(shell):
    schema = json.loads(shell.out("schema"))
    assert schema["properties"]["weather"]["properties"]["degrees"]["type"] == "integer"
    assert set(BUILTINS) <= set(schema["properties"])


def test_schema_does_not_check_the_table_of_a_plugin_that_cannot_be_imported_and_names_it(shell):
    shell.site.install("pa-broken", "0.3", broken="pa_broken:Plugin")
    result = shell.run("schema")
    assert result.returncode == 0
    assert "'broken' of pa-broken 0.3 can't be imported" in result.stderr
    assert json.loads(result.stdout)["properties"]["broken"] == {"type": "object"}


def test_json_is_alone_on_standard_output_whatever_plugins_print_or_raise(shell):
    noise = "import os, sys\nprint('from Python')\nos.write(1, b'from elsewhere')\n"
    shell.folder.joinpath("noisy.py").write_text(
        f"{noise}from pa_core import hookimpl\n"
        "class Noisy:\n"
        "    def __init__(self): print('built')\n"
        "    @hookimpl\n"
        "    def on_train_epoch_end(self): ...\n"
    )
    shell.settings("[tool.pa-core]\nplugins = ['noisy.py']\n")
    explained = shell.run("explain", "--json")
    assert json.loads(explained.stdout)["loop"]
    assert "built" in explained.stderr
    shell.folder.joinpath("broken.py").write_text(f"{noise}raise RuntimeError('not today')\n")
    shell.settings(
        "[tool.pa-core]\nplugins = ['broken.py', 'weather']\n[tool.pa-core.broken]\nx = 1\n"
    )
    listed = shell.run("plugins", "--hooks", "--settings", "--json")
    assert listed.returncode == 1
    found = {one["key"]: one["source"] for one in json.loads(listed.stdout)["settings"]}
    assert (found["broken.x"], found["weather.degrees"]) == ("pyproject.toml", "default")
    schema = shell.run("schema", "--pyproject")
    assert json.loads(schema.stdout)["title"] == "pyproject.toml"
    for ended in (listed, schema):
        assert "from Python" in ended.stderr
        assert "from elsewhere" in ended.stderr
        assert ended.stderr.count("RuntimeError: not today") == 1
        assert "Traceback" not in ended.stderr


def test_wrong_settings_are_told_in_words_with_exit_code_1(shell):
    shell.settings("[tool.pa-core]\nplugins = ['weather', 'wether']\n")
    assert "unknown plugin 'wether'" in shell.error("explain")
    shell.settings("[tool.pa-core\n")
    for command in ("plugins", "explain"):
        assert "can't be read" in shell.error(command)
    assert "can't be read" in shell.run("doctor").stdout
    shell.settings("[tool.pa_core]\n")
    near_miss = "has a table [tool.pa_core]; it must be called [tool.pa-core]"
    assert near_miss in shell.run("doctor").stdout


# -- Commands of plugins --------------------------------------------------------------------------


def test_a_command_of_a_distribution_is_imported_when_it_is_called_and_only_then(shell):
    shell.site.module(
        "pa_rain",
        """
        print("imported")

        def rain(hours: int = 1) -> None:
            "Tell the rain."
            print("rain for", hours)
        """,
    )
    shell.site.install("pa-rain", group="pa_core.commands", rain="pa_rain:rain")
    listed = shell.out("--help")
    assert "imported" not in listed
    assert "  rain           Tell the rain.\n" in listed
    assert shell.out("rain", "--hours", "3").split("\n")[:2] == ["imported", "rain for 3"]
    assert "Tell the rain." in shell.out("rain", "--help")


def test_a_distribution_may_bring_several_commands_in_one_app(shell):
    shell.site.module(
        "pa_sky",
        """
        import typer

        app = typer.Typer()

        @app.command()
        def sun() -> None:
            print("shines")

        @app.command()
        def moon() -> None:
            print("is full")
        """,
    )
    shell.site.install("pa-sky", group="pa_core.commands", sky="pa_sky:app", plugins="nothing:x")
    assert shell.out("sky", "moon") == "is full\n"
    assert "weather" in shell.out("plugins")  # the core's own stays the core's


def test_an_app_of_one_command_is_that_command_with_its_own_context(shell):
    shell.site.module(
        "pa_snow",
        """
        import typer

        app = typer.Typer()

        @app.command(context_settings={"ignore_unknown_options": True})
        def falls(words: list[str]) -> None:
            print(*words)
        """,
    )
    shell.site.install("pa-snow", group="pa_core.commands", snow="pa_snow:app")
    assert shell.out("snow", "deep", "--and", "crisp") == "deep --and crisp\n"


def test_a_command_of_this_project_that_is_not_installed_names_its_distribution(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    for name in ("check", "verify-resume"):
        with pytest.raises(PluginNotFoundError, match=f"'{name}'.* pip install pa-lab"):
            with_commands(typer.Typer(), [name, "train.py"])
    message = (
        "Unknown command 'chek'.* Did you mean 'check'. It is part of pa-lab, .* pip install pa-lab"
    )
    with pytest.raises(PluginNotFoundError, match=message):
        with_commands(typer.Typer(), ["chek"])


def test_a_command_that_two_distributions_have_or_that_is_broken_is_told_when_it_is_called(shell):
    for name in ("pa-one", "pa-two"):
        shell.site.install(name, group="pa_core.commands", both="os:getcwd", lost="nowhere:x")
    shell.site.install("pa-three", group="pa_core.commands", broken="nowhere:x")
    assert "'both' is provided by pa-one and pa-two" in shell.error("both")
    assert "'broken' of pa-three can't be imported" in shell.error("broken")
