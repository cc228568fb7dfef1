"""The plugin ``sample_images``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pa_core.plugin import LocalPath
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from pa_core import Trainer
    from torch import Tensor

    from pa_sample_images.grid import Sample


class SampleImagesPlugin:
    """Draws a grid of samples after each evaluation, with predicted and true labels.

    The grid is saved as a PNG file and sent to trackers. It always shows the first samples that the
    main process evaluates, so that the grids of a run can be compared.

    For batches or outputs that aren't those of a classifier, override `read_samples`.

    Args:
        settings: the plugin's table.
    """

    runs_on = "main"
    changes_training = False

    class Settings(BaseModel):
        """The table ``[tool.pa-core.sample_images]``."""

        model_config = ConfigDict(extra="forbid")

        folder: LocalPath = Field(Path("samples"), description="The folder for the grids.")
        samples: int = Field(
            16, ge=1, le=400, description="The maximum number of images in a grid."
        )
        labels: list[str] = Field(
            [], description="The names of the classes; by default their numbers."
        )
        size: int = Field(
            96, ge=16, description="The longer side of an image in the grid, in pixels."
        )
        mean: list[float] = Field(
            [],
            description="The mean of each channel that the transforms subtracted, to be added "
            "again.",
        )
        std: list[float] = Field(
            [],
            description="The standard deviation that the transforms divided each channel by.",
        )

        @model_validator(mode="after")
        def _mean_and_std_fit(self) -> SampleImagesPlugin.Settings:
            if len(self.mean) != len(self.std) or len(self.mean) not in (0, 1, 3):
                raise ValueError(
                    "mean and std: expected both or neither, with one number per channel (1 or 3)"
                )
            return self

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._missing = 0
        self._is_evaluation = self._has_warned = False

    def read_samples(
        self, batch: Any, batch_output: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the images, predicted classes and true classes of an evaluation batch.

        This is called in each step until there are enough samples, and must not synchronise the
        host with the device.

        Args:
            batch: by default ``(images, targets)``.
            batch_output: by default with one score per class in ``model_outputs``, or one score per
                sample that is positive for class 1.

        Returns:
            Shapes ``(samples, channels, height, width)``, ``(samples,)`` and ``(samples,)``; None
            if the batch isn't one of images and classes.
        """
        import torch

        outputs = batch_output["model_outputs"]
        outputs = getattr(outputs, "logits", outputs)
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            return None
        images, true = batch[0], batch[1]
        if not all(isinstance(value, torch.Tensor) for value in (images, true, outputs)):
            return None
        if images.ndim != 4 or images.shape[1] not in (1, 3) or true.ndim not in (1, 2):
            return None
        if outputs.ndim == 2 and outputs.shape[1] > 1:
            predicted = outputs.argmax(1)
        elif outputs.numel() == len(images):
            predicted = (outputs.flatten() > 0).long()
        else:
            return None
        # Targets with two dimensions are class probabilities.
        return images, predicted, true if true.ndim == 1 else true.argmax(1)

    # -- Collecting -----------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_evaluation(self) -> Generator[None, Any, Any]:
        self._is_evaluation = True
        try:
            return (yield)
        finally:
            self._is_evaluation = False

    @hookimpl
    def on_eval_epoch_start(self) -> None:
        self._parts, self._missing = [], self.settings.samples

    @hookimpl(trylast=True)  # after plugins that change the outputs
    def on_eval_step_end(self, batch: Any, batch_output: dict[str, Any]) -> None:
        if self._missing <= 0:
            return
        found = self.read_samples(batch, batch_output)
        if found is not None:
            images, predicted, true = (
                part[: self._missing].detach().clone()
                for part in found  # a copy: a view would keep the whole batch in memory
            )
            self._parts.append((images, predicted, true))
            self._missing -= len(images)

    # -- Drawing --------------------------------------------------------------------------------

    @hookimpl
    def on_eval_epoch_end(self, trainer: Trainer) -> None:
        parts, self._parts = self._parts, []
        if not parts:
            self._warn(
                "found no images: it expects batches (images, targets) of a classifier, with "
                "images of shape (samples, 1 or 3, height, width). For other data, override "
                "read_samples in a subclass"
            )
            return
        from pa_sample_images.grid import draw_grid, to_tensor

        grid = draw_grid(
            [sample for part in parts for sample in self._samples(*part)], self.settings.size
        )
        prefix = trainer.run_history.metric_name_prefix  # with the names of dataset and model
        if self._is_evaluation:
            prefix = f"evaluation_{prefix}"
        file = self.settings.folder / f"{_as_name(prefix)}update_{trainer.updates:08d}.png"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            grid.save(file)
        except OSError as error:
            self._warn(f"can't write {file}: {error}")
        call = trainer.callback_handler.call_event
        call("log_images", trainer, name=f"{prefix}samples", images=to_tensor(grid))

    def _samples(self, images: Tensor, predicted: Tensor, true: Tensor) -> list[Sample]:
        from pa_sample_images.grid import Sample

        if self.settings.mean:
            mean, std = (
                images.new_tensor(values)[:, None, None]
                for values in (self.settings.mean, self.settings.std)
            )
            images = images * std + mean
        numbers = zip(images.cpu(), predicted.tolist(), true.tolist(), strict=True)
        return [Sample(image, self._label(p), self._label(t)) for image, p, t in numbers]

    def _label(self, number: float) -> str:
        labels, number = self.settings.labels, int(number)
        return labels[number] if 0 <= number < len(labels) else str(number)

    def _warn(self, what: str) -> None:
        """Warn once; a missing grid must not end the run."""
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"sample_images {what}. Training continues", stacklevel=2)


def _as_name(text: str) -> str:
    """Replace characters that file names can't contain."""
    return re.sub(r"[^\w.-]", "-", text)
