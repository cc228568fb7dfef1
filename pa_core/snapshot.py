"""What a training state holds, and how it is put back.

Taken at update boundaries only: after an update, after a training epoch, after an epoch of the run
and outside runs. An interrupted accumulation window is done again, identically, since its data and
randomness are keyed by its place.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pa_core.codec import decode, decode_weights, encode, encode_weights
from pa_core.data import KeyedDataLoader
from pa_core.errors import TrainingStateError
from pa_core.states import StateReader, StateWriter, newest_intact_state, tensor_bytes

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


@dataclass
class Position:
    """Where a run stands, counted as batches are consumed.

    Attributes:
        epoch: number of the epoch, from 1 on, as in the run history.
        first_epoch: the run's first; not 1 where a run goes on with the history of another.
        phase: ``"start"`` of the epoch, in its ``"train"`` part, or with its ``"eval"`` part ahead.
        batch: micro-batches of the epoch that this process has consumed and used for an update.
        updates: optimizer updates of the run.
        samples: samples consumed by the run, on all processes.
        seconds: time that the run has taken.
        stop_reason: why the run was stopped early, if it was.
    """

    epoch: int = 1
    first_epoch: int = 1
    phase: str = "start"
    batch: int = 0
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0
    stop_reason: str | None = None


def save_snapshot(trainer: Trainer, state_dir: str | Path, metadata: Mapping[str, Any]) -> None:
    """Save all that the rest of the run depends on; called on every process.

    Raises:
        TrainingStateError: where something can't be saved, naming whose and what; then nothing
            has changed at `state_dir`.
    """
    engine = trainer._engine
    if not trainer._is_between_updates and trainer.position.stop_reason is None:
        raise TrainingStateError(
            "The run was interrupted in the middle of an update, where no state can be saved that "
            "goes on exactly. Resume from the last one that was saved"
        )
    if not engine.is_plain and engine.accelerator.scaler is None:
        raise TrainingStateError(
            f"Training states under {engine.accelerator.distributed_type.value} aren't supported "
            "yet; save the model with save_checkpoint"
        )
    with ExitStack() as cleanup:

        def begin() -> tuple[Any, StateWriter | None]:
            process = _process_state(trainer)
            return process, cleanup.enter_context(StateWriter(state_dir)) if main else None

        def write() -> None:
            if writer is not None:
                _write(trainer, writer, metadata, processes)
            trainer._event("on_save_training_state", state_dir=directory)

        def commit() -> None:
            if writer is not None:
                writer.commit(_state_manifest(trainer))

        main = engine.rank == 0
        process, writer = engine.together(begin)
        processes = engine.gather_objects(process)
        directory = engine.gather_objects(writer and writer.directory)[0]
        engine.together(write)
        engine.together(commit)


def _write(
    trainer: Trainer,
    writer: StateWriter,
    metadata: Mapping[str, Any],
    processes: list[tuple[Any, bytes]],
) -> None:
    tensors: dict[str, Tensor] = {}
    weights, rest = encode_weights(trainer.get_model(keep_torch_compile=False).state_dict())
    writer.write_tensors("model.safetensors", weights)
    scaler = trainer._accelerator.scaler
    parts = {
        "weights": rest,
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "metadata": {"current_epoch": trainer.run_history.current_epoch, **metadata},
    }
    state = {name: encode(part, tensors, name) for name, part in parts.items()}
    state["parameters"] = _parameter_names(trainer)
    state["position"] = asdict(trainer.position)
    state["run_history"] = encode(_history_state(trainer), tensors, "run_history")
    writer.write_json("state.json", state)
    writer.write_tensors("state.safetensors", tensors)
    for rank, (process, process_tensors) in enumerate(processes):
        writer.write_json(f"process-{rank:05d}.json", process)
        writer.write(f"process-{rank:05d}.safetensors", process_tensors)


def _process_state(trainer: Trainer) -> tuple[Any, bytes]:
    """What differs between processes: random generators, running sums, the plugins' state."""
    tensors: dict[str, Tensor] = {}
    generators: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
        "torch": torch.get_rng_state(),
    }
    if trainer.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(trainer.device)
    state = {
        "generators": encode(generators, tensors, "generators"),
        "loss": encode(trainer._loss_tracker.state_dict(), tensors, "loss"),
        "plugins": {
            name: encode(plugin_state, tensors, f"plugin {name!r}")
            for name, plugin_state in trainer.plugins.state_dict().items()
        },
    }
    return state, tensor_bytes(tensors)


