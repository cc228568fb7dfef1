"""The largest batch that memory holds, and how fast each size trains."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType

from pa_core.control import TrainerControl
from pa_core.data.loader import is_loader
from pa_core.diagnostics.preserve import preserved
from pa_core.tracking import InMemoryRunHistory, Position

if TYPE_CHECKING:
    from pa_core import Trainer

_WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_OUT_OF_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class BatchSizeTrial:
    """What was measured with one batch size.

    Attributes:
        batch_size: samples of a batch on each process.
        fits: whether memory held it.
        samples_per_second: how many samples are trained, on all processes; None if it doesn't fit.
        peak_memory: the most that was allocated on the device, in bytes; None on a CPU.
    """

    batch_size: int
    fits: bool
    samples_per_second: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class BatchSizeResult:
    """What `find_batch_size` has found.

    Attributes:
        trials: each size that was tried, the smallest first.
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
        """Draw the samples per second over the batch size.

        Args:
            ax: matplotlib axes to draw into; new ones by default.

        Returns:
            The axes.

        Raises:
            ImportError: without matplotlib, with the line that installs it.
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
    """Find the largest batch that can be trained with: double it until memory is full, go back.

    Each size is tried by updates of the trainer's own kind, on batches of the dataset. Model,
    optimizer, random generators and run history are afterwards exactly what they were, and no
    events are called. With many processes, a size fits if it does on all; gradients aren't
    reduced meanwhile, and the memory that this takes is set aside.

    Args:
        trainer: the trainer; neither its model nor its optimizer is changed.
        train_dataset: a map dataset, or a stream.
        initial_batch_size: the first size to try, per process.
        max_batch_size: the last size to try; the dataset's share of a process, if that is less.
            Needed on a CPU, where memory isn't the bound, and for a stream.
        num_steps: updates with each size. The first one isn't timed.
        collate_fn: makes a batch of a list of samples.
        train_dataloader_kwargs: arguments of the `DataLoader`, as for ``trainer.train``.

    Returns:
        What was tried; its ``batch_size`` is the largest that fits.

    Raises:
        ValueError: for numbers that make no sense, for a ready loader, whose batches have the size
            that they have, and without `max_batch_size` where it is needed.
        RuntimeError: if not even one sample fits.
    """
    limit = _check(
        trainer,
        train_dataset,
        train_dataloader_kwargs,
        initial_batch_size,
        max_batch_size,
        num_steps,
    )
    trials: list[BatchSizeTrial] = []
    good = 0
    bad: int | None = None
    with _put_back(trainer):
        trainer.train_dataset, trainer.collate_fn = train_dataset, collate_fn
        trainer._hooks.refresh()
        size = min(initial_batch_size, limit)
        while size > good:
            trial = _try(trainer, size, num_steps, train_dataloader_kwargs)
            if trial is not None:
                trials.append(trial)
            if trial is not None and trial.fits:
                good = size
            else:  # memory is full, or a stream holds no batch so large
                bad = size
            size = _next_size(good, bad, limit)
    if not any(trial.fits for trial in trials):
        raise RuntimeError("Not even a batch of one sample can be trained: memory is full with it")
    return BatchSizeResult(tuple(sorted(trials, key=lambda trial: trial.batch_size)))


def _check(
    trainer: Trainer,
    dataset: Any,
    dataloader_kwargs: dict[str, Any] | None,
    initial: int,
    max_batch_size: int | None,
    num_steps: int,
) -> int:
    """See that the arguments make sense; returns the largest size to try."""
    for name, number, least in (
        ("initial_batch_size", initial, 1),
        ("max_batch_size", max_batch_size, 1),
        ("num_steps", num_steps, 2),
    ):
        if number is not None and (not isinstance(number, int) or number < least):
            raise ValueError(f"{name} must be a whole number from {least} on, not {number!r}")
    if is_loader(dataset):
        raise ValueError(
            "find_batch_size needs a dataset: the batches of a ready loader have one size already"
        )
    if dataloader_kwargs and dataloader_kwargs.get("batch_sampler") is not None:
        raise ValueError("find_batch_size needs to set batch_size, which a batch_sampler has fixed")
    kind = trainer._accelerator.distributed_type
    if kind not in _WHOLE:
        raise ValueError(f"find_batch_size can't train under {kind.value}, which shards the model")
    share = len(dataset) // trainer._engine.num_processes if hasattr(dataset, "__len__") else None
    if max_batch_size is None and (trainer.device.type == "cpu" or share is None):
        raise ValueError(
            "find_batch_size needs max_batch_size "
            + ("for a stream" if share is None else "on a CPU, whose memory isn't what bounds it")
        )
    limit = min(bound for bound in (share, max_batch_size) if bound is not None)
    if limit < 1:
        raise ValueError(f"A dataset of {len(dataset)} samples gives not every process one")
    return limit


def _next_size(good: int, bad: int | None, limit: int) -> int:
    """Double while all fits, then go halfway; `good` when that is it."""
    if bad is None:
        return min(2 * good, limit)
    # An eighth is close enough.
    return (good + bad) // 2 if bad - good > max(1, good // 8) else good


def _try(
    trainer: Trainer, size: int, num_steps: int, dataloader_kwargs: dict[str, Any] | None
) -> BatchSizeTrial | None:
    """Train with batches of `size`; None if there is no batch so large."""
    engine, device = trainer._engine, trainer.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, is_full = 0.0, False
    has_batch = True
    try:
        seconds, has_batch = _train(trainer, size, num_steps, dataloader_kwargs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        is_full = True
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    # Out of the except block: the traceback would keep the step's tensors alive.
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state = defaultdict(dict)
    if is_full:
        gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    # What one process has found is so for all.
    outcomes = engine.gather_objects((is_full, not has_batch, seconds, peak or 0))
    full, short, times, peaks = zip(*outcomes, strict=True)
    if any(full):
        return BatchSizeTrial(size, fits=False)
    if any(short):
        return None
    speed = size * engine.num_processes * (num_steps - 1) / max(*times, 1e-9)
    return BatchSizeTrial(size, True, speed, max(peaks) or None)


def _train(
    trainer: Trainer, size: int, num_steps: int, dataloader_kwargs: dict[str, Any] | None
) -> tuple[float, bool]:
    """Make `num_steps` updates; the seconds of all but the first, and whether there was a batch."""
    sizes = {"batch_size": size, "drop_last": True}
    loader = trainer.create_train_dataloader(size, {**(dataloader_kwargs or {}), **sizes})
    trainer._train_dataloader = loader
    trainer.run_config = trainer._create_run_config(size, 1, 1, None, None)
    trainer.model.train()
    # Where processes share gradients, as many bytes again hold them on the way.
    shared = trainer._engine.num_processes > 1
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    buffers = [torch.empty_like(p) for p in parameters] if shared else []
    begin, step = 0.0, 0
    for step, batch in enumerate(_batches(loader, num_steps), 1):
        output = trainer.calculate_train_batch_loss(trainer._engine.move(batch))
        trainer.backward_step(output["loss"])
        trainer.optimizer_step()
        trainer.optimizer_zero_grad()
        del output
        if step == 1:
            begin = _now(trainer.device)
    del buffers
    return _now(trainer.device) - begin, step == num_steps


def _batches(loader: Any, count: int) -> Iterator[Any]:
    """The first batches of the loader, from its start again where it has fewer."""
    given = 0
    while given < count:
        before = given
        for batch in islice(loader, count - given):
            yield batch
            given += 1
        if given == before:  # none is so large
            return


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is full, on a device or on the CPU.

    >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


# -- Leaving no trace -----------------------------------------------------------------------------


@contextmanager
def _put_back(trainer: Trainer) -> Iterator[None]:
    """Let anything be trained within, and put everything back, whatever is raised."""
    attributes = dict(vars(trainer))
    given = trainer.model
    try:
        trainer.model, trainer.optimizer = trainer._engine.prepare(given, trainer.optimizer)
        # Without its container: a process that runs out of memory would leave the others waiting.
        trainer.model = trainer._engine.unwrap(trainer.model)
        trainer.run_history = InMemoryRunHistory()
        trainer.position, trainer.control = Position(), TrainerControl()
        with preserved(trainer):
            yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
