"""What the processes of a run calculate together; on one process, nothing is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import honor_type
from torch import Tensor

from pa_core.errors import OtherProcessError
from pa_core.plugins.process_scope import check_collectives_allowed

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@cache
def _host_group() -> Any:
    """A process group with a backend for tensors on the CPU."""
    if "gloo" in torch.distributed.get_backend_config():
        return None  # the default group
    return torch.distributed.new_group(backend="gloo")


class Collectives:
    """The collectives of a run.

    Args:
        accelerator: the run's accelerator.

    Attributes:
        device: of this process.
        num_processes: how many processes take part.
        rank: the number of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.num_processes: int = accelerator.num_processes
        self.rank: int = accelerator.process_index

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor, "sum")

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The maximum of each number over all processes, without host-device synchronisation."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return numbers
        reduced = torch.tensor(numbers)
        if not torch.distributed.is_initialized():  # TPUs, which reduce on the device
            return tuple(self.gather(reduced[None]).amax(0).tolist())
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX, _host_group())
        return tuple(reduced.tolist())

    def gather(self, value: Any) -> Any:
        """Concatenate the tensors of all processes, whose first dimensions may differ."""
        check_collectives_allowed()
        if isinstance(value, Mapping):
            return {key: self.gather(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return honor_type(value, (self.gather(item) for item in value))
        if self.num_processes == 1:
            return value
        value = value.to(self.device)
        if not value.ndim:
            return self.accelerator.gather(value)
        sizes = self.accelerator.gather(torch.tensor([len(value)], device=self.device))
        longest = int(sizes.max())
        padding = value.new_zeros((longest - len(value), *value.shape[1:]))
        padded = self.accelerator.gather(torch.cat([value, padding])).split(longest)
        return torch.cat([rows[:size] for rows, size in zip(padded, sizes.tolist(), strict=True)])

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace the content of tensors, on any device, by that of rank 0."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(self.device).contiguous()
            torch.distributed.broadcast(sent, 0)
            tensor.detach().copy_(sent)

    def gather_objects(self, value: Any) -> list[Any]:
        """The `value` of each process in the order of ranks, on every process."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return [value]
        gathered: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(gathered, value, _host_group())  # not through the GPU
        return gathered

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run an action on every process; if it fails on one, raise on all, so that none hangs.

        Raises:
            OtherProcessError: if the action failed only on another process. A process on which it
                failed raises its own error.
        """
        check_collectives_allowed()
        if self.num_processes == 1:
            return action()
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:  # noqa: BLE001 - every error is reported to the other processes
            error = caught
        failures = [text for text in self.gather_objects(error and repr(error)) if text]
        if error is not None:
            raise error
        if failures:
            raise OtherProcessError(f"Another process has failed: {failures[0]}")
        return result

    def wait(self) -> None:
        """Wait for every process to get here."""
        check_collectives_allowed()
        self.accelerator.wait_for_everyone()
