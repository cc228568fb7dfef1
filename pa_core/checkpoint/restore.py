"""Read a training state, and restore a trainer from it."""

from __future__ import annotations

import random
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from pa_core.checkpoint.codec import decode, decode_weights
from pa_core.checkpoint.compatibility import (
    differences,
    differing_leaves,
    in_effect,
    mid_epoch_obstacle,
    only_in_one,
    report_differences,
    same_state,
)
from pa_core.checkpoint.fingerprint import (
    DATA_ENTRIES,
    data_fingerprint,
    describe_optimization,
    describe_plugins,
    frozen_parameters,
)
from pa_core.checkpoint.next_epoch import NextEpochCheck
from pa_core.checkpoint.optimizer_shards import read_shard
from pa_core.checkpoint.save import parameter_names
from pa_core.checkpoint.start_check import StartCheck
from pa_core.checkpoint.storage import StateReader
from pa_core.data.process_split import OwnSplitLoader
from pa_core.engine.loss_parameters import find_loss
from pa_core.errors import TrainingStateError, listed
from pa_core.settings.paths import local_path
from pa_core.tracking import Position

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_RESTORED = ("optimizer_settings.", "scheduler.", "scheduler_parts.")
_INVALID_CONTENT = (
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    SafetensorError,
)
"""What reading a state raises if its hashes match and its content makes no sense."""


