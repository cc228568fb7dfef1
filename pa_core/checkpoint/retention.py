"""Remove old states; keep the newest intact ones, and everything newer than those."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pa_core.checkpoint.atomic_io import remove_whole
from pa_core.checkpoint.storage import find_states, verify


class Retention:
    """Removes the oldest states of a folder, but never the last intact one.

    Only intact states count, so a damaged one never causes a good one to be removed. Every byte of
    a state is verified once; it then counts as intact until one of its files changes.

    >>> Retention().apply("no such folder", keep=1)
    []
    """

    def __init__(self) -> None:
        self._intact: dict[Path, object] = {}

    def apply(
        self, folder: str | Path, keep: int, among: Callable[[str], object] = lambda name: True
    ) -> list[Path]:
        """Remove all states that are older than the `keep` newest intact ones.

        Args:
            folder: the folder of the states.
            keep: how many intact states to keep, at least 1.
            among: whether a state of this name counts and may be removed.

        Returns:
            What was removed, newest first.

        Raises:
            ValueError: for a `keep` below 1.
            OSError: if a state can't be removed.
        """
        surplus = self.surplus(folder, keep, among)
        for path in surplus:
            remove_whole(path)
        return surplus

    def surplus(
        self, folder: str | Path, keep: int, among: Callable[[str], object] = lambda name: True
    ) -> list[Path]:
        """What `apply` would remove, newest first; same arguments and errors."""
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, not {keep}: the last state is always kept")
        states = [path for path in find_states(folder) if among(path.name)]  # newest first
        if len(states) <= keep:
            return []
        self._intact = {path: seen for path, seen in self._intact.items() if path in states}
        intact = 0
        for number, path in enumerate(states):
            if intact == keep:
                return states[number:]
            intact += self._is_intact(path)
        return []

    def _is_intact(self, path: Path) -> bool:
        files = _file_stats(path)
        if self._intact.get(path) == files:
            return True
        if verify(path):
            return False
        self._intact[path] = files
        return True


def _file_stats(path: Path) -> object:
    """What differs once a file of a state has been changed."""
    return sorted(
        (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns, entry.inode())
        for entry in os.scandir(path)
    )
