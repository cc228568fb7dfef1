"""Parse metric names: the quantity, the data split, and whether higher is better."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(
    r"^(?:(?P<data>.+?)[_/.-])?"
    r"(?P<split>intermediate[_/.-]eval|evaluation|eval|training|train|validation|valid|val|test)"
    r"[_/.-](?P<base>.+)$"
)
_LOWER = re.compile(
    r"loss|error|perplexity|mse|mae|nll|distance|hamming|(?<![a-z])(wer|cer|fid)(?![a-z])"
)
_HIGHER = re.compile(
    r"acc|f1|f_beta|fbeta|precision|recall|auroc|auc|iou|dice|jaccard|(?<![a-z])map(?![a-z])|score"
    r"|bleu|rouge|psnr|ssim|r2|kappa|corr|specificity|sensitivity|similarity"
)


_SPLITS = {
    **dict.fromkeys(("training", "train"), "train"),
    **dict.fromkeys(("evaluation", "test"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "eval"), "eval"),
}


@dataclass(frozen=True)
class MetricName:
    """The parts of a metric's name.

    Attributes:
        base: the quantity; metrics with the same base share a chart.
        label: what distinguishes metrics with the same base: the split and the dataset's name.
        split: ``"train"``, ``"eval"``, ``"test"`` or ``""``.
        is_within_epoch: whether its values are recorded within epochs, in addition to a metric
            recorded once per epoch.
    """

    base: str
    label: str
    split: str
    is_within_epoch: bool


def parse_metric_name(name: str) -> MetricName:
    """Parse a metric's name.

    >>> parse_metric_name("train_loss_epoch")
    MetricName(base='loss', label='train', split='train', is_within_epoch=False)
    >>> parse_metric_name("night_eval_f1").label, parse_metric_name("evaluation_loss").label
    ('eval night', 'evaluate()')
    """
    match = _NAME.match(name)
    if match is None:
        return MetricName(name, name.rpartition("/")[2], "", False)
    base, _, detail = match["base"].partition("/")
    is_whole = base.endswith("_epoch")
    base = base.removesuffix("_epoch") or base
    split = _SPLITS.get(match["split"], "eval")
    is_running = split == "train" and base == "loss" and not is_whole  # the mean so far
    is_within = is_running or match["split"].startswith("intermediate")
    shown = "evaluate()" if match["split"] == "evaluation" else split
    label = " ".join(filter(None, (shown, match["data"], detail)))
    return MetricName(base, f"{label} in epoch" if is_within else label, split, is_within)


def higher_is_better(name: str) -> bool | None:
    """Whether a higher value of this metric is better; None if the name doesn't say.

    >>> higher_is_better("eval_loss_epoch"), higher_is_better("eval_accuracy")
    (False, True)
    >>> higher_is_better("temperature") is None
    True
    """
    words = name.lower()
    if _LOWER.search(words):
        return False
    return True if _HIGHER.search(words) else None
