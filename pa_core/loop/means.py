"""The means of an epoch: of the loss, and of what plugins and loss methods record by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pa_core.plugins.blame import running_plugin
from pa_core.tracking import LossTracker, instance_metric_name, writer_name

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_LOSS_NAMES = ("loss", "loss_epoch")
"""With a prefix, these are the core's own metrics."""


class NamedMean(NamedTuple):
    """The mean of an epoch that has a name, and who recorded it; empty if that isn't known."""

    name: str
    value: float
    writer: str


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
        self._writers: dict[str, str] = {}  # who records each name
        self._names_of_step: set[str] = set()
        self.items: float | Tensor | None = None
        self._steps = 0
        self.is_in_step = self._is_padding = False

    def start_step(self, *, is_padding: bool = False) -> None:
        """Begin a step, in which each name may be recorded once."""
        self.is_in_step, self._is_padding, self.items = True, is_padding, None
        if self._names_of_step:
            self._names_of_step = set()

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
        items = 0 if self._is_padding or items is None else items
        if not self.is_muted:
            plugin = running_plugin()
            self._add(name, value, items, f"record_mean() of {writer_name(plugin)}", plugin)

    def _add(
        self,
        name: str,
        value: Any,
        items: float | Tensor,
        writer: str,
        plugin: str | None = None,
    ) -> None:
        if self.is_muted:
            return
        if not isinstance(name, str) or not name or name in _LOSS_NAMES:
            raise ValueError(
                f"{name!r} can't name a mean: give a text other than {', '.join(_LOSS_NAMES)}, "
                "which name the loss"
            )
        name = instance_metric_name(plugin, name)
        other = self._writers.setdefault(name, writer)
        if name in self._names_of_step or other != writer:
            when = " twice in one step" if name in self._names_of_step else ""
            raise ValueError(
                f"The mean {name!r} is recorded{when}, by {other} and by {writer}: give one of "
                "them another name"
            )
        if not isinstance(items, Tensor) and items < 0:
            raise ValueError(f"The mean {name!r} is over {items} items; expected 0 or more")
        self._names_of_step.add(name)
        tracker = self._named.get(name)
        if tracker is None:
            tracker = self._named[name] = LossTracker()
        tracker.update(_as_number(name, value), items)

    def reduce(self, engine: Engine) -> tuple[float | None, list[NamedMean], bool]:
        """Take the means over all processes; a collective.

        Returns:
            The mean loss, None without any item; the other means; and whether there was a batch,
            with items or without.

        Raises:
            ValueError: if two processes have different writers of one mean.
        """
        loss = self.loss.sums(engine.device)
        numbers = loss.new_tensor([len(self._named), self._steps])
        total, count, names, steps = engine.sum(torch.cat([loss, numbers])).tolist()
        mean = total / count if count else None
        if not names:
            return mean, [], bool(steps)
        writers: dict[str, str] = {}
        # Those of a restored epoch are known once they record again.
        for of_rank in engine.gather_objects({n: self._writers.get(n, "") for n in self._named}):
            for name, writer in of_rank.items():
                other = writers.get(name) or writer
                if writer not in ("", other):
                    raise ValueError(
                        f"The mean {name!r} is recorded by {other} on one process and by {writer} "
                        "on another: give one of them another name"
                    )
                writers[name] = other
        united = sorted(writers)
        sums = [(self._named.get(name) or LossTracker()).sums(engine.device) for name in united]
        reduced = zip(united, engine.sum(torch.stack(sums)).tolist(), strict=True)
        means = [
            NamedMean(name, total / count, writers[name])
            for name, (total, count) in reduced
            if count
        ]
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
