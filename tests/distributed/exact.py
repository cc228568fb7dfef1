"""Write results that must not depend on the world size, and how runs stop together, as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from pa_core import StopTrainingError, Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback, TerminateOnNaNCallback
from pa_core.predictions import Predictions
from tests.helpers import tiny_data, tiny_model, weights_of

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH = 12


class Stream(IterableDataset[Any]):
    """Samples in order, without a length."""

    def __init__(self, samples: int) -> None:
        self.data = tiny_data(samples)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


class SplitStream(IterableDataset[Any]):
    """The samples of this process in each global batch; lengths differ between processes."""

    is_sharded = True

    def __init__(self, samples: int) -> None:
        self.data = tiny_data(samples)

    def __iter__(self) -> Iterator[Any]:
        size = GLOBAL_BATCH // PROCESSES
        return (self.data[i] for i in range(len(self.data)) if i % GLOBAL_BATCH // size == RANK)


class Ready(Stream):
    """Batches in order, without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data, batch_size=GLOBAL_BATCH // PROCESSES))


def new_trainer(*callbacks: Any, cls: type[Trainer] = Trainer) -> Trainer:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return cls(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=callbacks,
        plugins=(),
        accelerator={"cpu": True},
    )


def train(trainer: Trainer, data: Any, epochs: Any = 2, **options: Any) -> dict[str, Any]:
    size = GLOBAL_BATCH // PROCESSES
    trainer.train(data, epochs, **{"per_device_batch_size": size} | options)
    return {
        "weights": {name: value.tolist() for name, value in weights_of(trainer).items()},
        "losses": trainer.run_history.get_metric_values("train_loss_epoch"),
        "samples": trainer.position.samples,
    }


