"""Utilities, named as in pytorch-accelerated."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from accelerate.utils import wait_for_everyone
from torch import Tensor

from pa_core.data.rng import derive_key, seed_host
from pa_core.engine.process_group import process_state
from pa_core.plugins.process_scope import check_collectives_allowed
from pa_core.settings.environment import LIMIT_BATCHES_VARIABLE

if TYPE_CHECKING:
    from accelerate.state import PartialState

P = ParamSpec("P")
T = TypeVar("T")

LIMIT_BATCHES_ENV_VAR = LIMIT_BATCHES_VARIABLE


class LimitBatches:
    """A context in which every new `Trainer` runs only a few batches per epoch, to test a script.

    It sets the environment variable ``PT_ACC_LIMIT_BATCHES`` and restores it on exit. A trainer
    that was created inside keeps its limit.

    Args:
        num_batches: batches per epoch and process, for training and for evaluation.

    Raises:
        ValueError: if `num_batches` is not a positive integer.
    """

    def __init__(self, num_batches: int) -> None:
        if not isinstance(num_batches, int) or num_batches < 1:
            raise ValueError(f"num_batches must be a positive integer, not {num_batches!r}")
        self.num_batches = num_batches

    def __enter__(self) -> LimitBatches:
        self._before = os.environ.get(LIMIT_BATCHES_ENV_VAR)
        os.environ[LIMIT_BATCHES_ENV_VAR] = str(self.num_batches)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        exc_traceback: TracebackType | None,
    ) -> None:
        if self._before is None:
            os.environ.pop(LIMIT_BATCHES_ENV_VAR, None)
        else:
            os.environ[LIMIT_BATCHES_ENV_VAR] = self._before


class DataLoaderSlice:
    """The first batches of a dataloader.

    Args:
        dl: the dataloader.
        slice_size: maximum number of batches.

    >>> len(DataLoaderSlice([1, 2, 3], 5)), list(DataLoaderSlice([1, 2, 3], 2))
    (3, [1, 2])
    """

    def __init__(self, dl: Iterable[Any], slice_size: int) -> None:
        self.dl = dl
        self.slice_size = slice_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.dl, self.slice_size)

    def __len__(self) -> int:
        """The number of batches: at most `slice_size`, fewer if the dataloader is shorter.

        Raises:
            TypeError: if the dataloader has no length.
        """
        return min(self.slice_size, len(self.dl))  # type: ignore[arg-type]


def local_process_zero_only(func: Callable[P, T]) -> Callable[P, T | None]:
    """Call `func` only on the first process of each machine; all processes wait until it is done.

    On the other processes the result is None.
    """
    return _on_one_process(func, lambda state: state.local_process_index == 0)


def world_process_zero_only(func: Callable[P, T]) -> Callable[P, T | None]:
    """Call `func` only on rank 0; all processes wait until it is done.

    On the other processes the result is None.
    """
    return _on_one_process(func, lambda state: state.process_index == 0)


def _on_one_process(
    func: Callable[P, T], is_chosen: Callable[[PartialState], bool]
) -> Callable[P, T | None]:
    @wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        check_collectives_allowed()
        try:
            return func(*args, **kwargs) if is_chosen(process_state()) else None
        finally:
            wait_for_everyone()  # also after an error, so that no process hangs

    return call


def local_process_zero_first(func: Callable[P, T]) -> Callable[P, T]:
    """Call `func` on the first process of each machine, and then on the others.

    If `func` downloads a file, for example, the others find it in the cache.
    """

    @wraps(func)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check_collectives_allowed()
        if process_state().local_process_index == 0:
            try:
                return func(*args, **kwargs)
            finally:
                wait_for_everyone()
        wait_for_everyone()
        return func(*args, **kwargs)

    return call


def worker_init_fn(worker_id: int) -> None:
    """Seed Python's, NumPy's and torch's generators in a dataloader's worker.

    Each worker draws different numbers, the same in every run with the same seed.
    """
    seed_host(derive_key(torch.initial_seed(), "worker", worker_id))


def remove_padding(padded_tensor: Tensor, pad_value: float) -> Tensor:
    """Remove the rows of a tensor that consist of padding only.

    Args:
        padded_tensor: of shape ``(rows, …)``.
        pad_value: the value of the padding; may be NaN.

    Returns:
        The remaining rows in their order, of shape ``(remaining rows, …)``.
    """
    is_padding = padded_tensor.isnan() if pad_value != pad_value else padded_tensor == pad_value
    if is_padding.ndim > 1:
        is_padding = is_padding.flatten(1).all(1)
    return padded_tensor[~is_padding]
