"""Compare the settings, versions and hardware of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pa_report.run import Run

ABSENT = "–"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names.

    >>> flatten({"run": {"seed": 1, "groups": [{"lr": 0.1}]}})
    {'run.seed': 1, 'run.groups.0.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], int]:
    """Find what differs between runs: seed, commit, settings, versions, hardware.

    Returns:
        The runs' values of each entry that differs, by its name, and the number of equal entries.
    """
    described = [
        flatten(run.manifest) | flatten({"run_config": run.run_config} if run.run_config else {})
        for run in runs
    ]
    keys = dict.fromkeys(key for values in described for key in values)
    # A training state has no run config: its entries are compared only if all runs have one.
    compared = [
        key for key in keys if not key.startswith("run_config.") or all(r.run_config for r in runs)
    ]
    rows = {key: [values.get(key, ABSENT) for values in described] for key in compared}
    differing = {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
    return differing, len(rows) - len(differing)
