"""Builds that break one promise each, to prove that the harnesses notice.

Each function breaks pa_core in this process; called with pytest's ``monkeypatch``, only for one
test.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import torch

from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.checkpoint import atomic_io, restore, storage
from pa_core.control import TrainerControl
from pa_core.data import keyed_loader, rng
from pa_core.loop import base, consensus, randomness

Patch = Callable[[Any, str, Any], None]
"""What `setattr` and ``monkeypatch.setattr`` have in common."""


def no_flush(patch: Patch) -> None:
    """Files are written and never flushed to the disk."""

    class Careless:
        fsync = staticmethod(lambda handle: None)

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    patch(atomic_io, "os", Careless())


def no_manifest_check(patch: Patch) -> None:
    """A state is read without checking its hashes."""

    def careless(self: Any, name: str) -> bytes:
        return atomic_io.read_file(self.directory / name)

    patch(storage.StateReader, "_read", careless)
    patch(storage.StateReader, "check_rest", lambda self: None)


def rotate_before_save(patch: Patch) -> None:
    """Old states are removed before the new one is complete."""
    request = SaveTrainingStateCallback._request

    def broken(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        for old in storage.find_states(self.save_dir)[self.max_checkpoints - 1 :]:
            atomic_io.remove_whole(old)
        request(self, trainer, *args, **kwargs)

    patch(SaveTrainingStateCallback, "_request", broken)


def no_key(patch: Patch) -> None:
    """A step's randomness is a continuing stream, not a function of its position."""
    for module, names in (
        (randomness, ("seed_model", "seed_python_and_numpy")),
        (base, ("seed_all",)),
        (keyed_loader, ("seed_host", "seed_torch")),
    ):
        for name in names:
            patch(module, name, lambda key, device=None: None)
    patch(random, "setstate", lambda state: None)
    patch(torch, "set_rng_state", lambda state: None)


def same_order(patch: Patch) -> None:
    """A resumed epoch begins with the order of another one."""
    restore_training = restore.TrainingState.restore_training

    def broken(self: Any, trainer: Any, **kwargs: Any) -> None:
        restore_training(self, trainer, **kwargs)
        trainer.train_dataloader.batch_sampler.seed = rng.derive_key(trainer.seed, "another")

    patch(restore.TrainingState, "restore_training", broken)


def cursor(patch: Patch) -> None:
    """The position in the data is off by one batch."""
    restore_training = restore.TrainingState.restore_training

    def broken(self: Any, trainer: Any, **kwargs: Any) -> None:
        restore_training(self, trainer, **kwargs)
        trainer.position.batch += trainer.position.batch > 0

    patch(restore.TrainingState, "restore_training", broken)


def no_plugin_state(patch: Patch) -> None:
    """The state of plugins isn't restored."""
    from pa_core.plugins.manager import PluginManager

    patch(PluginManager, "load_state_dict", lambda self, storage, **kwargs: None)


def no_schedule(patch: Patch) -> None:
    """The learning-rate scheduler starts afresh."""
    patch(torch.optim.lr_scheduler.OneCycleLR, "load_state_dict", lambda self, state: None)


def no_history(patch: Patch) -> None:
    """The run history starts afresh."""
    from pa_core.tracking import InMemoryRunHistory

    patch(
        InMemoryRunHistory,
        "load_state_dict",
        lambda self, state: self._set_epoch(state["current_epoch"]),
    )


def flag_not_reduced(patch: Patch) -> None:
    """A process acts on a request that only it has received."""

    def broken(self: Any, control: TrainerControl, *args: Any, **kwargs: Any) -> Any:
        granted = control.take_everywhere()
        granted.add(control.take_here())
        return granted

    patch(consensus.Consensus, "decide", broken)


BUILDS: dict[str, Callable[[Patch], None]] = {
    build.__name__: build
    for build in (
        *(no_flush, no_manifest_check, rotate_before_save, no_key, same_order, cursor),
        *(no_plugin_state, no_schedule, no_history, flag_not_reduced),
    )
}
