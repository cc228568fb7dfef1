"""Of a training state, what each process writes and reads by itself: its part of the optimizer."""

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


def write_part(engine: Engine, optimizer: Any, directory: Path) -> None:
    """Write this process' part of an optimizer that the engine divides into a state.

    Raises:
        TrainingStateError: where the directory, which the main process has made, isn't there.
    """
    if not directory.is_dir():
        raise TrainingStateError(
            f"{directory} isn't to be seen from every process: an optimizer {engine.division} "
            "needs a folder that all machines share"
        )
    tensors: dict[str, Tensor] = {}
    part = encode(engine.optimizer_state(optimizer), tensors, "optimizer")
    name = _name(engine.rank)
    atomic_io.write_file(directory / f"{name}.json", [json_bytes(part)])
    atomic_io.write_file(directory / f"{name}.safetensors", tensor_chunks(tensors))


def read_part(reader: StateReader, rank: int) -> Any:
    """Read the part that the process of this rank has written."""
    name = _name(rank)
    return decode(reader.read_json(f"{name}.json"), reader.read_tensors(f"{name}.safetensors"))


def _name(rank: int) -> str:
    return f"optimizer-{rank:05d}"
