"""The data-loading workers of this process, of any loader."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Collection

from torch._C import _remove_worker_pids
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


def running_iterators() -> list[_MultiProcessingDataLoaderIter]:
    """The iterators of loaders whose workers have not been shut down."""
    # One that an earlier run has shut down may still be held by that run's error.
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) is _MultiProcessingDataLoaderIter and not thing._shutdown
    ]


def kill_workers(pids: Collection[int] = ()) -> None:
    """Kill all workers, including those that are stuck in a sample and ignore other signals.

    Args:
        pids: further workers, whose iterators may have been shut down in vain.
    """
    workers = [child for child in multiprocessing.active_children() if child.pid in pids]
    for iterator in running_iterators():
        if iterator._worker_pids_set:  # else PyTorch raises an error as they die
            _remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        workers += iterator._workers
    for worker in workers:
        worker.kill()
