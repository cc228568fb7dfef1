"""Check that the start events of a resumed run leave what was restored as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pa_core.engine.loss_parameters import trained_loss
from pa_core.engine.subclasses import local_part, plain_parts
from pa_core.tracking import count_values

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Call, Implementation
    from pa_core.trainer import Trainer

_EVENTS = ("on_training_run_start", "on_train_epoch_start")
_METHOD = "training_run_start or train_epoch_start of the Trainer's class"
_SMALL = 2**28
"""Bytes of weights and optimizer up to which they are compared after each plugin, to name it."""


class StartCheck:
    """Watches the start events of a resumed run, and finds out who changes what was restored.

    Values are compared by their hashes, in which this process' shards of tensors count.

    Args:
        trainer: the trainer, whose state has just been restored.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._before = self._digest()
        self._latest = self._before
        self._culprits: list[str] = []
        self._names_each = sum(t.nbytes for t in self._tensors()) <= _SMALL
        self._history = count_values(trainer.run_history)
        trainer.plugins.wrap_calls(self._around)

    def end(self) -> tuple[str | None, bool]:
        """End the check.

        Returns:
            What has changed weights, optimizer, scheduler or scaler, None if nothing has; and
            whether the history has new records.
        """
        self._trainer.plugins.unwrap_calls(self._around)
        has_records = count_values(self._trainer.run_history) != self._history
        if self._digest() == self._before:
            return None, has_records
        self._compare(_METHOD)
        found = dict.fromkeys(self._culprits or ["a start event"])
        return " and ".join(found), has_records

    def _around(self, found: Implementation) -> Call:
        call: Call = found.call
        if found.hook not in _EVENTS or found.wrapper:
            return call

        def call_and_compare(arguments: dict[str, Any]) -> Any:
            self._compare(_METHOD)
            result = call(arguments)
            self._compare(f"the plugin {found.name!r}")
            return result

        return call_and_compare

    def _compare(self, culprit: str) -> None:
        """Note who has changed something since the last comparison."""
        if self._names_each:
            digest = self._digest()
            if digest != self._latest:
                self._latest = digest
                self._culprits.append(culprit)

    def _tensors(self) -> Iterator[Tensor]:
        trainer = self._trainer
        yield from trainer.model.parameters()
        loss = trained_loss(trainer)
        if loss is not None:
            yield from loss.parameters()
        yield from trainer.model.buffers()
        for values in trainer.optimizer.state.values():
            if isinstance(values, Mapping):
                yield from (value for value in values.values() if isinstance(value, Tensor))

    def _digest(self) -> bytes:
        """A hash of weights, optimizer, scheduler and scaler."""
        trainer, digest = self._trainer, hashlib.blake2b(digest_size=16)
        for tensor in self._tensors():
            for part in plain_parts(local_part(tensor)):
                content = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(content.numpy().data)
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in trainer.optimizer.param_groups
        ]
        scheduler, scaler = trainer.scheduler, trainer._accelerator.scaler
        others = (groups, scheduler and scheduler.state_dict(), scaler and scaler.state_dict())
        digest.update(repr(others).encode())
        return digest.digest()
