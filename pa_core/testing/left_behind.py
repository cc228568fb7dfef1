"""Detect what a plugin leaves behind: resources, settings of the process, hooks, graphs, seeds."""

from __future__ import annotations

import contextlib
import gc
import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.optim import optimizer as all_optimizers
from torch.utils import deterministic

from pa_core.data import rng

_END_SECONDS = 2.0  # how long a thread that is stopping may take
_MOST_BLOCKS = 2000  # of 624 random numbers that a hook may draw


# -- The process ----------------------------------------------------------------------------------


class Surroundings:
    """The process-wide state at the time of creation, to compare with a later one."""

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._files = _open_files()
        self._values = {switch.name: switch.read() for switch in _SWITCHES}

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
        return found + self.changed_settings()

    def changed_settings(self) -> list[str]:
        """Describe what has changed in the environment, in torch's switches and the like."""
        found = []
        for switch in _SWITCHES:
            before, value = self._values[switch.name], switch.read()
            if value != before:
                found.append(f"{switch.name} has changed: {_difference(before, value)}")
        return found

    def restore(self) -> None:
        """Put the environment, torch's switches and the like back to what they were."""
        for switch in _SWITCHES:
            if switch.write is not None and switch.read() != self._values[switch.name]:
                switch.write(self._values[switch.name])


def _open_files() -> dict[int, str]:
    """Open files by descriptor; empty on systems without ``/proc``."""
    found = {}
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed again
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in before | after if before.get(key) != after.get(key)]
        return ", ".join(map(str, keys))
    return f"{before} before, {after} now"


class _Switch(NamedTuple):
    """A value of the whole process: how to read it, and how to write it if that can be done."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any] | None = None


def _write_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)


def _write_path(path: list[str]) -> None:
    sys.path[:] = path


def _write_signals(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler and handler is not None:
            signal.signal(number, handler)


def _write_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _print_options() -> dict[str, Any]:
    return dict(vars(torch._tensor_str.PRINT_OPTS))


def _flushes_denormal() -> bool:
    return not torch.full((), 1e-310, dtype=torch.float64, device="cpu").mul(1.0).item()


def _attribute(name: str, owner: Any, attribute: str) -> _Switch:
    return _Switch(
        name, lambda: getattr(owner, attribute), lambda value: setattr(owner, attribute, value)
    )


def _hooks_of_all() -> Counter[str]:
    """The number of hooks that are called for every module or optimizer, by their kind."""
    return Counter(
        {
            name: len(hooks)
            for home in (all_modules, all_optimizers)
            for name, hooks in vars(home).items()
            if name.startswith("_global") and name.endswith("hooks")
        }
    )


def _modes() -> list[str]:
    functions = torch.overrides._get_current_function_mode_stack()
    operations = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return [type(mode).__name__ for mode in (*functions, *operations)]


def _autocast(device: str) -> _Switch:
    def read() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def write(values: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, values[0])
        torch.set_autocast_dtype(device, values[1])

    return _Switch(f"torch's autocast on {device}", read, write)


def _attention(kind: str) -> _Switch:
    cuda = torch.backends.cuda
    return _Switch(
        f"torch's {kind} attention",
        getattr(cuda, f"{kind}_sdp_enabled"),
        getattr(cuda, f"enable_{kind}_sdp"),
    )


_CUDNN, _PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul
_SWITCHES = (
    # -- Python ---------------------------------------------------------------------------------
    _Switch("the environment", lambda: dict(os.environ), _write_environment),
    _Switch("the working directory", os.getcwd, os.chdir),
    _Switch("sys.stdout or sys.stderr", lambda: (sys.stdout, sys.stderr)),
    _attribute("sys.excepthook", sys, "excepthook"),
    _attribute("threading.excepthook", threading, "excepthook"),
    _Switch(
        "sys.path", lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)
    ),
    _Switch("the limit on recursion", sys.getrecursionlimit, sys.setrecursionlimit),
    _Switch(
        "a signal's handler",
        lambda: {number: signal.getsignal(number) for number in signal.valid_signals()},
        _write_signals,
    ),
    _Switch("the root logger's handlers", lambda: list(logging.getLogger().handlers)),
    _Switch("the root logger's level", lambda: logging.getLogger().level, logging.root.setLevel),
    _Switch("the disabled level of logging", lambda: logging.root.manager.disable, logging.disable),
    _Switch("the filters of warnings", lambda: list(warnings.filters), _write_filters),
    _Switch("garbage collection", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    _Switch(
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda text: locale.setlocale(locale.LC_ALL, text),
    ),
    _Switch(
        "the start method of processes",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda method: multiprocessing.set_start_method(method, force=True),
    ),
    # -- NumPy ----------------------------------------------------------------------------------
    _Switch("NumPy's handling of errors", np.geterr, lambda values: np.seterr(**values)),
    _Switch(
        "NumPy's print options",
        np.get_printoptions,
        lambda values: np.set_printoptions(**values),
    ),
    # -- torch ----------------------------------------------------------------------------------
    _Switch("the number of torch's threads", torch.get_num_threads, torch.set_num_threads),
    _Switch("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Switch(
        "torch's default device",
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    _Switch("whether torch records gradients", torch.is_grad_enabled, torch.set_grad_enabled),
    _Switch("torch's inference mode", torch.is_inference_mode_enabled),
    _Switch(
        "torch's anomaly detection",
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda values: torch.autograd.set_detect_anomaly(*values),
    ),
    _Switch(
        "torch's deterministic mode",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    ),
    _attribute("torch's filling of new memory", deterministic, "fill_uninitialized_memory"),
    _Switch(
        "torch's precision of float32 products",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    _Switch("torch's flushing of denormal numbers", _flushes_denormal, torch.set_flush_denormal),
    _autocast("cpu"),
    _autocast("cuda"),
    _Switch(
        "torch's cache of autocast",
        torch.is_autocast_cache_enabled,
        torch.set_autocast_cache_enabled,
    ),
    *(
        _attribute(f"torch.backends.cudnn.{name}", _CUDNN, name)
        for name in ("enabled", "benchmark", "deterministic", "allow_tf32", "benchmark_limit")
    ),
    *(
        _attribute(f"torch.backends.cuda.matmul.{name}", _PRODUCTS, name)
        for name in (
            "allow_tf32",
            "allow_fp16_reduced_precision_reduction",
            "allow_bf16_reduced_precision_reduction",
        )
    ),
    *map(_attention, ("flash", "mem_efficient", "math", "cudnn")),
    _Switch("torch's repetition of warnings", torch.is_warn_always_enabled, torch.set_warn_always),
    _Switch(
        "torch's print options",
        _print_options,
        lambda values: vars(torch._tensor_str.PRINT_OPTS).update(values),
    ),
    _Switch(
        "torch's sharing of tensors between processes",
        torch.multiprocessing.get_sharing_strategy,
        torch.multiprocessing.set_sharing_strategy,
    ),
    _Switch("torch's modes", _modes),
    _Switch("hooks of all modules or optimizers", _hooks_of_all),
)


# -- The model ------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> dict[str, Any]:
    """What a plugin may have put on a model, by its place: hooks, and methods of an instance."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            # Which of these are dicts of hooks, is for PyTorch to know; a later one counts, too.
            if "hooks" in name and value:
                found[f"{path}.{name}".lstrip(".")] = list(value)
            elif callable(value) and hasattr(type(module), name):
                found[f"{path}.{name}".lstrip(".")] = [id(value)]
    for path, parameter in model.named_parameters():
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            if getattr(parameter, name, None):
                found[f"{path}.{name}"] = list(getattr(parameter, name))
    return found


