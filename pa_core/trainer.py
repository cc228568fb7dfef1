"""The Trainer: the whole loop, from top to bottom.

Read `Trainer.train`, `_run_training`, `_run_train_epoch` and `_run_eval_epoch`, in this order.
Each step is a method that a subclass may override, followed by the hook of the same name, with
``on_`` before it, for plugins; `pa_core.hookspecs` has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pa_core.callbacks import get_default_callbacks
from pa_core.checkpoint.fingerprint import run_fingerprint
from pa_core.control import Requests, UpdateResult
from pa_core.engine.loss_parameters import check_loss_parameters
from pa_core.engine.optimizers import as_one
from pa_core.errors import StopTrainingError
from pa_core.lazy import import_on_use
from pa_core.loop.arguments import (
    RunArguments,
    check_collate,
    check_kwargs,
    check_length,
    check_model_and_optimizer,
    check_own_attributes,
    check_predict_arguments,
    check_predict_loader,
    check_scheduler_source,
    settings_as_defaults,
)
from pa_core.loop.base import TrainerBase
from pa_core.loop.consensus import Consensus
from pa_core.loop.no_items import gradients_of, weighted
from pa_core.loop.outputs import (
    check_batch_output,
    check_differentiable,
    check_loss,
    check_update,
)
from pa_core.loop.parameters import ParameterWatch
from pa_core.loop.run_files import identify_run, locking_files
from pa_core.loop.watched import WatchedMetrics
from pa_core.plugins.blame import running_plugin
from pa_core.settings.paths import short_path
from pa_core.tracking import Position, count_values, follow_run, values_since

if TYPE_CHECKING:
    from pa_core.durations import Duration
    from pa_core.loop.arguments import SchedulerSource
    from pa_core.loop.micro_batches import MicroBatch
    from pa_core.loop.randomness import EpochRandomness
    from pa_core.placeholders import (
        TrainerPlaceholderValues,
        replace_trainer_placeholder_values,
    )

__all__ = [
    "DEFAULT_CALLBACKS",
    "Trainer",
    "TrainerPlaceholderValues",
    "replace_trainer_placeholder_values",
]

DEFAULT_CALLBACKS = get_default_callbacks()

_OF_PLACEHOLDERS = ("TrainerPlaceholderValues", "replace_trainer_placeholder_values")
__getattr__ = import_on_use(__name__, dict.fromkeys(_OF_PLACEHOLDERS, "pa_core.placeholders"))


class Trainer(TrainerBase):
    """Train, evaluate and predict with a PyTorch model, on any hardware that accelerate supports.

    Args:
        model: the model, or the name of one that a plugin registers.
        loss_func: called with the model's outputs and the targets; returns a mean over the batch.
        optimizer: an optimizer of the model's parameters, and, on one process, of those of a
            `loss_func` that is a module; a function that creates one from the model's parameters;
            or a list of optimizers, with disjoint parameters. With None, a plugin may create it;
            evaluating and predicting need none.
        callbacks: classes or instances of `TrainerCallback`; they replace the default built-ins.
        run_history: records losses and metrics; in memory by default.
        plugins: names, classes, instances or modules; they replace the settings' list.
        settings: a mapping in the structure of ``[tool.pa-core]``, a `Settings`, or the file to
            read them from; by default the nearest ``pyproject.toml`` with a ``[tool.pa-core]``
            table, from the script's folder upward.
        seed: determines every random choice that training depends on; by default that of
            ``[tool.pa-core.trainer]``, or 42.
        mixed_precision: ``"no"``, ``"bf16"``, ``"fp16"`` (not on a CPU) or ``"fp8"``; by default
            that of ``[tool.pa-core.trainer]``, or accelerate's.
        accelerator: an `Accelerator`, or the arguments to create one.

    Raises:
        SettingsError: listing every mistake in the settings at once.
        PluginError: for a plugin that can't be loaded or whose hooks are wrong.
        TypeError: for an argument of the wrong type.
        ValueError: if model and optimizer don't fit, or fp16 is requested on a CPU.
    """

    # -- The steps of a run, which subclasses override -----------------------------------------

    def create_train_dataloader(
        self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Create the loader of ``self.train_dataset``.

        Args:
            batch_size: samples per process; ``batch_size`` in `train_dl_kwargs` overrides it.
            train_dl_kwargs: arguments of `torch.utils.data.DataLoader` that override the defaults.
        """
        return self._hooks.create_train_dataloader(
            trainer=self, batch_size=batch_size, train_dl_kwargs=train_dl_kwargs
        )

    def create_eval_dataloader(
        self, batch_size: int, eval_dl_kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Create the loader of ``self.eval_dataset``; arguments as in `create_train_dataloader`."""
        return self._hooks.create_eval_dataloader(
            trainer=self, batch_size=batch_size, eval_dl_kwargs=eval_dl_kwargs
        )

    def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """The training loader's default arguments: shuffled, without workers, pinned on CUDA."""
        return {
            "shuffle": True,
            "pin_memory": self.device.type == "cuda",
            "batch_size": batch_size,
            # With data in memory, workers cost more than they gain.
            "num_workers": 0,
        }

    def get_default_eval_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
        """The default arguments of the evaluation loader, whatever those of training are."""
        return Trainer.get_default_train_dl_kwargs(self, batch_size) | {"shuffle": False}

    def create_scheduler(self) -> Any:
        """Create the scheduler of ``self.create_scheduler_fn``; None for none."""
        return self._hooks.create_scheduler(trainer=self)

    def training_run_start(self) -> None:
        """Called at the start of a training run."""

    def train_epoch_start(self) -> None:
        """Called at the start of a training epoch; puts the model in training mode."""
        self.model.train()

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Calculate the loss of a training batch.

        Args:
            batch: what the training loader yields, on the device.

        Returns:
            A dict with ``loss`` (shape ``()``, mean over the batch), ``batch_size``, and anything
            else that plugins should see; those that look at the outputs need ``model_outputs``.
            With ``num_items_in_batch``, such as the number of labelled tokens, the loss is the
            mean over these items.
        """
        return self._hooks.calculate_train_batch_loss(trainer=self, batch=batch)

    def backward_step(self, loss: Tensor) -> None:
        """Differentiate the micro-batch's scaled loss, its part of the accumulated batch's mean."""
        check_differentiable(loss, self, "calculate_train_batch_loss returned")
        self._engine.backward(loss)

    def optimizer_step(self) -> None:
        """Update the parameters."""
        self._engine.step(self.optimizer)

    def scheduler_step(self) -> None:
        """Step the scheduler, if there is one: once per update, on any number of processes."""
        if self.scheduler is not None:
            self.scheduler.step()

    def optimizer_zero_grad(self) -> None:
        """Zero the gradients."""
        self._engine.zero_grad(self.optimizer)

    def train_epoch_end(self) -> None:
        """Called at the end of a training epoch."""

    def eval_epoch_start(self) -> None:
        """Called at the start of an evaluation epoch; puts the model in evaluation mode."""
        self.model.eval()

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Calculate the loss of an evaluation batch; returns what the training one returns.

        The loss may also have a value for each sample, of which the mean is used.
        """
        return self._hooks.calculate_eval_batch_loss(trainer=self, batch=batch)

    def calculate_predictions(self, batch: Any) -> Any:
        """The model's outputs for a batch, the first dimension being the samples."""
        return self._hooks.calculate_predictions(trainer=self, batch=batch)

    def eval_epoch_end(self) -> None:
        """Called at the end of an evaluation epoch."""

    def training_run_epoch_end(self) -> None:
        """Called when both the training and the evaluation part of an epoch are done."""

    def training_run_end(self) -> None:
        """Called at the end of a training run; unwraps the model."""
        self._engine.broadcast_buffers(self.model)
        self.model = self.get_model()

    def evaluation_run_start(self) -> None:
        """Called at the start of `evaluate`."""

    def evaluation_run_end(self) -> None:
        """Called at the end of `evaluate`; unwraps the model."""
        self.model = self.get_model()

    # -- Runs -----------------------------------------------------------------------------------

    @settings_as_defaults
    @locking_files
    def train(
        self,
        train_dataset: Any,
        num_epochs: int | str | Duration | None = None,
        eval_dataset: Any = None,
        per_device_batch_size: int = 8,
        max_num_train_steps: int | None = None,
        gradient_accumulation_steps: int = 1,
        gradient_clip_value: float | None = None,
        create_scheduler_fn: SchedulerSource | Sequence[SchedulerSource] = None,
        train_dataloader_kwargs: dict[str, Any] | None = None,
        eval_dataloader_kwargs: dict[str, Any] | None = None,
        reset_run_history: bool = True,
        collate_fn: Callable[[Any], Any] | None = None,
        resume_from: str | Path | None = None,
        *,
        gradient_clip_norm: float | None = None,
        strict: bool = False,
    ) -> None:
        """Train the model.

        Arguments that aren't given are those of ``[tool.pa-core.train]``, if it has them.

        Args:
            train_dataset: a map or iterable dataset, or a ready loader of batches.
            num_epochs: a number of epochs, or a duration such as ``"500 updates"``,
                ``"20000 samples"`` or ``"15 minutes"``. Required, here or in the settings.
            eval_dataset: evaluated after each epoch; a dict of datasets evaluates each under its
                name.
            per_device_batch_size: samples of a micro-batch on each process.
            max_num_train_steps: stop after this number of updates, if that comes first.
            gradient_accumulation_steps: micro-batches per update. The gradient is that of the
                mean over all of them, also in a shorter last group.
            gradient_clip_value: clip each accumulated gradient to ``[-value, value]``.
            create_scheduler_fn: a function of the optimizer, the name of a scheduler that a plugin
                registers, or a scheduler that was created with the Trainer's optimizer. With
                several optimizers, a function or name is used for each of them; or a list with one
                entry, or None, for each. Schedulers are stepped once per update.
            train_dataloader_kwargs: arguments of the training `DataLoader`.
            eval_dataloader_kwargs: arguments of the evaluation `DataLoader`.
            reset_run_history: forget earlier runs; otherwise epochs are counted from theirs.
            collate_fn: makes a batch from a list of samples.
            resume_from: a training state, a folder of them (the newest intact one is used), or
                ``"auto"``: the folder of the run's own training states, or a fresh start if it has
                none yet. The run continues as if it had never been interrupted.
            gradient_clip_norm: clip the total 2-norm of the accumulated gradients.
            strict: refuse to resume, instead of warning, if anything differs that changes the
                numbers, such as package versions or the settings of a plugin.

        Raises:
            TypeError: for arguments of the wrong type, if nothing says how long to train, and for
                batches that aren't what the loss needs.
            ValueError: for invalid arguments, before anything happens.
            TrainingStateError: if `resume_from` is damaged or was saved from a different model; or
                if another live run writes to the same places.
        """
        if self._in_run:
            raise RuntimeError("train() was called within a run of the same Trainer")
        if train_dataset is None:
            raise ValueError("train() needs a dataset, not None")
        self._arguments = RunArguments(
            num_epochs=check_length(num_epochs),
            per_device_batch_size=per_device_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            max_num_train_steps=max_num_train_steps,
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
            train_dataloader_kwargs=train_dataloader_kwargs,
            eval_dataloader_kwargs=eval_dataloader_kwargs,
        )
        check_own_attributes(self)
        self.optimizer = as_one(self.optimizer)
        check_model_and_optimizer(
            self.get_model(), self.optimizer, self.loss_func, needs_optimizer=True
        )
        self._engine.loss_parameters = check_loss_parameters(self)
        check_scheduler_source(create_scheduler_fn, self.optimizers)
        check_collate(collate_fn)
        if self._engine.num_processes > 1:
            from pa_core.loop.same_settings import check_same_arguments

            check_same_arguments(self, create_scheduler_fn)
        state = None
        if resume_from is not None:
            from pa_core.checkpoint.resume import find_training_state

            state = find_training_state(resume_from, self)
        self.run_id = identify_run(self, state, is_auto=resume_from == "auto")
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.create_scheduler_fn, self.collate_fn = create_scheduler_fn, collate_fn
        self._hooks.refresh()
        if reset_run_history and state is None:
            self.run_history.reset()

        epoch = self.run_history.current_epoch
        position = Position(epoch=epoch, first_epoch=epoch) if state is None else state.position
        self._data.load_train(self._arguments)
        self._data.load_eval(per_device_batch_size, eval_dataloader_kwargs)
        self._data.check_exact(strict=strict)
        self._plan_run(position)
        self._engine.plan(self.run_config)
        self._check_update_plugins()
        self._prepare_model_optimizer_and_dataloaders()
        self._run_scheduler.create(None if state is None else state.scheduled_for)
        self.position = Position(epoch=epoch, first_epoch=epoch)
        self._drawing = set()
        self.control.reset()
        self._manifest, self._fingerprint = None, run_fingerprint(self)
        self._resumed_state, self._watched = state, WatchedMetrics(state.unseen if state else None)
        self.was_finished = False
        if state is not None:
            state.check_compatible(self, strict=strict)
            state.restore_training(self)
            self.was_finished = self._has_nothing_left()
            state.watch_start(self)
            self.print(
                f"Resuming from {short_path(state.directory)}: epoch {self.position.epoch}, "
                f"update {self.position.updates}"
            )
        # Before the clock starts, so that all processes agree.
        time_is_up = self._is_time_up()
        self._consensus = Consensus(self._engine, self.position.attempts, time_is_up=time_is_up)
        self._watched.find_watchers(self)
        self._run("run_training")

    def evaluate(
        self,
        dataset: Any = None,
        per_device_batch_size: int = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
    ) -> dict[str, Any]:
        """Evaluate the model, counting each sample once; a run in progress isn't changed.

        Args:
            dataset: the dataset, a dict of them, or a ready loader; by default the last one.
            per_device_batch_size: samples of a batch on each process.
            dataloader_kwargs: arguments of the `DataLoader`.
            collate_fn: makes a batch from a list of samples.

        Returns:
            What this evaluation has recorded: ``evaluation_loss`` and the metrics of plugins.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("evaluate() needs a dataset: neither it nor train() was given one")
        check_kwargs("dataloader_kwargs", dataloader_kwargs)
        check_collate(collate_fn)
        with self._run_preserved():
            self.eval_dataset, self.collate_fn = dataset, collate_fn or self.collate_fn
            self._hooks.refresh()
            self._data.load_eval(per_device_batch_size, dataloader_kwargs)
            self._prepare_model_optimizer_and_dataloaders()
            self._set_eval_batch_size(per_device_batch_size)
            before = count_values(self.run_history)
            self._run("run_evaluation")
        return values_since(self.run_history, before)

    def predict(
        self,
        dataset: Any,
        per_device_batch_size: int = 8,
        dataloader_kwargs: dict[str, Any] | None = None,
        collate_fn: Callable[[Any], Any] | None = None,
        *,
        to: str | Path | None = None,
    ) -> Any:
        """The model's outputs for every sample of a dataset, in the dataset's order, on the CPU.

        Args:
            dataset: a map or iterable dataset, or a ready loader of batches.
            per_device_batch_size: samples of a batch on each process.
            dataloader_kwargs: arguments of the `DataLoader`.
            collate_fn: makes a batch from a list of samples.
            to: a folder, which all processes can write to. The predictions are written to it as
                they are made, so that they needn't fit in memory. The folder is complete or absent,
                and earlier predictions in it are replaced.

        Returns:
            What `calculate_predictions` returns, its batches joined into a tensor
            ``(samples, …)``, or a tuple or dict of tensors; if shapes differ, a list with one entry
            per sample. With `to`, the `Predictions` in the folder.

        Raises:
            ValueError: for arguments that would leave out or reorder samples, or if `to` is a
                folder with anything but predictions.
        """
        from pa_core.loop.predict import collect_predictions, write_predictions

        check_predict_arguments(dataloader_kwargs)
        check_collate(collate_fn)
        self._hooks.refresh()
        given, self.collate_fn = self.collate_fn, collate_fn or self.collate_fn
        try:
            with self._data.evaluating_on(dataset):
                loader = self.create_eval_dataloader(per_device_batch_size, dataloader_kwargs)
        finally:
            self.collate_fn = given
        check_predict_loader(loader, dataset)
        loader = self._data.split(loader, "predict")
        model = self.model
        self._prepare_model_optimizer_and_dataloaders()
        self.model = self._engine.for_evaluation(self.model)
        try:
            with torch.no_grad(), self._modes_of_evaluation():
                self.eval_epoch_start()
                if to is not None:
                    return write_predictions(self, loader, to)
                return collect_predictions(self, loader)
        finally:
            self.model = model

    def _run(self, hook: str) -> None:
        """Call the hook of a run, which plugins may wrap, and ``on_exception`` if it raises."""
        self._report_replacements(hook)
        self._in_run = is_training = hook == "run_training"
        follow_run(self.run_history, lambda: self.progress, running_plugin)
        if is_training:
            self.position.start_clock()
        try:
            self.plugins.check_required()
            getattr(self.plugins.hook, hook)(trainer=self)
        except BaseException as exception:
            self._in_run = False  # saving is immediate from now on, or an error
            self._report_exception(exception)
            raise
        finally:
            self._in_run = False
            if is_training:
                self.position.stop_clock()
                self._watched.close(self.run_history)
                self._engine.end_run()
            self._means.end_step()
            state = self._resumed_state
            if state is not None and is_training:  # failed before it was restored
                state.stop_watching()
                self._resumed_state = None

    # -- The training loop ------------------------------------------------------------------------

    def _run_training(self) -> None:
        """Run epochs until the run's length is reached or a plugin stops it."""
        position = self.position
        self._skip_reasons = {}
        self._discard_accumulation()  # of an interrupted run
        self._is_first_update = True
        self._parameters = ParameterWatch(self.get_model(keep_torch_compile=False))
        self._print_plugins()
        try:
            self.training_run_start()
            self._event("on_training_run_start")
            self._reload_changed_data()
            self._watched.check_data(self)
            if not self.is_resuming:  # what a resumed run has in its history follows at its place
                self._announce_metrics()
            if position.phase != "train" or position.stop_reason is not None:
                self._restore_plugins()
            # An interrupted epoch is completed, whatever the run's length.
            while position.stop_reason is None and (
                position.phase != "start" or not self._is_finished()
            ):
                self._run_epoch()
        except StopTrainingError as error:
            position.stop_reason = str(error)
            self._engine.set_mode(self.optimizer, training=False)
            self.optimizer_zero_grad()
            self._discard_accumulation()
            self.print(error)
            self._event("on_stop_training_error", error=error)
            self._watched.report_missing(self, is_over=False)
        if not position.is_paused:
            self._announce_metrics()
        self.wait_for_saves()
        self._in_run = False
        self._report_skipped()
        self.training_run_end()
        self._event("on_training_run_end")
        self._save_requested(self._decide(now=True) or Requests(), now=True)
        self.wait_for_saves()

    def _run_epoch(self) -> None:
        """One epoch of the run: its training part, then its evaluation part."""
        if self.position.phase != "eval":
            self._run_train_epoch()
            self._follow_parameters()
        self._data.reload_eval(self._arguments)
        self._run_eval_epochs()
        self.training_run_epoch_end()
        self._event("on_training_run_epoch_end")
        self._announce_metrics()
        self.run_history._increment_epoch()
        self.position.epoch += 1
        self.position.batch, self.position.phase = 0, "start"
        self._handle_requests(now=True)
        self._watched.report_missing(self, is_over=self._is_finished())

    def _run_train_epoch(self) -> None:
        """Train for one epoch, or for the rest of an interrupted one."""
        position, hooks, engine = self.position, self._hooks, self._engine
        if position.phase == "start":
            self._means.reset()
        self.train_epoch_start()
        self._event("on_train_epoch_start")
        self._reload_changed_data()
        if position.phase == "train":
            self._restore_plugins()
        position.phase = "train"

        batches, randomness = self._rest_of_epoch()
        engine.set_mode(self.optimizer, training=True)
        for micro in () if self._is_finished() else batches:
            self.is_padding_batch = micro.is_padding
            self._means.start_step(is_padding=micro.is_padding)
            if hooks.on_train_step_start is not None:
                randomness.seed_plugins(micro.step)
                hooks.on_train_step_start(trainer=self, batch=micro.data, step=micro.step)
            with engine.accumulating(self.model, micro.completes_update):
                output = self._forward_backward(micro, randomness)
            if micro.completes_update:
                self._update_parameters()
            if hooks.on_train_step_end is not None:
                hooks.on_train_step_end(
                    trainer=self, batch=micro.data, batch_output=output, step=micro.step
                )
            del output  # logits take no memory during the next forward pass
            randomness.end_step()
            self._means.end_step()
            if micro.completes_update:
                self._handle_requests()
                if self._is_finished():
                    break

        engine.set_mode(self.optimizer, training=False)
        self.train_epoch_end()
        self._record_means("train", "train_loss_epoch")
        self._event("on_train_epoch_end")
        position.phase = "eval"
        self._handle_requests(now=True)

    def _forward_backward(self, micro: MicroBatch, randomness: EpochRandomness) -> dict[str, Any]:
        """Calculate the loss of a micro-batch and add its gradient to those accumulated."""
        hooks, batch, step = self._hooks, micro.data, micro.step
        self._accumulation.begin(micro, randomness)
        randomness.seed_model(step)
        output = self.calculate_train_batch_loss(batch)
        output = check_batch_output(output, "calculate_train_batch_loss")
        randomness.seed_hooks(step)
        # The gradient is that of the mean over the accumulated batch, in which this mean over n of
        # its N items has the weight n / N; None stands for 1.
        weight, self._means.items = self._accumulation.weigh(output, micro)
        if hooks.on_backward_start is not None:
            hooks.on_backward_start(trainer=self, batch=batch, batch_output=output, step=step)
        loss = check_loss(output["loss"], "on_backward_start left")
        self._means.add(loss, output)
        items = self._means.items
        with gradients_of(items, lambda: self._engine.gradient_leaves(self.model)):
            self.backward_step(weighted(loss, weight, items))
        if hooks.on_backward_end is not None:
            hooks.on_backward_end(trainer=self, batch=batch, batch_output=output, step=step)
        return output

    def _update_parameters(self) -> None:
        """Make one update from the gradients of the accumulated batch, or skip it."""
        hooks = self._hooks
        self.model = self._engine.complete_gradients(self.model, self.optimizer)
        self._accumulation.finish(self.model.parameters())
        self._engine.choose(self.optimizer, self._accumulation.chosen)
        self._engine.unscale(self.optimizer)
        if hooks.on_gradients_ready is not None:
            hooks.on_gradients_ready(trainer=self)
        result = hooks.run_update(trainer=self)
        check_update(result, self.plugins, is_applied=self._accumulation.is_empty)

    def clip_gradients(self) -> None:
        """Clip the accumulated gradients by norm or by value, as the run is configured.

        The default of the hook `run_update` calls it before `apply_update`; a replacement should
        too. ``trainer.grad_norm`` is then the norm before clipping, of shape ``()``.
        """
        config = self.run_config
        if self.control.skip_reason is not None:
            return
        if config.gradient_clip_norm is not None:
            self.grad_norm = self._engine.clip_norm(
                self.model.parameters(), config.gradient_clip_norm
            )
        elif config.gradient_clip_value is not None:
            self._engine.clip_value(self.model.parameters(), config.gradient_clip_value)

    def apply_update(self) -> UpdateResult:
        """Update the parameters from their gradients, and zero these; or skip the update.

        Called once per accumulated batch, by the default of the hook `run_update` or by its
        replacement.

        Returns:
            Whether the parameters were updated, and if not, why.

        Raises:
            RuntimeError: if there is no update to make.
        """
        if not self._accumulation.is_complete:
            raise RuntimeError("apply_update() is called in the hook run_update only, and once")
        hooks, control = self._hooks, self.control
        if control.skip_reason is None and hooks.on_optimizer_step_start is not None:
            hooks.on_optimizer_step_start(trainer=self)
        reason = control.take_skip()
        if reason is None:
            self.optimizer_step()
            if self._engine.step_was_skipped(self.optimizer):
                reason = "overflow"
            elif self.scheduler is not None:
                self.scheduler_step()
        else:
            self._engine.skip_unscaled(self.optimizer)
        self.optimizer_zero_grad()
        self._count_update(skipped=reason)
        if reason is None and hooks.on_optimizer_step_end is not None:
            hooks.on_optimizer_step_end(trainer=self)
        elif reason is not None and hooks.on_optimizer_step_skipped is not None:
            hooks.on_optimizer_step_skipped(trainer=self, reason=reason)
        return UpdateResult(reason is None, reason)

    def recompute_gradients(self) -> Tensor:
        """Calculate the gradients of the accumulated batch again, with the present parameters.

        For a plugin that declares ``needs_recompute = True``, in the hook `run_update`. The
        micro-batches run again with the same random numbers, as they were after
        `on_train_step_start`; `on_backward_start` is called again, and no other hook of a step.
        Nothing is recorded or counted, and buffers such as running statistics stay as they are.
        The gradients are then those of the new pass: reduced, unscaled and not clipped.

        Returns:
            The mean loss over the accumulated batch of all processes, shape ``()``.

        Raises:
            RuntimeError: outside `run_update`, or if no plugin declares `needs_recompute`.
        """
        recompute = self._accumulation.recompute
        if recompute is None or not self._accumulation.is_complete:
            raise RuntimeError(
                "recompute_gradients() is called in the hook run_update, before apply_update(), by "
                "a plugin that declares needs_recompute = True"
            )
        return recompute.run(self)

    def _handle_requests(self, now: bool = False) -> None:
        """Grant what plugins have requested since the last boundary, the same on every process."""
        granted = self._decide(now)
        if granted is None:
            return
        if granted.log:
            self._log_progress()
        if granted.evaluate:
            granted.add(self._evaluate_within_epoch())  # and what plugins requested in it
        elif (granted.log or granted.announce) and not now:
            granted.add(self._announce_within_epoch())
        self._save_requested(granted, now)
        if granted.stop_reason is not None:
            raise StopTrainingError(granted.stop_reason)

    def _announce_within_epoch(self) -> Requests:
        """Announce values that were recorded in steps; returns what plugins request in response."""
        if not self._watched:
            return Requests()
        self._announce_metrics()
        return self._decide(now=True) or Requests()

    def _decide(self, now: bool = False) -> Requests | None:
        """The requests to grant at this boundary, the same on every process; None for none."""
        self._hooks.refresh()
        if "_saver" in vars(self):  # a state has been saved
            self._saver.request_wait(self.control)
        if not now and self._watched.has_new(self):
            self.control.announce_metrics()
        time_is_up = self._in_run and self._is_time_up()
        if self._engine.num_processes == 1 and self.control.is_idle and not time_is_up:
            return None
        return self._consensus.decide(
            self.control, self.position.attempts, time_is_up=time_is_up, now=now
        )

    def _is_finished(self) -> bool:
        """Whether the run has reached its length, the same on every process."""
        length, position = self._length, self.position
        if self.was_finished or length.is_counted_out(position.updates, position.skipped):
            return True
        if position.phase == "start" and length.is_last_epoch_done(position.epoch_of_run):
            return True
        if length.num_updates is not None:
            return False
        if length.is_timed:
            return self._consensus.time_is_up
        return length.is_over(self.progress)

    # -- The evaluation loop ----------------------------------------------------------------------

    def _run_evaluation(self) -> None:
        """Run an evaluation epoch over each of the evaluation datasets."""
        self.control.reset()
        self.evaluation_run_start()
        self._event("on_evaluation_run_start")
        try:
            self._run_eval_epochs(is_training=False)
            granted = self._decide(now=True)
            if granted is not None and granted.stop_reason is not None:
                raise StopTrainingError(granted.stop_reason)
        except StopTrainingError as error:
            self.print(error)
            self._event("on_stop_training_error", error=error)
        self.evaluation_run_end()
        self._event("on_evaluation_run_end")

    def _evaluate_within_epoch(self) -> Requests:
        """Evaluate between two updates, leaving the model as it was; returns what was requested."""
        self._data.reload_eval(self._arguments)
        if not self._data.eval_loaders:
            return Requests()
        with self._modes_of_evaluation():
            self._run_eval_epochs(is_intermediate=True)
        self._watched.report_within_epoch(self)
        self._announce_metrics()
        return self._decide(now=True) or Requests()

    def _run_eval_epochs(self, **kind: bool) -> None:
        """Evaluate on each evaluation dataset; names of datasets prefix their metrics.

        The models that plugins register are evaluated after the trained one, prefixed likewise.
        """
        self._engine.broadcast_buffers(self.model)
        model, prefix = self.model, self.run_history.metric_name_prefix
        others = self.plugins.registry("register_eval_models", trainer=self)
        for model_name, evaluated in {"": model, **others}.items():
            self.model = evaluated
            self.run_history.set_metric_name_prefix(prefix + (model_name and f"{model_name}_"))
            try:
                for name, loader in self._data.eval_loaders.items():
                    with self._evaluation_of(name):
                        self._run_eval_epoch(loader, **kind)
            finally:
                self.model = model
                self.run_history.set_metric_name_prefix(prefix)

    def _run_eval_epoch(
        self, loader: Any, is_training: bool = True, is_intermediate: bool = False
    ) -> None:
        """Evaluate on each batch once.

        Args:
            loader: the loader.
            is_training: whether this is part of a training run.
            is_intermediate: whether it is within a training epoch.
        """
        hooks, means = self._hooks, self._means
        self.eval_epoch_start()
        self._event("on_eval_epoch_start", is_intermediate=is_intermediate)
        with torch.no_grad():
            for step, batch in enumerate(self._evaluation_batches(loader)):
                means.start_step()
                if hooks.on_eval_step_start is not None:
                    hooks.on_eval_step_start(trainer=self, batch=batch, step=step)
                output = self.calculate_eval_batch_loss(batch)
                output = check_batch_output(output, "calculate_eval_batch_loss", is_evaluation=True)
                means.items = output.get("num_items_in_batch", output["batch_size"])
                means.add(output["loss"], output)
                if hooks.on_eval_step_end is not None:
                    hooks.on_eval_step_end(
                        trainer=self, batch=batch, batch_output=output, step=step
                    )
                del output
            means.end_step()
            self.eval_epoch_end()
        loss = "eval_loss_epoch" if is_training else "evaluation_loss"
        self._record_means(
            "eval" if is_training else "evaluation",
            "intermediate_eval_loss" if is_intermediate else loss,
        )
        self._event("on_eval_epoch_end", is_intermediate=is_intermediate)
