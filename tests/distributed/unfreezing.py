"""Freeze, unfreeze and replace parameters in each hook of a run; writes the results as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.plugin import UpdateResult
from tests.distributed.run import RANK
from tests.helpers import tiny_data, weights_of

Change = Callable[[nn.Sequential], None]


def model_of(frozen: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    for index in frozen:
        model[index].requires_grad_(False)
    return model


def unfreeze_first(model: nn.Sequential) -> None:
    model[0].requires_grad_(True)


def freeze_second(model: nn.Sequential) -> None:
    model[2].requires_grad_(False)


def exchange(model: nn.Sequential) -> None:
    unfreeze_first(model)
    freeze_second(model)


def freeze_all_but_first(model: nn.Sequential) -> None:
    model.requires_grad_(False)
    unfreeze_first(model)


CHANGES: dict[str, tuple[tuple[int, ...], Change]] = {
    "unfreeze": ((0,), unfreeze_first),
    "freeze": ((), freeze_second),
    "exchange": ((0,), exchange),
    "from one layer to another": ((0,), freeze_all_but_first),
}
HOOKS = (
    *("on_train_epoch_start", "on_train_step_start", "on_backward_start", "on_backward_end"),
    *("on_gradients_ready", "on_optimizer_step_end", "on_train_step_end"),
)


def changing(hook: str, change: Change, *, step: int, ranks: tuple[int, ...] = (0, 1)) -> Any:
    """A callback that makes a change in one hook, in the second epoch."""

    def method(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.position.epoch == 2 and trainer.rank in ranks and not self.is_done:
            self.is_done = kwargs.get("step", step) == step
            if self.is_done:
                change(trainer.get_model())

    return type("Changing", (TrainerCallback,), {hook: method, "is_done": False})()


def train(*callbacks: Any, frozen: tuple[int, ...] = (0,), **options: Any) -> Trainer:
    model = model_of(frozen)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=callbacks,
        plugins=(),
        accelerator={"cpu": True} | options,
    )
    trainer.train(
        tiny_data(45),  # 6 global batches, the last of 5 samples
        2,
        per_device_batch_size=8 // trainer.num_processes,
        gradient_accumulation_steps=2,
        gradient_clip_norm=0.5,
    )
    return trainer


def results(trainer: Trainer) -> list[Any]:
    """The weights on each process."""
    weights = {name: value.tolist() for name, value in weights_of(trainer).items()}
    return trainer.gather_objects(weights)


def refusal(*callbacks: Any, **arguments: Any) -> list[str]:
    """What each process raises."""
    text = "trained"
    try:
        train(*callbacks, **arguments)
    except RuntimeError as error:
        text = str(error)
    return Trainer(nn.Linear(1, 1), None, None, callbacks=(), plugins=()).gather_objects(text)


def count_and_reduce(state: Any, bucket: Any) -> Any:
    state.sizes.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


# DDP compares the annotations themselves, not their texts.
count_and_reduce.__annotations__ = {"bucket": GradBucket, "return": Future[torch.Tensor]}


class Counting(TrainerCallback):
    """Registers a communication hook on the wrapped model."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(self, count_and_reduce)


def hooks_kept() -> dict[str, Any]:
    counting = Counting()
    train(counting, changing("on_train_step_end", unfreeze_first, step=1))
    handler = DistributedDataParallelKwargs(
        comm_hook=DDPCommunicationHookType.FP16, gradient_as_bucket_view=True
    )
    kept: list[str] = []

    class Looks(TrainerCallback):
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            if isinstance(trainer.model, DistributedDataParallel):
                kept.extend(hook.__name__ for hook, _ in trainer.model._comm_hooks)

    unfreezing = changing("on_train_step_end", unfreeze_first, step=1)
    trainer = train(unfreezing, Looks, kwargs_handlers=[handler])
    return {"sizes": counting.sizes, "kept": kept, "weights": results(trainer)}


class Adapted(nn.Module):
    """A layer with a low-rank adapter."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + self.up(self.down(inputs))


class Adapts(TrainerCallback):
    """Puts an adapter around a layer when the second epoch starts."""

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.position.epoch == 2:
            self.adapt(trainer)

    def adapt(self, trainer: Trainer) -> None:
        model = trainer.get_model()
        torch.manual_seed(5)
        model[2] = Adapted(model[2])
        added = [*model[2].down.parameters(), *model[2].up.parameters()]
        trainer.optimizer.add_param_group({"params": added})


class AdaptsWithinEpoch(Adapts):
    """Does so between two updates."""

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        pass

    def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if trainer.updates == 1:
            self.adapt(trainer)


class TwoPasses(TrainerCallback):
    """Makes the update from gradients that are calculated again."""

    needs_recompute = True

    @hookimpl(wrapper=True)
    def run_update(self, trainer: Trainer) -> Any:
        trainer.recompute_gradients()
        result: UpdateResult = yield
        return result


def caught() -> list[str]:
    """The warnings of a run that unfreezes what the optimizer doesn't hold."""
    model = model_of((0,))
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(trainable, lr=0.1),
        callbacks=[changing("on_train_step_end", unfreeze_first, step=1)],
        plugins=(),
        accelerator={"cpu": True},
    )
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train(tiny_data(45), 2, per_device_batch_size=8 // trainer.num_processes)
    return [str(warning.message) for warning in found if "optimizer" in str(warning.message)]


def main(folder: Path) -> None:
    outcome: dict[str, Any] = {}
    cases = [("exchange", hook, 1) for hook in HOOKS]
    cases += [("exchange", hook, 0) for hook in HOOKS if "train_step" in hook or "backward" in hook]
    cases += [(name, "on_train_step_end", 1) for name in CHANGES if name != "exchange"]
    for name, hook, step in cases:
        frozen, change = CHANGES[name]
        callback = changing(hook, change, step=step)
        outcome[f"{name} in {hook} {step}"] = results(train(callback, frozen=frozen))
    outcome["adapted"] = results(train(Adapts(), frozen=()))
    step_end = changing("on_train_step_end", exchange, step=1)
    outcome["two passes"] = results(train(step_end, TwoPasses()))
    outcome["hooks"] = hooks_kept()
    outcome["warnings"] = caught()
    if torch.distributed.is_initialized():
        alone = {"ranks": (1,)}
        for hook in ("on_train_epoch_start", "on_train_step_start", "on_train_step_end"):
            for name, change in (("unfreeze", unfreeze_first), ("freeze", freeze_second)):
                case = changing(hook, change, step=1, **alone)
                outcome[f"alone: {name} in {hook}"] = refusal(case)
        one = changing("on_train_step_end", unfreeze_first, step=1, ranks=(0,))
        other = changing("on_train_step_end", freeze_second, step=1, ranks=(1,))
        outcome["adapted within"] = refusal(AdaptsWithinEpoch(), frozen=())
        outcome["alone: each another"] = refusal(one, other)
    if RANK == 0:
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
