"""What a plugin does to its surroundings: what it leaves open, what it reads, how long it takes."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pa_core import hookspecs
from pa_core.implementations import Call, Implementation, specifications

_OFTEN = re.compile(r"When: once per (micro-batch|update|evaluation batch)\b")
STEP_HOOKS = frozenset(
    name
    for name, hook in specifications(hookspecs).items()
    if _OFTEN.search(hook.function.__doc__ or "")
)
"""The hooks that are called in every step, as their specifications say."""

_END_SECONDS = 2.0  # that a thread which was told to end may take


# -- What is left ---------------------------------------------------------------------------------


class Surroundings:
    """The process as it is now, to be compared with what it is later."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = _open_files()
        self._values = _values()

    def changes(self) -> list[str]:
        """What has come or changed since, a phrase each; threads get a moment to end."""
        deadline = time.monotonic() + _END_SECONDS
        threads: list[threading.Thread] = []
        for thread in set(threading.enumerate()) - self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
                threads += [thread] if thread.is_alive() else []
        found = [f"the thread {thread.name!r} still runs" for thread in threads]
        files = _open_files()
        found += [f"{files[n]} is still open" for n in sorted(files.keys() - self._files.keys())]
        for what, value in _values().items():
            before = self._values[what]
            if value != before:
                found.append(f"{what} has changed: {_difference(before, value)}")
        return found


def _open_files() -> dict[int, str]:
    """What this process has open, by its number; nothing where the system doesn't tell."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the listing's own is closed again
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _values() -> dict[str, Any]:
    return {
        "the environment": dict(os.environ),
        "the working directory": os.getcwd(),
        "sys.stdout or sys.stderr": (sys.stdout, sys.stderr),
        "sys.excepthook": sys.excepthook,
        "a signal's handler": {
            number: signal.getsignal(number) for number in signal.valid_signals()
        },
        "the root logger's handlers": list(logging.getLogger().handlers),
        "torch's default dtype": torch.get_default_dtype(),
        "whether torch takes gradients": torch.is_grad_enabled(),
        "torch's anomaly detection": torch.is_anomaly_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of float32 products": torch.get_float32_matmul_precision(),
        "the number of torch's threads": torch.get_num_threads(),
    }


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict):
        keys = [key for key in before | after if before.get(key) != after.get(key)]
        return ", ".join(map(str, keys))
    return f"{before} before, {after} now"


# -- What is read ---------------------------------------------------------------------------------


class Reads:
    """Notes where a plugin reads tensors in a step, which makes the host wait for the device.

    On a CPU a read costs nothing, and a plugin may ask for that, so tensors say that they are on
    none while it is watched.

    Attributes:
        found: a sentence for each place.
    """

    def __init__(self) -> None:
        self.found: dict[str, None] = {}  # a set that keeps its order

    def around(self, implementation: Implementation) -> Call:
        """The implementation's call, watched; for `PluginManager.wrap_calls`."""
        call = implementation.call
        if implementation.hook not in STEP_HOOKS:
            return call

        def watched(arguments: dict[str, Any]) -> Any:
            def note(operation: str) -> None:
                self.found[f"{implementation.hook} calls {operation}{_place()}"] = None

            with _cuda_errors(), _Functions(note), _Operations(note):
                return call(arguments)

        return watched


class _Functions(TorchFunctionMode):
    """Sees what Python code calls on tensors."""

    _reads = frozenset(("tolist", "numpy", "cpu", "__array__", "nonzero"))

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
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


def _place() -> str:
    """Where the innermost code stands that is neither torch's nor this module's."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith(torch_folder):
            return f" at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""


@contextlib.contextmanager
def _cuda_errors() -> Iterator[None]:
    """On CUDA, let torch itself raise where the host waits."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


# -- How long it takes ----------------------------------------------------------------------------


class Stopwatch:
    """Adds up the time that a plugin takes in the steps of a run.

    Attributes:
        nanoseconds: so far.
    """

    def __init__(self) -> None:
        self.nanoseconds = 0

    def around(self, implementation: Implementation) -> Call:
        """The implementation's call, timed; for `PluginManager.wrap_calls`."""
        call, clock = implementation.call, time.perf_counter_ns
        if implementation.hook not in STEP_HOOKS or "_eval_" in implementation.hook:
            return call

        def timed(arguments: dict[str, Any]) -> Any:
            start = clock()
            try:
                return call(arguments)
            finally:
                self.nanoseconds += clock() - start

        return timed
