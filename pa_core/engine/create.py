"""Choosing the engine for an accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate import DistributedType

from pa_core.engine.base import Engine

if TYPE_CHECKING:
    from accelerate import Accelerator


def create_engine(accelerator: Accelerator) -> Engine:
    """Create the engine for an accelerator; DeepSpeed's and FSDP's are imported when needed."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        from pa_core.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(accelerator)
    if accelerator.distributed_type is DistributedType.FSDP:
        from pa_core.engine.fsdp import FsdpEngine

        return FsdpEngine(accelerator)
    return Engine(accelerator)
