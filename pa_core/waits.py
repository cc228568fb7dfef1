"""Find out whether code waits for the device: it reads a value, or asks for what needs one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits:
    """What `looking_for_waits` has found.

    Attributes:
        found: whether there was a wait.
    """

    found = False


class _Reads(TorchDispatchMode):
    """Sees each value that is read from a tensor: by `item`, `float`, `if`."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._waits.found = True
        return func(*args, **(kwargs or {}))


@contextmanager
def looking_for_waits(device: torch.device) -> Iterator[Waits]:
    """Look whether the block waits for `device`.

    On a CUDA device PyTorch itself warns of whatever waits. Elsewhere each value counts that is
    read from a tensor: on a GPU it would make the host wait.
    """
    waits = Waits()
    if device.type != "cuda":
        with _Reads(waits):
            yield waits
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            waits.found = True
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
