"""How processes that were started together find each other where there is no GPU.

By itself accelerate takes each of them for the only one there, unless it is told to use the CPU;
under DeepSpeed, for which that can't be said, unless it is told the backend.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, is_torch_xla_available

if TYPE_CHECKING:
    from accelerate import Accelerator


def process_state() -> PartialState:
    """Which of the processes this one is; they are connected first, if they aren't yet."""
    if not _has_to_be_told():
        return PartialState()
    if _uses_deepspeed({}):
        return PartialState(backend="gloo")
    return PartialState(cpu=True)


def connected(accelerator_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an `Accelerator`, with those by which it connects the processes.

    Raises:
        ImportError: where DeepSpeed is asked for, and what it needs isn't installed.
    """
    kwargs = dict(accelerator_kwargs)
    if _uses_deepspeed(kwargs):
        _check_installed("deepspeed", "transformers")
    if not _has_to_be_told():
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
    """See that processes which were started together aren't left to train a model each.

    Warns where FSDP was asked for in vain.

    Raises:
        RuntimeError: if they are.
    """
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if wants_fsdp and accelerator.distributed_type is not DistributedType.FSDP:
        warnings.warn(
            "FSDP was asked for, but accelerate divides models among several GPUs alone: here "
            "each process has all of the model",
            stacklevel=3,
        )
    is_deepspeed = accelerator.distributed_type is DistributedType.DEEPSPEED
    is_launched = is_deepspeed or "LOCAL_RANK" in os.environ
    started = int(os.environ.get("WORLD_SIZE", "1")) if is_launched else 1
    if started > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"{started} processes were started together, but their Accelerator connects none of "
            "them, so each would train a model of its own. On a machine without a GPU it has to "
            "be made with cpu=True, under DeepSpeed with InitProcessGroupKwargs(backend='gloo'): "
            "leave that to the Trainer, or do so before anything else of accelerate is used. To "
            "train models of their own on purpose, take WORLD_SIZE and LOCAL_RANK out of the "
            "environment first"
        )


def _has_to_be_told() -> bool:
    """Whether a launcher has started this process on a machine whose devices can't connect."""
    if "LOCAL_RANK" not in os.environ or is_torch_xla_available():
        return False
    device = torch.accelerator.current_accelerator(check_available=True)
    return device is None or device.type == "mps"  # PyTorch has no backend for a Mac's GPU


def _check_installed(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"accelerate needs {' and '.join(packages)} to run DeepSpeed, and there is no "
            f"{' and no '.join(missing)}: pip install --no-build-isolation {' '.join(missing)}"
        )


def _uses_deepspeed(accelerator_kwargs: Mapping[str, Any]) -> bool:
    asked = "deepspeed_plugin" in accelerator_kwargs or "deepspeed_plugins" in accelerator_kwargs
    return asked or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
