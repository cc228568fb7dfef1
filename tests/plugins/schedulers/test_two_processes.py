"""Two processes of half the batch have the schedules, and find the learning rate, of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def outcomes(folder: Path, *launcher: str) -> list[dict]:
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(Path(__file__).with_name("two_processes.py"))
    done = subprocess.run(
        [sys.executable, *launcher, script, str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("outcome-*.json"))]


@pytest.mark.distributed
@pytest.mark.slow
def test_fault_a11_schedules_are_as_long_as_the_run_on_any_number_of_processes(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    (one,) = outcomes(tmp_path / "one")
    first, second = outcomes(tmp_path / "two", *torchrun)
    assert first == second
    for name in ("cosine", "one_cycle", "timm", "plateau", "lrs"):
        assert first[name] == pytest.approx(one[name]), name
    for name in ("losses", "weight"):
        assert first[name] == pytest.approx(one[name], rel=1e-4), name
    assert len(one["cosine"]) == 12
    assert max(one["cosine"]) == one["cosine"][6] == 0.01
    assert len(one["lrs"]) < 40  # all have stopped where the loss grows
