"""Copy the next batch to a GPU while it computes on the current one.

A copy from pinned memory, on a stream of its own, waits for nothing that the GPU computes. So the
following batch is fetched and its copy begun before the current one is handed out. Where a run
stands is counted by the loop, so a batch that was only prefetched isn't consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

_END = object()


class Copier(Protocol):
    """Begins to copy a batch, and later hands it over to whoever computes."""

    def begin(self, batch: Any) -> Any:
        """Begin the copy; returns what `hand_over` takes."""

    def hand_over(self, copy: Any) -> Any:
        """The batch, for all that is queued from now on."""


def prefetched(batches: Iterable[Any], copier: Copier) -> Iterator[Any]:
    """Yield each batch on the device, the copy of the following one under way.

    An exception from the data comes where it belongs: after the batches before it.
    """
    iterator = iter(batches)
    item = next(iterator, _END)
    ahead = item if item is _END else copier.begin(item)
    while ahead is not _END:
        current, error = copier.hand_over(ahead), None
        try:
            item = next(iterator, _END)
            ahead = item if item is _END else copier.begin(item)
        except Exception as caught:  # noqa: BLE001 - kept until its turn, whatever it is
            error = caught
        yield current
        del current  # its memory can be used again while the loop asks for more
        if error is not None:
            raise error


class StreamCopier:
    """Copies on a CUDA stream of its own.

    Args:
        device: the GPU.
        move: puts a batch on it without waiting.
    """

    def __init__(self, device: torch.device, move: Callable[[Any], Any]) -> None:
        self._device, self._move = device, move
        self._stream = torch.cuda.Stream(device)

    def begin(self, batch: Any) -> tuple[Any, torch.cuda.Event | None]:
        """Begin the copy, if all there is to copy are tensors on the CPU."""
        if not _is_of_host_tensors(batch):
            # It may depend on what is queued, or hold memory that can't be marked as in use.
            return self._move(batch), None
        with torch.cuda.stream(self._stream):
            copy = self._move(batch)
            return copy, self._stream.record_event()

    def hand_over(self, copy: tuple[Any, torch.cuda.Event | None]) -> Any:
        """Let the current stream wait for the copy, which the host does not."""
        batch, copied = copy
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            for tensor in _leaves(batch):
                if isinstance(tensor, Tensor) and tensor.is_cuda:
                    # Freed early, its memory must not go to the next copy before it is read.
                    tensor.record_stream(stream)
        return batch


def _leaves(batch: Any) -> Iterator[Any]:
    """All that a batch of nested lists, tuples and dicts holds."""
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, list | tuple):
        yield batch
        return
    for item in batch:
        yield from _leaves(item)


def _is_of_host_tensors(batch: Any) -> bool:
    """Whether whatever can be moved is a plain tensor on the CPU."""
    return all(
        leaf.device.type == "cpu" if isinstance(leaf, Tensor) else not hasattr(leaf, "to")
        for leaf in _leaves(batch)
    )
