"""The hooks: the loop with each hook in its place, then the contract of each hook.

This file is the reference for plugin authors. `LOOP` is the loop in pseudocode, from top to bottom.
`pa explain` and the pages of the documentation are made from it.

A plugin implements any of these hooks with any subset of the arguments, which are passed by name.
Events (``on_…``) return nothing. Providers (``create_…``, ``calculate_…``) and runs (``run_…``)
return a value: the first that isn't None is used, and the Trainer's default comes last. Registries
(``register_…``) collect from all plugins. A wrong value is an error that names the plugin, the hook
and what was expected. A wrapper may return another result than its ``yield`` gives; if it returns
nothing, the result stays. The events of a plugin with ``runs_on = "main"`` are called on the main
process only, its other hooks on every process.

Each docstring ends with the hook's contract: when it is called and on which processes, whether an
implementation may use collectives (such as `trainer.gather`, or an evaluation), and whether it may
read tensors on the device, which makes the host wait for the device. If the answer is no, a
collective may hang, and either slows down every step. Hooks in the innermost loops, over batches,
allow neither, except that `run_update` allows collectives; most others allow both.
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
other implementations and keeps their result unless it returns another, ``specname="…"`` names the
hook, and ``optionalhook=True`` marks a hook of another plugin, which need not be enabled.
"""


LOOP = """
Trainer(...):
    create_optimizer                            # unless one was given
    create_accelerator                          # unless one was given
    on_init_end

train(...):
    create_train_dataloader                     # again when the data change
    create_eval_dataloader                      # for each evaluation dataset
    create_scheduler
    # A resumed run restores weights, optimizer, scheduler, scaler, history and position here.
    run_training:                               # to wrap
        training_run_start()                    on_training_run_start
        # A run resumed between epochs, or before an evaluation, restores its plugins here.
        for each epoch:                         # until the run has its length
            train_epoch_start()                 on_train_epoch_start
            # A run resumed within the epoch restores its plugins here.
            for each micro-batch:               # a padding batch on a rank without samples
                on_train_step_start             # the batch is on the device
                calculate_train_batch_loss
                on_backward_start               # may replace batch_output["loss"]
                backward_step()                 # adds to the gradients of the accumulated batch
                on_backward_end
                if the accumulated batch is complete:
                    on_gradients_ready          # reduced and unscaled, not clipped
                    run_update:                 # to wrap or replace
                        clip_gradients()
                        apply_update():
                            on_optimizer_step_start     # unless a skip was requested
                            optimizer_step()            # unless a skip was requested
                            scheduler_step()            # unless the update was skipped
                            optimizer_zero_grad()
                            on_optimizer_step_end       # the parameters have changed, or
                            on_optimizer_step_skipped   # they have not
                on_train_step_end               # after the update, if there was one
                # After an update, requests are granted: log, evaluate, save, stop or pause.
                # Before saving and stopping, on_watched_metric is called for values recorded since.
            train_epoch_end()                   on_train_epoch_end
            # Requests are granted.
            register_eval_models
            for each model and evaluation dataset:      # on request also within the epoch
                eval_epoch_start()              on_eval_epoch_start
                for each evaluation batch:
                    on_eval_step_start          # the batch is on the device
                    calculate_eval_batch_loss
                    on_eval_step_end
                eval_epoch_end()                on_eval_epoch_end
            training_run_epoch_end()            on_training_run_epoch_end
            for each new value of a watched metric:     # also at other boundaries
                on_watched_metric
            # Requests are granted.
        if stopped or paused:                   # by a request, or a StopTrainingError
            on_stop_training_error
        # States being written are completed.
        training_run_end()                      on_training_run_end
        # States requested in on_training_run_end are saved, and completed.
    if any other exception was raised:          # and nothing else follows
        on_exception

evaluate(...):                                  # in a run, too, which it leaves unchanged
    # The evaluation loaders are created as in train(...).
    run_evaluation:                             # to wrap
        evaluation_run_start()                  on_evaluation_run_start
        # Each model and dataset is evaluated as in train(...), then requests to stop are granted.
        # If stopped: on_stop_training_error.
        evaluation_run_end()                    on_evaluation_run_end
    # If any other exception was raised: on_exception.

predict(...):
    # The loader is created by create_eval_dataloader; eval_epoch_start() has no event here.
    run_prediction:                             # to wrap or replace
        for each batch:
            calculate_predictions
            on_predict_step_end

a training state is saved:                      # at a granted request; outside runs, at once
    on_save_training_state                      # before anything is written
    on_training_state_saved                     # complete on disk, perhaps at a later update, or
    on_save_training_state_error                # not saved, and the run continues

a training state is restored:                   # resuming, load_training_state(), rolling back
    on_load_training_state                      # then on_training_state_saved, if a run resumes

a name is looked up:
    register_schedulers
    register_models
    register_metrics
"""
"""The loop in the order of the calls, one row a line; indented rows belong to the row above.

A row is a method of the Trainer, ``name()``, which a subclass may override; a hook; or both, the
method being called first. The method of a provider has the provider's name. Other rows begin a
phase. What follows ``#`` is a remark: on its row, or on what the loop itself does at this point.
"unless" means that the row may be left out, "or" that either it or the next one is called.
"""


