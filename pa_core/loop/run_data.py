"""The data of a run: their loaders, and how these follow data that plugins change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pa_core.data.loader import KeyedDataLoader
from pa_core.data.process_split import Purpose, split_between_processes
from pa_core.data.source import Change, Source

if TYPE_CHECKING:
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
            RuntimeError: if a dataset hasn't the same length on every process.
        """
        engine = self._trainer._engine
        if engine.num_processes == 1:
            return loader
        is_own = isinstance(loader, KeyedDataLoader)
        length = len(loader.dataset) if is_own else -1
        most, least = engine.largest(length, -length)
        if most != -least:
            raise RuntimeError(
                f"The dataset to {purpose} on has {length} samples on process {engine.rank}, and "
                "more or fewer on others. Use the same dataset on every process: its batches are "
                "split between them"
            )
        return loader if is_own else split_between_processes(loader, engine, purpose)

    def reload_train(self, arguments: RunArguments, *, requested: bool) -> Change | None:
        """Load the training data again if they have changed.

        Returns:
            What has changed: the data, by a request or an assignment, or only their length.

        Raises:
            RuntimeError: if the processes don't make the same change.
        """
        change = self._changed("train", self._train_source, requested)
        if change is not None:
            self.load_train(arguments)
        return change

    def reload_eval(self, arguments: RunArguments, *, requested: bool = False) -> None:
        """Load the evaluation data again if they have changed; errors as for training."""
        if self._changed("eval", self._eval_source, requested) is not None:
            self.load_eval(arguments.per_device_batch_size, arguments.eval_dataloader_kwargs)

    def changed_lengths(self) -> list[str]:
        """Describe the data whose length has changed since they were loaded, for an error."""
        found = []
        for purpose, source in (("train", self._train_source), ("eval", self._eval_source)):
            try:
                lengths = source.describe_lengths(getattr(self._trainer, f"{purpose}_dataset"))
            except Exception:  # noqa: BLE001 - of the dataset, which has failed already
                continue
            if lengths is not None:
                found.append(f"The {purpose} data have changed their length ({lengths})")
        return found

    def _changed(self, purpose: str, source: Source, requested: bool) -> Change | None:
        """What has changed since data were loaded, the same on every process."""
        data = getattr(self._trainer, f"{purpose}_dataset")
        change = source.change(data)
        explicit, grown = int(requested or change == "data"), int(change == "length")
        most, least, grown = self._trainer._engine.largest(explicit, -explicit, grown)
        if most != -least:
            raise RuntimeError(
                f"The {purpose} data were changed on some processes only: assign "
                f"trainer.{purpose}_dataset, or call control.reload_data(), on every process, in a "
                "plugin that runs on all"
            )
        if grown and not explicit:
            lengths = source.describe_lengths(data) or "on another process"
            warnings.warn(
                f"The length of the {purpose} data has changed since they were loaded ({lengths}), "
                "and they are loaded again. Call control.reload_data() when you change data",
                stacklevel=2,
            )
        return "data" if explicit else "length" if grown else None
