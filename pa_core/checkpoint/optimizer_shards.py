"""The shards of a sharded optimizer: each process writes and reads its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint import atomic_io
from pa_core.checkpoint.codec import decode, encode
from pa_core.checkpoint.safetensors_io import tensor_chunks
from pa_core.checkpoint.storage import StateReader, json_bytes
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    from torch import Tensor

    from pa_core.engine.base import Engine


def write_shard(engine: Engine, optimizer: Any, directory: Path) -> None:
    """Write this process' shard of the optimizer into a training state.

    Args:
        engine: the engine that has sharded the optimizer.
        optimizer: the optimizer.
        directory: the state's directory, which the main process has created.

    Raises:
        TrainingStateError: if this process doesn't see the directory.
    """
    if not directory.is_dir():
        raise TrainingStateError(
            f"{directory} isn't visible to every process: an optimizer {engine.sharding} needs a "
            "folder that all machines share"
        )
    tensors: dict[str, Tensor] = {}
    shard = encode(engine.optimizer_state(optimizer), tensors, "optimizer")
    name = _shard_name(engine.rank)
    atomic_io.write_file(directory / f"{name}.json", [json_bytes(shard)])
    atomic_io.write_file(directory / f"{name}.safetensors", tensor_chunks(tensors))


def read_shard(reader: StateReader, rank: int) -> Any:
    """Read the shard that the process of this rank has written."""
    name = _shard_name(rank)
    return decode(reader.read_json(f"{name}.json"), reader.read_tensors(f"{name}.safetensors"))


def _shard_name(rank: int) -> str:
    return f"optimizer-{rank:05d}"
