"""One, two and three processes give the same results, and stop together."""

from __future__ import annotations

import pytest

from tests.distributed.launch import flat, outcome_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("exact") / "one", "exact.py")


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_results_of_one(alone, processes, tmp_path):
    together = outcome_of(tmp_path / "several", "exact.py", processes)
    assert alone.keys() - together.keys() <= {name for name in alone if name.startswith("gathered")}
    for name, value in together.items():
        assert flat(value) == pytest.approx(flat(alone[name]), abs=1e-6), name
