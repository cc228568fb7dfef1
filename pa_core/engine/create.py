"""Choosing the engine for an accelerator."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from accelerate import DistributedType

from pa_core.engine.base import Engine

if TYPE_CHECKING:
    from accelerate import Accelerator


def create_engine(accelerator: Accelerator) -> Engine:
    """Create the engine for an accelerator; DeepSpeed's and FSDP's are imported when needed.

    Raises:
        ValueError: if fp16 is requested on a CPU.
    """
    _check_precision(accelerator)
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        from pa_core.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(accelerator)
    if accelerator.distributed_type is DistributedType.FSDP:
        from pa_core.engine.fsdp import FsdpEngine

        return FsdpEngine(accelerator)
    return Engine(accelerator)


def _check_precision(accelerator: Accelerator) -> None:
    """Refuse fp16 on a CPU, where accelerate would train in float32 without saying so.

    Unless the accelerator was given a scaler. DeepSpeed checks its own configuration.
    """
    if (
        accelerator.mixed_precision != "fp16"
        or accelerator.device.type != "cpu"
        or accelerator.scaler is not None
        or accelerator.distributed_type is DistributedType.DEEPSPEED
    ):
        return
    is_set = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp16"
    origin = "ACCELERATE_MIXED_PRECISION=fp16 or " if is_set else ""
    raise ValueError(
        f"mixed precision: fp16 was requested (by {origin}mixed_precision='fp16'), but accelerate "
        "computes in float16 on a GPU only; on a CPU it would train in float32. Request "
        "mixed_precision='bf16', which a CPU supports, or 'no' for float32"
    )
