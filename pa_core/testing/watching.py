"""What a plugin does to its surroundings: what it leaves open, and what it reads."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pa_core import hookspecs
from pa_core.diagnostics.device_syncs import watch_device_syncs
from pa_core.plugins.implementations import Call, Implementation, specifications

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

    Args:
        device: the run's.

    Attributes:
        found: a sentence for each place.
    """

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, None] = {}  # a set that keeps its order
        self._device = device

    def around(self, implementation: Implementation) -> Call:
        """The implementation's call, watched; for `PluginManager.wrap_calls`."""
        hook, call = implementation.hook, implementation.call
        if hook not in STEP_HOOKS:
            return call

        def watched(arguments: dict[str, Any]) -> Any:
            with watch_device_syncs(self._device) as waits, _OnNoCpu():
                result = call(arguments)
            self.found |= dict.fromkeys(f"{hook} calls {place}" for place in waits)
            return result

        return watched


class _OnNoCpu(TorchFunctionMode):
    """Lets tensors say that they are on no CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        return func(*args, **(kwargs or {}))
