"""DeepSpeed itself on the CPU: every ZeRO stage gives the results of a plain run."""

from __future__ import annotations

import importlib.util

import pytest

from tests.deepspeed.engines import check_export, check_numbers, outcome_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="deepspeed isn't installed"
    ),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("deepspeed") / "plain", "none")


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_a_zero_stage_gives_the_results_of_a_plain_run(plain, stage, tmp_path):
    two = tmp_path / "two"
    check_numbers(outcome_of(two, stage, 2), plain)
    # Stage 0 has no shards, so any number of processes may resume.
    others = () if stage == "0" else (two / "state",)
    check_numbers(outcome_of(tmp_path / "one", stage, 1, *others), plain)
    check_export(two, plain, is_sharded=stage != "0")
