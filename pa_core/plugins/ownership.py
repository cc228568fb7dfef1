"""Files with settings or code that somebody else may have put where they are found."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path


def warn_if_planted(path: Path) -> None:
    """Warn of a file that another user owns, in a folder in which others can create files.

    Settings are looked up in parent folders, and name files that are run. Somebody who can write to
    such a folder, ``/tmp`` for one, could have code run by whoever trains below it.

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
            "run. If you trust it, copy it to a folder of your own",
            stacklevel=3,
        )


def _name_of(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"
