"""What was trained, on what and how: a run's settings in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pa_report.formatting import duration, grouped, short
from pa_report.markup import is_number, mapping

if TYPE_CHECKING:
    from pa_report.run import Run

_PRECISIONS = {"no": "float32"}


def describe(run: Run) -> dict[str, str]:
    """The facts about a run that a colleague asks for first, as texts by their titles.

    Facts that the run doesn't record are left out.
    """
    arguments, hardware = mapping(run.manifest.get("run")), mapping(run.manifest.get("hardware"))
    git, facts = mapping(run.manifest.get("git")), run.facts
    optimizer, learning_rate = _optimizer(run, arguments)
    described = {
        "model": _text(arguments.get("model")),
        "parameters": _parameters(facts),
        "training data": _data(arguments),
        "evaluation data": _eval_data(facts),
        "loss": _loss(arguments.get("loss")),
        "optimizer": optimizer,
        "learning rate": learning_rate,
        "scheduler": _text(mapping(arguments.get("scheduler")).get("class")),
        "batch size": _batch_size(run, arguments),
        "epochs": _count(run.progress.get("epochs")),
        "updates": _count(run.progress.get("updates")),
        "time": _time(run),
        "device": _device(hardware, arguments),
        "precision": _PRECISIONS.get(
            str(arguments.get("mixed_precision")), _text(arguments.get("mixed_precision"))
        ),
        "seed": _text(run.manifest.get("seed")),
        "command": _text(facts.get("command")),
        "settings file": _text(facts.get("settings_file")),
        "git commit": _text(git.get("commit"))[:12]
        + (", with uncommitted changes" if git.get("dirty") else ""),
        "plugins": _plugins(run),
        "software": _software(run),
    }
    return {title: value for title, value in described.items() if value}


def sentence(run: Run) -> str:
    """One sentence about the run, such as "Net, 1 234 parameters, was trained for 3 epochs"."""
    facts = describe(run)
    subject = facts.get("model", "A model")
    if "parameters" in facts:
        subject += f" ({facts['parameters'].partition(',')[0]} parameters)"
    parts = [subject, "trained on", facts.get("training data", "data"), "for"]
    epochs = facts.get("epochs", "0")
    parts.append(f"{epochs} epoch{'' if epochs == '1' else 's'}")
    updates = facts.get("updates", "0")
    parts.append(f"({updates} update{'' if updates == '1' else 's'})")
    if "time" in facts:
        parts += ["in", facts["time"].partition(" (")[0]]
    if "device" in facts:
        parts += ["on", facts["device"]]
    return " ".join(parts) + "."


def _parameters(facts: Mapping[str, Any]) -> str:
    total, trainable = facts.get("parameters"), facts.get("trainable_parameters")
    if not is_number(total) or total is None:
        return ""
    if not is_number(trainable) or trainable == total or trainable is None:
        return grouped(int(total))
    return f"{grouped(int(total))}, {grouped(int(trainable))} of them trainable"


def _data(arguments: Mapping[str, Any]) -> str:
    length, kind = arguments.get("dataset_length"), mapping(arguments.get("dataset")).get("type")
    samples = f"{_count(length)} samples" if is_number(length) else ""
    if samples and kind:
        return f"{samples} ({kind})"
    return samples or _text(kind)


def _eval_data(facts: Mapping[str, Any]) -> str:
    texts = []
    for name, length in mapping(facts.get("eval_samples")).items():
        samples = f"{_count(length)} samples" if is_number(length) else "samples"
        texts.append(f"{name}: {samples}" if name else samples)
    return ", ".join(texts)


def _loss(loss: Any) -> str:
    settings = mapping(loss)
    if not settings:
        return _text(loss)
    smoothing = settings.get("label_smoothing")
    return _text(settings.get("class")) + (f", label smoothing {smoothing:g}" if smoothing else "")


def _optimizer(run: Run, arguments: Mapping[str, Any]) -> tuple[str, str]:
    """The optimizer with its main settings, and the highest learning rate."""
    groups = arguments.get("optimizer_settings")
    groups = [mapping(group) for group in groups] if isinstance(groups, list) else []
    texts = [_text(arguments.get("optimizer"))]
    for key, title in (("weight_decay", "weight decay"), ("momentum", "momentum")):
        values = dict.fromkeys(group[key] for group in groups if is_number(group.get(key)))
        if any(values):
            texts.append(f"{title} {', '.join(f'{value:g}' for value in values)}")
    recorded = [point.value for point in run.measures.get("learning_rate", ())]
    initial = dict.fromkeys(group["lr"] for group in groups if is_number(group.get("lr")))
    rates = [f"{rate:.4g}" for rate in initial]
    if recorded and len(initial) <= 1:
        low, high = min(recorded), max(recorded)
        rates = [f"{high:.4g}"] if low == high else [f"up to {high:.4g}"]
    return ", ".join(filter(None, texts)), ", ".join(rates)


def _batch_size(run: Run, arguments: Mapping[str, Any]) -> str:
    """Samples per update, with the factors where there are several."""
    per_device: Any = arguments.get("per_device_batch_size")
    accumulated: Any = arguments.get("gradient_accumulation_steps") or 1
    processes: Any = arguments.get("num_processes") or 1
    if not all(is_number(value) for value in (per_device, accumulated, processes)):
        return _text(per_device)
    factors = [f"{per_device}"]
    factors += [f"{processes} processes"] if processes > 1 else []
    factors += [f"{accumulated} accumulated"] if accumulated > 1 else []
    total = f"{per_device * accumulated * processes}"
    return total if len(factors) == 1 else f"{total} ({' × '.join(factors)})"


def _time(run: Run) -> str:
    seconds, samples = run.progress.get("seconds", 0.0), run.progress.get("samples", 0.0)
    training = run.times.get("training", 0.0)
    rate = f" ({short(round(samples / training))} samples per second)" if training > 0 else ""
    return f"{duration(seconds)}{rate}" if seconds else ""


def _device(hardware: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    device = _text(hardware.get("device")).upper().replace("CUDA", "GPU")
    name = hardware.get("name") or hardware.get("machine") or ""
    processes = arguments.get("num_processes") or 1
    text = ", ".join(filter(None, (f"{device} {name}".strip(),)))
    return f"{processes} × {text}" if text and is_number(processes) and processes > 1 else text


def _plugins(run: Run) -> str:
    return ", ".join(
        name
        for name, source in mapping(run.manifest.get("plugins")).items()
        if mapping(source).get("origin") != "built-in"
    )


def _software(run: Run) -> str:
    packages = mapping(run.manifest.get("packages"))
    shown = [
        f"{name} {packages[name]}" for name in ("python", "torch", "pa-core") if name in packages
    ]
    return ", ".join([*shown, *filter(None, [_text(run.facts.get("platform"))])])


def _count(value: Any) -> str:
    return short(round(float(value), 2)) if is_number(value) else ""


def _text(value: Any) -> str:
    return "" if value is None else str(value)
