"""CONTRIBUTING.md and the pre-commit hooks match the repository and its nox sessions."""

import os
import re
import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
NOXFILE = runpy.run_path(str(ROOT / "noxfile.py"))


def nox_commands(session: str) -> list[str]:
    """The commands that a nox session runs, as a shell would take them."""
    commands: list[str] = []

    def run(*command: str, env: Mapping[str, str] = MappingProxyType({})) -> None:
        variables = [f"{name}={value}" for name, value in env.items()]
        commands.append(" ".join([*(["env", *variables] if variables else []), *command]))

    recorder = SimpleNamespace(posargs=[], install=lambda *_: None, run=run)
    NOXFILE[session](recorder)
    return commands


def hooks() -> list[dict[str, Any]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [hook for repository in config["repos"] for hook in repository["hooks"]]


def test_the_pre_commit_hooks_run_the_commands_of_the_lint_session() -> None:
    entries = [hook["entry"].replace(":", os.pathsep) for hook in hooks()]
    assert entries == nox_commands("lint")


def test_the_pre_commit_hooks_check_the_whole_tree_with_the_installed_tools() -> None:
    for hook in hooks():
        assert hook["language"] == "system", hook["id"]
        assert hook["pass_filenames"] is False, hook["id"]


def test_ruff_refuses_to_run_in_another_version_than_the_dependency_groups() -> None:
    (ruff,) = [item for item in PROJECT["dependency-groups"]["lint"] if item.startswith("ruff")]
    assert ruff == f"ruff{PROJECT['tool']['ruff']['required-version']}"


def test_contributing_describes_each_folder_of_the_core() -> None:
    table = CONTRIBUTING.partition("**files are public and folders are internal**")[2]
    table = table.partition("\n\nImports")[0]
    folders = [path.parent.name for path in (ROOT / "pa_core").glob("*/__init__.py")]
    assert sorted(re.findall(r"^\| `(\w+)/` \|", table, re.MULTILINE)) == sorted(folders)


def test_contributing_names_only_sessions_of_nox() -> None:
    for name in re.findall(r"nox (?:-R )?-s (\w+)", CONTRIBUTING):
        assert name in NOXFILE, name


def test_no_test_is_skipped_for_want_of_a_package() -> None:
    """What tests import is in the dependency groups; DeepSpeed has a session of its own."""
    skipping = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"pytest\.importorskip|find_spec\(.*\) is None", path.read_text())
    ]
    assert skipping == ["tests/deepspeed/test_deepspeed.py"]
    assert '"--ignore=tests/deepspeed"' in (ROOT / "noxfile.py").read_text()
