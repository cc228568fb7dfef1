"""The data of a run: their loaders, and how these follow data that plugins change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.ready import check_loader
from pa_core.data.source import Change, Source

if TYPE_CHECKING:
    from pa_core.data.data_state import DataState
    from pa_core.data.split_checks import Purpose
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
        train_state: follows the training batches for training states; None for a map dataset under
            our own loader, where the position says everything.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.train_loader: Any = None
        self.eval_loaders: dict[str | None, Any] = {}
        self.train_kwargs: dict[str, Any] | None = None
        self.eval_kwargs: dict[str, Any] | None = None
        self.train_state: DataState | None = None
        self._train_source, self._eval_source = Source(None), Source(None)
        self._strict = False

    def load_train(self, arguments: RunArguments) -> None:
        """Create the loader of the training data."""
        trainer = self._trainer
        loader = trainer.create_train_dataloader(
            arguments.per_device_batch_size, arguments.train_dataloader_kwargs
        )
        self.train_loader = self.split(loader, "train")
        before, self._train_source = self._train_source, Source(trainer.train_dataset)
        is_same = trainer._in_run and before.change(trainer.train_dataset) != "data"
        self.train_state = self._follow(loader, self.train_state if is_same else None)

    def _follow(self, loader: Any, earlier: DataState | None) -> DataState | None:
        """The state of the training loader, if there is more to it than the position."""
        if not _decides_order(loader):
            return None
        from pa_core.data.data_state import DataState

        trainer = self._trainer
        return DataState(self.train_loader, trainer._engine, trainer.print, earlier)

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

    def check_exact(self, *, strict: bool) -> None:
        """Report data whose order or draws a resumed run can't repeat.

        Raises:
            ValueError: if there are such data, and `strict` is true.
        """
        self._strict = strict
        self._check_exact(self.train_loader, *self.eval_loaders.values())

    def _check_exact(self, *loaders: Any) -> None:
        found: dict[str, None] = {}
        for loader in loaders:
            if _decides_order(loader) or _may_be_inexact(loader):
                from pa_core.data.ready_loader import inexact_parts

                found |= dict.fromkeys(inexact_parts(_unsplit(loader)))
        if not found:
            return
        text = f"A resumed run can't repeat {'; nor '.join(found)}"
        if self._strict:
            raise ValueError(f"{text}. To allow this, pass strict=False")
        if self._trainer.is_main_process:
            warnings.warn(f"{text}. So it won't be exact", stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """The state of data that decide their own order, on this process; empty without any."""
        position, state = self._trainer.position, dict[str, Any]()
        if self.train_state is not None:
            batch = position.batch if position.phase == "train" else None
            state["train"] = self.train_state.state_dict(batch)
        for name, loader in self.eval_loaders.items():
            if _decides_order(loader):
                from pa_core.data.data_state import captured, stateful_parts

                stateful = stateful_parts(_unsplit(loader))
                if stateful:
                    state.setdefault("eval", {})[name or ""] = captured(stateful)
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, is_compared: bool, strict: bool) -> None:
        """Restore what `state_dict` has returned; arguments as for `DataState`."""
        if self.train_state is not None and "train" in state:
            self.train_state.load_state_dict(state["train"], is_compared=is_compared, strict=strict)
        saved = state.get("eval", {})
        for name, loader in self.eval_loaders.items():
            if _decides_order(loader) and (name or "") in saved:
                from pa_core.data.data_state import restore_parts, stateful_parts

                restore_parts(stateful_parts(_unsplit(loader)), saved[name or ""])

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
            TypeError: if this isn't a loader.
        """
        method = "create_train_dataloader" if purpose == "train" else "create_eval_dataloader"
        check_loader(loader, f"{method} returned")
        if self._trainer._engine.num_processes == 1:
            if not isinstance(loader, KeyedDataLoader):
                from pa_core.data.split_marks import warn_of_part

                warn_of_part(loader)
            return loader
        from pa_core.data.self_split import split_between_processes
        from pa_core.loop.waiting import expecting_all

        engine = self._trainer._engine
        with expecting_all(engine.rank, f"{purpose} at this place of the script"):
            return split_between_processes(loader, engine, purpose)

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
            self._check_exact(self.train_loader)
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


def _unsplit(loader: Any) -> Any:
    """The user's loader, of which this process may have a split."""
    from pa_core.data.process_split import SplitLoader

    return loader.loader if isinstance(loader, SplitLoader) else loader


def _decides_order(loader: Any) -> bool:
    """Whether the position in an epoch doesn't say everything about where a loader stands."""
    if not isinstance(loader, KeyedDataLoader):
        return True
    keyed: Any = loader.dataset
    return hasattr(keyed.dataset, "state_dict")


def _may_be_inexact(loader: KeyedDataLoader) -> bool:
    keyed: Any = loader.dataset
    return keyed.may_draw or not getattr(loader, "in_order", True)
