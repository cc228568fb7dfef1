"""Plot the loss in a notebook while the model trains."""

from __future__ import annotations

import base64
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pa_core.display.notebook import NotebookOutput
from pa_core.display.plot import Axis, is_wanted, notebook_png, plot_records
from pa_core.display.streams import in_notebook
from pa_core.errors import nearest
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback
from pa_core.tracking import records_of

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


class LivePlotSettings(CallbackSettings):
    """Settings of the built-in plugin `live_plot`."""

    metrics: list[str] = Field(
        ["loss"],
        min_length=1,
        description='Names of metrics, such as "eval_accuracy", or what several have in common, '
        'such as "loss"; each group has a chart.',
    )
    interval: float = Field(
        2.0,
        gt=0,
        description="The least seconds between two points of the current epoch, and between two "
        "drawings.",
    )
    x: Axis = Field("update", description="What the x-axis shows.")
    log: bool | None = Field(
        None,
        description="Whether the y-axes are logarithmic; by default those of losses that span "
        "orders of magnitude.",
    )


class LivePlotCallback(ConfigurableCallback):
    """Plots the loss in a notebook while the model trains; the saved notebook has the last plot.

    The plot is that of `RunHistory.plot`, with the mean training loss of the epoch so far, which is
    read for each drawing: a host-device synchronisation. Drawing takes at most a twentieth of the
    run's time. Outside of notebooks the plugin prints a line and does nothing else.

    Args:
        metrics: names of metrics, or what several have in common.
        interval: the least seconds between two points of the current epoch, and two drawings.
        x: what the x-axis shows.
        log: whether the y-axes are logarithmic; None for those of losses that span orders of
            magnitude.

    Raises:
        ImportError: when a run starts in a notebook and matplotlib isn't installed, with the pip
            command.
    """

    Settings = LivePlotSettings
    runs_on = "main"
    changes_training = False

    def __init__(
        self,
        metrics: Sequence[str] = ("loss",),
        interval: float = 2.0,
        x: Axis = "update",
        log: bool | None = None,
    ) -> None:
        self.metrics = list(metrics)
        self.interval, self.x, self.log = interval, x, log
        self._output: NotebookOutput | None = None
        self._so_far: list[dict[str, Any]] = []
        self._next_point = self._next_drawing = 0.0

    @hookimpl(wrapper=True)
    def run_training(self, trainer: Trainer) -> Generator[None, Any, Any]:
        self._output, self._so_far = None, []
        if in_notebook():
            try:
                import matplotlib.figure  # noqa: F401
            except ImportError:
                raise ImportError("live_plot needs matplotlib: pip install matplotlib") from None
            self._output = NotebookOutput()
        else:
            trainer.print("live_plot: this is not a notebook, so nothing is plotted")
        self._next_point = self._next_drawing = time.monotonic() + self.interval
        try:
            return (yield)
        finally:
            if self._output is not None:
                self._draw(trainer)
                self._report_missing(trainer)
            self._output = None

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._output is None or time.monotonic() < self._next_point:
            return
        progress = trainer.progress
        self._so_far.append(
            {
                "metric": "train_loss",
                "value": trainer.mean_loss,
                "epoch": trainer.run_history.current_epoch,
                "update": progress.updates,
                "samples": progress.samples,
                "seconds": progress.seconds,
            }
        )
        self._next_point = time.monotonic() + self.interval
        if self._is_due():
            self._draw(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        if self._is_due():
            self._draw(trainer)

    def _is_due(self) -> bool:
        return self._output is not None and time.monotonic() >= self._next_drawing

    def _draw(self, trainer: Trainer) -> None:
        started, records = time.monotonic(), records_of(trainer.run_history)
        if not any(record["metric"] == "train_loss" for record in records):
            # In the order of a history, which has them among the records of their epochs.
            records = sorted([*records, *self._so_far], key=_place)
        names = dict.fromkeys(record["metric"] for record in records)
        recorded = [wanted for wanted in self.metrics if is_wanted(wanted, names)]
        if self._output is None or not recorded:
            return
        figure = plot_records(records, recorded, x=self.x, log=self.log)
        picture = base64.b64encode(notebook_png(figure)).decode()
        text = f"Plot of {', '.join(recorded)} after {trainer.updates:,} updates"
        self._output.show({"image/png": picture, "text/plain": text})
        now = time.monotonic()
        self._next_drawing = now + max(self.interval, 20 * (now - started))

    def _report_missing(self, trainer: Trainer) -> None:
        names = list(trainer.run_history.get_metric_names())
        for wanted in self.metrics:
            if not is_wanted(wanted, names):
                trainer.print(
                    f"live_plot: the metric {wanted!r} was not recorded.{nearest(wanted, names)}"
                )


def _place(record: dict[str, Any]) -> tuple[int, int]:
    return record["epoch"], record["update"] or 0
