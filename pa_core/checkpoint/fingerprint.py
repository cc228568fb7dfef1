"""The fingerprint of a run: what its numbers depend on, as plain data to compare two runs by.

It is recorded at the start, before training or restoring changes optimizer and scheduler.

None of it runs the user's code: a sample is fetched only from a dataset of plain tensors, since
fetching may be slow, draw random numbers or have side effects.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from dis import get_instructions
from functools import partial
from pathlib import PurePath
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.source import length_of
from pa_core.engine.loss_parameters import trained_loss
from pa_core.engine.optimizers import given_schedulers
from pa_core.engine.subclasses import plain_parts
from pa_core.engine.wrappers import clean_state_dict, uncompiled
from pa_core.settings.secrets import mask_secrets
from pa_core.settings.validation import marked_fields

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_ROWS = 16  # of a tensor in memory that are hashed
_SMALL = 4096  # a tensor of up to this many elements is hashed whole, such as class weights


def describe_plugins(trainer: Trainer) -> dict[str, Any]:
    """Describe each plugin: where it comes from, its table of the settings, and its values."""
    return {name: _describe_plugin(trainer, name) for name in trainer.plugins.by_name}


def _describe_plugin(trainer: Trainer, name: str) -> dict[str, Any]:
    source = trainer.plugins.sources.get(name)
    plugin = trainer.plugins.by_name[name]
    settings = trainer.settings.shown(name, plugin)
    return {
        "origin": source and source.origin,
        "changes_training": bool(getattr(plugin, "changes_training", True)),
        "distribution": source and source.distribution,
        "version": source and source.version,
        "target": source and source.target,
        "settings": {key: _as_json(value) for key, value in settings.items()},
        "values": _plugin_values(plugin),
    }


def _plugin_values(plugin: object) -> dict[str, Any]:
    """What a plugin was built with, as far as it shows: its settings, or constructor arguments.

    An argument shows if the plugin keeps it under its name. Paths aren't compared.
    """
    settings = getattr(plugin, "settings", None)
    if isinstance(settings, BaseModel):
        marked = marked_fields(type(settings))
        fields = [name for name in type(settings).model_fields if name not in marked]
        values = {name: getattr(settings, name) for name in fields}
    else:
        try:
            names = inspect.signature(type(plugin)).parameters
        except (TypeError, ValueError):  # a class of C code
            return {}
        kept = getattr(plugin, "__dict__", {})
        values = {name: kept.get(name, kept.get(f"_{name}")) for name in names}
    left_out = ("save_dir", *getattr(type(plugin), "locked_files", ()))
    visible = {name: _visible(value, depth=1) for name, value in values.items()}
    shown = {name: value for name, value in visible.items() if value is not None}
    return dict(mask_secrets({k: v for k, v in shown.items() if k not in left_out}))


def _as_json(value: Any) -> Any:
    """Strict JSON of TOML, which also has dates and infinities."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) else str(value)


def run_fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Describe what a run's numbers depend on; called at its start, before anything is restored.

    Optimizer and scheduler are described as the script has created them. So a learning rate that
    was changed in the script is found, although resuming restores the saved one. What is in effect
    after that, and is saved in further states, says `pa_core.checkpoint.compatibility.in_effect`.
    """
    config = trainer.run_config
    model = trainer.get_model(keep_torch_compile=False)
    kwargs = (config and config.train_dl_kwargs) or {}
    return {
        "num_processes": trainer._engine.num_processes,
        "mixed_precision": trainer._accelerator.mixed_precision,
        "per_device_batch_size": config and config.train_per_device_batch_size,
        "gradient_accumulation_steps": config and config.gradient_accumulation_steps,
        "gradient_clip_norm": config and config.gradient_clip_norm,
        "gradient_clip_value": config and config.gradient_clip_value,
        **data_fingerprint(trainer),
        "eval_data": _describe_eval_data(trainer),
        "batch_limit": trainer.train_batch_limit,
        "collate_fn": describe(kwargs.get("collate_fn") or trainer.collate_fn),
        "loss": _describe_loss(trainer),
        "loss_parts": describe_parts(trainer.loss_func),
        "model": type(model).__name__,
        "layers": describe_layers(model),
        # Without accelerate's wrapper, which depends on the hardware.
        "optimizer": _for_each(trainer.optimizers, lambda one: type(one).__name__),
        **describe_optimization(trainer),
        "plugins": describe_plugins(trainer),
    }


def _describe_loss(trainer: Trainer) -> Any:
    described, trained = describe(trainer.loss_func), trained_loss(trainer)
    if trained is None:
        return described
    restored = clean_state_dict(trained)  # so it doesn't matter what the script creates
    return {name: value for name, value in described.items() if name not in restored}


def describe_optimization(trainer: Trainer) -> dict[str, Any]:
    """Describe what a training state restores together with its settings."""
    schedulers = given_schedulers(trainer.scheduler)
    return {
        "optimizer_settings": describe_groups(trainer.optimizer),
        "scheduler": _for_each(schedulers, describe),
        "scheduler_parts": _for_each(schedulers, describe_parts),
    }


def frozen_parameters(trainer: Trainer) -> list[str]:
    """The names of the parameters that aren't trained."""
    model = trainer.get_model(keep_torch_compile=False)
    return [name for name, one in model.named_parameters() if not one.requires_grad]


