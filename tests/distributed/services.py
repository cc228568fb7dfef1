"""What a trainer offers to plugins, on several processes; writes the results as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset

from pa_core import Trainer, TrainerCallback, TrainerPlaceholderValues, hookimpl
from pa_core.callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from pa_core.errors import OtherProcessError, SettingsError, TrainingStateError
from tests.distributed.run import RANK, new_trainer
from tests.helpers import NoisyData, tiny_data, weights_of


def failures(trainer: Trainer) -> list[str]:
    """What each process raises if an action fails on rank 1 only."""

    def action() -> int:
        if trainer.rank == 1:
            raise ZeroDivisionError("on rank 1")
        return 7

    try:
        trainer.run_on_all(action)
    except (ZeroDivisionError, OtherProcessError) as error:
        return trainer.gather_objects(f"{type(error).__name__}: {error}")
    return []


def broadcast(trainer: Trainer) -> list[Any]:
    tensors = [torch.full((2, 2), trainer.rank), torch.full((), 10.0 + trainer.rank)]
    strided = torch.arange(4.0).view(2, 2).t() + trainer.rank
    trainer.broadcast([*tensors, strided])
    return trainer.gather_objects([tensor.tolist() for tensor in (*tensors, strided)])


class Batches(TrainerCallback):
    """The samples of an epoch as the loop sees them and as `train_batches` yields them."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.again: list[Any] = []

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.seen.append([trainer.is_padding_batch, batch[0].tolist()])

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        for batch in trainer.train_batches():
            self.again.append([trainer.is_padding_batch, batch[0].tolist()])


