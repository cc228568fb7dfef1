"""What makes a run's numbers what they are, as plain data that two runs can be compared by.

Nothing here runs code of the user's: no sample is fetched from a dataset that isn't plain tensors,
since fetching may be slow, draw random numbers or have effects.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from pa_core.data.loader import KeyedDataLoader

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_ROWS = 16  # of a tensor in memory that are looked at
_SMALL = 4096  # elements of a tensor that is looked at whole, such as the weights of classes


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Describe what a run's numbers depend on, at its start and before anything is restored.

    Optimizer and schedule are described as they are built, since a state's own values replace
    theirs: that is how a changed learning rate is noticed.
    """
    config, loader = trainer.run_config, trainer._train_dataloader
    model = trainer.get_model(keep_torch_compile=False)
    kwargs = trainer._train_dl_kwargs or {}
    return {
        "num_processes": trainer._engine.num_processes,
        "mixed_precision": trainer._accelerator.mixed_precision,
        "per_device_batch_size": config and config.train_per_device_batch_size,
        "gradient_accumulation_steps": config and config.gradient_accumulation_steps,
        "gradient_clip_norm": config and config.gradient_clip_norm,
        "gradient_clip_value": config and config.gradient_clip_value,
        "dataset_length": _length(trainer.train_dataset),
        "dataset": describe_dataset(trainer.train_dataset),
        "order": _describe_order(loader),
        "batch_limit": trainer.train_batch_limit,
        "collate_fn": describe(kwargs.get("collate_fn") or trainer.collate_fn),
        "loss": describe(trainer.loss_func),
        "model": type(model).__name__,
        "layers": describe_layers(model),
        # (without accelerate's wrapper, which depends on the hardware)
        "optimizer": type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        "optimizer_settings": describe_groups(trainer.optimizer),
        "scheduler": describe(trainer.scheduler),
    }


def describe(value: Any) -> Any:
    """A function by its name, an object by its class and its plain public attributes.

    Of a module, small buffers and parameters are part of it, too.

    >>> describe(nn.CrossEntropyLoss(label_smoothing=0.1))["label_smoothing"]
    0.1
    >>> describe(partial(math.isclose, rel_tol=0.5))
    {'function': 'isclose', 'rel_tol': 0.5}
    """
    if value is None:
        return None
    if isinstance(value, partial):
        arguments = {str(number): item for number, item in enumerate(value.args)} | value.keywords
        return {"function": describe(value.func), **_plain_items(arguments)}
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return value.__qualname__
    described = {"class": type(value).__qualname__, **_plain_items(getattr(value, "__dict__", {}))}
    if isinstance(value, nn.Module):
        described.pop("training", None)
        for name, tensor in value.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.numel() <= _SMALL:
                described[name] = _hash(tensor)
    return described


def describe_dataset(dataset: Any) -> Any:
    """A dataset by its type and length, and by more where that is sure and cheap.

    Of tensors in memory, a few rows are hashed; of a `Subset`, its indices. A dataset may say
    itself what it is, by a text attribute ``fingerprint``, or its ``column_names``. Samples are
    never fetched.
    """
    if dataset is None:
        return None
    described: dict[str, Any] = {"type": type(dataset).__qualname__}
    if isinstance(dataset, DataLoader):
        return described | {"dataset": describe_dataset(dataset.dataset)}
    if isinstance(dataset, TensorDataset):
        described["content"] = [_describe_rows(tensor) for tensor in dataset.tensors]
    elif isinstance(dataset, Subset):
        described["indices"] = _hash(torch.as_tensor(list(dataset.indices), dtype=torch.int64))
        described["of"] = describe_dataset(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        described["of"] = [describe_dataset(part) for part in dataset.datasets]
    for name in ("fingerprint", "column_names"):
        # (not `getattr` alone: some datasets answer to any name)
        if hasattr(type(dataset), name) or name in getattr(dataset, "__dict__", {}):
            found = _plain(getattr(dataset, name))
            if found is not None:
                described[name] = found
    return described


def describe_layers(model: nn.Module) -> dict[str, int]:
    """How many layers of each kind and setting a model has.

    >>> describe_layers(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1)))
    {'Dropout(p=0.1, inplace=False)': 2}
    """
    leaves = [module for module in model.modules() if not any(module.children())]
    return dict(Counter(f"{type(leaf).__name__}({leaf.extra_repr()})" for leaf in leaves))


def describe_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The plain settings of each of an optimizer's groups: learning rate, decay and the like."""
    groups = getattr(optimizer, "param_groups", [])
    return [_plain_items({k: v for k, v in group.items() if k != "params"}) for group in groups]


def _describe_order(loader: Any) -> dict[str, Any] | None:
    """In which order a loader gives which samples."""
    if loader is None:
        return None
    if isinstance(loader, KeyedDataLoader):
        sampler = loader.batch_sampler
        return {"shuffle": sampler.shuffle, "drop_last": sampler.drop_last}
    inner = getattr(loader, "loader", loader)
    samplers = {name: getattr(inner, name, None) for name in ("sampler", "batch_sampler")}
    return {
        "loader": type(inner).__qualname__,
        "drop_last": _plain(getattr(inner, "drop_last", None)),
        **{name: type(value).__qualname__ for name, value in samplers.items() if value is not None},
    }


def _describe_rows(tensor: Tensor) -> dict[str, Any]:
    rows = len(tensor)
    places = sorted({number * (rows - 1) // (_ROWS - 1) for number in range(_ROWS)}) if rows else []
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "rows": _hash(tensor[torch.tensor(places, dtype=torch.int64, device=tensor.device)]),
    }


def _hash(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(content).hexdigest()[:16]


def _plain_items(items: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(name): _plain(value) for name, value in items.items()}
    return {name: value for name, value in found.items() if value is not None and name[0] != "_"}


def _plain(value: Any) -> Any:
    """Numbers, text and lists of them; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(_plain(item) is not None for item in value):
        return [_plain(item) for item in value]
    if isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        return value.__qualname__
    return None


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
