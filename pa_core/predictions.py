"""Predictions of many batches: joined in memory, or in a folder that is filled as they are made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pa_core.checkpoint import atomic_io
from pa_core.checkpoint.codec import decode, encode
from pa_core.checkpoint.safetensors_io import tensor_chunks
from pa_core.checkpoint.storage import compact_json_bytes, parse_json
from pa_core.errors import TrainingStateError
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from pa_core.engine.base import Engine

__all__ = ["PaddedRows", "Predictions"]

_INDEX = "predictions.json"
_FORMAT = 1
_PART = re.compile(r"part-\d{5}-\d{6}")
_MAX_BYTES = 64 * 2**20  # of the predictions that a process holds before it writes them
_MAX_BATCHES = 4096
_PADDING = "padding of rows"
_NOTHING = "Nothing to predict: the data are empty"


class PaddedRows(NamedTuple):
    """Rows that a batch has padded to its longest; other batches may have longer ones.

    What `calculate_predictions` returns, or an entry of it. `predict` pads all rows to the longest
    of all batches, so that the result doesn't depend on how samples were batched.

    Attributes:
        values: of shape ``(samples, length, …)``; all dimensions but the first may differ between
            batches.
        padding: fills them at their ends.
    """

    values: Tensor
    padding: int | float


class Predictions:
    """Predictions in a folder, which `predict(…, to="folder")` has written; read as needed.

    Args:
        folder: the folder.

    Raises:
        ValueError: if it doesn't contain complete predictions.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(local_path(folder)))
        path = self.folder / _INDEX
        try:
            index = parse_json(path.read_bytes())
            parts = {str(name): list(batches) for name, batches in index["parts"].items()}
            if index["format"] != _FORMAT or not all(map(_PART.fullmatch, parts)):
                raise ValueError(f"format {index['format']!r}, expected {_FORMAT}")
        except OSError as error:
            raise ValueError(f"{self.folder} has no complete predictions: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        self._batches = sorted(
            (start, size, part, number)
            for part, batches in parts.items()
            for number, (start, size) in enumerate(batches)
        )

    def __len__(self) -> int:
        """The number of samples."""
        return sum(size for _, size, *_ in self._batches)

    def __repr__(self) -> str:
        return f"Predictions({str(self.folder)!r}: {len(self)} samples)"

    def batches(self) -> Iterator[Any]:
        """The predictions of each batch, in the order of the dataset; one batch is in memory."""
        from safetensors import safe_open

        opened: dict[str, tuple[str, Any, Any]] = {}  # the part of each process that is being read
        for _, _, part, number in self._batches:
            process = part[: len("part-00000")]
            if process not in opened or opened[process][0] != part:
                file = self.folder / f"{part}.json"
                tensors: Any = safe_open(file.with_suffix(".safetensors"), framework="pt")
                opened[process] = part, parse_json(file.read_bytes()), tensors
            _, encoded, tensors = opened[process]
            yield _unpack(decode(encoded[number], _Tensors(tensors)))

    def load(self) -> Any:
        """All predictions in memory, as `predict` returns them without `to`."""
        return join(list(self.batches()), [size for _, size, *_ in self._batches])


