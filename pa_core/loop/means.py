"""The means of an epoch: of the loss, and of what plugins and loss methods record by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pa_core.tracking import LossTracker

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_LOSS_NAMES = ("loss", "loss_epoch")
"""With a prefix, these are the core's own metrics."""


class EpochMeans:
    """Means over the items of an epoch, summed on their device, so that nothing synchronises.

    Attributes:
        loss: the loss.
        items: how many items the loss of the present step is the mean of; None while unknown.
        is_in_step: whether a step has begun and not ended.
        is_muted: whether what is recorded by name is ignored.
    """

    def __init__(self) -> None:
        self.loss = LossTracker()
        self.is_muted = False
        self.reset()

    def reset(self) -> None:
        """Remove all values."""
        self.loss.reset()
        self._named: dict[str, LossTracker] = {}
        self._sources: dict[str, str] = {}  # who has recorded each name in the present step
        self.items: float | Tensor | None = None
        self._steps = 0
        self.is_in_step = self._is_padding = False

    def start_step(self, *, is_padding: bool = False) -> None:
        """Begin a step, in which each name may be recorded once."""
        self.is_in_step, self._is_padding, self.items = True, is_padding, None
        if self._sources:
            self._sources = {}

    def end_step(self) -> None:
        """End the step."""
        self.is_in_step = False

    def add(self, loss: Tensor, output: Mapping[str, Any]) -> None:
        """Add the loss of the step, and what its loss method has logged.

        Args:
            loss: shape ``()``, unscaled: the mean over `items`.
            output: what the loss method returned.

        Raises:
            ValueError: if a name can't be recorded.
            TypeError: if what was logged aren't numbers by name.
        """
        assert self.items is not None
        self._steps += 1
        self.loss.update(loss, self.items)
        if "log" not in output:
            return
        log = output["log"]
        if not isinstance(log, Mapping):
            raise TypeError(
                f'batch_output["log"] is a {type(log).__name__}; expected a dict of means by name'
            )
        for name, value in log.items():
            self._add(name, value, self.items, 'batch_output["log"]')

    def record(self, name: str, value: Any, items: float | Tensor | None) -> None:
        """See `Trainer.record_mean`."""
        if not self.is_in_step:
            raise RuntimeError(
                "record_mean() is called in the hooks of a step and in loss methods; elsewhere, "
                "record a value with run_history.update_metric()"
            )
        items = self.items if items is None else items
        if items is None and not self._is_padding:
            raise ValueError(
                f"record_mean({name!r}) needs items here, before the batch size is known"
            )
        self._add(name, value, 0 if self._is_padding or items is None else items, "record_mean()")

    def _add(self, name: str, value: Any, items: float | Tensor, source: str) -> None:
        if self.is_muted:
            return
        if not isinstance(name, str) or not name or name in _LOSS_NAMES:
            raise ValueError(
                f"{name!r} can't name a mean: give a text other than {', '.join(_LOSS_NAMES)}, "
                "which name the loss"
            )
        if name in self._sources:
            raise ValueError(
                f"The mean {name!r} is recorded twice in one step, by {self._sources[name]} and by "
                f"{source}: give one of them another name"
            )
        if not isinstance(items, Tensor) and items < 0:
            raise ValueError(f"The mean {name!r} is over {items} items; expected 0 or more")
        self._sources[name] = source
        tracker = self._named.get(name)
        if tracker is None:
            tracker = self._named[name] = LossTracker()
        tracker.update(_as_number(name, value), items)

    def reduce(self, engine: Engine) -> tuple[float | None, dict[str, float], bool]:
        """Take the means over all processes; a collective.

        Returns:
            The mean loss, None without any item; the other means by name; and whether there was a
            batch, with items or without.
        """
        loss = self.loss.sums(engine.device)
        numbers = loss.new_tensor([len(self._named), self._steps])
        total, count, names, steps = engine.sum(torch.cat([loss, numbers])).tolist()
        mean = total / count if count else None
        if not names:
            return mean, {}, bool(steps)
        united = sorted(
            {name for of_rank in engine.gather_objects([*self._named]) for name in of_rank}
        )
        sums = [(self._named.get(name) or LossTracker()).sums(engine.device) for name in united]
        reduced = zip(united, engine.sum(torch.stack(sums)).tolist(), strict=True)
        means = {name: total / count for name, (total, count) in reduced if count}
        return mean, means, bool(steps)

    def named_state(self) -> dict[str, Any]:
        """The sums by name of this process, as numbers."""
        return {name: tracker.state_dict() for name, tracker in self._named.items()}

    def load(self, loss: Mapping[str, float], named: Mapping[str, Any]) -> None:
        """Restore the state of `loss`, and what `named_state` returned."""
        self.reset()
        self.loss.load_state_dict(loss)
        for name, state in named.items():
            self._named[name] = LossTracker()
            self._named[name].load_state_dict(state)


def _as_number(name: str, value: Any) -> float | Tensor:
    """A number, or a tensor of shape ``()``."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(
                f"The mean {name!r} is a tensor of shape {tuple(value.shape)} and type "
                f"{value.dtype}; expected a real number, or a tensor with one"
            )
        return value.reshape(())
    if not isinstance(value, int | float | np.number):
        raise TypeError(f"The mean {name!r} is a {type(value).__name__}; expected a number")
    return float(value)
