"""A file that isn't a checkpoint is reported as such, and changes nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pa_core import TrainerCallback
from pa_core.callbacks import SaveBestModelCallback
from pa_core.errors import CheckpointError
from pa_core.testing import tiny_data, tiny_trainer
from tests.helpers import assert_identical, weights_of


def _saved(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


def _save_half(path: Path) -> None:
    torch.save({"a": torch.zeros(999)}, path)
    path.write_bytes(path.read_bytes()[:500])


CONTENTS = {
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Path("x"))),
    "a whole model": _saved(torch.nn.Linear(1, 1)),
    "half a file": _save_half,
    "a bare state": _saved({"weight": torch.zeros(1)}),
    "a tensor": _saved(torch.zeros(3)),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_it_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    CONTENTS[content](file)
    trainer = tiny_trainer()
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match=r"model\.pt isn't a checkpoint file") as caught:
        trainer.load_checkpoint(file)
    assert "weights_only" not in str(caught.value)
    assert_identical(weights_of(trainer), before)


def test_a_training_state_is_recognised(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    with pytest.raises(CheckpointError, match="is a training state.*load_training_state"):
        trainer.load_checkpoint(tmp_path / "state")


def test_a_missing_file_is_named_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        tiny_trainer().load_checkpoint(tmp_path / "missing.pt")


@pytest.mark.parametrize("content", ["nothing", "text", "half a file", "a tensor"])
def test_a_run_whose_best_model_was_replaced_ends_without_it(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "best.pt"

    class Replaces(TrainerCallback):
        def on_training_run_end(self, trainer: object) -> None:
            file.unlink()
            CONTENTS[content](file)

    best = SaveBestModelCallback(file, watch_metric="train_loss_epoch")
    trainer = tiny_trainer(Replaces(), best)
    trainer.train(tiny_data(8), 2)
    assert trainer.stop_reason is None
    assert "The best model is not loaded" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["optimizer", "scheduler", "model"])
def test_a_file_that_is_refused_changes_nothing(other: str, tmp_path: Path) -> None:
    class Counts(torch.optim.lr_scheduler.StepLR):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if "gamma" not in state_dict:
                raise ValueError("another scheduler")
            super().load_state_dict(state_dict)

    def trained(epochs: int) -> Any:
        trainer = tiny_trainer()
        trainer.optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.1)
        trainer.train(
            tiny_data(8), epochs, create_scheduler_fn=partial(Counts, step_size=1, gamma=0.5)
        )
        return trainer

    file, trainer = tmp_path / "model.pt", trained(2)
    trained(1).save_checkpoint(file)
    content = torch.load(file, weights_only=True)
    if other == "optimizer":
        content["optimizer_state_dict"]["param_groups"] *= 2
    elif other == "scheduler":
        del content["scheduler_state_dict"]["gamma"]
    else:
        name = [*content["model_state_dict"]][-1]
        content["model_state_dict"][name] = torch.zeros(1, 1, 1)
    torch.save(content, file)

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.tolist() if isinstance(value, torch.Tensor) else deepcopy(value)

    def everything() -> Any:
        parts = (trainer.model, trainer.optimizer, trainer.scheduler)
        return [plain(part.state_dict()) for part in parts]

    before, group = everything(), trainer.optimizer.param_groups[0]
    with pytest.raises((ValueError, RuntimeError)):
        trainer.load_checkpoint(file)
    assert everything() == before
    assert trainer.optimizer.param_groups[0] is group  # a scheduler or the user may hold it
