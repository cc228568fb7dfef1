"""Callbacks: the base class, the handler, and the built-in callbacks by class name.

The built-in callbacks live in `pa_core.builtins`, one per file, and are imported when first used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from pa_core.errors import StopTrainingError
from pa_core.plugins.builtin_names import BUILTINS, DEFAULTS
from pa_core.plugins.manager import PluginManager

if TYPE_CHECKING:
    from pa_core.builtins.checkpoint import SaveTrainingStateCallback
    from pa_core.builtins.early_stopping import EarlyStoppingCallback
    from pa_core.builtins.fast_dev_run import FastDevRunCallback
    from pa_core.builtins.limit_batches import LimitBatchesCallback
    from pa_core.builtins.limit_eval_steps import LimitEvalStepsCallback
    from pa_core.builtins.live_plot import LivePlotCallback
    from pa_core.builtins.log_metrics import LogMetricsCallback
    from pa_core.builtins.model_summary import ModelSummaryCallback
    from pa_core.builtins.move_modules_to_device import MoveModulesToDeviceCallback
    from pa_core.builtins.overfit import OverfitCallback
    from pa_core.builtins.preemption import PreemptionCallback
    from pa_core.builtins.print_metrics import PrintMetricsCallback
    from pa_core.builtins.print_progress import PrintProgressCallback
    from pa_core.builtins.progress_bar import ProgressBarCallback
    from pa_core.builtins.progress_table import ProgressTableCallback
    from pa_core.builtins.save_best_model import SaveBestModelCallback
    from pa_core.builtins.speedups import SpeedupsCallback
    from pa_core.builtins.step_evaluation import StepBasedEvaluationCallback
    from pa_core.builtins.terminate_on_nan import TerminateOnNaNCallback
    from pa_core.trainer import Trainer

__all__ = [
    "CallbackHandler",
    "EarlyStoppingCallback",
    "FastDevRunCallback",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "LivePlotCallback",
    "ModelSummaryCallback",
    "MoveModulesToDeviceCallback",
    "OverfitCallback",
    "PreemptionCallback",
    "PrintMetricsCallback",
    "PrintProgressCallback",
    "ProgressBarCallback",
    "ProgressTableCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "SpeedupsCallback",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "TerminateOnNaNCallback",
    "TrainerCallback",
    "get_default_callbacks",
]

_HOMES = {target.partition(":")[2]: target.partition(":")[0] for target in BUILTINS.values()}


def __getattr__(name: str) -> Any:
    if name == "ProfileCallback":
        # Not an AttributeError, whose text `from pa_core.callbacks import …` would drop.
        raise ImportError(
            "ProfileCallback is part of pa-lab: pip install pa-lab, and import it from pa_lab"
        )
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def get_default_callbacks(
    progress_bar: bool = True,
) -> tuple[type[TrainerCallback] | TrainerCallback, ...]:
    """The callbacks of a `Trainer` to which no `callbacks` are passed.

    Args:
        progress_bar: whether to include the progress bar.
    """
    kinds = [__getattr__(BUILTINS[name].partition(":")[2]) for name in DEFAULTS]
    return tuple(
        kind(bar=False) if kind.__name__ == "ProgressTableCallback" and not progress_bar else kind
        for kind in kinds
    )


class TrainerCallback:
    """Base class of callbacks: each ``on_…`` method that a subclass defines is called.

    A method takes the trainer and any of its event's other arguments by name, or all of them with
    ``**kwargs``. Events that it doesn't define cost nothing; an unknown ``on_…`` name is an error
    when the callback is added. A subclass may also implement other hooks, marked with
    `pa_core.hookimpl`, which takes ``tryfirst`` and ``trylast`` as well.

    The state of a callback with `state_dict` and `load_state_dict` is part of every training state.
    `pa_core.hookspecs` describes each event.

    Attributes:
        runs_on: ``"all"``, or ``"main"`` to call its events on the main process only.
        follows_weights: the keys of its state that are restored together with the weights when a
            run rolls back, as `TerminateOnNaNCallback` may do; the others describe the whole run.
    """

    runs_on = "all"
    follows_weights: ClassVar[tuple[str, ...]] = ()

    # The plugin manager recognises callbacks by this mark, as it can't import this module.
    _is_trainer_callback = True

    # For completion in editors and for `super()`. The plugin manager skips these methods, so they
    # cost nothing. `*args, **kwargs` lets a type checker accept any arguments in a subclass.

    def on_init_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_training_run_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_train_step_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_backward_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_backward_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_gradients_ready(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_optimizer_step_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_optimizer_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_optimizer_step_skipped(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_train_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_train_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_eval_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_eval_step_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_eval_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_eval_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_training_run_epoch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_watched_metric(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_training_run_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_evaluation_run_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_evaluation_run_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_predict_step_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_stop_training_error(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_exception(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_save_training_state(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_training_state_saved(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_save_training_state_error(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...

    def on_load_training_state(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None: ...


class CallbackHandler:
    """The trainer's plugins as a list of callbacks.

    Args:
        callbacks: a plugin manager; or callback classes and instances, for which a new manager is
            created, and which are called in this order.
    """

    def __init__(self, callbacks: PluginManager | Iterable[Any] = ()) -> None:
        if isinstance(callbacks, PluginManager):
            self.plugins = callbacks
        else:
            self.plugins = PluginManager()
            self.add_callbacks(callbacks)

    def add_callback(self, callback: Any) -> None:
        """Add a callback after the others.

        Args:
            callback: an instance, or a class that is built without arguments.

        Raises:
            PluginError: if it can't be built, or defines an unknown event.
        """
        self.plugins.register(callback)

    def add_callbacks(self, callbacks: Iterable[Any]) -> None:
        """Add callbacks in this order, after the others."""
        for callback in callbacks:
            self.add_callback(callback)

    def clear_callbacks(self) -> None:
        """Remove all callbacks, including those enabled by the settings."""
        for name in list(self.plugins.by_name):
            self.plugins.unregister(name)

    @property
    def callbacks(self) -> MutableSequence[Any]:
        """The callbacks in the order of the calls; to change it adds and removes callbacks."""
        return _Callbacks(self.plugins)

    @property
    def callback_list(self) -> list[str]:
        """The callbacks' class names."""
        return [type(callback).__name__ for callback in self.callbacks]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.callbacks)

    def call_event(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Call an event on every callback that defines it.

        Args:
            event: the event's name; any other name calls the method of that name on every callback
                that has one.
            *args: for an event, the trainer, unless it is given by name; for any other name, the
                method's arguments, which need no trainer.
            **kwargs: the other arguments by name.
        """
        self.plugins.call_event(event, *args, **kwargs)


class _Callbacks(MutableSequence[Any]):
    """The plugins of a manager as a list, which registers what is added to it."""

    def __init__(self, plugins: PluginManager) -> None:
        self._plugins = plugins

    def _list(self) -> list[Any]:
        return list(self._plugins.by_name.values())

    def __len__(self) -> int:
        return len(self._plugins.by_name)

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __delitem__(self, index: Any) -> None:
        names = list(self._plugins.by_name)[index]
        for name in [names] if isinstance(names, str) else names:
            self._plugins.unregister(name)

    def __setitem__(self, index: Any, callback: Any) -> None:
        place = range(len(self))[index]
        if isinstance(place, range):
            raise TypeError("Replace callbacks one at a time, or clear them and add others")
        del self[place]
        self.insert(place, callback)

    def insert(self, index: int, callback: Any) -> None:
        plugins = self._plugins
        later, sources = list(plugins.by_name)[index:], plugins.sources
        plugins.register(callback)
        for name in later:  # behind the new one, in their order
            plugins.register(plugins.unregister(name), name, sources[name])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._list() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._list())
