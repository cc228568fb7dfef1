"""`pa new-plugin`: what it makes is right as it is, and what it refuses leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pa_core.cli import new_plugin as new_plugin_module
from pa_core.cli.new_plugin import (
    FILES,
    KINDS,
    NewPluginError,
    event_names,
    files_of,
    new_plugin,
)
from pa_core.testing import HookRecorder, run_tiny
from tests.fake_plugins import site_in

ROOT = Path(__file__).parents[3]


def run(*args: str, cwd: Path, path: tuple[Path, ...] = (), **more: tuple[Path, ...]) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "PA_CORE_CONFIG"}
    result = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=kept
        | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
        | {name: os.pathsep.join(map(str, paths)) for name, paths in more.items()},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_files_are_those_of_the_template_and_nothing_is_left_to_fill_in(tmp_path):
    folder = new_plugin("weight-watch", tmp_path, author='Ada "L" O\'Neill, München')
    assert folder == tmp_path / "pa-weight-watch"
    made = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    places = files_of("event").values()
    assert made == {place.replace("$package", "pa_weight_watch") for place in places}
    template = {path.name for path in (ROOT / "pa_core" / "cli" / "template").iterdir()}
    assert template == {name for kind in KINDS for name in files_of(kind)}
    assert list(tmp_path.iterdir()) == [folder]
    for path in folder.rglob("*"):
        if path.is_file():
            assert not re.search(r"\$(?!\{\{)", path.read_text()), path
    assert (
        folder.stat().st_mode & 0o777 == (tmp_path / "pa-weight-watch/tests").stat().st_mode & 0o777
    )


def test_the_metadata_is_that_of_a_package_that_can_be_published(tmp_path):
    folder = new_plugin("weight-watch", tmp_path, author='Ada "L" O\'Neill, München')
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "pa-weight-watch"
    assert project["authors"] == [{"name": 'Ada "L" O\'Neill, München'}]
    assert project["entry-points"]["pa_core"] == {
        "weight_watch": "pa_weight_watch:WeightWatchPlugin"
    }
    assert "pa-core>=0.1,<0.2" in project["dependencies"]
    assert "O'Neill, München" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize("hook", event_names())
def test_a_plugin_of_any_event_counts_its_calls(hook, tmp_path):
    file = new_plugin("counting", tmp_path, hook=hook) / "pa_counting" / "plugin.py"
    spec = importlib.util.spec_from_file_location("counting_plugin", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["counting_plugin"] = module
    try:
        spec.loader.exec_module(module)
        plugin, recorder = module.CountingPlugin(module.CountingPlugin.Settings()), HookRecorder()
        run_tiny(plugin, recorder, epochs=1)
    finally:
        del sys.modules["counting_plugin"]
    assert plugin.calls == recorder.count(hook) > 0


@pytest.mark.parametrize(
    "name", ["Watch", "1st", "a--b", "a b", "-a", "a-", "pa-", "", "größe", "../x"]
)
def test_what_is_no_name_is_refused(name, tmp_path):
    with pytest.raises(NewPluginError, match="is not a valid plugin name.*such as weight-watch"):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "plugin"), [("pa-a", "a"), ("a_b", "a_b"), ("a.b-c", "a_b_c"), ("pa_x2", "x2")]
)
def test_a_name_is_normalised(name, plugin, tmp_path):
    folder = new_plugin(name, tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert list(project["entry-points"]["pa_core"]) == [plugin]
    assert folder.name == "pa-" + plugin.replace("_", "-")


def test_a_name_of_a_built_in_of_an_installed_plugin_or_of_python_is_taken(tmp_path, monkeypatch):
    with pytest.raises(NewPluginError, match="'early_stopping' is taken by pa-core"):
        new_plugin("early-stopping", tmp_path)
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.install("someones-distribution", "2.0", watch="nowhere:Watch")
        site.install("pa-other", "1.0")
        (tmp_path / "site" / "pa_third").mkdir()
        with pytest.raises(NewPluginError, match="'watch' is taken by someones-distribution 2.0"):
            new_plugin("watch", tmp_path)
        for name in ("other", "third"):
            with pytest.raises(NewPluginError, match=f"pa-{name} is already installed"):
                new_plugin(name, tmp_path)
    with pytest.raises(NewPluginError, match="'class' is a Python keyword"):
        new_plugin("class", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "pa-watch").mkdir()
    with pytest.raises(NewPluginError, match="pa-watch already exists"):
        new_plugin("watch", tmp_path)
    assert list((tmp_path / "pa-watch").iterdir()) == []


def test_other_mistakes_are_told(tmp_path):
    with pytest.raises(NewPluginError, match="Did you mean 'on_train_epoch_end'"):
        new_plugin("watch", tmp_path, hook="on_train_epochs_end")
    with pytest.raises(NewPluginError, match="can't implement 'create_scheduler' first"):
        new_plugin("watch", tmp_path, hook="create_scheduler")
    with pytest.raises(NewPluginError, match="Unknown template 'wraper'. Did you mean 'wrapper'"):
        new_plugin("watch", tmp_path, kind="wraper")
    with pytest.raises(NewPluginError, match="Only the template event takes a hook"):
        new_plugin("watch", tmp_path, kind="provider", hook="on_train_epoch_end")
    with pytest.raises(NewPluginError, match="too long: use at most 32"):
        new_plugin("w" * 33, tmp_path)
    with pytest.raises(NewPluginError, match="must be a single line"):
        new_plugin("watch", tmp_path, author="two\nlines")


def test_a_template_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(new_plugin_module, "FILES", {**FILES, "no such file": "last"})
    with pytest.raises(FileNotFoundError):
        new_plugin("watch", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_comes_next_and_tells_mistakes_in_words(tmp_path):
    out = run("-m", "pa_core", "new-plugin", "weight-watch", "--author", "Ada", cwd=tmp_path)
    assert out.splitlines()[0] == "Created pa-weight-watch. Try it:"
    assert "cd pa-weight-watch" in out
    again = subprocess.run(
        [sys.executable, "-m", "pa_core", "new-plugin", "weight-watch"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert again.returncode == 1
    assert "already exists" in again.stderr
    assert "Traceback" not in again.stderr


def test_what_is_made_is_clean_for_the_linter_and_the_formatter(tmp_path):
    for kind in KINDS:
        hook = max(event_names(), key=len) if kind == "event" else None
        folder = new_plugin(kind[0] * 32, tmp_path, kind=kind, hook=hook)
        run("-m", "ruff", "check", ".", cwd=folder)
        run("-m", "ruff", "format", "--check", ".", cwd=folder)


@pytest.mark.slow
def test_what_is_made_is_clean_for_the_type_checker(tmp_path):
    files = []
    for kind in KINDS:
        folder = new_plugin(f"a-{kind}", tmp_path, kind=kind)
        # In one run, which needs modules of different names.
        files += [folder / f"pa_a_{kind}", folder / f"test_{kind}.py"]
        (folder / "tests" / "test_plugin.py").rename(files[-1])
    with (folder / "pyproject.toml").open("a") as file:  # what is made names little of these
        file.write(
            '\n[[tool.mypy.overrides]]\nmodule = ["torch.*", "accelerate.*", "numpy.*"]\n'
            'follow_imports = "skip"\n'
        )
    packages = tuple(tmp_path / f"pa-a-{kind}" for kind in KINDS)
    run("-m", "mypy", *map(str, files), cwd=folder, path=packages, MYPYPATH=packages)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_tests_of_each_template_pass(tmp_path):
    """In one process for all; those on two processes are started once, by `check_on_processes`."""
    kinds = [kind for kind in KINDS if kind != "event"]  # whose wheel is tested below
    folders = [new_plugin(f"a-{kind}", tmp_path, kind=kind) for kind in kinds]
    for kind, folder in zip(kinds, folders, strict=True):
        (folder / "tests" / "test_plugin.py").rename(tmp_path / f"test_{kind}.py")
    classes = [f"TestA{kind.capitalize()}Plugin" for kind in kinds]
    (tmp_path / "test_processes.py").write_text(
        "from pa_core.testing import check_on_processes\n"
        + "".join(
            f"from test_{kind} import {name} as The{name}\n"
            for kind, name in zip(kinds, classes, strict=True)
        )
        + "\ndef test_on_processes():\n"
        + f"    check_on_processes([{', '.join(f'The{name}' for name in classes)}])\n"
    )
    plain = ("-q", "-p", "no:cacheprovider", "-p", "pa_core.testing.pytest_plugin", "-W", "error")
    out = run("-m", "pytest", *plain, "-m", "not slow", ".", cwd=tmp_path, path=tuple(folders))
    assert re.search(r"^\d+ passed, \d+ skipped, 3 deselected", out, re.MULTILINE), out


@pytest.mark.slow
@pytest.mark.distributed
def test_the_tests_that_are_made_pass_on_the_installed_wheel(tmp_path):
    folder, site = new_plugin("weight-watch", tmp_path), tmp_path / "site"
    run("-m", "hatchling", "build", "-t", "wheel", cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    quiet = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "install", *quiet, "--target", str(site), str(wheel), cwd=tmp_path)
    # -P: the folder that the process runs in is not on its path, so the wheel is what is tested.
    code = "import pa_weight_watch; print(pa_weight_watch.__file__)"
    assert run("-P", "-c", code, cwd=folder, path=(site,)).startswith(str(site))
    assert (site / "pa_weight_watch" / "py.typed").exists()
    out = run("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder, path=(site,))
    assert re.search(r"^12 passed, 1 skipped", out, re.MULTILINE), out
    listed = run("-m", "pa_core", "plugins", cwd=tmp_path, path=(site,))
    row = r"^weight_watch +available +pa-weight-watch +0\.1\.0$"
    assert re.search(row, listed, re.MULTILINE), listed


def test_the_template_is_in_the_wheel_of_the_core(tmp_path):
    import zipfile

    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"pa_core/cli/template/{name}" for kind in KINDS for name in files_of(kind)} <= names