class TrainingState:
    """A training state that was read and verified, to be restored part by part.

    All of it is read and decoded before anything is restored.

    Args:
        state_dir: the state's directory.
        rank: this process' rank.

    Raises:
        TrainingStateError: if it is damaged, or this version can't read it.
    """

    def __init__(self, state_dir: str | Path, rank: int) -> None:
        self.reader = StateReader(state_dir)
        self.directory, self._rank = local_path(state_dir), rank
        with self._invalid_content_reported():
            self._read()
            self.reader.check_rest()

    @contextmanager
    def _invalid_content_reported(self) -> Iterator[None]:
        """Raise a `TrainingStateError` for content that makes no sense, or not for this run."""
        try:
            yield
        except _INVALID_CONTENT as error:
            raise TrainingStateError(
                f"{self.directory} was saved by a different run, or this version can't read it "
                f"({type(error).__name__}: {error})"
            ) from error

    def _read(self) -> None:
        reader, rank = self.reader, self._rank
        state, tensors = reader.read_json("state.json"), reader.read_tensors("state.safetensors")
        self._parameters: list[list[str]] = [list(group) for group in state["parameters"]]
        self._parts = {
            name: decode(state[name], tensors)
            for name in ("optimizer", "scheduler", "scaler", "run_history")
        }
        for name in ("training_weights", "loss_func"):
            self._parts[name] = decode(state.get(name), tensors)
        self._weights = decode_weights(
            reader.read_tensors("model.safetensors"), decode(state["weights"], tensors)
        )
        self.metadata: dict[str, Any] = decode(state["metadata"], tensors)
        self.position = Position(**state["position"])
        self.unseen: dict[str, int] = dict(state.get("unseen_metrics", {}))
        position = self.position
        if position.is_paused:  # and resumed now
            position.stop_reason, position.is_paused = None, False
        counts = (
            *(position.epoch, position.first_epoch, position.batch),
            *(position.updates, position.samples),
            *(position.skipped, position.skipped_in_a_row),
            *self.unseen.values(),
        )
        if not all(type(count) is int for count in counts):
            raise TypeError("the counts of the position and of metrics must be integers")
        if position.phase not in ("start", "train", "eval"):
            raise ValueError(f"unknown phase {position.phase!r}")
        if not isinstance(self._parts["run_history"], dict | None):
            raise TypeError("the run history must be a dict")
        self.scheduled_for = _checked_numbers(state.get("scheduled_for"))
        if not isinstance(position.seconds, int | float):
            raise TypeError("the seconds of the position must be a number")
        _check_plugins(reader.manifest["plugins"])
        self._run: dict[str, Any] = reader.manifest["run"]
        run_id = reader.manifest.get("run_id")
        self._run_id = None if run_id is None else uuid.UUID(run_id).hex
        processes = self._run["num_processes"]
        self._sharding: str | None = state["division"]
        if self._sharding is not None and rank < processes:
            self._parts["optimizer"] = read_shard(reader, rank)
        self._processes = [self._read_process(number) for number in range(processes)]
        self._process = self._processes[rank if rank < processes else 0]

    def _read_process(self, rank: int) -> dict[str, Any]:
        name = f"process-{rank:05d}"
        process = self.reader.read_json(f"{name}.json")
        tensors = self.reader.read_tensors(f"{name}.safetensors")
        return {
            "generators": decode(process["generators"], tensors),
            "loss": decode(process["loss"], tensors),
            "means": decode(process.get("means", {}), tensors),
            # Earlier versions seeded every part of a step.
            "drawing": set(process.get("drawing", ("model", "plugins"))),
            "plugins": {key: decode(value, tensors) for key, value in process["plugins"].items()},
            "data": decode(process["data"], tensors) if "data" in process else None,
        }

    @property
    def run_id(self) -> str | None:
        """The identity of the run that has saved it; None in a state of an earlier version."""
        return self._run_id

    def check_compatible(self, trainer: Trainer, *, strict: bool) -> None:
        """Warn of differences that change the numbers; refuse those that prevent resuming.

        If plugins had changed the data of the saved run, `check_data` compares them later.

        Args:
            trainer: the trainer of the run that is to be resumed.
            strict: refuse every difference.

        Raises:
            TrainingStateError: for a different optimizer; and in the middle of an epoch, if the
                position isn't valid for the present data or processes.
        """
        self._strict = strict
        saved, present = self.reader.manifest, trainer.manifest
        if self._has_changed_data:
            saved = saved | {"run": _without_data(saved["run"])}
        found, obstacle = differences(saved, present, strict=strict), None
        engine = trainer._engine
        found += engine.changed_types(trainer.model, self._weights)
        if self._sharding != engine.sharding:
            found.append(self._sharding_difference(trainer))
            obstacle = (
                "A shard of the optimizer can only be restored where the optimizer is sharded the "
                "same way: resume as it was saved, or load the weights with load_training_state "
                "and start a new run"
            )
        elif saved["run"]["optimizer"] != present["run"]["optimizer"]:
            obstacle = "The state of one optimizer can't be loaded into another"
        elif _has_other_class(saved["run"].get("scheduler"), present["run"]["scheduler"]):
            obstacle = (
                "The state of one scheduler can't be loaded into another: create the same one, or "
                "load the weights with load_training_state and start a new run"
            )
        elif self._is_within_epoch:
            states = [process["plugins"] for process in self._processes]
            obstacle = mid_epoch_obstacle(saved["run"], present["run"], states, self.position.batch)
        self._report(found, obstacle or self._data_obstacle(trainer))

    def settle(self, trainer: Trainer, script: Mapping[str, Any]) -> dict[str, Any]:
        """Work out the settings in effect, now that everything is restored.

        Further states record them. So a setting of the script that has no effect, such as the
        learning rate of a restored optimizer, is reported by each resume until script and state
        agree.

        Args:
            trainer: the restored trainer.
            script: the fingerprint of the run as its script describes it.

        Returns:
            The fingerprint of the run as it is.

        Raises:
            TrainingStateError: if other parameters are frozen than in the saved run, and the run
                resumes with ``strict=True``.
        """
        saved = self.reader.manifest
        live = describe_optimization(trainer)
        effect = {
            name: in_effect(saved["run"].get(name, script[name]), script[name], live[name])
            for name in ("scheduler", "scheduler_parts")
        }
        has_script = all(value == script[name] for name, value in effect.items())
        for group, described in zip(
            live["optimizer_settings"], script["optimizer_settings"], strict=False
        ):
            if "initial_lr" in described:  # the present rate is the scheduler's
                is_same = has_script and group.get("initial_lr") == described["initial_lr"]
                group["lr"] = described["lr"] if is_same else None
        name = "optimizer_settings"
        effect[name] = in_effect(saved["run"].get(name, script[name]), script[name], live[name])
        plugins, now = script["plugins"], describe_plugins(trainer)
        values = {
            name: in_effect(
                saved["plugins"].get(name, {}).get("values", described["values"]),
                described["values"],
                now.get(name, described)["values"],
            )
            for name, described in plugins.items()
        }
        plugins = {name: one | {"values": values[name]} for name, one in plugins.items()}
        frozen = saved["run"].get("frozen")
        if frozen is not None and self._is_within_epoch:
            frozen_now = frozen_parameters(trainer)
            if frozen_now != frozen:
                self._report([f"frozen parameters: {only_in_one(frozen, frozen_now)}"], None)
        return {**script, **effect, "plugins": plugins}

    def check_data(self, trainer: Trainer) -> None:
        """Check the data that plugins have put in place for the rest of the resumed epoch.

        Raises:
            TrainingStateError: if they have another length than in the saved run; and for every
                other difference if the run resumes with ``strict=True``.
        """
        has_changed = self._has_changed_data or (trainer._fingerprint or {}).get("data_changed")
        if not (has_changed and self._is_within_epoch):
            return
        saved, present = self.reader.manifest["run"], data_fingerprint(trainer)
        now = {name: value for name, value in present.items() if name in saved}
        found = differing_leaves({name: saved[name] for name in now}, now)
        obstacle = None
        if saved["dataset_length"] != present["dataset_length"]:
            obstacle = (
                "A position in the middle of an epoch is only valid for the same dataset: plugins "
                "must assign it again in on_train_epoch_start or on_load_training_state"
            )
        self._report(found, obstacle)

    def check_of_next_epoch(self, trainer: Trainer) -> NextEpochCheck:
        """What to compare when the next epoch starts; called once the plugins are restored.

        Its data are described if plugins had changed those of the saved run. Otherwise
        `check_compatible` has compared them.
        """
        data: Mapping[str, Any] | None = self._run.get("next_data")
        is_between = not self._is_within_epoch
        if data is None and is_between and self._run.get("data_changed"):
            data = {name: self._run[name] for name in DATA_ENTRIES if name in self._run}
        frozen = self._run.get("frozen") if is_between else None  # `settle` compares it otherwise
        return NextEpochCheck(
            self.directory,
            self._strict,
            data,
            None if frozen is None else (frozen, frozen_parameters(trainer)),
        )

    def restore_data(self, trainer: Trainer) -> None:
        """Restore the state of data that decide their own order, and have the next batch compared.

        Raises:
            TrainingStateError: if the run resumes with ``strict=True``, and the state has none.
        """
        data, saved = trainer._data, self._process["data"]
        name = data.train_state.name if data.train_state is not None else None
        if saved is None:
            if name is not None and (self._is_within_epoch or self.position.epoch_of_run > 0):
                self._report_data(
                    f"{self.directory} was saved with other data or by an earlier version, and "
                    f"doesn't record where {name} stands: nothing checks that the run continues "
                    "with the same batches"
                )
            return
        states = [process["data"] for process in self._processes]
        is_compared = len(states) == trainer.num_processes
        for entry in ("per_device_batch_size", "stream"):
            present = (trainer._fingerprint or {}).get(entry)
            is_compared &= self._run.get(entry) == present
        is_compared &= all(one["train"]["digest"] for one in states if one and "train" in one)
        data.load_state_dict(saved, is_compared=is_compared, strict=self._strict)

    def _data_obstacle(self, trainer: Trainer) -> str | None:
        """The reason why the state that data have saved themselves can't be restored."""
        states, now = (
            [_parts(process["data"] or {}) for process in self._processes],
            trainer.num_processes,
        )
        if len(states) == now or not any(state for one in states for state in one.values()):
            return None
        is_split = isinstance(trainer.train_dataloader, OwnSplitLoader)
        if not is_split and all(same_state(states[0], one) for one in states):
            return None
        state = trainer._data.train_state
        return (
            f"{'The data' if state is None else state.name} saved a state of each of {len(states)} "
            f"processes, which can't be restored on {now}"
        )

    def _report_data(self, text: str) -> None:
        if self._strict:
            raise TrainingStateError(f"{text}. To allow this, pass strict=False")
        warnings.warn(text, stacklevel=3)

    @property
    def _has_changed_data(self) -> bool:
        """Whether plugins had changed the data, which are then compared later."""
        is_next = "next_data" in self._run and not self._is_within_epoch
        return is_next or bool(self._run.get("data_changed"))

    @property
    def _is_within_epoch(self) -> bool:
        return self.position.phase == "train" and bool(self.position.batch)

    def _report(self, found: list[str], obstacle: str | None) -> None:
        """Refuse to resume, or warn of what differs."""
        hint = ""
        if any(one.startswith(_RESTORED) for one in found):
            hint = (
                ". The settings of optimizer and scheduler continue as they were saved, apart from "
                "functions and from schedulers that follow a new length: write these into the "
                "script, or assign the script's in on_load_training_state"
            )
        report_differences(self.directory, found, hint, strict=self._strict, obstacle=obstacle)

    def watch_start(self, trainer: Trainer) -> None:
        """Watch the start events of the resumed run, which must not change what was restored."""
        self._start_check = StartCheck(trainer)

    def stop_watching(self) -> None:
        """End `watch_start` without a check, if the run failed before."""
        self._start_check.end()

    def check_start(self, trainer: Trainer) -> None:
        """Restore again what start events have changed, and warn of it.

        Raises:
            TrainingStateError: if they have, and the run resumes with ``strict=True``.
        """
        culprit, has_records = self._start_check.end()
        engine = trainer._engine
        changed, recorded = engine.largest(int(culprit is not None), int(has_records))
        if not (changed or recorded):
            return
        with self._invalid_content_reported():
            self._read()  # the optimizer works on the tensors that were restored first
        if recorded:  # again what the history has from the run's first start
            self._restore_history(trainer)
        if not changed:
            return
        self.restore_weights(trainer)
        text = (
            f"{culprit or 'a start event on another process'} has changed weights, optimizer or "
            f"learning rate that were restored from {self.directory}. Leave them as they are while "
            "trainer.is_resuming is true"
        )
        if self._strict:
            raise TrainingStateError(f"Resuming was refused: {text}")
        if culprit is not None:
            warnings.warn(f"They were restored again: {text}", stacklevel=3)

    def restore_training(self, trainer: Trainer, *, in_run: bool = True) -> None:
        """Restore model, scaler, optimizer, scheduler, history and position, in this order.

        Arguments and errors are those of `restore_weights`.
        """
        self.restore_weights(trainer, in_run=in_run)
        self._restore_history(trainer)
        for name, value in asdict(self.position).items():
            setattr(trainer.position, name, value)
        if in_run and self.position.stop_reason is not None:
            self._reconsider_stop(trainer)
        trainer._accumulation.reset()

    def _reconsider_stop(self, trainer: Trainer) -> None:
        """Continue a stopped run if all plugins that have stopped it would no longer do so.

        Such a plugin has a method ``withdraws_stop``, which is given its state. It returns None if
        the plugin hasn't stopped the run. One that isn't enabled any more would no longer stop it,
        if its state says that it has.
        """
        saved, answers = self._processes[0]["plugins"], {}
        removed = [
            name
            for name, state in saved.items()
            if name not in trainer.plugins.by_name
            and isinstance(state, Mapping)
            and state.get("has_stopped") is True
        ]
        for name, plugin in trainer.plugins.by_name.items():
            withdraws = getattr(plugin, "withdraws_stop", None)
            answer = withdraws(saved[name]) if withdraws is not None and name in saved else None
            if answer is not None:
                answers[name] = answer
        if (answers or removed) and all(answers.values()):
            reasons = [f"{name!r} now allows more" for name in answers]
            reasons += [f"{name!r} isn't enabled any more" for name in removed]
            trainer.print(
                f"The run had stopped ({trainer.position.stop_reason}) and continues, since "
                f"{' and '.join(reasons)}"
            )
            trainer.position.stop_reason = None

    def _restore_history(self, trainer: Trainer) -> None:
        if hasattr(trainer.run_history, "load_state_dict"):
            with self._invalid_content_reported():
                trainer.run_history.load_state_dict(self._parts["run_history"])

    def restore_weights(self, trainer: Trainer, *, in_run: bool = True) -> None:
        """Restore what updates change: model, scaler, optimizer and scheduler, in this order.

        Args:
            trainer: the trainer to restore.
            in_run: whether a run continues, which needs the scheduler. Outside a run there may be
                none yet, and evaluating needs none.

        Raises:
            TrainingStateError: if the state was saved from a different model or optimizer; nothing
                has been changed then.
        """
        engine = trainer._engine
        _check_same_model(trainer, self._weights, self.directory)
        optimizer = trainer.optimizer
        if optimizer is not None and engine.sharding != self._sharding:
            # Only outside a run; `check_compatible` refuses it otherwise.
            difference = self._sharding_difference(trainer)
            warnings.warn(f"The optimizer is not restored: {difference}", stacklevel=3)
            optimizer = None
        saved, present = self._parameters, parameter_names(trainer)
        if saved != present and (in_run or optimizer is not None):
            raise TrainingStateError(
                f"{self.directory} was saved with an optimizer over different parameters: "
                + only_in_one(_flat(saved), _flat(present))
            )
        saved_loss = self._parts["loss_func"]
        loss = None if saved_loss is None else find_loss(trainer, saved_loss)
        if saved_loss is not None and loss is None:
            text = f"{self.directory} was saved with parameters of another loss function"
            if in_run:
                raise TrainingStateError(text)
            warnings.warn(f"{text}, which are not restored", stacklevel=3)
        scheduler = self._parts["scheduler"]
        if in_run and (scheduler is None) != (trainer.scheduler is None):
            raise TrainingStateError(
                f"{self.directory} was saved {'without' if scheduler is None else 'with'} a "
                f"scheduler, but this run has {'one' if scheduler is None else 'none'}"
            )
        with self._invalid_content_reported(), engine.evaluation_mode(optimizer):
            engine.load_weights(trainer.model, self._weights)
            if loss is not None:
                loss.load_state_dict(saved_loss)
            scaler = trainer._accelerator.scaler
            if scaler is not None and self._parts["scaler"] is not None:
                scaler.load_state_dict(self._parts["scaler"])
            if optimizer is not None:
                engine.load_optimizer_state(
                    optimizer,
                    self._parts["optimizer"],
                    keeps_types=not engine.changed_types(trainer.model, self._weights),
                )
                engine.load_training_weights(optimizer, self._parts["training_weights"] or {})
            # After the optimizer: creating the scheduler has set the optimizer's learning rate.
            if trainer.scheduler is not None and scheduler is not None:
                trainer.scheduler.load_state_dict(scheduler)

    def restore_plugins(self, trainer: Trainer) -> None:
        """Restore running means and plugins, call `on_load_training_state`, restore the generators.

        In a run this comes after `restore_training`, once the events that reset them are over.
        """
        with self._invalid_content_reported():
            self._restore_means(trainer)
        trainer._drawing = set(self._process["drawing"])
        saved = self._process["plugins"]
        stateful = trainer.plugins.state_dict()
        differing = sorted(set(saved) ^ set(stateful)) if trainer.is_main_process else []
        for name in differing:
            warnings.warn(
                f"{self.directory} has a state of the plugin {name!r}, which isn't enabled now"
                if name in saved
                else f"{self.directory} has no state of the plugin {name!r}, which starts afresh",
                stacklevel=2,
            )
        trainer.plugins.load_state_dict(
            {name: state for name, state in saved.items() if name in stateful}, allow_missing=True
        )
        trainer._event("on_load_training_state", state_dir=self.directory)
        if trainer.is_resuming:  # the saved run may have been killed before this event
            trainer._event("on_training_state_saved", state_dir=self.directory)
        # Last, since everything before may draw random numbers.
        with self._invalid_content_reported():
            generators = self._process["generators"]
            random.setstate(generators["python"])
            np.random.set_state(generators["numpy"])
            torch.set_rng_state(generators["torch"])
            if trainer.device.type == "cuda" and "cuda" in generators:
                torch.cuda.set_rng_state(generators["cuda"], trainer.device)

    def roll_back(self, trainer: Trainer) -> None:
        """Restore the weights, and what follows them, in a run that continues where it stands.

        A plugin lists the keys of its state that follow the weights in ``follows_weights``; its
        ``on_load_training_state`` is then called. Position, history, running loss and the rest of
        the plugins' state describe the run so far, and stay. Errors are those of
        `restore_weights`.
        """
        trainer._run_scheduler.recreate(self.scheduled_for)
        self.restore_weights(trainer)
        trainer._run_scheduler.follow_length()
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

    def _restore_means(self, trainer: Trainer) -> None:
        """Restore the epoch's running means, of which each process has its own sums."""
        if trainer.num_processes == len(self._processes):
            trainer._means.load(self._process["loss"], self._process["means"])
            return
        trainer._means.reset()
        if trainer._engine.rank == 0:  # a different number of processes: one has all of it
            loss = _sum_of([process["loss"] for process in self._processes])
            means = [process["means"] for process in self._processes]
            names = dict.fromkeys(name for mean in means for name in mean)
            named = {
                name: _sum_of([mean[name] for mean in means if name in mean]) for name in names
            }
            trainer._means.load(loss, named)

    def _sharding_difference(self, trainer: Trainer) -> str:
        now = trainer._engine.sharding
        return f"the optimizer's state: {self._sharding or 'whole'} → {now or 'whole'}"


