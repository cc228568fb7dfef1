"""Train, evaluate, predict and save with or without DeepSpeed, and write what came out as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pa_core import Trainer
from tests.helpers import tiny_data, tiny_model, weights_of

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


class Tokens(Trainer):
    """Counts items of its own: the class of a sample plus one."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        outputs, weight = self.model(x), (y + 1).float()
        loss = (nn.functional.cross_entropy(outputs, y, reduction="none") * weight).sum()
        items = weight.sum()
        output = {"loss": loss / items, "model_outputs": outputs, "batch_size": len(x)}
        return output | {"num_items_in_batch": items}


def new_trainer(stage: int | None, cls: type[Trainer] = Trainer) -> Trainer:
    model = tiny_model()
    options: dict[str, Any] = {"cpu": True}
    if stage is not None:
        from accelerate.utils import DeepSpeedPlugin

        options = {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=stage)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return cls(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=(), accelerator=options
    )


def train(trainer: Trainer, epochs: int, **options: Any) -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)

    trainer.train(
        tiny_data(45),  # the last batch is short
        epochs,
        eval_dataset=tiny_data(7),
        per_device_batch_size=8 // PROCESSES,
        create_scheduler_fn=schedule,
        **options,
    )


def main(stage: int | None, folder: Path) -> None:
    trainer = new_trainer(stage)
    train(trainer, 2, gradient_accumulation_steps=2, gradient_clip_norm=0.5)
    train(trainer, 1, reset_run_history=False)  # without clipping, and on from there
    trainer.save_checkpoint(folder / "model.pt", save_optimizer=False, save_scheduler=False)
    content = torch.load(folder / "model.pt", weights_only=True)["model_state_dict"]
    history = trainer.run_history
    outcome: dict[str, Any] = {
        "weights": {name: value.tolist() for name, value in content.items()},
        "train": history.get_metric_values("train_loss_epoch"),
        "eval": history.get_metric_values("eval_loss_epoch"),
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "evaluated": trainer.evaluate(tiny_data(9), per_device_batch_size=2),
        "predictions": trainer.predict(tiny_data(9), per_device_batch_size=2).tolist(),
    }
    tokens = new_trainer(stage, Tokens)
    train(tokens, 1)
    tokens.save_checkpoint(folder / "tokens.pt", save_optimizer=False, save_scheduler=False)
    content = torch.load(folder / "tokens.pt", weights_only=True)["model_state_dict"]
    outcome["tokens"] = {name: value.tolist() for name, value in content.items()}
    if stage == 0:
        trainer = new_trainer(stage)
        train(trainer, 1)
        trainer.save_training_state(folder / "state")
        resumed, whole = new_trainer(stage), new_trainer(stage)
        train(resumed, 2, resume_from=folder / "state")
        train(whole, 2)
        first, second = weights_of(resumed), weights_of(whole)
        assert all(torch.equal(first[name], second[name]) for name in first)
    if stage is not None:
        import pytest

        with pytest.raises(ValueError, match="by norm alone"):
            train(new_trainer(stage), 1, gradient_clip_value=0.1)
    if trainer.is_main_process:
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(None if sys.argv[1] == "none" else int(sys.argv[1]), Path(sys.argv[2]))
