"""Counts the disk operations of a save, and makes one of them fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_CHANGES = ("open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir")


class Shim:
    """Wraps the functions of `os` through which all changes of states reach the disk.

    Only operations in `folder` count, in this process, and within the context.

    Args:
        folder: the folder of the states.
        fault: called with the number and the name of each operation, just before it; may raise or
            end the process.
    """

    def __init__(self, folder: Path, fault: Callable[[int, str], None]) -> None:
        self.folder, self.fault = str(folder), fault
        self.log: list[str] = []
        self.has_fired = False
        self._real = {name: getattr(os, name) for name in _CHANGES}
        self._handles: set[int] = set()

    def __enter__(self) -> Self:
        for name in _CHANGES:
            setattr(os, name, self._wrap(name))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def _wrap(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(first: Any, *rest: Any, **options: Any) -> Any:
            if not self._is_counted(first, options):
                return real(first, *rest, **options)
            if name == "open" and not rest[0] & os.O_CREAT:
                handle = real(first, *rest, **options)  # nothing is changed yet
                self._handles.add(handle)
                return handle
            number = len(self.log)
            self.log.append(name)
            if name == "close":
                self._handles.discard(first)
                real(first)  # even if `close` fails, the file is closed
            try:
                self.fault(number, name)
            except OSError:
                self.has_fired = True
                raise
            if name == "close":
                return None
            result = real(first, *rest, **options)
            if name == "open":
                self._handles.add(result)
            return result

        return call

    def _is_counted(self, first: Any, options: dict[str, Any]) -> bool:
        if isinstance(first, int):
            return first in self._handles
        if options.get("dir_fd") is not None:
            return options["dir_fd"] in self._handles
        return os.fspath(first).startswith(self.folder)


def nothing(number: int, name: str) -> None:
    """Let every operation succeed."""


def die_at(place: int) -> Callable[[int, str], None]:
    """Kill the process just before an operation."""

    def fault(number: int, name: str) -> None:
        if number == place:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def fail_at(place: int, code: int, *, from_then_on: bool = False) -> Callable[[int, str], None]:
    """Fail with an error of the disk instead of one operation, or of all from it on."""

    def fault(number: int, name: str) -> None:
        if number == place or (from_then_on and number > place):
            raise OSError(code, os.strerror(code))

    return fault