DATA_ENTRIES = ("dataset_length", "dataset", "order", "sampler", "stream")
"""The entries of `data_fingerprint`.

``sampler`` is one of them only for torch's, and ``stream`` only where workers decide the order.
"""


def data_fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Describe the training data; plugins may change them between epochs.

    If each process has its own data, which makes this a collective, what differs between processes
    is a list with an entry for each of them.
    """
    described = {
        **_describe_data(trainer),
        "order": _describe_order(trainer.train_dataloader),
    }
    if (sampler := _describe_sampler(trainer.train_dataloader)) is not None:
        described["sampler"] = sampler
    if trainer.num_processes > 1 and _has_own_split(trainer.train_dataloader):
        everywhere = trainer.gather_objects(described)
        for name in described:
            values = [one.get(name) for one in everywhere]
            described[name] = values if values != values[:1] * len(values) else values[0]
    stream = _describe_stream(trainer.train_dataloader)
    return described if stream is None else described | {"stream": stream}


def _has_own_split(loader: Any) -> bool:
    """Whether each process has its own data."""
    from pa_core.data.process_split import OwnSplitLoader

    return isinstance(loader, OwnSplitLoader)


def next_data_fingerprint(trainer: Trainer) -> dict[str, Any] | None:
    """Describe the training data of the next epoch, if they aren't those of the present one."""
    return _describe_data(trainer) if trainer._data.has_other_train_data else None


def _describe_data(trainer: Trainer) -> dict[str, Any]:
    data = trainer.train_dataset
    return {"dataset_length": length_of(data), "dataset": describe_dataset(data)}


def _describe_eval_data(trainer: Trainer) -> dict[str, Any]:
    """Describe the evaluation data, which decide what the best model is, by their names."""
    given, described = trainer.eval_dataset, dict[str, Any]()
    for name, data in (given if isinstance(given, Mapping) else {None: given}).items():
        if data is not None:
            one = {"length": length_of(data)} | describe_dataset(data)
            if trainer.num_processes > 1 and _has_own_split(trainer.eval_dataloaders.get(name)):
                one = trainer.gather_objects(one)[0]
            described[name or "eval"] = one
    return described


def describe(value: Any) -> Any:
    """Describe a function by its name, an object by its class and its plain public attributes.

    A module's small buffers and parameters are included.

    >>> describe(nn.CrossEntropyLoss(label_smoothing=0.1))["label_smoothing"]
    0.1
    >>> describe(partial(math.isclose, rel_tol=0.5))
    {'function': 'isclose', 'rel_tol': 0.5}
    """
    if value is None:
        return None
    value = uncompiled(value)
    if isinstance(value, partial):
        arguments = {str(number): item for number, item in enumerate(value.args)} | value.keywords
        return {"function": describe(value.func), **_plain_items(arguments)}
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return value.__qualname__
    described = {"class": type(value).__qualname__, **_plain_items(_unmarked(value))}
    if isinstance(value, nn.Module):
        described.pop("training", None)
        for name, tensor in clean_state_dict(value).items():
            if isinstance(tensor, Tensor) and tensor.numel() <= _SMALL:
                described[name] = _hash(tensor)
    return described