def _state_manifest(trainer: Trainer) -> dict[str, Any]:
    loader = trainer._train_dataloader
    exact = loader is None or isinstance(loader, KeyedDataLoader)
    return {
        "saved_at": time.time(),
        # A loader of the user's knows its order alone: resuming replays it up to the position.
        "resume": "exact" if exact else "replayed",
        "position": asdict(trainer.position),
        **trainer.manifest,
    }


class Snapshot:
    """A state that was read and verified, to be put back part by part.

    Raises:
        TrainingStateError: where it is damaged.
    """

    def __init__(self, state_dir: str | Path, rank: int) -> None:
        self.reader = StateReader(state_dir)
        self.directory = Path(state_dir)
        self._state = self.reader.read_json("state.json")
        self._tensors = self.reader.read_tensors("state.safetensors")
        process = f"process-{rank:05d}"
        if f"{process}.json" not in self.reader:
            process = "process-00000"  # more processes than there were: draws are keyed anyway
        self._process = self.reader.read_json(f"{process}.json")
        self._process_tensors = self.reader.read_tensors(f"{process}.safetensors")
        self.position = Position(**self._state["position"])
        self.metadata: dict[str, Any] = self._decode("metadata")

    def _decode(self, name: str) -> Any:
        return decode(self._state[name], self._tensors)

    def restore_training(self, trainer: Trainer, *, in_run: bool = True) -> None:
        """Put back model, scaler, optimizer, schedule, history and position, in this order.

        Args:
            trainer: what to put them back in.
            in_run: whether the run goes on, which takes the schedule. Without one there may be none
                yet, and evaluating needs none.

        Raises:
            TrainingStateError: where the state is of another model or optimizer, before anything
                was changed.
        """
        model = trainer.get_model(keep_torch_compile=False)
        weights = decode_weights(
            self.reader.read_tensors("model.safetensors"), self._decode("weights")
        )
        _check_same_model(model, weights, self.directory)
        saved, present = self._state["parameters"], _parameter_names(trainer)
        if saved != present and (in_run or trainer.optimizer is not None):
            raise TrainingStateError(
                f"{self.directory} was saved with an optimizer over other parameters: "
                + _difference(_flat(saved), _flat(present))
            )
        schedule = self._decode("scheduler")
        if in_run and (schedule is None) != (trainer.scheduler is None):
            raise TrainingStateError(
                f"{self.directory} was saved {'without' if schedule is None else 'with'} a "
                f"scheduler, but this run has {'one' if schedule is None else 'none'}"
            )
        model.load_state_dict(weights)
        scaler = trainer._accelerator.scaler
        if scaler is not None and self._state["scaler"] is not None:
            scaler.load_state_dict(self._decode("scaler"))
        if trainer.optimizer is not None:
            trainer.optimizer.load_state_dict(self._decode("optimizer"))
        # Last of the three: making a schedule has set the optimizer's learning rate.
        if trainer.scheduler is not None and schedule is not None:
            trainer.scheduler.load_state_dict(schedule)
        history = self._decode("run_history")
        if hasattr(trainer.run_history, "load_state_dict"):
            trainer.run_history.load_state_dict(history)
        vars(trainer.position).update(self._state["position"])

    def restore_plugins(self, trainer: Trainer) -> None:
        """Put back running loss, plugins' state and random generators, and tell the plugins.

        After the events that reset them: in a run, this comes later than `restore_training`.
        """
        trainer._loss_tracker.load_state_dict(decode(self._process["loss"], self._process_tensors))
        saved = {
            name: decode(state, self._process_tensors)
            for name, state in self._process["plugins"].items()
        }
        stateful = trainer.plugins.state_dict()
        for name in sorted(set(saved) ^ set(stateful)):
            warnings.warn(
                f"{self.directory} holds a state of the plugin {name!r}, which isn't enabled now"
                if name in saved
                else f"{self.directory} holds no state of the plugin {name!r}, which starts anew",
                stacklevel=2,
            )
        trainer.plugins.load_state_dict(
            {name: state for name, state in saved.items() if name in stateful}, allow_missing=True
        )
        trainer._event("on_load_training_state", state_dir=self.directory)
        # Last of all, since whatever runs before may draw numbers.
        generators = decode(self._process["generators"], self._process_tensors)
        random.setstate(generators["python"])
        np.random.set_state(generators["numpy"])
        torch.set_rng_state(generators["torch"])
        if trainer.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], trainer.device)

    def check_same_run(self, trainer: Trainer) -> None:
        """Warn of differences that change the numbers; refuse those that lose the position.

        Raises:
            TrainingStateError: in the middle of an epoch of another dataset or batch size.
        """
        saved, present = self.reader.manifest, trainer.manifest
        differences = [
            f"{name} was {saved['run'].get(name)!r} and is {present['run'][name]!r}"
            for name in present["run"]
            if saved["run"].get(name) != present["run"][name]
        ]
        if saved["seed"] != present["seed"]:
            differences.append(f"seed was {saved['seed']} and is {present['seed']}")
        if not differences:
            return
        text = f"{self.directory} is of a run that differs: " + ", ".join(differences)
        sizes = ("dataset_length", "per_device_batch_size", "num_processes")
        moved = any(saved["run"].get(name) != present["run"][name] for name in sizes)
        if moved and self.position.phase == "train" and self.position.batch > 0:
            raise TrainingStateError(f"{text}. Its place in the epoch has no meaning here")
        warnings.warn(text, stacklevel=2)


