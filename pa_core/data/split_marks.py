"""Recognise data that are split between processes already, by what the objects show.

No library is imported for it: its objects are known by their attributes. The search follows the
attributes of a loader to the loaders, datasets and samplers that it holds.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

_MOST_PARTS = 500
_MOST_ITEMS = 64  # of a list or dict that holds parts
_PAIRS = (
    *(("rank", "num_replicas"), ("rank", "world_size"), ("rank", "num_ranks")),
    *(("global_rank", "world_size"), ("process_index", "num_processes")),
    *(("data_parallel_rank", "data_parallel_size"), ("dp_rank", "dp_size")),
    *(("shard_id", "num_shards"), ("shard_index", "num_shards"), ("cur_shard", "shard_count")),
)
_HOLDERS = ("_distributed", "_unique_rank_world", "distributed_env")
"""Where `datasets`, MosaicML streaming and LitData keep rank and world size."""
_SPLITTERS = ("ResampledShards", "DataLoaderDispatcher")
"""WebDataset's shards drawn at random on each process, and accelerate's loader that deals out."""

Kind = Literal["marked", "known", "fields"]


class SplitMark(NamedTuple):
    """What shows that data are split between processes, on one of them.

    Attributes:
        owner: the class that shows it, and how.
        kind: ``"marked"`` by the attribute ``is_sharded``, a ``"known"`` library or a sampler, or
            ``"fields"`` of a dataset or loader, which may also be there for something else.
        is_split: false for data with ``is_sharded = False``.
        rank: the number of this process' split; None if it isn't known.
        world_size: into how many splits the data are split; None if it isn't known.
    """

    owner: str
    kind: Kind
    is_split: bool = True
    rank: int | None = None
    world_size: int | None = None

    def __str__(self) -> str:
        if self.world_size is None:
            return self.owner
        return f"{self.owner} = {self.rank}, {self.world_size}"


def find_mark(loader: Any) -> SplitMark | None:
    """The mark of a loader or dataset that is split; None if nothing shows that it is.

    The attribute ``is_sharded`` counts before anything else, then what is known, and what is nearer
    to the loader before what it holds.
    """
    found: SplitMark | None = None
    in_loader = False
    for part in parts_of(loader):
        marked = _attribute(part, "is_sharded")
        if isinstance(marked, bool | int | np.bool_):
            owner = f"{type(part).__name__}.is_sharded"
            return SplitMark(owner, "marked", is_split=bool(marked))
        in_loader = in_loader or isinstance(part, DataLoader)
        mark = _mark_of(part, in_loader)
        if mark is None or mark.world_size == 1:
            continue
        if found is None or (found.kind == "fields" and mark.kind == "known"):
            found = mark
    return found


def is_marked(data: Any) -> bool | None:
    """The attribute ``is_sharded`` of a dataset, or of one that it holds; None without any."""
    mark = find_mark(data)
    return mark.is_split if mark is not None and mark.kind == "marked" else None


def _mark_of(part: Any, in_loader: bool) -> SplitMark | None:
    owner = type(part).__name__
    for name in _HOLDERS:
        numbers = _numbers(vars(part).get(name)) if hasattr(part, "__dict__") else None
        if numbers is not None:
            return SplitMark(f"{owner}.{name} ({numbers[0]})", "known", True, *numbers[1:])
    if owner in _SPLITTERS or _is_node_splitter(part):
        return SplitMark(getattr(part, "__name__", owner), "known")
    if in_loader and callable(_attribute(part, "apply_sharding")):
        return SplitMark(f"{owner}.apply_sharding", "known")  # DataLoader calls it with the rank
    numbers = _numbers(part)
    if numbers is None:
        return None
    is_known = isinstance(part, Sampler) or "num_replicas" in numbers[0] or _is_accelerates(part)
    kind: Kind = "known" if is_known else "fields"
    return SplitMark(f"{owner} ({numbers[0]})", kind, True, *numbers[1:])


def _numbers(holder: Any) -> tuple[str, int, int] | None:
    """The rank and the number of processes that an object holds, after their names."""
    for pair in _PAIRS:
        for prefix in ("", "_"):
            names = [prefix + name for name in pair]
            values = [_number(holder, name) for name in names]
            if None not in values:
                return ", ".join(names), *values  # type: ignore[return-value]
    return None


def _number(holder: Any, name: str) -> int | None:
    value = _attribute(holder, name)
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return int(value) if is_number else None


def _attribute(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # noqa: BLE001 - a property of the user's, which may need what isn't there yet
        return None


def _is_node_splitter(part: Any) -> bool:
    """Whether it is a stage of a WebDataset pipeline that splits its input by rank."""
    name = getattr(getattr(part, "func", part), "__name__", "")
    return "node" in name and "split" in name


def _is_accelerates(part: Any) -> bool:
    return type(part).__module__.startswith("accelerate.")


def parts_of(loader: Any) -> Iterator[Any]:
    """A loader and the loaders, datasets and samplers that it holds, breadth first."""
    queue, seen = deque([loader]), {id(loader)}
    while queue and len(seen) < _MOST_PARTS:
        part = queue.popleft()
        yield part
        for name, value in list(getattr(part, "__dict__", {}).items()):
            if name == "_iterator":  # of a DataLoader with persistent workers
                continue
            for inner in _items(value):
                if id(inner) not in seen and _is_part(inner):
                    seen.add(id(inner))
                    queue.append(inner)


def _items(value: Any) -> Iterator[Any]:
    """A value, or those in a short list, tuple or dict."""
    if isinstance(value, Mapping) and not hasattr(value, "__dict__"):
        value = list(value.values()) if len(value) <= _MOST_ITEMS else ()
    if not isinstance(value, list | tuple):
        yield value
    elif len(value) <= _MOST_ITEMS:
        for item in value:
            yield from _items(item)


def _is_part(value: Any) -> bool:
    if isinstance(value, DataLoader | Dataset | Sampler) or _is_node_splitter(value):
        return True
    if isinstance(value, Tensor | nn.Module | FunctionType | type):
        return False
    return hasattr(value, "__dict__") and (hasattr(value, "__iter__") or hasattr(value, "__next__"))


def warn_of_part(loader: Any) -> None:
    """Warn if a single process reads only one of several splits of its data."""
    mark = find_mark(loader)
    if mark is not None and mark.kind == "known" and mark.world_size is not None:
        warnings.warn(
            f"{name_of(loader)} is split for {mark.world_size} processes ({mark}), but this run "
            "has one process, which reads this split only",
            stacklevel=2,
        )


def name_of(loader: Any) -> str:
    """The class of a loader's data; of a custom loader, its class."""
    data = loader.dataset if type(loader) is DataLoader else loader
    return type(data).__name__


def repeats_of(loader: Any) -> int:
    """How many samples a `DistributedSampler` in a loader repeats, or leaves out if negative."""
    for part in parts_of(loader):
        if isinstance(part, DistributedSampler) and part.num_replicas > 1:
            return part.total_size - len(part.dataset)  # type: ignore[arg-type]
    return 0
