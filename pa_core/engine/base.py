"""The engine: what the loop uses accelerate for; it calls PyTorch directly where that is enough.

On one device without a gradient scaler, accelerate's wrappers of ``backward``, ``step`` and
``zero_grad`` do nothing but cost time at every call. There the engine calls PyTorch directly.
"""

from __future__ import annotations

import atexit
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import compile_regions, send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pa_core.engine.collectives import Collectives
from pa_core.engine.optimizer_step import step_optimizer
from pa_core.engine.optimizers import OptimizerList, given_optimizers, unwrapped
from pa_core.engine.process_group import close_process_group
from pa_core.engine.wrappers import (
    clean_state_dict,
    distributed_layer,
    load_clean_state_dict,
    unwrap,
)
from pa_core.errors import listed
from pa_core.plugins.process_scope import check_collectives_allowed

if TYPE_CHECKING:
    from pa_core.engine.optimizer_modes import OptimizerModes
    from pa_core.run_config import TrainerRunConfig

_NO_CONTEXT = nullcontext()
_DDP = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_PLAIN = (DistributedType.NO, *_DDP)

_engines: WeakSet[Engine] = WeakSet()


@atexit.register
def _leave_process_group() -> None:
    """Close the connections to the other processes before the interpreter shuts down.

    After an uncaught exception the process doesn't wait for the others.
    """
    for engine in _engines:
        engine._prepared.clear()
        engine._last_wrapper = None
    if not hasattr(sys, "last_value"):
        close_process_group()


