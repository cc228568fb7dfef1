"""Every hook of the loop, in the order in which it happens. This file is the manual of plugins.

Read as a program, a training run is::

    on_training_run_start
    for each epoch:
        on_train_epoch_start
        for each micro-batch:
            on_train_step_start
            calculate_train_batch_loss
            on_backward_start                  # may replace batch_output["loss"]
            (the gradients are computed)
            on_backward_end
            if the accumulated batch is complete:
                (the gradients are clipped)
                on_optimizer_step_start
                (optimizer, schedule, and the gradients are dropped)
                on_optimizer_step_end
            on_train_step_end
            (what `trainer.control` was asked for: log, evaluate, save, stop)
        on_train_epoch_end
        on_eval_epoch_start, on_eval_step_start, on_eval_step_end …, on_eval_epoch_end
        on_training_run_epoch_end
    on_training_run_end

A plugin implements any of these with any subset of the arguments, which are given by name. Events
(``on_…``) return nothing. Providers (a verb first) return a value: the first that isn't None
counts, and the Trainer's own behaviour is the last implementation. A step's Trainer method is
called before its event. A plugin with ``runs_on = "main"`` has its events on the main process
alone, and everything else on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from torch import nn

    from pa_core.errors import StopTrainingError
    from pa_core.trainer import Trainer

PROJECT = "pa_core"

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a function as the specification of a hook; for plugins that have hooks of their own."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of its name.

``@hookimpl(tryfirst=True)`` and ``trylast=True`` change the order, ``wrapper=True`` surrounds the
others, ``specname="…"`` names the hook, and ``optionalhook=True`` allows that nobody specifies it.
"""


# -- Events: training -----------------------------------------------------------------------------


