"""Find out where code waits for the device: it reads a value, or asks for what needs one."""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_FILES = (__file__, warnings.__file__, str(Path(torch.__file__).parent))
_MODES = ("__torch_function__", "__torch_dispatch__")


@contextmanager
def watch_device_syncs(device: torch.device) -> Iterator[list[str]]:
    """Look where the block waits for `device`.

    On a CUDA device PyTorch itself warns of whatever waits. Elsewhere each call counts that reads
    a tensor: on a GPU it would make the host wait.

    Yields:
        What was found so far, a phrase for each time: the operation, and the line that calls it.
    """
    found: list[str] = []

    def note(operation: str) -> None:
        found.append(f"{operation}{_place()}")

    if device.type == "cuda":
        with _warnings_of_cuda(note):
            yield found
    else:
        with _Functions(note), _Operations(note):
            yield found


def _place() -> str:
    """Where the innermost code stands that is neither torch's nor part of a mode as those below."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if not file.startswith(_FILES) and frame.f_code.co_name not in _MODES:
            return f" at {file}:{line}: {linecache.getline(file, line).strip()}"
        frame = frame.f_back
    return ""


@contextmanager
def _warnings_of_cuda(note: Callable[[str], None]) -> Iterator[None]:
    """Note where PyTorch warns that the host waits; other warnings are shown as ever."""
    others: list[warnings.WarningMessage] = []

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            note("a synchronizing CUDA operation")
        else:
            others.append(warnings.WarningMessage(message, category, *where, **more))

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in others:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


class _Functions(TorchFunctionMode):
    """Sees what Python code calls on tensors."""

    _reads = frozenset(("tolist", "numpy", "cpu", "__array__", "nonzero"))

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_host = name == "to" and not kwargs.get("non_blocking") and _names_cpu(args, kwargs)
        if name in self._reads or to_host:
            self._note(name)
        return func(*args, **kwargs)


def _names_cpu(args: Any, kwargs: Any) -> bool:
    # By name alone: the device of another tensor is the accelerator's, in a run on one.
    return any(isinstance(given, str) and given == "cpu" for given in (*args[1:], *kwargs.values()))


class _Operations(TorchDispatchMode):
    """Sees what is calculated, and with it every value that Python gets."""

    _reads = frozenset(("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "_unique2"))

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if name in self._reads or by_mask:
            self._note("item" if name == "_local_scalar_dense" else name)
        return func(*args, **(kwargs or {}))
