"""Tell by their content whether processes read the same data, or each its own split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader, Dataset, Subset, default_collate, default_convert

from pa_core.data.digest import batch_digest
from pa_core.data.rng import derive_key, host_generators_kept, seed_host

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

Verdict = Literal["same", "random", "different"]

_IDS = (
    *("id", "ids", "idx", "idxs", "index", "indices", "key", "keys", "__key__", "uid", "uids"),
    *("sample_id", "sample_ids", "sample_index", "example_id", "image_id", "image_ids"),
)
_LABELS = ("labels", "label", "targets", "target", "y")
_MOST_LABELS = 4096
_CERTAIN = math.log(1e6)
"""Labels say that samples are the same if they would agree by chance once in a million."""
_FEW, _MANY = 4, 16  # samples of a map dataset that are compared


class Sight(NamedTuple):
    """What a process sees of a batch or of a sample, to be compared with other processes.

    Attributes:
        whole: the digest of all of it.
        ids: the digest of its sample ids, if it has any.
        labels: the digest of its labels, if it has any.
        place: the index of a subset's sample in the whole dataset.
    """

    whole: str
    ids: str | None = None
    labels: str | None = None
    place: int | None = None


class Seen(NamedTuple):
    """What a process sees of the first batches of a stream.

    Attributes:
        sights: of each batch.
        information: the negative logarithm of the chance that labels like these agree.
    """

    sights: list[Sight]
    information: float


def see_batches(batches: Sequence[Any]) -> Seen:
    """What can be compared of the first batches of a stream."""
    labels = [_ids_and_labels(batch)[1] for batch in batches]
    return Seen([sight_of(batch) for batch in batches], _information(labels))


def sight_of(batch: Any) -> Sight:
    """What can be compared of a batch, or of a sample."""
    with suppress(TypeError, ValueError):  # a mapping that can't be created from a dict
        # A digest leaves out what is on another device.
        batch = recursively_apply(lambda tensor: tensor.detach().cpu(), batch)
    ids, labels = _ids_and_labels(batch)
    return Sight(
        batch_digest(batch),
        None if ids is None else batch_digest(ids),
        None if labels is None else batch_digest(labels),
    )


def _ids_and_labels(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        ids = {key: value for key, value in batch.items() if str(key).lower() in _IDS}
        labels = next((batch[key] for key in _LABELS if key in batch), None)
        return ids or None, labels
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return None, batch[1]
    return None, None


def _information(labels: Sequence[Any]) -> float:
    try:
        flat = [torch.as_tensor(one).detach().cpu().reshape(-1)[:_MOST_LABELS] for one in labels]
        values = torch.cat(flat).numpy()
    except (TypeError, ValueError, RuntimeError):  # labels such as texts
        return 0.0
    counts = np.unique(values, return_counts=True)[1]
    agreeing = float(np.square(counts / max(len(values), 1)).sum())  # of a pair drawn at random
    return -len(values) * math.log(agreeing) if agreeing else 0.0


def compare_batches(seen: Sequence[Seen]) -> Verdict:
    """Compare what each process sees of the first batches of a stream, which can't be read twice.

    Ids decide; without ids, labels decide, if they say enough; else everything in the batches.

    Returns:
        ``"random"`` if the labels say that these are the same samples with other random numbers.
    """
    if len({len(one.sights) for one in seen}) > 1:
        return "different"
    if _agree([[sight.whole for sight in one.sights] for one in seen]):
        return "same"
    everything = [sight for one in seen for sight in one.sights]
    if all(sight.ids is not None for sight in everything):
        is_same = _agree([[sight.ids for sight in one.sights] for one in seen])
        return "same" if is_same else "different"
    if any(sight.labels is None for sight in everything):
        return "different"
    is_same = _agree([[sight.labels for sight in one.sights] for one in seen])
    is_certain = min(one.information for one in seen) > _CERTAIN
    return "random" if is_same and is_certain else "different"


def compare_samples(seen: Sequence[Sequence[Sequence[Sight]]]) -> Verdict:
    """Compare some samples of a map dataset, which each process has fetched twice.

    What differs between two fetches on one process is random, and says nothing.

    Args:
        seen: of each process, what it sees in the first and in the second fetch.

    Returns:
        ``"random"`` if nothing that isn't random differs.
    """
    if len({len(sights) for fetches in seen for sights in fetches}) > 1:
        return "different"
    verdicts = {
        _compare_sample([(first[number], second[number]) for first, second in seen])
        for number in range(len(seen[0][0]))
    }
    if "different" in verdicts:
        return "different"
    return "random" if "random" in verdicts else "same"


def _compare_sample(seen: Sequence[tuple[Sight, Sight]]) -> Verdict:
    for part in ("place", "ids", "whole", "labels"):
        fetched = [[getattr(sight, part) for sight in twice] for twice in seen]
        if any(first != second or first is None for first, second in fetched):
            continue
        if not _agree(fetched):
            return "different"
        if part in ("ids", "whole"):
            return "same"
    return "random"


def _agree(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def compare_datasets(dataset: Any, loader: DataLoader[Any], engine: Engine) -> Verdict:
    """Compare a few samples of a map dataset between processes; a collective.

    If they differ, more of them are fetched twice, which shows what is random in them.

    Args:
        dataset: the user's dataset.
        loader: if it has workers, a worker fetches the samples, since a dataset may open files
            that mustn't be open when workers are started.
        engine: connects the processes.
    """
    look = first_look(dataset, loader)
    most, least = engine.largest(look, -look)
    return settle(dataset, loader, engine, most, -least)


_compared: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""By their ids, datasets that were compared, without a collation that may make a difference."""


