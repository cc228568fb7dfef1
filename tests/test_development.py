"""What contributors run by hand, before a commit and in nox are the same commands."""

import runpy
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def nox_commands(session: str) -> list[str]:
    """The commands that a nox session runs."""
    commands: list[str] = []
    recorder = SimpleNamespace(
        posargs=[],
        install=lambda *_, **__: None,
        run=lambda *command, **_: commands.append(" ".join(command)),
    )
    runpy.run_path(str(ROOT / "noxfile.py"))[session](recorder)
    return commands


def hooks() -> list[dict[str, Any]]:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [hook for repository in config["repos"] for hook in repository["hooks"]]


def test_the_pre_commit_hooks_run_the_commands_of_the_lint_session() -> None:
    assert [hook["entry"] for hook in hooks()] == nox_commands("lint")


def test_the_pre_commit_hooks_check_the_whole_tree_with_the_installed_tools() -> None:
    for hook in hooks():
        assert hook["language"] == "system", hook["id"]
        assert hook["pass_filenames"] is False, hook["id"]


def test_ruff_refuses_to_run_in_another_version_than_the_dependency_groups() -> None:
    (ruff,) = [item for item in PROJECT["dependency-groups"]["lint"] if item.startswith("ruff")]
    assert ruff == f"ruff{PROJECT['tool']['ruff']['required-version']}"
