"""Find host-device synchronisations: code that reads a value or needs one for a shape."""

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
_STANDARD_LIBRARY = str(Path(linecache.__file__).parent)  # such as logging, which formats
_MODES = ("__torch_function__", "__torch_dispatch__")
_CONSTRUCTORS = ("tensor", "as_tensor", "asarray")


@contextmanager
def watch_device_syncs(device: torch.device) -> Iterator[list[str]]:
    """Find the host-device synchronisations of the block.

    On a CUDA device PyTorch warns about each. On other devices, every call counts that reads a
    tensor and so would synchronise on a GPU.

    Yields:
        A list that grows with each synchronisation: the operation and the line that calls it.
    """
    found: list[str] = []

    def note(operation: str) -> None:
        found.append(f"{operation}{calling_line()}")

    if device.type == "cuda":
        with _cuda_sync_warnings(note):
            yield found
    else:
        with _FunctionWatch(note), _OperationWatch(note):
            yield found


def calling_line() -> str:
    """The line of the innermost frame that is in no library, and in no mode as those below."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        is_library = file.startswith(_FILES) or (
            file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
        )
        if not is_library and frame.f_code.co_name not in _MODES:
            return f" at {file}:{line}: {linecache.getline(file, line).strip()}"
        frame = frame.f_back
    return ""


def _is_pickling() -> bool:
    """Whether a method of torch that pickles a tensor is among the innermost calls."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_name in _MODES or frame.f_code.co_filename.startswith(_FILES)
    ):
        if frame.f_code.co_name == "__reduce_ex__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def _cuda_sync_warnings(note: Callable[[str], None]) -> Iterator[None]:
    """Record PyTorch's warnings about synchronisation; other warnings are shown afterwards."""
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
    for other in others:
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)


class _FunctionWatch(TorchFunctionMode):
    """Intercepts what Python code calls on tensors."""

    _reads = frozenset(("tolist", "numpy", "cpu", "__array__", "__dlpack__", "__repr__"))

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_host = name == "to" and not kwargs.get("non_blocking") and _names_cpu(args, kwargs)
        from_list = name in _CONSTRUCTORS and args and _holds_tensor(args[0])
        # Pickling a tensor reads its storage.
        pickles = name == "untyped_storage" and _is_pickling()
        if name in self._reads or to_host or from_list or pickles:
            self._note("pickle" if pickles else name)
        return func(*args, **kwargs)


def _holds_tensor(data: Any) -> bool:
    """Whether a list holds tensors, which a new tensor of their values reads one by one."""
    return isinstance(data, list | tuple) and any(
        isinstance(item, Tensor) or _holds_tensor(item) for item in data
    )


def _names_cpu(args: Any, kwargs: Any) -> bool:
    # Only if given by name: `to(other)` takes the device of a tensor, which is the accelerator.
    return any(isinstance(given, str) and given == "cpu" for given in (*args[1:], *kwargs.values()))


class _OperationWatch(TorchDispatchMode):
    """Intercepts the operators, and with them every value that Python reads."""

    _reads = frozenset(
        (
            "_local_scalar_dense",
            "_unique2",
            "allclose",
            "bincount",
            "equal",
            "is_nonzero",
            "masked_select",
            "nonzero",
            "unique_consecutive",
            "unique_dim",
        )
    )

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # An index or a repetition by the values of a tensor, whose number gives the shape.
        is_index = name == "index" or (name.startswith("index_put") and args[2].numel() != 1)
        by_values = is_index and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in self._reads or by_values or (repeats and func._overloadname == "Tensor"):
            self._note("item" if name == "_local_scalar_dense" else name)
        return func(*args, **(kwargs or {}))
