"""Tell data that yield ready batches from data to make batches from."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def is_loader(data: Any) -> bool:
    """Whether `data` yields ready batches, rather than being a dataset to make batches from.

    A loader may be an `IterableDataset` too, as WebDataset's ``WebLoader`` is: a class whose name
    ends in "Loader", or a pipeline that begins with a `DataLoader` and doesn't unbatch its output.
    """
    if isinstance(data, DataLoader):
        return True
    if not isinstance(data, IterableDataset):
        return hasattr(data, "__iter__") and not hasattr(data, "__getitem__")
    stages = _stages(data)
    if stages:
        return is_loader(stages[0]) and _last_batching(stages) != "unbatched"
    return any(base.__name__.endswith("Loader") for base in type(data).__mro__)


def is_batched_pipeline(data: Any) -> bool:
    """Whether `data` is a WebDataset pipeline with a stage ``batched``, so that it yields batches.

    Unlike a loader it is a dataset: the workers of a `DataLoader` may read it.
    """
    stages = _stages(data)
    if not stages:
        return False
    return (_last_batching(stages) or is_batched_pipeline(stages[0])) in ("batched", True)


def held_loader(data: Any) -> str | None:
    """The name of the attribute in which an `IterableDataset` holds a `DataLoader`, if any.

    Such a class may yield batches, as the loader does, or samples that it makes of them.
    """
    if not isinstance(data, IterableDataset) or _stages(data):
        return None
    held = (name for name, value in vars(data).items() if isinstance(value, DataLoader))
    return next(held, None)


def _stages(data: Any) -> list[Any] | None:
    """The stages of a WebDataset pipeline."""
    stages = getattr(data, "pipeline", None)
    return stages if isinstance(stages, list) and stages else None


def _last_batching(stages: list[Any]) -> str | None:
    """The last stage of a WebDataset pipeline that makes batches or takes them apart, if any."""
    for stage in reversed(stages):
        name = getattr(getattr(stage, "f", stage), "__name__", "").lstrip("_")
        if name in ("batched", "unbatched", "unlisted"):
            return "batched" if name == "batched" else "unbatched"
    return None