# -- Events: training -----------------------------------------------------------------------------


@hookspec
def on_init_end(trainer: Trainer) -> None:
    """The trainer is built: it has its model, optimizer, accelerator and plugins, but no data yet.

    The ``__init__`` of a subclass may still have more to do after the Trainer's own.

    When: once, at the end of ``Trainer(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_run_start(trainer: Trainer) -> None:
    """A training run starts: model, loaders, scheduler and `trainer.run_config` are ready.

    In a resumed run, ``trainer.is_resuming`` is true: model, optimizer, scheduler and history are
    restored, but the plugins' own state isn't yet. Data that are changed here are used at once.

    When: once per ``train(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_train_epoch_start(trainer: Trainer) -> None:
    """The training part of an epoch starts; the model is in training mode.

    In a run that is resumed within an epoch, this is called again for that epoch, so that plugins
    can set up, and the plugins' own state is restored afterwards. ``trainer.is_resuming`` is true
    in that call only. Training data that are changed here are used in this epoch.

    When: once per epoch, and again if a run resumes within it. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_train_step_start(trainer: Trainer, batch: Any, step: int) -> None:
    """A micro-batch was fetched and is on the device.

    If the last batch of an epoch has fewer samples than there are processes, a rank without samples
    gets a padding batch, which counts for nothing: ``trainer.is_padding_batch`` is true in this and
    the other hooks of the step. So does a rank whose own split of the data ends before another's.

    Args:
        trainer: the trainer.
        batch: what the training loader yields.
        step: index of the micro-batch in the epoch, from 0.

    When: once per micro-batch, padding batches included. Runs on: every process.
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

    When: once per micro-batch, padding batches included, and again when ``recompute_gradients()``
    runs it again. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_backward_end(trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int) -> None:
    """The micro-batch's gradients have been added to the accumulated ones.

    They aren't final yet: until the accumulated batch is complete, they are those of this process
    alone, and a gradient scaler's factor is still in them. `on_gradients_ready` has the final ones.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: as `on_backward_start` left it.
        step: index of the micro-batch in the epoch.

    When: once per micro-batch, padding batches included. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_gradients_ready(trainer: Trainer) -> None:
    """The gradients of the accumulated batch are final: reduced and unscaled, not clipped yet.

    Each parameter's ``grad`` is the gradient of the mean loss over the accumulated batch, the same
    on every process (under FSDP, each process has its shard). Change the gradients here, in place,
    or request to skip the update. With a gradient scaler they may be infinite or NaN, in which case
    the update is skipped afterwards. A padding batch adds nothing to them.

    DeepSpeed keeps its gradients to itself: a plugin that implements this is refused under it.

    When: once per accumulated batch, before `run_update`. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_optimizer_step_start(trainer: Trainer) -> None:
    """The gradients are final and clipped; the update comes next, unless it is skipped here.

    They are unscaled, too. Under DeepSpeed, which clips within its update, parameters have no
    ``grad`` here.

    When: once per accumulated batch, unless its update is skipped before. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_optimizer_step_end(trainer: Trainer) -> None:
    """The parameters have changed: optimizer and scheduler have been stepped, the gradients zeroed.

    ``trainer.updates`` counts this update already. `on_optimizer_step_skipped` is called instead
    if the update was skipped.

    When: once per update made. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_optimizer_step_skipped(trainer: Trainer, reason: str) -> None:
    """The update was skipped: the parameters and the learning rate are unchanged, gradients zeroed.

    ``trainer.updates`` doesn't count it, ``trainer.position.skipped`` does. A training state that
    is due waits for the next update made, or the end of the epoch. After 100 skipped updates in a
    row (``trainer.max_skipped_in_a_row``) the run stops.

    Args:
        trainer: the trainer.
        reason: ``"request"`` (of ``trainer.control.skip_update()``, or its own text),
            ``"overflow"`` (the gradient scaler found one, and lowers its scale) or ``"non-finite"``
            (a plugin found a gradient that is infinite or NaN).

    When: once per skipped update. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_train_step_end(
    trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
) -> None:
    """A micro-batch is done, including the update if it completed one.

    What is requested of `trainer.control` here is granted right after it, if the micro-batch
    completed an accumulated batch.

    Args:
        trainer: the trainer.
        batch: the micro-batch.
        batch_output: the unscaled loss, the model's outputs and the batch size.
        step: index of the micro-batch in the epoch.

    When: once per micro-batch, padding batches included. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec
def on_train_epoch_end(trainer: Trainer) -> None:
    """The training part of an epoch is done, and ``train_loss_epoch`` is recorded.

    If the run is stopped or paused within the epoch, this and the epoch's evaluation don't follow.

    When: once per completed epoch. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Events: evaluation ---------------------------------------------------------------------------


@hookspec
def on_eval_epoch_start(trainer: Trainer, is_intermediate: bool) -> None:
    """An evaluation over one dataset starts; the model is in evaluation mode.

    ``trainer.model`` is the evaluated model, and ``trainer.eval_name`` the name of the dataset if
    there are several.

    Args:
        trainer: the trainer.
        is_intermediate: whether it was requested within a training epoch, rather than following
            one or being part of ``evaluate(...)``.

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
        is_intermediate: whether it was requested within a training epoch.

    When: once per evaluation, dataset and evaluated model. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_run_epoch_end(trainer: Trainer) -> None:
    """Training and evaluation of an epoch are done, and their metrics are in the run history.

    What is requested of `trainer.control` here is granted right after it, at the end of the epoch.

    When: once per completed epoch. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_watched_metric(trainer: Trainer, metric: str, value: float) -> None:
    """A watched metric has a new value; decide here what follows from it.

    A plugin lists the metrics that it watches as ``watched_metrics``, an attribute or property with
    their names. The event is called once for each value that is recorded within the run, in the
    order of recording, also if the run is interrupted and resumed in between. It is called for the
    metrics of other plugins, too, so compare `metric`.

    The weights are still those that the value belongs to: it is called after an evaluation within
    an epoch, after an update if a value was recorded in its step, at the start of the run, at the
    end of an epoch for what was recorded since its last update, and at the end of a stopped run.
    With several processes a value that was recorded in a step is announced when they next agree on
    requests, or at once with ``trainer.control.announce_metrics(everywhere=True)``.

    The value is that of the main process, on every process. If only others have recorded it, that
    is an error. What `Trainer.evaluate` records within a run counts only under names with
    ``evaluation_``.

    Args:
        trainer: the trainer.
        metric: its name in the run history.
        value: the value as a number, perhaps NaN.

    When: once per value of a metric that any plugin watches. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_training_run_end(trainer: Trainer) -> None:
    """The run has ended at its full length, or was stopped or paused; the model is unwrapped.

    States requested earlier are complete on disk. A state requested here with `trainer.control` is
    saved right afterwards, and complete before ``train(...)`` returns; other requests come too
    late.

    When: once per ``train(...)``, unless it raises. Runs on: every process.
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
    """``evaluate(...)`` ends, complete or stopped.

    When: once per ``evaluate(...)``, unless it raises. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Events: prediction ---------------------------------------------------------------------------


@hookspec
def on_predict_step_end(trainer: Trainer, batch: Any, predictions: Any, step: int) -> None:
    """The predictions of a batch are made.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.
        predictions: what `calculate_predictions` has returned, on the CPU.
        step: index of the batch on this process, from 0.

    When: once per batch of ``predict(...)``. Runs on: processes that have one.
    Collectives allowed: no. Reads the device: no.
    """


# -- Events: early stops, exceptions and training states ------------------------------------------


@hookspec
def on_stop_training_error(trainer: Trainer, error: StopTrainingError) -> None:
    """A run, or ``evaluate(...)``, ends early: by a request to stop or pause, or by this error.

    The event of the end follows, `on_training_run_end` or `on_evaluation_run_end`; those of an
    unfinished epoch don't. ``trainer.position.is_paused`` is true if the run is to be resumed.

    Args:
        trainer: the trainer.
        error: its text is the reason.

    When: at most once per ``train(...)`` and ``evaluate(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec
def on_exception(trainer: Trainer, exception: BaseException) -> None:
    """Any other exception ends the run or ``evaluate(...)``; it propagates after this.

    KeyboardInterrupt is included; the clean exit of the plugin `preemption` is not. No event of the
    run follows, and the wrappers of `run_training` have already closed.

    Args:
        trainer: the trainer.
        exception: the exception.

    When: at most once per ``train(...)`` and ``evaluate(...)``, unless it is raised before their
    first event. Runs on: the process that raised it.
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
    """A training state is complete on disk; upload or copy it here.

    It is called in the loop's own thread, so a state written in the background is reported between
    two later updates, on every process at the same one, and before retention may remove the state.

    Args:
        trainer: the trainer, which may have trained on since.
        state_dir: the state's directory.

    When: once per state, before ``train(...)`` returns; again after `on_load_training_state`, for
    the state that a run resumes from, in case it was killed in between. Runs on: every process.
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

    When: once per such save, when the loop learns of it. Runs on: all processes.
    Collectives allowed: no. Reads the device: yes.
    """


@hookspec
def on_load_training_state(trainer: Trainer, state_dir: Path) -> None:
    """A training state was restored, including the state of the plugins.

    In a resumed run this follows the last event before training continues: `on_training_run_start`,
    or within an epoch `on_train_epoch_start`; ``trainer.is_resuming`` is still true. Training data
    that are changed here are used at once.

    Args:
        trainer: the trainer.
        state_dir: the directory it was read from.

    When: once per resumed run and ``load_training_state(...)``; when the weights are rolled back,
    only for plugins with ``follows_weights``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


# -- Providers: the first value that isn't None is used -------------------------------------------


@hookspec(firstresult=True)
def create_accelerator(trainer: Trainer) -> Accelerator | None:
    """Create the accelerator; by default from the Trainer's arguments.

    When: once, in ``Trainer(...)``, unless it is given one. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def create_optimizer(trainer: Trainer) -> Any:
    """Create the optimizer for ``trainer.model``'s parameters, if the Trainer was given none.

    It may be a list of optimizers, with disjoint parameters.

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

    When: once per ``train(...)``, and again when the data change. Runs on: every process.
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

    When: once per evaluation dataset in ``train(...)`` and ``evaluate(...)``, again when the data
    change, and once in ``predict(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def create_scheduler(trainer: Trainer) -> Any:
    """Create the learning-rate scheduler for ``trainer.optimizer``; it is stepped once per update.

    By default from ``trainer.create_scheduler_fn``: a function, a registered name, or a scheduler
    of this optimizer; with several optimizers, one for each of them.

    When: once per ``train(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def calculate_train_batch_loss(trainer: Trainer, batch: Any) -> dict[str, Any] | None:
    """Calculate a training batch's loss: a dict of ``loss``, ``model_outputs`` and ``batch_size``.

    By default ``loss_func(model(batch[0]), batch[1])``. The dict may lack ``model_outputs``, which
    the loop doesn't use; plugins that do then raise an error.

    Args:
        trainer: the trainer.
        batch: the micro-batch, on the device.

    When: once per micro-batch, padding batches included, and again when ``recompute_gradients()``
    runs it again. Runs on: every process.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec(firstresult=True)
def calculate_eval_batch_loss(trainer: Trainer, batch: Any) -> dict[str, Any] | None:
    """Calculate an evaluation batch's loss: a dict as in `calculate_train_batch_loss`.

    The loss may also have a value for each sample, of which the mean is used.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.

    When: once per evaluation batch. Runs on: processes that have one; with sharded weights, the
    others repeat their last batch meanwhile.
    Collectives allowed: no. Reads the device: no.
    """


@hookspec(firstresult=True)
def calculate_predictions(trainer: Trainer, batch: Any) -> Any:
    """Calculate a batch's predictions; the first dimension is the samples.

    Args:
        trainer: the trainer.
        batch: the batch, on the device.

    When: once per batch of ``predict(...)``. Runs on: processes that have one; with sharded
    weights, the others repeat their last batch meanwhile.
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
def run_update(trainer: Trainer) -> UpdateResult:  # type: ignore[empty-body]
    """Make the update from the gradients of the accumulated batch. Wrap it, or replace it.

    The default is ``trainer.clip_gradients()`` and then ``return trainer.apply_update()``, which
    calls `on_optimizer_step_start`, steps optimizer and scheduler, and calls
    `on_optimizer_step_end` or `on_optimizer_step_skipped`. A replacement calls both methods too and
    returns the `UpdateResult` of ``apply_update()``. Returning None is an error, so that the
    default can't run a second time.

    A plugin class with ``needs_recompute = True`` may call ``trainer.recompute_gradients()`` here,
    as sharpness-aware minimisation does: the accumulated micro-batches run again with their random
    keys, padding batches included, and their final gradients replace the first ones. It returns the
    mean loss over all processes, shape ``()``. `on_backward_start` is called again, the other hooks
    of a step are not; losses and means count once, and buffers are updated once. With a gradient
    scaler, an overflow of either pass skips the update.

    DeepSpeed makes its updates itself: a plugin that implements this is refused under it.

    When: once per accumulated batch, after `on_gradients_ready`. Runs on: every process.
    Collectives allowed: yes. Reads the device: no.
    """


@hookspec(firstresult=True)
def run_evaluation(trainer: Trainer) -> Any:
    """Run the whole of ``evaluate(...)``. Wrap it like `run_training`.

    When: once per ``evaluate(...)``. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """


@hookspec(firstresult=True)
def run_prediction(trainer: Trainer, loader: Any, to: str | Path | None) -> Any:
    """Run the whole of ``predict(...)``, and return the predictions.

    Wrap it like `run_training`. A replacement returns the predictions for every sample, in the
    order of the dataset, on every process. It runs without gradients, with the model in evaluation
    mode. Errors propagate without `on_exception`.

    Args:
        trainer: the trainer.
        loader: the loader of the batches to predict, split between the processes.
        to: the folder to write the predictions to; None to return them.

    When: once per ``predict(...)``. Runs on: every process.
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

    When: once per evaluation, before its first event. Runs on: every process.
    Collectives allowed: yes. Reads the device: yes.
    """
    return {}