class Engine(Collectives):
    """Prepares, differentiates and clips on the hardware that accelerate has found.

    Args:
        accelerator: the run's accelerator.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self._is_cpu = self.device.type == "cpu"
        self.is_plain = accelerator.distributed_type in _PLAIN and accelerator.scaler is None
        self._uses_ddp = accelerator.distributed_type.name.startswith("MULTI_")
        self._follows_parameters = self._uses_ddp or self.sharded_by is not None
        if self._follows_parameters:
            from pa_core.engine.trainable import Trainable

            self._trainable = Trainable(
                self,
                partial(self.unwrap, keep_torch_compile=False),
                is_sharded=self.sharded_by is not None,
            )
        self._last_wrapper: DistributedDataParallel | None = None
        if self.num_processes > 1:
            _engines.add(self)
        self._may_be_unscaled = False  # by the gradient scaler
        self._prepared: dict[tuple[int, int], tuple[nn.Module, Any]] = {}
        self._untrained: list[nn.Parameter] = []
        self._modes: OptimizerModes | None = None  # of the present optimizer, if it has any
        self.loss_parameters: tuple[nn.Parameter, ...] = ()  # that are trained; on one process only

    shows_gradients = True
    """Whether each parameter has its gradient between the backward pass and the update."""
    sharded_by: str | None = None
    """What may shard model, gradients or optimizer between processes."""

    @property
    def reduces_gradients_before_update(self) -> bool:
        """Whether gradients are reduced by the backward pass, so that plugins can look at them."""
        return self.accelerator.distributed_type != DistributedType.XLA or self.num_processes == 1

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass needs all processes, because each holds a shard of the weights."""
        return False

    def plan(self, config: TrainerRunConfig) -> None:
        """Apply a run's configuration; called on every process before `prepare`."""
        if self._follows_parameters:
            self._trainable.synchronise()
        own = self.accelerator.gradient_accumulation_steps
        if self.shows_gradients and own not in (1, config.gradient_accumulation_steps):
            warnings.warn(
                f"The Accelerator has gradient_accumulation_steps={own}, which has no effect: "
                f"train() overrides it with {config.gradient_accumulation_steps}. Pass it to "
                "train()",
                stacklevel=3,
            )

    @property
    def sharding(self) -> str | None:
        """How the optimizer's state is sharded between processes; None if each has all of it."""
        return None

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The full state dict of the model, without the names of wrappers.

        A collective if the model is sharded.
        """
        return clean_state_dict(self.unwrap(model, keep_torch_compile=False))

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...] | None]:
        """The full shape of each entry of the model's state dict; None if it isn't a tensor."""
        state = clean_state_dict(self.unwrap(model, keep_torch_compile=False), keep_vars=True)
        return {name: self._shape(value) for name, value in state.items()}

    def changed_types(self, model: nn.Module, weights: Mapping[str, Any]) -> list[str]:
        """The tensors that a model has in another type than a full state dict.

        Returns:
            A phrase for each change, such as ``the type of 0.weight: float32 → bfloat16``.
        """
        state = clean_state_dict(self.unwrap(model, keep_torch_compile=False), keep_vars=True)
        changed: dict[str, list[str]] = {}
        for name, present in state.items():
            before, now = (getattr(one, "dtype", None) for one in (weights.get(name), present))
            if None not in (before, now) and before != now:
                types = f"{before} → {now}".replace("torch.", "")
                changed.setdefault(types, []).append(name)
        return [f"the type of {listed(names)}: {types}" for types, names in changed.items()]

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def load_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Load a full state dict into the model; a collective if the model is sharded."""
        load_clean_state_dict(self.unwrap(model, keep_torch_compile=False), weights)

    def parameter_groups(self, optimizer: Any) -> list[list[nn.Parameter]]:
        """The model's parameters in each parameter group of the optimizer."""
        return [group["params"] for group in optimizer.param_groups]

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state as plain data and tensors; if sharded, this process' shard."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer_state(
        self, optimizer: Any, state: dict[str, Any], *, keeps_types: bool = True
    ) -> None:
        """Restore what `optimizer_state` returned.

        Args:
            optimizer: the optimizer.
            state: the state.
            keeps_types: whether its tensors keep their types; not if those of the parameters have
                changed, to which PyTorch converts them.
        """
        optimizer.load_state_dict(state)
        if keeps_types:
            from pa_core.engine.optimizer_types import restore_types

            restore_types(optimizer, state)

    def modes(self, optimizer: Any) -> OptimizerModes | None:
        """What switches the modes of an optimizer, such as a schedule-free one; None without any.

        Raises:
            ValueError: for an optimizer with modes where the model is sharded.
        """
        with_modes = tuple(one for one in given_optimizers(optimizer) if _has_modes(one))
        if not with_modes:
            self._modes = None
        elif self._modes is None or self._modes.optimizers != with_modes:
            if self.sharded_by is not None:
                raise ValueError(
                    f"{type(with_modes[0]).__name__} changes the weights between its training and "
                    f"evaluation modes, which isn't supported under {self.sharded_by}: use another "
                    "optimizer, or DDP"
                )
            from pa_core.engine.optimizer_modes import OptimizerModes

            self._modes = OptimizerModes(with_modes)
        return self._modes

    def check_optimizer(self, optimizer: Any) -> None:
        """Check that this engine can use an optimizer; outside of training it evaluates.

        Raises:
            ValueError: if it can't, naming the optimizer.
        """
        if self.sharded_by is not None and len(given_optimizers(optimizer)) > 1:
            raise ValueError(
                f"Several optimizers aren't supported under {self.sharded_by}: use one with "
                "several parameter groups"
            )
        modes = self.modes(optimizer)
        if modes is not None and not modes.is_training:
            modes.set(training=False)

    def set_mode(self, optimizer: Any, *, training: bool) -> None:
        """Switch the optimizer to training or evaluation mode, if it has modes."""
        modes = self.modes(optimizer)
        if modes is not None:
            modes.set(training=training)

    def evaluation_mode(self, optimizer: Any) -> AbstractContextManager[Any]:
        """Have the optimizer in evaluation mode, if it has modes; then return to the one before."""
        modes = self.modes(optimizer)
        return _NO_CONTEXT if modes is None else modes.evaluation()

    def training_weights(self, optimizer: Any) -> dict[int, Tensor]:
        """In evaluation mode, the weights to train on, where they differ; by parameter number."""
        modes = self.modes(optimizer)
        if modes is None:
            return {}
        groups = self.parameter_groups(optimizer)
        numbers = {id(p): number for number, p in enumerate(p for group in groups for p in group)}
        return {numbers[id(p)]: weights for p, weights in modes.training_weights()}

    def load_training_weights(self, optimizer: Any, weights: Mapping[int, Tensor]) -> None:
        """Restore what `training_weights` returned, for the next switch to training mode."""
        modes = self.modes(optimizer)
        if modes is not None:
            parameters = [p for group in self.parameter_groups(optimizer) for p in group]
            modes.keep({parameters[number]: value for number, value in weights.items()})

    def end_run(self) -> None:
        """Leave the optimizer in evaluation mode at the end of a run, however it ended."""
        if self._modes is not None:
            self._modes.end()

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Place and wrap model and optimizer; a pair that was prepared before is reused.

        An optimizer that is prepared twice would keep the gradient scaler of the first time.
        """
        self.check_optimizer(optimizer)
        bare = id(self.unwrap(model, keep_torch_compile=False))
        if (bare, id(optimizer)) not in self._prepared:
            if self.is_plain and self._uses_ddp and not any(_trainable(model)):
                pair = self.accelerator.prepare_model(model, evaluation_mode=True), optimizer
                broadcast([*model.parameters(), *model.buffers()])  # as DDP would
            elif self.is_plain:
                pair = self.accelerator.prepare_model(model), optimizer
            else:
                pair = self.accelerator.prepare(model, optimizer)
            self._remember(*pair, bare, id(optimizer), id(pair[1]))
        return self._prepared[bare, id(optimizer)]

    def rewrap(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """Wrap a model again if other parameters need gradients than the wrapper knows.

        A collective, except where nothing wraps the model.

        Raises:
            RuntimeError: if processes differ in their parameters.
            ValueError: if the model is sharded, and so can't be wrapped again.
        """
        if self._follows_parameters and self._trainable.has_changed(model):
            return self._wrap_again(model, optimizer)
        return model

    def complete_gradients(self, model: nn.Module, optimizer: Any) -> nn.Module:
        """Reduce gradients that the wrapper doesn't know of, after an accumulated batch.

        Returns:
            The model; in another wrapper if parameters were frozen or unfrozen. The errors are
            those of `rewrap`.
        """
        if self._follows_parameters and self._trainable.complete(model, optimizer):
            return self._wrap_again(model, optimizer)
        return model

    def _wrap_again(self, model: nn.Module, optimizer: Any) -> nn.Module:
        if self.sharded_by is not None:
            raise ValueError(
                f"{self.sharded_by} has prepared the model for the parameters that needed "
                f"gradients then, so {self._trainable.changed_names(model)} can't be frozen, "
                "unfrozen or replaced any more: do it before the first run of the Trainer"
            )
        inner, old = self.unwrap(model), distributed_layer(model)
        if old is None and any(isinstance(one, DistributedDataParallel) for one in model.modules()):
            raise ValueError(
                f"{self._trainable.changed_names(model)} can't be frozen, unfrozen or replaced: "
                "DistributedDataParallel is inside another module, so the Trainer can't wrap the "
                "model again"
            )
        self._last_wrapper = last = old or self._last_wrapper
        wrapped = inner
        if any(_trainable(inner)):
            wrapped = self._distribute(inner)
            if last is not None:
                from pa_core.engine.trainable import copy_hooks

                copy_hooks(last, wrapped)
            elif self.accelerator.ddp_handler is not None:
                self.accelerator.ddp_handler.register_comm_hook(wrapped)
            wrapped.training = inner.training
            dynamo = self.accelerator.state.dynamo_plugin
            if dynamo.backend != "NO":  # as accelerate does, around the wrapper
                is_regional = dynamo.use_regional_compilation
                compile_: Any = compile_regions if is_regional else torch.compile
                wrapped = compile_(wrapped, **dynamo.to_kwargs())
        for key, (other, prepared) in list(self._prepared.items()):
            if other is model:
                self._prepared[key] = wrapped, prepared
        self._trainable.remember(wrapped)
        return wrapped

    def _distribute(self, model: nn.Module) -> DistributedDataParallel:
        handler = self.accelerator.ddp_handler
        devices = None if self._is_cpu else [self.device]
        return DistributedDataParallel(
            model,
            device_ids=devices,
            output_device=devices and devices[0],
            **(handler.to_kwargs() if handler else {}),
        )

    def reduced_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters whose gradients the wrapper reduces, in its order."""
        return self._trainable.seen(model).trainable()

    @property
    def disagreement(self) -> str | None:
        """The parameters that this process alone has frozen or unfrozen, as text."""
        return self._trainable.disagreement if self._follows_parameters else None

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0.

        `DistributedDataParallel` does so before each forward pass in training. Until the next one,
        each process has its own running statistics.
        """
        check_collectives_allowed()
        wrapper = distributed_layer(model)
        if wrapper is not None and wrapper.broadcast_buffers:
            broadcast(model.buffers())

    def _remember(self, model: nn.Module, optimizer: Any, bare: int, *optimizers: int) -> None:
        # By the given optimizer and by the prepared one: a second run may pass either.
        for key in optimizers:
            self._prepared[bare, key] = model, optimizer
        if self._follows_parameters:
            self._trainable.remember(model)

    def unwrap(self, model: nn.Module, keep_torch_compile: bool = True) -> nn.Module:
        """The model without its distributed wrappers."""
        return unwrap(model, keep_torch_compile=keep_torch_compile)

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The model to evaluate: unwrapped, so processes may have different numbers of batches."""
        return self.unwrap(model).to(self.device)

    def move(self, batch: Any) -> Any:
        """Move a batch to the device; on the CPU, it is returned as it is."""
        if self._is_cpu:
            return batch
        return send_to_device(batch, self.device, non_blocking=True)

    def moved(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Move each batch to the device; the next one is copied while a GPU computes."""
        if self.device.type == "cuda":
            from pa_core.engine.prefetch import StreamCopier, prefetched

            return prefetched(batches, StreamCopier(self.device, self.move))
        if self._is_cpu and type(self).move is Engine.move:  # which has nothing to do here
            return batches
        return map(self.move, batches)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass, with the loss scaled if the precision needs it."""
        # Not by accelerate, which would divide it by its own gradient_accumulation_steps.
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def step(self, optimizer: Any) -> None:
        """Update the parameters."""
        if self._modes is not None:
            self._modes.check()
        scaler, inner = self.accelerator.scaler, unwrapped(optimizer)
        if scaler is None or scaler._found_inf_per_device(inner):
            step_optimizer(optimizer)
            return
        # Without any gradient, nothing can have overflowed, and a scaler would refuse the step.
        step_optimizer(inner)
        optimizer._is_overflow = False
        self.discard_unscaled()

    def find_untrained(self, model: nn.Module, optimizer: Any) -> None:
        """Find parameters that need gradients, and that the optimizer doesn't hold."""
        self._untrained = []
        if hasattr(optimizer, "param_groups"):
            held = {id(p) for group in self.parameter_groups(optimizer) for p in group}
            self._untrained = [
                p for p in model.parameters() if p.requires_grad and id(p) not in held
            ]

    def zero_untrained(self) -> None:
        """Set the gradients of parameters to None that the optimizer doesn't hold.

        They would add up over all updates, and be clipped with the others. This is done before an
        accumulated batch and not after it, as a plugin may train them with its own optimizer.
        """
        for parameter in self._untrained:
            parameter.grad = None

    def zero_grad(self, optimizer: Any) -> None:
        """Set the gradients of the optimizer's parameters to None."""
        optimizer = unwrapped(optimizer)  # accelerate's wrapper does nothing between two updates
        own = getattr(type(optimizer), "zero_grad", None)  # or that of what it wraps
        is_custom = own is not torch.optim.Optimizer.zero_grad
        if is_custom or "zero_grad" in vars(optimizer):
            optimizer.zero_grad()
            return
        # As PyTorch does, but without its profiler mark, which costs ten microseconds.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def gradient_leaves(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters at which a backward pass of the model ends, on this process."""
        every = chain(model.parameters(), self.loss_parameters)
        return [parameter for parameter in every if parameter.requires_grad]

    def accumulating(self, model: nn.Module, is_update: bool) -> AbstractContextManager[Any]:
        """Keep gradients local while they accumulate; they are reduced once, for the update."""
        if not self.is_plain:
            self.accelerator.gradient_state._set_sync_gradients(is_update)
        if is_update and self._follows_parameters and self._trainable.begin(model):
            return self._trainable.undone_on_error()
        if is_update or self.num_processes == 1:
            return _NO_CONTEXT
        if getattr(distributed_layer(model), "static_graph", False):
            return _NO_CONTEXT  # it has to see whole steps; the mean of means is the same
        return self.accelerator.no_sync(model)

    def choose(self, optimizer: Any, chosen: frozenset[int] | None) -> None:
        """Have the coming update step only some of several optimizers; the others lose gradients.

        Args:
            optimizer: the optimizer, or several.
            chosen: the positions of some; all of them if None.
        """
        inner = unwrapped(optimizer)
        if isinstance(inner, OptimizerList):
            inner.choose(chosen)

    def unscale(self, optimizer: Any) -> None:
        """Unscale the gradients of an accumulated batch, if the precision scales the loss."""
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(unwrapped(optimizer))
            self._may_be_unscaled = True

    def unscale_again(self, optimizer: Any) -> None:
        """Unscale gradients that replace those that `unscale` has seen.

        If either of them overflowed, the update is skipped.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            return
        overflowed = scaler._found_inf_per_device(unwrapped(optimizer))
        self.discard_unscaled()
        self.unscale(optimizer)
        for device, found in scaler._found_inf_per_device(unwrapped(optimizer)).items():
            if device in overflowed:
                found.copy_(torch.maximum(found, overflowed[device]))

    def skip_unscaled(self, optimizer: Any) -> None:
        """Prepare the gradient scaler for new gradients, when an update isn't made on request.

        It lowers its scale if the gradients overflowed: otherwise those of the next updates would,
        too. If they didn't, its state stays as it is.
        """
        scaler = self.accelerator.scaler
        if scaler is None or not scaler._found_inf_per_device(unwrapped(optimizer)):
            self.discard_unscaled()
            return
        interval = scaler.get_growth_interval()
        scaler.set_growth_interval(torch.iinfo(torch.int32).max)
        scaler.update()
        scaler.set_growth_interval(interval)
        scaler._growth_tracker.sub_(1).clamp_(min=0)  # the update counted, unless it was set to 0
        self._may_be_unscaled = False

    def discard_unscaled(self) -> None:
        """Prepare the gradient scaler for new gradients, as if it had not seen these."""
        if self._may_be_unscaled:
            scaler = self.accelerator.scaler
            scaler.update(scaler.get_scale())  # keeps the scale, and forgets the gradients
            self._may_be_unscaled = False

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Clip the total 2-norm of the gradients; returns the norm before (0-d, on the device)."""
        parameters = chain(parameters, self.loss_parameters)
        if self.is_plain or self.accelerator.scaler is not None:  # accelerate would unscale again
            return nn.utils.clip_grad_norm_(parameters, max_norm)
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def clip_value(self, parameters: Iterable[nn.Parameter], max_value: float) -> None:
        """Clip each gradient to ``[-max_value, max_value]``."""
        parameters = chain(parameters, self.loss_parameters)
        if self.is_plain or self.accelerator.scaler is not None:
            nn.utils.clip_grad_value_(parameters, max_value)
        else:
            self.accelerator.clip_grad_value_(parameters, max_value)

    def step_was_skipped(self, optimizer: Any) -> bool:
        """Whether the gradient scaler skipped the last update because of an overflow."""
        # Not the accelerator's own property, which is about all optimizers that it has prepared.
        return not self.is_plain and bool(getattr(optimizer, "step_was_skipped", False))


def _has_modes(optimizer: Any) -> bool:
    """Whether an optimizer has a training and an evaluation mode."""
    modes = (getattr(optimizer, name, None) for name in ("train", "eval"))
    return all(map(callable, modes))


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the tensors of rank 0."""
    for tensor in tensors:
        torch.distributed.broadcast(tensor.detach(), 0)


def _trainable(model: nn.Module) -> list[bool]:
    """Whether each parameter needs a gradient."""
    return [parameter.requires_grad for parameter in model.parameters()]
