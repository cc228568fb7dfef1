"""Compare the settings, versions and hardware of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_report.markup import mapping

if TYPE_CHECKING:
    from pa_report.run import Run

ABSENT = "–"
_OWN_TARGET = "pa_report.plugin:ReportPlugin"


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

    The names of the reports are left out, and the layers of the models are one entry.

    Returns:
        The runs' values of each entry that differs, by its name, and the number of equal entries.
    """
    described = [_entries(run) for run in runs]
    keys = dict.fromkeys(key for values in described for key in values)
    # A training state has no run config and no facts: they are compared only if all runs have them.
    compared = [
        key
        for key in keys
        if not key.startswith(("run_config.", "facts."))
        or all(any(k.startswith(key.partition(".")[0] + ".") for k in d) for d in described)
    ]
    rows = {key: [values.get(key, ABSENT) for values in described] for key in compared}
    differing = {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
    return differing, len(rows) - len(differing)


def _entries(run: Run) -> dict[str, Any]:
    arguments = mapping(run.manifest.get("run"))
    if "layers" in arguments:
        layers = mapping(arguments["layers"])
        arguments["layers"] = "; ".join(f"{number} × {name}" for name, number in layers.items())
    plugins = {
        name: {k: v for k, v in mapping(source).items() if k not in ("settings", "values")}
        if mapping(source).get("target") == _OWN_TARGET
        else source
        for name, source in mapping(run.manifest.get("plugins")).items()
    }
    parts = {"run": arguments, "plugins": plugins} if run.manifest else {}
    described = {**run.manifest, **{k: v for k, v in parts.items() if k in run.manifest}}
    return flatten(described) | flatten(
        {k: v for k, v in (("run_config", run.run_config), ("facts", run.facts)) if v}
    )