def new_hooks(before: dict[str, Any], model: nn.Module) -> list[str]:
    """Describe the hooks that a model has in addition to those of an earlier `hooks_of`."""
    after = hooks_of(model)
    places = [place for place in after if after[place] != before.get(place)]
    return [f"the model's {place} has changed: remove what was added" for place in places]


# -- Autograd graphs ------------------------------------------------------------------------------


class _Token:
    """Lives as long as the node of a graph that holds it."""


class _Marked(torch.autograd.Function):
    """The identity, with a token in the graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, token: _Token) -> Tensor:
        ctx.token = token
        return tensor.clone()  # a view couldn't be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class Graphs:
    """Counts the graphs of forward passes within a ``with`` block that outlive it."""

    def __init__(self) -> None:
        self._tokens: weakref.WeakSet[_Token] = weakref.WeakSet()

    def __enter__(self) -> Graphs:
        self._handle = all_modules.register_module_forward_hook(self._mark)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _mark(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        if type(output) is not Tensor or not output.requires_grad:
            return None
        token = _Token()
        self._tokens.add(token)
        return _Marked.apply(output, token)

    def alive(self) -> int:
        """The number of modules' outputs whose graph something still holds."""
        gc.collect()
        return len(self._tokens)


# -- Seeds ----------------------------------------------------------------------------------------


class Seeds:
    """Records where a plugin seeds a global generator, or sets its state.

    Drawing from one is fine: what a plugin draws is keyed by its place in the run.

    Attributes:
        found: one sentence per place.
    """

    def __init__(self) -> None:
        self.found: dict[str, None] = {}  # a set that keeps its order

    @contextmanager
    def within(self, where: str) -> Iterator[None]:
        """Compare the generators before and after the block, unless the trainer seeds them in it.

        Args:
            where: the hook, for the message.
        """
        before, by_trainer = _generators(), []

        def seed(key: int, original: Callable[[int], None] = rng.seed_torch) -> None:
            by_trainer.append(key)  # as for an evaluation that a hook asks for
            original(key)

        try:
            with mock.patch.object(rng, "seed_torch", seed):
                yield
        finally:  # a wrapper ends by raising StopIteration
            for name, (old, new) in _pairs(before, _generators()).items():
                if not by_trainer and not _is_drawn(old, new):
                    self.found[f"{where} seeds {name}"] = None


def _generators() -> dict[str, Any]:
    """The state of Python's and NumPy's generator, and the seed of torch's."""
    *words, position = random.getstate()[1]
    found: dict[str, Any] = {
        "Python's random": (np.array(words, np.uint32), position),
        "torch's generator": torch.initial_seed(),
    }
    if torch.cuda.is_initialized():
        found["torch's CUDA generator"] = torch.cuda.initial_seed()
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] == "MT19937":
        state = numpy["state"]
        found["NumPy's np.random"] = (np.array(state["key"]), int(state["pos"]))
    return found


def _pairs(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (before[name], after[name]) for name in before.keys() & after.keys()}


def _is_drawn(before: Any, after: Any) -> bool:
    """Whether drawing alone can lead from one state of a generator to another."""
    if isinstance(before, int):  # the seed of torch's, which drawing doesn't change
        return bool(before == after)
    (words, position), (other, other_position) = before, after
    if np.array_equal(words, other):
        return bool(other_position >= position)
    # Both are Mersenne Twisters: once the words are exhausted, the next ones replace all of them.
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    for _ in range(_MOST_BLOCKS):
        twister.random_raw(624)
        if np.array_equal(twister.state["state"]["key"], other):
            return True
    return False
