"""Batch-size finder: the largest batch that fits in memory, and the speed of each size."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pa_core import TrainerCallback, hookimpl
from pa_core.errors import is_out_of_memory
from pa_core.plugin import KeyedDataLoader, is_loader

if TYPE_CHECKING:
    from pa_core import Trainer


@dataclass(frozen=True)
class BatchSizeTrial:
    """The measurement of one batch size.

    Attributes:
        batch_size: samples per batch on each process.
        fits: whether it fits in memory.
        samples_per_second: throughput over all processes; None if it doesn't fit.
        peak_memory: peak of the memory allocated on the device, in bytes; None on a CPU.
    """

    batch_size: int
    fits: bool
    samples_per_second: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class BatchSizeResult:
    """The result of `find_batch_size`.

    Attributes:
        trials: one for each size tried, the smallest first.
    """

    trials: tuple[BatchSizeTrial, ...]

    @property
    def batch_size(self) -> int:
        """The largest size that fits."""
        return max(trial.batch_size for trial in self.trials if trial.fits)

    @property
    def fastest(self) -> int:
        """The size that trains the most samples per second."""
        return max(self.trials, key=lambda trial: trial.samples_per_second or 0.0).batch_size

    def __repr__(self) -> str:
        fitting = any(trial.fits for trial in self.trials)
        found = f"batch_size={self.batch_size}, fastest={self.fastest}, " if fitting else ""
        return f"{type(self).__name__}({found}{len(self.trials)} trials)"

    def __str__(self) -> str:
        lines = ["batch size  samples/s  peak memory"]
        for trial in self.trials:
            if not trial.fits:
                lines.append(f"{trial.batch_size:>10}  doesn't fit")
                continue
            memory = f"{trial.peak_memory / 2**30:.2f} GiB" if trial.peak_memory else "-"
            lines.append(f"{trial.batch_size:>10}  {trial.samples_per_second:>9.1f}  {memory:>11}")
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Plot the samples per second against the batch size.

        Args:
            ax: matplotlib axes to plot into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: if matplotlib isn't installed, with the pip command.
        """
        if ax is None:
            try:
                pyplot = import_module("matplotlib.pyplot")
            except ImportError as error:
                raise ImportError(
                    'A plot needs matplotlib: pip install "pa-models[plot]"'
                ) from error
            ax = pyplot.subplots()[1]
        fitting = [trial for trial in self.trials if trial.fits]
        ax.plot(
            [trial.batch_size for trial in fitting],
            [trial.samples_per_second for trial in fitting],
            marker="o",
        )
        for trial in self.trials:
            if not trial.fits:
                ax.axvline(trial.batch_size, color="tab:red", linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("batch size per process")
        ax.set_ylabel("samples per second")
        return ax


def find_batch_size(
    trainer: Trainer,
    train_dataset: Any,
    *,
    initial_batch_size: int = 8,
    max_batch_size: int | None = None,
    num_steps: int = 3,
    collate_fn: Callable[[Any], Any] | None = None,
    train_dataloader_kwargs: dict[str, Any] | None = None,
) -> BatchSizeResult:
    """Find the largest batch size that fits in memory: double it until memory is full, then bisect.

    Each size is tried with updates of the trainer on batches of the dataset. Afterwards the model,
    optimizer, random generators and run history are restored exactly. No event hooks are called.
    With several processes, a size must fit on each of them. Gradients aren't reduced during the
    search; the memory that this would need is reserved.

    Args:
        trainer: the trainer; its model and optimizer are restored afterwards.
        train_dataset: a map dataset or a stream.
        initial_batch_size: the first size to try, per process.
        max_batch_size: the largest size to try, limited to the dataset's samples per process.
            Required on a CPU, where memory isn't the limit, and for a stream.
        num_steps: updates per size. The first one isn't timed.
        collate_fn: collates a list of samples into a batch.
        train_dataloader_kwargs: arguments of the `DataLoader`, as for ``trainer.train``.

    Returns:
        The trials; its ``batch_size`` is the largest that fits.

    Raises:
        ValueError: for an argument out of range, for a ready loader, whose batch size is fixed, or
            if `max_batch_size` is required but missing.
        RuntimeError: if not even one sample fits.
    """
    limit = _check_arguments(
        trainer,
        train_dataset,
        train_dataloader_kwargs,
        initial_batch_size,
        max_batch_size,
        num_steps,
    )
    trials: list[BatchSizeTrial] = []
    largest_fit = 0
    smallest_misfit: int | None = None
    timer = _Timer()
    # Alone: a process that runs out of memory would leave the others in a collective.
    with trainer.trial([timer], data=train_dataset, alone=True) as probe:

        def train(size: int) -> None:
            # With several processes, reducing gradients needs buffers as large as these.
            reduced = [p for p in probe.model.parameters() if p.requires_grad]
            buffers = [torch.empty_like(p) for p in reduced] if trainer.num_processes > 1 else []
            probe.train(
                train_dataset,
                f"{num_steps} updates",
                per_device_batch_size=size,
                collate_fn=collate_fn,
                train_dataloader_kwargs={
                    **(train_dataloader_kwargs or {}),
                    "batch_size": size,
                    "drop_last": True,
                },
            )
            del buffers

        size = min(initial_batch_size, limit)
        while size > largest_fit:
            outcome = _try_size(probe, timer, partial(train, size))
            trial = _agree(trainer, size, num_steps, outcome)
            if trial is not None:
                trials.append(trial)
            if trial is not None and trial.fits:
                largest_fit = size
            else:  # memory is full, or a stream has no batch of this size
                smallest_misfit = size
            size = _next_size(largest_fit, smallest_misfit, limit)
    if not any(trial.fits for trial in trials):
        raise RuntimeError("Not even a batch of one sample fits in memory")
    return BatchSizeResult(tuple(sorted(trials, key=lambda trial: trial.batch_size)))


def _check_arguments(
    trainer: Trainer,
    dataset: Any,
    dataloader_kwargs: dict[str, Any] | None,
    initial: int,
    max_batch_size: int | None,
    num_steps: int,
) -> int:
    """Check the arguments; returns the largest size to try."""
    for name, number, least in (
        ("initial_batch_size", initial, 1),
        ("max_batch_size", max_batch_size, 1),
        ("num_steps", num_steps, 2),
    ):
        if number is not None and (not isinstance(number, int) or number < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if is_loader(dataset):
        raise ValueError(
            "find_batch_size needs a dataset: the batch size of a ready loader is fixed"
        )
    if dataloader_kwargs and dataloader_kwargs.get("batch_sampler") is not None:
        raise ValueError("find_batch_size sets batch_size, which a batch_sampler has fixed already")
    if trainer.sharded_by is not None:
        raise ValueError(
            f"find_batch_size doesn't support {trainer.sharded_by}, which shards the model"
        )
    per_process = None
    if hasattr(dataset, "__len__"):
        per_process = len(dataset) // trainer.num_processes
    if max_batch_size is None and (trainer.device.type == "cpu" or per_process is None):
        raise ValueError(
            "find_batch_size needs max_batch_size "
            + ("for a stream" if per_process is None else "on a CPU, where memory isn't the limit")
        )
    limit = min(bound for bound in (per_process, max_batch_size) if bound is not None)
    if limit < 1:
        raise ValueError(f"A dataset of {len(dataset)} samples has fewer samples than processes")
    return limit


def _next_size(largest_fit: int, smallest_misfit: int | None, limit: int) -> int:
    """The next size to try: double while all fit, then bisect; `largest_fit` ends the search."""
    if smallest_misfit is None:
        return min(2 * largest_fit, limit)
    tolerance = max(1, largest_fit // 8)
    if smallest_misfit - largest_fit <= tolerance:
        return largest_fit
    return (largest_fit + smallest_misfit) // 2


class _Outcome(NamedTuple):
    """What trying a size has shown on one process."""

    is_full: bool
    has_batch: bool
    seconds: float
    peak_memory: int | None


class _NoBatchError(Exception):
    """A stream has no batch of the size that is tried."""


class _Timer(TrainerCallback):
    """Times all updates of a run but the first.

    Attributes:
        seconds: their time.
    """

    def __init__(self) -> None:
        self.seconds, self._start = 0.0, 0.0

    @hookimpl(wrapper=True)
    def create_train_dataloader(self) -> Generator[None, Any, Any]:
        """Check that a stream has a batch; a dataset with a length has been checked."""
        loader = yield
        if not isinstance(loader, KeyedDataLoader) and next(iter(loader), None) is None:
            raise _NoBatchError
        return loader

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Start after the first update."""
        if trainer.updates == 1:
            self._start = _now(trainer.device)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Stop after the last update."""
        self.seconds = _now(trainer.device) - self._start


def _try_size(probe: Trainer, timer: _Timer, train: Callable[[], None]) -> _Outcome:
    """Train for a few updates with a batch size, and free the memory that this has taken."""
    device = probe.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    is_full, has_batch = False, True
    try:
        train()
    except _NoBatchError:
        has_batch = False
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        is_full = True
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    # Outside of the except block, where the traceback would keep the step's tensors alive.
    probe.optimizer.zero_grad(set_to_none=True)
    probe.optimizer.state = defaultdict(dict)
    if is_full:
        gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return _Outcome(is_full, has_batch, timer.seconds, peak)


def _agree(trainer: Trainer, size: int, num_steps: int, outcome: _Outcome) -> BatchSizeTrial | None:
    """The result of a size over all processes; None if the dataset has no batch of that size."""
    outcomes: list[_Outcome] = trainer.gather_objects(outcome)
    if any(one.is_full for one in outcomes):
        return BatchSizeTrial(size, fits=False)
    if not all(one.has_batch for one in outcomes):
        return None
    seconds = max(*(one.seconds for one in outcomes), 1e-9)
    peak = max(one.peak_memory or 0 for one in outcomes)
    speed = size * trainer.num_processes * (num_steps - 1) / seconds
    return BatchSizeTrial(size, True, speed, peak or None)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