def _check_plugins(described: Any) -> None:
    """Check that a manifest describes plugins as this version does.

    Raises:
        TypeError: otherwise.
    """
    for plugin in described.values():
        parts = [plugin["settings"], plugin.get("values", {})]
        if not all(isinstance(part, Mapping) for part in (plugin, *parts)):
            raise TypeError("the plugins must be described by tables")
        if "version" not in plugin:
            raise TypeError("the plugins must be described with their versions")


def _checked_numbers(numbers: Any) -> dict[str, Any] | None:
    """The numbers of the run that its scheduler was created for; earlier versions have none.

    Raises:
        TypeError: if they are anything else.
    """
    if numbers is None:
        return None
    counts = ("num_updates", "updates_per_epoch", "train_batches", "eval_batches")
    pairs = [tuple(pair) for pair in numbers["past"]]
    is_valid = (
        numbers.keys() == {*counts, "num_epochs", "past"}
        and all(numbers[name] is None or type(numbers[name]) is int for name in counts)
        and isinstance(numbers["num_epochs"], int | float | None)
        and all(isinstance(epochs, int | float) and type(n) is int for epochs, n in pairs)
    )
    if not is_valid:
        raise TypeError(f"{numbers!r} aren't the numbers of a run")
    return {**numbers, "past": tuple(pairs)}


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """The state that the data of a process have saved themselves, by where it belongs."""
    return {"train": data.get("train", {}).get("parts"), "eval": data.get("eval")}


