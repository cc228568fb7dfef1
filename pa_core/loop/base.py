"""The base of the Trainer: its construction, its parts, and what it offers to plugins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from accelerate.utils.operations import recursively_apply

from pa_core.callbacks import CallbackHandler
from pa_core.control import SaveRequest, TrainerControl
from pa_core.data.loader import KeyedDataLoader, num_batches, num_samples
from pa_core.data.process_split import Purpose, split_between_processes
from pa_core.diagnostics.preserve import modes_kept
from pa_core.durations import Duration, Progress, RunLength
from pa_core.engine.create import create_engine
from pa_core.engine.process_group import check_connected
from pa_core.errors import PreemptedExit, StopTrainingError, TrainingStateError
from pa_core.loop.accumulation import Accumulation
from pa_core.loop.arguments import check_model_and_optimizer
from pa_core.loop.consensus import Consensus
from pa_core.loop.defaults import Defaults
from pa_core.loop.error_hints import add_hints
from pa_core.plugins.callers import BoundHooks
from pa_core.plugins.manager import PluginManager
from pa_core.run_config import TrainerRunConfig
from pa_core.settings.environment import build_all_plugins, where_enabled
from pa_core.settings.table import Settings, find_settings_file, read_settings
from pa_core.tracking import InMemoryRunHistory, LossTracker, Position, RunHistory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pa_core.checkpoint.background import StateSaver
    from pa_core.checkpoint.restore import TrainingState
    from pa_core.trainer import Trainer

_OF_A_RUN = (
    *("model", "eval_dataset", "collate_fn", "eval_name", "run_config", "control", "_in_run"),
    *("_is_between_updates", "_loss_tracker", "_eval_dataloader", "_eval_dataloaders"),
    *("_eval_dl_kwargs", "_resumed_state"),
)
"""The attributes that an evaluation changes, and that a run in progress needs unchanged."""


class TrainerBase:
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
        self._drawing: set[str] = set()  # see EpochRandomness
        self._is_between_updates = True
        self.is_padding_batch = False
        """Whether this process trains on a padding batch, which counts for nothing."""
        self._consensus = Consensus(self._engine, 0)
        self._clock = 0.0
        self._event("on_init_end")

    @property
    def _trainer(self) -> Trainer:
        """This object with its real type: a base is never built alone."""
        return cast("Trainer", self)

    # -- What plugins and subclasses use --------------------------------------------------------

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{type(self).__name__}(model={type(self.get_model()).__name__} of {parameters:,} "
            f"parameters, optimizer={type(self.optimizer).__name__}, "
            f"plugins=[{', '.join(self.plugins.by_name)}], device={self.device}, "
            f"processes={self.num_processes})"
        )

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._accelerator.device

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self._accelerator.is_main_process

    @property
    def num_processes(self) -> int:
        """The number of processes that train together."""
        return self._engine.num_processes

    @property
    def updates(self) -> int:
        """The number of updates that the run has made."""
        return self.position.updates

    @property
    def stop_reason(self) -> str | None:
        """Why the run was stopped early; None if it wasn't."""
        return self.position.stop_reason

    @property
    def progress(self) -> Progress:
        """The progress of the run, in each unit of a `Duration`."""
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
            from pa_core.checkpoint.manifest import run_manifest

            self._manifest = run_manifest(self._trainer)
        return self._manifest

    def gather(self, tensor: Any, padding_value: Any = None) -> Any:
        """Concatenate a tensor of every process along the first dimension, on every process.

        A collective. Sizes of the first dimension may differ, so the host synchronises with the
        device to compare them, except for 0-d tensors.

        Args:
            tensor: a tensor, or a nested list, tuple or dict of them.
            padding_value: rows that contain only this value are removed from the result.
        """
        gathered = self._engine.gather(tensor)
        if padding_value is None:
            return gathered
        from pa_core.utils import remove_padding

        return recursively_apply(remove_padding, gathered, padding_value)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once per run: on the main process."""
        if self.is_main_process:
            print(*args, **kwargs)

    def get_model(self, keep_torch_compile: bool = True) -> Any:
        """The model without its distributed wrappers and, if asked, without `torch.compile`'s."""
        return self._engine.unwrap(self.model, keep_torch_compile)

    def explain(self) -> str:
        """Which plugins are called when in a run, and which methods a subclass overrides.

        `pa_core.plugins.explain.describe_loop` gives the same as plain data.
        """
        from pa_core.plugins.explain import describe_loop, loop_as_text

        return loop_as_text(
            describe_loop(self.plugins, trainer_class=type(self), settings_file=self.settings.file)
        )

    def rewrap_model(self) -> None:
        """Wrap the model again after the set of its trainable parameters has changed.

        `DistributedDataParallel` reads that set only when it wraps. `train` wraps by itself; a
        plugin that freezes or unfreezes within a run calls this between updates, on every process.
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
        """Save model, optimizer and scheduler as a checkpoint: one portable ``.pt`` file.

        Args:
            save_path: the file, which is replaced atomically.
            checkpoint_kwargs: additional entries; NumPy scalars become Python numbers.
            save_optimizer: whether to include the optimizer, if there is one.
            save_scheduler: whether to include the scheduler, if there is one.
            save_per_node: whether to write on every machine, or on the main process only.
            model: save the weights of this model, such as a moving average, instead.
        """
        from pa_core.checkpoint import model_file

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
        """Load a file of `save_checkpoint`; returns all its entries.

        Raises:
            ValueError: if it holds an optimizer or a scheduler and the trainer has none.
        """
        from pa_core.checkpoint import model_file

        return model_file.load_checkpoint(
            self._trainer, checkpoint_path, load_optimizer, load_scheduler
        )

    def save_training_state(
        self, output_dir: str | Path, checkpoint_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Save everything that `train` needs to resume exactly, in a directory.

        The directory is complete or absent. Within a run, the state is saved at the next
        boundary: after the update, or after the events of the epoch. Call it on every process.

        Args:
            output_dir: the directory; a training state that is already there is replaced.
            checkpoint_kwargs: plain data and tensors that `load_training_state` returns.

        Raises:
            TrainingStateError: if there is no optimizer, or the state can't be written.
        """
        if self.optimizer is None:
            raise TrainingStateError(
                "There is no training to resume without an optimizer: give the Trainer one, or "
                "save the model with save_checkpoint"
            )
        if self._in_run:
            self._save_metadata[Path(output_dir)] = dict(checkpoint_kwargs or {})
            self.control.save(output_dir)
        else:
            self._saver.save(Path(output_dir), SaveRequest(), checkpoint_kwargs or {})

    def load_training_state(self, input_dir: str | Path) -> dict[str, Any]:
        """Load a training state outside a run; to resume, use ``train(resume_from=…)``.

        Evaluating and predicting need neither the run's optimizer nor its scheduler.

        Returns:
            Its ``checkpoint_kwargs``, and ``current_epoch``.
        """
        from pa_core.checkpoint.restore import TrainingState

        state = TrainingState(input_dir, self._engine.rank)
        state.restore_training(self._trainer, in_run=False)
        state.restore_plugins(self._trainer)
        return state.metadata

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
