"""Train on the same few batches again and again: a model that can't learn them is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch.utils.data import RandomSampler

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings
from pa_core.data.loader import is_loader
from pa_core.hookspecs import hookimpl
from pa_core.loop.defaults import Defaults

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class OverfitSettings(BuiltinSettings):
    """Settings of the built-in plugin `overfit`."""

    num_batches: int = Field(1, ge=1, description="Batches per process, the same in each epoch.")


class OverfitCallback(BuiltinCallback):
    """Trains in every epoch on the first batches in the dataset's order, which isn't shuffled.

    Evaluations stay as they are.

    Args:
        num_batches: batches (micro-batches, where gradients accumulate) per process.

    Raises:
        ValueError: in `train`, for a loader that shuffles by itself.
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
                "overfit needs the same batches in each epoch, and the given loader shuffles: give "
                "the dataset, or a loader with shuffle=False"
            )
        kwargs = {**(train_dl_kwargs or {}), "shuffle": False}
        return Defaults().create_train_dataloader(trainer, batch_size, kwargs)
