"""Compare a training state with the run that resumes it: what differs, and what prevents it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint.codec import encode
from pa_core.checkpoint.safetensors_io import tensor_bytes
from pa_core.errors import TrainingStateError, listed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class _Phrase(str):
    """A word shown instead of a value, and without quotes."""

    __repr__ = str.__str__


_NOT_SET, _ENABLED, _NOT_ENABLED = map(_Phrase, ("not set", "enabled", "not enabled"))


def differences(saved: Mapping[str, Any], present: Mapping[str, Any], *, strict: bool) -> list[str]:
    """List the differences between two manifests that change the numbers of a run.

    Args:
        saved: the manifest in the training state.
        present: the manifest of the run that is to be resumed.
        strict: include what may change the numbers: the commit, the processor, and callbacks that
            are passed in code in only one of the runs.

    Returns:
        A phrase for each, such as ``seed: 42 → 7``.
    """
    # A state of an earlier version may lack some entries, which then can't be compared.
    now = {name: value for name, value in present["run"].items() if name in saved["run"]}
    before = {name: saved["run"][name] for name in now}
    evaluated = before.get("eval_data", {}), now.get("eval_data", {})
    both = evaluated[0].keys() & evaluated[1].keys()  # what is there in one run only shows
    for side, data in zip((before, now), evaluated, strict=True):
        side["eval_data"] = {name: data[name] for name in data if name in both}
    pairs = _pairs("", before, now)
    pairs.append(("seed", saved["seed"], present["seed"]))
    pairs += _plugin_pairs(saved["plugins"], present["plugins"], strict=strict)
    packages = saved["packages"], present["packages"]
    pairs += [
        (f"the version of {name}", *(versions.get(name) for versions in packages))
        for name in ("torch", "accelerate", "numpy")
    ]
    hardware = saved["hardware"], present["hardware"]
    device, device_now = (str(machine["device"]).partition(":")[0] for machine in hardware)
    pairs.append(("the device", device, device_now))
    if strict:
        pairs += [
            (f"the hardware's {name}", *(machine[name] for machine in hardware))
            for name in ("name", "capability", "threads")
        ]
        commit, commit_now = ((run["git"] or {}).get("commit") for run in (saved, present))
        pairs.append(("the git commit", commit, commit_now))
    return _phrases(pairs)


def report_differences(
    state_dir: Path,
    found: Sequence[str],
    hint: str = "",
    *,
    strict: bool,
    obstacle: str | None = None,
) -> None:
    """Warn of what differs from the run that has saved a state, if anything does.

    Raises:
        TrainingStateError: instead, if the run resumes with ``strict=True``, or if there is an
            obstacle to resuming.
    """
    if not found and obstacle is None:
        return
    text = f"{state_dir} was saved by a run that differs: {', '.join(found)}{hint}"
    if obstacle is not None:
        raise TrainingStateError(f"{text}. {obstacle}")
    if strict:
        raise TrainingStateError(f"{text}. To allow this, pass strict=False")
    warnings.warn(text, stacklevel=4)


def in_effect(saved: Any, script: Any, live: Any) -> Any:
    """The settings in effect after a state was restored, leaf by leaf.

    >>> saved, script = {"lr": 0.05, "momentum": 0.9}, {"lr": 0.01, "momentum": 0.5}
    >>> in_effect(saved, script, live={"lr": 0.002, "momentum": 0.5})
    {'lr': 0.05, 'momentum': 0.5}

    Args:
        saved: the description that the state has, of the settings in effect when it was saved.
        script: that of the objects as the present script has created them.
        live: that of the same objects after the state was restored.

    Returns:
        What the script says where the objects have it, and otherwise what the state says. So a
        value that training changes, such as the learning rate, keeps its description.
    """
    if saved == script or live == script:
        return script
    if isinstance(saved, list) and isinstance(script, list) and len(saved) == len(script):
        now = live if isinstance(live, list) and len(live) == len(script) else [None] * len(saved)
        return [in_effect(*leaf) for leaf in zip(saved, script, now, strict=True)]
    if not (isinstance(saved, dict) and isinstance(script, dict)):
        return saved
    leaves = live if isinstance(live, dict) else {}
    found = {}
    for key in [*saved, *(key for key in script if key not in saved)]:
        leaf = in_effect(*(one.get(key, _NOT_SET) for one in (saved, script, leaves)))
        if leaf is not _NOT_SET:
            found[key] = leaf
    return found


def differing_leaves(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differences between two descriptions, a phrase for each as in `differences`."""
    return _phrases(_pairs("", dict(before), dict(now)))


