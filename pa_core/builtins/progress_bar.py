"""Show the progress of each epoch with a bar."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm.auto import tqdm

from pa_core.data.loader import num_batches
from pa_core.display.streams import shows_bars
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class ProgressBarSettings(CallbackSettings):
    """Settings of the built-in plugin `progress_bar`."""

    interval: float = Field(0.5, gt=0, description="Seconds between two refreshes of the bar.")


class ProgressBarCallback(ConfigurableCallback):
    """Shows a bar for each training and evaluation epoch, with the mean loss, and for predictions.

    It works in terminals and notebooks, on the main process only; elsewhere, as in a file or where
    ``TERM=dumb``, ``CI`` or ``NO_COLOR`` is set, there are no bars. Each display reads the loss,
    which is a host-device synchronisation. Bars are closed however a run ends.

    Args:
        interval: seconds between two displays.
    """

    Settings = ProgressBarSettings
    runs_on = "main"
    changes_training = False

    def __init__(self, interval: float = 0.5) -> None:
        self.interval = interval
        self.pbar: _Bar | None = None
        self.eval_pbar: _Bar | None = None
        self._predict_pbar: _Bar | None = None

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self._close_all()

    @hookimpl(wrapper=True)
    def run_evaluation(self, trainer: Trainer) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self._close_all()

    @hookimpl(wrapper=True)
    def run_prediction(self, trainer: Trainer, loader: Any) -> Generator[None, Any, Any]:
        if not trainer.is_main_process:
            return (yield)
        self._predict_pbar = bar = _Bar(num_batches(loader), "Prediction", self.interval)
        try:
            result = yield
            bar.finish()
        finally:
            self._predict_pbar = None
            bar.close()
        return result

    def on_predict_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._predict_pbar is not None:
            self._predict_pbar.advance()

    @hookimpl(trylast=True)  # below the lines that other plugins print
    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.pbar = _Bar(
            trainer.num_train_batches,
            f"Epoch {trainer.run_history.current_epoch}",
            self.interval,
            initial=trainer.position.batch,
        )

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.pbar is not None:
            self.pbar.advance(trainer)

    @hookimpl(tryfirst=True)  # before the lines that other plugins print
    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.pbar is not None:
            self.pbar.finish(trainer)
            self.pbar = None

    @hookimpl(trylast=True)
    def on_eval_epoch_start(
        self, trainer: Trainer, is_intermediate: bool = False, **kwargs: Any
    ) -> None:
        self.eval_pbar = _Bar(
            trainer.num_eval_batches,
            "Evaluation" if trainer.eval_name is None else f"Evaluation: {trainer.eval_name}",
            self.interval,
            leave=not is_intermediate,
        )

    def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.eval_pbar is not None:
            self.eval_pbar.advance(trainer)

    @hookimpl(tryfirst=True)
    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.eval_pbar is not None:
            self.eval_pbar.finish(trainer)
            self.eval_pbar = None

    def _close_all(self) -> None:
        for bar in (self.eval_pbar, self.pbar):
            if bar is not None:
                bar.close()
        self.pbar = self.eval_pbar = None


class _Bar(tqdm):
    """A tqdm bar that only counts between two displays."""

    def __init__(
        self,
        total: int | None,
        description: str,
        interval: float,
        initial: int = 0,
        leave: bool = True,
    ) -> None:
        super().__init__(
            total=total,
            desc=description,
            initial=initial,
            leave=leave,
            unit="batch",
            dynamic_ncols=True,
            disable=not shows_bars(),
            mininterval=0,  # advance() decides when to display
            miniters=1,
        )
        self._interval, self._uncounted = interval, 0
        self._next_display = time.monotonic() + interval

    def advance(self, trainer: Trainer | None = None) -> None:
        """Count a batch; if the interval has passed, show it, with the mean loss of a trainer."""
        self._uncounted += 1
        now = time.monotonic()
        if now >= self._next_display:
            self._next_display = now + self._interval
            self._show(trainer)

    def finish(self, trainer: Trainer | None = None) -> None:
        """Show the final state and close."""
        self._show(trainer)
        self.close()

    def _show(self, trainer: Trainer | None) -> None:
        if self.disable:
            return
        if trainer is not None:
            self.set_postfix_str(f"loss={trainer.mean_loss:.4g}", refresh=False)
        self.update(self._uncounted)
        self._uncounted = 0

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """Display the bar; if its stream is closed or gone, disable it."""
        try:
            return super().display(*args, **kwargs)
        except (OSError, ValueError):
            self.disable = True
            return None

    def close(self) -> None:
        """Close the bar, also if its stream is closed or gone."""
        with suppress(OSError, ValueError):
            super().close()
