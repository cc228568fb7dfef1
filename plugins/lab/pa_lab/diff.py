"""Compare two training states bit for bit, and name each difference as users know it."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pa_core.plugin import StateReader, decode

_MISSING = "missing"


@dataclass(frozen=True)
class Difference:
    """One difference between two training states.

    Attributes:
        part: ``"weights"``, ``"optimizer"``, ``"scheduler"``, ``"scaler"``, ``"run history"``,
            ``"position"``, ``"running loss"``, ``"random generators"`` or ``"plugin 'name'"``.
        name: a parameter, a metric with its epoch, or a key.
        first: the value in the first state, as text.
        second: the value in the second state, as text.
    """

    part: str
    name: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.part}, {self.name}: {self.first} and {self.second}"


def compare_states(
    first: str | Path, second: str | Path, *, ignore_plugins: Collection[str] = ()
) -> list[Difference]:
    """Compare everything that two states hold, except how many seconds the runs took.

    Args:
        first: a training state.
        second: another training state.
        ignore_plugins: names of plugins whose state may differ, such as one that reads a clock.

    Returns:
        Every difference, weights first; an empty list if the states are the same, bit for bit.

    Raises:
        TrainingStateError: if one of them is damaged.
    """
    parts = [_parts_of(state, ignore_plugins) for state in (first, second)]
    return [
        Difference(part, name or "as a whole", *values)
        for part in dict.fromkeys([*parts[0], *parts[1]])
        for name, *values in _walk("", *(content.get(part, _MISSING) for content in parts))
    ]


def _parts_of(state: str | Path, ignore_plugins: Collection[str]) -> dict[str, Any]:
    """What a state holds, by the parts of `Difference`."""
    reader = StateReader(state)
    content = decode(
        _opened(reader.read_json("state.json")), reader.read_tensors("state.safetensors")
    )
    names = [name for group in content["parameters"] for name in group]
    weights = reader.read_tensors("model.safetensors")
    optimizer = _joined(content["optimizer"] or {"state": {}})
    entries = {_parameter_name(names, index): v for index, v in optimizer["state"].items()}
    parts = {
        # In the order of the model, which a file of tensors doesn't keep.
        "weights": {name: weights.pop(name) for name in names if name in weights}
        | dict(sorted(weights.items()))
        | content["weights"]["extra"],
        "optimizer": optimizer | {"state": entries},
        "scheduler": content["scheduler"],
        "scaler": content["scaler"],
        "run history": _by_metric(content["run_history"]),
        "position": _without_seconds(content["position"]),
    }
    for rank in range(reader.manifest["run"]["num_processes"]):
        name, whose = f"process-{rank:05d}", f" of process {rank}" if rank else ""
        tensors = reader.read_tensors(f"{name}.safetensors")
        process = decode(_opened(reader.read_json(f"{name}.json")), tensors)
        parts[f"running loss{whose}"] = process["loss"]
        for plugin, value in process["plugins"].items():
            if plugin not in ignore_plugins:
                parts[f"plugin {plugin!r}{whose}"] = value
        parts[f"random generators{whose}"] = process["generators"]
    return parts


def _joined(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The state of several optimizers as that of one, with their parameters in a row."""
    if "optimizers" not in optimizer:
        return optimizer
    entries: dict[Any, Any] = {}
    groups: list[Any] = []
    for one in optimizer["optimizers"]:
        before = sum(len(group["params"]) for group in groups)
        entries |= {before + index: value for index, value in one["state"].items()}
        groups += one["param_groups"]
    return {"state": entries, "param_groups": groups}


def _parameter_name(names: list[str], index: Any) -> str:
    return names[index] if isinstance(index, int) and index < len(names) else str(index)


def _by_metric(history: Mapping[str, Any]) -> dict[str, Any]:
    """A run history by metric, epoch, and number of the record within the epoch."""
    named: dict[str, Any] = {}
    for record in history.get("records", ()):
        base = f"{record['metric']} of epoch {record['epoch']}"
        name, number = base, 1
        while name in named:
            number += 1
            name = f"{base} (record {number})"
        named[name] = _without_seconds(record)
    return named | {key: value for key, value in history.items() if key != "records"}


def _opened(value: Any) -> Any:
    """Encoded data in which tensors of subclasses are dicts, as their classes may not be loaded."""
    if isinstance(value, dict):
        value = value["$subclass"] if value.keys() == {"$subclass"} else value
        return {key: _opened(item) for key, item in value.items()}
    return [_opened(item) for item in value] if isinstance(value, list) else value


def _without_seconds(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "seconds"}


def _walk(name: str, first: Any, second: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the name and both values of each differing leaf."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        for key in dict.fromkeys([*first, *second]):
            yield from _walk(
                f"{name}.{key}" if name else str(key),
                first.get(key, _MISSING),
                second.get(key, _MISSING),
            )
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple):
        for index in range(max(len(first), len(second))):
            pair = (items[index] if index < len(items) else _MISSING for items in (first, second))
            yield from _walk(f"{name}.{index}" if name else str(index), *pair)
    elif not _is_same(first, second):
        yield name, *_show(first, second)


def _is_same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        first, second = torch.from_numpy(first), torch.from_numpy(second)
    if isinstance(first, Tensor):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and torch.equal(_bytes_of(first), _bytes_of(second))
        )
    if isinstance(first, float):
        return struct.pack("d", first) == struct.pack("d", second)  # NaN is NaN, 0 isn't -0
    return bool(first == second)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _show(first: Any, second: Any) -> tuple[str, str]:
    """Two values as text; for tensors of equal shape, the first differing element."""
    pair = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (first, second)]
    if all(isinstance(value, Tensor) for value in pair) and pair[0].shape == pair[1].shape:
        flat = [value.detach().reshape(-1) for value in pair]
        differ = (flat[0] != flat[1]).nonzero()
        index = int(differ[0]) if len(differ) else 0
        return f"{flat[0][index].item()!r} at element {index}", repr(flat[1][index].item())
    shown = [
        f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        for value in pair
    ]
    return tuple(text if len(text) <= 60 else f"{text[:57]}…" for text in shown)  # type: ignore[return-value]
