"""Several processes have the values of one, even where some of them have no sample at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import flat
from tests.warm import run_warm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def outcome(file: Path, processes: int | None = None) -> dict:
    run_warm(Path(__file__).with_name("processes.py"), file, processes=processes)
    return json.loads(file.read_text())


def test_two_processes_have_the_values_of_one(tmp_path):
    alone = outcome(tmp_path / "one.json")
    together = outcome(tmp_path / "two.json", 2)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert flat(together[name]) == pytest.approx(flat(value), abs=1e-6), name
