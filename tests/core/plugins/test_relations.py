"""What plugins declare about each other: `requires_plugins` and `after_plugins`."""

from __future__ import annotations

import itertools

import pytest

from pa_core import hookimpl
from pa_core.callbacks import EarlyStoppingCallback
from pa_core.errors import (
    PluginConflictError,
    PluginNotFoundError,
    PluginValidationError,
    SettingsError,
)
from pa_core.plugins.discovery import PluginSource
from pa_core.plugins.manager import PluginManager
from pa_core.settings.environment import build_all_plugins
from pa_core.settings.table import Settings
from tests.builtin_trainer import make_trainer
from tests.fake_plugins import site_in
from tests.helpers import tiny_data

PLUGINS = """
from pa_core import hookimpl

class Average:
    @hookimpl
    def on_init_end(self, trainer): ...

class Follower(Average):
    requires_plugins = ("average",)
    after_plugins = ("average", "not_installed")
"""


class Plain:
    """Notes its name in each event, and around each run."""

    def __init__(self, calls: list[str], after: tuple[str, ...] = ()) -> None:
        self.calls, self.after_plugins = calls, after

    @hookimpl
    def on_train_epoch_end(self, trainer):
        self.calls.append(type(self).__name__)

    @hookimpl(wrapper=True)
    def run_training(self, trainer):
        self.calls.append(f"enter {type(self).__name__}")
        result = yield
        self.calls.append(f"leave {type(self).__name__}")
        return result


class First(Plain):
    @hookimpl(tryfirst=True)
    def on_train_epoch_end(self, trainer):
        self.calls.append("First")


class Last(Plain):
    @hookimpl(trylast=True)
    def on_train_epoch_end(self, trainer):
        self.calls.append("Last")


class B(Plain): ...


class C(Plain): ...


def source(name: str) -> PluginSource:
    return PluginSource(name, f"somewhere:{name}", "installed")


def manager_of(**after: tuple[str, ...]) -> PluginManager:
    manager = PluginManager()
    for name, names in after.items():
        name = name.replace("_", ":")
        manager.register(Plain([], names), name, source(name))
    return manager


@pytest.fixture
def site(tmp_path, monkeypatch):
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("pa_average", PLUGINS)
        site.install(
            "pa-average", "2.0", average="pa_average:Average", follower="pa_average:Follower"
        )
        yield site


def names(settings: Settings, **code) -> list[str]:
    """The names in the order of the calls, as the Trainer registers the plugins."""
    manager = PluginManager()
    for name, plugin, where in build_all_plugins(settings, **{"callbacks": (), **code}):
        manager.register(plugin, name, where)
    return list(manager.by_name)


# -- Order ----------------------------------------------------------------------------------------


def test_a_plugin_waits_for_those_that_it_comes_after():
    assert list(manager_of(a=("c",), b=(), c=(), d=()).by_name) == ["b", "c", "a", "d"]
    assert list(manager_of(a=("b",), b=("c",), c=()).by_name) == ["c", "b", "a"]
    assert list(manager_of(a=("not_enabled",), b=()).by_name) == ["a", "b"]
    instances = manager_of(a=("ema",), ema_x=(), b=(), ema_y=())
    assert list(instances.by_name) == ["ema:x", "b", "ema:y", "a"]
    one = manager_of(a=("ema:x",), ema_x=(), b=(), ema_y=())
    assert list(one.by_name) == ["ema:x", "a", "b", "ema:y"]


def test_every_order_of_registration_satisfies_the_declarations():
    after = {"a": ("d",), "b": ("a", "c"), "c": (), "d": ("c",)}
    for order in itertools.permutations(after):
        found = list(manager_of(**{name: after[name] for name in order}).by_name)
        assert found == ["c", "d", "a", "b"], order  # the only one there is


def test_events_are_called_after_wrappers_inside_and_marks_win():
    calls: list[str] = []
    plugins = [B(calls, ("C",)), First(calls, ("B", "C")), Last(calls), C(calls, ("Last",))]
    make_trainer(plugins=plugins).train(tiny_data(8), 1)
    assert calls == [
        *("enter Last", "enter C", "enter B", "enter First"),
        *("First", "C", "B", "Last"),
        *("leave First", "leave B", "leave C", "leave Last"),
    ]


def test_a_cycle_is_an_error_that_leaves_the_manager_as_it_was():
    manager = manager_of(x=(), a=("b",), b=("c",))
    with pytest.raises(
        PluginConflictError,
        match="'b' comes after 'c', 'c' comes after 'a', 'a' comes after 'b'",
    ):
        manager.register(Plain([], ("a",)), "c", source("c"))
    assert list(manager.by_name) == ["x", "b", "a"]
    manager.register(Plain([], ("own",)), "own", source("own"))  # an instance, after the others
    with pytest.raises(PluginConflictError, match="'own' comes after 'own:2'"):
        manager.register(Plain([], ("own",)), "own:2", source("own:2"))


@pytest.mark.parametrize("names", ["ema", [1], 3])
def test_a_declaration_must_be_a_list_of_names(names):
    with pytest.raises(
        PluginValidationError, match=r"after_plugins must be names of plugins, .*ema"
    ):
        PluginManager().register(Plain([], names))


