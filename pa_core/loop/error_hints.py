"""Hints: notes on an error about its likely cause and what to try."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

import torch

from pa_core.data.workers import running_iterators
from pa_core.errors import NOT_SAVED, is_out_of_memory, listed

if TYPE_CHECKING:
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    from pa_core.trainer import Trainer

_WORKER_LOST = ("is killed by signal", "exited unexpectedly")
PROCESS_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket Timeout",
    "remote process exited",
)
"""Phrases in the errors of a collective if another process has ended."""
_NO_GRADIENT = "Expected to have finished reduction in the prior iteration"
_STEP_NEEDS = {
    "step() missing 1 required positional argument: 'closure'": (
        "This optimizer evaluates the loss several times per update: pass it a closure in a "
        "subclass of Trainer that overrides optimizer_step"
    ),
    "step() missing 1 required positional argument: 'metrics'": (
        "This scheduler follows a metric: enable the plugin `schedulers` of pa-schedulers, which "
        "steps it after each evaluation"
    ),
}
_DYING_SECONDS = 1.0  # from the loss of a worker's connections to its death


def add_hints(error: BaseException, trainer: Trainer) -> None:
    """Add a note to an error of a run if its likely cause is known and PyTorch doesn't name it.

    Args:
        error: the exception; it gets a note (PEP 678), or none.
        trainer: the trainer whose run raised it.
    """
    while True:
        try:
            return _add_hints(error, trainer)
        except RuntimeError as another:
            # When a worker dies, PyTorch raises once in whatever code is running, perhaps here.
            if not _is_of_lost_worker(another):
                raise


def _add_hints(error: BaseException, trainer: Trainer) -> None:
    if isinstance(error, OSError | EOFError):  # a killed worker's shared memory is gone
        if _end_workers(_DYING_SECONDS):
            error.add_note(_worker_lost(trainer))
        return
    text = str(error)
    if isinstance(error, LookupError | ValueError) and (changed := trainer._data.changed_lengths()):
        error.add_note(
            f"{'; '.join(changed)}, and are used as they were until the next epoch. Change the "
            "length of a dataset between epochs only"
        )
    if isinstance(error, KeyError) and error.args == ("model_outputs",):
        error.add_note(
            "The dict that the loss method returned has no 'model_outputs', which the loop doesn't "
            "need, but this plugin does: add them in calculate_train_batch_loss and "
            "calculate_eval_batch_loss, or disable the plugin"
        )
    if isinstance(error, TypeError):
        for end, advice in _STEP_NEEDS.items():
            if text.endswith(end):
                error.add_note(advice)
    if not isinstance(error, RuntimeError | MemoryError):
        return
    if any(NOT_SAVED in note for note in getattr(error, "__notes__", ())):
        return  # not an error of training
    if is_out_of_memory(error):
        error.add_note(_out_of_memory(trainer))
    elif _is_of_lost_worker(error):
        _end_workers()
        error.add_note(_worker_lost(trainer))
    elif trainer.num_processes > 1 and _has(text, PROCESS_LOST):
        error.add_note(
            f"Rank {trainer._engine.rank} waited for the other processes, but one of them has "
            "ended. Look for the cause in its output, or in the launcher's. A process killed by "
            "signal 9 often ran out of memory"
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
        f"Out of memory on rank {trainer._engine.rank} of {trainer.num_processes}, "
        f"{trainer.device} ({_memory(trainer.device)}), with per_device_batch_size="
        f"{config.train_per_device_batch_size} (evaluation: {config.eval_per_device_batch_size}) "
        f"and gradient_accumulation_steps={config.gradient_accumulation_steps}. Try a smaller "
        "per_device_batch_size, with more gradient_accumulation_steps to keep the samples per "
        'update; mixed_precision="bf16"; or find_batch_size of pa-models, which finds the largest '
        "batch that fits"
    )


def _no_gradient(text: str, trainer: Trainer) -> str:
    names = trainer._engine.reduced_names(trainer.model)
    numbers = re.search(r"did not receive grad for rank \d+: ([\d ]+)", text)
    unused = [names[int(number)] for number in numbers[1].split()] if numbers else []
    return (
        f"On rank {trainer._engine.rank}, {listed(unused) or 'some parameters'} got no gradient in "
        "the previous update, and DDP waits for every gradient. Freeze parameters that are never "
        "used with requires_grad_(False), or remove them from the model. If it depends on the "
        "batch, let each step search for unused parameters, at some cost: accelerator="
        "{'kwargs_handlers': [DistributedDataParallelKwargs(find_unused_parameters=True)]}, from "
        "accelerate.utils"
    )


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine = torch.cuda.max_memory_allocated(device)
        return f"{_gib(free)} of {_gib(total)} GiB free; this run had {_gib(mine)} at most"
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return "free memory unknown"
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return f"{_gib(free)} of the machine's {_gib(total)} GiB free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _end_workers(seconds: float = 0.0) -> bool:
    """Shut down the workers of each loader that has lost one; returns whether there was any.

    While the traceback keeps them alive, PyTorch raises its own error in whatever code is running
    when the signal of a worker's death arrives. No other code has the iterator.

    Args:
        seconds: how long to wait for a worker that may be about to die.
    """
    loaders = running_iterators()
    deadline = time.monotonic() + seconds
    while not (lost := [loader for loader in loaders if _has_lost_a_worker(loader)]):
        if not loaders or time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    for loader in lost:
        try:
            loader._shutdown_workers()
        except RuntimeError as error:  # raised by PyTorch as a worker dies; the rest is done
            if not _is_of_lost_worker(error):
                raise
    return True


def _has_lost_a_worker(loader: _MultiProcessingDataLoaderIter) -> bool:
    return any(worker.exitcode for worker in loader._workers)  # killed, or ended by an error


def _worker_lost(trainer: Trainer) -> str:
    return (
        f"A data-loading worker of rank {trainer._engine.rank} was lost. A killed worker often ran "
        "out of memory, or of shared memory (/dev/shm): try fewer num_workers or a smaller "
        "prefetch_factor. With num_workers=0, an error of the dataset itself shows in full"
    )
