"""An exponential moving average of a model's weights."""

from __future__ import annotations

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
        ValueError: for a decay outside of [0, 1).

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
        self.updates += num_updates
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self._take(model, 1 - decay**num_updates)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Restart the average from the model's current weights."""
        self.updates = 0
        self._take(model, 1.0)

    def _take(self, model: nn.Module, weight: float) -> None:
        """Interpolate from the average towards the model by the fraction `weight`."""
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
            torch._foreach_lerp_(targets, values, weight)
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

    def get_extra_state(self) -> dict[str, int]:
        """The number of updates, which `state_dict` contains besides the weights."""
        return {"updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore what `get_extra_state` returned."""
        self.updates = state["updates"]


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is of a subclass that holds other tensors, and may lack operations."""
    return hasattr(type(tensor), "__tensor_flatten__")


def _has_average(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
