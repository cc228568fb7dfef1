"""Train on the same few batches in every epoch, to see whether the model can learn them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch.utils.data import RandomSampler

from pa_core.data.ready import is_loader
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class OverfitSettings(CallbackSettings):
    """Settings of the built-in plugin `overfit`."""

    num_batches: int = Field(
        1, ge=1, description="Batches per process; the same ones in every epoch."
    )


class OverfitCallback(ConfigurableCallback):
    """Trains on the first batches of the unshuffled dataset in every epoch.

    Evaluations are unchanged.

    Args:
        num_batches: batches (micro-batches, with gradient accumulation) per process.

    Raises:
        ValueError: in `train`, if the given loader shuffles.
    """

    Settings = OverfitSettings

    def __init__(self, num_batches: int = 1) -> None:
        self.num_batches = num_batches

    @hookimpl(tryfirst=True)
    def create_train_dataloader(
        self, trainer: Trainer, batch_size: int, train_dl_kwargs: dict[str, Any] | None
    ) -> Any:
        trainer.train_batch_limit = self.num_batches
        data = trainer.train_dataset
        shuffles = isinstance(getattr(data, "sampler", None), RandomSampler)
        if is_loader(data) and shuffles:
            raise ValueError(
                "overfit needs the same batches in every epoch, but the given loader shuffles: "
                "pass the dataset, or a loader with shuffle=False"
            )
        kwargs = {**(train_dl_kwargs or {}), "shuffle": False}
        *_, default = trainer.plugins.implementations("create_train_dataloader")
        return default.call(
            {"trainer": trainer, "batch_size": batch_size, "train_dl_kwargs": kwargs}
        )
