"""Real DeepSpeed on the CPU: every ZeRO stage gives the numbers of a plain run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import environment, flat, torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed"
    ),
]


def started(folder: Path, stage: str, processes: int) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    deepspeed = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    return subprocess.run(
        [
            sys.executable,
            *(torchrun(processes) if stage != "none" else ()),
            str(Path(__file__).with_name("run.py")),
            stage,
            str(folder),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment(**deepspeed if stage != "none" else {}),
    )


def outcome_of(folder: Path, stage: str) -> dict[str, Any]:
    done = started(folder, stage, 1)
    assert done.returncode == 0, done.stderr[-6000:]
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return outcome


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("deepspeed") / "plain", "none")


@pytest.mark.parametrize("stage", range(4))
def test_a_zero_stage_gives_the_numbers_of_a_plain_run(plain, stage, tmp_path):
    outcome = outcome_of(tmp_path / "zero", str(stage))
    assert outcome.keys() == plain.keys()
    for name, value in outcome.items():
        assert flat(value) == pytest.approx(flat(plain[name]), abs=2e-6), name


def test_processes_that_accelerate_does_not_connect_are_told_rather_than_left_alone(tmp_path):
    done = started(tmp_path / "two", "1", 2)
    assert done.returncode != 0
    assert "2 processes were started, and accelerate connects 1 of them" in done.stderr
