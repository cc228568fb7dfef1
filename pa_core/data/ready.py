"""Tell data that yield ready batches from data to make batches from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pa_core.errors import listed, shown


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


def check_loader(loader: Any, origin: str) -> None:
    """Check that this can be iterated over to get batches.

    Args:
        loader: what a plugin has created.
        origin: the start of the error's sentence, such as ``"create_train_dataloader returned"``.

    Raises:
        TypeError: for a dataset, which yields samples, and for what isn't a loader at all.
    """
    expected = "it must return a loader of batches, such as torch.utils.data.DataLoader(dataset)"
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(f"{origin} {shown(loader)}, whose items are samples; {expected}")
    kind = type(loader)
    is_iterable = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    if not is_iterable or isinstance(loader, type | str | bytes | Mapping | Tensor):
        raise TypeError(f"{origin} {shown(loader)}; {expected}")


def check_dataset(data: Any, part: str, *, is_collated: bool) -> None:
    """Check that these can be data, before they fail in a way that says nothing about them.

    Args:
        data: a dataset or a loader.
        part: what they are for, such as ``"train"``.
        is_collated: whether the user makes the batches of them.

    Raises:
        TypeError: saying what to pass.
    """
    expected = "a dataset with __getitem__ and __len__, an IterableDataset, or a loader of batches"
    if isinstance(data, type | str | bytes) or not (
        hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    ):
        raise TypeError(f"The {part} data are {shown(data)}; expected {expected}")
    if isinstance(data, Mapping) and len(data) and 0 not in data:
        names = [str(name) for name in data]
        raise TypeError(
            f"The {part} data are a dict with the keys {listed(names)}; pass one of its datasets, "
            f"such as data[{names[0]!r}]"
        )
    if type(data) is tuple and not is_collated and all(isinstance(one, Tensor) for one in data):
        shapes = {tuple(one.shape) for one in data}
        if len(shapes) > 1 and len({shape[:1] for shape in shapes}) == 1:
            raise TypeError(
                f"The {part} data are a tuple of {len(data)} tensors of the same length; make a "
                "dataset of them: TensorDataset(*tensors)"
            )


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
