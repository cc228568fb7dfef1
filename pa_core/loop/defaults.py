"""The trainer's own implementations of the provider hooks.

They are called last: a plugin that returns anything but None takes precedence over them, and a
subclass that overrides the Trainer's method takes precedence over both.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pa_core.data.loader import create_dataloader
from pa_core.engine.optimizers import schedulers_of
from pa_core.engine.process_group import connected
from pa_core.hookspecs import hookimpl
from pa_core.loop.arguments import check_scheduler
from pa_core.loop.pairs import loss_of_pair
from pa_core.loop.run_numbers import RunNumbers, build_scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from pa_core.control import UpdateResult
    from pa_core.trainer import Trainer


class Defaults:
    """The core's own implementations of provider and run hooks."""

    @hookimpl(trylast=True)
    def create_accelerator(self, trainer: Trainer) -> Accelerator:
        # accelerate keeps one state per process, shared by all accelerators. Without a fresh one, a
        # trainer would silently train in the precision of the accelerator created last.
        if isinstance(AcceleratorState._shared_state, dict):
            AcceleratorState._shared_state = {}
        else:  # on TPUs
            AcceleratorState._reset_state()
        return Accelerator(**connected(trainer.accelerator_kwargs))

    @hookimpl(trylast=True)
    def create_train_dataloader(
        self, trainer: Trainer, batch_size: int, train_dl_kwargs: dict[str, Any] | None
    ) -> Any:
        kwargs = trainer.get_default_train_dl_kwargs(batch_size) | (train_dl_kwargs or {})
        trainer._data.train_kwargs = kwargs
        return self._create_dataloader(
            trainer, trainer.train_dataset, kwargs, "train", train_dl_kwargs
        )

    @hookimpl(trylast=True)
    def create_eval_dataloader(
        self, trainer: Trainer, batch_size: int, eval_dl_kwargs: dict[str, Any] | None
    ) -> Any:
        kwargs = trainer.get_default_eval_dl_kwargs(batch_size) | (eval_dl_kwargs or {})
        trainer._data.eval_kwargs = kwargs
        return self._create_dataloader(
            trainer, trainer.eval_dataset, kwargs, "eval", eval_dl_kwargs
        )

    def _create_dataloader(
        self,
        trainer: Trainer,
        dataset: Any,
        kwargs: dict[str, Any],
        purpose: str,
        given: dict[str, Any] | None,
    ) -> Any:
        kwargs = dict(kwargs)
        loader = create_dataloader(
            dataset,
            kwargs.pop("collate_fn", trainer.collate_fn),
            kwargs,
            seed=trainer.seed,
            rank=trainer._engine.rank,
            num_processes=trainer._engine.num_processes,
            purpose=purpose,
            is_batch_size_given="batch_size" in (given or {}),
        )
        if loader is not dataset:  # as those of accelerate; the loop moves the batches there
            loader.device = trainer.device
        return loader

    @hookimpl(trylast=True)
    def create_scheduler(self, trainer: Trainer) -> Any:
        numbers = trainer._run_scheduler.created_for or RunNumbers.of(trainer)

        def build(create: Any, optimizer: Any) -> Any:
            try:
                scheduler = build_scheduler(trainer, numbers, create, optimizer)
            except TypeError as error:
                if not isinstance(create, str):
                    error.add_note(
                        "create_scheduler_fn is called with the optimizer alone: give other "
                        "arguments with functools.partial, such as partial(StepLR, step_size=10)"
                    )
                raise
            origin = "create_scheduler_fn returned"
            if isinstance(create, str):
                owner = trainer.plugins.owner("register_schedulers", create)
                origin = f"The scheduler {create!r} of {owner} is"
            check_scheduler(scheduler, trainer.optimizers, origin, is_adapted=True)
            if scheduler is None and trainer.is_main_process:
                warnings.warn(f"{origin} None, so the learning rate stays as it is", stacklevel=2)
            return scheduler

        return schedulers_of(trainer.create_scheduler_fn, trainer.optimizer, build)

    @hookimpl(trylast=True)
    def calculate_train_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any]:
        return loss_of_pair(trainer, batch, "train")

    @hookimpl(trylast=True)
    def calculate_eval_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any]:
        with torch.no_grad():
            return loss_of_pair(trainer, batch, "eval")

    @hookimpl(trylast=True)
    def calculate_predictions(self, trainer: Trainer, batch: Any) -> Any:
        if isinstance(batch, list | tuple):
            return trainer.model(batch[0])
        return trainer.model(**batch) if isinstance(batch, Mapping) else trainer.model(batch)

    @hookimpl(trylast=True)
    def run_training(self, trainer: Trainer) -> bool:
        trainer._run_training()
        return True  # not None: the first result ends the call

    @hookimpl(trylast=True)
    def run_update(self, trainer: Trainer) -> UpdateResult:
        trainer.clip_gradients()
        return trainer.apply_update()

    @hookimpl(trylast=True)
    def run_evaluation(self, trainer: Trainer) -> bool:
        trainer._run_evaluation()
        return True

    @hookimpl(trylast=True)
    def run_prediction(self, trainer: Trainer, loader: Any, to: str | Path | None) -> Any:
        from pa_core.loop.predict import collect_predictions, write_predictions

        if to is not None:
            return write_predictions(trainer, loader, to)
        return collect_predictions(trainer, loader)
