"""Two processes of half the batch give the numbers of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def outcome_of(folder: Path, *launcher: str) -> dict:
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("run.py")), str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "outcome.json").read_text())


def flat(value) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [number for item in value for number in flat(item)] if isinstance(value, list) else [value]
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_evaluate_predict_save_and_resume_as_one_does(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    one, two = outcome_of(tmp_path / "one"), outcome_of(tmp_path / "two", *torchrun)
    for name in ("weights", "unfrozen", "train", "eval", "predictions"):
        assert flat(two[name]) == pytest.approx(flat(one[name]), abs=1e-6), name
    assert one["gathered"] == [0.0]
    assert two["gathered"] == [0.0, 1.0, 1.0]
