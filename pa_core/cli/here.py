"""The settings of the folder in which the command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pa_core.settings.table import Settings


def read_here() -> Settings:
    """The settings in the file of a script in this folder.

    Raises:
        SettingsError: if the file can't be read.
    """
    from pa_core.settings.table import find_settings_file, read_settings

    settings = read_settings(find_settings_file(script=Path.cwd()))
    # A class that the settings name may be in a module beside them, which a script there can
    # import. It comes last, so that no file there replaces an installed module.
    folder = str(settings.file.parent if settings.file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    return settings


def settings_here() -> Settings:
    """The same, as the environment overrides them.

    Raises:
        SettingsError: if the file can't be read.
    """
    from pa_core.settings.overrides import with_overrides

    return with_overrides(read_here())
