"""The user's optimizers, behind accelerate's wrapper."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def given_optimizers(optimizer: Any) -> tuple[Any, ...]:
    """The optimizers that the user has given; none for None."""
    return () if optimizer is None else (unwrapped(optimizer),)
