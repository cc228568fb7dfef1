"""What a trainer offers to plugins and subclasses, in addition to its steps and runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from accelerate.utils.operations import recursively_apply

from pa_core.control import SaveRequest
from pa_core.data.loader import num_batches
from pa_core.data.rng import derive_key
from pa_core.display.streams import print_line
from pa_core.durations import Progress
from pa_core.engine.optimizers import given_optimizers, positions_of
from pa_core.errors import TrainingStateError
from pa_core.loop.micro_batches import micro_batches
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from pa_core.callbacks import CallbackHandler
    from pa_core.checkpoint.restore import TrainingState
    from pa_core.control import TrainerControl
    from pa_core.durations import RunLength
    from pa_core.engine.base import Engine
    from pa_core.loop.accumulation import Accumulation
    from pa_core.loop.means import EpochMeans
    from pa_core.loop.run_data import RunData
    from pa_core.plugins.manager import PluginManager
    from pa_core.settings.table import Settings
    from pa_core.tracking import Position
    from pa_core.trainer import Trainer

T = TypeVar("T")


class TrainerServices:
    """What plugins and subclasses use; `pa_core.loop.base.TrainerBase` builds the parts."""

    model: Any
    optimizer: Any
    settings: Settings
    plugins: PluginManager
    control: TrainerControl
    position: Position
    num_updates: int | None
    seed: int
    train_batch_limit: int | None
    eval_batch_limit: int | None
    eval_name: str | None
    is_padding_batch: bool
    _accelerator: Accelerator
    _callback_handler: CallbackHandler
    _engine: Engine
    _in_run: bool
    _length: RunLength
    _resumed_state: TrainingState | None
    _means: EpochMeans
    _accumulation: Accumulation
    _manifest: dict[str, Any] | None
    _save_metadata: dict[Path, dict[str, Any]]
    _data: RunData

    @property
    def _trainer(self) -> Trainer:
        """This object with its real type: a base is never built alone."""
        return cast("Trainer", self)

    def __repr__(self) -> str:
        model = self.get_model()
        parameters = sum(p.numel() for p in model.parameters()) if model is not None else 0
        return (
            f"{type(self).__name__}(model={type(model).__name__} of {parameters:,} "
            f"parameters, optimizer={type(self.optimizer).__name__}, "
            f"plugins=[{', '.join(self.plugins.by_name)}], device={self.device}, "
            f"processes={self.num_processes})"
        )

    @property
    def callback_handler(self) -> CallbackHandler:
        """The plugins as a list of callbacks; another one would change no calls."""
        return self._callback_handler

    # -- Hardware and processes -----------------------------------------------------------------

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
    def rank(self) -> int:
        """The number of this process, from 0 on; the main process is 0."""
        return self._engine.rank

    def rng(self, name: str = "", *, per_rank: bool = False) -> torch.Generator:
        """A new generator on the CPU, for your own draws at this place of the run.

        Its numbers depend on the run's seed, `name`, the epoch and the micro-batch only, so a
        resumed run draws the same. Whatever draws more than once at a place uses different names.

        Args:
            name: what is drawn.
            per_rank: whether each process has its own numbers; otherwise they are the same.

        >>> from pa_core.testing import tiny_trainer
        >>> import torch
        >>> trainer = tiny_trainer()
        >>> order = torch.randperm(1000, generator=trainer.rng("order"))
        >>> torch.equal(order, torch.randperm(1000, generator=trainer.rng("order")))
        True
        """
        import torch

        place = self.position.epoch, self.position.batch + self._accumulation.begun
        key = derive_key(self.seed, "rng", name, *place, self.rank if per_rank else "every rank")
        return torch.Generator().manual_seed(key)

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, a `torch.amp.GradScaler`; None without one.

        DeepSpeed scales by itself, so there is none under DeepSpeed.
        """
        return self._accelerator.scaler

    @property
    def sharded_by(self) -> str | None:
        """What may shard model, gradients or optimizer: ``"FSDP"``, ``"DeepSpeed"``, or nothing."""
        return self._engine.sharded_by

    @property
    def has_whole_gradients(self) -> bool:
        """Whether each process holds the whole gradient of every parameter.

        From the last backward pass of an accumulated batch until the update, ``parameter.grad`` is
        then the reduced gradient, the same on every process. False under FSDP and DeepSpeed.
        """
        return self._engine.sharded_by is None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor of the same shape over all processes; a collective."""
        return self._engine.sum(tensor)

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The maximum of each integer over all processes; a collective that reads no device.

        >>> from pa_core.testing import tiny_trainer
        >>> tiny_trainer().largest(3, 5)
        (3, 5)
        """
        return self._engine.largest(*numbers)

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

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of each process in the order of ranks, on every process; a collective.

        Args:
            value: anything that can be pickled. For tensors, `gather` is faster.
        """
        return self._engine.gather_objects(value)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace the content of tensors by that of the main process; a collective.

        Args:
            tensors: as many as on the main process, in the same order and of the same shapes, on
                any device.
        """
        self._engine.broadcast(tensors)

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run an action on every process; if it fails on one, all raise instead of waiting forever.

        A collective: it returns when every process is done.

        Args:
            action: called without arguments.

        Returns:
            What the action returns on this process.

        Raises:
            OtherProcessError: if the action failed on another process only. A process on which it
                failed raises its own error.
        """
        return self._engine.run_on_all(action)

    def move(self, batch: Any) -> Any:
        """Move a batch to the device: a tensor, or a nested list, tuple or dict of them.

        The loop does so with each batch of its loaders. On a CPU the batch is returned as it is.
        """
        return self._engine.move(batch)

    # -- The run --------------------------------------------------------------------------------

    @property
    def in_run(self) -> bool:
        """Whether a training run is in progress; False within `evaluate`, even during a run."""
        return self._in_run

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
        length = num_batches(self._data.train_loader, self.train_batch_limit)
        # A run resumed before an evaluation may have shorter epochs than the one that ends there.
        part = min(position.batch / length, 1.0) if length else 0.0
        epochs = position.epoch - position.first_epoch + part
        fraction = self._length.fraction(position.updates, position.skipped)
        return Progress(epochs, position.updates, position.samples, position.seconds, fraction)

    @property
    def run_length(self) -> RunLength:
        """The length of the run as given to `train`, and in updates if that is known."""
        return self._length

    @property
    def mean_loss(self) -> float:
        """The mean training or evaluation loss of the epoch so far, on this process.

        It is calculated when it is read, which synchronises host and device. 0 before the first
        batch; the run history has the mean over all processes at the end of the epoch.
        """
        return self._means.loss.average

    def record_mean(
        self, name: str, value: float | Tensor, items: float | Tensor | None = None
    ) -> None:
        """Record a value of this step, to be averaged over the items of the epoch like the loss.

        The mean over all processes is recorded at the end of the epoch as ``train_NAME``,
        ``eval_NAME`` or ``evaluation_NAME``. A loss method may instead return
        ``{"log": {name: value}}`` in its output. Values stay on their device.

        Args:
            name: the name; once per step.
            value: a number, or a tensor with one element: a mean over `items`.
            items: how many items it is the mean of; by default those of the loss. Required where
                the batch size isn't known yet: before the loss method has returned. With 0 items,
                and in a padding batch, the value is ignored.

        Raises:
            RuntimeError: outside the steps of an epoch.
            ValueError: if the name is recorded twice, or `items` is missing.
        """
        self._means.record(name, value, items)

    @property
    def optimizers(self) -> tuple[Any, ...]:
        """The optimizers as they were given, without accelerate's wrapper; empty without any."""
        return given_optimizers(self.optimizer)

    def update_only(self, *optimizers: Any) -> None:
        """Have the coming update step only some of the optimizers, such as those of a GAN.

        Call it in a loss method or a hook of a step, from `on_train_step_start` to
        `on_backward_end`, on every process; every micro-batch of the accumulated batch may do so.
        The other optimizers' gradients are discarded before `on_gradients_ready`, so that they are
        neither clipped nor part of a norm. It is an update of the run like any other, and each
        optimizer's learning-rate scheduler is stepped at each of them. The update after it steps
        all optimizers again.

        Args:
            optimizers: some of `optimizers`, or their positions.

        Raises:
            ValueError: for none, or for what isn't an optimizer of this trainer; or if the
                accumulated batch is to step others.
            RuntimeError: outside of the steps of an accumulated batch.
        """
        chosen = positions_of(optimizers, self.optimizers)
        means, batch = self._means, self._accumulation
        if batch.is_complete and chosen == batch.chosen:
            return  # from a loss method that recomputes the gradients
        is_updated = batch.is_empty and means.items is not None
        if not (self._in_run and means.is_in_step) or is_updated or batch.is_complete:
            raise RuntimeError(
                "update_only() is called in a loss method or a hook of a training step, from "
                "on_train_step_start to on_backward_end"
            )
        if batch.chosen not in (None, chosen):
            raise ValueError(
                f"update_only() was called for the optimizers {sorted(batch.chosen)} and for "
                f"{sorted(chosen)} in the same update"
            )
        batch.chosen = chosen

    @property
    def is_resuming(self) -> bool:
        """Whether the start events of a resumed run are fired, and plugins aren't restored yet."""
        return self._resumed_state is not None

    @property
    def manifest(self) -> dict[str, Any]:
        """The run's manifest, with plugins, versions, settings, seed, commit and hardware."""
        if self._manifest is None:
            from pa_core.checkpoint.manifest import run_manifest

            self._manifest = run_manifest(self._trainer)
        return self._manifest

    # -- Data -----------------------------------------------------------------------------------

    @property
    def train_dataloader(self) -> Any:
        """The training loader of this process; None before the first run."""
        return self._data.train_loader

    @property
    def eval_dataloaders(self) -> Mapping[str | None, Any]:
        """The evaluation loaders of this process by dataset name; None names a single dataset."""
        return self._data.eval_loaders

    @property
    def _train_dataloader(self) -> Any:
        """`train_dataloader`, as subclasses and callbacks for pytorch-accelerated read it."""
        return self._data.train_loader

    @property
    def _eval_dataloader(self) -> Any:
        """The loader of the present evaluation; between evaluations, the first one, or None."""
        loaders = self._data.eval_loaders
        return loaders.get(self.eval_name, next(iter(loaders.values()), None))

    @property
    def num_train_batches(self) -> int | None:
        """The training batches of an epoch on this process; None if unknown in advance."""
        return num_batches(self._data.train_loader, self.train_batch_limit)

    @property
    def num_eval_batches(self) -> int | None:
        """The batches of the present evaluation on this process; None if unknown in advance.

        Between evaluations, those of the first evaluation dataset.
        """
        return num_batches(self._eval_dataloader, self.eval_batch_limit)

    def train_batches(self, limit: int | None = None, *, epoch: int | None = None) -> Iterator[Any]:
        """Iterate over the training batches of an epoch again, without training on them.

        The batches are on the device, with the same samples and augmentation as in the loop. Every
        process gets the same number of batches; `is_padding_batch` is true for those that count for
        nothing. Don't call it between the steps of an epoch, when the loader is in use.

        Args:
            limit: the maximum number of batches.
            epoch: the number of the epoch; by default the current one.

        Raises:
            ValueError: before the first run, when there is no training data.
        """
        if self._data.train_loader is None:
            raise ValueError("No training batches yet: train_batches() needs a run")
        limits = [one for one in (limit, self.train_batch_limit) if one is not None]
        before = self.is_padding_batch
        try:
            for micro in micro_batches(
                self._data.train_loader,
                self._engine,
                seed=self.seed,
                epoch=self.position.epoch if epoch is None else epoch,
                start=0,
                limit=min(limits, default=None),
                accumulation=1,
            ):
                self.is_padding_batch = micro.is_padding
                yield micro.data
        finally:
            self.is_padding_batch = before

    # -- Model, output and inspection -----------------------------------------------------------

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once per run: on the main process; a closed output doesn't end the run."""
        if self.is_main_process:
            print_line(*args, **kwargs)

    def get_model(self, keep_torch_compile: bool = True) -> Any:
        """The model without its distributed wrappers and, if asked, without `torch.compile`'s."""
        if self.model is None:
            return None
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
        """Wrap the model again if the set of its trainable parameters has changed; a collective.

        `DistributedDataParallel` reads that set only when it wraps. The loop notices a change by
        itself, before the next update. A plugin may call this between updates, on every process,
        to wrap at once.

        Raises:
            RuntimeError: if processes differ in their trainable parameters.
            ValueError: under FSDP and DeepSpeed, if the set has changed since they prepared the
                model.
        """
        self.model = self._engine.rewrap(self.model, self.optimizer)

    # -- Files ------------------------------------------------------------------------------------

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

        with self._engine.evaluation_mode(self.optimizer):
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

        If any part of it is refused, nothing has changed.

        Args:
            checkpoint_path: the file.
            load_optimizer: whether to load the optimizer, if the file has one.
            load_scheduler: whether to load the scheduler, if the file has one.

        Raises:
            CheckpointError: if it isn't such a file.
            ValueError: if it holds an optimizer or a scheduler and the trainer has none, or another
                one.
            RuntimeError: if it holds the weights of another model.
        """
        from pa_core.checkpoint import model_file

        with self._engine.evaluation_mode(self.optimizer):
            return model_file.load_checkpoint(
                self._trainer, checkpoint_path, load_optimizer, load_scheduler
            )

    def save_training_state(
        self,
        output_dir: str | Path,
        checkpoint_kwargs: Mapping[str, Any] | None = None,
        *,
        now: bool = False,
        must: bool = True,
        keep: int | None = None,
    ) -> None:
        """Save everything that `train` needs to resume exactly, in a directory.

        The directory is complete or absent. Within a run, the state is saved at the next
        boundary: after the update, or after the events of the epoch. Call it on every process.

        Args:
            output_dir: the directory; a training state that is already there is replaced.
            checkpoint_kwargs: plain data and tensors that `load_training_state` returns.
            now: save at once, also in `on_stop_training_error`, after which a run has no boundary
                before its end events, which may change the model.
            must: whether a failure to write is an error; otherwise it is a warning.
            keep: how many intact states to keep in the folder, as in `TrainerControl.save`.

        Raises:
            TrainingStateError: if there is no optimizer, if the state can't be written, or with
                `now` while a run is in progress.
        """
        if self.optimizer is None:
            raise TrainingStateError(
                "Without an optimizer there is nothing to resume: give the Trainer one, or "
                "save the model with save_checkpoint"
            )
        if now and self._in_run and self.position.stop_reason is None:
            raise TrainingStateError(
                "A run in progress saves its state at the next boundary, when every plugin is "
                "done with the update: leave out now=True"
            )
        path, metadata = local_path(output_dir), dict(checkpoint_kwargs or {})
        if self._in_run and not now:
            self._save_metadata[path] = metadata
            self.control.save(path, must=must, keep=keep)
        else:
            self._trainer._saver.save(path, SaveRequest(must=must, keep=keep), metadata)

    def wait_for_saves(self) -> None:
        """Wait until the training state that is being saved is complete; on every process.

        Raises:
            OSError: if it could not be written, and had to be.
        """
        if "_saver" in vars(self):  # a state has been saved
            self._trainer._saver.wait()

    def load_training_state(self, input_dir: str | Path) -> dict[str, Any]:
        """Load a training state outside a run; to resume, use ``train(resume_from=…)``.

        Evaluating and predicting need neither the run's optimizer nor its scheduler.

        Args:
            input_dir: the directory of the state.

        Returns:
            Its ``checkpoint_kwargs``, ``current_epoch``, and as ``global_step`` the updates made.
        """
        from pa_core.checkpoint.restore import TrainingState

        state = TrainingState(input_dir, self._engine.rank)
        state.restore_training(self._trainer, in_run=False)
        state.restore_plugins(self._trainer)
        return state.metadata

    # -- Trial runs and timing --------------------------------------------------------------------

    def trial(
        self, plugins: Iterable[Any] = (), *, data: Any = None, alone: bool = False
    ) -> AbstractContextManager[Trainer]:
        """A copy of this trainer for trial runs; on exit everything is restored.

        The copy shares model, optimizer, data and settings. It has its own run: history, control,
        position and scheduler. It prints nothing. It calls the given plugins, and the provider and
        registry hooks of the trainer's own plugins; their events, their wrappers of runs and their
        `create_scheduler` aren't called. On exit, even after an exception, the model, the
        optimizer, the gradient scaler and the random generators are as before, bit for bit::

            with trainer.trial([RecordLosses()], data=dataset) as probe:
                probe.train(dataset, "100 updates")

        Args:
            plugins: classes or instances, called in this order.
            data: a dataset or loader whose own generators are restored as well.
            alone: let each process train by itself on the same data, with no collectives, so that
                one may fail. Not while the model is sharded.

        Raises:
            ValueError: under DeepSpeed; and for `alone` under FSDP.
        """
        from pa_core.loop.trial import trial

        return trial(self._trainer, plugins, data=data, alone=alone)

    def wrap_phases(
        self, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    ) -> AbstractContextManager[None]:
        """Replace each call that is a phase of a run by ``around(phase, call)``, to time or watch.

        The phases are ``data`` (the wait for a training batch; the call raises `StopIteration` at
        the end of an epoch), ``forward``, ``backward``, ``optimizer``, ``evaluation``, ``saving``
        and ``loop``, the rest of a training epoch. Calls are nested: all others within ``loop``,
        for example. To wrap the calls of plugins, use `PluginManager.wrap_calls`.

        Args:
            around: takes a phase and a function; returns a function to call in its place.
        """
        from pa_core.loop.phases import wrap_phases

        return wrap_phases(self._trainer, around)
