"""Small helpers with the names that users of pytorch-accelerated know."""

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

from pa_core.data.rng import mix, seed_host
from pa_core.engine.process_group import process_state
from pa_core.plugins.process_scope import check_collectives_allowed

if TYPE_CHECKING:
    from accelerate.state import PartialState

P = ParamSpec("P")
T = TypeVar("T")

LIMIT_BATCHES_ENV_VAR = "PT_ACC_LIMIT_BATCHES"


class LimitBatches:
    """Inside this context, every new `Trainer` takes only a few batches per epoch.

    For trying a script out: it sets the environment variable ``PT_ACC_LIMIT_BATCHES``, which does
    the same when set by hand, and puts it back on the way out. A trainer keeps its limit.

    Args:
        num_batches: batches per epoch and process, of training and of evaluation.

    Raises:
        ValueError: where that isn't a positive integer.
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
        slice_size: how many batches at most.

    >>> len(DataLoaderSlice([1, 2, 3], 5)), list(DataLoaderSlice([1, 2, 3], 2))
    (3, [1, 2])
    """

    def __init__(self, dl: Iterable[Any], slice_size: int) -> None:
        self.dl = dl
        self.slice_size = slice_size

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.dl, self.slice_size)

    def __len__(self) -> int:
        """How many batches there are, which a short dataloader makes fewer than the limit.

        Raises:
            TypeError: where the dataloader has no length.
        """
        return min(self.slice_size, len(self.dl))  # type: ignore[arg-type]


def local_process_zero_only(func: Callable[P, T]) -> Callable[P, T | None]:
    """Let only the first process of each machine call `func`; all wait until it is done.

    The other processes get None.
    """
    return _on_one_process(func, lambda state: state.local_process_index == 0)


def world_process_zero_only(func: Callable[P, T]) -> Callable[P, T | None]:
    """Let only the first process of all call `func`; all wait until it is done.

    The other processes get None.
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
            wait_for_everyone()  # an error must not leave the others waiting for ever

    return call


def local_process_zero_first(func: Callable[P, T]) -> Callable[P, T]:
    """Let the first process of each machine call `func` before the others do.

    For a download, say: the others find its result in place.
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

    Each worker gets numbers of its own, the same ones in every run with the same seed.
    """
    seed_host(mix(torch.initial_seed(), "worker", worker_id))


def remove_padding(padded_tensor: Tensor, pad_value: float) -> Tensor:
    """Leave out the rows that are nothing but padding, as after gathering a padded tensor.

    Args:
        padded_tensor: of shape ``(rows, …)``.
        pad_value: what the padding consists of; NaN is understood.

    Returns:
        The other rows in their order, a tensor of shape ``(fewer rows, …)``.
    """
    is_padding = padded_tensor.isnan() if pad_value != pad_value else padded_tensor == pad_value
    if is_padding.ndim > 1:
        is_padding = is_padding.flatten(1).all(1)
    return padded_tensor[~is_padding]
