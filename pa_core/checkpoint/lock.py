"""A lock on what a run writes, so that two live runs can't replace each other's files.

The lock is a small file that names its owner. On the owner's host, the process itself shows whether
the owner is alive. Elsewhere its heartbeat does: the owner rewrites a byte of the file at
intervals, and a reader compares the time of the file with that of a file which it writes beside it,
so that only the clock of the file server counts. `flock` isn't used: on network file systems it may
be missing, or hold on one host only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Event, Thread

from pa_core.checkpoint.atomic_io import beside, is_running, start_of
from pa_core.errors import TrainingStateError

BEAT = 10.0
"""Seconds between two heartbeats of an owner."""

STALE = 60.0
"""Seconds without a heartbeat after which an owner on another host counts as dead."""

_POLL = 0.25
_held: dict[Path, RunLock] = {}
"""The locks that this process holds, by their files."""


def check_held(path: Path) -> None:
    """Check that this process hasn't lost the lock that it took on a folder or file.

    Raises:
        TrainingStateError: if another run has taken it over, as it may once this process was
            suspended or cut off from the file server.
    """
    path = Path(os.path.abspath(path))
    for lock in list(_held.values()):
        if lock.path == path:
            lock.check()


@dataclass(frozen=True)
class _Owner:
    """Who holds a lock.

    Attributes:
        host: the name of the host, for people.
        machine: what a process number is valid on: one boot of a host, or of a container.
        pid: the process.
        started: when the process started, since numbers of processes are reused.
        since: when it took the lock, for people.
        key: identifies this lock.
    """

    host: str
    machine: str
    pid: int
    started: str
    since: str
    key: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_dead(self) -> bool | None:
        """Whether it has ended; None if this process can't know."""
        if self.machine != _machine():
            return None
        if self.pid == os.getpid() and self.started == start_of(self.pid):
            return all(lock.key != self.key for lock in _held.values())
        if self.started == "0":  # this system doesn't say, so the number may have been reused
            return None
        return not is_running(self.pid, self.started)


@dataclass(frozen=True)
class _Seen:
    """A lock file as it was read.

    Attributes:
        owner: None if the content makes no sense, as while it is being written.
        digest: of the content; part of a file name, so nothing is taken from the content itself.
        beat: the time of the last heartbeat, by the file server's clock.
    """

    owner: _Owner | None
    digest: str
    beat: float

    def __str__(self) -> str:
        return str(self.owner or "a process that can't be read from the lock file")


