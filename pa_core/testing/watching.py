"""Run parts of a plugin within contexts, and detect the tensors that it reads in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pa_core.diagnostics.device_syncs import calling_line, watch_device_syncs
from pa_core.diagnostics.stopwatch import within_parts
from pa_core.plugins.explain import loop_rows

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_core.plugins.implementations import Call, Implementation

STEP_HOOKS = frozenset(
    row.hook
    for row in loop_rows()
    if row.hook and {"for each micro-batch", "for each evaluation batch"} & {*row.phases}
)
"""The hooks that are called in every step, according to the loop's table."""


def call_within(
    implementation: Implementation, context: Callable[[str], AbstractContextManager[Any]]
) -> Call:
    """A version of the implementation's call that runs within a context.

    Of a wrapper, the code before and after the yield does, and what it wraps doesn't.

    Args:
        implementation: a plugin's implementation of a hook.
        context: makes the context for the hook's name.
    """
    hook, call = implementation.hook, implementation.call
    if implementation.wrapper:
        return within_parts(call, lambda: context(hook), lambda: context(hook))

    def watched(arguments: dict[str, Any]) -> Any:
        with context(hook):
            return call(arguments)

    return watched


class Reads:
    """Records where a plugin reads tensors in a step, a host-device synchronisation on GPUs.

    A plugin may read freely where ``tensor.is_cpu`` is true. So that it behaves as on a GPU, that
    attribute is False while the plugin runs; and its device is another one than
    ``torch.device("cpu")``, so that a copy to the host differs from one to the model's device.

    Args:
        trainer: the trainer of the run.

    Attributes:
        found: one sentence per place.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.found: dict[str, None] = {}  # a set that keeps its order
        self._trainer_class, self._device = type(trainer), trainer.device

    @contextmanager
    def within(self, hook: str) -> Iterator[None]:
        """Record the reads of the block, if the hook is one of a step."""
        with watch_device_syncs(self._device) as reads, ExitStack() as stack:
            if self._device.type == "cpu":
                mode = _AsOnAccelerator(self._device, reads.append)
                stack.enter_context(mode)
                stack.enter_context(mock.patch.object(self._trainer_class, "device", mode.device))
            try:
                yield
            finally:  # a wrapper ends by raising StopIteration
                if hook in STEP_HOOKS:
                    self.found |= dict.fromkeys(f"{hook} calls {place}" for place in reads)


class _AsOnAccelerator(TorchFunctionMode):
    """Lets tensors of the CPU look like those of an accelerator.

    ``tensor.is_cpu`` is False, and ``tensor.device`` is ``cpu:0``, which is the same device to
    PyTorch, but isn't equal to ``cpu``. A copy to ``cpu`` is noted.
    """

    device = torch.device("cpu", 0)

    def __init__(self, model_device: torch.device, note: Callable[[str], None]) -> None:
        super().__init__()
        self._model_device, self._note = model_device, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        if func == Tensor.device.__get__:
            device = func(*args, **kwargs)
            return self.device if device.type == "cpu" else device
        if func is Tensor.to and not kwargs.get("non_blocking"):
            if any(map(self._is_host, (*args[1:], *kwargs.values()))):
                self._note(f"to{calling_line()}")
        return func(*args, **kwargs)

    def _is_host(self, given: Any) -> bool:
        # A plugin may have kept the trainer's own device from before it was watched.
        is_own = given is self._model_device or given == self.device
        return isinstance(given, torch.device) and given.type == "cpu" and not is_own
