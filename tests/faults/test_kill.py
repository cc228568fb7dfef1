"""A run that is killed at any instants and restarted ends as one that was never killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import environment


def campaign(*options: str) -> dict:
    """The results of `kill.py`, run in a new process that forks before there are threads."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill.py")), *options],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=environment(),
    )
    assert done.returncode in (0, 1), done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout}


@pytest.mark.slow
@pytest.mark.distributed
def test_no_kill_at_any_instant_loses_anything():
    found = campaign("--kills", "24", "--seed", "1")
    assert found["lost"] == 0, found["output"]
    assert found["kills"] >= 24  # (each was seen to end every process by its signal)
    assert found["inside_saves"] >= 3
    assert {trial["config"] for trial in found["trials"]} == {"plain", "workers", "two"}
    assert found["repeated"] <= 4  # two intervals: from the state before the interrupted one


@pytest.mark.slow
def test_the_campaign_notices_a_build_that_loses_its_position():
    found = campaign("--configs", "plain", "--kills", "2", "--seed", "1", "--broken", "cursor")
    assert found["lost"] == 1
    assert "LOST: python tests/faults/kill.py --configs plain --trial" in found["output"]
