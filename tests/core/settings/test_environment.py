"""Plugins that environment variables add to one run."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pa_core import TrainerCallback, callbacks
from pa_core.errors import PluginNotFoundError, SettingsError
from pa_core.plugins import distributions
from pa_core.settings.environment import (
    LIMIT_BATCHES_VARIABLE,
    added_items,
    added_source,
    build_all_plugins,
)
from pa_core.settings.table import Settings, read_settings
from pa_core.utils import LIMIT_BATCHES_ENV_VAR
from tests.builtin_trainer import make_trainer
from tests.fake_plugins import site_in
from tests.helpers import tiny_data

ROOT = Path(__file__).parents[3]
WATCH = """
from pa_core import TrainerCallback

class Watch(TrainerCallback):
    epochs = 0

    def on_train_epoch_end(self, trainer):
        self.epochs += 1

class NeedsOne:
    def __init__(self, number): ...
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("watching", WATCH)
        site.install("pa-watching", "1.5", watch="watching:Watch")
        yield site


def names(**given) -> list[str]:
    return [name for name, _, _ in build_all_plugins(Settings(), callbacks=(), **given)]


def test_names_files_and_classes_are_added_before_all_others_and_reported(
    site, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(WATCH.partition("class NeedsOne")[0])
    (tmp_path / "site" / "deep").mkdir()
    site.module("deep/place", "from watching import Watch\nclass Mine(Watch): ...\n")
    monkeypatch.setenv("PA_CORE_PLUGINS", "watch, own.py\ndeep.place:Mine,\n watch:second")
    trainer = make_trainer(TrainerCallback())
    added = ["watch", "own", "Mine", "watch:second"]
    assert list(trainer.plugins.by_name) == [*added, "TrainerCallback"]
    assert str(trainer.plugins.sources["watch"]) == "pa-watching 1.5"
    trainer.train(tiny_data(16), 2)
    assert [trainer.plugins.by_name[name].epochs for name in added] == [2, 2, 2, 2]
    out = capsys.readouterr().out
    assert "Plugins: watch, own, Mine, watch:second, TrainerCallback" in out
    assert "(PA_CORE_PLUGINS: watch, own.py, deep.place:Mine, watch:second)" in out


def test_what_is_enabled_anyway_keeps_its_place(site, monkeypatch):
    monkeypatch.setenv("PA_CORE_PLUGINS", "watch,model_summary,watch")
    assert names(plugins=["overfit", "watch"]) == ["model_summary", "overfit", "watch"]
    monkeypatch.setenv("PA_CORE_PLUGINS", "")
    assert names(plugins=iter(["overfit"])) == ["overfit"]
    assert added_items() == []


def test_a_plugin_that_is_added_has_its_table(site, tmp_path, monkeypatch):
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.pa-core]\n[tool.pa-core.overfit]\nnum_batches = 3\n")
    settings = read_settings(file)
    with pytest.raises(SettingsError, match="'overfit' isn't enabled"):
        build_all_plugins(settings)
    monkeypatch.setenv("PA_CORE_PLUGINS", "overfit")
    (name, plugin, _), *_ = build_all_plugins(settings)
    assert (name, plugin.num_batches) == ("overfit", 3)
    *_, (name, plugin, _) = build_all_plugins(settings, plugins=["overfit"])
    assert (name, plugin.num_batches) == ("overfit", 3)
    file.write_text("[tool.pa-core]\n[tool.pa-core.overfit]\nnum_batches = 0\n")
    with pytest.raises(SettingsError, match="can't add 'overfit': in its settings, num_batches"):
        build_all_plugins(read_settings(file))


def test_plugins_of_the_other_variables_come_after_them(site, monkeypatch):
    assert LIMIT_BATCHES_ENV_VAR == LIMIT_BATCHES_VARIABLE
    monkeypatch.setenv("PA_CORE_PLUGINS", "watch")
    monkeypatch.setenv("PT_ACC_LIMIT_BATCHES", "3")
    monkeypatch.setenv("PA_CORE_FAST_DEV_RUN", "1")
    assert names() == ["watch", "limit_batches:environment", "fast_dev_run:environment"]


