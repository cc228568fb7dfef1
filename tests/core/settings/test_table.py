"""Finding and reading the settings table."""

from __future__ import annotations

import re

import pytest

from pa_core.errors import SettingsError
from pa_core.settings.table import find_settings_file, read_settings


def test_the_search_goes_up_from_the_script_then_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.joinpath("a", "b").mkdir(parents=True)
        folder.joinpath("pyproject.toml").write_text("[tool.pa-core]\n")
    here.joinpath("a", "pyproject.toml").write_text("[tool.other]\n")  # is passed over
    script = here / "a" / "b" / "train.py"
    assert find_settings_file(script, there) == here / "pyproject.toml"
    here.joinpath("pyproject.toml").unlink()
    assert find_settings_file(script, there / "a" / "b") == there / "pyproject.toml"
    there.joinpath("pyproject.toml").unlink()
    assert find_settings_file(script, there) is None


def test_the_environment_variable_names_the_file(tmp_path, monkeypatch):
    file = tmp_path / "other.toml"
    file.write_text("[tool.pa-core]\n")
    monkeypatch.setenv("PA_CORE_CONFIG", str(file))
    assert find_settings_file(tmp_path, tmp_path) == file
    file.unlink()
    with pytest.raises(SettingsError, match=r"PA_CORE_CONFIG names .*other.toml, which does not e"):
        find_settings_file()


def test_invalid_toml_or_a_missing_table_or_file_is_an_error(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.pa-core\n")
    with pytest.raises(SettingsError, match=r"pyproject.toml can't be read: .*line 1"):
        read_settings(file)
    file.write_text("[tool]\n")
    with pytest.raises(SettingsError, match=r"pyproject.toml has no table \[tool.pa-core\]"):
        read_settings(file)
    with pytest.raises(SettingsError, match=r"nonesuch.toml can't be read"):
        read_settings(tmp_path / "nonesuch.toml")


@pytest.mark.parametrize(
    "header",
    [
        *("tool.pa_core", "tool.pacore", "tool.PA-core", "pa-core", '"pa_core"'),
        *(
            "tool.pa.core",
            "tools.pa-core",
            "tool.pa-cores",
            "tool.pacor",
            "tool.pa-croe",
            '"tool.pa-core"',
        ),
    ],
)
def test_a_table_with_a_similar_name_is_reported(header, tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(f"[{header}]\nplugins = []\n")
    header = header if "." in header else header.replace('"', "")
    name = header.replace(".", r"\.")
    message = rf"toml has a table \[{name}\]; it must be called \[tool\.pa-core\]"
    with pytest.raises(SettingsError, match=message):
        find_settings_file(script=tmp_path, cwd=tmp_path)
    with pytest.raises(SettingsError, match=message):
        read_settings(file)
    file.write_text(f"[{header}]\nplugins = []\n[tool.pa-core]\n")
    assert find_settings_file(script=tmp_path, cwd=tmp_path) == file
    (problem,) = read_settings(file).problems
    assert problem.endswith(f"has a table [{header}]; it must be called [tool.pa-core]")


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("pa-metrics", r"\[tool\.pa-core\.metrics\]"),
        ("pa_schedulers", r"\[tool\.pa-core\.schedulers\] or \[tool\.pa-core\.wsd_checkpoint\]"),
    ],
)
def test_a_table_with_the_name_of_a_distribution_is_reported(name, right, tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(f'[tool.pa-core]\nplugins = ["metrics"]\n[tool.{name}]\n')
    (problem,) = read_settings(file).problems
    assert re.search(rf"has a table \[tool\.{name}\]; the settings .* belong in {right}$", problem)


def test_a_file_with_a_byte_order_mark_is_read_and_another_encoding_is_named(tmp_path):
    file = tmp_path / "pyproject.toml"
    text = '[tool.pa-core]\nplugins = ["early_stopping"]\n'
    file.write_text(text, encoding="utf-8-sig")
    assert find_settings_file(script=tmp_path, cwd=tmp_path) == file
    assert read_settings(file).plugins == ("early_stopping",)
    for encoding, reason in {
        "utf-16": "it is encoded in UTF-16",
        "latin-1": "it isn't UTF-8",
    }.items():
        file.write_text(f"# ä\n{text}", encoding=encoding)
        with pytest.raises(SettingsError, match=rf"can't be read: {reason}.*Save it as UTF-8"):
            read_settings(file)
