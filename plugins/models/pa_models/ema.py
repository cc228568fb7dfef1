"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pa_core.plugin import named_modules
from pa_models.wrappers import copy_without_wrappers, unwrap_model

_LOW_PRECISION = (torch.bfloat16, torch.float16)


class ModelEma(nn.Module):
    """Keeps a moving average of a model: ``average = d * average + (1 - d) * weights``.

    It averages parameters and the persistent floating-point buffers, such as running statistics,
    and copies all other buffers. 16-bit weights are averaged in 32 bits, and `module` has the
    rounded result: in 16 bits, changes smaller than a 256th of the weight would be lost to
    rounding.

    A subclass may override `update_fn`, which is called for each averaged tensor, or ``update``,
    whose argument `num_updates` is optional.

    Args:
        model: the model; wrappers of distributed training and `torch.compile` are removed.
        decay: ``d``, the factor of the old average in each update.
        warmup: whether to limit the decay of the ``t``-th update to ``(1 + t) / (10 + t)``, so
            that the initial weights soon lose their influence (as in TensorFlow's
            ``ExponentialMovingAverage`` with ``num_updates``).

    Attributes:
        module: a copy of the model, in evaluation mode, with the averaged weights.
        updates: the number of updates averaged.

    Raises:
        ValueError: for a decay outside of [0, 1), or a model that can't be copied.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> ema = ModelEma(model, decay=0.9)
    >>> _ = nn.init.ones_(model.weight)
    >>> ema.update(model)
    >>> round(ema.module.weight.item(), 4)
    0.1
    """

    module: nn.Module

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = False) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be between 0 and 1, such as 0.999, got {decay!r}")
        self.module = copy_without_wrappers(model).eval().requires_grad_(False)
        for parameter in self.module.parameters():
            parameter.grad = None
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._numbers_at_start: dict[str, float] = {}
        # Not averaged: caches; buffers with infinite values, such as attention masks; and frozen
        # weights of a tensor subclass, such as quantised ones.
        self._copied = {
            (place, name)
            for place, (_, module) in enumerate(named_modules(self.module))
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
            or _is_wrapper(buffer)
            or not buffer.isfinite().all()
        }
        self._copied_parameters = {
            place
            for place, parameter in enumerate(unwrap_model(model).parameters())
            if _is_wrapper(parameter) and not parameter.requires_grad
        }
        # The average of 16-bit tensors in 32 bits, by their index in the first list of `_split`.
        for place, value in enumerate(self._split(self.module)[0]):
            if value.dtype in _LOW_PRECISION:
                self.register_buffer(f"wide_{place}", value.float())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model with the averaged weights."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int = 1) -> None:
        """Update the average with the model's current weights.

        Args:
            model: the model.
            num_updates: the number of optimizer updates since the last call; the decay is applied
                that many times.
        """
        if getattr(self.update_fn, "__func__", None) is not ModelEma.update_fn:
            for _ in range(num_updates):
                self.updates += 1
                given, self.decay = self.decay, self._decay_now()
                self._update(model, self.update_fn)
                self.decay = given
            return
        self.updates += num_updates
        weight = 1 - self._decay_now() ** num_updates
        self._take(model, lambda old, new: torch._foreach_lerp_(old, new, weight))

    def update_fn(self, ema_model_weights: Tensor, updated_model_weights: Tensor) -> Tensor:
        """The new average of one tensor, for subclasses to override.

        Args:
            ema_model_weights: the average so far; in 32 bits if the model has fewer.
            updated_model_weights: the model's current value, of the same shape and type.
        """
        return self.decay * ema_model_weights + (1.0 - self.decay) * updated_model_weights

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Restart the average from the model's current weights."""
        self.updates = 0
        self._update(model, lambda average, weights: weights)

    def _decay_now(self) -> float:
        limit = (1 + self.updates) / (10 + self.updates)
        return min(self.decay, limit) if self.warmup else self.decay

    @torch.no_grad()
    def _update(self, model: nn.Module, update_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace each averaged tensor by what a function returns for it and the model's."""

        def merge(averages: list[Tensor], weights: list[Tensor]) -> None:
            for old, new in zip(averages, weights, strict=True):
                old.copy_(update_fn(old, new))

        self._take(model, merge)

    def _take(
        self, model: nn.Module, merge: Callable[[list[Tensor], list[Tensor]], object]
    ) -> None:
        """Have `merge` change the averaged tensors in place, and copy all others."""
        averaged, copied = self._split(self.module)
        new_averaged, new_copied = self._split(unwrap_model(model))
        targets = [
            value if (wide := self._buffers.get(f"wide_{place}")) is None else wide
            for place, value in enumerate(averaged)
        ]
        values = [
            new.detach().to(old.device, old.dtype)
            for new, old in zip(new_averaged, targets, strict=True)
        ]
        if targets:
            merge(targets, values)
        for narrow, target in zip(averaged, targets, strict=True):
            if narrow is not target:
                narrow.copy_(target)
        for old, new in zip(copied, new_copied, strict=True):
            old.copy_(new)

    def _split(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """The averaged and the copied tensors, in the same order for every copy of the model."""
        averaged: list[Tensor] = []
        copied: list[Tensor] = []
        for place, parameter in enumerate(model.parameters()):
            is_averaged = _has_average(parameter) and place not in self._copied_parameters
            (averaged if is_averaged else copied).append(parameter)
        seen: set[int] = set()
        for place, (_, module) in enumerate(named_modules(model)):
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) not in seen:
                    seen.add(id(buffer))
                    is_averaged = _has_average(buffer) and (place, name) not in self._copied
                    (averaged if is_averaged else copied).append(buffer)
        return averaged, copied

    def _remember_numbers(self) -> None:
        """Take the numbers among the attributes as settings; those that change later are state."""
        self._numbers_at_start = self._numbers()

    def _numbers(self) -> dict[str, float]:
        """What a subclass may count or change: its attributes that are numbers, and the decay."""
        return {
            name: value
            for name, value in vars(self).items()
            if type(value) in (int, float) and not name.startswith("_")
        }

    def get_extra_state(self) -> dict[str, float]:
        """The number of updates, and other numbers that a subclass changed since the run started.

        They are in ``state_dict`` besides the weights.
        """
        if type(self) is ModelEma:
            return {"updates": self.updates}
        given = self._numbers_at_start
        changed = {name: n for name, n in self._numbers().items() if given.get(name) != n}
        return {**changed, "updates": self.updates}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Restore what `get_extra_state` returned."""
        for name in self._numbers().keys() & state.keys():
            setattr(self, name, state[name])


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that holds other tensors, and may lack operations."""
    return hasattr(type(tensor), "__tensor_flatten__")


def _has_average(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