@hookspec
def on_init_end(trainer: Trainer) -> None:
    """The trainer is built.

    When: once, at the end of ``Trainer(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_training_run_start(trainer: Trainer) -> None:
    """A training run starts: model, loaders, schedule and `trainer.run_config` are ready.

    When: once per ``train(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_train_epoch_start(trainer: Trainer) -> None:
    """The training part of an epoch starts; the model is in training mode.

    When: once per epoch. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_train_step_start(trainer: Trainer, batch: Any, step: int) -> None:
    """A micro-batch was fetched and is on the device.

    Args:
        trainer: the trainer.
        batch: what the training loader yields.
        step: number of the micro-batch in the epoch, from 0 on.

    When: once per micro-batch. Runs on: every process. May synchronise: no.
    """


@hookspec
def on_backward_start(
    trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
) -> None:
    """The loss is calculated, its gradients are not; ``batch_output["loss"]`` may be replaced.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: ``loss`` (shape ``()``, never scaled), ``model_outputs``, ``batch_size`` and
            whatever else was returned.
        step: number of the micro-batch in the epoch.

    When: once per micro-batch. Runs on: every process. May synchronise: no.
    """


@hookspec
def on_backward_end(trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int) -> None:
    """The micro-batch's gradients were added to the accumulated ones.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: what `on_backward_start` has left of it.
        step: number of the micro-batch in the epoch.

    When: once per micro-batch. Runs on: every process. May synchronise: no.
    """


@hookspec
def on_optimizer_step_start(trainer: Trainer) -> None:
    """The accumulated batch is complete and its gradients are clipped; the update comes next.

    When: once per update. Runs on: every process. May synchronise: no.
    """


@hookspec
def on_optimizer_step_end(trainer: Trainer) -> None:
    """The parameters are updated, the schedule is stepped, the gradients are dropped.

    When: once per update. Runs on: every process. May synchronise: no.
    """


@hookspec
def on_train_step_end(
    trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
) -> None:
    """All of a micro-batch is done, its update included where it completed one.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: the loss, unscaled, the model's outputs and the batch's size.
        step: number of the micro-batch in the epoch.

    When: once per micro-batch. Runs on: every process. May synchronise: no.
    """


@hookspec
def on_train_epoch_end(trainer: Trainer) -> None:
    """The training part of an epoch is done; ``train_loss_epoch`` is recorded.

    When: once per epoch. Runs on: every process. May synchronise: yes.
    """


# -- Events: evaluation ---------------------------------------------------------------------------


@hookspec
def on_eval_epoch_start(trainer: Trainer, is_intermediate: bool) -> None:
    """An evaluation over one dataset starts; the model is in evaluation mode.

    Args:
        trainer: the trainer; ``trainer.eval_name`` says which of several datasets it is.
        is_intermediate: whether it is in the middle of a training epoch.

    When: once per evaluation and dataset. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_eval_step_start(trainer: Trainer, batch: Any, step: int) -> None:
    """An evaluation batch was fetched and is on the device.

    Args:
        trainer: the trainer.
        batch: what the evaluation loader yields.
        step: number of the batch, from 0 on.

    When: once per evaluation batch. Runs on: processes that have one. May synchronise: no.
    """


@hookspec
def on_eval_step_end(trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int) -> None:
    """An evaluation batch is done.

    Args:
        trainer: the trainer.
        batch: the batch.
        batch_output: ``loss``, ``model_outputs``, ``batch_size`` and whatever else was returned.
        step: number of the batch.

    When: once per evaluation batch. Runs on: processes that have one. May synchronise: no.
    """


@hookspec
def on_eval_epoch_end(trainer: Trainer, is_intermediate: bool) -> None:
    """An evaluation is done and its loss is recorded; metrics are recorded here.

    Args:
        trainer: the trainer.
        is_intermediate: whether it was in the middle of a training epoch.

    When: once per evaluation and dataset. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_training_run_epoch_end(trainer: Trainer) -> None:
    """Both parts of an epoch are done, and all that they measure is in the run history.

    When: once per epoch. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_training_run_end(trainer: Trainer) -> None:
    """The run is over, at its full length or stopped early; the model is out of its containers.

    When: once per ``train(...)``, unless it fails. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_evaluation_run_start(trainer: Trainer) -> None:
    """``evaluate(...)`` starts.

    When: once per ``evaluate(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_evaluation_run_end(trainer: Trainer) -> None:
    """``evaluate(...)`` is over.

    When: once per ``evaluate(...)``. Runs on: every process. May synchronise: yes.
    """


# -- Events: ends other than the usual, and states ------------------------------------------------


@hookspec
def on_stop_training_error(trainer: Trainer, error: StopTrainingError) -> None:
    """The run is stopped early, by ``trainer.control.stop`` or a raised `StopTrainingError`.

    Args:
        trainer: the trainer.
        error: its text is the reason.

    When: at most once per run. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_exception(trainer: Trainer, exception: BaseException) -> None:
    """Anything else was raised, ctrl-C included, and will be raised on.

    Args:
        trainer: the trainer.
        exception: what was raised.

    When: at most once per run. Runs on: the process it was raised on. May synchronise: no, others
    may not be there any more.
    """


@hookspec
def on_save_training_state(trainer: Trainer, state_dir: Path) -> None:
    """A training state is about to be written; files put into `state_dir` become part of it.

    Args:
        trainer: the trainer, at the update boundary that the state is of.
        state_dir: the directory, not yet in its place, and still without the core's own files. What
            is written here is hashed and flushed later, perhaps while training goes on: write
            it whole, and don't touch it again.

    When: once per save, before anything else is written, also for a state that is then written in
    the background. Runs on: every process. May synchronise: yes.
    """


@hookspec
def on_save_training_state_error(trainer: Trainer, state_dir: Path, error: Exception) -> None:
    """A training state could not be written, and the run goes on.

    Where it must be saved (`SaveRequest.must`), the error ends the run: `on_exception` tells of it.

    Args:
        trainer: the trainer.
        state_dir: the directory that the state would have become.
        error: why; `OtherProcessError` where it has failed on another process.

    When: once per such save, as the loop hears of it. Runs on: the process that writes, and others
    where they have waited for it. May synchronise: no.
    """


@hookspec
def on_load_training_state(trainer: Trainer, state_dir: Path) -> None:
    """A training state was put back, the plugins' own state included.

    Args:
        trainer: the trainer.
        state_dir: the directory it was read from.

    When: once per load. Runs on: every process. May synchronise: yes.
    """


# -- Providers: the first value that isn't None counts --------------------------------------------


@hookspec(firstresult=True)
def create_accelerator(trainer: Trainer) -> Accelerator | None:
    """Create the accelerator. By default with the Trainer's arguments.

    When: once, in ``Trainer(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec(firstresult=True)
def create_optimizer(trainer: Trainer) -> Any:
    """Create the optimizer over ``trainer.model``'s parameters, where the user has given none.

    When: once, in ``Trainer(..., optimizer=None)``. Runs on: every process. May synchronise: no.
    """


@hookspec(firstresult=True)
def create_train_dataloader(
    trainer: Trainer, batch_size: int, train_dl_kwargs: dict[str, Any] | None
) -> Any:
    """Create the loader of ``trainer.train_dataset``.

    Args:
        trainer: the trainer.
        batch_size: samples per process.
        train_dl_kwargs: what the user has given for the `DataLoader`.

    When: once per ``train(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec(firstresult=True)
def create_eval_dataloader(
    trainer: Trainer, batch_size: int, eval_dl_kwargs: dict[str, Any] | None
) -> Any:
    """Create the loader of ``trainer.eval_dataset``.

    Args:
        trainer: the trainer.
        batch_size: samples per process.
        eval_dl_kwargs: what the user has given for the `DataLoader`.

    When: once per run and evaluation dataset. Runs on: every process. May synchronise: yes.
    """


@hookspec(firstresult=True)
def create_scheduler(trainer: Trainer) -> Any:
    """Create the run's schedule over ``trainer.optimizer``; it is stepped once per update.

    By default what ``trainer.create_scheduler_fn`` says: a function, or a registered name.

    When: once per ``train(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec(firstresult=True)
def calculate_train_batch_loss(trainer: Trainer, batch: Any) -> dict[str, Any] | None:
    """Calculate a training batch's loss: a dict with ``loss``, ``model_outputs``, ``batch_size``.

    By default ``loss_func(model(batch[0]), batch[1])``.

    Args:
        trainer: the trainer.
        batch: the micro-batch, on the device.

    When: once per micro-batch. Runs on: every process. May synchronise: no.
    """


@hookspec(firstresult=True)
def calculate_eval_batch_loss(trainer: Trainer, batch: Any) -> dict[str, Any] | None:
    """Calculate an evaluation batch's loss; returns what the training one returns.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.

    When: once per evaluation batch. Runs on: processes that have one. May synchronise: no.
    """


@hookspec(firstresult=True)
def calculate_predictions(trainer: Trainer, batch: Any) -> Any:
    """Calculate a batch's predictions, the first dimension being the samples.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.

    When: once per batch of ``predict(...)``. Runs on: processes that have one. May synchronise: no.
    """


# -- Runs: hooks to wrap, with @hookimpl(wrapper=True) --------------------------------------------


@hookspec(firstresult=True)
def run_training(trainer: Trainer) -> Any:
    """Run the whole training. Wrap it to surround the run, and to close whatever is raised.

    When: once per ``train(...)``. Runs on: every process. May synchronise: yes.
    """


@hookspec(firstresult=True)
def run_evaluation(trainer: Trainer) -> Any:
    """Run the whole of ``evaluate(...)``. Wrap it like `run_training`.

    When: once per ``evaluate(...)``. Runs on: every process. May synchronise: yes.
    """


# -- Registries: named things of all plugins ------------------------------------------------------


@hookspec
def register_schedulers() -> Mapping[str, Callable[..., Any]]:
    """Schedules by name: ``factory(optimizer, num_updates, num_epochs)`` returns one.

    The run's length is None where it isn't known beforehand, for a stream or a time limit, and
    ``num_epochs`` is a fraction where the run ends within an epoch. A factory that needs a length
    which isn't known raises `ValueError`.

    When: as a name is looked up. Runs on: every process. May synchronise: no.
    """
    return {}


@hookspec
def register_models() -> Mapping[str, Callable[..., Any]]:
    """Models by name: ``factory(**kwargs)`` returns an `nn.Module`.

    When: as a name is looked up. Runs on: every process. May synchronise: no.
    """
    return {}


@hookspec
def register_metrics() -> Mapping[str, Callable[..., Any]]:
    """Metrics by name: ``factory(**kwargs)`` returns a metric.

    When: as a name is looked up. Runs on: every process. May synchronise: no.
    """
    return {}


@hookspec
def register_eval_models(trainer: Trainer) -> Mapping[str, nn.Module]:
    """More models to evaluate beside the one that is trained, such as a moving average of it.

    Each evaluation is also done with each of them as ``trainer.model``, and with all its events.
    What is recorded then has the name before it: ``ema_eval_loss_epoch``, ``ema_accuracy``.

    When: as an evaluation starts. Runs on: every process. May synchronise: yes.
    """
    return {}
