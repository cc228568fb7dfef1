"""Find and build metrics by name: torchmetrics classes, other plugins' metrics, dotted paths."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from pa_core.errors import nearest

# The top level comes last, since some of its aliases are deprecated.
_SUBPACKAGES = (
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
    """Import the object at a dotted path such as ``"package.module.name"``.

    Raises:
        ValueError: if it can't be imported.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"can't import {path!r}: {error}") from error


def find_metric(name: str, registered: Mapping[str, Any]) -> Callable[..., Any]:
    """Find the class or function that builds the metric `name`.

    Args:
        name: a torchmetrics class, by its own name (``"F1Score"``) or in snake case
            (``"f1_score"``), a metric registered by a plugin, or a dotted path.
        registered: the metrics that plugins register.

    Raises:
        ValueError: if there is no such metric, with the nearest name.
    """
    if name in registered:
        return registered[name]
    if "." in name:
        return import_path(name)
    classes = _torchmetrics_classes()
    if _key(name) not in classes:
        known = [history_name(found.__name__) for found in classes.values()] + list(registered)
        raise ValueError(f"unknown metric {name!r}.{nearest(history_name(name), known)}")
    return classes[_key(name)]


def create_metric(
    create: Callable[..., Any],
    arguments: Mapping[str, Any],
    shared: Mapping[str, Any],
    used: set[str],
) -> Any:
    """Build a metric with its own arguments and those of `shared` that it accepts.

    Args:
        create: its class, or a function that builds it.
        arguments: its own arguments.
        shared: arguments for all metrics that accept them.
        used: to which the names of those that it accepts are added.

    Raises:
        ValueError: if an argument is missing, unknown or invalid.
    """
    parameters = inspect.signature(create).parameters
    used |= shared.keys() & parameters.keys()
    given = {key: value for key, value in shared.items() if key in parameters} | dict(arguments)
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in given
    ]
    if missing:
        hint = ": binary, multiclass or multilabel" if missing == ["task"] else ""
        raise ValueError(f"missing arguments: {', '.join(missing)}{hint}")
    try:
        return create(**given)
    except ModuleNotFoundError as error:
        extra = "detection" if "coco" in str(error).lower() else "text"
        raise ValueError(
            f"{str(error).rstrip('. ')}. Try: pip install 'pa-metrics[{extra}]'"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(str(error)) from error


def build_metric(
    name: str,
    arguments: Mapping[str, Any],
    registered: Mapping[str, Any],
    shared: Mapping[str, Any],
    used: set[str],
) -> Any:
    """Find and build a metric and, if it is a wrapper, the metric that it wraps.

    Args:
        name: a name that `find_metric` accepts.
        arguments: its arguments. A wrapper's ``metric`` is a name or a table, as for any metric.
        registered: the metrics that plugins register.
        shared: arguments for all metrics that accept them.
        used: to which the names of those that it accepts are added.

    Raises:
        ValueError: if there is no such metric, or its arguments are invalid.
    """
    create, arguments = find_metric(name, registered), dict(arguments)
    parameters = inspect.signature(create).parameters
    wrapped = next((key for key in ("metric", "base_metric") if key in parameters), None)
    given = arguments.pop("metric", arguments.pop("base_metric", None)) if wrapped else None
    if wrapped and given is not None:
        inner = {"class": given} if isinstance(given, str) else dict(given)
        if "class" not in inner:
            raise ValueError("the wrapped metric needs a name, given as `class`")
        arguments[wrapped] = build_metric(inner.pop("class"), inner, registered, shared, used)
    if getattr(create, "__module__", "").startswith("torchmetrics.segmentation"):
        shared = {"input_format": "index", **shared}
    return create_metric(create, arguments, shared, used)


def _key(name: str) -> str:
    return name.replace("_", "").lower()


def _torchmetrics_classes() -> dict[str, type]:
    from torchmetrics import Metric

    classes: dict[str, type] = {}
    for subpackage in _SUBPACKAGES:
        for name, value in vars(import_module(f"torchmetrics.{subpackage}".rstrip("."))).items():
            if isinstance(value, type) and issubclass(value, Metric) and value is not Metric:
                classes.setdefault(_key(name), value)
    return classes
