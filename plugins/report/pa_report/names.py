"""The names of a run's metrics in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pa_core.plugin import MetricName, greater_is_better, parse_metric_names


def names_of(metrics: Iterable[str]) -> dict[str, MetricName]:
    """Parse the names of a run's metrics.

    A metric without a prefix, such as "accuracy", is that of the evaluation, if there is one: the
    names of metrics of training begin with "train".

    >>> names_of(["eval_loss_epoch", "accuracy"])["accuracy"].text
    'accuracy, eval'
    """
    names = parse_metric_names(metrics)
    if "eval" not in {name.split for name in names.values()}:
        return names
    return {
        name: replace(parsed, split="eval", label="eval")
        if not parsed.label and greater_is_better(name) is not None
        else parsed
        for name, parsed in names.items()
    }
