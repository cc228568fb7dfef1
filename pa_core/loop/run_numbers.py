"""The numbers of a run that schedulers depend on, and the values that schedulers change."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pa_core.data.loader import num_batches
from pa_core.placeholders import replace_trainer_placeholder_values

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of a run that a scheduler may depend on; None if unknown.

    Attributes:
        num_updates: the run's length in updates.
        num_epochs: the same in epochs. If the length of an epoch has changed within the run, in
            epochs of the present length, so that their product is `num_updates`.
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
        config, total = trainer.run_config, trainer.num_updates
        epochs, per_epoch = config.num_epochs, config.num_update_steps_per_epoch
        if past and total and per_epoch:
            epochs = total / per_epoch
            epochs = int(epochs) if epochs.is_integer() else epochs
        evaluated = next(iter(trainer.eval_dataloaders.values()), None)
        return cls(
            total,
            epochs,
            per_epoch,
            num_batches(trainer.train_dataloader),
            num_batches(evaluated),
            past,
        )

    @property
    def length(self) -> tuple[int | None, int | None]:
        """What a scheduler follows: the updates of the run and of an epoch."""
        return self.num_updates, self.updates_per_epoch

    def as_trainer(self) -> Any:
        """Stands in for a trainer whose placeholders have these numbers."""
        config = SimpleNamespace(
            num_epochs=self.num_epochs,
            num_update_steps_per_epoch=self.updates_per_epoch,
            num_local_update_steps_per_epoch=self.updates_per_epoch,
        )
        return SimpleNamespace(
            run_config=config,
            num_updates=self.num_updates,
            train_dataloader=range(self.train_batches or 0),
            eval_dataloaders={None: range(self.eval_batches or 0)},
        )


def build_scheduler(trainer: Trainer, numbers: RunNumbers, optimizer: Any) -> Any:
    """Build the scheduler of ``trainer.create_scheduler_fn`` for a run with these numbers."""
    create: Any = trainer.create_scheduler_fn
    if not isinstance(create, str):
        return replace_trainer_placeholder_values(numbers.as_trainer(), create)(optimizer)
    factory: Any = trainer.plugins.find("register_schedulers", create)
    total, per_epoch = numbers.length
    # Not the number of epochs: "500 updates" may end inside an epoch.
    return factory(
        optimizer,
        num_updates=total,
        num_epochs=total / per_epoch if total and per_epoch else None,
    )


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