def describe_parts(value: Any) -> dict[str, Any]:
    """Describe what `describe` leaves out: settings of an object's parts, and of a function.

    A function's settings are its default arguments, the values of the enclosing function, and
    numbers: global variables and fractions in its code.

    >>> describe_parts(lambda output, target, power=2: 0.5 * (output - target) ** power)
    {'power': 2, 'numbers': [0.5]}
    >>> describe_parts(nn.Sequential(nn.L1Loss(reduction="sum")))
    {'modules': {'0': {'class': 'L1Loss', 'reduction': 'sum'}}}
    """
    found = _visible(value)
    if not isinstance(found, dict):
        return {}
    shallow = describe(value)
    known = shallow if isinstance(shallow, dict) else {"function": shallow}
    parts = {name: item for name, item in found.items() if known.get(name) != item}
    return dict(mask_secrets(parts))


_DEPTH = 8  # of parts within parts
_MANY = 64  # a longer list is hashed
_TOO_MANY = 10_000  # an even longer one is data, not a setting
_SCHEDULER = torch.optim.lr_scheduler.LRScheduler
_LEFT_OUT = (PurePath, ModuleType, SecretStr, SecretBytes, Secret)
_NO_SETTINGS = {"training", "optimizer"} | {  # of a module, and of a scheduler
    *("_step_count", "_is_initial", "_get_lr_called_within_step", "_last_lr"),
}


def _visible(value: Any, depth: int = 0) -> Any:
    """The settings that show in a value and its parts; None if there are none."""
    inner, value = partial(_visible, depth=depth + 1), uncompiled(value)
    if value is None or depth > _DEPTH or isinstance(value, _LEFT_OUT):
        return None
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _visible_items(value, inner) if len(value) <= _TOO_MANY else None
    if isinstance(value, partial):
        arguments = {str(number): item for number, item in enumerate(value.args)} | value.keywords
        return {"function": inner(value.func), **(inner(arguments) or {})}
    if isinstance(value, MethodType):
        owner = describe(value.__self__) if depth == 0 else type(value.__self__).__qualname__
        return {"function": value.__qualname__, "of": owner}
    if isinstance(value, FunctionType):
        settings = _settings_of(value, inner)
        return {"function": value.__qualname__, **settings} if settings else value.__qualname__
    plain = _plain(value)
    if plain is not None or isinstance(value, Tensor):
        return plain
    if isinstance(value, nn.Module) and depth and any(True for _ in value.parameters()):
        return {"class": type(value).__qualname__, "layers": describe_layers(value)}
    has_settings = isinstance(value, nn.Module | _SCHEDULER | BaseModel) or is_dataclass(value)
    if not (has_settings or depth == 0):  # what else it holds may change at any time
        return {"class": type(value).__qualname__}
    return describe(value) | (inner(_attributes(value)) or {})