def find_state(resume_from: str | Path, trainer: Trainer) -> Path | None:
    """The state that `resume_from` means: a state, a folder of states, or ``"auto"``.

    ``"auto"`` is the folder that the run's own plugin saves to.

    Returns:
        None for ``"auto"`` where nothing was saved yet.

    Raises:
        TrainingStateError: where there is no state.
    """
    if resume_from == "auto":
        folders = [
            plugin.save_dir  # type: ignore[attr-defined]
            for plugin in trainer.plugins.plugins.values()
            if getattr(type(plugin), "saves_training_states", False)
        ]
        if not folders:
            raise TrainingStateError(
                'resume_from="auto" takes the folder of the checkpoint plugin, which isn\'t '
                'enabled: add "checkpoint" to the plugins, or name a folder'
            )
        return newest_intact_state(folders[0])
    path = Path(resume_from)
    if not path.is_dir():
        raise TrainingStateError(f"There is no training state at {path}")
    if (path / "manifest.json").exists() or (path / "state.json").exists():
        return path
    found = newest_intact_state(path)
    if found is None:
        raise TrainingStateError(f"{path} holds no training state")
    return found


def _parameter_names(trainer: Trainer) -> list[list[str]]:
    """Names of the optimizer's parameters, a list per group."""
    model = trainer.get_model(keep_torch_compile=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if trainer.optimizer is None:
        return []
    return [
        [names.get(id(parameter), "?") for parameter in group["params"]]
        for group in trainer.optimizer.param_groups
    ]


def _history_state(trainer: Trainer) -> Any:
    history = trainer.run_history
    return history.state_dict() if hasattr(history, "state_dict") else {}


def _check_same_model(model: torch.nn.Module, weights: Mapping[str, Any], place: Path) -> None:
    present = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in model.state_dict().items()
    }
    saved = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in weights.items()
    }
    if saved != present:
        raise TrainingStateError(
            f"{place} is a state of another model than {type(model).__name__}: "
            + _difference(
                [f"{name}{list(shape or ())}" for name, shape in saved.items()],
                [f"{name}{list(shape or ())}" for name, shape in present.items()],
            )
        )


def _difference(saved: list[str], present: list[str]) -> str:
    def names(these: list[str], those: list[str]) -> str:
        only = [name for name in these if name not in those]
        return ", ".join(only[:5]) + (f" and {len(only) - 5} more" if len(only) > 5 else "")

    return (
        f"only in the state: {names(saved, present) or 'none'}; "
        f"only in the run: {names(present, saved) or 'none'}"
    )


def _flat(groups: list[list[str]]) -> list[str]:
    return [f"{name} (group {number})" for number, group in enumerate(groups) for name in group]