def _has_other_class(saved: Any, present: Any) -> bool:
    """Whether a description, or one of two lists of as many, is of an object of another class."""
    if isinstance(saved, list) and isinstance(present, list) and len(saved) == len(present):
        return any(map(_has_other_class, saved, present))
    both = isinstance(saved, dict) and isinstance(present, dict)
    return both and saved.get("class") != present.get("class")


def _sum_of(means: list[dict[str, float]]) -> dict[str, float]:
    """The sums of several processes as those of one."""
    return {name: sum(mean[name] for mean in means) for name in means[0]}


def _without_data(run: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without what describes the data."""
    return {name: value for name, value in run.items() if name not in DATA_ENTRIES}


def _check_same_model(trainer: Trainer, weights: Mapping[str, Any], state_dir: Path) -> None:
    present = trainer._engine.shapes(trainer.model)
    saved = {
        name: tuple(value.shape) if isinstance(value, Tensor) else None
        for name, value in weights.items()
    }
    if saved == present:
        return
    reshaped = [
        f"`{name}` has shape {list(shape or ())} in the state and {list(present[name] or ())} in "
        "the run"
        for name, shape in saved.items()
        if name in present and shape != present[name]
    ]
    found = [listed(reshaped)] if reshaped else []
    if saved.keys() != present.keys():
        found.append(only_in_one(list(saved), list(present)))
    raise TrainingStateError(
        f"{state_dir} was saved from a different model than this "
        f"{type(trainer.get_model(False)).__name__}: " + "; ".join(found)
    )


def _flat(groups: list[list[str]]) -> list[str]:
    return [f"{name} (group {number})" for number, group in enumerate(groups) for name in group]
