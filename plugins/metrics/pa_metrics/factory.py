"""Metrics by name: any class of torchmetrics, of another plugin, or behind a dotted path."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from pa_core.errors import nearest

# The top level comes last: what it has of the others' is deprecated there, in part.
_HOMES = (
    "classification",
    "regression",
    "retrieval",
    "segmentation",
    "detection",
    "text",
    "image",
    "audio",
    "clustering",
    "nominal",
    "multimodal",
    "aggregation",
    "wrappers",
    "",
)


def history_name(name: str) -> str:
    """The name under which a metric's values are recorded.

    >>> history_name("F1Score"), history_name("torchmetrics.text.BLEUScore"), history_name("auroc")
    ('f1_score', 'bleu_score', 'auroc')
    """
    last = name.rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", last).lower()


def import_path(path: str) -> Any:
    """Import what a dotted path such as ``"package.module.name"`` means.

    Raises:
        ValueError: where there is no such thing.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"can't import {path!r}: {error}") from error


def find_metric(name: str, registered: Mapping[str, Any]) -> Callable[..., Any]:
    """Find what builds the metric `name`.

    Args:
        name: a class of torchmetrics, as it is written there (``"F1Score"``) or in snake case
            (``"f1_score"``), a metric that a plugin registers, or a dotted path.
        registered: what plugins register.

    Raises:
        ValueError: where there is none, with the nearest name.
    """
    if name in registered:
        return registered[name]
    if "." in name:
        return import_path(name)
    classes = _torchmetrics_classes()
    if _key(name) not in classes:
        known = [history_name(found.__name__) for found in classes.values()] + list(registered)
        raise ValueError(f"there is no metric {name!r}.{nearest(history_name(name), known)}")
    return classes[_key(name)]


def create_metric(create: Callable[..., Any], arguments: Mapping[str, Any], **shared: Any) -> Any:
    """Build a metric with its own arguments, and those of `shared` that it knows.

    Raises:
        ValueError: where an argument is missing, unknown or wrong.
    """
    parameters = inspect.signature(create).parameters
    given = {key: value for key, value in shared.items() if key in parameters} | dict(arguments)
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in given
    ]
    if missing:
        raise ValueError(f"it needs {', '.join(missing)}, which the settings don't give")
    try:
        return create(**given)
    except ModuleNotFoundError as error:
        extra = "detection" if "coco" in str(error).lower() else "text"
        raise ValueError(f"{error}. Try pip install 'pa-metrics[{extra}]'") from error
    except (TypeError, ValueError) as error:
        raise ValueError(str(error)) from error


def build_metric(
    name: str,
    arguments: Mapping[str, Any],
    registered: Mapping[str, Any],
    shared: Mapping[str, Any],
) -> Any:
    """Find and build a metric, and the metric in it where it is a wrapper.

    Args:
        name: as `find_metric` takes it.
        arguments: its own. A wrapper's ``metric`` is a name or a table like any other metric's.
        registered: what plugins register.
        shared: arguments for all metrics that know them.

    Raises:
        ValueError: where there is no such metric, or its arguments are wrong.
    """
    create, arguments = find_metric(name, registered), dict(arguments)
    parameters = inspect.signature(create).parameters
    place = next((key for key in ("metric", "base_metric") if key in parameters), None)
    given = arguments.pop("metric", arguments.pop("base_metric", None)) if place else None
    if place and given is not None:
        inner = {"class": given} if isinstance(given, str) else dict(given)
        if "class" not in inner:
            raise ValueError("the metric in it needs a name, as `class`")
        arguments[place] = build_metric(inner.pop("class"), inner, registered, shared)
    if getattr(create, "__module__", "").startswith("torchmetrics.segmentation"):
        shared = {"input_format": "index", **shared}
    return create_metric(create, arguments, **shared)


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def _torchmetrics_classes() -> dict[str, type]:
    from torchmetrics import Metric

    classes: dict[str, type] = {}
    for home in _HOMES:
        for name, value in vars(import_module(f"torchmetrics.{home}".rstrip("."))).items():
            if isinstance(value, type) and issubclass(value, Metric) and value is not Metric:
                classes.setdefault(_key(name), value)
    return classes
