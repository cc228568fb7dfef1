"""What lies behind an error that tells too little, and what to try: notes on the error itself."""

from __future__ import annotations

import gc
import os
import re
import time
from typing import TYPE_CHECKING

import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_WORKER_LOST = ("is killed by signal", "exited unexpectedly")
_PROCESS_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "remote process exited",
)
_NO_GRADIENT = "Expected to have finished reduction in the prior iteration"
_STEP_NEEDS = {
    "step() missing 1 required positional argument: 'closure'": (
        "This optimizer calculates the loss several times in an update: do so in a subclass of "
        "Trainer that overrides optimizer_step"
    ),
    "step() missing 1 required positional argument: 'metrics'": (
        "This schedule goes by a metric: the plugin schedulers of pa-schedulers steps it after "
        "each evaluation, once it is enabled"
    ),
}
_DYING_SECONDS = 1.0  # from the loss of a worker's connections to its end


def explain(error: BaseException, trainer: Trainer) -> None:
    """Note on an error of a run what may have caused it, where PyTorch's own words don't say so.

    Args:
        error: what was raised; it gets a note (PEP 678), or none.
        trainer: whose run it was.
    """
    while True:
        try:
            return _explain(error, trainer)
        except RuntimeError as another:
            # As a worker ends, PyTorch raises in whatever code is running, perhaps here; once.
            if not _is_of_lost_worker(another):
                raise


def _explain(error: BaseException, trainer: Trainer) -> None:
    if isinstance(error, OSError | EOFError):  # what a killed worker had shared is gone with it
        if _end_workers(_DYING_SECONDS):
            error.add_note(_worker_lost(trainer))
        return
    text = str(error)
    if isinstance(error, TypeError):
        for end, advice in _STEP_NEEDS.items():
            if text.endswith(end):
                error.add_note(advice)
    if not isinstance(error, RuntimeError | MemoryError):
        return
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _has(text, _OUT_OF_MEMORY):
        error.add_note(_out_of_memory(trainer))
    elif _is_of_lost_worker(error):
        _end_workers()
        error.add_note(_worker_lost(trainer))
    elif trainer.num_processes > 1 and _has(text, _PROCESS_LOST):
        error.add_note(
            f"Process {trainer._engine.rank} waited for the others, but another process of this "
            "run has ended. The cause is what that one has printed, or what the launcher says of "
            "it; killed by signal 9, it was often for lack of memory"
        )
    elif _NO_GRADIENT in text:
        error.add_note(_no_gradient(text, trainer))


def _is_of_lost_worker(error: BaseException) -> bool:
    return "DataLoader worker" in str(error) and _has(str(error), _WORKER_LOST)


def _has(text: str, phrases: tuple[str, ...]) -> bool:
    return any(phrase in text for phrase in phrases)


def _out_of_memory(trainer: Trainer) -> str:
    config = trainer.run_config
    return (
        f"Out of memory on process {trainer._engine.rank} of {trainer.num_processes}, "
        f"{trainer.device} ({_memory(trainer.device)}), with per_device_batch_size="
        f"{config.train_per_device_batch_size} (evaluation: {config.eval_per_device_batch_size}) "
        f"and gradient_accumulation_steps={config.gradient_accumulation_steps}. Try a smaller "
        "per_device_batch_size, with more gradient_accumulation_steps so that an update has as "
        'many samples as before; mixed_precision="bf16"; or let find_batch_size of pa-models '
        "find the largest batch that fits"
    )


def _no_gradient(text: str, trainer: Trainer) -> str:
    names = [name for name, p in trainer.get_model().named_parameters() if p.requires_grad]
    numbers = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
    unused = [names[int(number)] for number in numbers[1].split()] if numbers else []
    shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    return (
        f"On process {trainer._engine.rank}, {shown or 'some parameters'} got no gradient in the "
        "update before, which several processes wait for. Freeze what is never used, by "
        "requires_grad_(False), or take it out of the model. Where it depends on the batch, let "
        "each step look for it, at some cost: accelerator={'kwargs_handlers': "
        "[DistributedDataParallelKwargs(find_unused_parameters=True)]}, from accelerate.utils"
    )


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine = torch.cuda.max_memory_allocated(device)
        return f"{_gib(free)} of {_gib(total)} GiB free; this run had {_gib(mine)} at most"
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return "how much is free isn't known"
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return f"{_gib(free)} of the machine's {_gib(total)} GiB free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _end_workers(seconds: float = 0.0) -> bool:
    """End the workers of a loader that has lost one, and say whether there was such a loader.

    As long as the traceback keeps them, PyTorch raises an error of its own in whatever code is
    running when the signal of a worker's end comes. Nobody else knows the iterator.

    Args:
        seconds: how long to wait for a worker that may be about to end.
    """
    loaders = [
        thing
        for thing in gc.get_objects()
        # One of an earlier run, which was ended then, may still be held by that run's error.
        if type(thing) is _MultiProcessingDataLoaderIter and not thing._shutdown
    ]
    deadline = time.monotonic() + seconds
    while not (lost := [loader for loader in loaders if _has_lost_a_worker(loader)]):
        if not loaders or time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    for loader in lost:
        try:
            loader._shutdown_workers()
        except RuntimeError as error:  # raised by PyTorch as a worker ends; all else is done
            if not _is_of_lost_worker(error):
                raise
    return True


def _has_lost_a_worker(loader: _MultiProcessingDataLoaderIter) -> bool:
    return any(worker.exitcode for worker in loader._workers)  # neither alive nor well


def _worker_lost(trainer: Trainer) -> str:
    return (
        f"A worker that loads data for process {trainer._engine.rank} was lost. Killed, it was "
        "often for lack of memory, or of shared memory (/dev/shm): try fewer num_workers or a "
        "smaller prefetch_factor. With num_workers=0 an error of the dataset itself shows in full"
    )
