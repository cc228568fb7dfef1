"""Run the micro-batches of an accumulated batch again, for updates that take more than one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pa_core.loop.no_items import gradients_of, weighted
from pa_core.loop.outputs import check_batch_output, check_loss

if TYPE_CHECKING:
    from pa_core.loop.micro_batches import MicroBatch
    from pa_core.loop.randomness import EpochRandomness
    from pa_core.trainer import Trainer


class _Kept(NamedTuple):
    micro: MicroBatch
    randomness: EpochRandomness
    versions: list[int]  # how often each tensor of the batch had been changed in place
    weight: float | Tensor | None
    items: float | Tensor


class Recompute:
    """Keeps the micro-batches of the present accumulated batch."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []

    def clear(self) -> None:
        """Forget the micro-batches."""
        self._kept = []

    def keep(self, micro: MicroBatch, randomness: EpochRandomness) -> None:
        """Keep a micro-batch as it is before its forward pass.

        Containers and other objects are copied, as a loss method may take entries out of them, or
        replace them; tensors aren't.
        """
        data = _copy(micro.data)
        versions = [tensor._version for tensor in _tensors(data)]
        self._kept.append(_Kept(micro._replace(data=data), randomness, versions, None, 1))

    def weigh(self, weight: float | Tensor | None, items: float | Tensor) -> None:
        """Keep the last micro-batch's items, and its loss's weight in the accumulated batch."""
        self._kept[-1] = self._kept[-1]._replace(weight=weight, items=items)

    def run(self, trainer: Trainer) -> Tensor:
        """Replace the gradients by those with the present parameters; returns the mean loss.

        Raises:
            RuntimeError: if a batch has been changed in place since it was first used.
        """
        engine, model = trainer._engine, trainer.model
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        engine.zero_grad(trainer.optimizer)
        engine.zero_untrained()
        total = torch.zeros((), device=engine.device)
        trainer._means.is_muted = True
        try:
            for kept in self._kept:
                if [tensor._version for tensor in _tensors(kept.micro.data)] != kept.versions:
                    raise RuntimeError(
                        f"The batch of step {kept.micro.step} was changed in place, so that it "
                        "can't be run again: change a copy, or change it in on_train_step_start"
                    )
                trainer.is_padding_batch = kept.micro.is_padding
                with engine.accumulating(model, kept.micro.completes_update):
                    loss = self._run_again(trainer, kept)
                if not kept.micro.is_padding:
                    total = total + loss
        finally:
            trainer._means.is_muted = False
            trainer.is_padding_batch = self._kept[-1].micro.is_padding
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer  # the module may have replaced the tensor
                    buffer.copy_(value)
        engine.choose(trainer.optimizer, trainer._accumulation.chosen)
        correction = trainer._accumulation.correction
        if correction is not None:
            trainer._accumulation.correct(model.parameters())
            total = total * correction.to(total.device)
        engine.unscale_again(trainer.optimizer)
        return engine.sum(total) / engine.num_processes

    def _run_again(self, trainer: Trainer, kept: _Kept) -> Tensor:
        """Run a micro-batch again; returns its part of the mean loss, without its graph."""
        hooks, step = trainer._hooks, kept.micro.step
        batch = _copy(kept.micro.data)
        kept.randomness.seed_model(step)
        output = trainer.calculate_train_batch_loss(batch)
        output = check_batch_output(output, "calculate_train_batch_loss")
        kept.randomness.seed_hooks(step)
        if hooks.on_backward_start is not None:
            hooks.on_backward_start(trainer=trainer, batch=batch, batch_output=output, step=step)
        loss = check_loss(output["loss"], "on_backward_start left")
        loss = weighted(loss, kept.weight, kept.items)
        with gradients_of(kept.items, lambda: trainer._engine.gradient_leaves(trainer.model)):
            trainer.backward_step(loss)
        return loss.detach()


def _copy(data: Any) -> Any:
    """A copy of a batch's containers and other objects, with the same tensors."""
    if isinstance(data, Tensor):
        return data
    if isinstance(data, tuple):
        items = map(_copy, data)
        return type(data)(*items) if hasattr(data, "_fields") else type(data)(items)
    try:
        copied = copy(data)
    except TypeError:  # an object that can't be copied
        return data
    if isinstance(copied, MutableMapping):
        for key in list(copied):
            copied[key] = _copy(copied[key])
    elif isinstance(copied, list):
        copied[:] = map(_copy, copied)
    return copied


def _tensors(data: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors of a batch, in containers and in the attributes of objects."""
    seen = set() if seen is None else seen
    if isinstance(data, Tensor):
        yield data
        return
    if isinstance(data, Mapping):
        values = list(data.values())
    elif isinstance(data, list | tuple):
        values = list(data)
    else:
        slots = getattr(type(data), "__slots__", ())
        values = [*vars(data).values()] if hasattr(data, "__dict__") else []
        values += [getattr(data, name, None) for name in slots]
    if id(data) not in seen:
        seen.add(id(data))  # objects may refer to each other
        for value in values:
            yield from _tensors(value, seen)
