"""Several processes have the values of one, even where some of them have no sample at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import environment, flat, torchrun

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def outcome(file: Path, *launcher: str) -> dict:
    script = Path(__file__).with_name("processes.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, str(script), str(file)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment(PYTHONWARNINGS="ignore"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(file.read_text())


def test_two_processes_have_the_values_of_one(tmp_path):
    alone = outcome(tmp_path / "one.json")
    together = outcome(tmp_path / "two.json", *torchrun(2))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert flat(together[name]) == pytest.approx(flat(value), abs=1e-6), name
