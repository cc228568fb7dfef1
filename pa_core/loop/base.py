"""The base of the Trainer: its construction, its parts, and what it offers to plugins."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate import Accelerator

from pa_core.callbacks import CallbackHandler
from pa_core.checkpoint.fingerprint import data_fingerprint
from pa_core.control import Requests, TrainerControl
from pa_core.data.loader import evaluation_batches
from pa_core.data.rng import derive_key, seed_all
from pa_core.display.streams import folded
from pa_core.durations import Duration, RunLength
from pa_core.engine.create import create_engine
from pa_core.engine.optimizers import as_one
from pa_core.engine.parallelism import check_supported, check_whole
from pa_core.engine.process_group import check_connected
from pa_core.errors import PreemptedExit, StopTrainingError, shown
from pa_core.loop.accumulation import Accumulation
from pa_core.loop.arguments import (
    RunArguments,
    accelerator_arguments,
    check_loss_func,
    check_model,
    check_model_and_optimizer,
    check_optimizer,
    check_run_history,
    seed_of,
)
from pa_core.loop.consensus import Consensus
from pa_core.loop.defaults import Defaults
from pa_core.loop.error_hints import add_hints
from pa_core.loop.means import EpochMeans
from pa_core.loop.micro_batches import MicroBatch, micro_batches
from pa_core.loop.planning import plan_run
from pa_core.loop.provided import CHECKS
from pa_core.loop.randomness import EpochRandomness, seed_event
from pa_core.loop.run_data import RunData
from pa_core.loop.run_scheduler import RunScheduler
from pa_core.loop.services import TrainerServices
from pa_core.loop.watched import WatchedMetrics
from pa_core.plugins.builtin_names import DEFAULTS
from pa_core.plugins.callers import BoundHooks
from pa_core.plugins.manager import PluginManager
from pa_core.settings.environment import build_all_plugins, settings_of, where_enabled
from pa_core.tracking import InMemoryRunHistory, Position, RunHistory, written_by

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pa_core.checkpoint.background import StateSaver
    from pa_core.checkpoint.restore import TrainingState
    from pa_core.loop.arguments import SchedulerSource
    from pa_core.loop.parameters import ParameterWatch
    from pa_core.settings.table import Settings

_OF_A_RUN = (
    *("model", "eval_dataset", "collate_fn", "eval_name", "run_config", "control"),
    *("_data", "_means", "_in_run", "_resumed_state"),
)
"""The attributes that an evaluation changes, and that a run in progress needs unchanged."""

_THE_LOOP = "the training loop"
"""The writer of the metrics that no plugin records."""


class TrainerBase(TrainerServices):
    """A trainer's parts and services; `pa_core.trainer.Trainer` adds the steps and the loop.

    Attributes:
        max_skipped_in_a_row: so many skipped updates in a row stop a run.
        run_id: identifies the present or last run, also after it was interrupted and resumed; 32
            hexadecimal digits, the same on every process.
        was_finished: whether the run was resumed from a state in which nothing was left to do: its
            start and end events are called, and nothing is trained.
    """

    max_skipped_in_a_row = 100
    _arguments: RunArguments  # of the present or last run
    _parameters: ParameterWatch  # likewise

    def __init__(
        self,
        model: nn.Module | str,
        loss_func: Callable[..., Tensor] | None,
        optimizer: Any,
        callbacks: Iterable[Any] | None = None,
        run_history: RunHistory | None = None,
        *,
        plugins: Iterable[Any] | None = None,
        settings: Settings | Mapping[str, Any] | str | Path | None = None,
        seed: int | None = None,
        mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = None,
        accelerator: Accelerator | Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = settings_of(settings)
        self.plugins = _create_plugins(self.settings, callbacks, plugins)
        self._hooks = BoundHooks(self.plugins)
        self._callback_handler = self._create_callback_handler()

        check_loss_func(loss_func)
        self.model: Any = self._create_model(model) if isinstance(model, str) else model
        check_model(self.model)
        self.loss_func: Any = loss_func
        self.optimizer: Any = self._create_optimizer(optimizer)
        check_model_and_optimizer(self.model, self.optimizer, self.loss_func)
        self.seed = seed_of(self.settings, seed)
        self.run_history = InMemoryRunHistory() if run_history is None else run_history
        check_run_history(self.run_history)

        self.accelerator_kwargs = accelerator_arguments(self.settings, mixed_precision, accelerator)
        self._accelerator = (
            accelerator if isinstance(accelerator, Accelerator) else self._create_accelerator()
        )
        check_supported(self._accelerator)
        check_connected(self._accelerator)
        self._engine = create_engine(self._accelerator)
        if self._engine.num_processes > 1:
            from pa_core.loop.same_settings import check_same_settings

            check_same_settings(self._trainer)
            self._hooks = BoundHooks(self.plugins, self._request_stop)
        if self.model is not None:  # train() and evaluate() need one
            check_whole(self.model, self._engine.sharded_by)
        self.plugins.set_process(is_main=self.is_main_process)

        # What `train` and `evaluate` are given.
        self.create_scheduler_fn: SchedulerSource | Sequence[SchedulerSource] = None
        self.collate_fn: Callable[[Any], Any] | None = None
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self._data = RunData(self._trainer)

        # What describes and limits the present run.
        self.run_config: Any = None  # a TrainerRunConfig from the first run on
        self.num_updates: int | None = None
        self.train_batch_limit: int | None = None
        self.eval_batch_limit: int | None = None
        self._length = RunLength(Duration.parse(1), None, None)
        self._run_scheduler = RunScheduler(self._trainer)
        self._manifest: dict[str, Any] | None = None
        self._fingerprint: dict[str, Any] | None = None

        # Where it stands.
        self.control = TrainerControl()
        self.position = Position()
        self.scheduler: Any = None
        self.eval_name: str | None = None
        self.grad_norm: Tensor | None = None
        self.is_padding_batch = False
        self._in_run = False
        self._is_first_update = True
        self._skip_reasons: dict[str, int] = {}  # of the updates skipped since the run has started
        self._means = EpochMeans()
        self._accumulation = Accumulation(1, None, None, 1, self._engine)
        self._consensus = Consensus(self._engine, 0)
        self._watched = WatchedMetrics()
        self._drawing: set[str] = set()  # see EpochRandomness
        self._resumed_state: TrainingState | None = None
        self.run_id = uuid.uuid4().hex
        self.was_finished = False
        self._save_metadata: dict[Path, dict[str, Any]] = {}
        self._event("on_init_end")

    @cached_property
    def _saver(self) -> StateSaver:
        """Saves training states; created, and its code imported, when the first one is saved."""
        from pa_core.checkpoint.background import StateSaver

        return StateSaver(self._trainer)

    # -- Set-up ---------------------------------------------------------------------------------

    def _event(self, name: str, **arguments: Any) -> None:
        self._hooks.refresh()
        seed_event(name, self.seed, self.position.epoch, self.position.updates, self.device)
        caller = getattr(self._hooks, name)
        if caller is not None:
            caller(trainer=self, **arguments)

    def _report_exception(self, exception: BaseException) -> None:
        """Add a hint to an exception that ends the run, and call ``on_exception``."""
        # First: it shuts down what would interrupt the rest. Imported with this module, since after
        # the death of a worker PyTorch raises in whatever code is running, even in an import.
        add_hints(exception, self._trainer)
        if "_saver" in vars(self):
            self._saver.wait_on_exception(exception)
        if isinstance(exception, PreemptedExit):
            return  # the run was closed cleanly, and nothing has failed
        self.plugins.call_each("on_exception", exception, trainer=self, exception=exception)

    def _request_stop(self, error: StopTrainingError) -> None:
        """Stop at the next boundary, together with the other processes."""
        if not self._in_run:
            raise error
        self.control.stop(str(error))

    @contextmanager
    def _run_preserved(self) -> Iterator[None]:
        """Preserve a run in progress while something else is evaluated."""
        if not self._in_run:
            with self._engine.evaluation_mode(self.optimizer):
                yield
            return
        kept = {name: vars(self)[name] for name in _OF_A_RUN}
        unseen = self._watched.unseen(self.run_history)
        self.control, self._data = TrainerControl(), copy(self._data)
        try:
            with self._modes_of_evaluation():
                yield
        finally:
            vars(self).update(kept)
            self._watched.skip(self.run_history, unseen)

    @contextmanager
    def _modes_of_evaluation(self) -> Iterator[None]:
        """Restore the modes of each module on exit; the optimizer is in evaluation mode."""
        from pa_core.diagnostics.preserve import modes_kept

        with modes_kept(self.model), self._engine.evaluation_mode(self.optimizer):
            yield

    # -- Parts of the loop ----------------------------------------------------------------------

    def _rest_of_epoch(self) -> tuple[Iterator[MicroBatch], EpochRandomness]:
        """The micro-batches of the present epoch from the position on, and its randomness.

        The scheduler follows the length of the run first, if that has changed.
        """
        self._run_scheduler.follow_length()
        self._follow_parameters()
        engine, epoch = self._engine, self.position.epoch
        batches = micro_batches(
            self._data.train_loader,
            engine,
            seed=self.seed,
            epoch=epoch,
            start=self.position.batch,
            limit=self.train_batch_limit,
            accumulation=self.run_config.gradient_accumulation_steps,
            state=self._data.train_state,
        )
        randomness = EpochRandomness(self.seed, epoch, engine.rank, self.device, self._drawing)
        return batches, randomness

    def _follow_parameters(self) -> None:
        """Wrap the model again, and check the optimizer, if parameters were frozen or replaced."""
        self.rewrap_model()
        self._parameters.check(self._trainer)
        self._engine.find_untrained(self.model, self.optimizer)

    def _is_time_up(self) -> bool:
        """Whether the run's time is up, by the clock of this process."""
        return self._length.is_timed and self._length.is_over(self.progress)

    def _discard_accumulation(self) -> None:
        """Discard gradients of an accumulated batch that was interrupted."""
        self._engine.zero_grad(self.optimizer)
        self._engine.discard_unscaled()
        self._accumulation.reset()
        self._means.end_step()

    def _count_update(self, skipped: str | None) -> None:
        """Count an update, made or skipped for a reason; too many skipped in a row stop the run."""
        position, batch = self.position, self._accumulation
        position.batch += batch.micro_batches
        position.samples += batch.samples
        batch.reset()
        if skipped is None:
            position.updates, position.skipped_in_a_row = position.updates + 1, 0
            if self._is_first_update and self._saves_states():
                from pa_core.checkpoint.save import check_tensors_can_be_saved

                check_tensors_can_be_saved(self._trainer)
            self._is_first_update = False
            return
        position.skipped += 1
        position.skipped_in_a_row += 1
        self._skip_reasons[skipped] = self._skip_reasons.get(skipped, 0) + 1
        self._consensus.count_skipped()
        if position.skipped_in_a_row >= self.max_skipped_in_a_row:
            self.control.stop(
                f"{position.skipped_in_a_row} updates in a row were skipped, the last one because "
                f"of: {skipped}",
                everywhere=True,
            )

    def _saves_states(self) -> bool:
        """Whether a plugin will save training states."""
        plugins = self.plugins.by_name.values()
        return any(getattr(type(plugin), "saves_training_states", False) for plugin in plugins)

    def _report_skipped(self) -> None:
        """Print how many updates were skipped; warn if none was made without a request for it."""
        reasons, self._skip_reasons = self._skip_reasons, {}
        if not reasons:
            return
        position = self.position
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        text = f"Skipped updates: {position.skipped} of {position.attempts} ({counts})"
        self.print(text)
        is_unwanted = not position.updates and reasons.keys() & {"overflow", "non-finite"}
        if is_unwanted and position.stop_reason is None and self.is_main_process:
            warnings.warn(f"No update was made: the weights haven't changed. {text}", stacklevel=2)

    def _record_means(self, prefix: str, loss_name: str) -> None:
        """Record the means of the epoch over all items of all processes: the loss and by name."""
        loss, named, has_batches = self._means.reduce(self._engine)
        if loss is not None:
            # Another dataset's name may be this one's with the name of a model before it.
            is_named = self.eval_name is not None
            writer = f"the evaluation on {self.eval_name!r}" if is_named else _THE_LOOP
            with written_by(self.run_history, writer):
                self.run_history.update_metric(loss_name, loss)
        elif has_batches or (prefix == "train" and self.position.batch):
            warnings.warn(
                f"No {loss_name}: none of the batches had an item that counts, such as a "
                "labelled token",
                stacklevel=2,
            )
        else:
            raise ValueError(
                f"No {loss_name}: the data yielded no batch. If the iterator is "
                "exhausted, pass a dataset or a re-iterable loader"
            )
        for mean in named:
            with written_by(self.run_history, mean.writer):
                self.run_history.update_metric(f"{prefix}_{mean.name}", mean.value)

    @contextmanager
    def _evaluation_of(self, name: str | None) -> Iterator[None]:
        """Prepare the model, the names of metrics and separate means to evaluate on one dataset."""
        history = self.run_history
        kept, prefix = (self.model, self._means), history.metric_name_prefix
        self.model, self._means = self._engine.for_evaluation(self.model), EpochMeans()
        self.eval_name = name
        if name is not None:
            history.set_metric_name_prefix(f"{prefix}{name}_")
        try:
            yield
        finally:
            (self.model, self._means), self.eval_name = kept, None
            history.set_metric_name_prefix(prefix)

    def _evaluation_batches(self, loader: Any) -> Iterator[Any]:
        """This process' batches of an evaluation, everything that they draw being keyed."""
        seed_all(derive_key(self.seed, "eval", self._engine.rank), self.device)
        return evaluation_batches(
            loader,
            self._engine,
            self._calculate_padding,
            seed=self.seed,
            limit=self.eval_batch_limit,
        )

    def _calculate_padding(self, batch: Any) -> None:
        """Run the forward pass of an evaluation batch that counts for nothing."""
        self.is_padding_batch = True
        self._means.start_step(is_padding=True)
        self._trainer.calculate_eval_batch_loss(batch)
        self.is_padding_batch = False

    def _save_requested(self, granted: Requests, now: bool) -> None:
        """Save the granted training states, with the reason to stop if there is one.

        After a skipped update within an epoch they wait until an update is made.
        """
        position = self.position
        # Recorded in the states saved now: only after a pause does resuming continue the run.
        if self._in_run:
            position.stop_reason, position.is_paused = granted.stop_reason, granted.is_pause
        if granted.wait_for_save:
            self.wait_for_saves()
        if position.skipped_in_a_row and not now and granted.stop_reason is None:
            self.control.postpone(granted.saves)
        else:
            for state_dir, request in granted.saves.items():
                self._saver.save(state_dir, request, self._save_metadata.pop(state_dir, {}))

    def _restore_plugins(self) -> None:
        """Restore the rest of a resumed run's state, once its start events are over."""
        state = self._resumed_state
        if state is not None:
            state.check_start(self._trainer)
            state.restore_plugins(self._trainer)
            self._resumed_state = None
            self._reload_changed_data()
            state.check_data(self._trainer)
            state.restore_data(self._trainer)
            assert self._fingerprint is not None  # from `train` on
            self._fingerprint = state.settle(self._trainer, self._fingerprint)
            self._manifest = None
            if self.was_finished:
                self._print_finished()

    @property
    def _recomputing(self) -> list[str]:
        """The plugins that run the micro-batches of an accumulated batch again."""
        plugins = self.plugins.by_name.items()
        return [name for name, plugin in plugins if getattr(plugin, "needs_recompute", False)]

    def _report_replacements(self, hook: str) -> None:
        """Warn if several plugins replace a run, of which only the first does."""
        own = [one for one in self.plugins.implementations(hook) if not one.is_default]
        first, *others = [repr(one.name) for one in own if not one.wrapper] or [""]
        if others and self.is_main_process:
            warnings.warn(
                f"The plugins {first} and {' and '.join(others)} each replace {hook}: unless "
                f"{first} returns None, only {first} is called. Mark what adds to the run instead "
                "of replacing it @hookimpl(wrapper=True)",
                stacklevel=2,
            )

    def _check_update_plugins(self) -> None:
        """Refuse plugins that make the update in a way that isn't possible here.

        Raises:
            ValueError: naming them.
        """
        own = [one for one in self.plugins.implementations("run_update") if not one.is_default]
        replacing = [one.name for one in own if not one.wrapper]
        if len(replacing) > 1:
            raise ValueError(
                f"The plugins {', '.join(map(repr, replacing))} each replace run_update, and only "
                "the first would be called: disable all but one of them"
            )
        if self._engine.reduces_gradients_before_update:
            return
        found = [f"{name} (needs_recompute)" for name in self._recomputing]
        looking = self.plugins.implementations("on_gradients_ready")
        found += [f"{one.name} ({one.hook})" for one in (*looking, *own)]
        if found:
            raise ValueError(
                f"{type(self._engine).__name__} reduces gradients in its own update, so it can't "
                "be used with plugins that look at them before or replace it: " + ", ".join(found)
            )

    def _log_progress(self) -> None:
        """Record the mean training loss of the epoch so far, and the learning rate."""
        total, count = self._engine.sum(self._means.loss.sums(self.device)).tolist()
        rates = [one.param_groups[0]["lr"] for one in self.optimizers]
        with written_by(self.run_history, _THE_LOOP):
            if count:
                self.run_history.update_metric("train_loss", total / count)
        # A plugin may record the learning rate as well, at other times.
        with written_by(self.run_history, ""):
            for number, rate in enumerate(rates):
                name = "learning_rate" if len(rates) == 1 else f"learning_rate_{number}"
                self.run_history.update_metric(name, rate)

    def _announce_metrics(self) -> None:
        """Announce the new values of watched metrics to plugins."""
        for metric, value in self._watched.take_new(self._trainer):
            try:
                self._event("on_watched_metric", metric=metric, value=value)
            except StopTrainingError as error:  # the other values are still announced
                self._request_stop(error)

    def _has_nothing_left(self) -> bool:
        """Whether a resumed run was stopped, or has reached its length, before it was saved."""
        length, position = self._length, self.position
        if position.stop_reason is not None:
            return True
        return position.phase == "start" and (
            length.is_counted_out(position.updates, position.skipped)
            or length.is_last_epoch_done(position.epoch_of_run)
            or (length.num_updates is None and length.is_over(self.progress))
        )

    def _print_finished(self) -> None:
        """Print why a run that was finished before does nothing, and how to train longer."""
        position = self.position
        counts = {"epoch": position.epoch_of_run, "update": position.updates}
        done = " and ".join(f"{n} {unit}{'s' * (n != 1)}" for unit, n in counts.items())
        if position.stop_reason is None:
            self.print(
                f"Nothing is left to do: this run has already finished, after {done}. To train "
                "longer, give train() more epochs or updates"
            )
        else:
            self.print(
                f"Nothing is left to do: this run had already stopped, after {done}: "
                f"{position.stop_reason}. To train longer, relax what stopped it, such as by a "
                "larger early_stopping_patience, or resume from a state that was saved before"
            )

    def _print_plugins(self) -> None:
        """Print the plugins of the run, without the defaults, and where their settings are."""
        where = where_enabled(self.settings, self.plugins.by_name)
        names = [name for name in self.plugins.by_name if name not in DEFAULTS]
        if names or where:
            self.print(folded(f"Plugins: {', '.join(names) or 'the default ones'}{where}"))

    # -- Set-up ---------------------------------------------------------------------------------

    def _create_callback_handler(self) -> CallbackHandler:
        return CallbackHandler(self.plugins)

    def _create_accelerator(self) -> Accelerator:
        """Create the accelerator, once per trainer, since it owns the gradient scaler."""
        return self._hooks.create_accelerator(trainer=self)

    def _create_optimizer(self, optimizer: Any) -> Any:
        """The given optimizer, that of a given function or class, or that of a plugin."""
        if optimizer is None:
            create = self._hooks.create_optimizer
            optimizer = create and create(trainer=self)
        elif isinstance(optimizer, type) or (
            callable(optimizer) and not hasattr(optimizer, "step")
        ):
            given, optimizer = optimizer, optimizer(self.model.parameters())
            if optimizer is None:
                raise TypeError(f"optimizer: {shown(given)} returned None, not an optimizer")
        optimizer = as_one(optimizer)
        check_optimizer(optimizer, "optimizer is")
        return optimizer

    def _create_model(self, name: str) -> nn.Module:
        factory: Any = self.plugins.find("register_models", name)
        model: nn.Module = factory()
        if not hasattr(model, "named_parameters"):
            owner = self.plugins.owner("register_models", name)
            raise TypeError(
                f"The model {name!r} of {owner} is {shown(model)}; register_models must register "
                "functions that return an nn.Module"
            )
        return model

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        """Place and wrap model and optimizer.

        Raises:
            ValueError: if there is no model.
        """
        if self.model is None:
            raise ValueError("The Trainer was given None as model: assign trainer.model")
        self.model, self.optimizer = self._engine.prepare(self.model, self.optimizer)
        self._engine.find_untrained(self.model, self.optimizer)

    def _set_eval_batch_size(self, per_device_batch_size: int) -> None:
        """Record in the run config how an evaluation outside a training run is done."""
        kwargs = self._data.eval_kwargs
        if kwargs is not None:
            per_device_batch_size = kwargs.get("batch_size") or per_device_batch_size
        if self.run_config is None:
            self._arguments = RunArguments(
                num_epochs=1, per_device_batch_size=per_device_batch_size
            )
            self._plan_run(Position())
        self.run_config = replace(
            self.run_config,
            eval_dl_kwargs=kwargs,
            eval_per_device_batch_size=per_device_batch_size,
            eval_total_batch_size=per_device_batch_size * self._engine.num_processes,
        )

    def _plan_run(self, position: Position) -> None:
        """Work out the sizes and the length of the run, the rest of it with the present data."""
        loader, limit = self._data.train_loader, self.train_batch_limit
        self.run_config, self._length = plan_run(
            self._arguments,
            self._accelerator,
            loader,
            position,
            batch_limit=limit,
            train_dl_kwargs=self._data.train_kwargs,
            eval_dl_kwargs=self._data.eval_kwargs,
        )
        self.num_updates = self._length.num_updates
        self._accumulation = Accumulation(
            self._arguments.gradient_accumulation_steps,
            loader,
            limit,
            self.run_config.train_per_device_batch_size,
            self._engine,
        )
        if self._recomputing:
            from pa_core.loop.recompute import Recompute

            self._accumulation.recompute = Recompute()

    def _reload_changed_data(self) -> None:
        """Load data that a plugin has changed; the rest of the run is planned with them."""
        requested = self.control.take_reload()
        self._data.reload_eval(self._arguments, requested=requested)
        change = self._data.reload_train(self._arguments, requested=requested)
        if change is None:
            return
        self._plan_run(self.position)
        if self._fingerprint is not None:
            changed = data_fingerprint(self._trainer)
            if change == "data":  # a resumed run will change them, too
                changed["data_changed"] = True
            # A new one, since the manifest of a state may still be being written.
            self._fingerprint, self._manifest = self._fingerprint | changed, None


def _create_plugins(
    settings: Settings, callbacks: Iterable[Any] | None, plugins: Iterable[Any] | None
) -> PluginManager:
    manager = PluginManager(Defaults(), CHECKS)
    for name, plugin, source in build_all_plugins(settings, callbacks=callbacks, plugins=plugins):
        manager.register(plugin, name, source)
    return manager