class RunLock:
    """Holds the lock on a folder, or on a file, that a run writes.

    Args:
        path: the folder, or the file.
        is_folder: whether it is a folder; it is created if it is missing.
        beat: seconds between two heartbeats.
        stale: seconds without one after which an owner on another host counts as dead.
    """

    def __init__(
        self, path: Path, *, is_folder: bool, beat: float = BEAT, stale: float = STALE
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.file = self.path / ".lock" if is_folder else self.path.with_name(f".lock-{path.name}")
        self._beat_every, self._stale = beat, stale
        self._pid = os.getpid()
        self._owner = _Owner(
            host=platform.node(),
            machine=_machine(),
            pid=self._pid,
            started=start_of(self._pid),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            key=uuid.uuid4().hex,
        )
        self._created: list[Path] = []
        self._ended = Event()

    @property
    def key(self) -> str:
        """Identifies this lock."""
        return self._owner.key

    def acquire(self, tell: Callable[[str], object]) -> str | None:
        """Take the lock; that of a dead owner is taken over.

        If the owner was on another host, this waits until a heartbeat shows that it is alive, or
        until `stale` seconds without one show that it is dead.

        Args:
            tell: called with a text before waiting.

        Returns:
            Whose lock was taken over, as a text to warn with; None if there was none.

        Raises:
            TrainingStateError: if the owner is alive, naming it.
            OSError: if the lock can't be written.
        """
        folder = self.file.parent
        self._created = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            taken_over = self._acquire(tell)
            _held[self.file] = self
            Thread(target=self._keep_alive, name="pa-core-lock", daemon=True).start()
        except BaseException:
            self.release()
            raise
        return taken_over

    def check(self) -> None:
        """See `check_held`."""
        if os.getpid() != self._pid or not self.file.parent.exists():
            return
        seen = _read(self.file)
        if seen is None:  # someone has removed it
            self._create()
            seen = _read(self.file)
        if not self._is_own(seen):
            raise TrainingStateError(
                f"{self.path} was taken over by another run ({seen}), because this one had shown "
                f"no sign of life for {self._stale:.0f} s. This run writes nothing more there"
            )

    def release(self) -> None:
        """Remove the lock, and a folder that was created for it and is empty."""
        if os.getpid() != self._pid:  # a forked copy
            return
        self._ended.set()
        if _held.get(self.file) is self:
            del _held[self.file]
        with suppress(OSError):
            if self._is_own(_read(self.file)):
                self.file.unlink()
        self._remove_created()

    def _acquire(self, tell: Callable[[str], object]) -> str | None:
        first, since, has_told = None, 0.0, False
        while not self._create():
            seen = _read(self.file)
            if seen is None:
                continue  # removed meanwhile
            is_dead = None if seen.owner is None else seen.owner.is_dead
            if is_dead is None:
                if first is None or first.digest != seen.digest:
                    first, since = seen, time.monotonic()
                if seen.beat == first.beat:
                    left = self._stale - max(self._age(seen), time.monotonic() - since)
                    if left > 0:
                        if not has_told:
                            tell(
                                f"{self.path} is locked by {seen}: waiting for a sign of life, at "
                                f"most {left:.0f} s"
                            )
                            has_told = True
                        time.sleep(min(_POLL, left))
                        continue
                    is_dead = True
            if not is_dead:
                raise TrainingStateError(
                    f"{self.path} is in use by another run ({seen}). Two runs would replace each "
                    "other's files: wait until it has ended, or write to another place"
                )
            if self._take_over(seen):
                return (
                    f"{self.path} was still locked by a run that has ended without closing "
                    f"({seen}): it was killed, or its host is gone. The lock was taken over"
                )
        return None

    def _create(self) -> bool:
        """Create the lock file with its content; False if it exists."""
        temporary = self._written()
        try:
            os.link(temporary, self.file)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _write_exclusively(self.file, self._content)
        else:
            return True
        finally:
            temporary.unlink(missing_ok=True)

    def _take_over(self, stale: _Seen) -> bool:
        """Replace a stale lock; of several processes that try, one succeeds.

        Who has created the claim on this very lock may replace it, and does so only if it is still
        there. So a slower process can't replace the lock of the one that was faster.
        """
        claim = self.file.with_name(f"{self.file.name}-{stale.digest}")
        if not _write_exclusively(claim, self._content):
            other = _read(claim)
            if other is None:
                return False
            is_dead = other.owner is not None and other.owner.is_dead
            if is_dead or self._age(other) > self._stale:
                claim.unlink(missing_ok=True)
            time.sleep(0.05)
            return False
        temporary = self._written()
        try:
            seen = _read(self.file)
            if seen is None or seen.digest != stale.digest:
                return False
            os.replace(temporary, self.file)
            return True
        finally:
            temporary.unlink(missing_ok=True)
            claim.unlink(missing_ok=True)

    @property
    def _content(self) -> bytes:
        return json.dumps(asdict(self._owner)).encode()

    def _written(self) -> Path:
        """A temporary file with the lock's content."""
        temporary = beside(self.file, "tmp")
        temporary.write_bytes(self._content)
        return temporary

    def _age(self, seen: _Seen) -> float:
        """Seconds since the last heartbeat, by the file server's clock."""
        fresh = self._written()
        now = fresh.stat().st_mtime
        fresh.unlink()
        return now - seen.beat

    def _is_own(self, seen: _Seen | None) -> bool:
        return seen is not None and seen.owner is not None and seen.owner.key == self._owner.key

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._beat_every):
            with suppress(OSError):  # the file server may be back at the next heartbeat
                seen = _read(self.file)
                if seen is not None and not self._is_own(seen):
                    return  # `check` reports it
                # Written in place, so that the file server sets the time.
                handle = os.open(self.file, os.O_WRONLY)
                try:
                    os.write(handle, self._content[:1])
                finally:
                    os.close(handle)

    def _remove_created(self) -> None:
        with suppress(OSError):  # not empty
            for folder in self._created:
                folder.rmdir()


def _read(file: Path) -> _Seen | None:
    """Read a lock file; None if there is none."""
    try:
        # Opened anew each time: network file systems then ask the server for its time.
        with file.open("rb") as opened:
            content = opened.read(4096)
            beat = os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        owner = _Owner(**json.loads(content))
        is_valid = isinstance(owner.pid, int) and isinstance(owner.key, str)
    except (TypeError, ValueError, RecursionError):
        is_valid = False
    digest = hashlib.sha256(content).hexdigest()[:16]
    return _Seen(owner if is_valid else None, digest, beat)


def _write_exclusively(file: Path, content: bytes) -> bool:
    """Create a file with a content; False if it exists."""
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(handle, content)
    finally:
        os.close(handle)
    return True


@cache
def _machine() -> str:
    """What a process number is valid on: the host, its boot, and the container's numbering."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
