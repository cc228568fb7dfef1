"""Which samples each process reads of data that split themselves by rank, or don't, as JSON."""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback

RANK, PROCESSES = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
SAMPLES = 26  # not a multiple of the processes or of the batch sizes


def table(samples: int = SAMPLES) -> TensorDataset:
    ids = torch.arange(samples).float()
    return TensorDataset(ids[:, None].repeat(1, 4), torch.zeros(samples).long())


DATA = table()


class Seen(TrainerCallback):
    """Collects the ids of the samples that count."""

    def __init__(self) -> None:
        self.trained: list[list[int]] = []
        self.evaluated: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.trained.append([])

    def on_train_step_end(self, trainer: Trainer, batch: Any) -> None:
        if not trainer.is_padding_batch:
            self.trained[-1] += batch[0][:, 0].long().tolist()

    def on_eval_step_end(self, trainer: Trainer, batch: Any) -> None:
        self.evaluated += batch[0][:, 0].long().tolist()


class Lines(IterableDataset[Any]):
    """The samples in order, of which subclasses leave some out on each process."""

    def __init__(self) -> None:
        self.first, self.every = 0, 1

    def __iter__(self) -> Iterator[Any]:
        return iter([DATA[i] for i in range(SAMPLES)][self.first :: self.every])


class SplitLines(Lines):
    """Shows nothing."""

    def __init__(self) -> None:
        self.first, self.every = RANK, PROCESSES


class MarkedLines(SplitLines):
    is_sharded = True


class RankedLines(SplitLines):
    """Holds rank and world size, and splits the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world_size = RANK, PROCESSES


class KnowingLines(Lines):
    """Holds rank and world size, and yields everything."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world_size = RANK, PROCESSES


class NodeLines(SplitLines):
    """Split by node, of which there are more than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world_size = RANK, 2 * PROCESSES


class Distributed:
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size


class HubLines(SplitLines):
    """As `split_dataset_by_node` of datasets leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self._distributed = Distributed(RANK, PROCESSES)


def split_by_node(source: Any) -> Iterator[Any]:
    return iter(list(source)[RANK::PROCESSES])


class Pipeline(IterableDataset[Any]):
    """As WebDataset's."""

    def __init__(self) -> None:
        self.pipeline = [Lines(), split_by_node]

    def __iter__(self) -> Iterator[Any]:
        return self.pipeline[1](self.pipeline[0])


class NoisyLines(Lines):
    """The same samples with unseeded random numbers, and labels that identify them."""

    def __iter__(self) -> Iterator[Any]:
        noise = random.SystemRandom()
        return iter([(x + 0.01 * noise.random(), torch.tensor(i)) for i, (x, _) in enumerate(DATA)])


class EveryOther(Sampler[int]):
    """Splits the samples, and shows nothing."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(range(RANK, SAMPLES, PROCESSES))

    def __iter__(self) -> Iterator[int]:
        shuffled = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(SAMPLES, generator=shuffled).tolist()[RANK::PROCESSES])


class MarkedEveryOther(EveryOther):
    is_sharded = True


class RankAware(EveryOther):
    """Shows rank and number of replicas, as most samplers do; repeats samples if asked to."""

    def __init__(self, repeats: int = 0) -> None:
        super().__init__()
        self.rank, self.num_replicas, self.repeats = RANK, PROCESSES, repeats

    def __iter__(self) -> Iterator[int]:
        return iter([*super().__iter__(), *[0] * self.repeats])


class Unseeded(Sampler[int]):
    """Shuffles in another way on each process."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(random.SystemRandom().sample(range(SAMPLES), SAMPLES))


class Holder:
    """A custom loader, which holds a DataLoader."""

    def __init__(self, loader: Any) -> None:
        self.inner = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.inner:
            yield [batch[0], batch[1]]


class Half(Dataset[Any]):
    """Other samples on each process, though as many."""

    def __len__(self) -> int:
        return SAMPLES // PROCESSES

    def __getitem__(self, index: int) -> Any:
        return DATA[index * PROCESSES + RANK]


class MarkedHalf(Half):
    """This process' split, of different lengths."""

    is_sharded = True

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(range(RANK, self.samples, PROCESSES))


class SliceOfBatch:
    """A collation that leaves samples out on each process."""

    def __call__(self, samples: Any) -> Any:
        return torch.utils.data.default_collate(samples[RANK::PROCESSES])


class WholeMarked(Lines):
    """Said to be split, though it isn't."""

    is_sharded = True


