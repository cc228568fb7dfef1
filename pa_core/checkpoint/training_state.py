"""What a training state holds, and how it is put back.

Taken at update boundaries only: after an update, after a training epoch, after an epoch of the run
and outside runs. An interrupted accumulation window is done again, identically, since its data and
randomness are keyed by its place.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from pa_core.checkpoint.codec import decode, decode_weights, encode, encode_weights
from pa_core.checkpoint.compatibility import differences, what_is_lost
from pa_core.checkpoint.optimizer_shards import read_part, write_part
from pa_core.checkpoint.safetensors_io import HostMemory, has_room_in_memory, tensor_bytes
from pa_core.checkpoint.storage import StateReader, StateWriter
from pa_core.data.loader import KeyedDataLoader
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_SENSELESS = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    SafetensorError,
)
"""What reading raises where a state is hashed right and makes no sense."""


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
        is_paused: whether it was stopped to be resumed.
    """

    epoch: int = 1
    first_epoch: int = 1
    phase: str = "start"
    batch: int = 0
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0
    stop_reason: str | None = None
    is_paused: bool = False


def save_training_state_files(
    trainer: Trainer,
    state_dir: str | Path,
    metadata: Mapping[str, Any],
    write: Callable[[Callable[[], None]], None] = lambda commit: commit(),
    start: Callable[[Callable[[], None]], None] | None = None,
    memory: HostMemory | None = None,
) -> None:
    """Save all that the rest of the run depends on; called on every process.

    Args:
        trainer: whose state.
        state_dir: the directory that it becomes.
        metadata: plain data and tensors of the user's.
        write: called on the process that writes, with a function that writes and commits.
        start: called in place of `write`, to do that in the background: the state is copied first.
            Where memory is too short for the copy, `write` is called after all.
        memory: where that copy is made.

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
    weights = engine.weights(trainer.model)
    with ExitStack() as cleanup:

        def begin() -> tuple[Any, StateWriter | None]:
            process = _process_state(trainer)
            return process, cleanup.enter_context(StateWriter(state_dir)) if main else None

        def take() -> dict[str, Any]:
            files = _content(trainer, metadata, processes, weights) if main else {}
            if engine.division is not None:
                write_part(engine, trainer.optimizer, directory)
            trainer._event("on_save_training_state", state_dir=directory)
            return files

        def hand_over() -> None:
            if writer is None:
                return
            content, begin_writing = files, write
            if start is not None and memory is not None:
                held = {name: part for name, part in files.items() if _holds_tensors(part)}
                if has_room_in_memory(_size(held)):
                    content, begin_writing = files | memory.copy(held), start
            manifest = _state_manifest(trainer)
            begin_writing(partial(_write, cleanup.pop_all(), writer, content, manifest))

        main = engine.rank == 0
        process, writer = engine.together(begin)
        processes = engine.gather_objects(process)
        directory = engine.gather_objects(writer and writer.directory)[0]
        files = engine.together(take)
        engine.together(hand_over)


def _write(
    cleanup: ExitStack, writer: StateWriter, files: Mapping[str, Any], manifest: Mapping[str, Any]
) -> None:
    """Write a state's files and commit it; what then is left beside it is cleaned up."""
    with cleanup:
        for name, part in files.items():
            if isinstance(part, bytes):
                writer.write(name, part)
            elif name.endswith(".json"):
                writer.write_json(name, part)
            else:
                writer.write_tensors(name, part)
        writer.commit(manifest)


def _content(
    trainer: Trainer,
    metadata: Mapping[str, Any],
    processes: list[tuple[Any, Any]],
    weights: Mapping[str, Any],
) -> dict[str, Any]:
    """The parts of a state by the names of their files: plain data, named tensors, or bytes."""
    engine, tensors = trainer._engine, dict[str, Tensor]()
    whole, rest = encode_weights(weights)
    scaler = trainer._accelerator.scaler
    parts = {
        "weights": rest,
        "optimizer": engine.optimizer_state(trainer.optimizer) if engine.division is None else None,
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "metadata": {"current_epoch": trainer.run_history.current_epoch, **metadata},
    }
    state = {name: encode(part, tensors, name) for name, part in parts.items()}
    state["division"] = engine.division
    state["parameters"] = _parameter_names(trainer)
    state["position"] = asdict(trainer.position)
    state["run_history"] = encode(_history_state(trainer), tensors, "run_history")
    files = {"model.safetensors": whole, "state.json": state, "state.safetensors": tensors}
    for rank, (process, process_tensors) in enumerate(processes):
        files[f"process-{rank:05d}.json"] = process
        files[f"process-{rank:05d}.safetensors"] = process_tensors
    return files


def _process_state(trainer: Trainer) -> tuple[Any, Any]:
    """What differs between processes: random generators, running sums, the plugins' state.

    Its tensors are bytes already where they have to go to another process.
    """
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
    return state, tensors if trainer._engine.num_processes == 1 else tensor_bytes(tensors)


