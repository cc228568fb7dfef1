"""Detect side effects of a plugin: resources it leaves open, and tensors it reads."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pa_core.diagnostics.device_syncs import watch_device_syncs
from pa_core.plugins.explain import loop_rows

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Call, Implementation

STEP_HOOKS = frozenset(
    row.hook
    for row in loop_rows()
    if row.hook and {"for each micro-batch", "for each evaluation batch"} & {*row.phases}
)
"""The hooks that are called in every step, according to the loop's table."""

_END_SECONDS = 2.0  # how long a thread that is stopping may take


# -- Left behind ----------------------------------------------------------------------------------


class Surroundings:
    """The process-wide state at the time of creation, to compare with a later one."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = _open_files()
        self._values = _values()

    def changes(self) -> list[str]:
        """Describe what was added or changed since then; threads get a moment to end."""
        deadline = time.monotonic() + _END_SECONDS
        threads: list[threading.Thread] = []
        for thread in set(threading.enumerate()) - self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
                threads += [thread] if thread.is_alive() else []
        found = [f"the thread {thread.name!r} is still running" for thread in threads]
        files = _open_files()
        found += [f"{files[n]} is still open" for n in sorted(files.keys() - self._files.keys())]
        for name, value in _values().items():
            before = self._values[name]
            if value != before:
                found.append(f"{name} has changed: {_difference(before, value)}")
        return found


def _open_files() -> dict[int, str]:
    """Open files by descriptor; empty on systems without ``/proc``."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed again
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
        "whether torch records gradients": torch.is_grad_enabled(),
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


# -- Reads of tensors -----------------------------------------------------------------------------


class Reads:
    """Records where a plugin reads tensors in a step, a host-device synchronisation on GPUs.

    A plugin may read freely where ``tensor.is_cpu`` is true. So that it behaves as on a GPU, that
    attribute is False while the plugin is watched.

    Args:
        device: the device of the run.

    Attributes:
        found: one sentence per place.
    """

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, None] = {}  # a set that keeps its order
        self._device = device

    def around(self, implementation: Implementation) -> Call:
        """A watched version of the implementation's call, for `PluginManager.wrap_calls`."""
        hook, call = implementation.hook, implementation.call
        if hook not in STEP_HOOKS:
            return call

        def watched(arguments: dict[str, Any]) -> Any:
            with watch_device_syncs(self._device) as reads, _DenyCpu():
                result = call(arguments)
            self.found |= dict.fromkeys(f"{hook} calls {place}" for place in reads)
            return result

        return watched


class _DenyCpu(TorchFunctionMode):
    """Makes ``tensor.is_cpu`` False for all tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        return func(*args, **(kwargs or {}))
