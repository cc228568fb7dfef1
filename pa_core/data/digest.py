"""A digest of a batch, to compare what two runs or two processes read."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence, Set
from hashlib import blake2b
from inspect import isroutine
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_ELEMENTS = 8192
"""How many elements of a tensor, an array or a sequence are read at most; the rest is sampled."""
_MOST_CHARACTERS = 1 << 16
_GOLDEN_RATIO = 0.6180339887498949


def batch_digest(batch: Any) -> str:
    """The BLAKE2b digest of a batch, the same in every process and in every run.

    It reads tensors in host memory, NumPy arrays, numbers and strings, in any nesting of mappings,
    sequences, sets, dataclasses and other objects with attributes. Of large ones it reads the head,
    the tail and a sample. A tensor on another device adds its shape and dtype only, so there is no
    host-device synchronisation. Lists and tuples count as the same, and so do mappings of any type
    and order, as pinning memory and workers may change these.

    Args:
        batch: what a loader yields, before it is moved to the device.

    Returns:
        32 hexadecimal digits.
    """
    return blake2b(_bytes_of(batch, ()), digest_size=16).hexdigest()


def _bytes_of(value: Any, within: tuple[int, ...]) -> bytes:
    """What a value adds to the digest; `within` are the ids of the objects that hold it."""
    if value is None or isinstance(value, bool | int | float | complex):
        return _tagged(type(value).__name__, repr(value).encode())
    if isinstance(value, str):
        return _tagged("str", _ends(value.encode("utf-8", "surrogatepass")))
    if isinstance(value, bytes | bytearray):
        return _tagged("bytes", _ends(bytes(value)))
    if isinstance(value, Tensor):
        return _bytes_of_tensor(value)
    if isinstance(value, np.ndarray | np.generic) and _is_plain(value.dtype):
        array = np.asarray(value)
        name = f"array {array.dtype.str} {array.shape}"
        return _tagged(name, _sampled_array(array).tobytes())
    if isinstance(value, enum.Enum):
        return _tagged(type(value).__qualname__, value.name.encode())
    if id(value) in within:
        return _tagged("cycle")
    within += (id(value),)
    name = f"object {type(value).__qualname__}"
    parts: Iterable[bytes] = ()
    if isinstance(value, np.ndarray):
        name = f"objects {value.shape}"
        parts = [_bytes_of(item, within) for item in _sampled_array(value).ravel().tolist()]
    elif isinstance(value, Mapping):
        name, parts = f"mapping {len(value)}", _bytes_of_items(value, within)
    elif isinstance(value, Sequence):
        name = f"sequence {len(value)}"
        parts = [_bytes_of(value[place], within) for place in _positions(len(value)).tolist()]
    elif isinstance(value, Set):
        name, parts = f"set {len(value)}", sorted(_bytes_of(item, within) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        parts = _bytes_of_items(fields, within)
    elif not (isinstance(value, type | ModuleType) or isroutine(value)):
        parts = _bytes_of_items(getattr(value, "__dict__", {}), within)
    return _tagged(name, *parts)


def _bytes_of_items(items: Mapping[Any, Any], within: tuple[int, ...]) -> list[bytes]:
    return sorted(_bytes_of(key, within) + _bytes_of(value, within) for key, value in items.items())


def _bytes_of_tensor(tensor: Tensor) -> bytes:
    is_readable = (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    name = f"tensor {tensor.dtype} {shape}"
    if not is_readable:
        return _tagged(name)
    with torch.no_grad():
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        if plain.numel() > _MOST_ELEMENTS:
            places = np.unravel_index(_positions(plain.numel()), plain.shape)
            plain = plain[tuple(torch.from_numpy(place) for place in places)]
        flat = plain.contiguous().reshape(-1)
        return _tagged(name, flat.view(torch.uint8).numpy().tobytes())


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether an array's memory holds its values, not references to them."""
    return dtype.kind in "biufcmMSUV" and not dtype.hasobject


def _sampled_array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.size <= _MOST_ELEMENTS:
        return array
    return array[np.unravel_index(_positions(array.size), array.shape)]


def _positions(size: int) -> np.ndarray[Any, Any]:
    """Which of `size` elements are read: all, or the first, the last and a sample between.

    The sample is one element of each of equally long stretches, at irregular places, so that it
    doesn't keep to one column of a table.
    """
    if size <= _MOST_ELEMENTS:
        return np.arange(size)
    end = _MOST_ELEMENTS // 4
    numbers = np.arange(_MOST_ELEMENTS - 2 * end)
    places = (numbers + numbers * _GOLDEN_RATIO % 1) * (size - 2 * end) / len(numbers)
    return np.concatenate(
        [np.arange(end), end + places.astype(np.int64), np.arange(size - end, size)]
    )


def _ends(text: bytes) -> bytes:
    if len(text) <= _MOST_CHARACTERS:
        return text
    half = _MOST_CHARACTERS // 2
    return b"%d " % len(text) + text[:half] + text[-half:]


def _tagged(name: str, *parts: bytes) -> bytes:
    """A fixed-length digest of a value, so that neighbours can't be mistaken for each other."""
    hashed = blake2b(name.encode(), digest_size=16)
    for part in parts:
        hashed.update(b"%d:" % len(part))
        hashed.update(part)
    return hashed.digest()
