"""PyTorch's own switches for speed, in one place."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings
from pa_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class SpeedupsSettings(BuiltinSettings):
    """Settings of the built-in plugin `speedups`."""

    compile: bool = Field(False, description="Whether to compile the model with torch.compile.")
    compile_options: dict[str, Any] | None = Field(
        None, description="Arguments of torch.compile, such as its mode."
    )
    channels_last: bool = Field(
        False, description="Whether images are kept channels last, as convolutions like them."
    )
    tf32: bool = Field(
        False, description="Whether float32 products may take TF32, on GPUs that have it."
    )
    fused_optimizer: bool = Field(
        False, description="Whether the optimizer updates all parameters in one kernel."
    )


class SpeedupsCallback(BuiltinCallback):
    """Turns on what PyTorch has for speed, and changes results only by rounding.

    States and checkpoints are the same with and without: a compiled model's load uncompiled.

    Args:
        compile: compile the model, before it is wrapped for several processes.
        compile_options: arguments of `torch.compile`, such as ``{"mode": "reduce-overhead"}``.
        channels_last: keep the weights of convolutions channels last; images follow them.
        tf32: let products of float32 matrices take TF32 during a run, with 10 bits of mantissa in
            place of 23. Only GPUs from Ampere on have it.
        fused_optimizer: update all parameters in one kernel; torch's Adam, AdamW, SGD and Adagrad
            can.

    Raises:
        ValueError: where the optimizer can't be fused.
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
        if self.fused_optimizer and trainer.optimizer is not None:
            _fuse(trainer.optimizer)
        if self.compile:
            trainer.model = torch.compile(trainer.model, **self.compile_options)

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return (yield from self._with_tf32())

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        return (yield from self._with_tf32())

    def _with_tf32(self) -> Generator[None, Any, Any]:
        """Allow TF32 in a run, and leave the process as it was."""
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
            f"{type(optimizer).__name__} has no fused form: take Adam, AdamW, SGD or Adagrad of "
            "torch.optim, or leave out fused_optimizer"
        )
    for group in [optimizer.defaults, *optimizer.param_groups]:
        group["fused"], group["foreach"] = True, False
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # as its constructor
