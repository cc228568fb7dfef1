"""Gradient accumulation that is exact: the gradient of the mean over the accumulated batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.loader import num_batches

if TYPE_CHECKING:
    from pa_core.engine.base import Engine
    from pa_core.loop.micro_batches import MicroBatch
    from pa_core.loop.randomness import EpochRandomness
    from pa_core.loop.recompute import Recompute

Items = int | float | Tensor


class Accumulation:
    r"""The accumulated batch: the micro-batches between two updates, on all processes.

    With :math:`n_i` items in micro-batch :math:`i`, a mean loss :math:`l_i` and
    :math:`N = \sum_i n_i`, the mean over the accumulated batch is :math:`\sum_i n_i l_i / N`, so
    each loss has the weight :math:`n_i / N`. If :math:`N` is known only at the end (streams, token
    counts), it is estimated first and the gradients are corrected once, before they are clipped.

    Args:
        steps: micro-batches per update.
        loader: the training loader.
        limit: the maximum number of batches per epoch.
        batch_size: the expected number of items of a micro-batch, the same on every process.
        engine: averages gradients over its processes, which the weight undoes.

    Attributes:
        is_empty: whether no micro-batch has begun, so that a training state can be saved.
        is_complete: whether its gradients are waiting for the update.
        chosen: the positions of the only optimizers that the update steps; None for all.
        recompute: keeps the micro-batches for plugins that run them again; None without any.
        samples: of the last finished accumulated batch, on all processes.
        micro_batches: of the last finished accumulated batch, on this process.
        correction: what its gradients were multiplied by; None if the estimate of :math:`N` was
            exact.
    """

    def __init__(
        self, steps: int, loader: Any, limit: int | None, batch_size: int, engine: Engine
    ) -> None:
        self._steps, self._batch_size, self._engine = steps, batch_size, engine
        self._length = None if loader is None else num_batches(loader, limit)
        self._sampler = loader.batch_sampler if isinstance(loader, KeyedDataLoader) else None
        # Every micro-batch is a whole batch, so there is nothing to weigh.
        self._is_whole = steps == 1 and engine.num_processes == 1
        self.samples = self.micro_batches = 0
        self.correction: Tensor | None = None
        self.chosen: frozenset[int] | None = None
        self.recompute: Recompute | None = None
        self.reset()

    def reset(self) -> None:
        """Start afresh, after an update or an interruption."""
        self.is_empty, self.is_complete, self.chosen = True, False, None
        if self.recompute is not None:
            self.recompute.clear()
        self._start()

    def _start(self) -> None:
        self._samples = self._count = 0
        self._reference = 1
        self._total: Items | None = None  # the items whose number wasn't known in advance
        self._planned: int | None = None

    @property
    def begun(self) -> int:
        """The micro-batches of the unfinished accumulated batch whose loss is known."""
        return self._count

    def begin(self, micro: MicroBatch, randomness: EpochRandomness) -> None:
        """Begin the forward pass of a micro-batch."""
        if self.is_empty:
            self._engine.zero_untrained()
        self.is_empty = False
        if self.recompute is not None:
            self.recompute.keep(micro, randomness)

    def weigh(
        self, output: Mapping[str, Any], micro: MicroBatch
    ) -> tuple[float | Tensor | None, Items]:
        """The weight of a micro-batch's mean loss in the mean over the accumulated batch.

        Args:
            output: its ``batch_size`` and, if the loss is a mean over something else than samples,
                ``num_items_in_batch``.
            micro: the micro-batch.

        Returns:
            The weight, None for 1, and the number of items that count.
        """
        self._count += 1
        weight: float | Tensor | None
        items: Items
        if self._is_whole:
            size = output["batch_size"]
            self._samples += size
            weight, items = None, output.get("num_items_in_batch", size)
        else:
            weight, items = self._weigh(output, micro)
        if self.recompute is not None:
            self.recompute.weigh(weight, items)
        return weight, items

    def _weigh(
        self, output: Mapping[str, Any], micro: MicroBatch
    ) -> tuple[float | Tensor | None, Items]:
        size = output["batch_size"]
        items = output.get("num_items_in_batch", size)
        if self._count == 1:
            self._open(micro.step)
        if self._sampler is None:
            size = 0 if micro.is_padding else size
            self._samples += size
            items = items if size else 0
        else:
            size = self._sampler.local_size(micro.step)  # 0 for a padding batch
            self._samples += self._sampler.global_size(micro.step, micro.step + 1)
            if "num_items_in_batch" not in output:
                assert self._planned is not None
                weight = size * self._engine.num_processes / self._planned
                return (None if weight == 1 else weight), size
            items = items if size else 0
        if not self._engine.shows_gradients:
            return self._weigh_now(items), items
        self._total = items if self._total is None else self._total + items
        return items / self._reference, items

    def _weigh_now(self, items: Items) -> Tensor:
        """The weight of a single micro-batch if its gradients can't be corrected afterwards."""
        if self._steps > 1:
            raise ValueError(
                "This engine can't accumulate micro-batches with different numbers of items "
                "(tokens, or samples of a stream) exactly: use gradient_accumulation_steps=1"
            )
        device, processes = self._engine.device, self._engine.num_processes
        mine = torch.as_tensor(items, dtype=torch.float32).to(device)
        if self._sampler is None:
            self._samples = int(self._engine.sum(torch.tensor(self._samples, device=device)))
        return mine * processes / self._engine.sum(mine.clone()).clamp(min=1)

    def _open(self, step: int) -> None:
        """Work out how many micro-batches and samples the accumulated batch will have."""
        end = step + self._steps
        end = end if self._length is None else min(end, self._length)
        self._reference = (end - step) * self._batch_size
        if self._sampler is not None:
            self._planned = self._sampler.global_size(step, end)

    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Complete the accumulated batch: correct the gradients if the estimate wasn't exact."""
        samples, total, reference = self._samples, self._total, self._reference
        self.samples, self.micro_batches, self.correction = int(samples), self._count, None
        self.is_complete = True
        self._start()
        if total is None:  # the estimate was exact
            return
        processes = self._engine.num_processes
        if processes > 1:
            numbers = torch.stack(
                [_on_device(number, self._engine.device) for number in (total, samples)]
            )
            total, counted = self._engine.sum(numbers)
            self.samples = self.samples if self._sampler is not None else int(counted)
        elif not isinstance(total, Tensor) and total == reference:
            return
        factor = reference * processes / torch.as_tensor(total, dtype=torch.float32)
        # Without items there is no gradient. (`torch.where` would copy a zero to the GPU and
        # synchronise.)
        self.correction = factor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.correct(parameters)

    def correct(self, parameters: Iterable[nn.Parameter]) -> None:
        """Multiply the gradients by the correction of the last accumulated batch, if any."""
        if self.correction is None:
            return
        every = chain(parameters, self._engine.loss_parameters)
        gradients = [p.grad for p in every if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, self.correction)


def _on_device(number: Items, device: torch.device) -> Tensor:
    """A number as a tensor of shape ``()``, filled on the device, without synchronisation."""
    if isinstance(number, Tensor):
        return number.to(device, torch.float32, non_blocking=True)
    return torch.full((), number, dtype=torch.float32, device=device)
