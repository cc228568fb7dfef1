"""Training states on disk: complete or absent, and believed only after a look at every byte.

A state is a directory. It is written beside its place, flushed to the disk and renamed, and its
``manifest.json`` lists every other file with size and SHA-256, and itself with a hash too.
Tensors are safetensors, the rest is strict JSON: reading a state runs nothing that it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from pa_core.errors import TrainingStateError

FORMAT = 1
MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 16 * 2**20


class StateWriter:
    """Write the files of a state into a directory that doesn't exist yet.

    Use it as a context manager: on success the state is at `target` with all that was written,
    after an error nothing is there that wasn't there before.

    Args:
        target: the directory to become. A state that is there already is replaced whole.

    Raises:
        TrainingStateError: where `target` is there and is no training state.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(os.path.abspath(target))
        recover_replaced(self.target.parent)
        if self.target.exists() and not (self.target / MANIFEST).is_file():
            if not self.target.is_dir() or any(self.target.iterdir()):
                raise TrainingStateError(
                    f"{self.target} is there already and is no training state: it is left alone. "
                    "Name a directory that is new"
                )
        self.directory = _beside(self.target, "tmp")

    def __enter__(self) -> StateWriter:
        self.directory.mkdir(parents=True)
        return self

    def write(self, name: str, content: bytes) -> None:
        """Write one file and flush it to the disk."""
        with open(self.directory / name, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def write_json(self, name: str, value: Any) -> None:
        """Write strict JSON."""
        self.write(name, _to_json(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors, each with memory of its own."""
        self.write(name, tensor_bytes(tensors))

    def commit(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest over all files that are there, then rename the directory."""
        files = {
            path.relative_to(self.directory).as_posix(): _fingerprint(path)
            for path in sorted(self.directory.rglob("*"))
            if path.is_file()
        }
        sequence = _next_sequence(self.target.parent)
        content = {"format": FORMAT, "sequence": sequence, **manifest, "files": files}
        content["sha256"] = hashlib.sha256(_to_json(content)).hexdigest()
        self.write_json(MANIFEST, content)
        _flush_directory(self.directory)
        trash = None
        if self.target.exists():
            trash = _beside(self.target, "trash")
            os.rename(self.target, trash)
        try:
            os.rename(self.directory, self.target)
        except OSError:
            if trash is not None:
                os.rename(trash, self.target)
            raise
        _flush_directory(self.target.parent)
        _last_sequence[self.target.parent] = sequence
        if trash is not None:
            shutil.rmtree(trash, ignore_errors=True)

    def __exit__(self, *error: object) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory, ignore_errors=True)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file."""
    on_host = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return dump_tensors(_without_shared_memory(on_host))


def read_manifest(state_dir: str | Path) -> dict[str, Any]:
    """Read a state's manifest and check its own hash.

    Raises:
        TrainingStateError: where there is none, or where it was changed.
    """
    path = Path(state_dir) / MANIFEST
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise TrainingStateError(f"{path} is too large to be a manifest")
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise TrainingStateError(f"{state_dir} is no training state: {error}") from error
    except (ValueError, RecursionError) as error:
        raise TrainingStateError(f"{path} is damaged: {error}") from error
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
        raise TrainingStateError(f"{path} is damaged: it lists no files")
    claimed = content.pop("sha256", None)
    if hashlib.sha256(_to_json(content)).hexdigest() != claimed:
        raise TrainingStateError(f"{path} is damaged: its hash doesn't match its content")
    if content.get("format") != FORMAT:
        raise TrainingStateError(
            f"{state_dir} has format {content.get('format')!r}, this version reads {FORMAT}"
        )
    return content


def verify(state_dir: str | Path) -> list[str]:
    """Look at every byte of a state.

    Returns:
        What is wrong, a sentence each; an empty list where the state is intact.
    """
    directory = Path(state_dir)
    try:
        listed: dict[str, Any] = read_manifest(directory)["files"]
    except TrainingStateError as error:
        return [str(error)]
    problems = []
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_symlink() or not path.is_dir()
    } - {MANIFEST}
    for name in sorted(present | set(listed)):
        path = directory / name
        if name not in listed:
            problems.append(f"{path} isn't listed in the manifest")
        elif name not in present:
            problems.append(f"{path} is missing")
        elif path.is_symlink() or not path.is_file():
            problems.append(f"{path} is no regular file")
        elif path.stat().st_size != listed[name].get("size"):
            problems.append(
                f"{path} has {path.stat().st_size} bytes, its manifest says "
                f"{listed[name].get('size')}"
            )
        elif _fingerprint(path) != listed[name]:
            problems.append(f"{path} is damaged: its hash doesn't match")
    return problems


class StateReader:
    """Read a state, after all of it was verified.

    Raises:
        TrainingStateError: where anything is missing, damaged or not listed, naming it all.
    """

    def __init__(self, state_dir: str | Path) -> None:
        self.directory = Path(state_dir)
        problems = verify(self.directory)
        if problems:
            raise TrainingStateError("The training state is damaged: " + "; ".join(problems))
        self.manifest = read_manifest(self.directory)

    def read_json(self, name: str) -> Any:
        """Read one JSON file of the state."""
        return json.loads(self._read(name), object_pairs_hook=_without_duplicates)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Read one safetensors file of the state, onto the CPU."""
        return load_tensors(self._read(name))

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["files"]

    def _read(self, name: str) -> bytes:
        if name not in self:
            raise TrainingStateError(f"{self.directory} has no {name}")
        return (self.directory / name).read_bytes()


def find_states(folder: str | Path) -> list[Path]:
    """The states in a folder, newest first, by what their manifests say; damaged ones left out."""
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            manifest = read_manifest(path)
        except TrainingStateError:
            continue
        found.append((_sequence(manifest), path.name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def remove_state(state_dir: Path) -> None:
    """Remove a state; interrupted, it leaves no half of one under its name."""
    trash = _beside(state_dir, "trash")
    os.rename(state_dir, trash)
    shutil.rmtree(trash, ignore_errors=True)


def recover_replaced(folder: Path) -> None:
    """Put back states that were moved away for new ones which then never came."""
    for path in folder.glob(".trash-*") if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (folder / match["name"]).exists() or _is_owned(match):
            continue
        if (path / MANIFEST).is_file() and not verify(path):
            os.rename(path, folder / match["name"])


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed processes have left of states that they were writing or removing.

    Returns:
        What was removed. What a process that lives may still be writing stays.
    """
    recover_replaced(folder)
    removed = []
    for path in folder.glob(".t*-*") if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is not None and not _is_owned(match):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            removed.append(path)
    return removed


_LEFTOVER = re.compile(r"\.(tmp|trash)-(?P<name>.+)-(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}")


def _beside(path: Path, kind: str) -> Path:
    """A name beside `path` that nobody else has, and that says whose it is."""
    return path.with_name(f".{kind}-{path.name}-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _is_owned(match: re.Match[str]) -> bool:
    """Whether the process that has made a leftover may still be at work on it."""
    pid = int(match["pid"])
    if match["host"] != _HOST or pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_last_sequence: dict[Path, int] = {}


def _next_sequence(folder: Path) -> int:
    """A number above those of all states in a folder: clocks may be set back, this is not."""
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
        None where the folder is missing or holds no state at all.

    Raises:
        TrainingStateError: where there are states and every one is damaged.
    """
    folder = Path(os.path.abspath(folder))
    recover_replaced(folder)
    candidates = find_states(folder)
    unreadable = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.is_dir()
        and not path.name.startswith(".")
        and path not in candidates
        and (path / "state.json").exists()
    ]
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


def save_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, flush it, and put it in its place at once."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path, "tmp")
    try:
        write(beside)
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Turn NumPy scalars and arrays into numbers and tensors, so that `weights_only` loads them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if type(value).__module__ == "numpy":
        return value.item() if value.ndim == 0 else torch.from_numpy(value)
    return value


def _to_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses views of one storage, so a second one gets a copy."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        result[name] = tensor if whole and storage not in seen else tensor.clone()
        seen.add(storage)
    return result


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _flush_directory(path: Path) -> None:
    """Make a rename durable; some network mounts can't, and then the rename alone must do."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
