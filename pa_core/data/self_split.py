"""Agree between processes whether a user's data are split already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from pa_core.data.keyed_fetch import LOADER_OPTIONS, can_be_keyed
from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.process_split import OwnSplitLoader, SplitLoader, UnevenSplitLoader
from pa_core.data.same_stream import compare_datasets, first_look, settle
from pa_core.data.source import length_of
from pa_core.data.split_checks import HOW_TO_MARK, check_repeats
from pa_core.data.split_marks import SplitMark, find_mark, is_marked, name_of

if TYPE_CHECKING:
    from pa_core.data.split_checks import Purpose
    from pa_core.engine.base import Engine


class Described(NamedTuple):
    """What a process knows of its data.

    Attributes:
        mark: what shows that they are split.
        length: the number of batches; None if it isn't known.
        has_samples: whether they are samples of a map dataset, which can be fetched one by one.
    """

    mark: SplitMark | None
    length: int | None = None
    has_samples: bool = False


class Split(NamedTuple):
    """Whether data are split between processes already, as all processes agree.

    Attributes:
        is_split: whether they are.
        mark: what shows it on this process; None for data that show nothing.
        is_marked: whether the user has said so, by ``is_sharded``.
        length: the largest number of batches of any process; None if it isn't known.
    """

    is_split: bool
    mark: Any
    is_marked: bool
    length: int | None


def split_between_processes(loader: Any, engine: Engine, purpose: Purpose) -> Any:
    """Wrap a loader so that each process iterates over its split; our own loaders do it themselves.

    A collective.

    Raises:
        RuntimeError: on every process, if the data are split for other processes than these, or
            differ where they should be the same.
        ValueError: for predictions from data that the user has split, whose order is unknown; for
            an evaluation that would count samples more than once.
    """
    is_own = isinstance(loader, KeyedDataLoader)
    is_split = is_own and loader.batch_sampler.num_processes == 1  # by the user
    length = -1 if not is_own else -2 if is_split else loader.batch_sampler.dataset_length
    dataset = loader.dataset.dataset if is_own else None
    is_looked_at = is_own and is_marked(dataset) is None
    look = first_look(dataset, loader) if is_looked_at else 0
    most, least, highest, lowest = engine.largest(length, -length, look, -look)
    if most != -least:
        found = f"has {length} samples" if length >= 0 else "is a loader or marked as split"
        others = "more or fewer" if length >= 0 else "not"
        raise RuntimeError(
            f"The dataset to {purpose} on {found} on process {engine.rank}, and {others} on "
            "others. Use the same dataset on every process: its batches are split between them. "
            "If each process has its own split, set is_sharded = True on each"
        )
    if is_split:
        mark = SplitMark(f"{type(dataset).__name__}.is_sharded", "marked")
        return _own_split(loader, engine, purpose, mark, engine.largest(len(loader))[0])
    if is_own:
        if settle(dataset, loader, engine, highest, -lowest) == "different":
            raise RuntimeError(different_dataset(dataset, purpose))
        return loader
    split = agree_on_split(loader, engine, purpose)
    if not split.is_split:
        return SplitLoader(loader, engine, is_marked=split.is_marked)
    whole = None if split.is_marked else whole_loader(loader, purpose)
    if whole is not None:
        return SplitLoader(whole, engine)
    return _own_split(loader, engine, purpose, split.mark, split.length)


def _own_split(
    loader: Any, engine: Engine, purpose: Purpose, mark: SplitMark, length: int | None
) -> OwnSplitLoader:
    if purpose == "predict":
        raise ValueError(
            "predict() returns outputs in the order of the data, which is unknown for data "
            f"that is already split between processes ({mark}): pass the whole data on every "
            "process" + ("; if it isn't split, set is_sharded = False" * (mark.kind == "fields"))
        )
    check_repeats(loader, purpose)
    kind = UnevenSplitLoader if purpose == "train" else OwnSplitLoader
    return kind(loader, engine, mark, length)


def agree_on_split(loader: Any, engine: Engine, purpose: Purpose) -> Split:
    """Agree whether a loader's data are split between processes already; a collective.

    Raises:
        RuntimeError: on every process, naming what is wrong.
    """
    name, mark = name_of(loader), find_mark(loader)
    described = engine.gather_objects(Described(mark, length_of(loader), can_be_keyed(loader)))
    is_split = decide(described, name, purpose)
    kinds = {one.mark and one.mark.kind for one in described}
    lengths = [one.length for one in described]
    have_samples = all(one.has_samples for one in described)
    if is_split and kinds == {"fields"} and have_samples and len(set(lengths)) == 1:
        # The fields may be there for something else.
        is_split = compare_datasets(loader.dataset, loader, engine) == "different"
    elif not is_split and len(set(lengths)) > 1:
        raise RuntimeError(
            f"{name} to {purpose} on has {lengths[engine.rank]} batches on process {engine.rank}, "
            f"and more or fewer on others. {HOW_TO_MARK}"
        )
    elif not is_split and have_samples and "marked" not in kinds:
        if compare_datasets(loader.dataset, loader, engine) == "different":
            raise RuntimeError(different_dataset(loader.dataset, purpose))
    length = None if None in lengths else max(lengths)
    return Split(is_split, mark, "marked" in kinds, length)


def decide(described: Sequence[Described], name: str, purpose: Purpose) -> bool:
    """Whether data are split between processes already.

    Args:
        described: what each process knows of them, in the order of ranks.
        name: of the data.
        purpose: what the data are for.

    Raises:
        RuntimeError: if they are split on some processes only, or for other processes.
    """
    marks = [one.mark for one in described]
    if all(mark is None or not mark.is_split for mark in marks):
        return False
    shown = [mark for mark in marks if mark is not None and mark.is_split]
    if len(shown) < len(marks) or len({mark.kind == "marked" for mark in shown}) > 1:
        raise RuntimeError(
            f"{name} to {purpose} on is split between processes on some of them only "
            f"({shown[0]}): use the same kind of data on every process"
        )
    numbers = [(mark.rank, mark.world_size) for mark in shown]
    expected = [(rank, len(marks)) for rank in range(len(marks))]
    if numbers == expected or shown[0].world_size is None:
        return True
    is_shard = "shard" in shown[0].owner and shown[0].kind == "fields"
    if is_shard and len(set(numbers)) == 1:
        return False  # the same shard of the data on every process
    found = "; ".join(f"process {rank}: {mark}" for rank, mark in enumerate(shown))
    raise RuntimeError(
        f"{name} to {purpose} on isn't split as this run is, which has {len(marks)} processes "
        f"({found}). Split it by rank and world size, or pass the whole data on every process. "
        "If these numbers mean something else, set is_sharded = False"
    )


def whole_loader(loader: Any, purpose: Purpose) -> DataLoader[Any] | None:
    """The loader of the whole data, for a loader that a known sampler has split.

    A `DistributedSampler`, and a loader prepared by accelerate, repeat samples to even out their
    splits. The batches of the whole order are the same in each step, and each sample is in one.

    Returns:
        None if the whole order isn't known.

    Raises:
        ValueError: for a loader prepared by accelerate whose batches can't be split here.
    """
    if _is_prepared(loader):
        return _unprepared(loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if purpose == "train" and type(loader) is not DataLoader:
        return None  # it may have its own state
    batches: Any = loader.batch_sampler
    if loader.batch_size is not None or batches is None:
        sampler, batches = loader.sampler, loader
    elif type(batches) is BatchSampler:
        sampler = batches.sampler
    else:
        return None
    order = _WholeOrder.of(sampler, purpose)
    if order is None:
        return None
    options = {name: getattr(loader, name) for name in LOADER_OPTIONS}
    size, drop_last = batches.batch_size, batches.drop_last
    return DataLoader(loader.dataset, size, sampler=order, drop_last=drop_last, **options)


class _WholeOrder(Sampler[int]):
    """The order of which a `DistributedSampler` gives each process every n-th sample."""

    def __init__(self, sampler: DistributedSampler[Any], length: int) -> None:
        self.sampler, self.length = sampler, length
        self.whole: DistributedSampler[Any] = DistributedSampler(
            sampler.dataset, 1, 0, sampler.shuffle, sampler.seed
        )
        self.set_epoch(sampler.epoch)

    @classmethod
    def of(cls, sampler: Any, purpose: Purpose) -> _WholeOrder | None:
        """None if `sampler` is none, or makes its order in its own way."""
        if not isinstance(sampler, DistributedSampler):
            return None
        module = type(sampler).__module__.partition(".")[0]
        if type(sampler).__iter__ is not DistributedSampler.__iter__ and module != "torchdata":
            return None
        length = len(sampler.dataset)  # type: ignore[arg-type]
        if purpose == "train" and sampler.drop_last:
            length = min(length, sampler.total_size)
        return cls(sampler, length)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for an epoch."""
        self.whole.set_epoch(epoch)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(list(self.whole)[: self.length])


