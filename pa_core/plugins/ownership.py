"""Files with settings or code that another user may have planted."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path


def warn_if_planted(path: Path) -> None:
    """Warn of a file that another user owns, in a folder in which others can create files.

    Settings are looked up in parent folders, and name files that are run. A user who can write to
    such a folder, ``/tmp`` for one, could run code as any user who trains below it.

    Args:
        path: the file, with links resolved, before it is read.
    """
    if not hasattr(os, "geteuid"):  # Windows
        return
    try:
        file, folder = path.stat(), path.parent.stat()
    except OSError:
        return  # reading it reports this better
    others_write = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if file.st_uid not in (os.geteuid(), 0) and others_write:
        warnings.warn(
            f"{path} belongs to another user ({_name_of(file.st_uid)}), and others can write to "
            "its folder. If you don't know where it comes from, remove it: it decides what code is "
            "run. If you trust it, copy it to your own folder",
            stacklevel=3,
        )


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"
