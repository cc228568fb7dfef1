"""Optimizers with a training and an evaluation mode, between which they change the weights.

Schedule-free optimizers (https://arxiv.org/abs/2405.15682) update one point and evaluate another:
``optimizer.train()`` and ``optimizer.eval()`` put one or the other into the model. The way back is
not exact in floating point, so the weights of the training mode are kept while the model holds
those of the evaluation mode. Evaluating or saving then doesn't change the training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Kept(NamedTuple):
    parameter: nn.Parameter
    training: Tensor
    evaluation: Tensor


class OptimizerModes:
    """Switches optimizers between their modes; outside of training they are in evaluation mode.

    Args:
        optimizers: optimizers that have modes.

    Attributes:
        is_training: whether they are in training mode.
    """

    def __init__(self, optimizers: Iterable[Any]) -> None:
        self.optimizers = tuple(optimizers)
        self.is_training = False
        self._kept: list[_Kept] = []

    def set(self, *, training: bool) -> None:
        """Switch to training or evaluation mode."""
        if not training:
            self._evaluate()
        elif not self.is_training:
            self._train()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Be in evaluation mode, and return to the mode before."""
        before = self.is_training
        self._evaluate()
        try:
            yield
        finally:
            self.set(training=before)

    def end(self) -> None:
        """Switch to evaluation mode at the end of a run, and free the kept weights."""
        for optimizer in self.optimizers:
            optimizer.eval()
        self.is_training, self._kept = False, []

    def _train(self) -> None:
        # Where others have set the weights since, the optimizer finds their training weights.
        kept = self._kept if self._is_untouched else []
        for optimizer in self.optimizers:
            optimizer.train()
        with torch.no_grad():
            for one in kept:
                one.parameter.copy_(one.training)
        self.is_training, self._kept = True, []

    def _evaluate(self) -> None:
        training = [p.detach().clone() for p in self._parameters()] if self.is_training else []
        for optimizer in self.optimizers:
            optimizer.eval()  # also if the user has switched to training outside of a run
        if self.is_training:
            self.is_training = False
            self._keep(zip(self._parameters(), training, strict=True))

    def _keep(self, training: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self._kept = [
            _Kept(parameter, weights, parameter.detach().clone())
            for parameter, weights in training
            if not _same(parameter, weights)
        ]

    @property
    def _is_untouched(self) -> bool:
        return all(_same(one.parameter, one.evaluation) for one in self._kept)

    def training_weights(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The training weights of parameters that have others now, in evaluation mode.

        None if others have set the weights since, as by loading a checkpoint.
        """
        return [(one.parameter, one.training) for one in self._kept] if self._is_untouched else []

    def keep(self, training: Mapping[nn.Parameter, Tensor]) -> None:
        """Set the training weights that belong to the present weights of the evaluation mode."""
        self._evaluate()  # a file may hold the optimizer as it was in training
        placed = [(p, weights.to(p.device, p.dtype)) for p, weights in training.items()]
        self._keep(placed)

    def check(self) -> None:
        """Check before an update that the optimizers are in training mode.

        Raises:
            RuntimeError: naming the optimizer that isn't.
        """
        for optimizer in self.optimizers:
            groups = optimizer.param_groups
            if not self.is_training or any(not group.get("train_mode", True) for group in groups):
                raise RuntimeError(
                    f"{type(optimizer).__name__} is in evaluation mode at an update: the Trainer "
                    "switches its mode, so don't call optimizer.eval() within a training epoch, "
                    "and call optimizer.train() after adding a parameter group there"
                )

    def _parameters(self) -> list[nn.Parameter]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"]]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