def _is_prepared(loader: Any) -> bool:
    """Whether accelerate has prepared a loader (whose ``__class__`` is that of the inner one)."""
    return type(loader).__module__ == "accelerate.data_loader"


def _unprepared(loader: Any) -> DataLoader[Any]:
    from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, IterableDatasetShard

    base: Any = getattr(loader, "base_dataloader", None)
    sampler: Any = getattr(base, "batch_sampler", None)
    dataset: Any = getattr(base, "dataset", None)
    inner = sampler if isinstance(sampler, BatchSamplerShard) else dataset
    is_shard = isinstance(inner, BatchSamplerShard | IterableDatasetShard)
    if not isinstance(loader, DataLoaderShard) or not is_shard or inner.split_batches:
        raise ValueError(
            "The loader was prepared by accelerate in a way that repeats samples: pass the "
            "DataLoader itself, which is split between the processes here"
        )
    options = {name: getattr(base, name) for name in LOADER_OPTIONS}
    if isinstance(inner, BatchSamplerShard):
        return DataLoader(dataset, batch_sampler=inner.batch_sampler, **options)
    return DataLoader(inner.dataset, base.batch_size, drop_last=base.drop_last, **options)


def different_dataset(dataset: Any, purpose: str) -> str:
    """The message about a map dataset that differs between processes."""
    return (
        f"{type(dataset).__name__} to {purpose} on has other samples on each process, though the "
        "same number. Use the same dataset on every process: its batches are split between them. "
        "If it is split already, set is_sharded = True on it. If it is the same and only random, "
        "set is_sharded = False"
    )