def _holds_tensors(part: Any) -> bool:
    return isinstance(part, dict) and any(isinstance(value, Tensor) for value in part.values())


def _size(groups: Mapping[str, Mapping[str, Tensor]]) -> int:
    return sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())


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


class SavedState:
    """A state that was read and verified, to be put back part by part.

    All of it is understood before anything is put back.

    Raises:
        TrainingStateError: where it is damaged, or not of this version's making.
    """

    def __init__(self, state_dir: str | Path, rank: int) -> None:
        self.reader = StateReader(state_dir)
        self.directory = Path(state_dir)
        with self._understood():
            self._read(rank)
            self.reader.check_rest()

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Tell of what is hashed right and makes no sense, or not for this run."""
        try:
            yield
        except _SENSELESS as error:
            raise TrainingStateError(
                f"{self.directory} is of another run, or isn't a state as this version writes "
                f"them ({type(error).__name__}: {error})"
            ) from error

    def _read(self, rank: int) -> None:
        reader = self.reader
        state, tensors = reader.read_json("state.json"), reader.read_tensors("state.safetensors")
        self._parameters: list[list[str]] = [list(group) for group in state["parameters"]]
        self._parts = {
            name: decode(state[name], tensors)
            for name in ("optimizer", "scheduler", "scaler", "run_history")
        }
        self._weights = decode_weights(
            reader.read_tensors("model.safetensors"), decode(state["weights"], tensors)
        )
        self.metadata: dict[str, Any] = decode(state["metadata"], tensors)
        self.position = Position(**state["position"])
        place = self.position
        if place.is_paused:  # this is the resumed run
            place.stop_reason, place.is_paused = None, False
        counted = (place.epoch, place.first_epoch, place.batch, place.updates, place.samples)
        if not all(type(number) is int for number in counted):
            raise TypeError("the position is no number")
        if place.phase not in ("start", "train", "eval"):
            raise ValueError(f"there is no phase {place.phase!r}")
        if not isinstance(self._parts["run_history"], dict | None):
            raise TypeError("the run history is no dict")
        self._run: dict[str, Any] = reader.manifest["run"]
        processes = self._run["num_processes"]
        self._division: str | None = state["division"]
        if self._division is not None and rank < processes:
            self._parts["optimizer"] = read_part(reader, rank)
        self._processes = [self._read_process(number) for number in range(processes)]
        self._process = self._processes[rank if rank < processes else 0]

    def _read_process(self, rank: int) -> dict[str, Any]:
        name = f"process-{rank:05d}"
        process = self.reader.read_json(f"{name}.json")
        tensors = self.reader.read_tensors(f"{name}.safetensors")
        return {
            "generators": decode(process["generators"], tensors),
            "loss": decode(process["loss"], tensors),
            "plugins": {key: decode(value, tensors) for key, value in process["plugins"].items()},
        }

    def restore_training(self, trainer: Trainer, *, in_run: bool = True) -> None:
        """Put back model, scaler, optimizer, schedule, history and position, in this order.

        Arguments and errors are those of `restore_weights`.
        """
        self.restore_weights(trainer, in_run=in_run)
        if hasattr(trainer.run_history, "load_state_dict"):
            with self._understood():
                trainer.run_history.load_state_dict(self._parts["run_history"])
        vars(trainer.position).update(asdict(self.position))
        trainer._is_between_updates = True

    def restore_weights(self, trainer: Trainer, *, in_run: bool = True) -> None:
        """Put back what updates change: model, scaler, optimizer and schedule, in this order.

        Args:
            trainer: what to put them back in.
            in_run: whether the run goes on, which takes the schedule. Without one there may be none
                yet, and evaluating needs none.

        Raises:
            TrainingStateError: where the state is of another model or optimizer, before anything
                was changed.
        """
        engine = trainer._engine
        _check_same_model(trainer, self._weights, self.directory)
        optimizer = trainer.optimizer
        if optimizer is not None and engine.division != self._division:
            # Only outside a run, see check_same_run.
            warnings.warn(f"{self._how_divided(trainer)}: it is left as it is", stacklevel=3)
            optimizer = None
        saved, present = self._parameters, _parameter_names(trainer)
        if saved != present and (in_run or optimizer is not None):
            raise TrainingStateError(
                f"{self.directory} was saved with an optimizer over other parameters: "
                + _difference(_flat(saved), _flat(present))
            )
        schedule = self._parts["scheduler"]
        if in_run and (schedule is None) != (trainer.scheduler is None):
            raise TrainingStateError(
                f"{self.directory} was saved {'without' if schedule is None else 'with'} a "
                f"scheduler, but this run has {'one' if schedule is None else 'none'}"
            )
        with self._understood():
            engine.load_weights(trainer.model, self._weights)
            scaler = trainer._accelerator.scaler
            if scaler is not None and self._parts["scaler"] is not None:
                scaler.load_state_dict(self._parts["scaler"])
            if optimizer is not None:
                engine.load_optimizer_state(optimizer, self._parts["optimizer"])
            # Last of the three: making a schedule has set the optimizer's learning rate.
            if trainer.scheduler is not None and schedule is not None:
                trainer.scheduler.load_state_dict(schedule)

    def restore_plugins(self, trainer: Trainer) -> None:
        """Put back running loss, plugins' state and random generators, and tell the plugins.

        After the events that reset them: in a run, this comes later than `restore_training`.
        """
        with self._understood():
            self._restore_loss(trainer)
        saved = self._process["plugins"]
        stateful = trainer.plugins.state_dict()
        differing = sorted(set(saved) ^ set(stateful)) if trainer.is_main_process else []
        for name in differing:
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
        with self._understood():
            generators = self._process["generators"]
            random.setstate(generators["python"])
            np.random.set_state(generators["numpy"])
            torch.set_rng_state(generators["torch"])
            if trainer.device.type == "cuda" and "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"], trainer.device)

    def roll_back(self, trainer: Trainer) -> None:
        """Put back the weights, and what follows them, in a run that goes on from where it stands.

        A plugin names in ``follows_weights`` the keys of its state that do; its
        ``on_load_training_state`` is called then. Position, history, running loss and the rest of
        the plugins' state tell of the run so far, and stay. Errors are those of `restore_weights`.
        """
        self.restore_weights(trainer)
        plugins, saved = trainer.plugins, self._process["plugins"]
        following = {
            name: keys
            for name, plugin in plugins.by_name.items()
            if (keys := getattr(type(plugin), "follows_weights", ()))
        }
        if not following:
            return
        states = {}
        for name, state in plugins.state_dict().items():
            if name in following:
                kept = {key: value for key, value in state.items() if key not in following[name]}
                states[name] = dict(saved.get(name, {})) | kept
        plugins.load_state_dict(states, allow_missing=True)
        for found in plugins.implementations("on_load_training_state"):
            if found.name in states:
                found.call({"trainer": trainer, "state_dir": self.directory})

    def _restore_loss(self, trainer: Trainer) -> None:
        """Put back the epoch's running loss, of which each process has its own part."""
        if trainer._engine.num_processes == len(self._processes):
            trainer._loss_tracker.load_state_dict(self._process["loss"])
        elif trainer._engine.rank == 0:  # another number of processes: one of them has it all
            parts = [process["loss"] for process in self._processes]
            total = {name: sum(part[name] for part in parts) for name in parts[0]}
            trainer._loss_tracker.load_state_dict(total)
        else:
            trainer._loss_tracker.reset()

    def check_same_run(self, trainer: Trainer, *, strict: bool) -> None:
        """Tell of differences that change the numbers; refuse those that can't go on.

        Args:
            trainer: of the run that is to go on.
            strict: refuse every difference.

        Raises:
            TrainingStateError: for another optimizer; and in the middle of an epoch, where its
                place has no meaning any more.
        """
        saved, present = self.reader.manifest, trainer.manifest
        found, lost = differences(saved, present, strict=strict), None
        if self._division != trainer._engine.division:
            found.append(self._how_divided(trainer))
            lost = (
                "Each process' part of the optimizer fits there alone: resume as it was saved, or "
                "take the weights with load_training_state and train afresh"
            )
        elif saved["run"]["optimizer"] != present["run"]["optimizer"]:
            lost = "The state of one optimizer means nothing to another"
        elif self.position.phase == "train" and self.position.batch:
            states = [process["plugins"] for process in self._processes]
            lost = what_is_lost(saved["run"], present["run"], states)
        if not found and lost is None:
            return
        text = f"{self.directory} is of a run that differs: " + ", ".join(found)
        if lost is not None:
            raise TrainingStateError(f"{text}. {lost}")
        if strict:
            raise TrainingStateError(f"{text}. Allow that with strict=False")
        warnings.warn(text, stacklevel=2)

    def _how_divided(self, trainer: Trainer) -> str:
        now = trainer._engine.division
        return f"the optimizer was {self._division or 'whole'} and is {now or 'whole'}"


def _parameter_names(trainer: Trainer) -> list[list[str]]:
    """Names of the optimizer's parameters, a list per group."""
    model = trainer.get_model(keep_torch_compile=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if trainer.optimizer is None:
        return []
    return [
        [names.get(id(parameter), "?") for parameter in group]
        for group in trainer._engine.parameter_groups(trainer.optimizer)
    ]


def _history_state(trainer: Trainer) -> Any:
    history = trainer.run_history
    return history.state_dict() if hasattr(history, "state_dict") else {}


def _check_same_model(trainer: Trainer, weights: Mapping[str, Any], place: Path) -> None:
    present = trainer._engine.shapes(trainer.model)
    saved = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in weights.items()
    }
    if saved != present:
        raise TrainingStateError(
            f"{place} is a state of another model than {type(trainer.get_model(False)).__name__}: "
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
