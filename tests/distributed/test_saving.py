"""Saving in the background keeps several processes in step, whatever the disk of one does."""

from __future__ import annotations

import pytest

from tests.distributed.launch import flat, outcome_of


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_save_in_the_background_as_one_does_and_hear_of_failures_together(tmp_path):
    one = outcome_of(tmp_path / "one", "saving.py")
    two = outcome_of(tmp_path / "two", "saving.py", 2)
    assert (len(one["errors"]), len(two["errors"])) == (1, 2)
    assert flat(two["weights"]) == pytest.approx(flat(one["weights"]), abs=1e-6)
    for outcome in (one, two):
        assert outcome["states"] == ["final", "update_00000012"]
        assert outcome["problems"] == [[], []]
        assert outcome["updates"] == 12  # the run went on
        assert len(outcome["warnings"]) == 1
        assert outcome["left"] == []  # the run has ended before the next state
    assert one["errors"] == ["OSError: [Errno 28] No space left on device"]
    assert two["errors"][0] == one["errors"][0]
    assert two["errors"][1].startswith("OtherProcessError: Another process has failed: OSError(28")
