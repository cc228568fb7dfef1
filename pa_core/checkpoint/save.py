"""Save a training state: everything that the rest of a run depends on.

States are saved at update boundaries only: after an update, after a training epoch, after an epoch
of the run, and outside runs. A resumed run repeats an interrupted accumulation window and gets the
same result, since its data and randomness are keyed by their position.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pa_core.checkpoint.codec import encode, encode_weights
from pa_core.checkpoint.fingerprint import frozen_parameters
from pa_core.checkpoint.lock import check_held
from pa_core.checkpoint.optimizer_shards import write_shard
from pa_core.checkpoint.safetensors_io import HostMemory, has_room_in_memory, tensor_bytes
from pa_core.checkpoint.storage import StateWriter
from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.engine.loss_parameters import trained_loss
from pa_core.engine.subclasses import is_wrapper, local_part
from pa_core.engine.wrappers import named_parameters
from pa_core.errors import TrainingStateError
from pa_core.tracking import InMemoryRunHistory

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def save_training_state(
    trainer: Trainer,
    state_dir: str | Path,
    metadata: Mapping[str, Any],
    write: Callable[[Callable[[], None]], None] = lambda commit: commit(),
    write_in_background: Callable[[Callable[[], None]], None] | None = None,
    memory: HostMemory | None = None,
) -> None:
    """Save everything that the rest of the run depends on; called on every process.

    Args:
        trainer: the trainer whose state is saved.
        state_dir: the directory to create or replace.
        metadata: the user's own plain data and tensors.
        write: called on the main process, with a function that writes and commits the state.
        write_in_background: called instead of `write`, after the state has been copied; `write` is
            called all the same if there isn't enough memory for the copy.
        memory: holds that copy.

    Raises:
        TrainingStateError: if something can't be saved, naming it and its owner; `state_dir` is
            then unchanged.
    """
    engine = trainer._engine
    if not trainer._accumulation.is_empty and trainer.position.stop_reason is None:
        raise TrainingStateError(
            "The run was interrupted in the middle of an update, so a training state saved now "
            "would not resume exactly. Resume from the last one that was saved"
        )
    is_main = engine.rank == 0
    with engine.evaluation_mode(trainer.optimizer), ExitStack() as cleanup:
        weights = engine.weights(trainer.model)

        def begin() -> tuple[Any, StateWriter | None]:
            process = _process_state(trainer)
            if not is_main:
                return process, None
            check_held(Path(state_dir).parent)
            return process, cleanup.enter_context(StateWriter(state_dir))

        def collect() -> tuple[dict[str, Any], dict[str, Tensor]]:
            content: tuple[dict[str, Any], dict[str, Tensor]] = {}, {}
            if is_main:
                content = _state_files(trainer, metadata, processes, weights)
            if engine.sharding is not None:
                write_shard(engine, trainer.optimizer, directory)
            trainer._event("on_save_training_state", state_dir=directory)
            return content

        def finish() -> None:
            if writer is None:
                return
            content, begin_writing = files, write
            if write_in_background is not None and memory is not None:
                held = {name: part for name, part in files.items() if _holds_tensors(part)}
                copies = _copies(held, memory)
                if copies is not None:
                    content, begin_writing = files | copies, write_in_background
            content |= {"state.safetensors": content["state.safetensors"] | constant}
            manifest = _state_manifest(trainer)
            begin_writing(partial(_write, cleanup.pop_all(), writer, content, manifest))

        process, writer = engine.run_on_all(begin)
        processes = engine.gather_objects(process)
        directory = engine.gather_objects(writer and writer.directory)[0]
        files, constant = engine.run_on_all(collect)
        engine.run_on_all(finish)


def _write(
    cleanup: ExitStack, writer: StateWriter, files: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Write a state's files and commit it; if that fails, remove what was written."""
    with cleanup:
        for name, part in files.items():
            if isinstance(part, bytes):
                writer.write(name, part)
            elif name.endswith(".json"):
                writer.write_json(name, part)
            else:
                writer.write_tensors(name, part)
        writer.commit(manifest)


