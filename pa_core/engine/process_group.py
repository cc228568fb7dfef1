"""Connecting launched processes, and closing their connections.

On machines without a GPU, accelerate by default runs each of them as if it were alone. To connect
them it needs ``cpu=True``; under DeepSpeed, which has no such option, it needs the name of the
backend.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, is_torch_xla_available
from torch.distributed import ProcessGroup

from pa_core.engine.parallelism import check_requested

if TYPE_CHECKING:
    from accelerate import Accelerator


def process_state() -> PartialState:
    """The rank of this process and its process group, which is set up first if necessary."""
    if not _needs_cpu_backend():
        return PartialState()
    if _uses_deepspeed({}):
        return PartialState(backend="gloo")
    return PartialState(cpu=True)


def connected(accelerator_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an `Accelerator`, completed so that it connects the processes.

    Raises:
        ImportError: if DeepSpeed is requested and one of its requirements isn't installed.
        ValueError: if a way of parallel training is requested that isn't supported.
    """
    check_requested(accelerator_kwargs)
    kwargs = dict(accelerator_kwargs)
    if _uses_deepspeed(kwargs):
        _check_installed("deepspeed", "transformers")
    if not _needs_cpu_backend():
        return kwargs
    if not _uses_deepspeed(kwargs):
        return {"cpu": True} | kwargs
    handlers = list(kwargs.get("kwargs_handlers") or ())
    if not any(isinstance(handler, InitProcessGroupKwargs) for handler in handlers):
        handlers.append(InitProcessGroupKwargs())
    for handler in handlers:
        if isinstance(handler, InitProcessGroupKwargs):
            handler.backend = "gloo"
    return kwargs | {"kwargs_handlers": handlers}


def check_connected(accelerator: Accelerator) -> None:
    """Check that processes that were launched together don't each train their own model.

    Warns if FSDP was requested but isn't in use, or if accelerate's launcher was asked for several
    processes but started one.

    Raises:
        RuntimeError: if the processes aren't connected.
    """
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wants_fsdp and accelerator.distributed_type is not DistributedType.FSDP:
        warnings.warn(
            "FSDP was requested, but accelerate shards models only between several GPUs: here "
            "each process holds the whole model",
            stacklevel=3,
        )
    if accelerator.num_processes == 1 and _is_one_of_several():
        warnings.warn(
            "accelerate launch has started this process alone. If you asked it for several: it "
            "starts them on several GPUs only, with --multi_gpu. torchrun --nproc_per_node starts "
            "them with and without GPUs",
            stacklevel=3,
        )
    is_deepspeed = accelerator.distributed_type is DistributedType.DEEPSPEED
    is_launched = is_deepspeed or "LOCAL_RANK" in os.environ
    started = int(os.environ.get("WORLD_SIZE", "1")) if is_launched else 1
    if started > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"{started} processes were launched together, but their Accelerator connects none of "
            "them, so each would train a separate model. On a machine without a GPU, let the "
            "Trainer create the Accelerator, or create it before any other use of accelerate with "
            "cpu=True, or under DeepSpeed with InitProcessGroupKwargs(backend='gloo'). To train "
            "separate models on purpose, remove WORLD_SIZE and LOCAL_RANK from the environment "
            "first"
        )


def _is_one_of_several() -> bool:
    """Whether accelerate's launcher was asked for several processes and started this one alone.

    Then it sets the address of the main process, but neither a rank nor the world size.
    """
    by_accelerate = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}
    return by_accelerate <= os.environ.keys() and "LOCAL_RANK" not in os.environ


def close_process_group() -> None:
    """Close the connections to the other processes and end their threads.

    Gloo's threads end when nothing holds the process group any more. A thread that is still there
    when the interpreter shuts down may abort the process.
    """
    gc.collect()  # wrapped models hold the group too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # The functions of this module have the group as a default if it existed when they were made.
    functional = sys.modules.get("torch.distributed.nn.functional")
    for function in list(vars(functional).values()) if functional else ():
        defaults = getattr(function, "__defaults__", None) or ()
        if any(isinstance(default, ProcessGroup) for default in defaults):
            function.__defaults__ = tuple(
                None if isinstance(default, ProcessGroup) else default for default in defaults
            )


def _needs_cpu_backend() -> bool:
    """Whether this process was launched on a machine whose devices have no distributed backend."""
    if "LOCAL_RANK" not in os.environ or is_torch_xla_available():
        return False
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is None or device.type == "mps"  # PyTorch has no backend for a Mac's GPU


def _check_installed(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"accelerate needs {' and '.join(packages)} to run DeepSpeed, but "
            f"{' and '.join(missing)} isn't installed: "
            f"pip install --no-build-isolation {' '.join(missing)}"
        )


def _uses_deepspeed(accelerator_kwargs: Mapping[str, Any]) -> bool:
    has_plugin = not accelerator_kwargs.keys().isdisjoint({"deepspeed_plugin", "deepspeed_plugins"})
    return has_plugin or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