def training() -> Iterator[tuple[str, Any]]:
    """Training on every kind of data, with lengths for which the last batch is incomplete."""
    size = GLOBAL_BATCH // PROCESSES

    def loader(samples: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(tiny_data(samples), batch_size=size, **options)

    def shuffled(samples: int) -> DataLoader[Any]:
        order = RandomSampler(tiny_data(samples), generator=torch.Generator())
        return DataLoader(tiny_data(samples), batch_sampler=BatchSampler(order, size, False))

    for samples in (45, 37, 13):
        yield f"map {samples}", train(new_trainer(), tiny_data(samples))
        yield f"loader {samples}", train(new_trainer(), loader(samples))
        yield f"shuffled {samples}", train(new_trainer(), shuffled(samples))
        yield f"stream {samples}", train(new_trainer(), Stream(samples))
        yield f"split stream {samples}", train(new_trainer(), SplitStream(samples))
        ready = {"train_dataloader_kwargs": {"batch_size": None}}
        yield f"ready {samples}", train(new_trainer(), Ready(samples), **ready)
        yield (
            f"accumulated {samples}",
            train(new_trainer(), Stream(samples), gradient_accumulation_steps=2),
        )
    yield "samples", train(new_trainer(), Stream(45), "100 samples")
    yield "workers", train(new_trainer(), loader(37, num_workers=1), 1)


class Tokens(Trainer):
    """Counts custom items: each sample has its class plus one."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        outputs, weight = self.model(x), (y + 1).float()
        loss = (nn.functional.cross_entropy(outputs, y, reduction="none") * weight).sum()
        items = weight.sum()
        return {
            "loss": loss / items,
            "model_outputs": outputs,
            "batch_size": len(x),
            "num_items_in_batch": int(items),
        }


class GathersTargets(TrainerCallback):
    """Gathers the targets of every evaluation step, as pytorch-accelerated's users do."""

    def on_eval_epoch_start(self, trainer: Trainer) -> None:
        self.targets: list[int] = []

    def on_eval_step_end(self, trainer: Trainer, batch: Any) -> None:
        self.targets += trainer.gather(batch[1]).tolist()


class Ragged(Trainer):
    """Predicts a different number of rows for each sample."""

    def calculate_predictions(self, batch: Any) -> list[Any]:
        x, y = batch
        return [{"rows": row.repeat(int(n) + 1, 1)} for row, n in zip(x, y, strict=True)]


def evaluation() -> Iterator[tuple[str, Any]]:
    seen = GathersTargets()
    trainer, ragged = new_trainer(seen), new_trainer(cls=Ragged)
    plain = new_trainer()
    for samples in (1, 2, 3, 4, 5, 7, 8, 9, 13, 24, 25):
        data = tiny_data(samples)
        for size in (1, 2, 4):
            name = f"{samples} by {size}"
            loss = plain.evaluate(data, per_device_batch_size=size)["evaluation_loss"]
            loader = DataLoader(data, batch_size=size)
            yield f"loss {name}", loss
            yield f"loss of a loader {name}", plain.evaluate(loader)["evaluation_loss"]
            yield f"predictions {name}", plain.predict(data, size).tolist()
            yield f"predictions of a loader {name}", plain.predict(loader).tolist()
            if samples >= PROCESSES:
                trainer.evaluate(data, per_device_batch_size=size)
                yield f"gathered {name}", sorted(seen.targets)
        # It repeats samples to give every process the same number.
        sampler = DistributedSampler(data, PROCESSES, RANK)
        loader = DataLoader(data, batch_size=2, sampler=sampler)
        yield f"loss of a distributed loader {samples}", plain.evaluate(loader)["evaluation_loss"]
        yield f"predictions of a distributed loader {samples}", plain.predict(loader).tolist()
        rows = [item["rows"].tolist() for item in ragged.predict(data, 2)]
        yield f"ragged {samples}", rows
        if samples < 8:
            written = ragged.predict(data, 2, to=FOLDER / "predictions")
            assert len(written) == samples
            yield f"written {samples}", [item["rows"].tolist() for item in written.load()]
            again = plain.predict(loader, to=FOLDER / "predictions")
            yield f"written from a loader {samples}", again.load().tolist()
    yield "disk full", disk_full_on_the_last_process(plain)
    for samples in (13, 1):
        split = SplitStream(samples)
        yield f"loss of split stream {samples}", plain.evaluate(split)["evaluation_loss"]
        if PROCESSES > 1:
            with pytest.raises(ValueError, match="already split between processes"):
                plain.predict(split)
    yield "stream", plain.evaluate(Stream(13), per_device_batch_size=4)["evaluation_loss"]
    ready = {"dataloader_kwargs": {"batch_size": None}}
    yield "ready", plain.evaluate(Ready(13), **ready)["evaluation_loss"]
    yield "predictions of ready batches", plain.predict(Ready(13), **ready).tolist()


def disk_full_on_the_last_process(trainer: Trainer) -> list[Any]:
    """What is left if predictions can't be written: those from before, and nothing else."""
    folder = FOLDER / "full"
    trainer.predict(tiny_data(5), 2, to=folder)
    with pytest.MonkeyPatch.context() as patch:
        if RANK == PROCESSES - 1:
            full = OSError(28, "No space left on device")
            patch.setattr("pa_core.predictions.tensor_chunks", Mock(side_effect=full))
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            trainer.predict(tiny_data(7), 2, to=folder)
    left = [path.name for path in FOLDER.iterdir() if "full" in path.name]
    return [left == ["full"], len(Predictions(folder))]


class Stop(TrainerCallback):
    """Requests a stop or a state, or raises, on the last process only, in the second epoch."""

    def __init__(self, way: str) -> None:
        self.way = way

    def on_train_step_end(self, trainer: Trainer) -> None:
        self._raise_in("step end", trainer)
        if RANK == PROCESSES - 1 and trainer.position.epoch == 2:
            if self.way == "request":
                trainer.control.stop("enough")
            if self.way == "save":
                trainer.control.save(FOLDER / "requested")

    def on_backward_end(self, trainer: Trainer) -> None:
        self._raise_in("backward pass", trainer)

    def on_eval_step_end(self, trainer: Trainer) -> None:
        self._raise_in("evaluation", trainer)

    def _raise_in(self, event: str, trainer: Trainer) -> None:
        if RANK == PROCESSES - 1 and trainer.position.epoch == 2 and self.way == event:
            raise StopTrainingError("enough")


class NaNAtLast(Trainer):
    """The loss is NaN on one process in two updates of the second epoch."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        if RANK == PROCESSES - 1 and self.updates in (4, 6):
            output["loss"] = output["loss"] * float("nan")
        return output


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * float("inf")


class InfiniteAtLast(TrainerCallback):
    """The gradients of a finite loss are infinite, on one process, in the second epoch."""

    def on_backward_start(self, trainer: Trainer, batch_output: Any, step: int) -> None:
        if RANK == PROCESSES - 1 and trainer.position.epoch == 2 and step in (1, 3):
            batch_output["loss"] = _Infinite.apply(batch_output["loss"])


def counts(position: Any) -> list[int]:
    return [position.updates, position.skipped, position.skipped_in_a_row, position.samples]


class Labelled(Trainer):
    """The mean over labelled samples; of none it is NaN, and so may be its gradients."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        outputs, items = self.model(x), (y >= 0).sum()
        loss = nn.functional.cross_entropy(outputs, y, reduction="sum", ignore_index=-100) / items
        right = (outputs.argmax(1) == y).sum() / items
        kept = {"model_outputs": outputs, "batch_size": len(x), "log": {"right": right}}
        return {"loss": loss, "num_items_in_batch": items, **kept}

    calculate_eval_batch_loss = calculate_train_batch_loss


def unlabelled() -> Iterator[tuple[str, Any]]:
    """Ranks and micro-batches without a label, a whole batch without any, and padding batches."""
    x, y = tiny_data(49).tensors
    y = y.clone()
    for rows in (slice(4, 12), slice(12, 18), slice(24, 36)):
        y[rows] = -100
    data = TensorDataset(x, y)
    for accumulation in (1, 2):
        for policy in ("stop", "skip"):
            trainer = new_trainer(TerminateOnNaNCallback(policy), cls=Labelled)
            shuffle = {"train_dataloader_kwargs": {"shuffle": False}, "eval_dataset": data}
            result = train(trainer, data, gradient_accumulation_steps=accumulation, **shuffle)
            history = trainer.run_history
            for name in ("eval_loss_epoch", "train_right", "eval_right"):
                result[name] = list(history.get_metric_values(name))
            assert trainer.stop_reason is None
            yield (
                f"unlabelled {accumulation} {policy}",
                [result, counts(trainer.position)],
            )


def ends() -> Iterator[tuple[str, Any]]:
    for way in ("step end", "backward pass", "evaluation", "request", "save"):
        trainer = new_trainer(Stop(way))
        train(trainer, tiny_data(45), 4, eval_dataset=tiny_data(7))
        updates = trainer.gather_objects(trainer.updates)
        assert len(set(updates)) == 1, updates
        yield way, trainer.stop_reason
    yield "saved at the request of one process", (FOLDER / "requested" / "manifest.json").exists()
    for policy in ("stop", "skip", "rollback"):
        states = SaveTrainingStateCallback(FOLDER / policy, save_every_n_steps=3, save_at_end=False)
        trainer = new_trainer(TerminateOnNaNCallback(policy), states, cls=NaNAtLast)
        result = train(trainer, tiny_data(45), 3)
        history, skipped = trainer.run_history, []
        if "skipped_updates" in history.get_metric_names():
            skipped = list(history.get_metric_values("skipped_updates"))
        ended = [result["weights"], trainer.stop_reason, trainer.updates, skipped]
        everywhere = trainer.gather_objects(ended)
        assert all(one == ended for one in everywhere), everywhere
        yield f"nan {policy}", ended
    for policy in ("stop", "skip"):
        for accumulation, clip in ((1, None), (2, 0.5)):
            trainer = new_trainer(TerminateOnNaNCallback(policy), InfiniteAtLast())
            result = train(
                trainer,
                tiny_data(45),
                2,
                gradient_accumulation_steps=accumulation,
                gradient_clip_norm=clip,
            )
            ended = [result["weights"], trainer.stop_reason, *counts(trainer.position)]
            everywhere = trainer.gather_objects(ended)
            assert all(one == ended for one in everywhere), everywhere
            yield f"infinite gradients {policy} {accumulation}", ended
    trainer = new_trainer()
    trainer.train(tiny_data(45), "0.3 seconds")
    assert len(set(trainer.gather_objects(trainer.updates))) == 1


def main() -> None:
    outcome: dict[str, Any] = dict(training())
    outcome["tokens"] = train(new_trainer(cls=Tokens), tiny_data(37))
    outcome |= dict(unlabelled()) | dict(evaluation()) | dict(ends())
    if RANK == 0:
        (FOLDER / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    main()