class PredictionWriter:
    """Writes the predictions of this process to a folder, which is complete at the end or absent.

    Args:
        folder: the folder, which all processes can write to. Earlier predictions are replaced.
        engine: connects the processes; creating a writer and finishing it are collectives.

    Raises:
        ValueError: if the folder exists and doesn't contain predictions.
    """

    def __init__(self, folder: str | Path, engine: Engine) -> None:
        self.folder = Path(os.path.abspath(local_path(folder)))
        self._engine = engine
        self._error: OSError | None = None
        self._held: list[Any] = []
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._places: list[tuple[int, int]] = []
        self._parts: dict[str, list[tuple[int, int]]] = {}
        name = engine.run_on_all(self._create if engine.rank == 0 else lambda: "")
        self._directory = self.folder.with_name(engine.gather_objects(name)[0])

    def add(self, start: int, size: int, outputs: Any) -> None:
        """Add a batch's predictions, on the CPU.

        Args:
            start: the place of its first sample, or of the batch, in the data.
            size: the number of its samples.
            outputs: as `join` takes them.

        Raises:
            TypeError: for outputs that can't be written.
            OSError: if the disk is full, for example; on several processes from `finish`.
        """
        tensors: dict[str, Tensor] = {}
        try:
            self._held.append(encode(_pack(outputs), tensors, str(len(self._held))))
        except TrainingStateError as error:
            raise TypeError(f"predict(…, to=…): {error}") from error
        self._tensors |= tensors
        self._places.append((start, size))
        self._bytes += sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        if self._bytes >= _MAX_BYTES or len(self._held) >= _MAX_BATCHES:
            self._flush()

    def finish(self) -> Predictions:
        """Complete the folder.

        Raises:
            OSError: if it could not be written.
        """
        engine = self._engine
        self._flush()
        engine.run_on_all(self._raise)
        gathered = engine.gather_objects(self._parts)
        parts = {name: places for process in gathered for name, places in process.items()}
        if not parts:
            raise ValueError(_NOTHING)

        def complete() -> None:
            missing = [name for name in parts if not (self._directory / f"{name}.json").is_file()]
            if missing:
                raise OSError(
                    f"The main process doesn't see {missing[0]}, which another process has "
                    f"written to {self._directory}: predict(…, to=…) needs a folder that is the "
                    "same on all machines"
                )
            content = compact_json_bytes({"format": _FORMAT, "parts": parts})
            atomic_io.write_file(self._directory / _INDEX, [content])
            atomic_io.flush_folder(self._directory)
            _check_target(self.folder)
            atomic_io.put_in_place(self._directory, self.folder)

        engine.run_on_all(complete if engine.rank == 0 else lambda: None)
        return engine.run_on_all(lambda: Predictions(self.folder))

    def discard(self) -> None:
        """Remove what was written; the folder stays as it was."""
        if self._engine.rank == 0:
            atomic_io.remove_tree(self._directory)

    def _create(self) -> str:
        atomic_io.recover_replaced(self.folder.parent, _has_predictions)
        _check_target(self.folder)
        for left in atomic_io.find_leftovers(self.folder.parent):
            if left.name.startswith(f".tmp-{self.folder.name}-"):
                atomic_io.remove_leftover(left)
        directory = atomic_io.beside(self.folder, "tmp")
        atomic_io.make_folder(directory)
        return directory.name

    def _flush(self) -> None:
        if not self._held or self._error is not None:
            return
        name = f"part-{self._engine.rank:05d}-{len(self._parts):06d}"
        file = self._directory / f"{name}.json"
        try:
            atomic_io.write_file(file.with_suffix(".safetensors"), tensor_chunks(self._tensors))
            atomic_io.write_file(file, [compact_json_bytes(self._held)])
        except OSError as error:
            if self._engine.num_processes == 1:
                raise
            self._error = error  # the other processes are still predicting
        except TrainingStateError as error:
            raise TypeError(f"predict(…, to=…): {error}") from error
        self._parts[name] = self._places
        self._held, self._tensors, self._bytes, self._places = [], {}, 0, []

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def join(parts: list[Any], sizes: list[int], name: str = "") -> Any:
    """Join the outputs of batches: tensors along their first dimension, containers by entry.

    A list as long as its batch has one entry per sample; any other list has one entry per output,
    like a tuple. If the tensors' other dimensions differ, the result is a list with one tensor per
    sample.

    Args:
        parts: the outputs of each batch.
        sizes: the number of samples of each batch.
        name: what the parts are, for errors.

    Raises:
        TypeError: for outputs without one entry per sample.
        ValueError: if there are no outputs, if batches have different ones, or if it is unclear
            what the entries of a list are.

    >>> join([(torch.zeros(2, 3), ["a", "b"]), (torch.ones(1, 3), ["c"])], [2, 1])[1]
    ['a', 'b', 'c']
    """
    if not parts:
        raise ValueError(_NOTHING)
    first = parts[0]
    if first is None and not any(part is not None for part in parts):
        return None
    if isinstance(first, np.ndarray):
        return join([torch.from_numpy(part) for part in parts], sizes, name)
    if isinstance(first, PaddedRows):
        return _pad([part.values for part in parts], first.padding)
    if isinstance(first, Tensor) and first.ndim:
        if all(part.shape[1:] == first.shape[1:] for part in parts):
            return torch.cat(parts)
        return [sample for part in parts for sample in part]
    if isinstance(first, Mapping):
        differing = {str(key) for part in parts for key in part.keys() ^ first.keys()}
        if differing:
            raise ValueError(
                f"The predictions{name} of some batches have {', '.join(sorted(differing))}, and "
                "those of others don't"
            )
        return {
            key: join([part[key] for part in parts], sizes, f"{name}[{key!r}]") for key in first
        }
    if isinstance(first, list) and [len(part) for part in parts] == sizes:
        if _could_be_outputs(parts, sizes):
            raise ValueError(
                f"The predictions{name} are lists as long as their batches, of tensors that are as "
                "long: it is unclear whether there is a tensor for each sample or for each output. "
                "Return a tuple of outputs, or one tensor for all samples (torch.stack)"
            )
        return [sample for part in parts for sample in part]
    if isinstance(first, list | tuple):
        joined = [
            join(list(entries), sizes, f"{name}[{i}]")
            for i, entries in enumerate(zip(*parts, strict=True))
        ]
        return joined if isinstance(first, list) else tuple(joined)
    raise TypeError(
        f"A batch's predictions must have the samples as their first dimension; "
        f"{f'the entry {name}' if name else 'this'} is "
        f"{'a scalar tensor' if isinstance(first, Tensor) else type(first).__name__}"
    )


def _could_be_outputs(parts: list[list[Any]], sizes: list[int]) -> bool:
    """Whether each list may have an entry per output, with a row for each sample."""
    return len(set(sizes)) == 1 and all(
        isinstance(entry, Tensor) and entry.ndim and len(entry) == size
        for part, size in zip(parts, sizes, strict=True)
        for entry in part
    )


def _pad(parts: list[Tensor], padding: float) -> Tensor:
    size = torch.tensor([part.shape[1:] for part in parts]).amax(0)
    widths = [(size - torch.tensor(part.shape[1:])).tolist() for part in parts]
    filled = [
        # From the last dimension to the second, each at its end.
        functional.pad(
            part, [n for missing in reversed(width) for n in (0, missing)], value=padding
        )
        for part, width in zip(parts, widths, strict=True)
    ]
    return torch.cat(filled)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _pack(value: Any) -> Any:
    """The same outputs without `PaddedRows`."""
    if isinstance(value, PaddedRows):
        return {_PADDING: value.padding, "values": value.values}
    if isinstance(value, Mapping):
        return {key: _pack(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        entries = [_pack(entry) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {_PADDING, "values"}:
        return PaddedRows(value["values"], value[_PADDING])
    if isinstance(value, dict):
        return {key: _unpack(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_unpack, value))
    return value


def _has_predictions(folder: Path) -> bool:
    return (folder / _INDEX).is_file()


def _check_target(folder: Path) -> None:
    if not folder.exists() or _has_predictions(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ValueError(
            f"{folder} already exists and has no predictions; not overwritten. Choose a new folder"
        )
