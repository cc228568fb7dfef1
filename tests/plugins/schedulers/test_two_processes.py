"""Two processes with half the batch each give the same schedules and suggestion as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.warm import run_warm


def outcomes(folder: Path, processes: int | None = None) -> list[dict]:
    folder.mkdir()
    run_warm(
        Path(__file__).with_name("two_processes.py"), folder, processes=processes, folder=folder
    )
    return [json.loads(path.read_text()) for path in sorted(folder.glob("outcome-*.json"))]


@pytest.mark.distributed
@pytest.mark.slow
def test_fault_a11_schedulers_are_as_long_as_the_run_on_any_number_of_processes(tmp_path):
    (one,) = outcomes(tmp_path / "one")
    first, second = outcomes(tmp_path / "two", 2)
    assert first == second
    for name in ("cosine", "one_cycle", "timm", "plateau", "lrs"):
        assert first[name] == pytest.approx(one[name]), name
    for name in ("losses", "weight"):
        assert first[name] == pytest.approx(one[name], rel=1e-4), name
    assert len(one["cosine"]) == 12
    assert max(one["cosine"]) == one["cosine"][6] == 0.01
    assert len(one["lrs"]) < 40  # every process has stopped when the loss grew
