"""Refuse ways of parallel training in which processes share samples.

The loop gives each process its own samples and averages over all processes. Under tensor, context
or sequence parallelism, several processes work on the same samples, so that both would be wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate import DistributedType

from pa_core.engine.wrappers import named_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

_SHARED = {
    "tp_size": "tensor parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}
_VARIABLE = "PARALLELISM_CONFIG_"


def check_requested(accelerator_kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of an `Accelerator`, and the environment variables that it reads.

    Raises:
        ValueError: naming the argument or the variable.
    """
    found = _sizes(accelerator_kwargs.get("parallelism_config"), "ParallelismConfig: ")
    found |= _sizes(accelerator_kwargs.get("torch_tp_plugin"), "torch_tp_plugin: ")
    for name in (*_SHARED, "dp_replicate_size", "dp_shard_size"):
        text = os.environ.get(_VARIABLE + name.upper(), "")
        found[name, _VARIABLE + name.upper()] = int(text) if text.isdecimal() else 1
    _check(found)
    if (
        accelerator_kwargs.get("megatron_lm_plugin") is not None
        or os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() == "true"
    ):
        raise _megatron()


def check_supported(accelerator: Accelerator) -> None:
    """Check an accelerator, however it was configured.

    Raises:
        ValueError: naming what isn't supported.
    """
    _check(_sizes(getattr(accelerator, "parallelism_config", None), "ParallelismConfig: "))
    if accelerator.distributed_type is DistributedType.MEGATRON_LM:
        raise _megatron()
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config
        _check(
            {
                ("sp_size", "DeepSpeed: sequence_parallel_size"): config.get(
                    "sequence_parallel_size"
                ),
                **{
                    ("tp_size", f"DeepSpeed: tensor_parallel.{name}"): size
                    for name, size in _tensor_parallel(config.get("tensor_parallel"))
                },
            }
        )


def check_whole(model: nn.Module, sharded_by: str | None) -> None:
    """Check that a model hasn't been split between processes by something else than the engine.

    Raises:
        ValueError: naming a parameter that has.
    """
    if sharded_by is not None:
        return
    for name, parameter in named_parameters(model):
        mesh = getattr(parameter, "device_mesh", None)  # of a DTensor
        if mesh is not None and mesh.size() > 1:
            raise ValueError(
                f"{name} is a DTensor on {mesh}: the model is already split between processes, "
                "by tensor parallelism or fully_shard, which the Trainer doesn't support. Give it "
                "the whole model, and an accelerator with a FullyShardedDataParallelPlugin to "
                "shard it"
            )


def _sizes(config: Any, origin: str) -> dict[tuple[str, str], Any]:
    names = (*_SHARED, "dp_replicate_size", "dp_shard_size")
    return {(name, f"{origin}{name}"): getattr(config, name, 1) for name in names}


def _tensor_parallel(config: Any) -> list[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        return []
    found = [(name, config.get(name)) for name in ("autotp_size", "tp_size")]
    inner = config.get("tp")
    return found + ([("tp.tp_size", inner.get("tp_size"))] if isinstance(inner, Mapping) else [])


def _check(sizes: Mapping[tuple[str, str], Any]) -> None:
    above = {key: size for key, size in sizes.items() if isinstance(size, int) and size > 1}
    for (name, origin), size in above.items():
        if name in _SHARED:
            raise ValueError(
                f"{origin} is {size}, but {_SHARED[name]} is not supported: processes would work "
                "on the same samples, while the Trainer gives each its own. Set it to 1"
            )
    names = {name: f"{origin} is {size}" for (name, origin), size in above.items()}
    if {"dp_replicate_size", "dp_shard_size"} <= names.keys():
        raise ValueError(
            f"{names['dp_replicate_size']} and {names['dp_shard_size']}, but hybrid sharding is "
            "not supported, since training states don't record it: set dp_replicate_size to 1 "
            "for FSDP, or dp_shard_size to 1 for DistributedDataParallel"
        )


def _megatron() -> ValueError:
    return ValueError(
        "Megatron-LM is not supported: it splits models and samples between processes by itself. "
        "Use FSDP or DeepSpeed"
    )