def settle(dataset: Any, loader: DataLoader[Any], engine: Engine, most: int, least: int) -> Verdict:
    """The verdict of `compare_datasets`, from the largest and the smallest `first_look`."""
    verdict: Verdict = "same"
    if most != least and least >= 0:
        seen = engine.gather_objects(_sights_of_samples(dataset, loader, _MANY, 2))
        verdict = "same" if None in seen else compare_samples(seen)
    if verdict != "different" and _collation_of(loader) is None:
        with suppress(TypeError):  # a list has no weak references
            _compared[id(dataset)] = dataset
    return verdict


def first_look(dataset: Any, loader: DataLoader[Any]) -> int:
    """A number that is the same wherever the dataset is; -1 if no sample can be fetched.

    0 for a dataset that was compared before.
    """
    if _collation_of(loader) is None and _compared.get(id(dataset)) is dataset:
        return 0
    sights = _sights_of_samples(dataset, loader, _FEW, 1)
    return -1 if sights is None else derive_key(*(sight.whole for sight in sights[0]))


def _sights_of_samples(
    dataset: Any, loader: DataLoader[Any], count: int, times: int
) -> list[list[Sight]] | None:
    """What is seen of samples that are spread over a map dataset; None if fetching them fails."""
    try:
        last = len(dataset) - 1
        places = sorted({number * last // (count - 1) for number in range(count)})
        samples = _Samples(dataset, places, _collation_of(loader), times)
        if loader.num_workers == 0:
            with host_generators_kept():
                return [samples[number] for number in range(times)]
        worker: DataLoader[Any] = DataLoader(
            samples,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=1,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # draws nothing from the global one
        )
        return list(worker)
    except Exception:  # noqa: BLE001 - raised again where the sample is needed, with its index
        return None


def _collation_of(loader: DataLoader[Any]) -> Any:
    """The collation of a loader that the user has written, if it makes batches."""
    collate = getattr(loader.dataset, "collation", loader.collate_fn)
    is_standard = collate in (None, default_collate, default_convert)
    return None if is_standard or loader.batch_sampler is None else collate


def _unchanged(sights: list[Sight]) -> list[Sight]:
    return sights


class _Samples(Dataset[Any]):
    """Some samples of a map dataset as they are seen, and their batch; fetched for each item."""

    def __init__(self, dataset: Any, places: Sequence[int], collate: Any, times: int) -> None:
        self.dataset, self.places, self.collate, self.times = dataset, places, collate, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, number: int) -> list[Sight]:
        seed_host(derive_key("compare", "samples"))
        if getattr(self.dataset, "__getitems__", None) is not None:
            samples = self.dataset.__getitems__(list(self.places))
        else:
            samples = [self.dataset[place] for place in self.places]
        seen = [
            sight_of(sample)._replace(place=_place_in_whole(self.dataset, place))
            for place, sample in zip(self.places, samples, strict=True)
        ]
        return seen if self.collate is None else [*seen, sight_of(self.collate(samples))]


def _place_in_whole(dataset: Any, place: int) -> int | None:
    """The index of a subset's sample in the dataset that it is a subset of."""
    if not isinstance(dataset, Subset):
        return None
    while isinstance(dataset, Subset):
        dataset, place = dataset.dataset, int(dataset.indices[place])
    return place
