"""Train, evaluate, predict, save and resume under an engine, and write the results as JSON.

The engine is ``none``, a ZeRO stage of DeepSpeed, or ``fsdp``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.callbacks import SaveBestModelCallback, TerminateOnNaNCallback
from pa_core.errors import TrainingStateError
from tests.helpers import NoisyModel, assert_identical, tiny_data, tiny_model

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
ON_GPU = "ON_GPU" in os.environ


class Tokens(Trainer):
    """Counts custom items: each sample has its class plus one."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        outputs, weight = self.model(x), (y + 1).float()
        loss = (nn.functional.cross_entropy(outputs, y, reduction="none") * weight).sum()
        items = weight.sum()
        output = {"loss": loss / items, "model_outputs": outputs, "batch_size": len(x)}
        return output | {"num_items_in_batch": items}


class Labelled(Trainer):
    """The mean over labelled samples; of none it is NaN, and so are its gradients."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        outputs, items = self.model(x), (y >= 0).sum()
        loss = nn.functional.cross_entropy(outputs, y, reduction="sum", ignore_index=-100) / items
        output = {"loss": loss, "model_outputs": outputs, "batch_size": len(x)}
        return output | {"num_items_in_batch": items}


class InfiniteAtLast(TrainerCallback):
    """Makes gradients infinite on the last process, before its third update."""

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        if trainer.updates == 2 and trainer.rank == PROCESSES - 1:
            gradient = next(trainer.model.parameters()).grad
            getattr(gradient, "_local_tensor", gradient).fill_(float("inf"))


class SavesOnce:
    """Saves a training state within the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == 5:
            trainer.control.save(self.folder)


