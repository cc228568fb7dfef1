"""Describe the states in a folder from their manifests, for people and programs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pa_core.checkpoint.storage import MANIFEST, find_states, read_manifest, state_folders, verify
from pa_core.errors import TrainingStateError


def describe_states(folder: Path, *, every_byte: bool = False) -> list[dict[str, Any]]:
    """Describe each state in a folder, newest first; those without a readable manifest come last.

    Args:
        folder: a folder of states, or one state.
        every_byte: hash every byte, rather than verify only manifests, names and sizes.

    Returns:
        For each its ``name``, ``path``, ``epoch``, ``update``, ``size`` (bytes), ``age`` (seconds
        since it was saved), ``plugins``, ``resume`` (``"exact"``, or ``"replayed"`` if the user's
        own loader has to be replayed), whether it is ``intact``, and its ``problems``. What a
        damaged manifest lacks is None.

    Raises:
        TrainingStateError: if there is no such folder.
    """
    if not folder.is_dir():
        raise TrainingStateError(f"Folder not found: {folder}")
    if (folder / MANIFEST).exists():
        return [_describe(folder, every_byte)]
    known = find_states(folder)
    unknown = [path for path in state_folders(folder) if path not in known]
    return [_describe(path, every_byte) for path in known + unknown]


def _describe(path: Path, every_byte: bool) -> dict[str, Any]:
    try:
        manifest: Mapping[str, Any] = read_manifest(path)
    except TrainingStateError:
        manifest = {}
    problems = verify(path, every_byte=every_byte)
    position, plugins = (_of_type(dict, manifest.get(name)) for name in ("position", "plugins"))
    saved_at = _of_type((int, float), manifest.get("saved_at"))
    position = position or {}
    return {
        "name": path.name,
        "path": str(path),
        "epoch": _of_type(int, position.get("epoch")),
        "update": _of_type(int, position.get("updates")),
        "size": sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir()),
        "age": None if saved_at is None else time.time() - saved_at,
        "plugins": None if plugins is None else list(plugins),
        "resume": _of_type(str, manifest.get("resume")),
        "intact": not problems,
        "problems": problems,
    }


def _of_type(kind: type | tuple[type, ...], value: Any) -> Any:
    """The value, or None if it is of another type: a manifest may come from anyone."""
    return value if isinstance(value, kind) else None


def readable_size(size: int) -> str:
    """Format a number of bytes with a unit.

    >>> readable_size(999), readable_size(1_260_000)
    ('999 B', '1.3 MB')
    """
    number, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "B" or number >= 99.5 else f"{number:.1f} {unit}"


def readable_age(seconds: float) -> str:
    """Format a duration with a single unit.

    >>> readable_age(59), readable_age(7300), readable_age(90_000)
    ('59 s', '2 h', '25 h')
    """
    for unit, length, until in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < length * until:
            return f"{max(seconds, 0) // length:.0f} {unit}"
    return f"{seconds // 86400:.0f} days"
