"""The plugin `metrics`: records metrics of training and evaluation in the run history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pa_core import hookimpl
from pa_core.errors import SettingsError, nearest
from pa_core.plugin import LocalPath, settings_from_options
from pa_core.tracking import instance_metric_name
from pa_metrics.factory import build_metric, history_name, import_path

if TYPE_CHECKING:
    from torch import nn
    from torchmetrics import Metric, MetricCollection

    from pa_core import Trainer
    from pa_metrics.epoch_metrics import EpochMetrics, Kept
    from pa_metrics.plots import Show
    from pa_metrics.preds_and_target import ToPredsAndTarget

When = Literal["eval", "train"]

_PREFIX: dict[When, str] = {"eval": "", "train": "train_"}
"""Of the metrics' names in the history."""


class MetricsSettings(BaseModel):
    """The table ``[tool.pa-core.metrics]``."""

    model_config = ConfigDict(extra="forbid")

    metrics: list[str] | dict[str, str | dict[str, Any]] = Field(
        default=["accuracy"],
        description="Names of metrics, or a table from the name in the history to a metric's name "
        "or a table of its arguments, with the metric's name as `class` if it is different.",
    )
    on: list[When] = Field(default=["eval"], description='"eval", "train", or a list of both.')
    task: Literal["binary", "multiclass", "multilabel"] | None = Field(
        None, description="The classification task, for all metrics with a `task`."
    )
    num_classes: int | None = Field(None, ge=1, description="For all metrics that accept it.")
    num_labels: int | None = Field(None, ge=1, description="For all metrics that accept it.")
    average: Literal["micro", "macro", "weighted", "none"] | None = Field(
        None, description="For all metrics that accept it."
    )
    top_k: int | None = Field(None, ge=1, description="For all metrics that accept it.")
    ignore_index: int | None = Field(None, description="For all metrics that accept it.")
    to_preds_and_target: str | None = Field(
        None,
        description="How to extract the metrics' inputs: a name such as causal_language_model, or "
        "the dotted path of a function of batch and batch output that returns the arguments of "
        "`update`. By default chosen for each metric.",
    )
    plots: LocalPath | None = Field(
        None,
        description="A folder for plots of matrices, curves and values over epochs. Without it, "
        "plots of matrices and curves are still sent to plugins such as tracking.",
    )

    @field_validator("metrics")
    @classmethod
    def _classes_are_names(cls, value: Any) -> Any:
        for name, metric in value.items() if isinstance(value, dict) else ():
            if isinstance(metric, dict) and not isinstance(metric.get("class", ""), str):
                raise ValueError(f"{name}: expected a name as class, got {metric['class']!r}")
        return value

    @field_validator("on", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments for all metrics that accept them."""
        names = ("task", "num_classes", "num_labels", "average", "top_k", "ignore_index")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class MetricsOptions(TypedDict, total=False):
    """The options of `MetricsPlugin`: the keys of its table, for type checkers."""

    metrics: Sequence[str] | Mapping[str, str | Mapping[str, Any]]
    on: When | Sequence[When]
    task: Literal["binary", "multiclass", "multilabel"] | None
    num_classes: int | None
    num_labels: int | None
    average: Literal["micro", "macro", "weighted", "none"] | None
    top_k: int | None
    ignore_index: int | None
    plots: str | Path | None


class MetricsPlugin:
    """Records torchmetrics metrics in the run history: ``accuracy``, ``train_accuracy``.

    The metrics are built, and torchmetrics imported, when the Trainer is built: a mistake in their
    names or arguments is raised there. Plugins that save or log see an epoch's values whatever the
    order of plugins, since their hooks run last.

    Args:
        settings: the plugin's table.
        to_preds_and_target: a function of the batch and the batch output that returns the arguments
            of the metrics' ``update``, or the name of one; by default chosen for each metric.
        options: keys of the table, instead of `settings`.

    Raises:
        SettingsError: for mistakes in the options, as for those in the table.

    >>> plugin = MetricsPlugin(metrics=["accuracy", "F1Score"], task="multiclass", num_classes=10)
    >>> plugin.settings.on
    ['eval']
    """

    Settings = MetricsSettings

    def __init__(
        self,
        settings: MetricsSettings | None = None,
        *,
        to_preds_and_target: ToPredsAndTarget | str | None = None,
        **options: Unpack[MetricsOptions],
    ) -> None:
        given: dict[str, Any] = {**options}
        if isinstance(to_preds_and_target, str):
            given["to_preds_and_target"], to_preds_and_target = to_preds_and_target, None
        self.settings = settings_from_options(MetricsSettings, settings, given, type(self).__name__)
        self._to_inputs = to_preds_and_target
        self._given: MetricCollection | None = None
        self._built: MetricCollection | None = None
        self._metrics: dict[When, EpochMetrics] = {}
        # What the metrics keep from one evaluation to the next of the same data and model.
        self._kept: dict[str, Kept] = {}
        self._name = ""  # the plugin's, in the trainer

    @classmethod
    def of(
        cls,
        metrics: Metric | MetricCollection | Mapping[str, Metric],
        *,
        on: When | list[When] = "eval",
        to_preds_and_target: ToPredsAndTarget | str | None = None,
        plots: str | Path | None = None,
    ) -> Self:
        """Create a plugin with metric objects.

        Args:
            metrics: a metric, recorded under its class name in snake case, or a collection or
                mapping with the names in the history.
            on: ``"eval"``, ``"train"``, or a list of both.
            to_preds_and_target: as for the class.
            plots: a folder for plots.
        """
        from torchmetrics import Metric, MetricCollection

        plugin = cls(to_preds_and_target=to_preds_and_target, on=on, plots=plots)
        if isinstance(metrics, Metric):
            metrics = {history_name(type(metrics).__name__): metrics}
        plugin._given = (
            metrics if isinstance(metrics, MetricCollection) else MetricCollection(dict(metrics))
        )
        return plugin

    @hookimpl
    def on_init_end(self, trainer: Trainer) -> None:
        """Build the metrics; all mistakes in the settings are raised together."""
        self._build(trainer)

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        """Prepare the metrics for the model and the device."""
        self._prepare(trainer)
        self._kept = {}
        for metrics in self._metrics.values():
            metrics.restore_kept({})

    @hookimpl
    def on_training_run_end(self, trainer: Trainer) -> None:
        """Plot the values over the epochs."""
        if self.settings.plots is None or not trainer.is_main_process:
            return
        from pa_metrics.plots import plot_history

        history = trainer.run_history
        metrics = {
            instance_metric_name(self._name, _PREFIX[when] + name): metric
            for when, epoch in self._metrics.items()
            for name, metric in epoch.metrics.items()
        }
        values = {name: history.get_metric_values(name) for name in metrics}
        plot_history(self.settings.plots, metrics, values, _log_figure(trainer))

    @hookimpl
    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Prepare the metrics for the model and the device."""
        self._prepare(trainer)

    @hookimpl
    def on_train_epoch_start(self) -> None:
        """Reset the training metrics."""
        self._reset("train")

    @hookimpl
    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: Mapping[str, Any]
    ) -> None:
        """Update the training metrics, except with a padding batch."""
        if not trainer.is_padding_batch:
            self._update("train", batch, batch_output)

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Record the training metrics."""
        self._record("train", trainer)

    @hookimpl
    def on_eval_epoch_start(self, trainer: Trainer) -> None:
        """Reset the evaluation metrics."""
        self._reset("eval")
        if "eval" in self._metrics:
            place = trainer.run_history.metric_name_prefix
            kept = self._kept.get(place, {}) if trainer.in_run else {}
            self._metrics["eval"].restore_kept(kept)

    @hookimpl
    def on_eval_step_end(self, batch: Any, batch_output: Mapping[str, Any]) -> None:
        """Update the evaluation metrics."""
        self._update("eval", batch, batch_output)

    @hookimpl
    def on_eval_epoch_end(self, trainer: Trainer) -> None:
        """Record the evaluation metrics."""
        self._record("eval", trainer)

    def state_dict(self) -> dict[str, Any]:
        """The training metrics accumulated in the epoch so far, on this process.

        Of evaluation metrics it has what they keep after an evaluation: training states are never
        saved during one.
        """
        from pa_metrics.distributed import rank

        state: dict[str, Any] = {"evaluations": self._kept} if self._kept else {}
        if "train" in self._metrics:
            train = self._metrics["train"]
            state |= {"process": rank(), "train": train.state_dict()}
            if kept := train.kept():
                state["kept"] = kept
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the epoch's training metrics, and what evaluation metrics keep."""
        self._kept = dict(state.get("evaluations", {}))
        if "train" not in state or "train" not in self._metrics:
            return
        from pa_metrics.distributed import rank

        if state["process"] == rank():
            self._metrics["train"].load_state_dict(state["train"])
        else:  # there are more processes now: the state counts on the rank that saved it
            self._metrics["train"].reset()
        self._metrics["train"].restore_kept(state.get("kept", {}))

    def _build(self, trainer: Trainer) -> MetricCollection:
        """Build the metrics, once.

        Raises:
            SettingsError: with all mistakes in the settings.
        """
        if self._built is not None:
            return self._built
        from torchmetrics import MetricCollection

        if self.settings.plots is not None:
            from pa_metrics.plots import check_matplotlib

            check_matplotlib()
        built: dict[str, Any] = {}
        problems: list[str] = []
        if self._given is not None:
            built = dict(self._given.items(keep_base=True))
        else:
            registered = trainer.plugins.registry("register_metrics")
            used: set[str] = set()
            for name, (class_name, arguments) in self._configured().items():
                try:
                    built[name] = build_metric(
                        class_name, arguments, registered, self.settings.shared, used
                    )
                except ValueError as error:
                    problems.append(f"The metric {name!r}: {error}")
            if not problems:
                problems += [
                    f"{option}: none of the metrics {', '.join(built)} accepts it"
                    for option in self.settings.shared.keys() - used
                ]
        try:
            if self._to_inputs is None and self._named_inputs() is None:
                problems += _aggregations(built)
        except ValueError as error:
            problems.append(f"to_preds_and_target: {error}")
        if trainer.num_processes > 1:
            problems += _windows(built)
        if problems:
            raise SettingsError(problems)
        self._built = MetricCollection(built) if self._given is None else self._given
        return self._built

    def _prepare(self, trainer: Trainer) -> None:
        if not self._metrics:
            built = self._build(trainer)
            model = trainer.get_model(keep_torch_compile=False)
            self._metrics = {when: self._create(built, model) for when in self.settings.on}
        self._name = next(
            (name for name, one in trainer.plugins.by_name.items() if one is self), ""
        )
        self._claim(trainer)
        for metrics in self._metrics.values():
            metrics.to(trainer.device)

    def _claim(self, trainer: Trainer) -> None:
        """Have another plugin that records the same metrics refused before the first batch."""
        history = trainer.run_history
        if not hasattr(history, "claim_metric"):  # not a subclass of `RunHistory`
            return
        starts = {"train": trainer.in_run, "eval": None in trainer.eval_dataloaders}
        for when, metrics in self._metrics.items():
            for name in metrics.metrics if starts[when] else ():
                history.claim_metric(_PREFIX[when] + name)

    def _create(self, built: MetricCollection, model: nn.Module) -> EpochMetrics:
        from pa_metrics.epoch_metrics import EpochMetrics
        from pa_metrics.preds_and_target import inputs_for

        collection, check_once = built.clone(), set[str]()
        if self._given is None:
            configured = self._configured().items()
            check_once = {name for name, (_, own) in configured if "validate_args" not in own}
        chosen = self._to_inputs or self._named_inputs()
        to_inputs = {
            name: inputs_for(metric, model, chosen)
            for name, metric in collection.items(keep_base=True)
        }
        return EpochMetrics(collection, to_inputs, check_once)

    def _configured(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """The class and arguments of each metric in the settings, by its name in the history."""
        metrics = self.settings.metrics
        if isinstance(metrics, list):
            return {history_name(name): (name, {}) for name in metrics}
        configured = {}
        for name, metric in metrics.items():
            arguments = {"class": metric} if isinstance(metric, str) else dict(metric)
            # `class` is a Python keyword, so that it can't be the name of an argument.
            configured[name] = (arguments.pop("class", name), arguments)
        return configured

    def _named_inputs(self) -> ToPredsAndTarget | None:
        from pa_metrics.preds_and_target import NAMED

        path = self.settings.to_preds_and_target
        if path is None or path in NAMED:
            return None if path is None else NAMED[path]
        if "." not in path:
            hint = f"{nearest(path, NAMED)} Expected a dotted path or one of {', '.join(NAMED)}"
            raise ValueError(f"there is no {path!r}.{hint}")
        function: ToPredsAndTarget = import_path(path)
        return function

    def _reset(self, when: When) -> None:
        if when in self._metrics:
            self._metrics[when].reset()

    def _update(self, when: When, batch: Any, batch_output: Mapping[str, Any]) -> None:
        if when in self._metrics:
            self._metrics[when].update(batch, batch_output)

    def _record(self, when: When, trainer: Trainer) -> None:
        if when not in self._metrics:
            return
        from pa_metrics.epoch_metrics import to_plain

        metrics, values = self._metrics[when], self._metrics[when].compute()
        for name, value in values.items():
            trainer.run_history.update_metric(_PREFIX[when] + name, to_plain(value))
        names = [
            name
            for name, value in values.items()
            if trainer.is_main_process and (self.settings.plots or _needs_figure(trainer, value))
        ]
        if names:
            from pa_metrics.plots import plot_values

            shown, drawn = (
                {
                    instance_metric_name(self._name, _PREFIX[when] + name): each[name]
                    for name in names
                    if name in each
                }
                for each in (metrics.metrics, values)
            )
            prefix = trainer.run_history.metric_name_prefix
            plot_values(self.settings.plots, shown, drawn, prefix, _log_figure(trainer))
        metrics.reset()  # frees memory: some metrics keep all predictions
        if when == "eval" and trainer.in_run and (kept := metrics.kept()):
            self._kept[trainer.run_history.metric_name_prefix] = kept


def _aggregations(metrics: Mapping[str, Metric]) -> list[str]:
    """Mistakes: metrics that don't compare predictions with targets, without inputs chosen."""
    from pa_metrics.preds_and_target import aggregates

    return [
        f"The metric {name!r} aggregates values, not predictions and targets: set "
        "to_preds_and_target to a function of the batch and the batch output that returns the "
        "values, or record a mean with trainer.record_mean"
        for name, metric in sorted(metrics.items())
        if aggregates(metric)
    ]


def _windows(metrics: Mapping[str, Metric]) -> list[str]:
    """Mistakes: metrics over a window of updates, which differs between processes."""
    from torchmetrics.wrappers import Running

    return [
        f"The metric {name!r} is a window over the last updates (Running), which is not "
        "supported on several processes: use one process, or the metric without Running"
        for name, metric in sorted(metrics.items())
        if any(isinstance(module, Running) for module in metric.modules())
    ]


def _needs_figure(trainer: Trainer, value: Any) -> bool:
    """Whether a plugin receives figures by the event `log_figure` and doesn't draw the value.

    Drawing takes a third of a second, so that a figure that no plugin shows isn't drawn.
    """
    return any(
        hasattr(plugin, "log_figure")
        and not (hasattr(plugin, "draws_numbers") and plugin.draws_numbers(value))
        for plugin in trainer.plugins.by_name.values()
    )


def _log_figure(trainer: Trainer) -> Show:
    """A function that sends figures to other plugins through the event `log_figure`."""

    def show(name: str, figure: Any) -> None:
        trainer.callback_handler.call_event("log_figure", trainer, name=name, figure=figure)

    return show
