"""Whether the run that goes on is the run that was saved: what differs, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_core.codec import encode
from pa_core.tensors import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], *, strict: bool) -> list[str]:
    """What of two manifests changes the numbers of a run."""
    pairs = [(name, saved["run"].get(name), value) for name, value in present["run"].items()]
    pairs.append(("seed", saved["seed"], present["seed"]))
    plugins = [manifest["plugins"] for manifest in (saved, present)]
    for name in sorted(set(plugins[0]) & set(plugins[1])):
        settings = [manifest[name]["settings"] for manifest in plugins]
        pairs.append((f"the settings of plugin {name!r}", *settings))
        versions = [manifest[name]["version"] for manifest in plugins]
        pairs.append((f"the version of plugin {name!r}", *versions))
    packages = [manifest["packages"] for manifest in (saved, present)]
    pairs += [
        (f"the version of {name}", packages[0].get(name), packages[1].get(name))
        for name in ("torch", "accelerate", "numpy")
    ]
    return [f"{name} was {before!r} and is {now!r}" for name, before, now in pairs if before != now]


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
                if not _same(first.get(name), state):
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
