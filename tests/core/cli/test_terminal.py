"""What the command line shows in a terminal, a pseudo-terminal of so many columns."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import runpy
import struct
import sys
import termios
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from pa_core.cli.console import console, print_table
from tests import warm
from tests.core.cli.test_app import Shell

LONG = "a_plugin_of_somebody_else_with_a_name_of_fifty_one_"
PACKAGE = "pa-a-distribution-with-a-rather-long-name"
SETTINGS = f"""
[tool.pa-core]
plugins = ["{LONG}", "early_stopping:loss"]
disable = ["progress_table"]

[tool.pa-core.{LONG}]
words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
my_password = "hidden"
innocent = "concealed"

[tool.pa-core.trainer]
seed = 3
"""
PLUGIN = """
from typing import Optional
from pydantic import BaseModel, SecretStr
from pa_core import hookimpl

Hidden = Optional[SecretStr]

class Base(BaseModel):
    words: list[str] = []
    innocent: Hidden = None

class Plugin:
    class Settings(Base):
        my_password: str = ""
        depth: int = 3

    def __init__(self, settings): ...

    @hookimpl
    def on_train_epoch_end(self, trainer): ...
"""


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path)
    shell.site.module("pa_long", PLUGIN)
    shell.site.install(PACKAGE, "10.20.30rc1", **{LONG: "pa_long:Plugin"})
    shell.settings(SETTINGS)
    return shell


def _run(arguments: list[str], terminal: str, folder: Path, environment: dict[str, str]) -> None:
    tty = os.open(terminal, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(tty, stream)
    os.close(tty)
    # The streams of a forked process were opened on other files.
    sys.stdin, sys.stdout, sys.stderr = (open(n, m) for n, m in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["pa", *arguments]
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    try:
        runpy.run_module("pa_core", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def lines_in_terminal(shell: Shell, columns: int, *arguments: str, **more: str) -> list[str]:
    """The lines that the command shows, without colours."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {key: os.environ[key] for key in os.environ if key not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(shell.site.folder), **more}
    process = warm._CONTEXT.Process(
        target=_run, args=([*arguments], os.ttyname(slave), shell.folder, environment)
    )
    process.start()
    parts = []
    while master in (ready := wait([master, process.sentinel], 120)):
        parts.append(os.read(master, 65536))
    assert ready, "the command didn't end"
    process.join(60)
    os.close(slave)
    os.close(master)
    text = b"".join(parts).decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").splitlines()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_plugins_fits_with_all_names_and_packages_whole(shell, columns):
    rows = json.loads(shell.out("plugins", "--json"))["plugins"]
    lines = lines_in_terminal(shell, columns, "plugins")
    assert [line for line in lines if len(line) > columns] == []
    words = set(" ".join(lines).split())
    assert {row["name"] for row in rows} <= words
    assert {row["distribution"] for row in rows} <= words
    assert {"enabled", "disabled", "available", "10.20.30rc1"} <= words
    # Beside each other where there is room.
    (line,) = [line for line in lines if line.split()[:1] == [LONG]]
    assert (PACKAGE in line) == (columns == 120)


def test_hooks_and_settings_fit_too(shell):
    lines = lines_in_terminal(shell, 80, "plugins", "--hooks", "--settings")
    assert [line for line in lines if len(line) > 80] == []
    words = set(re.split(r"[\s,]+", " ".join(lines)))
    assert {LONG, PACKAGE, "pa_long:Plugin", "on_train_epoch_end", "on_watched_metric"} <= words
    text = " ".join(" ".join(lines).split())
    assert f"{LONG}.depth 3 default" in text
    assert "hidden" not in text
    assert "concealed" not in text


def test_explain_fits_and_has_short_paths(shell):
    lines = lines_in_terminal(shell, 80, "explain")
    assert [line for line in lines if len(line) > 80] == []
    text = "\n".join(lines)
    assert "pa_core/builtins/terminate_on_nan.py:" in text
    assert str(Path.cwd()) not in text
    assert str(shell.folder) not in text
    assert str(shell.site.folder) not in text


def test_settings_are_shown_with_where_each_comes_from_and_no_secret(shell, monkeypatch):
    monkeypatch.setenv("PA_CORE_SET", "trainer.seed=7\nearly_stopping:loss.watch_metric=accuracy")
    text = shell.out("plugins")
    rows = [line.split() for line in text.splitlines()]
    assert ["trainer.seed", "7", "PA_CORE_SET,", "overrides", "3"] in rows
    assert ["early_stopping:loss.watch_metric", "accuracy", "PA_CORE_SET"] in rows
    assert "'ten']" in text
    assert "hidden" not in text
    assert "concealed" not in text
    found = json.loads(shell.out("plugins", "--json", "--settings"))["settings"]
    by_key = {one["key"]: one for one in found}
    assert by_key["trainer.seed"] == {
        "key": "trainer.seed",
        "value": 7,
        "source": "PA_CORE_SET",
        "replaced": 3,
    }
    assert by_key["train.num_epochs"]["source"] == "default"
    assert by_key[f"{LONG}.words"]["source"] == "pyproject.toml"
    assert by_key[f"{LONG}.depth"]["value"] == 3


def test_a_table_folds_and_then_becomes_blocks(capsys, monkeypatch):
    rows = [["name_that_is_whole", "some words that may be folded", "x"]]
    for width, longest in ((80, 53), (40, 40), (20, 20)):
        out = console()
        out.width = width
        print_table(out, ("name", "text", "z"), rows)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= longest
        assert "name_that_is_whole" in shown
        assert "some words that may be folded".split() == [
            word for word in shown.split() if word in "some words that may be folded".split()
        ]
