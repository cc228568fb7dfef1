"""Several processes log one run, with the same records as one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.tracking.runs import points, rows, table
from tests.warm import run_warm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def run(folder: Path, processes: int | None = None) -> Path:
    run_warm(Path(__file__).with_name("processes.py"), folder, processes=processes)
    return folder


def test_two_processes_log_one_run_with_the_records_of_one(tmp_path):
    one = run(tmp_path / "one")
    two = run(tmp_path / "two", 2)
    assert len(list(two.glob("done-*"))) == 2
    names = sorted(path.name for path in (two / "pa-core").iterdir())
    assert names == ["csv", "jsonl", "parts"]
    for name, read in {"csv": table, "jsonl": rows, "parts": rows}.items():
        alone, together = points(read(one, name)), points(read(two, name))
        assert [point[:2] for point in together] == [point[:2] for point in alone]
        values = [point[2] for point in alone]
        assert [point[2] for point in together] == pytest.approx(values, abs=1e-5), name
    assert [row["update"] for row in rows(two, "parts")] == [2, 4, 6, 8, 10, 12]
