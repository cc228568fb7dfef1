"""What the loop needs of accelerate, used only where it does something.

On one device without a gradient scaler, accelerate's wrappers of ``backward``, ``step`` and
``zero_grad`` only find out, at every call, that there is nothing to do. There the loop gets
PyTorch's own.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import honor_type, send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pa_core.engine.prefetch import StreamCopier, prefetched
from pa_core.errors import OtherProcessError
from pa_core.plugins.process_scope import check_collectives_allowed
from pa_core.utils import remove_padding

if TYPE_CHECKING:
    from pa_core.run_config import TrainerRunConfig

T = TypeVar("T")

_NOTHING = nullcontext()
_CONNECTED = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_PLAIN = (DistributedType.NO, *_CONNECTED)


_engines: WeakSet[Engine] = WeakSet()


@atexit.register
def _leave_process_group() -> None:
    """Close the connections to the other processes while the interpreter is whole.

    Otherwise gloo's threads may be cut off at the very end, which aborts a process that has done
    its work. Containers of models hold the connections too, so they go first. After an uncaught
    exception nothing is waited for.
    """
    for engine in _engines:
        engine._prepared.clear()
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        gc.collect()
        torch.distributed.destroy_process_group()


@cache
def _host_group() -> Any:
    """The processes, connected by a backend for tensors on the CPU."""
    if "gloo" in torch.distributed.get_backend_config():
        return None  # the default group's
    return torch.distributed.new_group(backend="gloo")


class Engine:
    """Prepare, differentiate, clip and reduce on whatever hardware accelerate has found."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self._is_cpu = self.device.type == "cpu"
        self.num_processes: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_plain = accelerator.distributed_type in _PLAIN and accelerator.scaler is None
        # Whether models are put into DistributedDataParallel.
        self._wraps = accelerator.distributed_type in _CONNECTED
        if self.num_processes > 1:
            _engines.add(self)
        self._prepared: dict[tuple[int, int], tuple[nn.Module, Any]] = {}
        self._trainable: dict[int, list[bool]] = {}  # by wrapped model

    @classmethod
    def of(cls, accelerator: Accelerator) -> Engine:
        """The engine that suits an accelerator."""
        if accelerator.distributed_type is DistributedType.DEEPSPEED:
            from pa_core.engine.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(accelerator)
        if accelerator.distributed_type is DistributedType.FSDP:
            from pa_core.engine.fsdp import FsdpEngine

            return FsdpEngine(accelerator)
        return cls(accelerator)

    shows_gradients = True
    """Whether each parameter has its gradient between the backward pass and the update."""

    @property
    def forwards_together(self) -> bool:
        """Whether a forward pass needs all processes, since each has a part of the weights."""
        return False

    def plan(self, config: TrainerRunConfig) -> None:
        """Hear of a run's sizes before model and optimizer are prepared."""

    @property
    def division(self) -> str | None:
        """How the optimizer's state is divided among processes; None where each has all of it."""
        return None

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The model's whole weights; called on every process."""
        return self.unwrap(model, keep_torch_compile=False).state_dict()

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...] | None]:
        """The shape of each of the model's whole weights; None for what is no tensor."""
        state = self.unwrap(model, keep_torch_compile=False).state_dict(keep_vars=True)
        return {name: self._shape(value) for name, value in state.items()}

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def load_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Put whole weights into the model; called on every process."""
        self.unwrap(model, keep_torch_compile=False).load_state_dict(weights)

    def parameter_groups(self, optimizer: Any) -> list[list[nn.Parameter]]:
        """The model's parameters that an optimizer updates, group by group."""
        return [group["params"] for group in optimizer.param_groups]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state as plain data and tensors; where divided, this process' part."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Put back what `optimizer_state` has given."""
        optimizer.load_state_dict(state)

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Place and wrap model and optimizer; what was prepared before is taken as it was.

        Preparing an optimizer twice would leave it with the gradient scaler of the first time.
        """
        bare = id(self.unwrap(model, keep_torch_compile=False))
        if (bare, id(optimizer)) not in self._prepared:
            if self.is_plain and self._wraps and not any(_trainable(model)):
                pair = self.accelerator.prepare_model(model, evaluation_mode=True), optimizer
                share([*model.parameters(), *model.buffers()])  # as the container would do
            elif self.is_plain:
                pair = self.accelerator.prepare_model(model), optimizer
            else:
                pair = self.accelerator.prepare(model, optimizer)
            self._remember(*pair, bare, id(optimizer), id(pair[1]))
        model, prepared = self._prepared[bare, id(optimizer)]
        return self.rewrap(model, prepared), prepared

    def rewrap(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """Wrap a model anew if other parameters need gradients than when it was wrapped.

        `DistributedDataParallel` waits for the gradients of those that did then, and takes no model
        without any.
        """
        bare = self.unwrap(model, keep_torch_compile=False)
        trainable = _trainable(bare)
        # Of what somebody else has made of it, nothing is known.
        if not self._wraps or trainable == self._trainable.get(id(model), trainable):
            return model
        handler, is_on_gpu = self.accelerator.ddp_handler, self.device.type == "cuda"
        wrapped = model.module if isinstance(model, DistributedDataParallel) else model
        if any(trainable):
            wrapped = DistributedDataParallel(
                wrapped,
                device_ids=[self.device] if is_on_gpu else None,
                output_device=self.device if is_on_gpu else None,
                **(handler.to_kwargs() if handler else {}),
            )
        self._remember(wrapped, optimizer, id(bare), id(optimizer))
        return wrapped

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the first, which are the ones that count.

        `DistributedDataParallel` does so before each forward pass in training, so between two of
        them each process has running statistics of its own.
        """
        check_collectives_allowed()
        if not isinstance(model, DistributedDataParallel) or not model.broadcast_buffers:
            return
        share(model.buffers())

    def _remember(self, model: nn.Module, optimizer: Any, bare: int, *optimizers: int) -> None:
        # Known by what was given and by what it became: a second run may bring either.
        for key in optimizers:
            self._prepared[bare, key] = model, optimizer
        self._trainable[id(model)] = _trainable(model)

    def unwrap(self, model: nn.Module, keep_torch_compile: bool = True) -> nn.Module:
        """The model without its distributed containers."""
        return self.accelerator.unwrap_model(model, keep_torch_compile=keep_torch_compile)

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The model to evaluate: without its container, so that batches needn't be equally many."""
        return self.unwrap(model).to(self.device)

    def move(self, batch: Any) -> Any:
        """Put a batch on the device; what lies on the CPU already stays as it is."""
        if self._is_cpu:
            return batch
        return send_to_device(batch, self.device, non_blocking=True)

    def moved(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Put each batch on the device; to a GPU, the next one is copied while it computes."""
        if self.device.type == "cuda":
            return prefetched(batches, StreamCopier(self.device, self.move))
        return map(self.move, batches)

    def backward(self, loss: Tensor) -> None:
        """Differentiate, with the loss scaled where the precision needs it."""
        if self.is_plain:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def zero_grad(self, optimizer: Any) -> None:
        """Drop the gradients of all that the optimizer updates."""
        if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
            optimizer.zero_grad()  # it has its own way
            return
        # What PyTorch does, less the profiler's mark around it, which costs ten microseconds.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def accumulating(self, model: nn.Module, is_update: bool) -> AbstractContextManager[Any]:
        """Keep gradients local while they accumulate; they are reduced once, at the update."""
        if not self.is_plain:
            self.accelerator.gradient_state._set_sync_gradients(is_update)
        if is_update or self.num_processes == 1:
            return _NOTHING
        return self.accelerator.no_sync(model)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Clip the gradients' total 2-norm, and return what it was (0-d, on the device)."""
        if self.is_plain:
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def clip_value(self, parameters: Iterable[nn.Parameter], max_value: float) -> None:
        """Clip each gradient to ``[-max_value, max_value]``."""
        if self.is_plain:
            nn.utils.clip_grad_value_(parameters, max_value)
        else:
            self.accelerator.clip_grad_value_(parameters, max_value)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the gradient scaler dropped the last update because of an overflow."""
        return not self.is_plain and self.accelerator.optimizer_step_was_skipped

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor, "sum")

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number over all processes, without waiting for the device."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return numbers
        reduced = torch.tensor(numbers)
        if not torch.distributed.is_initialized():  # TPUs have their own way, by the device
            return tuple(self.gather(reduced[None]).amax(0).tolist())
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX, _host_group())
        return tuple(reduced.tolist())

    def gather(self, value: Any, padding_value: Any = None) -> Any:
        """Concatenate tensors of all processes, whose first dimensions may differ."""
        check_collectives_allowed()
        if isinstance(value, Mapping):
            return {key: self.gather(item, padding_value) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return honor_type(value, (self.gather(item, padding_value) for item in value))
        if self.num_processes > 1:
            value = value.to(self.device)
            if value.ndim:
                sizes = self.accelerator.gather(torch.tensor([len(value)], device=self.device))
                longest = int(sizes.max())
                padding = value.new_zeros((longest - len(value), *value.shape[1:]))
                parts = self.accelerator.gather(torch.cat([value, padding])).split(longest)
                value = torch.cat(
                    [part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)]
                )
            else:
                value = self.accelerator.gather(value)
        return value if padding_value is None else remove_padding(value, padding_value)

    def gather_objects(self, value: Any) -> list[Any]:
        """Each process' `value`, in the order of their ranks, on every process."""
        check_collectives_allowed()
        if self.num_processes == 1:
            return [value]
        gathered: list[Any] = [None] * self.num_processes
        torch.distributed.all_gather_object(gathered, value, _host_group())  # not by the GPU
        return gathered

    def together(self, action: Callable[[], T]) -> T:
        """Do something that may fail on one process: then it raises on all, and nobody waits.

        Raises:
            OtherProcessError: where it failed on another process; here, its own error.
        """
        check_collectives_allowed()
        if self.num_processes == 1:
            return action()
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:  # noqa: BLE001 - the others must hear of it, whatever it is
            error = caught
        failures = [text for text in self.gather_objects(error and repr(error)) if text]
        if error is not None:
            raise error
        if failures:
            raise OtherProcessError(f"Another process has failed: {failures[0]}")
        return result

    def wait(self) -> None:
        """Wait until every process is here."""
        check_collectives_allowed()
        self.accelerator.wait_for_everyone()


def share(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's tensors."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor.detach(), 0)


def _trainable(model: nn.Module) -> list[bool]:
    """Which parameters need gradients."""
    return [parameter.requires_grad for parameter in model.parameters()]
