"""What a Trainer is beside its loop: how it is put together, and what it offers to plugins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator

from pa_core.callbacks import CallbackHandler
from pa_core.checkpoint import model_file
from pa_core.checkpoint.background import StateSaver
from pa_core.checkpoint.manifest import run_manifest
from pa_core.checkpoint.training_state import Position, SavedState
from pa_core.control import SaveRequest, TrainerControl
from pa_core.data.loader import KeyedDataLoader, num_batches, num_samples
from pa_core.data.process_split import Purpose, split_between_processes
from pa_core.diagnostics.modes import modes_kept
from pa_core.durations import Duration, Progress
from pa_core.engine.base import Engine
from pa_core.engine.process_group import check_connected
from pa_core.errors import PreemptedExit, StopTrainingError, TrainingStateError
from pa_core.lengths import RunLength
from pa_core.loop import error_hints
from pa_core.loop.accumulation import AccumulationWindow
from pa_core.loop.arguments import check_model_and_optimizer
from pa_core.loop.consensus import Agreement
from pa_core.loop.defaults import Defaults
from pa_core.plugins.callers import BoundHooks
from pa_core.plugins.explain import as_text, explain
from pa_core.plugins.manager import PluginManager
from pa_core.run_config import TrainerRunConfig
from pa_core.settings.environment import build_all_plugins, where_enabled
from pa_core.settings.table import Settings, find_settings_file, read_settings
from pa_core.tracking import InMemoryRunHistory, LossTracker, RunHistory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pa_core.trainer import Trainer

_OF_A_RUN = (
    *("model", "eval_dataset", "collate_fn", "eval_name", "run_config", "control", "_in_run"),
    *("_is_between_updates", "_loss_tracker", "_eval_dataloader", "_eval_dataloaders"),
    *("_eval_dl_kwargs", "_snapshot"),
)
"""What an evaluation outside a run would change of one that goes on."""


class TrainerBase:
    """A trainer's parts and services; `pa_core.trainer.Trainer` has the steps and the loop."""

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
        self._engine = Engine.of(self._accelerator)
        if self._engine.num_processes > 1:
            self._hooks = BoundHooks(self.plugins, self._stop_together)
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
        self._identity: dict[str, Any] | None = None
        self._snapshot: SavedState | None = None
        self._save_metadata: dict[Path, dict[str, Any]] = {}
        self._saver = StateSaver(self._trainer)
        self._model_key = 0
        self._in_run = False
        self._is_between_updates = True
        self.is_padding_batch = False
        """Whether this process trains on another's batch for company, which counts for nothing."""
        self._agreement = Agreement(self._engine, 0)
        self._clock = 0.0
        self._event("on_init_end")

    @property
    def _trainer(self) -> Trainer:
        """This object, as what it always is: nobody makes a base alone."""
        return cast("Trainer", self)

    # -- What plugins and subclasses use --------------------------------------------------------

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{type(self).__name__}(model={type(self.get_model()).__name__} of {parameters:,} "
            f"parameters, optimizer={type(self.optimizer).__name__}, "
            f"plugins=[{', '.join(self.plugins.plugins)}], device={self.device}, "
            f"processes={self.num_processes})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._accelerator.device

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self._accelerator.is_main_process

    @property
    def num_processes(self) -> int:
        """How many processes train together."""
        return self._engine.num_processes

    @property
    def updates(self) -> int:
        """Optimizer updates that the run has made."""
        return self.position.updates

    @property
    def stop_reason(self) -> str | None:
        """Why the run was stopped early; None where it wasn't."""
        return self.position.stop_reason

    @property
    def progress(self) -> Progress:
        """How far the run is, in each unit of a `Duration`."""
        position = self.position
        length = num_batches(self._train_dataloader, self.train_batch_limit)
        part = position.batch / length if length else 0.0
        epochs = position.epoch - position.first_epoch + part
        fraction = position.updates / self.num_updates if self.num_updates else None
        return Progress(epochs, position.updates, position.samples, position.seconds, fraction)

    @property
    def manifest(self) -> dict[str, Any]:
        """The run's manifest, with plugins, versions, settings, seed, commit and hardware."""
        if self._manifest is None:
            self._manifest = run_manifest(self._trainer)
        return self._manifest

    def gather(self, tensor: Any, padding_value: Any = None) -> Any:
        """Concatenate a tensor of every process along the first dimension, on all of them.

        Sizes of the first dimension may differ, so the host waits for the device to compare them;
        for numbers of no dimension it doesn't. Called on every process.

        Args:
            tensor: a tensor, or a nested list, tuple or dict of them.
            padding_value: rows of the result that hold nothing but this value are removed.
        """
        return self._engine.gather(tensor, padding_value)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once per run: on the main process."""
        if self.is_main_process:
            print(*args, **kwargs)

    def get_model(self, keep_torch_compile: bool = True) -> Any:
        """The model without its distributed containers, and without `torch.compile`'s if asked."""
        return self._engine.unwrap(self.model, keep_torch_compile)

    def explain(self) -> str:
        """Who is called when, in the order of a run, and which methods a subclass overrides.

        `pa_core.plugins.explain.explain` gives the same as plain data.
        """
        return as_text(
            explain(self.plugins, trainer_class=type(self), settings_file=self.settings.file)
        )

    def rewrap_model(self) -> None:
        """Wrap the model anew, once it has changed which of its parameters need gradients.

        `DistributedDataParallel` looks at that only when it wraps. `train` does it by itself; who
        freezes or unfreezes within a run calls this, between updates and on every process.
        """
        self.model = self._engine.rewrap(self.model, self.optimizer)

    def save_checkpoint(
        self,
        save_path: str | Path,
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        save_per_node: bool = True,
        *,
        model: nn.Module | None = None,
    ) -> None:
        """Save model, optimizer and schedule as one portable ``.pt`` file.

        Args:
            save_path: the file; it is replaced at once, or not at all.
            checkpoint_kwargs: more to put in; NumPy scalars become numbers.
            save_optimizer: whether to include the optimizer, if there is one.
            save_scheduler: whether to include the schedule, if there is one.
            save_per_node: write on every machine; otherwise by the run's main process alone.
            model: save its weights in place of the trained model's; a moving average's, say.
        """
        model_file.save_checkpoint(
            self._trainer,
            save_path,
            checkpoint_kwargs,
            save_optimizer,
            save_scheduler,
            save_per_node,
            self.model if model is None else model,
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, load_optimizer: bool = True, load_scheduler: bool = True
    ) -> dict[str, Any]:
        """Load a file of `save_checkpoint`; returns all that is in it.

        Raises:
            ValueError: where it holds an optimizer or a schedule and the trainer has none.
        """
        return model_file.load_checkpoint(
            self._trainer, checkpoint_path, load_optimizer, load_scheduler
        )

    def save_training_state(
        self, output_dir: str | Path, checkpoint_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Save all that `train` needs to go on exactly, in a directory that is complete or absent.

        Asked within a run, it is done at the next boundary: after the update, or after the
        epoch's events. Call it on every process.

        Args:
            output_dir: the directory; a state that is there is replaced.
            checkpoint_kwargs: plain data and tensors that `load_training_state` returns.

        Raises:
            TrainingStateError: where there is no optimizer, or the state can't be written.
        """
        if self.optimizer is None:
            raise TrainingStateError(
                "Without an optimizer there is no training to go on with: give the trainer one, "
                "or save the model with save_checkpoint"
            )
        if self._in_run:
            self._save_metadata[Path(output_dir)] = dict(checkpoint_kwargs or {})
            self.control.save(output_dir)
        else:
            self._saver.save(Path(output_dir), SaveRequest(), checkpoint_kwargs or {})

    def load_training_state(self, input_dir: str | Path) -> dict[str, Any]:
        """Load a state of `save_training_state` outside a run; `train` resumes by itself.

        For evaluating and predicting, neither an optimizer nor the run's schedule is needed.

        Returns:
            Its ``checkpoint_kwargs``, and ``current_epoch``.
        """
        snapshot = SavedState(input_dir, self._engine.rank)
        snapshot.restore_training(self._trainer, in_run=False)
        snapshot.restore_plugins(self._trainer)
        return snapshot.metadata

    # -- Set-up ---------------------------------------------------------------------------------

    def _event(self, name: str, **arguments: Any) -> None:
        self._hooks.refresh()
        caller = getattr(self._hooks, name)
        if caller is not None:
            caller(trainer=self, **arguments)

    def _tell(self, exception: BaseException) -> None:
        """Say what may lie behind an exception that ends a run, and tell the plugins of it."""
        error_hints.explain(
            exception, self._trainer
        )  # first: it ends what would interrupt the others
        self._saver.give_up(exception)
        if isinstance(exception, PreemptedExit):
            return  # nothing has failed: the run was closed in good order
        self.plugins.call_each("on_exception", exception, trainer=self, exception=exception)

    def _stop_together(self, error: StopTrainingError) -> None:
        """Stop when the other processes have heard of it, which can't wait for this one here."""
        if not self._in_run:
            raise error
        self.control.stop(str(error))

    @contextmanager
    def _run_set_aside(self) -> Iterator[None]:
        """Let an evaluation that is called within a run leave the run as it was."""
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
        """Whether code that isn't torch's runs in a step, and may draw from any generator."""
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
        """Record the epoch's mean training loss so far and the learning rate."""
        total, count = self._engine.sum(self._loss_tracker.sums(self.device)).tolist()
        if count:
            self.run_history.update_metric("train_loss", total / count)
        self.run_history.update_metric("learning_rate", self.optimizer.param_groups[0]["lr"])

    def _announce(self) -> None:
        """Say which settings and plugins a run has: nothing is on that isn't said."""
        if self.plugins.plugins:
            names = ", ".join(self.plugins.plugins)
            self.print(f"Plugins: {names}{where_enabled(self.settings)}")

    # -- Set-up ---------------------------------------------------------------------------------

    def _create_callback_handler(self) -> CallbackHandler:
        return CallbackHandler(self.plugins)

    def _create_accelerator(self) -> Accelerator:
        """Create the accelerator; once per trainer, since gradient scalers belong to it."""
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
                    self._eval_dataloaders[name] = self._shard(
                        self._trainer.create_eval_dataloader(batch_size, dataloader_kwargs),
                        "evaluate",
                    )
        finally:
            self.eval_dataset = given
        self._eval_dataloader = next(iter(self._eval_dataloaders.values()), None)

    def _prepare_model_optimizer_and_dataloaders(self) -> None:
        """Put model and optimizer where they belong; our own loaders are sharded already."""
        self.model, self.optimizer = self._engine.prepare(self.model, self.optimizer)

    def _shard(self, loader: Any, purpose: Purpose) -> Any:
        """Share out a loader that every process has alike; ours are shared out already."""
        if self._engine.num_processes == 1 or isinstance(loader, KeyedDataLoader):
            return loader
        return split_between_processes(loader, self._engine, purpose)

    def _set_eval_batch_size(self, per_device_batch_size: int) -> None:
        """Say in the run config how an evaluation outside a training run is done."""
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
        """Work out the sizes of a run: how many updates an epoch and the run will have."""
        processes = self._engine.num_processes
        train_batch = int(
            getattr(self._train_dataloader, "batch_size", None)  # of a ready loader, its own
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
        self._window = AccumulationWindow(
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
    """Whether a module or function is PyTorch's, all of whose draws are from its own generators."""
    return str(getattr(module, "__module__", "")).startswith("torch.")
