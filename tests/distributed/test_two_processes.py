"""Two processes with half the batch each give the results of one process."""

from __future__ import annotations

import pytest

from tests.distributed.launch import flat, outcome_of
from tests.event_scenarios import golden


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_train_evaluate_predict_save_and_resume_as_one_does(tmp_path):
    one = outcome_of(tmp_path / "one", "run.py")
    two = outcome_of(tmp_path / "two", "run.py", 2)
    for name in ("weights", "unfrozen", "train", "eval", "predictions", "frozen", "static graph"):
        assert flat(two[name]) == pytest.approx(flat(one[name]), abs=1e-6), name
    without, (note,) = one["unused"], two["unused"]["notes"]
    assert flat(two["unused"]["weights"]) == pytest.approx(flat(without["weights"]), abs=1e-6)
    assert "On rank 0, more.weight, more.bias got no gradient" in note
    assert without["notes"] == []
    first, second = two["running_means"]
    assert first == second != [0.0] * 6  # though each has seen other samples
    assert two["reductions"] == [6, 6]  # one for each update of two micro-batches
    title = "padding batch on two processes, rank"
    assert two["events"] == [golden()[f"{title} {rank}"] for rank in (0, 1)]
    assert one["gathered"] == [0.0]
    assert two["gathered"] == [0.0, 1.0, 1.0]
