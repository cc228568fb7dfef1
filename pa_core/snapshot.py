"""What a training state holds, and how it is put back.

Taken at update boundaries only: after an update, after a training epoch, after an epoch of the run
and outside runs. An interrupted accumulation window is done again, identically, since its data and
randomness are keyed by its place.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from pa_core.codec import decode, decode_weights, encode, encode_weights
from pa_core.data import KeyedDataLoader
from pa_core.errors import OtherProcessError, TrainingStateError
from pa_core.states import StateReader, StateWriter, newest_intact_state, tensor_bytes

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
    if not engine.has_whole_state:
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


def try_to_save_snapshot(
    trainer: Trainer, state_dir: str | Path, metadata: Mapping[str, Any]
) -> None:
    """Save as `save_snapshot` does, and only warn where the disk is full, gone or read-only."""
    try:
        save_snapshot(trainer, state_dir, metadata)
    except (OSError, OtherProcessError) as error:
        warnings.warn(
            f"No training state was saved at {state_dir}: {error}. The run goes on, and states "
            "saved before are as they were",
            stacklevel=2,
        )


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

    All of it is understood before anything is put back.

    Raises:
        TrainingStateError: where it is damaged, or not of this version's making.
    """

    def __init__(self, state_dir: str | Path, rank: int) -> None:
        self.reader = StateReader(state_dir)
        self.directory = Path(state_dir)
        with self._understood():
            self._read(rank)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Tell of what is hashed right and makes no sense."""
        try:
            yield
        except _SENSELESS as error:
            raise TrainingStateError(
                f"{self.directory} isn't a state as this version writes them "
                f"({type(error).__name__}: {error})"
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
        counted = (place.epoch, place.first_epoch, place.batch, place.updates, place.samples)
        if not all(type(number) is int for number in counted):
            raise TypeError("the position is no number")
        if place.phase not in ("start", "train", "eval"):
            raise ValueError(f"there is no phase {place.phase!r}")
        self._run: dict[str, Any] = reader.manifest["run"]
        processes = self._run["num_processes"]
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

        Args:
            trainer: what to put them back in.
            in_run: whether the run goes on, which takes the schedule. Without one there may be none
                yet, and evaluating needs none.

        Raises:
            TrainingStateError: where the state is of another model or optimizer, before anything
                was changed.
        """
        model = trainer.get_model(keep_torch_compile=False)
        weights = self._weights
        _check_same_model(model, weights, self.directory)
        saved, present = self._parameters, _parameter_names(trainer)
        if saved != present and (in_run or trainer.optimizer is not None):
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
            model.load_state_dict(weights)
            scaler = trainer._accelerator.scaler
            if scaler is not None and self._parts["scaler"] is not None:
                scaler.load_state_dict(self._parts["scaler"])
            if trainer.optimizer is not None:
                trainer.optimizer.load_state_dict(self._parts["optimizer"])
            # Last of the three: making a schedule has set the optimizer's learning rate.
            if trainer.scheduler is not None and schedule is not None:
                trainer.scheduler.load_state_dict(schedule)
            if hasattr(trainer.run_history, "load_state_dict"):
                trainer.run_history.load_state_dict(self._parts["run_history"])
        vars(trainer.position).update(asdict(self.position))
        trainer._is_between_updates = True

    def restore_plugins(self, trainer: Trainer) -> None:
        """Put back running loss, plugins' state and random generators, and tell the plugins.

        After the events that reset them: in a run, this comes later than `restore_training`.
        """
        with self._understood():
            self._restore_loss(trainer)
        saved = self._process["plugins"]
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
        with self._understood():
            generators = self._process["generators"]
            random.setstate(generators["python"])
            np.random.set_state(generators["numpy"])
            torch.set_rng_state(generators["torch"])
            if trainer.device.type == "cuda" and "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"], trainer.device)

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
        """Tell of differences that change the numbers; refuse those that lose the position.

        Args:
            trainer: of the run that is to go on.
            strict: refuse every difference.

        Raises:
            TrainingStateError: in the middle of an epoch, where its place has no meaning any more.
        """
        saved, present = self.reader.manifest, trainer.manifest
        differences = _differences(saved, present)
        lost = self._what_is_lost(trainer)
        if not differences and lost is None:
            return
        text = f"{self.directory} is of a run that differs: " + ", ".join(differences)
        if lost is not None:
            raise TrainingStateError(f"{text}. {lost}")
        if strict:
            raise TrainingStateError(f"{text}. Allow that with strict=False")
        warnings.warn(text, stacklevel=2)

    def _what_is_lost(self, trainer: Trainer) -> str | None:
        """Why this run can't go on from the middle of an epoch; None where it can."""
        if self.position.phase != "train" or self.position.batch == 0:
            return None
        before, now = self._run, trainer.manifest["run"]
        if before["dataset_length"] != now["dataset_length"]:
            return "Its place in the epoch has no meaning in another dataset"
        sizes = [run["per_device_batch_size"] * run["num_processes"] for run in (before, now)]
        if sizes[0] != sizes[1]:
            return (
                f"Its place in the epoch has no meaning with global batches of {sizes[1]} samples "
                f"in place of {sizes[0]}: set per_device_batch_size so that they are the same"
            )
        if before["num_processes"] != now["num_processes"]:
            first = self._processes[0]["plugins"]
            for process in self._processes[1:]:
                for name, state in process["plugins"].items():
                    if not _same(first.get(name), state):
                        return (
                            f"The plugin {name!r} has another state on each process, which another "
                            "number of them can't take: resume from a state of an epoch's end"
                        )
        return None


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


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What of two manifests changes the numbers of a run."""
    pairs = [(name, saved["run"].get(name), value) for name, value in present["run"].items()]
    pairs.append(("seed", saved["seed"], present["seed"]))
    plugins = [manifest["plugins"] for manifest in (saved, present)]
    for name in sorted(set(plugins[0]) & set(plugins[1])):
        settings = [manifest[name]["settings"] for manifest in plugins]
        pairs.append((f"the settings of plugin {name!r}", *settings))
        versions = [manifest[name]["version"] for manifest in plugins]
        pairs.append((f"the version of plugin {name!r}", *versions))
    packages = [manifest["packages"] for manifest in (saved, present)]
    pairs += [
        (f"the version of {name}", packages[0].get(name), packages[1].get(name))
        for name in ("torch", "accelerate", "numpy")
    ]
    return [f"{name} was {before!r} and is {now!r}" for name, before, now in pairs if before != now]


def _same(first: Any, second: Any) -> bool:
    """Whether two states of a plugin are equal, bit for bit."""
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    texts = [encode(state, into, "") for state, into in zip((first, second), tensors, strict=True)]
    return texts[0] == texts[1] and tensor_bytes(tensors[0]) == tensor_bytes(tensors[1])


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
