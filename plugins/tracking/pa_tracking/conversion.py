"""Convert values to the forms that services accept: scalars, flat settings, figures as images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_CURVES = 100
"""A longer list of numbers is not logged as one curve per entry."""


def numbers_in(values: Mapping[str, Any]) -> dict[str, float]:
    """Extract the numbers; entries of dictionaries and short lists get a name each.

    Text, longer lists and nested lists, such as matrices, are left out.

    >>> numbers_in({"loss": 0.5, "recall": [0.1, 0.9], "f1": {"cat": 1.0}, "note": "x"})
    {'loss': 0.5, 'recall/0': 0.1, 'recall/1': 0.9, 'f1/cat': 1.0}
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float):
            numbers[name] = value
        elif isinstance(value, Mapping):
            numbers |= numbers_in({f"{name}/{key}": item for key, item in value.items()})
        elif isinstance(value, list) and len(value) <= MAX_CURVES:
            if all(isinstance(item, int | float) for item in value):
                numbers |= {f"{name}/{number}": item for number, item in enumerate(value)}
    return numbers


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names; values other than text and numbers become text.

    >>> flatten({"run": {"seed": 1, "sizes": [2, 3]}})
    {'run.seed': 1, 'run.sizes': '[2, 3]'}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in flatten(value).items()}
        else:
            flat[name] = value if isinstance(value, str | bool | int | float) else str(value)
    return flat


_EVALUATION = re.compile(
    r"(?:(?P<data>.+?)_)?(?P<kind>intermediate_eval|evaluation|eval)_(?P<of>.+)"
)


def evaluation_tag(name: str, group: str, prefix: str) -> str:
    """The tag of a metric that an evaluation has recorded, in its group.

    Args:
        name: the metric's name.
        group: ``"eval"`` or ``"evaluation"``.
        prefix: what the name begins with: the names of the evaluated model and of the dataset.

    >>> evaluation_tag("ema_night_eval_loss_epoch", "eval", "ema_night_")
    'eval/ema_night_loss_epoch'
    >>> evaluation_tag("accuracy", "eval", "")
    'eval/accuracy'
    """
    own = name.removeprefix(prefix)
    prefix = name[: len(name) - len(own)]
    for start, short in (
        ("intermediate_eval_", "intermediate_"),
        ("evaluation_", ""),
        ("eval_", ""),
    ):
        if own.startswith(start) and own != start:
            own = short + own.removeprefix(start)
            break
    return f"{group}/{prefix}{own}"


def tag_of(name: str) -> str:
    """The tag of a metric of which no evaluation is known, by its name alone.

    >>> tag_of("train_loss_epoch"), tag_of("night_eval_loss_epoch"), tag_of("learning_rate")
    ('train/loss_epoch', 'eval/night_loss_epoch', 'learning_rate')
    """
    if name.startswith("train_") and name != "train_":
        return f"train/{name.removeprefix('train_')}"
    match = _EVALUATION.fullmatch(name)
    if match is None:
        return name
    group = "evaluation" if match["kind"] == "evaluation" else "eval"
    prefix = f"{match['data']}_" if match["data"] else ""
    return evaluation_tag(name, group, prefix)


def shared_charts(tags: Iterable[str]) -> dict[str, list[str]]:
    """The charts that metrics of training and evaluation share: a regular expression for each tag.

    Those of other datasets and evaluated models belong to the same chart. Each has a loss, by which
    the beginning of their tags is known.

    >>> shared_charts(["train/loss_epoch", "eval/loss_epoch", "eval/ema_loss_epoch", "train/loss"])
    {'loss_epoch': ['^train/loss_epoch$', '^eval/ema_loss_epoch$', '^eval/loss_epoch$']}
    """
    names = sorted(tags, key=lambda tag: (not tag.startswith("train/"), tag))
    beginnings = [
        tag.removesuffix(loss)
        for tag in names
        for loss in ("intermediate_loss", "loss_epoch")
        if tag.startswith("eval/") and tag.endswith(loss)
    ]
    charts: dict[str, list[str]] = {}
    for tag in names:
        known = [start for start in ("train/", "eval/", *beginnings) if tag.startswith(start)]
        if known:
            quantity = tag.removeprefix(max(known, key=len)).removeprefix("intermediate_")
            charts.setdefault(quantity, []).append(tag)
    return {
        quantity: [f"^{re.escape(tag)}$" for tag in of_chart]
        for quantity, of_chart in charts.items()
        if of_chart[0].startswith("train/") and len(of_chart) > 1
    }


def hyperparameters(description: Mapping[str, Any]) -> dict[str, str | int | float]:
    """The hyper-parameters of a run, flat and with short names, to compare runs in columns.

    They are those of the model, the optimizer (before a scheduler changes them), the data, and the
    settings of plugins that change training. What is None or a flag of an implementation is left
    out.

    Args:
        description: the description of the run: its manifest and run config.
    """
    run, config = description.get("run", {}), description.get("run_config", {})
    named = {
        "model": run.get("model"),
        "loss": _class_name(run.get("loss")),
        "optimizer": run.get("optimizer"),
        **_optimizer_settings(run.get("optimizer_settings") or []),
        "scheduler": _class_name(run.get("scheduler")),
        "num_epochs": config.get("num_epochs"),
        "max_num_train_steps": config.get("max_num_train_steps"),
        "batch_size": config.get("train_total_batch_size"),
        "gradient_accumulation_steps": config.get("gradient_accumulation_steps"),
        "gradient_clip_norm": config.get("gradient_clip_norm"),
        "gradient_clip_value": config.get("gradient_clip_value"),
        "mixed_precision": config.get("mixed_precision"),
        "num_processes": config.get("num_processes"),
        "dataset_length": run.get("dataset_length"),
        "seed": description.get("seed"),
    }
    for name, plugin in description.get("plugins", {}).items():
        if plugin["changes_training"]:
            visible = {k: v for k, v in plugin["values"].items() if not isinstance(v, Mapping)}
            named |= flatten({name: visible | plugin["settings"]})
    return {
        name: value if isinstance(value, str | int | float) else _joined(value)
        for name, value in named.items()
        if value is not None and value != "None"
    }


def _optimizer_settings(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Each setting of parameter groups; those that differ between groups as text."""
    found: dict[str, list[Any]] = {}
    for group in groups:
        values = {**group, "lr": group.get("initial_lr", group.get("lr"))}
        for name, value in values.items():
            if not isinstance(value, bool) and name not in ("initial_lr", "name"):
                found.setdefault(name, []).append(value)
    return {
        name: values[0] if all(value == values[0] for value in values) else values
        for name, values in found.items()
    }


def _class_name(described: Any) -> Any:
    """The class or function of what the manifest describes, or those of several."""
    if isinstance(described, list):
        return [_class_name(one) for one in described]
    if isinstance(described, Mapping):
        return described.get("class") or described.get("function")
    return described


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def figure_to_image(figure: Any) -> NDArray[Any]:
    """Render a matplotlib figure as an 8-bit array of shape ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(np.asarray(canvas.buffer_rgba())[..., :3])