def test_everything_wrong_is_reported_at_once(site, monkeypatch):
    site.install("pa-broken", broken="nowhere:Plugin")
    monkeypatch.setenv(
        "PA_CORE_PLUGINS", "wotch,broken,watching:Watch,watching.x:Y,limit_batches,no.py"
    )
    monkeypatch.setenv("PT_ACC_LIMIT_BATCHES", "0")
    monkeypatch.setenv("PA_CORE_FAST_DEV_RUN", "yes")
    with pytest.raises(SettingsError) as caught:
        names()
    wrong, broken, dotless, module, required, file, limit, fast = caught.value.problems
    assert wrong.startswith("PA_CORE_PLUGINS: can't add 'wotch': unknown plugin 'wotch'")
    assert "Did you mean 'watch'?" in wrong
    assert broken.endswith("can't add 'broken': ModuleNotFoundError: No module named 'nowhere'")
    assert "can't add 'watching:Watch'" in dotless  # a name with a label, and no such plugin
    assert "can't add 'watching.x:Y': ModuleNotFoundError" in module
    assert "can't add 'limit_batches'" in required
    assert "num_batches" in required
    assert "Plugin file not found" in file
    assert limit == "PT_ACC_LIMIT_BATCHES must be a positive integer, not '0'"
    assert fast == "PA_CORE_FAST_DEV_RUN must be 1 or 0, not 'yes'"


def test_another_plugin_of_a_name_that_is_taken_is_an_error(site, tmp_path, monkeypatch):
    code = WATCH.partition("class NeedsOne")[0]
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    for file in ("progress_table.py", "one/own.py", "two/own.py"):
        (tmp_path / file).write_text(code)
    monkeypatch.setenv("PA_CORE_PLUGINS", "progress_table.py,one/own.py,two/own.py,one/own.py")
    with pytest.raises(SettingsError) as caught:
        build_all_plugins(Settings())
    built_in, other = caught.value.problems
    assert "the name 'progress_table' is taken by pa-core" in built_in
    assert "such as 'progress_table.py:second'" in built_in
    assert "can't add 'two/own.py': the name 'own' is taken by" in other
    monkeypatch.setenv("PA_CORE_PLUGINS", "one/own.py,two/own.py:second,one/own.py")
    assert names() == ["own", "own:second"]


@pytest.mark.parametrize("item", ["os.path:join", "deep.wrong:Wrong"])
def test_what_cannot_be_a_plugin_is_reported_with_its_item(item, site, tmp_path, monkeypatch):
    (tmp_path / "site" / "deep").mkdir()
    wrong = "from pa_core import TrainerCallback\nclass Wrong(TrainerCallback):\n    "
    site.module("deep/wrong", wrong + "def on_epoch(self, trainer): ...\n")
    monkeypatch.setenv("PA_CORE_PLUGINS", item)
    with pytest.raises(SettingsError, match=f"PA_CORE_PLUGINS: can't add '{item}': "):
        names()


# -- What isn't installed -------------------------------------------------------------------------


def test_the_distributions_of_this_project_are_known_with_their_plugins_and_commands():
    projects = [
        tomllib.loads(file.read_text())["project"] for file in ROOT.glob("plugins/*/pyproject.toml")
    ]
    for group, known in (
        ("pa_core", distributions.PLUGINS),
        ("pa_core.commands", distributions.COMMANDS),
    ):
        assert known == {
            name: project["name"]
            for project in projects
            for name in project["entry-points"].get(group, ())
        }


def test_a_plugin_of_this_project_that_is_not_installed_names_its_distribution(monkeypatch):
    hint = "It is part of pa-lab, which is not installed: pip install pa-lab"
    monkeypatch.setattr("pa_core.settings.build.find_claims", dict)
    with pytest.raises(SettingsError, match=f"unknown plugin 'profile'. {hint}"):
        names(plugins=["profile"])
    with pytest.raises(PluginNotFoundError, match=hint):
        added_source("profile", {})
    table = Settings(tables={"profile": {}})
    with pytest.raises(SettingsError, match=hint):
        build_all_plugins(table)


def test_a_callback_that_has_moved_says_where_it_is():
    with pytest.raises(ImportError, match="pip install pa-lab, and import it from pa_lab"):
        from pa_core.callbacks import ProfileCallback  # noqa: F401
    assert "ProfileCallback" not in callbacks.__all__
