"""All hooks of the loop, in the order of the calls. This file is the reference for plugin authors.

A training run as pseudocode::

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
                (optimizer and scheduler step, gradients are zeroed)
                on_optimizer_step_end
            on_train_step_end
            (requests of `trainer.control`: log, evaluate, save, stop)
        on_train_epoch_end
        on_eval_epoch_start, on_eval_step_start, on_eval_step_end …, on_eval_epoch_end
        on_training_run_epoch_end
    on_training_run_end

A plugin implements any of these hooks with any subset of the arguments, which are passed by name.
Events (``on_…``) return nothing. Providers (``create_…``, ``calculate_…``, ``run_…``) return a
value: the first that isn't None is used, and the Trainer's default comes last. A method that the
Trainer has for an event, such as ``train_epoch_start`` for `on_train_epoch_start`, is called before
it. The events of a plugin with ``runs_on = "main"`` are called on the main process only, its other
hooks on every process.

Each hook states whether an implementation may use collectives (such as `trainer.gather`, or an
evaluation), and whether it may read tensors on the device, which makes the host wait for the
device. If the answer is no, a collective may hang, and either slows down every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator
    from torch import nn

    from pa_core.control import UpdateResult
    from pa_core.errors import StopTrainingError
    from pa_core.trainer import Trainer

PROJECT = "pa_core"

hookspec = pluggy.HookspecMarker(PROJECT)
"""Marks a function as the specification of a hook, for plugins that add hooks."""

hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of the same name.

``@hookimpl(tryfirst=True)`` and ``trylast=True`` change the order, ``wrapper=True`` surrounds the
other implementations, ``specname="…"`` names the hook, and ``optionalhook=True`` marks a hook of
another plugin, which need not be enabled.
"""


# -- Events: training -----------------------------------------------------------------------------


