"""The micro-batches of an epoch, as the loop trains on them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.loader import batches, mark_last, num_batches
from pa_core.data.sampler import SplitBatch

if TYPE_CHECKING:
    from pa_core.data.data_state import DataState
    from pa_core.engine.base import Engine


class MicroBatch(NamedTuple):
    """A batch for one forward and backward pass.

    Attributes:
        step: its number in the epoch, counted from 0.
        data: what the loader yields, on the device.
        completes_update: whether an update follows, as it is the last one to be accumulated.
        is_padding: whether it is a padding batch, which counts for nothing.
    """

    step: int
    data: Any
    completes_update: bool
    is_padding: bool


def micro_batches(
    loader: Any,
    engine: Engine,
    *,
    seed: int,
    epoch: int,
    start: int,
    limit: int | None,
    accumulation: int,
    state: DataState | None = None,
) -> Iterator[MicroBatch]:
    """Iterate over the micro-batches of an epoch, every random draw of fetching keyed.

    Args:
        loader: the training loader.
        engine: moves batches to the device.
        seed: of the run.
        epoch: number of the epoch.
        start: number of the first micro-batch.
        limit: maximum number of micro-batches of the epoch, those before `start` included.
        accumulation: micro-batches per update; the last group of an epoch may be shorter.
        state: follows the batches for training states; None if nothing but their number matters.
    """
    fetch = partial(batches, loader) if state is None else state.epoch
    fetched = engine.moved(fetch(seed=seed, epoch=epoch, start=start, limit=limit))
    if isinstance(loader, KeyedDataLoader):
        # Its length is known, so nothing needs to be fetched ahead to find the last batch.
        sampler, last = loader.batch_sampler, (num_batches(loader, limit) or 0) - 1
        for step, batch in enumerate(fetched, start):
            is_last = step == last
            # Only the last global batch may have fewer samples than there are processes.
            is_padding = is_last and not sampler.local_size(step)
            yield MicroBatch(step, batch, is_last or (step + 1) % accumulation == 0, is_padding)
        return
    for step, (batch, is_last) in enumerate(mark_last(fetched), start):
        is_padding = False
        if type(batch) is SplitBatch:
            batch, is_padding = batch
        yield MicroBatch(step, batch, is_last or (step + 1) % accumulation == 0, is_padding)
