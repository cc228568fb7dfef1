"""Prefetching: copy the next batch to a GPU while it computes on the current one.

A copy from pinned memory on a separate stream doesn't wait for what the GPU computes. So the next
batch is fetched, and its copy started, before the current one is yielded. The loop counts the
batches that it trains on, so a batch that was only prefetched doesn't count as consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

_END = object()


class Copier(Protocol):
    """Starts the copy of a batch, and later hands the batch over to the loop."""

    def begin(self, batch: Any) -> Any:
        """Start the copy; returns the argument of `hand_over`."""

    def hand_over(self, copy: Any) -> Any:
        """The copied batch, ready for all work that is queued from now on."""


def prefetched(batches: Iterable[Any], copier: Copier) -> Iterator[Any]:
    """Yield each batch on the device, while the next one is being copied.

    An exception from the data is raised after the batches before it.
    """
    iterator = iter(batches)
    item = next(iterator, _END)
    ahead = item if item is _END else copier.begin(item)
    while ahead is not _END:
        current, error = copier.hand_over(ahead), None
        try:
            item = next(iterator, _END)
            ahead = item if item is _END else copier.begin(item)
        except Exception as caught:  # noqa: BLE001 - raised after the current batch
            error = caught
        yield current
        del current  # so that its memory can be reused for the next copy
        if error is not None:
            raise error


class StreamCopier:
    """Copies batches on a separate CUDA stream.

    Args:
        device: the GPU.
        move: moves a batch to the GPU without synchronising.
    """

    def __init__(self, device: torch.device, move: Callable[[Any], Any]) -> None:
        self._device, self._move = device, move
        self._stream = torch.cuda.Stream(device)

    def begin(self, batch: Any) -> tuple[Any, torch.cuda.Event | None]:
        """Start the copy; on the separate stream only if everything to copy is a CPU tensor."""
        if not _has_only_cpu_tensors(batch):
            # It may depend on queued work, or hold memory that can't be marked as in use.
            return self._move(batch), None
        with torch.cuda.stream(self._stream):
            copy = self._move(batch)
            return copy, self._stream.record_event()

    def hand_over(self, copy: tuple[Any, torch.cuda.Event | None]) -> Any:
        """Let the current stream wait for the copy, without waiting on the host."""
        batch, copied = copy
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in _leaves(batch):
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    # Otherwise its memory, once freed, could be overwritten before it is read.
                    tensor.record_stream(stream)
        return batch


def _leaves(batch: Any) -> Iterator[Any]:
    """All items in a batch of nested lists, tuples and mappings."""
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        yield batch
        return
    for item in batch:
        yield from _leaves(item)


def _has_only_cpu_tensors(batch: Any) -> bool:
    """Whether everything that can be moved is a tensor on the CPU."""
    return all(
        leaf.device.type == "cpu" if isinstance(leaf, Tensor) else not hasattr(leaf, "to")
        for leaf in _leaves(batch)
    )
