"""Several processes have the values of one, even if some have no samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import flat
from tests.warm import run_warm

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SCRIPT = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The values of one process and of two, which also resume training states of the one."""
    folder = tmp_path_factory.mktemp("metrics")
    run_warm(SCRIPT, folder / "one")
    run_warm(SCRIPT, folder / "two", folder / "one.states", processes=2)
    return [
        json.loads((folder / name).read_text())
        for name in ("one.0.json", "two.0.json", "two.1.json")
    ]


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert flat(found[name]) == pytest.approx(flat(value), abs=1e-6), name


@pytest.mark.parametrize("part", ["trained", "evaluated", "in unlike groups"])
def test_two_processes_have_the_values_of_one(outcomes, part):
    alone, *together = outcomes
    for process in together:
        assert_same(process[part], alone[part])


def test_padding_batches_are_not_counted(outcomes):
    for process in outcomes:
        for matrix in process["trained"]["train_confusion_matrix"]:
            assert sum(flat(matrix)) == 25


@pytest.mark.parametrize("step", [1, 3])
def test_a_training_state_of_one_process_counts_once_on_two(outcomes, step):
    alone, *together = outcomes
    for process in together:
        assert_same(process[f"resumed after {step}"], alone["trained"])


def test_metrics_that_agree_only_on_the_first_batch_stay_separate(outcomes):
    for process in outcomes:
        found = process["in unlike groups"]
        assert (found["top1"], found["top2"]) == pytest.approx((2 / 3, 1))


def test_windows_of_updates_are_an_error_on_several_processes(outcomes):
    alone, *together = outcomes
    assert alone["refused"] is None
    for process in together:
        assert "'running'" in process["refused"]
