"""Write and read tensors as safetensors, without copying those that are on the CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pa_core.errors import TrainingStateError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The name of each type in safetensors."""


def tensor_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, in chunks.

    Tensors on a device are copied to the host one at a time.

    Raises:
        TrainingStateError: for a type that safetensors doesn't support, naming the tensor.
    """
    # The widest first, so that each begins at a multiple of its width, as safetensors requires.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
            raise TrainingStateError(
                f"{name} can't be saved: safetensors doesn't support {kind} tensors"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        tensor = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        if tensor.numel() < 2:  # contiguous with any stride, but only 1 can be viewed as bytes
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    return b"".join(tensor_chunks(tensors))


def read_tensors(content: bytes) -> dict[str, Tensor]:
    """Read the content of a safetensors file, onto the CPU.

    Raises:
        TrainingStateError: if it isn't valid.
    """
    try:
        return load(content)
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise TrainingStateError(f"not a safetensors file: {error}") from error


class HostMemory:
    """Host memory that is reused for copies of tensors.

    Copying into memory that was used before takes a fraction of the time that new memory takes.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    def copy(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy tensors; the copies are valid until the next call.

        Args:
            groups: tensors by name, by the name of their group.
        """
        held, self._held = self._held, {}
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                place = held.get((group, name))
                if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                    place = torch.empty(tensor.shape, dtype=tensor.dtype)
                # `Tensor.to` would copy a non-contiguous tensor twice.
                self._held[group, name] = place.copy_(tensor.detach())
        return {
            group: {name: self._held[group, name] for name in tensors}
            for group, tensors in groups.items()
        }

    def free(self) -> None:
        """Free the memory."""
        self._held = {}


def has_room_in_memory(size: int) -> bool:
    """Whether twice `size` bytes are free on the host; True if that isn't known."""
    return all(2 * size < free for free in _free_memory())


def _free_memory() -> Iterator[int]:
    """Free bytes of the machine, and of the container if this is one."""
    group = Path("/sys/fs/cgroup")
    try:
        text = Path("/proc/meminfo").read_text()
        yield int(re.findall(r"MemAvailable: +(\d+) kB", text)[0]) * 1024
        yield int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError, LookupError):  # a system without these files, or no limit
        return
