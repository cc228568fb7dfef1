"""Where training data stand that decide their own order, for training states.

Data that save and restore their state do so as of the start of an epoch, and the epoch is read
again up to the position: what was fetched ahead of training doesn't matter then. Other data are
read again too. If they change from epoch to epoch, as streams that count their epochs do, all
their epochs are.

A digest of the next batch shows whether the resumed run continues with the batch that the saved
run would have trained on.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from pa_core.data.digest import batch_digest
from pa_core.data.inspection import digest_of_values
from pa_core.data.keyed_fetch import KEPT, can_be_keyed, keyed_loader
from pa_core.data.keyed_loader import KeyedDataLoader
from pa_core.data.loader import batches
from pa_core.data.process_split import SplitLoader, UnevenSplitLoader
from pa_core.data.ready_loader import has_state, name_of, order_holders, parts
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

_END = object()
_ID_KEYS = ("id", "ids", "index", "indices", "idx", "sample_id", "__key__", "__index__")
"""Entries of a batch that identify its samples."""


class DataState:
    """The state of a training loader, and a watch over the batches that it yields.

    Args:
        loader: the training loader of this process.
        engine: connects the processes.
        announce: prints a text once per run.
        earlier: the state of an earlier loader of the same data.
    """

    def __init__(
        self,
        loader: Any,
        engine: Engine,
        announce: Callable[[str], None],
        earlier: DataState | None = None,
    ) -> None:
        self._loader, self._engine, self._announce = loader, engine, announce
        self._is_own = isinstance(loader, KeyedDataLoader)
        self._ready: Any = loader.loader if isinstance(loader, SplitLoader) else loader
        self.name = name_of(self._ready)
        self._stateful = stateful_parts(self._ready)
        # The epoch in which they were first read, and their values before it.
        self._since: int | None = earlier._since if earlier else None
        self._at_load: str = earlier._at_load if earlier else self._values()
        self._changes = False
        self._at_start: dict[str, Any] = {}  # the state at the start of the present epoch
        self._recent: deque[tuple[int, Any]] = deque(maxlen=KEPT)
        self._end: int | None = None  # the number of batches of the epoch, once it is over
        self._restored: Mapping[str, Any] | None = None
        self._is_compared = self._strict = False

    @property
    def promises_state(self) -> bool:
        """Whether the data save and restore their own state."""
        return bool(self._stateful)

    def state_dict(self, batch: int | None) -> dict[str, Any]:
        """What a resumed run needs to read the same batches.

        Args:
            batch: the number of the next batch of the epoch; None between epochs.
        """
        if self._restored is not None:  # and not read from since
            return {**self._restored, "digest": None, "ids": None}
        if self._is_own or batch is None:
            parts_now = captured(self._stateful) if self._since is not None else {}
            state = {"since": self._since, "parts": parts_now, "changes": self._has_changed()}
            return state | {"digest": None, "ids": None}
        state = {"since": self._since, "parts": self._at_start, "changes": self._changes}
        return state | self._describe(batch)

    def load_state_dict(self, state: Mapping[str, Any], *, is_compared: bool, strict: bool) -> None:
        """Restore what `state_dict` has saved, when the next epoch begins.

        Args:
            state: of this process.
            is_compared: whether the next batch has to be the one that the saved run would have had.
            strict: raise an error if it isn't; otherwise warn.
        """
        self._is_compared, self._strict = is_compared, strict
        if self._is_own:
            restore_parts(self._stateful, state["parts"])
        else:
            self._restored = state

    def epoch(self, *, seed: int, epoch: int, start: int, limit: int | None) -> Iterator[Any]:
        """Iterate over the rest of an epoch; arguments as for `batches`."""
        restored, self._restored = self._restored, None
        if restored is not None:
            self._since = restored["since"]
        if self._since is None:
            self._since = epoch
        if self._is_own:
            return batches(self._loader, seed=seed, epoch=epoch, start=start, limit=limit)
        loaded: dict[str, Any] = {}
        if restored is not None:
            loaded = restored["parts"] if self._stateful else {}
            restore_parts(self._stateful, loaded)
            if self._engine.largest(int(restored["changes"] and not loaded))[0]:
                self._read_again(seed, epoch, limit)
        self._changes = self._has_changed()

        def begin() -> Iterator[Any]:
            return batches(self._loader, seed=seed, epoch=epoch, limit=limit)

        fetched = begin()
        self._at_start = loaded or captured(self._stateful)
        if loaded:
            first = next(fetched, _END)
            # The state may be one at the end of an epoch, which the first iteration completes.
            fetched = begin() if first is _END else chain([first], fetched)
        return self._watched(islice(fetched, start, None), epoch, start, restored)

    def _read_again(self, seed: int, epoch: int, limit: int | None) -> None:
        """Read the epochs before `epoch`, for data that change from one to the next."""
        assert self._since is not None
        if epoch > self._since:
            self._announce(
                f"Reading {epoch - self._since} earlier epochs of {self.name} again, since it "
                "changes from epoch to epoch. With set_epoch(epoch), or with state_dict() and "
                "load_state_dict(), this wouldn't be necessary"
            )
        for earlier in range(self._since, epoch):
            for _ in batches(self._loader, seed=seed, epoch=earlier, limit=limit):
                pass

    def _watched(
        self, fetched: Iterator[Any], epoch: int, start: int, restored: Mapping[str, Any] | None
    ) -> Iterator[Any]:
        """Keep the latest batches, and compare the first one with that of the saved run."""
        self._recent.clear()
        self._end, number = None, start
        expected = None if restored is None or not self._is_compared else restored
        for number, batch in enumerate(fetched, start):
            self._recent.append((number, batch))
            if expected is not None:
                self._compare(self._describe(number), expected, epoch, number)
                expected = None
            yield batch
            number += 1
        self._end = number
        if expected is not None:
            self._compare(self._describe(number), expected, epoch, number)

    def _describe(self, number: int) -> dict[str, str | None]:
        """Digests of a batch of the present epoch, and of what identifies its samples.

        The first is None for a batch that hasn't been fetched, and ``"end"`` after the last one.
        """
        if number == self._end:
            return {"digest": "end", "ids": None}
        for place, (recent, batch) in enumerate(reversed(self._recent), 1):
            if recent == number:
                ids = self._ids(batch, place)
                return {
                    "digest": batch_digest(batch),
                    "ids": None if ids is None else batch_digest(ids),
                }
        return {"digest": None, "ids": None}

    def _ids(self, batch: Any, place: int) -> Any:
        """The indices of a batch, or entries that identify its samples; None if not known.

        Args:
            batch: the batch.
            place: its place among the latest batches, counted from 1 at the last.
        """
        if can_be_keyed(self._ready):
            is_split = isinstance(self._loader, SplitLoader)
            is_whole = not is_split or isinstance(self._loader, UnevenSplitLoader)
            rank, processes = (
                (0, 1) if is_whole else (self._engine.rank, self._engine.num_processes)
            )
            return keyed_loader(self._ready, rank, processes)[1].latest[-place]
        if isinstance(batch, Mapping):
            return next((batch[key] for key in _ID_KEYS if key in batch), None)
        return None

    def _compare(
        self, now: Mapping[str, Any], saved: Mapping[str, Any], epoch: int, number: int
    ) -> None:
        """Report a batch that isn't the one that the saved run would have trained on.

        Raises:
            TrainingStateError: if the run resumes with ``strict=True``, or the data promise to
                restore their state.
        """
        differs = now["digest"] != saved["digest"]
        if not self._engine.largest(int(differs))[0]:
            return
        if not differs:
            how = "is as before on this process, and differs on another"
        elif "end" in (now["digest"], saved["digest"]):
            how = "doesn't exist" if now["digest"] == "end" else "was not there"
        elif now["ids"] is not None and now["ids"] == saved["ids"]:
            how = "has the same samples with other content"
        else:
            how = "is another one"
        found = (
            f"{self.name} doesn't yield the batches that the run would have had without the "
            f"interruption: batch {number} of epoch {epoch} {how}"
        )
        if self.promises_state:
            names = ", ".join(self._stateful)
            raise TrainingStateError(
                f"{found}. Its state was restored by load_state_dict() ({names}), which must "
                "continue where state_dict() was called at the start of an epoch"
            )
        advice = (
            "The data must be the same, and their order and random draws may depend on the epoch "
            "only, by set_epoch(epoch), or be saved by state_dict() and load_state_dict()"
        )
        if self._strict:
            raise TrainingStateError(f"{found}. {advice}. To allow this, pass strict=False")
        warnings.warn(f"{found}. {advice}", stacklevel=2)

    def _has_changed(self) -> bool:
        """Whether the data are no longer as they were when they were loaded."""
        return self._values() != self._at_load

    def _values(self) -> str:
        """A digest of the values that parts hold which nothing else sets for an epoch."""
        if self._is_own:
            return ""
        roots = [one for one in parts(self._ready) if not hasattr(one, "set_epoch")]
        without = [one for one in order_holders(self._ready) if hasattr(one, "set_epoch")]
        if can_be_keyed(self._ready):  # a dataset's order is not its own, but it may cache samples
            without.append(self._ready.dataset)
            roots = [one for one in roots if one is not self._ready.dataset]
        return digest_of_values(*roots, without=without)


def stateful_parts(loader: Any) -> dict[str, Any]:
    """The parts of a loader that save and restore their state, by name.

    The state of a loader includes that of its parts.
    """
    if isinstance(loader, KeyedDataLoader):
        keyed: Any = loader.dataset
        return {"dataset": keyed.dataset} if has_state(keyed.dataset) else {}
    if has_state(loader):
        return {"loader": loader}
    batch_sampler = getattr(loader, "batch_sampler", None)
    named = {
        "dataset": getattr(loader, "dataset", None),
        "sampler": getattr(loader, "sampler", None),
        "batch_sampler": batch_sampler,
        "batch_sampler.sampler": getattr(batch_sampler, "sampler", None),
    }
    found: dict[str, Any] = {}
    for name, part in named.items():
        if has_state(part) and not any(part is other for other in found.values()):
            found[name] = part
    return found


def captured(stateful: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the states of parts, by name; without those that have none yet."""
    states = {name: part.state_dict() for name, part in stateful.items()}
    return {name: deepcopy(state) for name, state in states.items() if state is not None}


def restore_parts(stateful: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Restore what `captured` has returned."""
    for name, state in states.items():
        if name in stateful:
            part = stateful[name]
            part.load_state_dict(state)
            if isinstance(part, DataLoader):
                # Its next iterator completes the epoch of the state, and restores its sampler's
                # generator. The one after it begins an epoch, with generators that were seeded.
                iter(part)