class NoisyLinesMarked(Lines):
    """The same samples with unseeded random numbers, and labels that say nothing."""

    is_sharded = False

    def __iter__(self) -> Iterator[Any]:
        noise = random.SystemRandom()
        return ((x + 0.01 * noise.random(), y) for x, y in DATA)


class ExplainedLines(KnowingLines):
    is_sharded = False


class SplitSubset(MarkedLines):
    """One process has nothing."""

    def __iter__(self) -> Iterator[Any]:
        return iter([DATA[0]] if RANK == 0 else [])


class Noisy(Dataset[Any]):
    """The same samples with random numbers that the run can't seed."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return DATA[index][0] + 0.01 * random.SystemRandom().random(), 0


def distributed(
    data: Any = DATA, cls: type[DistributedSampler[Any]] = DistributedSampler, **options
):
    return cls(data, **({"num_replicas": PROCESSES, "rank": RANK} | options))


def batches(sampler: Any) -> BatchSampler:
    return BatchSampler(sampler, 4, False)


class OwnOrder(DistributedSampler[Any]):
    """Makes its order in its own way."""

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[::-1])


def prepared(**options: Any) -> Any:
    return Accelerator(cpu=True).prepare_data_loader(DataLoader(DATA, 4, **options))


def prepared_stream(**options: Any) -> Any:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    return accelerator.prepare_data_loader(DataLoader(Lines(), 4))


def given(sampler: Any) -> dict[str, Any]:
    return {"data": DATA, "dataloader_kwargs": {"sampler": sampler}}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "distributed sampler": lambda: {"data": DataLoader(DATA, 4, sampler=distributed())},
    "distributed sampler, given": lambda: given(distributed()),
    "in a batch sampler": lambda: {"data": DataLoader(DATA, batch_sampler=batches(distributed()))},
    "in a batch sampler, given": lambda: {
        "data": DATA,
        "dataloader_kwargs": {"batch_sampler": batches(distributed())},
    },
    "in a holder": lambda: {"data": Holder(DataLoader(DATA, 4, sampler=distributed()))},
    "own order": lambda: {"data": DataLoader(DATA, 4, sampler=distributed(cls=OwnOrder))},
    "own order, uneven": lambda: {
        "data": DataLoader(table(27), 4, sampler=distributed(table(27), OwnOrder))
    },
    "own order, uneven, in a holder": lambda: {
        "data": Holder(DataLoader(table(27), 4, sampler=distributed(table(27), OwnOrder)))
    },
    "other world size": lambda: {
        "data": DataLoader(DATA, 4, sampler=distributed(num_replicas=2 * PROCESSES))
    },
    "one rank": lambda: {"data": DataLoader(DATA, 4, sampler=distributed(rank=0))},
    "world size 1": lambda: {
        "data": DataLoader(DATA, 4, sampler=distributed(num_replicas=1, rank=0))
    },
    "every other": lambda: given(EveryOther()),
    "every other, marked": lambda: given(MarkedEveryOther()),
    "rank-aware": lambda: given(RankAware()),
    "rank-aware, repeats": lambda: given(RankAware(repeats=1)),
    "unseeded": lambda: given(Unseeded()),
    "lines": lambda: {"data": Lines()},
    "split lines": lambda: {"data": SplitLines()},
    "split lines with a worker": lambda: {
        "data": SplitLines(),
        "dataloader_kwargs": {"num_workers": 1},
    },
    "split lines in a holder": lambda: {"data": Holder(DataLoader(SplitLines(), 4))},
    "marked lines": lambda: {"data": MarkedLines()},
    "ranked lines": lambda: {"data": RankedLines()},
    "knowing lines": lambda: {"data": KnowingLines()},
    "node lines": lambda: {"data": NodeLines()},
    "hub lines": lambda: {"data": HubLines()},
    "hub lines in a holder": lambda: {"data": Holder(DataLoader(HubLines(), 4))},
    "pipeline": lambda: {"data": Pipeline()},
    "noisy lines": lambda: {"data": NoisyLines()},
    "prepared by accelerate": lambda: {"data": prepared(shuffle=True)},
    "prepared stream": lambda: {"data": prepared_stream(dispatch_batches=False)},
    "dispatched": lambda: {"data": prepared_stream(dispatch_batches=True)},
    "half": lambda: {"data": Half()},
    "half with a worker": lambda: {"data": Half(), "dataloader_kwargs": {"num_workers": 1}},
    "half, marked": lambda: {"data": MarkedHalf()},
    "half, marked, uneven": lambda: {"data": MarkedHalf(SAMPLES - 1)},
    "half in a loader": lambda: {"data": DataLoader(Half(), 4, shuffle=True)},
    "subset by rank": lambda: {"data": Subset(DATA, list(range(RANK, SAMPLES, PROCESSES))[:12])},
    "subset of noisy data": lambda: {"data": Subset(Noisy(), list(range(RANK, 24, PROCESSES)))},
    "nothing on one process": lambda: {"data": SplitSubset()},
    "loaders of different lengths": lambda: {
        "data": DataLoader(Subset(DATA, list(range(4 + 4 * RANK))), 4)
    },
    "sliced by the collation": lambda: {
        "data": DATA,
        "dataloader_kwargs": {"collate_fn": SliceOfBatch()},
    },
    "sliced in a loader": lambda: {"data": DataLoader(DATA, 4, collate_fn=SliceOfBatch())},
    "marked, but whole": lambda: {"data": WholeMarked()},
    "noisy lines, explained": lambda: {"data": NoisyLinesMarked()},
    "knowing lines, explained": lambda: {"data": ExplainedLines()},
    "noisy": lambda: {"data": Noisy()},
    "plain": lambda: {"data": DATA},
    "plain loader": lambda: {"data": DataLoader(DATA, 4, shuffle=True)},
}


def outcome(use: Callable[[Trainer, Seen], Any]) -> tuple[Any, list[str]]:
    """What this process has read, or the error; and what it was warned of."""
    torch.manual_seed(0)
    model, seen = nn.Linear(4, 30), Seen()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            callbacks=[seen],
            plugins=(),
            accelerator={"cpu": True},
        )
        try:
            result = use(trainer, seen)
        except Exception as error:  # noqa: BLE001 - compared by the test
            result = f"{type(error).__name__}: {error}"
    return result, [str(warning.message) for warning in caught]


def uses(data: Any, dataloader_kwargs: Any = None) -> dict[str, Callable[[Trainer, Seen], Any]]:
    def train(trainer: Trainer, seen: Seen) -> Any:
        trainer.train(data, 2, per_device_batch_size=4, train_dataloader_kwargs=dataloader_kwargs)
        return seen.trained

    def evaluate(trainer: Trainer, seen: Seen) -> Any:
        trainer.evaluate(data, per_device_batch_size=4, dataloader_kwargs=dataloader_kwargs)
        return seen.evaluated

    def predict(trainer: Trainer, seen: Seen) -> Any:
        with torch.no_grad():
            trainer.model.weight.fill_(1 / 4)
            trainer.model.bias.fill_(0)
        found = trainer.predict(data, 4, dataloader_kwargs=dataloader_kwargs)
        return found[:, 0].round().long().tolist()

    return {"train": train, "evaluate": evaluate, "predict": predict}


RESUMED = (
    "in a batch sampler",
    "in a holder",
    "every other, marked",
    "ranked lines",
    "prepared by accelerate",
    "half, marked",
    "half, marked, uneven",
)


def resume(name: str) -> list[Any]:
    """The weights of a whole run, and of one that is resumed within its second epoch."""

    def new(*callbacks: Any) -> Trainer:
        torch.manual_seed(0)
        model = nn.Linear(4, 30)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        return Trainer(
            model,
            nn.CrossEntropyLoss(),
            optimizer,
            callbacks=callbacks,
            plugins=(),
            accelerator={"cpu": True},
        )

    def train(trainer: Trainer, **options: Any) -> list[Any]:
        arguments = CASES[name]()
        kwargs = arguments.get("dataloader_kwargs")
        trainer.train(
            arguments["data"], 2, per_device_batch_size=4, train_dataloader_kwargs=kwargs, **options
        )
        return trainer.get_model().weight.tolist()

    folder = Path(sys.argv[1]) / name
    states = SaveTrainingStateCallback(folder, save_every_n_steps=5, save_at_end=False)
    again = SaveTrainingStateCallback(folder / "again", save_every_n_steps=5, save_at_end=False)
    whole = train(new(states))
    return [whole, train(new(again), resume_from=folder)]


def main() -> None:
    chosen = sys.argv[2:]
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        if chosen and name not in chosen:
            continue
        found[name] = {}
        for use in ("train", "evaluate", "predict"):
            mine = outcome(uses(**make())[use])
            everyone: list[Any] = [None] * PROCESSES
            torch.distributed.all_gather_object(everyone, mine)
            found[name][use] = everyone
            if RANK == 0 and chosen:
                print(name, use, *everyone, sep="\n    ")
    found |= {f"resumed: {name}": resume(name) for name in RESUMED if not chosen}
    if RANK == 0:
        (Path(sys.argv[1]) / "outcome.json").write_text(json.dumps(found))


if __name__ == "__main__":
    np.random.seed(RANK)
    random.seed(RANK)
    main()
