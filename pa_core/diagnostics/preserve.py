"""Restore what a trial run changes, for plugins that train for a few steps to find a setting."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from pa_core.engine.loss_parameters import trained_loss

if TYPE_CHECKING:
    from pa_core import Trainer


@contextmanager
def preserved(trainer: Trainer, data: Any = None) -> Iterator[None]:
    """Restore on exit what training changes: model, optimizer, scaler and random generators.

    Args:
        trainer: the trainer to restore.
        data: a dataset or loader whose own generators are restored as well.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators(trainer.device, data))
        stack.enter_context(_model(trainer.get_model(keep_torch_compile=False)))
        loss = trained_loss(trainer)
        if loss is not None:
            stack.enter_context(_model(loss))
        if trainer.optimizer is not None:
            modes = trainer._engine.modes(trainer.optimizer)
            if modes is not None:
                stack.enter_context(_attributes(modes))
            for optimizer in trainer.optimizers:
                stack.enter_context(_optimizer(optimizer))
        if trainer.scaler is not None:
            stack.enter_context(_attributes(trainer.scaler))
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of each module on exit.

    A user may keep some modules in evaluation mode, such as frozen batch norms, so
    ``model.train()`` would be wrong.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _model(model: nn.Module) -> Iterator[None]:
    """Keep a copy in host memory, so that it takes none of the device."""
    parameters = [(p, p.detach().to("cpu", copy=True), p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().to("cpu", copy=True))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    for parameter in model.parameters():
        parameter.grad = None
    try:
        with modes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in parameters:
                parameter.copy_(value)
                parameter.grad = gradient
            for module, name, buffer, saved in buffers:
                module._buffers[name] = buffer  # the module may have replaced the tensor
                if buffer is not None and saved is not None:
                    buffer.copy_(saved)


@contextmanager
def _optimizer(optimizer: Any) -> Iterator[None]:
    """Let the optimizer work on copies of its state, and restore the originals."""
    attributes = dict(vars(optimizer))
    groups = list(optimizer.param_groups)
    values = [[(key, value, _copy(value)) for key, value in group.items()] for group in groups]
    state = {parameter: deepcopy(values) for parameter, values in optimizer.state.items()}
    optimizer.state = defaultdict(dict, state)
    try:
        yield
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, saved in zip(groups, values, strict=True):
            group.clear()
            for key, value, before in saved:
                if isinstance(value, Tensor):
                    value.copy_(before)  # in place, as a compiled optimizer reads this tensor
                group[key] = value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def _attributes(thing: Any) -> Iterator[None]:
    """Restore the attributes of a gradient scaler, or of what switches an optimizer's modes."""
    values = {name: _copy(value) for name, value in vars(thing).items()}
    try:
        yield
    finally:
        vars(thing).clear()
        vars(thing).update(values)


@contextmanager
def _generators(device: torch.device, data: Any) -> Iterator[None]:
    python, array = random.getstate(), np.random.get_state()
    sampler = getattr(data, "sampler", None)
    own = [getattr(part, "generator", None) for part in (data, sampler)]
    states = [(g, g.get_state()) for g in own if isinstance(g, Generator)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
            for generator, state in states:
                generator.set_state(state)