@hookspec
def on_init_end(trainer: Trainer) -> None:
    """The trainer is built.

    When: once, at the end of ``Trainer(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_run_start(trainer: Trainer) -> None:
    """A training run starts: model, loaders, scheduler and `trainer.run_config` are ready.

    When: once per ``train(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_train_epoch_start(trainer: Trainer) -> None:
    """The training part of an epoch starts; the model is in training mode.

    When: once per epoch. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_train_step_start(trainer: Trainer, batch: Any, step: int) -> None:
    """A micro-batch was fetched and is on the device.

    Args:
        trainer: the trainer.
        batch: what the training loader yields.
        step: index of the micro-batch in the epoch, from 0.

    When: once per micro-batch. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_backward_start(
    trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
) -> None:
    """The loss is calculated; ``batch_output["loss"]`` may be replaced before the backward pass.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: ``loss`` (shape ``()``, unscaled), ``model_outputs``, ``batch_size`` and
            whatever else the loss function returned.
        step: index of the micro-batch in the epoch.

    When: once per micro-batch. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_backward_end(trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int) -> None:
    """The micro-batch's gradients have been added to the accumulated ones.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: as `on_backward_start` left it.
        step: index of the micro-batch in the epoch.

    When: once per micro-batch. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_gradients_ready(trainer: Trainer) -> None:
    """The accumulated batch is complete: its gradients are reduced and unscaled, not clipped yet.

    When: once per accumulated batch, before `run_update`. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_optimizer_step_start(trainer: Trainer) -> None:
    """The gradients are unscaled and clipped; the update comes next.

    When: once per accumulated batch, unless its update is skipped by then. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_optimizer_step_end(trainer: Trainer) -> None:
    """The parameters and the learning rate have been updated, and the gradients zeroed.

    When: once per update that was made. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_optimizer_step_skipped(trainer: Trainer, reason: str) -> None:
    """The update was skipped: the parameters are unchanged, and the gradients zeroed.

    Args:
        trainer: the trainer.
        reason: ``"request"``, ``"overflow"`` of the gradient scaler, ``"non-finite"``, or what the
            plugin gave that requested it.

    When: once per skipped update. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_train_step_end(
    trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
) -> None:
    """A micro-batch is done, including the update if it completed one.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: the unscaled loss, the model's outputs and the batch size.
        step: index of the micro-batch in the epoch.

    When: once per micro-batch. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_train_epoch_end(trainer: Trainer) -> None:
    """The training part of an epoch is done, and ``train_loss_epoch`` is recorded.

    When: once per epoch. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Events: evaluation ---------------------------------------------------------------------------


@hookspec
def on_eval_epoch_start(trainer: Trainer, is_intermediate: bool) -> None:
    """An evaluation over one dataset starts; the model is in evaluation mode.

    Args:
        trainer: the trainer; ``trainer.eval_name`` names the dataset if there are several.
        is_intermediate: whether it takes place inside a training epoch.

    When: once per evaluation, dataset and evaluated model. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_eval_step_start(trainer: Trainer, batch: Any, step: int) -> None:
    """An evaluation batch was fetched and is on the device.

    Args:
        trainer: the trainer.
        batch: what the evaluation loader yields.
        step: index of the batch, from 0.

    When: once per evaluation batch. Runs on: processes that have one.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_eval_step_end(trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int) -> None:
    """An evaluation batch is done.

    Args:
        trainer: the trainer.
        batch: the batch.
        batch_output: ``loss``, ``model_outputs``, ``batch_size`` and whatever else the loss
            function returned.
        step: index of the batch.

    When: once per evaluation batch. Runs on: processes that have one.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_eval_epoch_end(trainer: Trainer, is_intermediate: bool) -> None:
    """An evaluation is done and its loss is recorded. Record metrics here.

    Args:
        trainer: the trainer.
        is_intermediate: whether it took place inside a training epoch.

    When: once per evaluation, dataset and evaluated model. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_run_epoch_end(trainer: Trainer) -> None:
    """Training and evaluation of an epoch are done, and all their metrics are in the run history.

    When: once per epoch. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_run_end(trainer: Trainer) -> None:
    """The run has ended, at its full length or stopped early; the model is unwrapped.

    When: once per ``train(...)``, unless it fails. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_evaluation_run_start(trainer: Trainer) -> None:
    """``evaluate(...)`` starts.

    When: once per ``evaluate(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_evaluation_run_end(trainer: Trainer) -> None:
    """``evaluate(...)`` ends.

    When: once per ``evaluate(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Events: early stops, exceptions and training states ------------------------------------------


@hookspec
def on_stop_training_error(trainer: Trainer, error: StopTrainingError) -> None:
    """The run stops early, by ``trainer.control.stop`` or a raised `StopTrainingError`.

    Args:
        trainer: the trainer.
        error: its text is the reason.

    When: at most once per run. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_exception(trainer: Trainer, exception: BaseException) -> None:
    """Any other exception was raised, KeyboardInterrupt included, and propagates after this.

    Args:
        trainer: the trainer.
        exception: the exception.

    When: at most once per run. Runs on: the process that raised it.
    Collectives allowed: no, as other processes may have ended. Reads the device: yes.
    """


@hookspec
def on_save_training_state(trainer: Trainer, state_dir: Path) -> None:
    """A training state is about to be written; files put into `state_dir` become part of it.

    Args:
        trainer: the trainer, at the update boundary that the state describes.
        state_dir: a temporary directory, still without the core's own files. Your files are hashed
            and flushed later, perhaps while training continues: write them completely, and don't
            change them afterwards.

    When: once per save, before anything else is written, also for a state that is then written
    in the background. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_state_saved(trainer: Trainer, state_dir: Path) -> None:
    """A training state is complete on disk.

    Args:
        trainer: the trainer, which may have trained on since.
        state_dir: the state's directory.

    When: at least once per state, at the next boundary, and before ``train(...)`` returns; once
    more when a run resumes from it. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_save_training_state_error(trainer: Trainer, state_dir: Path, error: Exception) -> None:
    """A training state could not be written, and the run continues.

    If the state must be saved (`SaveRequest.must`), the error ends the run and `on_exception` is
    called instead.

    Args:
        trainer: the trainer.
        state_dir: the directory that the state was meant for.
        error: the cause; an `OtherProcessError` if another process failed.

    When: once per such save, when the loop learns of it. Runs on: the process that writes, and
    others that waited for it.
    Collectives allowed: no. Reads the device: yes.
    """


@hookspec
def on_load_training_state(trainer: Trainer, state_dir: Path) -> None:
    """A training state was restored, including the state of the plugins.

    Args:
        trainer: the trainer.
        state_dir: the directory it was read from.

    When: once per load. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Providers: the first value that isn't None is used -------------------------------------------


@hookspec(firstresult=True)
def create_accelerator(trainer: Trainer) -> Accelerator | None:
    """Create the accelerator; by default from the Trainer's arguments.

    When: once, in ``Trainer(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def create_optimizer(trainer: Trainer) -> Any:
    """Create the optimizer for ``trainer.model``'s parameters, if the Trainer was given none.

    When: once, in ``Trainer(..., optimizer=None)``. Runs on: every process.
    Collectives allowed: no. Reads the device: yes.
    """


@hookspec(firstresult=True)
def create_train_dataloader(
    trainer: Trainer, batch_size: int, train_dl_kwargs: dict[str, Any] | None
) -> Any:
    """Create the data loader for ``trainer.train_dataset``.

    Args:
        trainer: the trainer.
        batch_size: samples per process.
        train_dl_kwargs: the user's arguments for the `DataLoader`.

    When: once per ``train(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def create_eval_dataloader(
    trainer: Trainer, batch_size: int, eval_dl_kwargs: dict[str, Any] | None
) -> Any:
    """Create the data loader for ``trainer.eval_dataset``.

    Args:
        trainer: the trainer.
        batch_size: samples per process.
        eval_dl_kwargs: the user's arguments for the `DataLoader`.

    When: once per run and evaluation dataset. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def create_scheduler(trainer: Trainer) -> Any:
    """Create the learning-rate scheduler for ``trainer.optimizer``; it is stepped once per update.

    By default from ``trainer.create_scheduler_fn``: a function, or a registered name.

    When: once per ``train(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def calculate_train_batch_loss(trainer: Trainer, batch: Any) -> dict[str, Any] | None:
    """Calculate a training batch's loss: a dict of ``loss``, ``model_outputs`` and ``batch_size``.

    By default ``loss_func(model(batch[0]), batch[1])``.

    Args:
        trainer: the trainer.
        batch: the micro-batch, on the device.

    When: once per micro-batch. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec(firstresult=True)
def calculate_eval_batch_loss(trainer: Trainer, batch: Any) -> dict[str, Any] | None:
    """Calculate an evaluation batch's loss: a dict as in `calculate_train_batch_loss`.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.

    When: once per evaluation batch. Runs on: processes that have one.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec(firstresult=True)
def calculate_predictions(trainer: Trainer, batch: Any) -> Any:
    """Calculate a batch's predictions; the first dimension is the samples.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.

    When: once per batch of ``predict(...)``. Runs on: processes that have one.
    Collectives allowed: no. Reads the device: no.
    """


# -- Runs: hooks to wrap, with @hookimpl(wrapper=True) --------------------------------------------


@hookspec(firstresult=True)
def run_training(trainer: Trainer) -> Any:
    """Run the whole training. Wrap it to set up and clean up around the run, even if it fails.

    When: once per ``train(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def run_update(trainer: Trainer) -> UpdateResult:
    """Make the update of an accumulated batch; wrap or replace it.

    By default ``trainer.clip_gradients()`` and then ``trainer.apply_update()``. A replacement calls
    both too, and returns the latter's result.

    When: once per accumulated batch. Runs on: every process.
    Collectives allowed: yes. Reads the device: no.
    """


@hookspec(firstresult=True)
def run_evaluation(trainer: Trainer) -> Any:
    """Run the whole of ``evaluate(...)``. Wrap it like `run_training`.

    When: once per ``evaluate(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Registries: objects by name, collected from all plugins --------------------------------------


@hookspec
def register_schedulers() -> Mapping[str, Callable[..., Any]]:
    """Learning-rate schedulers by name: ``factory(optimizer, num_updates, num_epochs)``.

    Both lengths are None if the run's length isn't known in advance, as for a stream or a time
    limit; ``num_epochs`` is a fraction if the run ends within an epoch. A factory that needs an
    unknown length raises `ValueError`.

    When: whenever a name is looked up. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """
    return {}


@hookspec
def register_models() -> Mapping[str, Callable[..., Any]]:
    """Models by name: ``factory(**kwargs)`` returns an `nn.Module`.

    When: whenever a name is looked up. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """
    return {}


@hookspec
def register_metrics() -> Mapping[str, Callable[..., Any]]:
    """Metrics by name: ``factory(**kwargs)`` returns a metric.

    When: whenever a name is looked up. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """
    return {}


@hookspec
def register_eval_models(trainer: Trainer) -> Mapping[str, nn.Module]:
    """More models to evaluate besides the trained one, such as a moving average of it.

    Each evaluation is repeated with each of them as ``trainer.model``, with all its events. The
    names of its metrics are prefixed: ``ema_eval_loss_epoch``, ``ema_accuracy``.

    When: whenever an evaluation starts. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """
    return {}
