"""Start a run under an engine, and compare its results with those of a plain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pa_core.errors import TrainingStateError
from tests.deepspeed.run import listed, new_trainer, train
from tests.distributed.launch import flat, read_outcome
from tests.helpers import NoisyModel, tiny_data
from tests.warm import run_warm


def outcome_of(
    folder: Path, engine: str, processes: int = 1, *others: Path, on_gpu: bool = False
) -> dict[str, Any]:
    """Run on this many processes; `others` are training states that must be refused."""
    folder.mkdir()
    environment = {"ON_GPU": "true"} if on_gpu else {}
    if engine.isdigit():
        environment |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    world_size = None if engine == "none" else processes
    script = Path(__file__).with_name("run.py")
    run_warm(script, engine, folder, *others, processes=world_size, **environment)
    return read_outcome(folder)


def check_numbers(outcome: dict[str, Any], plain: dict[str, Any]) -> None:
    """Check that the results equal those of the plain run, up to rounding."""
    assert outcome.keys() <= plain.keys()
    assert plain.keys() - outcome.keys() <= {"unlabelled", "infinite"}  # not under DeepSpeed
    for name, value in outcome.items():
        assert flat(value) == pytest.approx(flat(plain[name]), abs=2e-6), name


def check_export(folder: Path, plain: dict[str, Any], *, is_sharded: bool) -> None:
    """A plain trainer loads the weights and a state, and refuses to resume from shards."""
    trainer = new_trainer("none")
    trainer.load_checkpoint(folder / "model.pt")
    assert flat(listed(trainer)) == pytest.approx(flat(plain["weights"]), abs=2e-6)
    trainer = new_trainer("none", model=NoisyModel())
    if is_sharded:
        with pytest.raises(
            TrainingStateError, match=r"optimizer's state: divided by .* → whole\. A shard"
        ):
            train(trainer, 4, resume_from=folder / "end")
        with pytest.warns(UserWarning, match="The optimizer is not restored: .* divided by"):
            trainer.load_training_state(folder / "end")
    else:
        trainer.load_training_state(folder / "end")
    assert trainer.run_history.get_metric_values("eval_loss_epoch")[-1] == pytest.approx(
        trainer.evaluate(tiny_data(7))["evaluation_loss"], abs=2e-6
    )
