"""Weights that make accumulated gradients the gradient of the mean over the whole window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pa_core.data.loader import KeyedDataLoader, num_batches
from pa_core.data.process_split import SplitBatch

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

Items = int | float | Tensor


class AccumulationWindow:
    r"""The micro-batches between two updates, on all processes.

    With :math:`n_i` items in micro-batch :math:`i`, a mean loss :math:`l_i` and
    :math:`N = \sum_i n_i`, the mean over the window is :math:`\sum_i n_i l_i / N`. So each loss is
    weighed with :math:`n_i / N`. Where :math:`N` is known only at the window's end (streams,
    token counts), it is estimated beforehand and the gradients are corrected once, before they
    are clipped.

    Args:
        accumulation: micro-batches per update.
        loader: where they come from.
        limit: how many batches an epoch has at most.
        batch_size: how many items a micro-batch is expected to have, alike on every process.
        engine: gradients are averaged over its processes, which the weights undo.
    """

    def __init__(
        self, accumulation: int, loader: Any, limit: int | None, batch_size: int, engine: Engine
    ) -> None:
        self._accumulation, self._batch_size, self._engine = accumulation, batch_size, engine
        self._length = None if loader is None else num_batches(loader, limit)
        self._sampler = loader.batch_sampler if isinstance(loader, KeyedDataLoader) else None
        # Then every micro-batch is a batch of its own, and there is nothing to weigh.
        self._is_whole = accumulation == 1 and engine.num_processes == 1
        self.reset()

    def reset(self) -> None:
        """Forget a window that was interrupted."""
        self._is_open = False
        self._samples = 0
        self._reference = 1
        self._total: Items | None = None  # of the items that weren't planned with
        self._planned: int | None = None

    def is_padding(self, batch: Any, step: int, is_last: bool) -> bool:
        """Whether a batch counts for nothing, since too little was left for all processes."""
        if self._sampler is None:
            return type(batch) is SplitBatch and batch.is_padding
        if not is_last:
            return False
        place = self._sampler.local_slice(step)
        return bool(place.start == place.stop)

    def weigh(self, output: Mapping[str, Any], step: int, is_padding: bool) -> tuple[Tensor, Items]:
        """A micro-batch's share in the mean loss over the window.

        Args:
            output: its ``loss`` (shape ``()``, a mean), ``batch_size`` and perhaps
                ``num_items_in_batch``, how many items the loss is the mean of.
            step: its number in the epoch.
            is_padding: whether it is another process' batch, and counts for nothing here.

        Returns:
            The weighed loss, shape ``()``, and how many items count.
        """
        loss, size = output["loss"], output["batch_size"]
        items = output.get("num_items_in_batch", size)
        if self._is_whole:
            self._samples += size
            return loss, items
        if not self._is_open:
            self._open(step)
        if self._sampler is None:
            size = 0 if is_padding else size
            self._samples += size
            items = items if size else 0
        else:
            place = self._sampler.local_slice(step)
            size = place.stop - place.start  # 0 where a short last batch leaves this process none
            self._samples += self._sampler.global_size(step, step + 1)
            if "num_items_in_batch" not in output:
                assert self._planned is not None
                weight = size * self._engine.num_processes / self._planned
                return loss if weight == 1 else loss * weight, size
            items = items if size else 0
        if not self._engine.shows_gradients:
            return loss * self._share_now(items), items
        self._total = items if self._total is None else self._total + items
        return loss * (items / self._reference), items

    def _share_now(self, items: Items) -> Tensor:
        """A lone micro-batch's weight, where its gradients can't be put right afterwards."""
        if self._accumulation > 1:
            raise ValueError(
                "Under this engine, micro-batches of different numbers of items (tokens, or "
                "samples of a stream) can't be accumulated exactly: take "
                "gradient_accumulation_steps=1"
            )
        device, processes = self._engine.device, self._engine.num_processes
        mine = torch.as_tensor(items, dtype=torch.float32).to(device)
        if self._sampler is None:
            self._samples = int(self._engine.sum(torch.tensor(self._samples, device=device)))
        return mine * processes / self._engine.sum(mine.clone()).clamp(min=1)

    def _open(self, step: int) -> None:
        """Begin a window: see how many micro-batches and samples it will have."""
        end = step + self._accumulation
        end = end if self._length is None else min(end, self._length)
        self._is_open = True
        self._reference = (end - step) * self._batch_size
        if self._sampler is not None:
            self._planned = self._sampler.global_size(step, end)

    def close(self, parameters: Iterable[nn.Parameter]) -> int:
        """End the window, and put right its gradients where its size was other than expected.

        Returns:
            How many samples it had, on all processes.
        """
        samples, total, reference = self._samples, self._total, self._reference
        self.reset()
        if total is None:  # all went as planned
            return samples
        processes = self._engine.num_processes
        if processes > 1:
            numbers = torch.stack(
                [_on_device(number, self._engine.device) for number in (total, samples)]
            )
            total, counted = self._engine.sum(numbers)
            samples = samples if self._sampler is not None else int(counted)
        elif not isinstance(total, Tensor) and total == reference:
            return samples
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            factor = reference * processes / torch.as_tensor(total, dtype=torch.float32)
            # Of no items at all there is no gradient. (`torch.where` would copy the number 0 to a
            # GPU, and wait for it.)
            torch._foreach_mul_(gradients, factor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        return samples


def _on_device(number: Items, device: torch.device) -> Tensor:
    """A number as a tensor of shape ``()``; written by the device itself, which nobody awaits."""
    if isinstance(number, Tensor):
        return number.to(device, torch.float32, non_blocking=True)
    return torch.full((), number, dtype=torch.float32, device=device)
