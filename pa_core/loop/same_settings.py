"""The comparison of the settings of all processes, which must run the same."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pa_core.errors import SettingsError
from pa_core.loop.waiting import expecting_all
from pa_core.settings.environment import added_items, left_out_names
from pa_core.settings.secrets import mask_secrets
from pa_core.settings.table import PLUGINS_VARIABLE, TABLE

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def check_same_settings(trainer: Trainer) -> None:
    """Check that all processes have the same settings, wherever they come from; a collective.

    A file that is another one on each machine, or a variable that a launcher doesn't pass on, would
    have each process train with its own settings.

    Raises:
        SettingsError: on every process, naming what differs, with secrets masked.
    """
    with expecting_all(trainer.rank, "build each Trainer"):
        everywhere = trainer._engine.gather_objects(_described(trainer))
    problems = []
    for name in dict.fromkeys(name for described in everywhere for name in described):
        values = [described.get(name, ("", "not set")) for described in everywhere]
        other = next((rank for rank, one in enumerate(values) if one[0] != values[0][0]), None)
        if other is not None:
            problems.append(
                f"{name} differs between processes: {values[0][1]} on rank 0 and "
                f"{values[other][1]} on rank {other}"
            )
    if problems:
        advice = "Give every process the same settings file and environment variables"
        raise SettingsError([*problems, advice])


def _described(trainer: Trainer) -> dict[str, tuple[str, str]]:
    """The settings of this process by name: a digest of each, and what may be shown of it."""
    settings, plugins = trainer.settings, trainer.plugins.by_name
    found: dict[str, tuple[Any, Any]] = {
        f"[{TABLE}.{name}]": (table, settings.shown(name, plugins.get(name)))
        for name, table in settings.tables.items()
    }
    for name, table in settings.arguments.items():
        found[f"[{TABLE}.{name}]"] = table, mask_secrets(table)
    variable = [*added_items(), *(f"-{name}" for name in left_out_names())]
    for name, value in (
        (f"[{TABLE}] plugins", list(settings.plugins)),
        (f"[{TABLE}] disable", list(settings.disable)),
        (PLUGINS_VARIABLE, variable),
        ("the seed", trainer.seed),
        ("the mixed precision", trainer._accelerator.mixed_precision),
    ):
        found[name] = value, value
    return {name: (_digest(value), repr(shown)) for name, (value, shown) in found.items()}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
