"""Paths on this machine, as opposed to addresses in an object store."""

from __future__ import annotations

import os
import re
from os import PathLike, fspath
from pathlib import Path

from pa_core.errors import AddressError

# At least two letters, unlike a drive of Windows; `Path` makes one slash of two.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(path: str | PathLike[str]) -> Path:
    """The path of a file or folder on this machine, or on a file system that is mounted here.

    >>> local_path("states/run-1").parts
    ('states', 'run-1')

    Raises:
        AddressError: if it is an address with a scheme, such as ``s3://bucket/run``, of which the
            operating system would make a local folder called ``s3:``.
    """
    text = fspath(path)
    if is_address(text):
        raise AddressError(
            f"{text!r} is an address, not a path on this machine. Files are written to and read "
            "from paths only: mount the storage as a folder, or copy the files when the run is over"
        )
    return Path(path)


def is_address(path: str | PathLike[str]) -> bool:
    """Whether a text or path has a scheme, such as ``s3:``, ``gs:``, ``hf:`` or ``file:``."""
    return _ADDRESS.match(fspath(path)) is not None


def short_path(path: str | PathLike[str]) -> str:
    """A path as people read it: from the working directory, if that is shorter."""
    whole = os.path.abspath(path)
    try:
        return min(os.path.relpath(whole), whole, key=len)
    except (OSError, ValueError):  # no working directory, or on another drive
        return whole
