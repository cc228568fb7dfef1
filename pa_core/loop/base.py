"""The base of the Trainer: its construction, its parts, and what it offers to plugins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from pa_core.callbacks import CallbackHandler
from pa_core.control import SaveRequest, TrainerControl
from pa_core.data.loader import KeyedDataLoader, num_batches, num_samples
from pa_core.data.process_split import Purpose, split_between_processes
from pa_core.diagnostics.preserve import modes_kept
from pa_core.durations import Duration, RunLength
from pa_core.engine.create import create_engine
from pa_core.engine.process_group import check_connected
from pa_core.errors import PreemptedExit, StopTrainingError
from pa_core.loop.accumulation import Accumulation
from pa_core.loop.arguments import check_model_and_optimizer
from pa_core.loop.consensus import Consensus
from pa_core.loop.defaults import Defaults
from pa_core.loop.error_hints import add_hints
from pa_core.loop.services import TrainerServices
from pa_core.plugins.callers import BoundHooks
from pa_core.plugins.manager import PluginManager
from pa_core.run_config import TrainerRunConfig
from pa_core.settings.environment import build_all_plugins, where_enabled
from pa_core.settings.table import Settings, find_settings_file, read_settings
from pa_core.tracking import InMemoryRunHistory, LossTracker, Position, RunHistory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pa_core.checkpoint.background import StateSaver
    from pa_core.checkpoint.restore import TrainingState

_OF_A_RUN = (
    *("model", "eval_dataset", "collate_fn", "eval_name", "run_config", "control", "_in_run"),
    *("_is_between_updates", "_loss_tracker", "_eval_dataloader", "_eval_dataloaders"),
    *("_eval_dl_kwargs", "_resumed_state"),
)
"""The attributes that an evaluation changes, and that a run in progress needs unchanged."""


class TrainerBase(TrainerServices):
    """A trainer's parts and services; `pa_core.trainer.Trainer` adds the steps and the loop."""

    def __init__(
        self,
        model: nn.Module | str,
        loss_func: Callable[..., Tensor] | None,
        optimizer: Any,
        callbacks: Iterable[Any] | None = None,
        run_history: RunHistory | None = None,
        *,
        plugins: Iterable[Any] | None = None,
        settings: Settings | str | Path | None = None,
        seed: int = 42,
        mixed_precision: str | None = None,
        accelerator: Accelerator | Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(settings, Settings):
            settings = read_settings(Path(settings) if settings else find_settings_file())
        self.settings = settings
        self.plugins = PluginManager(Defaults())
        for name, plugin, source in build_all_plugins(
            settings, callbacks=callbacks, plugins=plugins
        ):
            self.plugins.register(plugin, name, source)
        self._hooks = BoundHooks(self.plugins)
        self.callback_handler = self._create_callback_handler()

        if isinstance(model, str):
            model = self._create_model(model)
        self.model: Any = model
        self.loss_func: Any = loss_func
        if (callable(optimizer) and not hasattr(optimizer, "step")) or isinstance(optimizer, type):
            optimizer = optimizer(model.parameters())
        self.optimizer = optimizer
        if optimizer is None:
            self.optimizer = self._hooks.create_optimizer and self._hooks.create_optimizer(
                trainer=self
            )
        check_model_and_optimizer(self.model, self.optimizer)
        self.seed = seed
        self.run_history = InMemoryRunHistory() if run_history is None else run_history
        self.accelerator_kwargs = dict(accelerator) if isinstance(accelerator, Mapping) else {}
        if mixed_precision is not None:
            self.accelerator_kwargs["mixed_precision"] = mixed_precision
        self._accelerator = (
            accelerator if isinstance(accelerator, Accelerator) else self._create_accelerator()
        )
        check_connected(self._accelerator)
        self._engine = create_engine(self._accelerator)
        if self._engine.num_processes > 1:
            self._hooks = BoundHooks(self.plugins, self._request_stop)
        self.plugins.set_process(is_main=self.is_main_process)

        # What a run sets.
        self.create_scheduler_fn: Callable[[Any], Any] | str | None = None
        self.scheduler: Any = None
        self.collate_fn: Callable[[Any], Any] | None = None
        self.train_dataset: Any = None
        self.eval_dataset: Any = None
        self.eval_name: str | None = None
        self.train_batch_limit: int | None = None
        self.eval_batch_limit: int | None = None
        self.grad_norm: Tensor | None = None
        self.control = TrainerControl()
        self.position = Position()
        self.run_config: Any = None  # a TrainerRunConfig from the first run on
        self.num_updates: int | None = None
        self._length = RunLength(Duration.parse(1), None, None)
        self._loss_tracker = LossTracker()
        self._train_dataloader: Any = None
        self._eval_dataloader: Any = None
        self._eval_dataloaders: dict[str | None, Any] = {}
        self._train_dl_kwargs: dict[str, Any] | None = None
        self._eval_dl_kwargs: dict[str, Any] | None = None
        self._manifest: dict[str, Any] | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._resumed_state: TrainingState | None = None
        self._save_metadata: dict[Path, dict[str, Any]] = {}
        self._in_run = False
        self._is_between_updates = True
        self.is_padding_batch = False
        """Whether this process trains on a padding batch, which counts for nothing."""
        self._consensus = Consensus(self._engine, 0)
        self._clock = 0.0
        self._event("on_init_end")

    @cached_property
    def _saver(self) -> StateSaver:
        """Saves training states; created, and its code imported, when the first one is saved."""
        from pa_core.checkpoint.background import StateSaver

        return StateSaver(self._trainer)

    def _save_states(self, requests: Mapping[Path, SaveRequest]) -> None:
        """Save the requested training states; called on every process at an update boundary."""
        for state_dir, request in requests.items():
            self._saver.save(state_dir, request, self._save_metadata.pop(state_dir, {}))

    def _wait_for_saves(self) -> None:
        """Wait until the training state being saved is complete; called on every process."""
        if "_saver" in vars(self):
            self._saver.wait()

    # -- Set-up ---------------------------------------------------------------------------------

    def _event(self, name: str, **arguments: Any) -> None:
        self._hooks.refresh()
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
            yield
            return
        kept = {name: vars(self)[name] for name in _OF_A_RUN}
        self.control = TrainerControl()
        try:
            with modes_kept(self.model):
                yield
        finally:
            vars(self).update(kept)

    def _step_may_draw(self) -> bool:
        """Whether a step runs code from outside torch, which may draw from any generator."""
        calculate = type(self._trainer).calculate_train_batch_loss
        plugins = self.plugins.implementations("calculate_train_batch_loss")
        modules = list(self.model.modules())
        return (
            calculate.__module__ != "pa_core.trainer"
            or any(not isinstance(found.plugin, Defaults) for found in plugins)
            or not all(map(_is_of_torch, modules))
            or any(module._forward_hooks or module._forward_pre_hooks for module in modules)
            or not (self.loss_func is None or _is_of_torch(self.loss_func))
        )

    def _log_progress(self) -> None:
        """Record the mean training loss of the epoch so far, and the learning rate."""
        total, count = self._engine.sum(self._loss_tracker.sums(self.device)).tolist()
        if count:
            self.run_history.update_metric("train_loss", total / count)
        self.run_history.update_metric("learning_rate", self.optimizer.param_groups[0]["lr"])

    def _print_plugins(self) -> None:
        """Print the plugins of the run and where their settings come from."""
        if self.plugins.by_name:
            names = ", ".join(self.plugins.by_name)
            self.print(f"Plugins: {names}{where_enabled(self.settings)}")

    # -- Set-up ---------------------------------------------------------------------------------

    def _create_callback_handler(self) -> CallbackHandler:
        return CallbackHandler(self.plugins)

    def _create_accelerator(self) -> Accelerator:
        """Create the accelerator, once per trainer, since it owns the gradient scaler."""
        return self._hooks.create_accelerator(trainer=self)

    def _create_model(self, name: str) -> nn.Module:
        factory: Any = self.plugins.find("register_models", name)
        return factory()

    def _create_eval_dataloaders(
        self, batch_size: int, dataloader_kwargs: dict[str, Any] | None
    ) -> None:
        given = self.eval_dataset
        named = given if isinstance(given, Mapping) else {None: given}
        self._eval_dataloaders = {}
        try:
            for name, self.eval_dataset in named.items():
                if self.eval_dataset is not None:
                    self._eval_dataloaders[name] = self._split_loader(
                        self._trainer.create_eval_dataloader(batch_size, dataloader_kwargs),
                        "evaluate",
                    )
        finally:
            self.eval_dataset = given
        self._eval_dataloader = next(iter(self._eval_dataloaders.values()), None)

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        """Place and wrap model and optimizer."""
        self.model, self.optimizer = self._engine.prepare(self.model, self.optimizer)

    def _split_loader(self, loader: Any, purpose: Purpose) -> Any:
        """Split the batches of a loader between processes; our own loaders do it themselves."""
        if self._engine.num_processes == 1 or isinstance(loader, KeyedDataLoader):
            return loader
        return split_between_processes(loader, self._engine, purpose)

    def _set_eval_batch_size(self, per_device_batch_size: int) -> None:
        """Record in the run config how an evaluation outside a training run is done."""
        if self._eval_dl_kwargs is not None:
            per_device_batch_size = self._eval_dl_kwargs.get("batch_size") or per_device_batch_size
        if self.run_config is None:
            self.run_config = self._create_run_config(per_device_batch_size, 1, 1, None, None)
        self.run_config = replace(
            self.run_config,
            eval_dl_kwargs=self._eval_dl_kwargs,
            eval_per_device_batch_size=per_device_batch_size,
            eval_total_batch_size=per_device_batch_size * self._engine.num_processes,
        )

    def _create_run_config(
        self,
        per_device_batch_size: int,
        num_epochs: int | str | Duration,
        gradient_accumulation_steps: int,
        max_num_train_steps: int | None,
        gradient_clip_value: float | None,
        gradient_clip_norm: float | None = None,
    ) -> TrainerRunConfig:
        """Work out the sizes of a run: batches, and the updates of an epoch and of the run."""
        processes = self._engine.num_processes
        train_batch = int(
            getattr(self._train_dataloader, "batch_size", None)  # of a ready loader
            or (self._train_dl_kwargs or {}).get("batch_size")
            or per_device_batch_size
        )
        eval_batch = int((self._eval_dl_kwargs or {}).get("batch_size") or train_batch)
        loader = self._train_dataloader
        length = 0 if loader is None else num_batches(loader, self.train_batch_limit)
        per_epoch = None if length is None else math.ceil(length / gradient_accumulation_steps)
        duration = Duration.parse(num_epochs)
        global_batch = train_batch * processes * gradient_accumulation_steps
        self._length = RunLength.plan(
            duration,
            updates_per_epoch=per_epoch,
            samples_per_epoch=num_samples(loader, self.train_batch_limit),
            global_batch_size=global_batch,
            max_updates=max_num_train_steps,
        )
        self.num_updates = self._length.num_updates
        self._accumulation = Accumulation(
            gradient_accumulation_steps, loader, self.train_batch_limit, train_batch, self._engine
        )
        if self.num_updates is not None and per_epoch:
            epochs: int | None = math.ceil(self.num_updates / per_epoch)
        else:
            epochs = math.ceil(duration.value) if duration.unit == "epochs" else None
        return TrainerRunConfig(
            num_epochs=epochs,
            train_per_device_batch_size=train_batch,
            train_dl_kwargs=self._train_dl_kwargs,
            eval_per_device_batch_size=eval_batch,
            eval_dl_kwargs=self._eval_dl_kwargs,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_clip_value=gradient_clip_value,
            gradient_clip_norm=gradient_clip_norm,
            train_total_batch_size=global_batch,
            eval_total_batch_size=eval_batch * processes,
            num_update_steps_per_epoch=per_epoch,
            num_local_update_steps_per_epoch=per_epoch,
            max_num_train_steps=max_num_train_steps,
            is_local_process_zero=self._accelerator.is_local_main_process,
            is_world_process_zero=self._accelerator.is_main_process,
            is_distributed=processes > 1,
            mixed_precision=self._accelerator.mixed_precision,
            num_processes=processes,
        )


def _is_of_torch(module: Any) -> bool:
    """Whether a module or function is PyTorch's, which draws from its own generators only."""
    return str(getattr(module, "__module__", "")).startswith("torch.")
