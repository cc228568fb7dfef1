"""Whether the run that goes on is the run that was saved: what differs, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint.codec import encode
from pa_core.checkpoint.safetensors_io import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


_ABSENT = "nothing"


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], *, strict: bool) -> list[str]:
    """What of two manifests changes the numbers of a run, a phrase for each difference.

    Args:
        saved: the manifest that was saved.
        present: that of the run that is to go on.
        strict: name what may change the numbers, too: the commit, the processor, and callbacks
            that the script itself has more or less, and which have no settings or version.
    """
    # (What a state of an earlier version doesn't say can't be compared.)
    now = {name: value for name, value in present["run"].items() if name in saved["run"]}
    pairs = _pairs("", {name: saved["run"][name] for name in now}, now)
    pairs.append(("seed", saved["seed"], present["seed"]))
    pairs += _plugin_pairs(saved["plugins"], present["plugins"], strict=strict)
    packages = saved["packages"], present["packages"]
    pairs += [
        (f"the version of {name}", *(versions.get(name) for versions in packages))
        for name in ("torch", "accelerate", "numpy")
    ]
    hardware = saved["hardware"], present["hardware"]
    before, after = (str(machine["device"]).partition(":")[0] for machine in hardware)
    pairs.append(("the device", before, after))
    if strict:
        pairs += [
            (f"the hardware's {name}", *(machine[name] for machine in hardware))
            for name in ("name", "capability", "threads")
        ]
        commit, commit_now = ((run["git"] or {}).get("commit") for run in (saved, present))
        pairs.append(("the git commit", commit, commit_now))
    return [f"{name} was {before!r} and is {now!r}" for name, before, now in pairs if before != now]


def _pairs(name: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """Each number or text of two trees, with its path."""
    if isinstance(before, list) and isinstance(now, list) and before != now:
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [(name, before, now)]
    keys = [*before, *(key for key in now if key not in before)]
    return [
        pair
        for key in keys
        for pair in _pairs(
            f"{name}.{key}" if name else str(key), before.get(key, _ABSENT), now.get(key, _ABSENT)
        )
    ]


def _plugin_pairs(
    before: Mapping[str, Any], now: Mapping[str, Any], *, strict: bool
) -> list[tuple[str, Any, Any]]:
    """Plugins that are on in one run alone; settings and versions of those in both."""
    pairs: list[tuple[str, Any, Any]] = []
    for name in [*before, *(name for name in now if name not in before)]:
        plugin = now.get(name, before.get(name))
        if not plugin.get("changes_training", True):
            continue
        if name in before and name in now:
            pairs += _pairs(
                f"plugin {name!r}: setting", before[name]["settings"], now[name]["settings"]
            )
            version = f"the version of plugin {name!r}"
            pairs.append((version, before[name]["version"], now[name]["version"]))
        elif strict or plugin.get("origin") != "code":
            words = "enabled", "not enabled"
            pairs.append((f"plugin {name!r}", words[name not in before], words[name not in now]))
    return pairs


def what_is_lost(
    before: Mapping[str, Any], now: Mapping[str, Any], states: Sequence[Mapping[str, Any]]
) -> str | None:
    """Why a run can't go on from the middle of an epoch; None where it can.

    Args:
        before: the manifest's ``run`` that was saved.
        now: that of the run that is to go on.
        states: the plugins' states by name, for each process that has saved.
    """
    if before["dataset_length"] != now["dataset_length"]:
        return "Its place in the epoch has no meaning in another dataset"
    sizes = [run["per_device_batch_size"] * run["num_processes"] for run in (before, now)]
    if sizes[0] != sizes[1]:
        return (
            f"Its place in the epoch has no meaning with global batches of {sizes[1]} samples "
            f"in place of {sizes[0]}: set per_device_batch_size so that they are the same"
        )
    if before["num_processes"] != now["num_processes"]:
        first = states[0]
        for process in states[1:]:
            for name, state in process.items():
                # An empty one loses nothing: what there is, the main process keeps.
                if state and not _same(first.get(name), state):
                    return (
                        f"The plugin {name!r} has another state on each process, which another "
                        "number of them can't take: resume from a state of an epoch's end"
                    )
    return None


def _same(first: Any, second: Any) -> bool:
    """Whether two states of a plugin are equal, bit for bit."""
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    texts = [encode(state, into, "") for state, into in zip((first, second), tensors, strict=True)]
    return texts[0] == texts[1] and tensor_bytes(tensors[0]) == tensor_bytes(tensors[1])
