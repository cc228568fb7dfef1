"""Training states on disk: complete or absent, and every byte verified before it is used.

A state is a directory. It is written under a temporary name, flushed to the disk and renamed. Its
``manifest.json`` lists the size and SHA-256 of every other file, and holds a hash of itself.
Tensors are safetensors, the rest is strict JSON: reading a state executes nothing named in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint import atomic_io
from pa_core.errors import TrainingStateError
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 16 * 2**20


class StateWriter:
    """Write the files of a state into a temporary directory, and commit it.

    A context manager: once committed, the state is at `target` with everything that was written;
    after an error, `target` is as it was before.

    Args:
        target: the directory of the state. An existing state is replaced as a whole.

    Raises:
        TrainingStateError: if `target` exists and is not a training state.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(os.path.abspath(local_path(target)))
        recover_replaced(self.target.parent)
        if self.target.exists() and not (self.target / MANIFEST).is_file():
            if not self.target.is_dir() or any(self.target.iterdir()):
                raise TrainingStateError(
                    f"{self.target} already exists and is not a training state; not overwritten. "
                    "Choose a new directory"
                )
        self.directory = atomic_io.beside(self.target, "tmp")
        self._files: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> StateWriter:
        atomic_io.make_folder(self.directory)
        return self

    def write(self, name: str, *chunks: bytes | memoryview) -> None:
        """Write one file and flush it to the disk."""
        self._write(name, chunks)

    def write_json(self, name: str, value: Any) -> None:
        """Write strict JSON, without line breaks."""
        self.write(name, compact_json_bytes(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors, each with its own bytes even if they share memory."""
        from pa_core.checkpoint.safetensors_io import tensor_chunks

        self._write(name, tensor_chunks(tensors))

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of all files in the directory, then rename the directory.

        Raises:
            TrainingStateError: if a plugin has added anything but regular files, such as a link.
        """
        self._add_plugins_files()
        sequence = _next_sequence(self.target.parent)
        content = {"format": FORMAT, "sequence": sequence, **manifest, "files": self._files}
        content["sha256"] = hashlib.sha256(json_bytes(content)).hexdigest()
        self.write(MANIFEST, json_bytes(content))
        atomic_io.flush_folder(self.directory)
        atomic_io.put_in_place(self.directory, self.target)
        _last_sequence[self.target.parent] = sequence

    def __exit__(self, *error: object) -> None:
        if self.directory.exists():
            atomic_io.remove_tree(self.directory)

    def _write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        self._files[name] = atomic_io.write_file(self.directory / name, chunks)

    def _add_plugins_files(self) -> None:
        """Add the files that plugins have written into the directory."""
        for path in sorted(self.directory.rglob("*")):
            name = path.relative_to(self.directory).as_posix()
            if name in self._files:
                continue
            if stat.S_ISDIR(path.lstat().st_mode):
                atomic_io.flush_folder(path)
            elif not _is_regular(path) or not _is_inside(name):
                raise TrainingStateError(
                    f"{name} can't be part of a state: it is not a regular file with a plain name"
                )
            else:
                atomic_io.flush_file(path)
                self._files[name] = atomic_io.size_and_hash(path)


def read_manifest(state_dir: str | Path) -> dict[str, Any]:
    """Read a state's manifest and check its own hash.

    Raises:
        TrainingStateError: if there is none, or if it was changed.
    """
    path = local_path(state_dir) / MANIFEST
    try:
        if not _is_regular(path):
            raise TrainingStateError(f"{path} is damaged: it is not a regular file")
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise TrainingStateError(f"{path} is damaged: it is too large to be a manifest")
        raw = atomic_io.read_file(path)
        content = parse_json(raw)
        if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
            raise TrainingStateError(f"{path} is damaged: it has no list of files")
        claimed = content.pop("sha256", None)
        # Byte for byte: not even a space may have been added.
        is_whole = raw == json_bytes({**content, "sha256": claimed})
        if not is_whole or hashlib.sha256(json_bytes(content)).hexdigest() != claimed:
            raise TrainingStateError(f"{path} is damaged: its hash doesn't match its content")
    except OSError as error:
        raise TrainingStateError(f"{state_dir} is not a training state: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TrainingStateError(f"{path} is damaged: {error}") from error
    if content.get("format") != FORMAT:
        raise TrainingStateError(
            f"{state_dir} has format {content.get('format')!r}; this version reads format {FORMAT}"
        )
    for name, file in content["files"].items():
        if not _is_inside(name):
            raise TrainingStateError(f"{path} lists {name!r}, which is not a path inside the state")
        if not isinstance(file, dict) or file.keys() != {"size", "sha256"}:
            raise TrainingStateError(f"{path} doesn't list size and hash of {name!r}")
    return content


def verify(state_dir: str | Path, *, every_byte: bool = True) -> list[str]:
    """Verify a state.

    Args:
        state_dir: the state.
        every_byte: hash every byte; otherwise verify only the manifest, and the names, kinds and
            sizes of the files.

    Returns:
        A sentence for each problem; an empty list if the state is intact.
    """
    try:
        listed: dict[str, Any] = read_manifest(state_dir)["files"]
        return _problems(Path(state_dir), listed, every_byte)
    except (TrainingStateError, OSError) as error:
        return [str(error)]


def _problems(directory: Path, listed: Mapping[str, Any], every_byte: bool) -> list[str]:
    problems = []
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if not stat.S_ISDIR(path.lstat().st_mode)
    } - {MANIFEST}
    for name in sorted(present | set(listed)):
        path = directory / name
        if name not in listed:
            problems.append(f"{path} isn't listed in the manifest")
        elif name not in present:
            problems.append(f"{path} is missing")
        elif not _is_regular(path):
            problems.append(f"{path} is not a regular file")
        elif path.stat().st_size != listed[name]["size"]:
            problems.append(
                f"{path} has {path.stat().st_size} bytes, its manifest says {listed[name]['size']}"
            )
        elif every_byte and atomic_io.size_and_hash(path) != listed[name]:
            problems.append(f"{path} is damaged: its hash doesn't match")
    return problems


class StateReader:
    """Read a state, and verify each file by its hash.

    A file is hashed as it is read. `check_rest` hashes all others; call it before anything is
    restored.

    Raises:
        TrainingStateError: if anything is missing, damaged or not listed, naming all of it.
    """

    def __init__(self, state_dir: str | Path) -> None:
        self.directory = local_path(state_dir)
        self.manifest = read_manifest(self.directory)
        problems = _problems(self.directory, self.manifest["files"], every_byte=False)
        if problems:
            self._raise_damaged()
        self._unread = set(self.manifest["files"])

    def read_json(self, name: str) -> Any:
        """Read one JSON file of the state."""
        try:
            return parse_json(self._read(name))
        except (ValueError, RecursionError) as error:
            raise TrainingStateError(
                f"{self.directory / name} is not strict JSON: {error}"
            ) from error

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Read one safetensors file of the state, onto the CPU."""
        from pa_core.checkpoint.safetensors_io import read_tensors

        content = self._read(name)
        try:
            return read_tensors(content)
        except TrainingStateError as error:
            raise TrainingStateError(f"{self.directory / name} can't be read: {error}") from error

    def check_rest(self) -> None:
        """Verify the files that weren't read, such as those that plugins have written."""
        for name in sorted(self._unread):
            if atomic_io.size_and_hash(self.directory / name) != self.manifest["files"][name]:
                self._raise_damaged()

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _read(self, name: str) -> bytes:
        if name not in self:
            raise TrainingStateError(f"{self.directory} has no {name}")
        content = atomic_io.read_file(self.directory / name)
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            self._raise_damaged()
        self._unread.discard(name)
        return content

    def _raise_damaged(self) -> None:
        problems = verify(self.directory) or ["it changed while it was being read"]
        raise TrainingStateError("The training state is damaged: " + "; ".join(problems))


def find_states(folder: str | Path) -> list[Path]:
    """The states in a folder by their manifests, newest first, without damaged ones."""
    found = []
    for path in state_folders(folder):
        try:
            manifest = read_manifest(path)
        except TrainingStateError:
            continue
        found.append((_sequence(manifest), path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def state_folders(folder: str | Path) -> list[Path]:
    """The directories in a folder that are or were states, damaged ones included, by name."""
    folder = local_path(folder)
    return [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if not path.name.startswith(".")
        and stat.S_ISDIR(path.lstat().st_mode)
        and any(os.path.lexists(path / name) for name in (MANIFEST, "state.json"))
    ]


def recover_replaced(folder: Path) -> None:
    """Restore states that were moved away for replacements that were never completed."""
    atomic_io.recover_replaced(folder, lambda path: not verify(path))


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed processes have left of states that they were writing or removing.

    Returns:
        What was removed. What a running process may still be writing is kept.
    """
    recover_replaced(folder)
    leftovers = atomic_io.find_leftovers(folder)
    for path in leftovers:
        atomic_io.remove_leftover(path)
    return leftovers


_last_sequence: dict[Path, int] = {}


def _next_sequence(folder: Path) -> int:
    """A number above those of all states in a folder; unlike a clock, it never goes back."""
    if folder not in _last_sequence:
        newest = find_states(folder)[:1]
        _last_sequence[folder] = _sequence(read_manifest(newest[0])) if newest else 0
    return _last_sequence[folder] + 1


def _sequence(manifest: Mapping[str, Any]) -> int:
    number = manifest.get("sequence")
    return number if isinstance(number, int) else 0


def newest_intact_state(folder: str | Path) -> Path | None:
    """The newest intact state in a folder; each damaged one is skipped with a warning.

    Returns:
        None if the folder is missing or contains no state.

    Raises:
        TrainingStateError: if there are states and all of them are damaged.
    """
    folder = Path(os.path.abspath(local_path(folder)))
    recover_replaced(folder)
    candidates = find_states(folder)
    unreadable = [path for path in state_folders(folder) if path not in candidates]
    damaged = [problem for path in unreadable for problem in verify(path)]
    found = None
    for path in candidates:
        problems = verify(path)
        if not problems:
            found = path
            break
        damaged += problems
    if found is None and damaged:
        raise TrainingStateError(f"No state in {folder} is intact: " + "; ".join(damaged))
    if damaged:
        warnings.warn(
            f"Resuming from {found}, the newest intact state. Damaged: " + "; ".join(damaged),
            stacklevel=2,
        )
    return found


def _is_regular(path: Path) -> bool:
    """Whether this is a regular file, and not a link to one."""
    return stat.S_ISREG(path.lstat().st_mode)


def _is_inside(name: str) -> bool:
    """Whether a name in a manifest is a path inside its state."""
    pure = PurePosixPath(name)
    return (
        name == pure.as_posix() != MANIFEST
        and not pure.is_absolute()
        and name not in ("", ".")
        and ".." not in pure.parts
        and not any(character in name for character in "\\\0")
    )


def json_bytes(value: Any) -> bytes:
    """The content of a manifest: strict JSON with line breaks, for readers."""
    return json.dumps(value, allow_nan=False, indent=1).encode()


def compact_json_bytes(value: Any) -> bytes:
    """The content of any other JSON file.

    Without line breaks, `json` uses its encoder in C. The one in Python takes several times as
    long, which delays the loop as well if it runs in another thread.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def parse_json(content: bytes) -> Any:
    """Read strict JSON.

    Raises:
        ValueError: for anything else, such as a duplicate key, NaN, or 1e400.
        RecursionError: for content that is nested too deeply.
    """
    return json.loads(
        content,
        object_pairs_hook=_without_duplicates,
        parse_float=_finite,
        parse_constant=_finite,
    )


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object has a duplicate key")
    return content