def batches(data: Any) -> dict[str, Any]:
    watch = Batches()
    trainer = new_trainer(watch)
    trainer.train(data, 1, per_device_batch_size=8 // trainer.num_processes)
    return {
        "seen": trainer.gather_objects(watch.seen),
        "again": trainer.gather_objects(watch.again),
        "num_batches": trainer.gather_objects(trainer.num_train_batches),
    }


class Fails(TrainerCallback):
    """Fails on rank 1, in the second update."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == 2 and RANK == 1:
            raise MemoryError


class Stops(TrainerCallback):
    """Stops every process after the second update."""

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        if trainer.updates == 1:
            trainer.control.stop("enough", everywhere=True)


class Forbidden:
    """A plugin of the trainer, whose events no trial calls."""

    @hookimpl
    def on_train_step_end(self, trainer: Trainer) -> None:
        raise AssertionError


def trials() -> dict[str, Any]:
    """Trials on all processes together, and on each alone, where one of them fails."""
    trainer = new_trainer(Forbidden())
    before = weights_of(trainer)
    with trainer.trial([Stops()]) as probe:
        probe.train(tiny_data(45), 2, per_device_batch_size=8 // trainer.num_processes)
        together = [probe.updates, probe.num_processes]
        weights = {name: value.tolist() for name, value in weights_of(probe).items()}
    outcome = "trained"
    with trainer.trial([Fails()], alone=True) as probe:
        numbers = [probe.num_processes, probe.rank]
        try:
            probe.train(tiny_data(45), "4 updates", per_device_batch_size=8)
        except MemoryError:
            outcome = "failed"
        updates = probe.updates
    is_same = all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
    return {
        "together": trainer.gather_objects(together),
        "weights": weights,
        "alone": trainer.gather_objects([*numbers, outcome, updates, is_same]),
    }


class RecordsOn(TrainerCallback):
    """Records a metric on one rank: in the second update, and after each training epoch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == 2:
            self._record(trainer, 9.0)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self._record(trainer, float(trainer.position.epoch))

    def _record(self, trainer: Trainer, value: float) -> None:
        if trainer.rank == self.rank:
            trainer.run_history.update_metric("fid", value)


class Told(TrainerCallback):
    """Notes the values of watched metrics."""

    watched_metrics = ("fid", "intermediate_eval_loss")

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_watched_metric(self, trainer: Trainer, metric: str, value: float) -> None:
        self.told.append([metric, round(value, 6)])


def watched(rank: int, folder: Path) -> Any:
    """Which metrics each process sees, and what best model and early stopping make of it."""
    told = Told()
    stops = EarlyStoppingCallback(1, 0.0, watch_metric="fid")
    best = SaveBestModelCallback(folder / f"best-{rank}.pt", "fid")
    within = StepBasedEvaluationCallback(3)
    trainer = new_trainer(RecordsOn(rank), told, stops, best, within)
    each = 8 // trainer.num_processes
    try:
        trainer.train(tiny_data(45), 5, eval_dataset=tiny_data(7), per_device_batch_size=each)
    except ValueError as error:
        return trainer.gather_objects(str(error))
    outcome = [told.told, trainer.updates, trainer.stop_reason, best.best_metric]
    weights = [value.tolist() for value in weights_of(trainer).values()]
    return trainer.gather_objects([outcome, weights])


class Line(torch.optim.lr_scheduler.LambdaLR):
    """A straight line to 0."""

    def __init__(self, optimizer: Any, total: int) -> None:
        super().__init__(optimizer, lambda update: 1 - update / total)


class Rates(TrainerCallback):
    """Records the learning rates, and cuts the data of a rank or of all after the first epoch."""

    def __init__(self, cut: int | None = None) -> None:
        self.rates: list[float] = []
        self.cut = cut

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        if self.cut in (-1, trainer.rank):
            del trainer.train_dataset[20:]


def rates(folder: Path, processes: int, resume_from: Path | None = None) -> list[float]:
    """The learning rates of a run of two epochs, whose states are saved."""
    recorder, saver = Rates(), SaveTrainingStateCallback(folder, 1, save_at_end=False)
    trainer = new_trainer(recorder, saver)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_processes")
        trainer.train(
            tiny_data(32),
            2,
            per_device_batch_size=4,
            create_scheduler_fn=partial(Line, total=TrainerPlaceholderValues.NUM_UPDATES),
            resume_from=resume_from,
        )
    assert trainer.num_processes == processes
    return recorder.rates


def resumed_rates(folder: Path) -> list[float]:
    """The learning rates of that run on two processes, from a state of one process."""
    return rates(folder / "again", 2, folder.parent / "one" / "lengths" / "epoch_0001")


def cut(rank: int) -> Any:
    """What each process makes of data that have become shorter on a rank, or on all for -1."""
    every: Any = tiny_data(40)
    data = list(every)
    trainer = new_trainer(Rates(rank))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train(data, 2, per_device_batch_size=8 // trainer.num_processes)
        except RuntimeError as error:
            return trainer.gather_objects(str(error))
    reported = sum("(40 → 20)" in str(one.message) for one in caught)
    return trainer.gather_objects([trainer.updates, trainer.position.samples, reported])


class Counts(IterableDataset[Any]):
    """Counts its epochs; the samples of an epoch depend on it."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        x, y = tiny_data(24).tensors
        yield from [(x[i] * (self.epoch + 1), y[i]) for i in range(24)]
        self.epoch += 1


class Saves(Counts):
    """Each process has its own samples and state."""

    is_sharded = True

    def __iter__(self) -> Iterator[Any]:
        for number, (x, y) in enumerate(super().__iter__()):
            if number % 2 == RANK % 2:
                yield x + RANK, y

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "rank": RANK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["rank"] == RANK
        self.epoch = state["epoch"]


def persistent() -> DataLoader[Any]:
    return DataLoader(NoisyData(22), 3, shuffle=True, num_workers=1, persistent_workers=True)


class SavesAt(TrainerCallback):
    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir

    def on_train_step_end(self, trainer: Trainer) -> None:
        if trainer.position.epoch == 2 and trainer.position.batch == 2:
            trainer.control.save(self.state_dir, everywhere=True)


def resumed(folder: Path) -> dict[str, Any]:
    """Whether runs on data with their own states resume exactly, and what refuses to."""
    outcome: dict[str, Any] = {}

    def weights(data: Any, *callbacks: Any, **options: Any) -> dict[str, Any]:
        trainer = new_trainer(*callbacks)
        trainer.train(data, 3, per_device_batch_size=4, **options)
        return weights_of(trainer)

    for new in (Counts, Saves, persistent):
        state = folder / new.__name__
        whole = weights(new(), SavesAt(state))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            again = weights(new(), SavesAt(state), resume_from=state, strict=True)
        is_same = all(torch.equal(value, again[name]) for name, value in whole.items())
        outcome[new.__name__] = new_trainer().gather_objects(is_same)
    error = ""
    try:
        state, data = folder / "Saves", Saves()
        if RANK:  # it breaks its promise on the last process
            data.load_state_dict = lambda state: None
        weights(data, SavesAt(state), resume_from=state, strict=True)
    except TrainingStateError as raised:
        error = str(raised)
    outcome["refused"] = new_trainer().gather_objects(error)
    return outcome


def settings_that_differ(trainer: Trainer) -> list[list[str]]:
    """What each process raises if it has other settings than the other one, by variable."""
    found: list[list[str]] = []
    for name, first, second in (
        ("PA_CORE_SET", "trainer.seed=7", "trainer.seed=7"),
        ("PA_CORE_SET", "train.num_epochs=1", "train.num_epochs=2"),
        ("PA_CORE_SET", "", "trainer.seed=7"),
        ("PA_CORE_PLUGINS", "overfit", "-overfit"),
    ):
        os.environ[name] = (first, second)[trainer.rank]
        problems = []
        try:
            new_trainer()
        except SettingsError as error:
            problems = error.problems
        found.append(trainer.gather_objects(problems))
        del os.environ[name]
    try:
        new_trainer(seed=trainer.rank)
    except SettingsError as error:
        found.append(trainer.gather_objects(error.problems))
    return found


def arguments_that_differ(trainer: Trainer) -> list[list[str]]:
    """What each process raises if it trains in another way than the other one."""
    found: list[list[str]] = []
    rank = trainer.rank
    for arguments, rate in (
        ({"num_epochs": 1 + rank, "per_device_batch_size": 4}, 0.1),
        ({"gradient_accumulation_steps": 2 - rank, "gradient_clip_norm": 1.0}, 0.1),
        ({"train_dataloader_kwargs": {"shuffle": bool(rank), "num_workers": 0}}, 0.1),
        ({"create_scheduler_fn": partial(StepLR, step_size=1, gamma=(0.5, 0.25)[rank])}, 0.1),
        ({}, (0.1, 0.2)[rank]),
    ):
        one = new_trainer()
        one.optimizer.param_groups[0]["lr"] = rate
        text = "no error"
        try:
            one.train(tiny_data(8), **({"num_epochs": 1} | arguments))
        except ValueError as error:
            text = str(error)
        found.append(trainer.gather_objects(text))
    return found


def best_elsewhere(folder: Path) -> list[bool]:
    """Whether each process loads the best model, though its working directory is its own."""
    before, best = Path.cwd(), SaveBestModelCallback("best.pt", "train_loss_epoch", True)
    own = folder / f"own-{RANK}"
    own.mkdir(parents=True)
    os.chdir(own)
    try:
        trainer = new_trainer(best)
        trainer.train(tiny_data(8), 3)
    finally:
        os.chdir(before)
    saved = torch.load(folder / "own-0" / "best.pt", weights_only=True)["model_state_dict"]
    is_best = [torch.equal(value, saved[name]) for name, value in weights_of(trainer).items()]
    return trainer.gather_objects(best.best_metric_epoch == 1 and all(is_best))


def main(folder: Path) -> None:
    trainer = new_trainer()
    tensor = torch.tensor([1.0, 10.0]) * (trainer.rank + 1)
    outcome = {
        "ranks": trainer.gather_objects(trainer.rank),
        "sum": trainer.gather_objects([trainer.sum(tensor).tolist(), tensor.tolist()]),
        "largest": trainer.gather_objects(list(trainer.largest(trainer.rank, -trainer.rank))),
        "results": trainer.run_on_all(lambda: trainer.rank + 5),
        "failures": failures(trainer),
        "broadcast": broadcast(trainer),
        "whole": trainer.has_whole_gradients,
        # The last global batch has one sample, so that rank 1 gets a padding batch.
        "batches": batches(tiny_data(9)),
        "ready": batches(DataLoader(tiny_data(9), batch_size=3, shuffle=True)),
        "trials": trials(),
        "settings": settings_that_differ(trainer) if trainer.num_processes > 1 else None,
        "arguments": arguments_that_differ(trainer) if trainer.num_processes > 1 else None,
        "watched": watched(0, folder),
        "rates": rates(folder / "lengths", trainer.num_processes),
        "cut": cut(-1),
        "uneven": cut(1) if trainer.num_processes > 1 else None,
        "resumed_rates": resumed_rates(folder) if trainer.num_processes > 1 else None,
        "resumed": resumed(folder),
        "best_elsewhere": best_elsewhere(folder),
        "unwatched": watched(1, folder) if trainer.num_processes > 1 else None,
    }
    if trainer.rank == 0:
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