def _state_files(
    trainer: Trainer,
    metadata: Mapping[str, Any],
    processes: list[tuple[Any, Any]],
    weights: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a state.

    Returns:
        Plain data, named tensors, or bytes, by file name; and further tensors of
        ``state.safetensors``, which don't change while training continues.
    """
    engine, tensors, constant = trainer._engine, dict[str, Tensor](), dict[str, Tensor]()
    weight_tensors, other_weights = encode_weights(weights)
    scaler = trainer._accelerator.scaler
    parts = {
        "weights": other_weights,
        "optimizer": engine.optimizer_state(trainer.optimizer) if engine.sharding is None else None,
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "metadata": {
            "current_epoch": trainer.run_history.current_epoch,
            "global_step": trainer.position.updates,
            **metadata,
        },
    }
    state = {name: encode(part, tensors, name) for name, part in parts.items()}
    # How the optimizer is sharded. Resuming compares the text, so its words must not change.
    state["division"] = engine.sharding
    state["parameters"] = parameter_names(trainer)
    training_weights = engine.training_weights(trainer.optimizer)
    if training_weights:  # the weights of the model are those of the optimizer's evaluation mode
        state["training_weights"] = encode(training_weights, tensors, "training_weights")
    loss = trained_loss(trainer)
    if loss is not None:
        state["loss_func"] = encode(loss.state_dict(), tensors, "loss_func")
    state["position"] = asdict(trainer.position)
    numbers = trainer._run_scheduler.created_for
    state["scheduled_for"] = None if numbers is None else asdict(numbers)
    history = trainer.run_history
    unseen = trainer._watched.unseen(history)
    if unseen:
        state["unseen_metrics"] = unseen
    if _has_columns(history):
        state["run_history"] = encode(history.snapshot(), constant, "run_history")
    else:
        history_state = history.state_dict() if hasattr(history, "state_dict") else {}
        state["run_history"] = encode(history_state, tensors, "run_history")
    files = {
        "model.safetensors": weight_tensors,
        "state.json": state,
        "state.safetensors": tensors,
    }
    for rank, (process, process_tensors) in enumerate(processes):
        files[f"process-{rank:05d}.json"] = process
        files[f"process-{rank:05d}.safetensors"] = process_tensors
    return files, constant


def _has_columns(history: object) -> TypeGuard[InMemoryRunHistory]:
    """Whether the columns of a history are its state: no subclass decides what else it is."""
    if not isinstance(history, InMemoryRunHistory):
        return False
    return getattr(history.state_dict, "__func__", None) is InMemoryRunHistory.state_dict


def _process_state(trainer: Trainer) -> tuple[Any, Any]:
    """What differs between processes: random generators, running sums, the plugins' state.

    The second item holds its tensors, as bytes if they have to go to another process.
    """
    tensors: dict[str, Tensor] = {}
    means = trainer._means
    generators: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if trainer.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(trainer.device)
    state = {
        "generators": encode(generators, tensors, "generators"),
        "loss": encode(means.loss.state_dict(), tensors, "loss"),
        "means": encode(means.named_state(), tensors, "means"),
        "drawing": sorted(trainer._drawing),
        "plugins": {
            name: encode(plugin_state, tensors, f"plugin {name!r}")
            for name, plugin_state in trainer.plugins.state_dict().items()
        },
    }
    data, data_tensors = _data_state(trainer)
    if data:
        state["data"] = data
        tensors |= data_tensors
    return state, tensors if trainer.num_processes == 1 else tensor_bytes(tensors)


def check_tensors_can_be_saved(trainer: Trainer) -> None:
    """Check the tensor subclasses in weights and optimizer, before there is much to lose.

    Raises:
        TrainingStateError: for one that can't be saved, naming it.
    """
    model = trainer.get_model(keep_torch_compile=False)
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    for name, value in (*named_parameters(model), *model.named_buffers()):
        if is_wrapper(value):
            encode(local_part(value), {}, name)
    for parameter, values in getattr(trainer.optimizer, "state", {}).items():
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, Tensor):
                encode(local_part(value), {}, f"optimizer.{names.get(id(parameter), '?')}.{key}")


def _data_state(trainer: Trainer) -> tuple[Any, dict[str, Tensor]]:
    """The state of the data, encoded, and its tensors.

    A state that the data save themselves and that isn't plain data is left out, with a warning.
    """
    tensors: dict[str, Tensor] = {}
    data = trainer._data.state_dict()
    try:
        return encode(data, tensors, "data"), tensors
    except TrainingStateError as error:
        warnings.warn(
            f"{error}. It is left out: resuming reads these data again, from their first epoch if "
            "they change from epoch to epoch",
            stacklevel=2,
        )
    data.pop("eval", None)
    data["train"]["parts"] = {}
    return encode(data, {}, "data"), {}


def parameter_names(trainer: Trainer) -> list[list[str]]:
    """Names of the optimizer's parameters, a list for each group."""
    model = trainer.get_model(keep_torch_compile=False)
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    if trainer.optimizer is None:
        return []
    loss = trained_loss(trainer)
    if loss is not None:
        names = {id(p): f"loss_func.{name}" for name, p in loss.named_parameters()} | names
    return [
        [names.get(id(parameter), "?") for parameter in group]
        for group in trainer._engine.parameter_groups(trainer.optimizer)
    ]


def _holds_tensors(part: Any) -> bool:
    return isinstance(part, dict) and any(isinstance(value, Tensor) for value in part.values())


def _copies(
    groups: Mapping[str, Mapping[str, Tensor]], memory: HostMemory
) -> dict[str, dict[str, Tensor]] | None:
    """Copies of the tensors; None if the host has no memory for them."""
    if not has_room_in_memory(_size(groups)):
        return None
    try:
        return memory.copy(groups)
    except (MemoryError, RuntimeError):  # PyTorch's allocator raises the latter
        memory.free()
        return None


def _size(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())


def _state_manifest(trainer: Trainer) -> dict[str, Any]:
    loader = trainer.train_dataloader
    is_exact = loader is None or isinstance(loader, KeyedDataLoader)
    return {
        "saved_at": time.time(),
        "run_id": trainer.run_id,
        # Only the user's own loader knows its order: resuming replays it up to the position.
        "resume": "exact" if is_exact else "replayed",
        "position": asdict(trainer.position),
        **trainer.manifest,
        "run": trainer.manifest["run"] | {"frozen": frozen_parameters(trainer)},
    }
