"""Encode state as strict JSON plus named tensors, and decode it; never a pickle.

What JSON lacks is written as an object with one key that begins with ``$``: tensors (by name),
NumPy arrays, tuples, NaN and infinities, dtypes, dictionaries whose keys aren't all strings, the
records of a run history, whose columns are tensors, and tensors of subclasses, which are taken
apart into plain ones.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pa_core.checkpoint.storage import parse_json
from pa_core.engine.subclasses import (
    class_name,
    flatten,
    is_plain,
    is_wrapper,
    plain_parts,
    rebuild,
)
from pa_core.errors import TrainingStateError
from pa_core.tracking import RecordTable

Json = dict[str, Any] | list[Any] | str | int | float | bool | None


def encode(value: Any, tensors: dict[str, Tensor], owner: str) -> Json:
    """Encode `value` as JSON; add its tensors to `tensors`, under names that begin with `owner`.

    Args:
        value: nested mappings, sequences, numbers, text, tensors and arrays.
        tensors: filled with the tensors.
        owner: whose state it is and where in it, for names and errors: ``optimizer.state``.

    Raises:
        TrainingStateError: for a value of any other type, naming `owner` and the key.

    >>> encode({"decay": (0.9, float("inf"))}, {}, "plugin")
    {'decay': {'$tuple': [0.9, {'$float': 'inf'}]}}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Tensor):
        if is_plain(value):
            return {"$tensor": _name_tensor(value, tensors, owner)}
        return {"$subclass": _take_apart(value, tensors, owner)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # A copy, since torch doesn't accept read-only memory.
        return {"$array": _name_tensor(torch.from_numpy(value.copy()), tensors, owner)}
    if isinstance(value, np.generic):
        return encode(value.item(), tensors, owner)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, RecordTable):
        columns = value.columns(lambda entry, place: _json_text(entry, f"{owner}.{place}"))
        placed = {
            name: _name_tensor(torch.from_numpy(column), tensors, f"{owner}.{name}")
            for name, column in columns.items()
        }
        return {"$records": {"metrics": value.names, "columns": placed}}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(item, tensors, f"{owner}.{key}") for key, item in value.items()}
        items = [
            [encode(key, tensors, owner), encode(item, tensors, f"{owner}.{key}")]
            for key, item in value.items()
        ]
        return {"$items": items}
    if isinstance(value, list | tuple):
        encoded = [encode(item, tensors, f"{owner}.{i}") for i, item in enumerate(value)]
        return encoded if isinstance(value, list) else {"$tuple": encoded}
    raise TrainingStateError(
        f"{owner} can't be saved: {type(value).__name__} is not a plain data type. A state may "
        "contain numbers, text, lists, tuples, dictionaries, tensors and NumPy arrays"
    )


def _take_apart(value: Tensor, tensors: dict[str, Tensor], owner: str) -> Json:
    """The description of a tensor of a subclass; adds the plain tensors in it to `tensors`."""
    name = class_name(value)
    if not is_wrapper(value):
        raise TrainingStateError(
            f"{owner} can't be saved: {name} is a subclass of Tensor without __tensor_flatten__ "
            "and __tensor_unflatten__, so it would be restored as a plain tensor. To save it as "
            "one, convert it with tensor.as_subclass(torch.Tensor)"
        )
    inner, context = flatten(value)
    in_context: dict[str, Tensor] = {}
    try:
        described = encode(context, in_context, "context")
    except TrainingStateError as error:
        raise TrainingStateError(
            f"{owner} can't be saved. In what __tensor_flatten__ of {name} returns, {error}"
        ) from error
    if in_context:
        raise TrainingStateError(
            f"{owner} can't be saved, since __tensor_flatten__ of {name} returns a context that "
            "holds tensors: it must list them with the inner tensors"
        )
    return {
        "class": name,
        "inner": {key: encode(one, tensors, f"{owner}.{key}") for key, one in inner.items()},
        "context": described,
        "size": list(value.shape),
        "stride": list(value.stride()),
    }


def _json_text(value: Any, owner: str) -> bytes:
    encoded = encode(value, {}, owner)
    return json.dumps(encoded, allow_nan=False, separators=(",", ":")).encode()


def _name_tensor(value: Tensor, tensors: dict[str, Tensor], name: str) -> str:
    base, number = name, 1
    while name in tensors:
        name, number = f"{base}#{number}", number + 1
    tensors[name] = value.detach()
    return name


def decode(value: Json, tensors: Mapping[str, Tensor]) -> Any:
    """Decode what `encode` has returned.

    Raises:
        TrainingStateError: if a tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind in ("$tensor", "$array"):
            tensor = _tensor_named(content, tensors)
            return tensor if kind == "$tensor" else tensor.numpy()
        if kind == "$subclass":
            inner = {key: decode(item, tensors) for key, item in content["inner"].items()}
            context = decode(content["context"], tensors)
            return rebuild(content["class"], inner, context, content["size"], content["stride"])
        if kind == "$dtype":
            return _dtype_named(content)
        if kind == "$records":
            return _decode_records(content, tensors)
        if kind == "$tuple":
            return tuple(decode(item, tensors) for item in content)
        if kind == "$float":
            return float(content)
        if kind == "$items":
            return {decode(key, tensors): decode(item, tensors) for key, item in content}
    return {key: decode(item, tensors) for key, item in value.items()}


def _dtype_named(name: Json) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise TrainingStateError(f"PyTorch has no dtype {name!r}")
    return dtype


def _tensor_named(name: Json, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise TrainingStateError(f"The state has no tensor named {name!r}")
    return tensors[name]  # type: ignore[index]


def _decode_records(content: Any, tensors: Mapping[str, Tensor]) -> RecordTable:
    columns = {
        name: _tensor_named(placed, tensors).numpy() for name, placed in content["columns"].items()
    }
    lines = columns.pop("entries").tobytes() if "entries" in columns else b""
    entries = parse_json(b"[" + lines.rstrip().replace(b"\n", b",") + b"]")
    return RecordTable.from_columns(content["metrics"], columns, decode(entries, {}), lines)


def encode_weights(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a module's state dict into tensors under their own names, and everything else.

    Returns:
        The tensors, each once; and ``{"aliases": {name: name of the same tensor}, "extra": …}``,
        with those of subclasses in ``extra``.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            extra[name] = value
            continue
        place = _place(value)
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        if is_wrapper(value):
            extra[name] = value
        else:
            tensors[name] = value.detach()
    return tensors, {"aliases": aliases, "extra": extra}


def decode_weights(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Rebuild the state dict that `encode_weights` has split."""
    state: dict[str, Any] = OrderedDict(tensors)
    state.update(rest["extra"])
    state.update({name: state[held] for name, held in rest["aliases"].items()})
    return state


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where in memory a tensor is, and how it is read from there."""
    parts = [
        (part.device, part.data_ptr(), part.shape, part.stride(), part.dtype)
        for part in plain_parts(tensor)
    ]
    return None if is_plain(tensor) else type(tensor), *parts
