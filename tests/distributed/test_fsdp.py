"""FSDP2 through accelerate's plugin, on two CPU processes, gives the results of a plain run."""

from __future__ import annotations

import pytest

from tests.deepspeed.engines import check_export, check_numbers, outcome_of

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_a_sharded_model_gives_the_results_of_a_plain_run(tmp_path):
    plain = outcome_of(tmp_path / "plain", "none")
    two = tmp_path / "two"
    check_numbers(outcome_of(two, "fsdp", 2), plain)
    check_numbers(outcome_of(tmp_path / "three", "fsdp", 1, two / "state"), plain)
    check_export(two, plain, is_sharded=True)


@pytest.mark.gpu
def test_a_gpu_gives_the_results_of_a_plain_run(tmp_path):
    plain = outcome_of(tmp_path / "plain", "none", on_gpu=True)
    one = tmp_path / "one"
    check_numbers(outcome_of(one, "fsdp", on_gpu=True), plain)
    check_export(one, plain, is_sharded=True)
