"""Discovery of plugins without importing them, and loading them with helpful errors."""

import subprocess
import sys

import pytest

from pa_core.errors import PluginConflictError, PluginLoadError
from pa_core.plugins.builtin_names import BUILTINS
from pa_core.plugins.discovery import (
    PluginSource,
    code_source,
    find_claims,
    find_plugins,
    load_plugin,
)
from tests.fake_plugins import site_in


@pytest.fixture
def site(tmp_path, monkeypatch):
    with site_in(tmp_path / "site", monkeypatch) as site:
        yield site


def test_built_in_and_installed_plugins_are_found_with_their_distribution(site):
    site.install("pa-weather", "2.1", rain="pa_weather_rain:Rain", sun="pa_weather_sun")
    found = find_plugins()
    assert list(found)[: len(BUILTINS)] == list(BUILTINS)
    assert found["rain"] == PluginSource(
        "rain", "pa_weather_rain:Rain", "installed", "pa-weather", "2.1"
    )
    assert found["progress_bar"].distribution == "pa-core"
    assert found["progress_bar"].origin == "built-in"


def test_finding_imports_nothing(site):
    site.module("pa_explosive", "raise SystemExit('imported')")
    site.install("pa-explosive", explosive="pa_explosive:Plugin")
    code = f"""
import sys
sys.path.insert(0, {str(site.folder)!r})
from pa_core.plugins.discovery import find_plugins
assert "explosive" in find_plugins()
print(*[name for name in ("pa_explosive", "torch", "pa_core.callbacks") if name in sys.modules])
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == []


def test_two_distributions_that_claim_one_name_are_an_error_that_names_both(site):
    site.install("pa-one", "1.0", same="pa_one:Plugin")
    site.install("pa-two", "2.0", same="pa_two:Plugin")
    with pytest.raises(PluginConflictError) as caught:
        find_plugins()
    text = str(caught.value)
    assert "'same'" in text
    assert "pa-one 1.0 (pa_one:Plugin)" in text
    assert "pa-two 2.0 (pa_two:Plugin)" in text
    assert [source.distribution for source in find_claims()["same"]] in (
        ["pa-one", "pa-two"],
        ["pa-two", "pa-one"],
    )


def test_a_distribution_that_claims_a_built_in_name_is_an_error_that_names_both(site):
    site.install("pa-bars", "1.0", progress_bar="pa_bars:Bar")
    with pytest.raises(PluginConflictError, match=r"'progress_bar'.*pa-core.*pa-bars 1.0"):
        find_plugins()


def test_a_class_a_module_and_an_object_inside_are_loaded(site):
    site.module("pa_things", "class Plugin: pass\nclass Home:\n    plugin = Plugin()")
    module = load_plugin(PluginSource("a", "pa_things", "installed"))
    assert load_plugin(PluginSource("b", "pa_things:Plugin", "installed")) is module.Plugin
    assert load_plugin(PluginSource("c", "pa_things:Home.plugin", "installed")) is (
        module.Home.plugin
    )


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("pa_broken:Plugin", "ModuleNotFoundError: No module named 'nonesuch_library'"),
        ("pa_nowhere:Plugin", "ModuleNotFoundError: No module named 'pa_nowhere'"),
        ("pa_fine:Plugni", "AttributeError: module 'pa_fine' has no attribute 'Plugni'"),
    ],
)
def test_a_failing_import_names_plugin_distribution_and_remedy(site, target, reason):
    site.module("pa_broken", "import nonesuch_library")
    site.module("pa_fine", "")
    source = PluginSource("mine", target, "installed", "pa-mine", "3.2")
    with pytest.raises(PluginLoadError, match="Install what it needs, or remove it") as caught:
        load_plugin(source)
    assert "'mine' of pa-mine 3.2" in str(caught.value)
    assert reason in str(caught.value)
    assert caught.value.__cause__ is not None


def file_plugin(path):
    return load_plugin(PluginSource(path.stem, str(path), "file"))


def test_a_file_is_loaded_by_its_path_even_where_a_package_has_its_name(site, tmp_path):
    import json

    file = tmp_path / "json.py"
    file.write_text("from pa_core import hookimpl\n@hookimpl\ndef on_init_end(trainer): ...\n")
    module = file_plugin(file)
    assert module.__file__ == str(file)
    assert sys.modules["json"] is json
    assert file_plugin(file) is module
    del sys.modules[module.__name__]


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    file = tmp_path / "failing.py"
    file.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(PluginLoadError, match="'failing' of .*ZeroDivisionError"):
        file_plugin(file)
    assert set(sys.modules) == before


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(PluginLoadError, match=r"Plugin file not found: .*nonesuch.py"):
        file_plugin(tmp_path / "nonesuch.py")


def test_a_file_with_several_plugin_classes_must_be_split(tmp_path):
    file = tmp_path / "several.py"
    file.write_text(
        "from pa_core import TrainerCallback\n"
        "class One(TrainerCallback): ...\nclass Two(TrainerCallback): ...\nclass Helper: ...\n"
    )
    with pytest.raises(PluginLoadError, match="several plugin classes, One, Two"):
        file_plugin(file)


def test_code_from_an_installed_package_has_its_distribution(site):
    package = site.folder / "pa_coded"
    package.mkdir()
    package.joinpath("__init__.py").write_text("class Plugin: ...\n")
    site.install("pa-coded", "4.5")
    from pa_coded import Plugin  # type: ignore[import-not-found]

    source = code_source(Plugin())
    assert source == PluginSource("Plugin", "pa_coded:Plugin", "code", "pa-coded", "4.5")
    assert str(source) == "pa-coded 4.5"


def test_code_that_is_not_installed_has_no_distribution_whatever_its_name(
    site, tmp_path, monkeypatch
):
    site.install("pa-mine", "4.5")
    with site_in(tmp_path / "project", monkeypatch) as project:
        project.module("pa_mine", "class Plugin: ...\n")
        from pa_mine import Plugin  # type: ignore[import-not-found]

        assert code_source(Plugin).distribution is None
        assert str(code_source(Plugin)) == "pa_mine:Plugin"
