"""What a trainer offers to plugins and subclasses, in addition to its steps and runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate.utils.operations import recursively_apply

from pa_core.control import SaveRequest
from pa_core.data.loader import num_batches
from pa_core.durations import Progress
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from pa_core.control import TrainerControl
    from pa_core.engine.base import Engine
    from pa_core.plugins.manager import PluginManager
    from pa_core.settings.table import Settings
    from pa_core.tracking import Position
    from pa_core.trainer import Trainer


class TrainerServices:
    """What plugins and subclasses use; `pa_core.loop.base.TrainerBase` builds the parts."""

    model: Any
    optimizer: Any
    settings: Settings
    plugins: PluginManager
    control: TrainerControl
    position: Position
    num_updates: int | None
    train_batch_limit: int | None
    _accelerator: Accelerator
    _engine: Engine
    _in_run: bool
    _manifest: dict[str, Any] | None
    _save_metadata: dict[Path, dict[str, Any]]
    _train_dataloader: Any

    @property
    def _trainer(self) -> Trainer:
        """This object with its real type: a base is never built alone."""
        return cast("Trainer", self)

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
            self._trainer._saver.save(Path(output_dir), SaveRequest(), checkpoint_kwargs or {})

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
