"""Weights that make accumulated gradients the gradient of the mean over the whole window."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Weight = int | float | Tensor


class AccumulationWindow:
    r"""The micro-batches between two updates, on all processes.

    With :math:`n_i` items in micro-batch :math:`i`, a mean loss :math:`l_i` and
    :math:`N = \sum_i n_i`, the mean over the window is :math:`\sum_i n_i l_i / N`. So each loss is
    weighed with :math:`n_i / N`. Where :math:`N` is known only at the window's end (streams,
    token counts), it is estimated beforehand and the gradients are corrected once, before they
    are clipped.

    Args:
        accumulation: micro-batches per update.
        num_processes: gradients are averaged over them, which the weights undo.
        sum_processes: sums a tensor over them.
        batch_size: how many items a micro-batch is expected to have, alike on every process.
    """

    def __init__(
        self,
        accumulation: int,
        num_processes: int,
        sum_processes: Callable[[Tensor], Tensor],
        batch_size: int,
    ) -> None:
        self.is_whole = accumulation == 1 and num_processes == 1
        """Whether every micro-batch is a batch of its own, so that there is nothing to weigh."""
        self._num_processes, self._sum = num_processes, sum_processes
        self._batch_size = batch_size
        self.is_open = False
        self._reference = 1
        self._total: Weight = 0
        self._planned: int | None = None

    def open(self, num_batches: int, num_items: int | None) -> None:
        """Begin a window.

        Args:
            num_batches: how many micro-batches it is expected to have.
            num_items: how many samples, over all processes, where that is known.
        """
        self.is_open = True
        self._planned = num_items
        self._reference = num_batches * self._batch_size
        self._total = 0

    def weigh(self, loss: Tensor, items: Weight, *, planned: bool) -> Tensor:
        """The share of a micro-batch's mean `loss` (0-d) in the mean over the window.

        Args:
            loss: mean over the micro-batch.
            items: how many samples or tokens it is the mean of.
            planned: whether `items` counts the samples that the window was opened with.
        """
        if planned and self._planned is not None:
            weight = items * self._num_processes / self._planned
            return loss if isinstance(weight, float) and weight == 1 else loss * weight
        self._total = self._total + items
        return loss * (items / self._reference)

    def close(self, parameters: Iterable[nn.Parameter]) -> None:
        """End the window, and put right its gradients where its size was other than expected."""
        total, self.is_open = self._total, False
        if not isinstance(total, Tensor) and total in (0, self._reference):
            if total == 0 or self._num_processes == 1:
                return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        if self._num_processes > 1:
            device = gradients[0].device
            total = self._sum(torch.as_tensor(total, dtype=torch.float32, device=device))
        torch._foreach_mul_(gradients, self._reference * self._num_processes / total)