def _phrases(pairs: list[tuple[str, Any, Any]]) -> list[str]:
    return [f"{name}: {before!r} → {now!r}" for name, before, now in pairs if before != now]


def _pairs(name: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """The leaves of two trees side by side, each with its path."""
    if isinstance(before, list) and isinstance(now, list) and before != now:
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [(name, before, now)]
    keys = [*before, *(key for key in now if key not in before)]
    return [
        pair
        for key in keys
        for pair in _pairs(
            f"{name}.{key}" if name else str(key), before.get(key, _NOT_SET), now.get(key, _NOT_SET)
        )
    ]


def _plugin_pairs(
    before: Mapping[str, Any], now: Mapping[str, Any], *, strict: bool
) -> list[tuple[str, Any, Any]]:
    """Plugins that are enabled in one run only; settings and versions of those in both.

    Where a plugin's code is (``target``) isn't compared: a module may move.
    """
    pairs: list[tuple[str, Any, Any]] = []
    for name in [*before, *(name for name in now if name not in before)]:
        plugin = now.get(name, before.get(name))
        if not plugin.get("changes_training", True):
            continue
        if name in before and name in now:
            what = f"plugin {name!r}: setting"
            sides = before[name], now[name]
            values = [side.get("values", {}) for side in sides]
            # How it was built tells more than its table, which leaves out what has its default.
            shared = values[0].keys() & values[1].keys()
            tables = [
                {key: value for key, value in side["settings"].items() if key not in shared}
                for side in sides
            ]
            pairs += _pairs(what, *tables)
            pairs += _pairs(what, *({key: one[key] for key in sorted(shared)} for one in values))
            version = f"the version of plugin {name!r}"
            pairs.append((version, before[name]["version"], now[name]["version"]))
        elif strict or plugin.get("origin") != "code":
            words = _ENABLED, _NOT_ENABLED
            pairs.append((f"plugin {name!r}", words[name not in before], words[name not in now]))
    return pairs


def mid_epoch_obstacle(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    batch: int,
) -> str | None:
    """The reason why a run can't resume in the middle of an epoch; None if it can.

    Args:
        before: ``run`` of the saved manifest.
        now: ``run`` of the manifest of the run that is to be resumed.
        states: the plugins' states by name, for each process that has saved.
        batch: micro-batches of the epoch that the saved run has used.
    """
    if before.get("dataset_length", now["dataset_length"]) != now["dataset_length"]:
        return "A position in the middle of an epoch is only valid for the same dataset"
    sizes = [run["per_device_batch_size"] * run["num_processes"] for run in (before, now)]
    if sizes[0] != sizes[1]:
        return (
            "A position in the middle of an epoch is only valid for the same global batch size, "
            f"which was {sizes[0]} and is now {sizes[1]}: change per_device_batch_size"
        )
    accumulation = [run["gradient_accumulation_steps"] for run in (before, now)]
    if batch % accumulation[1] and accumulation[0] != accumulation[1]:
        return (
            f"A position after {batch} micro-batches of an epoch is only valid for a "
            f"gradient_accumulation_steps that divides {batch}, such as {accumulation[0]}; it is "
            f"now {accumulation[1]}"
        )
    if before["num_processes"] != now["num_processes"]:
        first = states[0]
        for process in states[1:]:
            for name, state in process.items():
                # An empty state loses nothing: the main process' state is the one to restore.
                if state and not same_state(first.get(name), state):
                    return (
                        f"The state of the plugin {name!r} differs between processes, so it can't "
                        "be restored on a different number of them: resume from a state that was "
                        "saved at the end of an epoch"
                    )
    return None


def same_state(first: Any, second: Any) -> bool:
    """Whether two states of a plugin, or of data, are equal, bit for bit."""
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    texts = [encode(state, into, "") for state, into in zip((first, second), tensors, strict=True)]
    return texts[0] == texts[1] and tensor_bytes(tensors[0]) == tensor_bytes(tensors[1])


def only_in_one(saved: Sequence[str], present: Sequence[str]) -> str:
    """Which names only the state has, and which only the run."""
    in_state = [name for name in saved if name not in present]
    in_run = [name for name in present if name not in saved]
    return (
        f"only in the state: {listed(in_state) or 'none'}; only in the run: "
        f"{listed(in_run) or 'none'}"
    )