def fsdp_accelerator() -> Accelerator:
    """An accelerator for FSDP, which accelerate would set up by itself only on GPUs."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=not ON_GPU, fsdp_plugin=plugin)
    if not ON_GPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def new_trainer(
    engine: str,
    cls: type[Trainer] = Trainer,
    model: nn.Module | None = None,
    callbacks: tuple[Any, ...] = (),
    configuration: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    model = tiny_model() if model is None else model
    accelerator: Any = {"cpu": not ON_GPU}
    if engine == "fsdp":
        accelerator = fsdp_accelerator()
    elif engine != "none":
        from accelerate.utils import DeepSpeedPlugin

        plugin = DeepSpeedPlugin(zero_stage=int(engine), **configuration or {})
        accelerator = {"deepspeed_plugin": plugin}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return cls(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=callbacks,
        plugins=(),
        accelerator=accelerator,
        **options,
    )


def train(trainer: Trainer, epochs: int, **options: Any) -> Trainer:
    def scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)

    trainer.train(
        tiny_data(45),  # the last batch is incomplete
        epochs,
        eval_dataset=tiny_data(7),
        per_device_batch_size=8 // PROCESSES,
        create_scheduler_fn=scheduler,
        **options,
    )
    return trainer


def numbers(engine: str, folder: Path) -> dict[str, Any]:
    """The results that are compared with those of a plain run."""
    trainer = new_trainer(engine)
    sharded_by = {"none": None, "fsdp": "FSDP"}.get(engine, "DeepSpeed")
    assert trainer.sharded_by == sharded_by
    assert trainer.has_whole_gradients == (sharded_by is None)
    if sharded_by == "DeepSpeed":
        refuse_what_looks_at_gradients(engine)
    if sharded_by is not None:
        refuse_freezing(engine, sharded_by)
    try_something(trainer)  # changes none of the results below
    train(trainer, 2, gradient_accumulation_steps=2, gradient_clip_norm=0.5)
    try_something(trainer)
    train(trainer, 1, reset_run_history=False)  # continues, without clipping
    trainer.save_checkpoint(folder / "model.pt", save_optimizer=False, save_scheduler=False)
    history = trainer.run_history
    ready = DataLoader(tiny_data(5), batch_size=2)  # three batches: uneven on two processes
    outcome: dict[str, Any] = {
        "weights": listed(trainer),
        "train": history.get_metric_values("train_loss_epoch"),
        "eval": history.get_metric_values("eval_loss_epoch"),
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "evaluated": [trainer.evaluate(tiny_data(n), per_device_batch_size=2) for n in (9, 5, 1)],
        "ready": trainer.evaluate(ready),
        "predictions": [
            trainer.predict(data, per_device_batch_size=2).tolist()
            for data in (tiny_data(9), tiny_data(1), ready)
        ],
        "tokens": listed(train(new_trainer(engine, Tokens), 1)),
        "clipped": listed(clipped(engine)),
    }
    if sharded_by != "DeepSpeed":
        outcome["unlabelled"] = listed(unlabelled(engine))
        outcome["infinite"] = listed(stopped(engine))
    # Restores the best epoch at the end, and continues from it.
    best = SaveBestModelCallback(
        folder / "best.pt",
        "train_loss_epoch",
        greater_is_better=True,
        save_optimizer=False,
        save_scheduler=False,
    )
    trainer = train(new_trainer(engine, callbacks=(best,)), 2)
    outcome["best"] = listed(trainer)
    outcome["on"] = listed(train(trainer, 1))
    return outcome


def try_something(trainer: Trainer) -> None:
    """A trial run, before the first run or between two."""
    if trainer.sharded_by == "DeepSpeed":
        with pytest.raises(ValueError, match="no trial runs under DeepSpeed"), trainer.trial():
            pass
        return
    with trainer.trial() as probe:
        train(probe, 1, gradient_clip_norm=0.5)
        assert probe.updates == 6
    if trainer.sharded_by == "FSDP":
        with (
            pytest.raises(ValueError, match="can't train alone: FSDP shards"),
            trainer.trial(alone=True),
        ):
            pass


def refuse_what_looks_at_gradients(engine: str) -> None:
    """DeepSpeed keeps its gradients to itself."""

    class Looks(TrainerCallback):
        def on_gradients_ready(self, trainer: Trainer) -> None:
            raise AssertionError("the gradients can't be seen")

    class Repeats(TrainerCallback):
        needs_recompute = True

    for callback, reason in ((Looks(), "on_gradients_ready"), (Repeats(), "needs_recompute")):
        with pytest.raises(ValueError, match=rf"in its own update.*\({reason}\)"):
            train(new_trainer(engine, callbacks=(callback,)), 1)


def refuse_freezing(engine: str, sharded_by: str) -> None:
    """A sharded model can't follow parameters that are frozen within a run."""

    class AtEpoch(TrainerCallback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            trainer.get_model()[0].requires_grad_(False)

    class AtStep(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer) -> None:
            trainer.get_model()[0].requires_grad_(False)

    words = rf"{sharded_by} has prepared the model .* 0.bias, 0.weight can't be frozen, unfrozen"
    for callback in (AtEpoch(), AtStep()):
        trainer = new_trainer(engine, callbacks=(callback,))
        with pytest.raises(ValueError, match=words):
            train(trainer, 1)
        assert trainer.updates == isinstance(callback, AtStep)


def clipped(engine: str) -> Trainer:
    """A run with clipping from DeepSpeed's configuration, or from `train` for other engines."""
    if not engine.isdigit():
        return train(new_trainer(engine), 1, gradient_clip_norm=0.1)
    settings = {"gradient_clipping": 0.1, "gradient_accumulation_steps": 3}
    trainer = new_trainer(engine, configuration=settings)
    with pytest.warns(UserWarning, match="steps=3; train.. overrides it with 1"):
        return train(trainer, 1)


def unlabelled(engine: str) -> Trainer:
    """A run in which processes, micro-batches and a whole batch have no label."""
    x, y = tiny_data(45).tensors
    y = y.clone()
    for rows in (slice(4, 8), slice(8, 12), slice(16, 32)):
        y[rows] = -100
    trainer = new_trainer(engine, Labelled, callbacks=(TerminateOnNaNCallback(),))
    trainer.train(
        TensorDataset(x, y),
        1,
        per_device_batch_size=8 // PROCESSES,
        gradient_accumulation_steps=2,
        train_dataloader_kwargs={"shuffle": False},
    )
    assert (trainer.updates, trainer.stop_reason) == (3, None)
    return trainer


def stopped(engine: str) -> Trainer:
    """A run that infinite gradients in the shards of one process stop."""
    guard = TerminateOnNaNCallback()
    trainer = train(new_trainer(engine, callbacks=(InfiniteAtLast(), guard)), 1)
    assert "gradients are NaN or infinite" in str(trainer.stop_reason)
    assert (trainer.updates, trainer.position.skipped) == (2, 1)
    return trainer


def listed(trainer: Trainer) -> dict[str, Any]:
    weights = trainer._engine.weights(trainer.model)
    return {name: value.tolist() for name, value in weights.items()}


def resume(engine: str, folder: Path, precision: str | None = None) -> None:
    """A run resumed within an epoch gives the result of the uninterrupted one."""

    # torch has no batch norm in 16 bits on CPUs.
    model = NoisyModel if precision is None else tiny_model

    def trained(*callbacks: Any, **more: Any) -> Trainer:
        trainer = new_trainer(engine, model=model(), callbacks=callbacks, **precise)
        return train(trainer, 3, gradient_accumulation_steps=2, gradient_clip_norm=0.5, **more)

    precise: dict[str, Any] = {} if precision is None else {"mixed_precision": precision}
    whole = trained(SavesOnce(folder / "state"))
    resumed = trained(SavesOnce(folder / "again"), resume_from=folder / "state")
    both = whole, resumed
    assert_identical(*(trainer._engine.weights(trainer.model) for trainer in both))
    first, second = (trainer._engine.optimizer_state(trainer.optimizer) for trainer in both)
    assert str(first) == str(second)
    assert whole.run_history.get_metric_values("eval_loss_epoch") == (
        resumed.run_history.get_metric_values("eval_loss_epoch")
    )
    # A training state saved after the run can be loaded into another trainer.
    whole.save_training_state(folder / "end")
    loaded = new_trainer(engine, model=model(), **precise)
    train(loaded, 1)
    loaded.load_training_state(folder / "end")
    predictions = [trainer.predict(tiny_data(5)) for trainer in (whole, loaded)]
    assert torch.equal(*predictions)


def main(engine: str, folder: Path, other_state: Path | None) -> None:
    outcome = numbers(engine, folder)
    if engine != "none":
        resume(engine, folder)
    if engine.isdigit() and PROCESSES == 1:
        (folder / "bf16").mkdir()
        resume(engine, folder / "bf16", "bf16")
    if engine in ("1", "2", "3", "fsdp"):
        with pytest.warns(UserWarning, match="is saved without it"):
            train(new_trainer(engine), 1).save_checkpoint(folder / "weights.pt")
    if engine in ("0", "1", "2", "3"):
        with pytest.raises(ValueError, match="only clip by norm"):
            train(new_trainer(engine), 1, gradient_clip_value=0.1)
    if other_state is not None:
        with pytest.raises(TrainingStateError, match="the optimizer.s state: .*divided by"):
            train(new_trainer(engine, model=NoisyModel()), 3, resume_from=other_state)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