# -- Requirements ---------------------------------------------------------------------------------


def test_what_a_plugin_requires_is_enabled_and_called_before_it(site):
    assert names(Settings(plugins=("follower", "average"))) == ["average", "follower"]
    assert names(Settings(plugins=("follower", "average:second"))) == ["average:second", "follower"]
    from pa_average import Follower  # type: ignore[import-not-found]

    for other in ("somewhere.else:Average", "pa-average/average"):
        kind = type("Mine", (Follower,), {"requires_plugins": (other,), "after_plugins": [other]})
        manager = PluginManager()
        manager.register(kind(), "mine", source("mine"))
        own = PluginSource("average", "somewhere.else:Average", "installed", "pa-average")
        manager.register(EarlyStoppingCallback(), "average", own)
        assert list(manager.by_name) == ["average", "mine"]


def test_an_object_in_code_counts_as_the_plugin_that_its_class_is(site):
    from pa_average import Average, Follower

    class Own(Average): ...

    class Stops:
        requires_plugins = ("early_stopping",)

        @hookimpl
        def on_init_end(self, trainer): ...

    assert names(Settings(), plugins=[Follower, Average()]) == ["Average", "Follower"]
    assert names(Settings(), plugins=[Follower(), Own]) == ["Own", "Follower"]
    assert names(Settings(), plugins=[Stops], callbacks=[EarlyStoppingCallback]) == [
        "early_stopping",
        "Stops",
    ]


def test_what_is_missing_is_named_with_how_to_enable_it(site, monkeypatch):
    needs = "'follower' (pa-average 2.0) requires the plugin 'average', which is"
    with pytest.raises(SettingsError) as caught:
        build_all_plugins(Settings(plugins=("follower",)))
    assert caught.value.problems == [
        f"[tool.pa-core] plugins: {needs} not enabled. Add it to plugins."
    ]
    monkeypatch.setenv("PA_CORE_PLUGINS", "-average")
    with pytest.raises(SettingsError) as caught:
        build_all_plugins(Settings(plugins=("average", "follower")))
    assert f"{needs} left out by PA_CORE_PLUGINS." in str(caught.value)
    monkeypatch.delenv("PA_CORE_PLUGINS")

    class Bars:
        requires_plugins = ("progress_bar", "nonesuch")

        @hookimpl
        def on_init_end(self, trainer): ...

    with pytest.raises(SettingsError) as caught:
        build_all_plugins(Settings(disable=("progress_bar",)), plugins=[Bars])
    bar, other = caught.value.problems
    assert bar.endswith("'progress_bar', which is disabled. Remove it from disable.")
    assert "'nonesuch', which is not enabled." in other


def test_what_is_added_or_removed_later_is_checked_when_a_run_starts(site):
    from pa_average import Average, Follower

    trainer = make_trainer()
    trainer.callback_handler.add_callback(Follower)
    for start in (lambda: trainer.train(tiny_data(8), 1), lambda: trainer.evaluate(tiny_data(8))):
        with pytest.raises(
            PluginNotFoundError, match=r"'Follower' .*requires 'average', which isn"
        ):
            start()
    trainer.callback_handler.add_callback(Average)
    assert list(trainer.plugins.by_name) == ["Average", "Follower"]
    trainer.train(tiny_data(8), 1)
    trainer.plugins.unregister("Average")
    with pytest.raises(PluginNotFoundError, match="requires 'average'"):
        trainer.train(tiny_data(8), 1)


# -- Distributions --------------------------------------------------------------------------------


def test_the_requirements_of_a_distribution_on_the_core_and_its_packages_are_checked(site):
    site.install("pa-late", requires="pa-core>=7", late="pa_average:Average")
    site.install("pa-odd", requires="Pa_Average[x] >=3", odd="pa_average:Average")
    site.install("pa-lost", requires='pa-nowhere>=1 ; python_version > "3"', lost="pa_average:A")
    site.install("pa-fine", requires='pa-core>=0.0.1; extra == "x"', fine="pa_average:Average")
    site.install("pa-other", requires="nonesuch>=1", other="pa_average:Average")
    with pytest.raises(SettingsError) as caught:
        build_all_plugins(Settings(plugins=("late", "odd", "lost", "fine", "other")))
    late, odd, lost = caught.value.problems
    assert "The plugin 'late' can't be used: pa-late 1.0 requires pa-core>=7, but pa-core 0" in late
    assert 'pip install "pa-core>=7"' in late
    assert "pa-odd 1.0 requires Pa_Average>=3, but Pa_Average 2.0 is installed" in odd
    assert "requires pa-nowhere>=1, but pa-nowhere is not installed" in lost


def test_a_class_in_code_is_checked_too(site):
    (site.folder / "pa_early").mkdir()
    site.module("pa_early/__init__", "from pa_early.deep import Average")
    site.module("pa_early/deep", PLUGINS)
    site.install("pa-early", requires="pa-core<0.0.1", early="pa_early:Average")
    from pa_early import Average  # type: ignore[import-not-found]

    for given in (Average, Average(), "pa_early.deep:Average", "pa-early/early"):
        with pytest.raises(
            SettingsError, match=r"requires pa-core<0.0.1, but pa-core 0\S+ is inst"
        ):
            build_all_plugins(Settings(), plugins=[given])
