"""PyTorch's speed options, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class SpeedupsSettings(CallbackSettings):
    """Settings of the built-in plugin `speedups`."""

    compile: bool = Field(False, description="Whether to compile the model with torch.compile.")
    compile_options: dict[str, Any] | None = Field(
        None, description="Arguments of torch.compile, such as mode."
    )
    channels_last: bool = Field(
        False, description="Whether to use the channels-last memory format for convolutions."
    )
    tf32: bool = Field(
        False, description="Whether float32 matrix products may use TF32, on GPUs that have it."
    )
    fused_optimizer: bool = Field(
        False, description="Whether to use the fused implementation of the optimizer."
    )


class SpeedupsCallback(ConfigurableCallback):
    """Turns on PyTorch's speed options. They change results by rounding at most.

    Training states and checkpoints don't depend on these options: those of a compiled model load
    into an uncompiled one, and the other way round.

    Args:
        compile: compile the model, before it is wrapped for several processes.
        compile_options: arguments of `torch.compile`, such as ``{"mode": "reduce-overhead"}``.
        channels_last: convert the model to the channels-last memory format, which the outputs of
            its convolutions then have too.
        tf32: let float32 matrix products use TF32 during a run, with 10 bits of mantissa instead of
            23. Only GPUs from Ampere on have it.
        fused_optimizer: use the fused implementation of the optimizer; PyTorch has one for Adam,
            AdamW, SGD and Adagrad.

    Raises:
        ValueError: if the optimizer has no fused implementation.
    """

    Settings = SpeedupsSettings

    def __init__(
        self,
        compile: bool = False,  # noqa: A002 - PyTorch's name for it
        compile_options: dict[str, Any] | None = None,
        channels_last: bool = False,
        tf32: bool = False,
        fused_optimizer: bool = False,
    ) -> None:
        self.compile, self.compile_options = compile, dict(compile_options or {})
        self.channels_last, self.tf32 = channels_last, tf32
        self.fused_optimizer = fused_optimizer

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.channels_last:
            trainer.model.to(memory_format=torch.channels_last)
        if self.fused_optimizer:
            for optimizer in trainer.optimizers:
                _fuse(optimizer)
        if self.compile:
            trainer.model = torch.compile(trainer.model, **self.compile_options)

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return (yield from self._with_tf32())

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return (yield from self._with_tf32())

    def _with_tf32(self) -> Generator[None, Any, Any]:
        """Allow TF32 during a run, then restore the settings of the process."""
        if not self.tf32:
            return (yield)
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        try:
            return (yield)
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    if "fused" not in inspect.signature(type(optimizer)).parameters:
        raise ValueError(
            f"{type(optimizer).__name__} has no fused implementation: use Adam, AdamW, SGD or "
            "Adagrad of torch.optim, or leave out fused_optimizer"
        )
    for group in [optimizer.defaults, *optimizer.param_groups]:
        group["fused"], group["foreach"] = True, False
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # as its constructor
