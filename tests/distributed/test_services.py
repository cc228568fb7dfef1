"""What a trainer offers to plugins, by value, on two processes."""

from __future__ import annotations

import pytest

from tests.distributed.launch import flat, outcome_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("services") / "one", "services.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("services") / "two", "services.py", 2)


def test_collectives_give_every_process_the_same(two):
    assert two["ranks"] == [0, 1]
    assert two["sum"] == [[[3.0, 30.0], [1.0, 10.0]], [[3.0, 30.0], [2.0, 20.0]]]
    assert two["largest"] == [[1, 0], [1, 0]]
    assert two["whole"]
    whole, number, strided = [[0, 0], [0, 0]], 10.0, [[0.0, 2.0], [1.0, 3.0]]
    assert two["broadcast"] == [[whole, number, strided]] * 2


def test_an_action_that_fails_on_one_process_raises_on_all(one, two):
    assert one["results"] == two["results"] == 5
    assert one["failures"] == []
    own, other = two["failures"][1], two["failures"][0]
    assert own == "ZeroDivisionError: on rank 1"
    assert other.startswith("OtherProcessError: Another process has failed")


def test_each_process_gets_its_batches_once_more_padding_included(one, two):
    for outcome in (one, two):
        for data in ("batches", "ready"):
            assert outcome[data]["again"] == outcome[data]["seen"]
    assert two["batches"]["num_batches"] == two["ready"]["num_batches"] == [2, 2]
    for data in ("batches", "ready"):
        padding = [[is_padding for is_padding, _ in rank] for rank in two[data]["seen"]]
        assert padding == [[False, False], [False, True]]


def test_a_trial_trains_on_all_processes_or_on_each_alone(one, two):
    assert two["trials"]["together"] == [[2, 2], [2, 2]]
    assert flat(two["trials"]["weights"]) == pytest.approx(flat(one["trials"]["weights"]), abs=1e-6)
    assert two["trials"]["alone"] == [[1, 0, "trained", 4, True], [1, 0, "failed", 2, True]]


def values_of(metric, told):
    return [value for name, value in told if name == metric]


def test_a_metric_of_the_main_process_decides_on_every_process(one, two):
    (alone,) = one["watched"]
    told, updates, reason, best = alone[0]
    assert values_of("fid", told) == [9.0, 1.0, 2.0]
    assert (updates, best) == (12, 1.0)
    assert "fid has not improved on 1.0" in reason
    assert two["watched"][0] == two["watched"][1]
    (again, updates_of_two, reason_of_two, best_of_two), weights = two["watched"][0]
    assert [updates_of_two, reason_of_two, best_of_two] == [updates, reason, best]
    for metric in ("fid", "intermediate_eval_loss"):
        assert values_of(metric, again) == pytest.approx(values_of(metric, told), abs=2e-6)
    assert flat(weights) == pytest.approx(flat(alone[1]), abs=1e-6)


def test_a_watched_metric_that_the_main_process_does_not_record_raises_on_all(two):
    assert two["unwatched"][0] == two["unwatched"][1]
    assert "'fid', which was recorded on rank 1 and not on the main process" in two["unwatched"][0]