def _visible_items(value: Any, inner: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        items = {str(key): inner(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None} or None
    listed = [inner(item) for item in value]
    if isinstance(value, set | frozenset):
        listed.sort(key=repr)
    if all(item is None for item in listed):
        return None
    return listed if len(listed) <= _MANY else _hash_of_text(repr(listed))


def _unmarked(value: Any) -> dict[str, Any]:
    """An object's attributes, without the fields that a model marks as secrets."""
    kept = dict(getattr(value, "__dict__", {}))
    marked = marked_fields(type(value)) if isinstance(value, BaseModel) else set()
    return {name: item for name, item in kept.items() if name not in marked}


def _attributes(value: Any) -> dict[str, Any]:
    """An object's attributes; of a module, those that the user has set, and its submodules."""
    kept = _unmarked(value)
    for name in getattr(type(value), "__slots__", ()):
        # Dunder slots, such as the `__dict__` of pydantic's models, hold no setting.
        if isinstance(name, str) and name[:2] != "__" and hasattr(value, name):
            kept[name] = getattr(value, name)
    if isinstance(value, nn.Module):
        public = {name: item for name, item in kept.items() if name[0] != "_"}
        kept = public | {"modules": dict(value.named_children())}
    return {name: item for name, item in kept.items() if name not in _NO_SETTINGS}


def _settings_of(function: FunctionType, inner: Callable[[Any], Any]) -> dict[str, Any]:
    """Default arguments, values of the enclosing function, and numbers; no mutable values."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    given = function.__defaults__ or ()
    found = dict(zip(names[len(names) - len(given) :], given, strict=True))
    found |= function.__kwdefaults__ or {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    for name in code.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, int | float):
            found[name] = value
    for step in get_instructions(code):
        if step.opname in ("STORE_GLOBAL", "STORE_DEREF"):  # a counter, or the like
            found.pop(step.argval, None)
    found["numbers"] = tuple(one for one in code.co_consts if isinstance(one, float)) or None
    mutable = (list, dict, set, Tensor)
    visible = {
        name: inner(value) for name, value in found.items() if not isinstance(value, mutable)
    }
    return {name: value for name, value in visible.items() if value is not None}


def describe_dataset(dataset: Any) -> Any:
    """Describe a dataset by its type, and by its content if that is safe and cheap.

    A few rows of tensors in memory are hashed, and the indices of a `Subset`. A dataset may
    identify itself by a text attribute ``fingerprint``, or by its ``column_names``. Samples are
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
        # Not `getattr` alone: some datasets have a value for any name.
        if hasattr(type(dataset), name) or name in getattr(dataset, "__dict__", {}):
            found = _plain(getattr(dataset, name))
            if found is not None:
                described[name] = found
    return described


def describe_layers(model: nn.Module) -> dict[str, int]:
    """Count the layers of a model by their type and settings.

    >>> describe_layers(nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1)))
    {'Dropout(p=0.1, inplace=False)': 2}
    """
    leaves = [module for module in model.modules() if not list(module.children())]
    return dict(Counter(f"{type(leaf).__name__}({leaf.extra_repr()})" for leaf in leaves))


def _for_each(things: Sequence[Any], describe_one: Callable[[Any], Any]) -> Any:
    """The description of a thing, None without any, or the descriptions of several."""
    described = [describe_one(thing) for thing in things]
    return described if len(described) > 1 else next(iter(described), None)


def describe_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The plain settings of each parameter group: learning rate, weight decay and so on."""
    groups = getattr(optimizer, "param_groups", [])
    return [_plain_items({k: v for k, v in group.items() if k != "params"}) for group in groups]


def _describe_order(loader: Any) -> dict[str, Any] | None:
    """Describe what decides the samples of a loader and their order."""
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


_SAMPLER_SETTINGS = ("weights", "indices", "replacement", "shuffle", "seed", "drop_last")


def _describe_sampler(loader: Any) -> dict[str, Any] | None:
    """The settings of a sampler of torch, such as its weights; None for any other.

    What a sampler of another class holds may change at any time.
    """
    inner = getattr(loader, "loader", loader)
    sampler: Any = getattr(inner, "sampler", None)
    sampler = getattr(getattr(inner, "batch_sampler", None), "sampler", sampler)
    if not type(sampler).__module__.startswith("torch.utils.data."):
        return None
    kept = {name: getattr(sampler, name) for name in _SAMPLER_SETTINGS if hasattr(sampler, name)}
    if getattr(sampler, "replacement", False):
        kept["num_samples"] = sampler.num_samples
    found = {}
    for name, value in kept.items():
        if name in ("weights", "indices"):
            numbers = value if isinstance(value, Tensor) else torch.as_tensor(list(value))
            found[name] = _hash(numbers)
        else:
            found[name] = _plain(value)
    return found or None


def _describe_stream(loader: Any) -> dict[str, Any] | None:
    """The number of workers of a loader whose batches depend on it; None for any other."""
    if loader is None or isinstance(loader, KeyedDataLoader):
        return None
    from pa_core.data.keyed_fetch import can_be_keyed

    inner = getattr(loader, "loader", loader)
    workers = None if can_be_keyed(inner) else _plain(getattr(inner, "num_workers", None))
    return None if workers is None else {"num_workers": workers}


def _describe_rows(tensor: Tensor) -> dict[str, Any]:
    rows = len(tensor)
    places = sorted({number * (rows - 1) // (_ROWS - 1) for number in range(_ROWS)}) if rows else []
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "rows": _hash(tensor[torch.tensor(places, dtype=torch.int64, device=tensor.device)]),
    }


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for part in plain_parts(tensor):
        flat = part.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _hash_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain_items(items: Mapping[str, Any]) -> dict[str, Any]:
    found = {str(name): _plain(value) for name, value in items.items()}
    plain = {name: value for name, value in found.items() if value is not None and name[0] != "_"}
    return dict(mask_secrets(plain))


def _plain(value: Any) -> Any:
    """Numbers, text, names of functions, and lists of them; None for anything else."""
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
