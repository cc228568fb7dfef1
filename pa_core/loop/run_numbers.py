"""The numbers of a run that schedulers depend on, and the values that schedulers change."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pa_core.data.loader import num_batches

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of a run that a scheduler may depend on; None if unknown.

    Attributes:
        num_updates: the run's length in updates.
        num_epochs: the same in epochs.
        updates_per_epoch: of the present data.
        train_batches: training batches of an epoch on this process.
        eval_batches: batches of the first evaluation dataset on this process.
        past: the epochs and updates of the run at each change of an epoch's length.
    """

    num_updates: int | None
    num_epochs: float | None
    updates_per_epoch: int | None
    train_batches: int | None = None
    eval_batches: int | None = None
    past: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of(cls, trainer: Trainer, past: tuple[tuple[float, int], ...] = ()) -> RunNumbers:
        """Those of the trainer's present run."""
        evaluated = next(iter(trainer.eval_dataloaders.values()), None)
        return cls(
            trainer.run_length.num_updates,  # a subclass may define its own num_updates
            trainer.run_config.num_epochs,
            trainer.run_config.num_update_steps_per_epoch,
            num_batches(trainer.train_dataloader),
            num_batches(evaluated),
            past,
        )

    @property
    def length(self) -> tuple[int | None, int | None]:
        """What a scheduler follows: the updates of the run and of an epoch."""
        return self.num_updates, self.updates_per_epoch

    @property
    def mean_updates_per_epoch(self) -> float | None:
        """The mean over all epochs of the run, once their lengths differ."""
        if not (self.past and self.num_updates and self.num_epochs):
            return self.updates_per_epoch
        return _integer(self.num_updates / self.num_epochs)

    def as_trainer(self, *, with_means: bool = True) -> Any:
        """Stands in for a trainer whose placeholders have these numbers.

        The product of epochs and updates per epoch must be the updates of the run. If the lengths
        of epochs differ, one of them isn't what it was.

        Args:
            with_means: whether the updates per epoch are their mean; else the epochs are counted in
                epochs of the present length.
        """
        epochs, per_epoch = self.num_epochs, self.mean_updates_per_epoch
        if not with_means and self.num_updates and self.updates_per_epoch:
            per_epoch = self.updates_per_epoch
            epochs = _integer(self.num_updates / per_epoch)
        config = SimpleNamespace(
            num_epochs=epochs,
            num_update_steps_per_epoch=per_epoch,
            num_local_update_steps_per_epoch=per_epoch,
        )
        return SimpleNamespace(
            run_config=config,
            num_updates=self.num_updates,
            train_dataloader=range(self.train_batches or 0),
            eval_dataloaders={None: range(self.eval_batches or 0)},
        )


def build_scheduler(trainer: Trainer, numbers: RunNumbers, create: Any, optimizer: Any) -> Any:
    """Build a scheduler from what creates it, a function or a name, for a run of these numbers."""
    if isinstance(create, str):
        factory: Any = trainer.plugins.find("register_schedulers", create)
        total, per_epoch = numbers.length
        # Not the number of epochs: "500 updates" may end inside an epoch.
        num_epochs = total / per_epoch if total and per_epoch else None
        return factory(optimizer, num_updates=total, num_epochs=num_epochs)
    from pa_core.placeholders import replace_trainer_placeholder_values

    try:
        return replace_trainer_placeholder_values(numbers.as_trainer(), create)(optimizer)
    except (TypeError, ValueError):
        if not isinstance(numbers.mean_updates_per_epoch, float):
            raise
    # Some schedulers take whole numbers only.
    present = numbers.as_trainer(with_means=False)
    return replace_trainer_placeholder_values(present, create)(optimizer)


def _integer(number: float) -> float:
    return int(number) if number.is_integer() else number


def values_of(optimizer: Any) -> Groups:
    """The values of an optimizer's groups, without the parameters."""
    return [
        {key: copied(value) for key, value in group.items() if key not in _NOT_VALUES}
        for group in optimizer.param_groups
    ]


def set_values(optimizer: Any, values: Groups) -> None:
    """Set the values of an optimizer's groups; tensors are filled in place."""
    for group, own in zip(optimizer.param_groups, values, strict=True):
        for key in [key for key in group if key not in own and key not in _NOT_VALUES]:
            del group[key]
        for key, value in own.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)  # compiled optimizers hold a reference to it
            else:
                group[key] = copied(value)


_NOT_VALUES = ("params", "param_names")


def copied(value: Any) -> Any:
    """A value of a group, not shared with it."""
    return value.clone() if isinstance(value, Tensor) else value
