"""The plugin ``curriculum``."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pa_core import Trainer


class CurriculumPlugin:
    """Trains on the easiest samples first, and on more of them in each epoch.

    The part of the data grows linearly from `start` in the first epoch to all of them in epoch
    `epochs`. It depends on nothing but the number of the epoch, so a resumed run needs no state.

    Args:
        settings: the plugin's table.

    Raises:
        TypeError: at the start of a run whose training data aren't a dataset with a length.
        ValueError: if there isn't one difficulty per sample.
    """

    class Settings(BaseModel):
        """The table ``[tool.pa-core.curriculum]``."""

        model_config = ConfigDict(extra="forbid")

        start: float = Field(
            0.25, gt=0, le=1, description="The part of the data in the first epoch."
        )
        epochs: int = Field(
            5, ge=1, description="The number of the first epoch with all of the data."
        )
        difficulties: Path | None = Field(
            None,
            description="A text file with a number per sample, larger for harder ones; by default "
            "the data are in the order of their difficulty.",
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._data: Any = None  # all of the training data
        self._order: list[int] = []  # from easy to hard

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        data = self._data = trainer.train_dataset
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(
                f"curriculum needs a dataset with a length and indices, not a {type(data).__name__}"
            )
        difficulties = self.difficulties(data)
        if len(difficulties) != len(data):
            raise ValueError(
                f"curriculum has {len(difficulties)} difficulties for {len(data)} samples"
            )
        self._order = sorted(range(len(data)), key=lambda sample: difficulties[sample])
        try:
            return (yield)
        finally:
            trainer.train_dataset, self._data, self._order = data, None, []

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        from torch.utils.data import Subset

        count = self.count(len(self._order), trainer.position.epoch_of_run + 1)
        is_all = count == len(self._order)
        trainer.train_dataset = self._data if is_all else Subset(self._data, self._order[:count])

    # -- To override ----------------------------------------------------------------------------

    def difficulties(self, data: Any) -> Sequence[float]:
        """The difficulty of each sample; larger for harder ones."""
        if self.settings.difficulties is None:
            return range(len(data))
        return [float(line) for line in self.settings.difficulties.read_text().split()]

    def count(self, samples: int, epoch: int) -> int:
        """The number of samples to train on, of this many, in an epoch, counted from 1."""
        start, epochs = self.settings.start, self.settings.epochs
        grown = 1.0 if epoch >= epochs else start + (1 - start) * (epoch - 1) / (epochs - 1)
        return math.ceil(grown * samples)
