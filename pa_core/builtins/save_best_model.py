"""Save the best model of a run, and load it at the end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pa_core.builtins.base import MetricWatcher, WatchSettings
from pa_core.checkpoint.model_file import read_checkpoint
from pa_core.errors import CheckpointError
from pa_core.hookspecs import hookimpl
from pa_core.plugin import LocalPath  # noqa: TC001 - pydantic reads the type
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class SaveBestModelSettings(WatchSettings):
    """Settings of the built-in plugin `save_best_model`."""

    save_path: LocalPath = Field(
        Path("best_model.pt"), description="The checkpoint file, usually ending in .pt."
    )
    save_optimizer: bool = Field(True, description="Whether to save the optimizer too.")
    save_scheduler: bool = Field(
        True, description="Whether to save the learning-rate scheduler too."
    )
    load_saved_checkpoint: bool = Field(
        True, description="Whether to load the best model at the end of the run."
    )
    on_save_error: Literal["warn", "stop"] = Field(
        "warn",
        description="What to do if the file can't be written, as on a full disk: warn or stop.",
    )
    model: str | None = Field(
        None,
        description="The evaluated model whose weights are saved, such as ema; by default the "
        "trained one.",
    )


class SaveBestModelCallback(MetricWatcher):
    """Saves the model with the best value of a metric so far, and loads the best at the end.

    Each new value counts, whether it is recorded at the end of an epoch or within it, as
    ``intermediate_eval_loss`` is. The model is saved before its next update.

    The checkpoint file is written by `Trainer.save_checkpoint`, and contains the metric under its
    name. At the end only a file that this run has saved is loaded, never one of another run.

    Args:
        save_path: the file; it should end in ``.pt``.
        watch_metric: name of the metric in the run history. A value that is NaN or infinite is
            never the best.
        greater_is_better: whether higher values are better.
        reset_on_train: whether each training run starts without a best value.
        save_optimizer: whether to save the optimizer too.
        save_scheduler: whether to save the learning-rate scheduler too.
        load_saved_checkpoint: whether to load the best model at the end of the run.
        model: the name of another evaluated model, such as a moving average of the trained one,
            whose weights are saved instead.
        on_save_error: if the file can't be written, as on a full disk, ``"warn"`` continues with
            the best model that is saved, and ``"stop"`` raises the error.

    Attributes:
        best_metric: the best value so far whose model is saved.
        best_metric_epoch: number of the epoch of that value.
    """

    Settings = SaveBestModelSettings
    locked_files = ("save_path",)  # no other live run may write it

    def __init__(
        self,
        save_path: str | Path = "best_model.pt",
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        load_saved_checkpoint: bool = True,
        model: str | None = None,
        on_save_error: Literal["warn", "stop"] = "warn",
    ) -> None:
        super().__init__(watch_metric, greater_is_better, reset_on_train)
        self.save_path = local_path(save_path)
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.load_saved_checkpoint = load_saved_checkpoint
        self.model = model
        self.on_save_error = on_save_error
        self.best_metric_epoch: int | None = None

    def reset(self) -> None:
        super().reset()
        self.best_metric_epoch = None

    @hookimpl(trylast=True)
    def on_watched_metric(self, trainer: Trainer, metric: str, value: float, **kwargs: Any) -> None:
        if metric != self.watch_metric or not self.is_better(value):
            return
        model, epoch = None, trainer.run_history.current_epoch
        if self.model is not None:
            model = trainer.plugins.find("register_eval_models", self.model, trainer=trainer)
        try:
            trainer.save_checkpoint(
                save_path=self.save_path,
                checkpoint_kwargs={self.watch_metric: value, "epoch": epoch},
                save_optimizer=self.save_optimizer,
                save_scheduler=self.save_scheduler,
                model=model,
            )
        except (OSError, MemoryError, RuntimeError) as error:  # PyTorch raises the last for a disk
            if self.on_save_error == "stop":
                raise
            kept = f"still holds that of epoch {self.best_metric_epoch}"
            warnings.warn(
                f"The model of epoch {epoch}, which has the best {self.watch_metric} so far, "
                f"{value}, could not be saved: {type(error).__name__}: {error}. {self.save_path} "
                f"{'is not written' if self.best_metric is None else kept}, and training continues",
                stacklevel=2,
            )
        else:
            self.best_metric, self.best_metric_epoch = value, epoch

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if not self.load_saved_checkpoint or self.best_metric is None:
            return
        # Where the processes' working directories differ, it is where the main process of each
        # machine has written it. All of them load it, or none.
        paths = trainer.gather_objects(Path(self.save_path).absolute())
        path = next(filter(self._is_own_file, [paths[trainer.rank], *paths]), None)
        found = trainer.gather_objects(path)
        if path is None or None in found:
            text = "it was replaced or removed"
            if any(found):
                text = f"{text}, or rank {found.index(None)} can't read it"
            trainer.print(
                f"{self.save_path} isn't the model of epoch {self.best_metric_epoch}, the best of "
                f"this run: {text}. The best model is not loaded"
            )
            return
        trainer.print(
            f"Loading the model of epoch {self.best_metric_epoch}, which has the best "
            f"{self.watch_metric}: {self.best_metric}"
        )
        trainer.load_checkpoint(path)

    def _is_own_file(self, path: Path) -> bool:
        """Whether a file is the one that this run saved last, by its metric and epoch."""
        try:
            content = read_checkpoint(path, map_location="meta", mmap=True)
        except (OSError, CheckpointError):
            return False
        mine = (self.best_metric, self.best_metric_epoch)
        return (content.get(self.watch_metric), content.get("epoch")) == mine

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_metric_epoch": self.best_metric_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.best_metric_epoch = state["best_metric_epoch"]
