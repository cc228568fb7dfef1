"""The data of a run: their loaders, and how these follow data that plugins change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pa_core.data.loader import KeyedDataLoader
from pa_core.data.source import Source

if TYPE_CHECKING:
    from pa_core.data.process_split import Purpose
    from pa_core.loop.arguments import RunArguments
    from pa_core.trainer import Trainer


class RunData:
    """Creates the loaders of a trainer's data with its methods, and splits them between processes.

    Args:
        trainer: the trainer; its ``train_dataset`` and ``eval_dataset`` are the data.

    Attributes:
        train_loader: None before the first run.
        eval_loaders: by the name of the dataset; None names a single one.
        train_kwargs: the arguments of the training `DataLoader`; None without one.
        eval_kwargs: the same for evaluation.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.train_loader: Any = None
        self.eval_loaders: dict[str | None, Any] = {}
        self.train_kwargs: dict[str, Any] | None = None
        self.eval_kwargs: dict[str, Any] | None = None
        self._train_source, self._eval_source = Source(None), Source(None)

    def load_train(self, arguments: RunArguments) -> None:
        """Create the loader of the training data."""
        trainer = self._trainer
        loader = trainer.create_train_dataloader(
            arguments.per_device_batch_size, arguments.train_dataloader_kwargs
        )
        self.train_loader = self.split(loader, "train")
        self._train_source = Source(trainer.train_dataset)

    def load_eval(self, batch_size: int, dataloader_kwargs: dict[str, Any] | None) -> None:
        """Create the loaders of the evaluation data.

        Args:
            batch_size: samples per process.
            dataloader_kwargs: the user's arguments of the `DataLoader`.
        """
        given = self._trainer.eval_dataset
        named = given if isinstance(given, Mapping) else {None: given}
        self.eval_loaders, self._eval_source = {}, Source(given)
        for name, dataset in named.items():
            if dataset is not None:
                with self.evaluating_on(dataset):
                    loader = self._trainer.create_eval_dataloader(batch_size, dataloader_kwargs)
                self.eval_loaders[name] = self.split(loader, "evaluate")

    @contextmanager
    def evaluating_on(self, dataset: Any) -> Iterator[None]:
        """Let the trainer create the loader of a dataset, which it does for its evaluation data."""
        trainer = self._trainer
        given, trainer.eval_dataset = trainer.eval_dataset, dataset
        try:
            yield
        finally:
            trainer.eval_dataset = given

    def split(self, loader: Any, purpose: Purpose) -> Any:
        """Split the batches of a loader between processes; our own loaders do it themselves.

        Raises:
            RuntimeError: on every process, if the data aren't the same on all, or are split for
                other processes than these.
            ValueError: for what can't be done with data that the user has split.
        """
        if self._trainer._engine.num_processes == 1:
            if not isinstance(loader, KeyedDataLoader):
                from pa_core.data.split_marks import warn_of_part

                warn_of_part(loader)
            return loader
        from pa_core.data.self_split import split_between_processes

        return split_between_processes(loader, self._trainer._engine, purpose)

    def reload_train(self, arguments: RunArguments, *, requested: bool) -> bool:
        """Load the training data again if they have changed; returns whether they have.

        Raises:
            RuntimeError: if the processes don't make the same change.
        """
        reload = self._must_reload("train", self._train_source, requested)
        if reload:
            self.load_train(arguments)
        return reload

    def reload_eval(self, arguments: RunArguments, *, requested: bool = False) -> None:
        """Load the evaluation data again if they have changed; errors as for training."""
        if self._must_reload("eval", self._eval_source, requested):
            self.load_eval(arguments.per_device_batch_size, arguments.eval_dataloader_kwargs)

    def _must_reload(self, purpose: str, source: Source, requested: bool) -> bool:
        """Whether to load data again, the same on every process."""
        change = source.change(getattr(self._trainer, f"{purpose}_dataset"))
        explicit, grown = int(requested or change == "data"), int(change == "length")
        most, least, grown = self._trainer._engine.largest(explicit, -explicit, grown)
        if most != -least:
            raise RuntimeError(
                f"The {purpose} data were changed on some processes only: assign "
                f"trainer.{purpose}_dataset, or call control.reload_data(), on every process, in a "
                "plugin that runs on all"
            )
        if grown and not explicit:
            lengths = ", ".join(map(str, source.lengths))
            warnings.warn(
                f"The length of the {purpose} data has changed since they were loaded ({lengths}), "
                "and they are loaded again. Call control.reload_data() when you change data",
                stacklevel=2,
            )
        return bool(explicit or grown)
