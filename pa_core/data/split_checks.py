"""Check that data are split between processes as they are said to be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.utils.data import BatchSampler

from pa_core.data.digest import batch_digest
from pa_core.data.keyed_fetch import can_be_keyed
from pa_core.data.same_stream import compare_batches, see_batches, sight_of
from pa_core.data.split_marks import SplitMark, name_of, repeats_of

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

Purpose = Literal["train", "evaluate", "predict"]
HOW_TO_MARK = (
    "If each process reads its own split, set is_sharded = True on the dataset or loader. If it is "
    "the same data on every process, and only its random numbers differ, set is_sharded = False"
)
"""What to do about data that differ between processes, for messages."""
_ONCE = (
    "an evaluation counts each sample once: pass the dataset, or a DataLoader over it without the "
    "sampler"
)


def check_repeats(loader: Any, purpose: Purpose) -> None:
    """Report samples that a `DistributedSampler` in a loader repeats to even out its splits.

    Raises:
        ValueError: in an evaluation, which counts each sample once.
    """
    repeated = repeats_of(loader)
    if not repeated or (purpose != "train" and repeated > 0 and can_be_keyed(loader)):
        return  # the evaluation leaves them out, see `each_once`
    text = (
        f"The DistributedSampler in {type(loader).__name__} "
        f"{'repeats' if repeated > 0 else 'leaves out'} {_count(abs(repeated))}"
    )
    if purpose == "train":
        if repeated > 0:
            warnings.warn(f"{text} in each epoch, to even out the processes", stacklevel=2)
        return
    raise ValueError(f"{text}, but {_ONCE}")


def each_once(batches: list[Any], engine: Engine, mark: SplitMark, loader: Any) -> list[Any]:
    """The batches of an evaluation without what a `DistributedSampler` repeats; a collective.

    Args:
        batches: the indices of this process' batches.
        engine: connects the processes.
        mark: what shows that the data are split.
        loader: the loader that has the sampler.

    Raises:
        ValueError: on every process, if another sampler yields a sample twice.
    """
    numbers = [np.ravel(batch) for batch in batches]
    mine = np.concatenate(numbers) if numbers else np.empty(0, dtype=np.int64)
    splits = engine.gather_objects(mine if mine.dtype.kind in "iu" else None)
    if any(split is None for split in splits):  # keys of another kind
        return batches
    indices = np.concatenate(splits)
    repeated = len(indices) - len(np.unique(indices))
    if not repeated:
        return batches
    if repeated != repeats_of(loader) or loader.batch_sampler is None:
        raise ValueError(
            f"The splits of the evaluation data ({mark}) hold {_count(repeated)} more than once, "
            f"but {_ONCE}"
        )
    seen = set(np.concatenate([*splits[: engine.rank], mine[:0]]).tolist())
    once: list[Any] = []
    for batch in batches:
        once.append([])
        for index in batch:
            if int(index) not in seen:
                seen.add(int(index))
                once[-1].append(index)
    return [batch for batch in once if batch]


def _count(samples: int) -> str:
    return "1 sample" if samples == 1 else f"{samples} samples"


def check_same_order(first: Sequence[Any], engine: Engine, loader: Any) -> None:
    """Check that a sampler begins with the same indices on every process; a collective.

    Args:
        first: what it yields first.
        engine: connects the processes.
        loader: the loader that has the sampler.

    Raises:
        RuntimeError: on every process, if it doesn't.
    """
    number = int(batch_digest(first)[:14], 16)
    most, least = engine.largest(number, -number)
    if most == -least:
        return
    sampler = loader.batch_sampler
    if sampler is None or type(sampler) is BatchSampler:
        sampler = loader.sampler if sampler is None else sampler.sampler
    raise RuntimeError(
        f"{type(sampler).__name__} yields different indices on each process. If it splits the "
        "samples between processes, set is_sharded = True on it. Otherwise seed it the same on "
        "every process, with a generator or in set_epoch(epoch)"
    )


def check_same_batches(first: Sequence[Any], engine: Engine, loader: Any) -> str | None:
    """Check that the first batches are the same on every process; a collective.

    Returns:
        What to warn of, if they are the same but for random numbers.

    Raises:
        RuntimeError: on every process, if they aren't.
    """
    verdict = compare_batches(engine.gather_objects(see_batches(first)))
    if verdict == "different":
        raise RuntimeError(
            f"{name_of(loader)} yields different batches on each process, so that splitting them "
            f"would leave out samples. {HOW_TO_MARK}"
        )
    if verdict == "same":
        return None
    return (
        f"The first batches of {name_of(loader)} differ between processes in all but their "
        f"labels: its random numbers aren't seeded by the run. {HOW_TO_MARK}"
    )


def check_own_batches(
    first: Sequence[Any], engine: Engine, mark: SplitMark, *, is_training: bool
) -> None:
    """Report data that are said to be split, but are the same on every process; a collective.

    Raises:
        RuntimeError: on every process, if only the fields of an object show it, or in an
            evaluation, which counts each sample once.
        ValueError: on every process, if one of them has nothing to train on.
    """
    seen = engine.gather_objects([sight_of(batch).whole for batch in first])
    if is_training and [] in seen and any(seen):
        raise ValueError(
            f"Process {seen.index([])} has no batch of the training data, which are split between "
            f"processes ({mark}): every process needs at least one"
        )
    if not first or any(sights != seen[0] for sights in seen):
        return
    text = f"The data are split between processes ({mark}), but the first batches are the same"
    if mark.kind == "fields" or not is_training:
        raise RuntimeError(f"{text} on every process. {HOW_TO_MARK}")
    if engine.rank == 0:
        warnings.warn(
            f"{text} on every process: if they are the same data, each sample is read "
            f"{engine.num_processes} times",
            stacklevel=2,
        )
