"""Atomic writing, replacing and removing: the only code that changes files of training states.

A file or folder is written under a temporary name, flushed and renamed, so that it is complete or
absent at every instant. A temporary name identifies the process that it belongs to.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pa_core.settings.paths import local_path

_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_BLOCK = 4 * 2**20  # bytes hashed and written at once: they fit into the processor's cache
_ABANDONED_AFTER = 3600.0
"""Seconds without a change after which another machine's temporary file counts as left over."""
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
_LEFTOVER = re.compile(
    r"\.(?P<kind>tmp|trash)-(?P<name>.+)"
    r"-(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}"
)


def make_folder(path: Path) -> None:
    """Create a folder, which must not exist yet, and its parents, durably."""
    missing = [folder for folder in path.parents if not folder.exists()]
    os.makedirs(path)
    for folder in missing:
        flush_folder(folder.parent)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a new file and flush it to the disk.

    Returns:
        Its ``size`` and ``sha256``, computed as it is written.
    """
    digest, size = hashlib.sha256(), 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOSE_ON_EXEC, 0o666)
    try:
        for chunk in chunks:
            whole = memoryview(chunk)
            for start in range(0, len(whole), _BLOCK):
                block = whole[start : start + _BLOCK]
                digest.update(block)
                while block:
                    block = block[os.write(handle, block) :]
            size += len(whole)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"size": size, "sha256": digest.hexdigest()}


def read_file(path: Path) -> bytes:
    """Read a regular file; links aren't followed, and reading never blocks.

    Raises:
        OSError: if it is missing or is anything else.
    """
    handle = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC | _NO_FOLLOW)
    with open(handle, "rb") as file:
        return file.read()


def size_and_hash(path: Path) -> dict[str, Any]:
    """A file's ``size`` and ``sha256``."""
    handle = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC | _NO_FOLLOW)
    with open(handle, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": os.fstat(handle).st_size, "sha256": digest}


def flush_file(path: Path) -> None:
    """Flush a file that other code has written."""
    handle = os.open(path, os.O_RDWR | _CLOSE_ON_EXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(path: Path) -> None:
    """Make a rename durable, where the file system can; some network mounts can't."""
    try:
        handle = os.open(path, os.O_RDONLY | _CLOSE_ON_EXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        pass


def put_in_place(directory: Path, target: Path) -> None:
    """Rename a complete folder to `target`; an existing one is moved away first, then removed."""
    trash = None
    if target.exists():
        trash = beside(target, "trash")
        os.rename(target, trash)
    try:
        os.rename(directory, target)
    except OSError:
        if trash is not None:
            os.rename(trash, target)
        raise
    flush_folder(target.parent)
    if trash is not None:
        remove_tree(trash)


def remove_tree(path: Path) -> None:
    """Remove a folder as far as possible; it must have a temporary name already."""
    with suppress(OSError):  # from closing a folder, which `ignore_errors` doesn't cover
        shutil.rmtree(path, ignore_errors=True)


def remove_whole(path: Path) -> None:
    """Remove a folder; if interrupted, no incomplete one keeps its name."""
    trash = beside(path, "trash")
    os.rename(path, trash)
    remove_tree(trash)


def save_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Have `write` create a temporary file, flush it, and move it to `path` atomically."""
    path = local_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path, "tmp")
    try:
        write(temporary)
        flush_file(temporary)
        os.replace(temporary, path)
        flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# -- Leftovers of killed processes -----------------------------------------------------------


def beside(path: Path, kind: str) -> Path:
    """A unique temporary name in the folder of `path`, which identifies this process.

    Args:
        path: the final or former path of a file or folder.
        kind: ``"tmp"`` for what is being written, ``"trash"`` for what is being removed.
    """
    pid = os.getpid()
    owner = f"{_HOST}-{pid}-{start_of(pid)}"
    return path.with_name(f".{kind}-{path.name}-{owner}-{uuid.uuid4().hex[:8]}")


def recover_replaced(folder: Path, is_intact: Callable[[Path], bool]) -> None:
    """Restore what was moved away for a replacement that was never completed."""
    for path in _sorted_glob(folder, ".trash-*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (folder / match["name"]).exists():
            continue
        # If a process on another machine is still replacing it, at worst its save fails.
        if match["host"] == _HOST and _is_running(match):
            continue
        if is_intact(path):
            try:
                os.rename(path, folder / match["name"])
            except OSError:  # another process was faster
                continue


def find_leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders of killed processes, not of running ones."""
    found = []
    for path in _sorted_glob(folder, ".t*-*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match["host"] == _HOST:
            is_left = not _is_running(match)
        else:
            is_left = time.time() - _last_change(path) > _ABANDONED_AFTER
        if is_left:
            found.append(path)
    return found


def remove_leftover(path: Path) -> None:
    """Remove a leftover file or folder."""
    remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _sorted_glob(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def _is_running(match: re.Match[str]) -> bool:
    """Whether the process that a temporary name identifies, on this machine, is still running."""
    return is_running(int(match["pid"]), match["started"])


def is_running(pid: int, started: str) -> bool:
    """Whether the process of this machine that `start_of` described is still running."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    # The pid may have been reused; in containers that is common.
    return started == start_of(pid)


def start_of(pid: int) -> str:
    """When a process started, in clock ticks since boot; "0" if that isn't known."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "dead" if status[0] in "ZX" else status[19]


def _last_change(path: Path) -> float:
    times = [path.lstat().st_ctime]
    times += [file.lstat().st_mtime for file in path.rglob("*")]
    return max(times)
