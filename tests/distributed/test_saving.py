"""Saving in the background keeps processes in step, even if the disk of one fails."""

from __future__ import annotations

import pytest

from tests.distributed.launch import flat, outcome_of


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_save_in_the_background_as_one_does_and_share_failures(tmp_path):
    one = outcome_of(tmp_path / "one", "saving.py")
    two = outcome_of(tmp_path / "two", "saving.py", 2)
    assert (len(one["errors"]), len(two["errors"])) == (1, 2)
    assert flat(two["weights"]) == pytest.approx(flat(one["weights"]), abs=1e-6)
    for outcome in (one, two):
        assert outcome["states"] == ["final", "update_00000012"]
        assert outcome["problems"] == [[], []]
        assert outcome["updates"] == 12  # the run continued
        assert len(outcome["warnings"]) == 1
        assert outcome["left"] == []  # the run ended before the next training state
        assert "in use by another run" in outcome["all_refused"][0]
        assert len(set(outcome["runs"])) == 1
    assert two["all_refused"][1].startswith("OtherProcessError: Another process has failed")
    assert one["errors"] == ["OSError: [Errno 28] No space left on device"]
    assert two["errors"][0] == one["errors"][0]
    assert two["errors"][1].startswith("OtherProcessError: Another process has failed: OSError(28")
