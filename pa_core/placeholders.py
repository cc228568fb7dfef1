"""Placeholders for numbers of a run that are unknown when a scheduler is configured."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

    # To a type checker a placeholder is the number that replaces it, which the scheduler takes.
    _Number = int
else:

    class _Number: ...


class _Arithmetic:
    """Records arithmetic, and evaluates it once the run's numbers are known.

    The results are `PlaceholderExpression`, but declared as the numbers that replace them.
    """

    def evaluate(self, trainer: Trainer) -> Any:
        """The value in the trainer's current run."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.truediv, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return PlaceholderExpression(operator.floordiv, other, self)

    def __neg__(self) -> Any:
        return PlaceholderExpression(operator.neg, self)


class PlaceholderExpression(_Arithmetic):
    """An operation on placeholders and numbers, such as ``NUM_EPOCHS * 2 + 1``."""

    def __init__(self, operation: Callable[..., Any], *operands: Any) -> None:
        self._operation, self._operands = operation, operands

    def evaluate(self, trainer: Trainer) -> Any:
        """The result with the numbers of the trainer's current run."""
        value = self._operation(*(_replace(operand, trainer) for operand in self._operands))
        # Epochs times updates per epoch are a whole number, even if these are a mean.
        is_product = self._operation is operator.mul and isinstance(value, float)
        return int(value) if is_product and value.is_integer() else value

    def __repr__(self) -> str:
        return f"{self._operation.__name__}({', '.join(map(str, self._operands))})"


class TrainerPlaceholderValues(_Arithmetic, _Number, Enum):
    """Placeholders for numbers of the run in the arguments of a learning-rate scheduler.

    Use them anywhere in the arguments of a `functools.partial`, even inside lists, dictionaries and
    nested partials, and in arithmetic (``+ - * / //``, in any order). The `Trainer` replaces them
    when the run starts.

    An update is one optimizer step, and so one step of the scheduler, for any number of processes
    and micro-batches.

    >>> from functools import partial
    >>> from torch.optim.lr_scheduler import OneCycleLR
    >>> create_scheduler_fn = partial(
    ...     OneCycleLR,
    ...     max_lr=0.01,
    ...     total_steps=(
    ...         TrainerPlaceholderValues.NUM_EPOCHS
    ...         * TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
    ...     ),
    ... )
    """

    NUM_EPOCHS = "epochs of the run"
    NUM_UPDATE_STEPS_PER_EPOCH = "updates per epoch"
    PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH = "updates per epoch on this process"
    NUM_UPDATES = "updates of the run"
    TRAIN_DATALOADER_LEN = "training batches per epoch on this process"
    EVAL_DATALOADER_LEN = "evaluation batches per epoch on this process"

    @classmethod
    def placeholder_set(cls) -> set[str]:
        """The names of all placeholders."""
        return set(cls.__members__)

    def evaluate(self, trainer: Trainer) -> int:
        """The number in the trainer's current run.

        Raises:
            ValueError: if the run has no such number, as for data of unknown length.
        """
        try:
            value: int | None = _NUMBERS[self](trainer)
        except (TypeError, AttributeError):  # a stream, or no data at all
            value = None
        if not value:  # the run config has 0 where a length is unknown
            raise ValueError(
                f"TrainerPlaceholderValues.{self.name} ({self.value}) is unknown in this run, "
                "because the data has no length or the run has a time limit. Pass a number instead"
            )
        return value

    def __str__(self) -> str:
        return self.name


_NUMBERS: dict[TrainerPlaceholderValues, Callable[[Any], int | None]] = {
    TrainerPlaceholderValues.NUM_EPOCHS: lambda t: t.run_config.num_epochs,
    TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH: (
        lambda t: t.run_config.num_update_steps_per_epoch
    ),
    TrainerPlaceholderValues.PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH: (
        lambda t: t.run_config.num_local_update_steps_per_epoch
    ),
    TrainerPlaceholderValues.NUM_UPDATES: lambda t: t.num_updates,
    TrainerPlaceholderValues.TRAIN_DATALOADER_LEN: lambda t: len(t.train_dataloader),
    TrainerPlaceholderValues.EVAL_DATALOADER_LEN: (
        lambda t: len([*t.eval_dataloaders.values(), None][0])  # of the first dataset
    ),
}


def replace_trainer_placeholder_values(trainer: Trainer, instance: Any) -> Any:
    """Replace the placeholders in the arguments of a partial with the run's numbers.

    Args:
        trainer: the trainer of the run.
        instance: a `functools.partial`; anything else is returned as it is.

    Returns:
        A new partial without placeholders.

    Raises:
        ValueError: if the run has no such number.
    """
    return _replace(instance, trainer) if isinstance(instance, partial) else instance


def _replace(value: Any, trainer: Trainer) -> Any:
    if isinstance(value, _Arithmetic):
        return value.evaluate(trainer)
    if isinstance(value, partial):
        arguments = [_replace(item, trainer) for item in value.args]
        keywords = {name: _replace(item, trainer) for name, item in value.keywords.items()}
        return partial(value.func, *arguments, **keywords)
    # Exact types only: a subclass may not be constructible from its items.
    if type(value) in (list, tuple, set):
        return type(value)(_replace(item, trainer) for item in value)
    if type(value) is dict:
        return {key: _replace(item, trainer) for key, item in value.items()}
    return value
