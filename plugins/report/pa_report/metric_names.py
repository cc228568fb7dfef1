"""What a metric's name says: which curves belong into one plot, and which way is better."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(
    r"^(?:(?P<data>.+?)[_/.-])?"
    r"(?P<part>intermediate[_/.-]eval|evaluation|eval|training|train|validation|valid|val|test)"
    r"[_/.-](?P<base>.+)$"
)
_LOWER = re.compile(
    r"loss|error|perplexity|mse|mae|nll|distance|hamming|(?<![a-z])(wer|cer|fid)(?![a-z])"
)
_HIGHER = re.compile(
    r"acc|f1|f_beta|fbeta|precision|recall|auroc|auc|iou|dice|jaccard|(?<![a-z])map(?![a-z])|score"
    r"|bleu|rouge|psnr|ssim|r2|kappa|corr|specificity|sensitivity|similarity"
)


_PARTS = {
    **dict.fromkeys(("training", "train"), "train"),
    **dict.fromkeys(("evaluation", "test"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "eval"), "eval"),
}


@dataclass(frozen=True)
class MetricName:
    """A metric's name, taken apart.

    Attributes:
        base: what is measured; metrics of one base belong into one plot.
        label: which of them it is: ``"train"``, ``"eval"``, a dataset's.
        part: ``"train"``, ``"eval"``, ``"test"`` or ``""``.
        is_within_epoch: whether it stands for a part of an epoch, beside one for the whole.
    """

    base: str
    label: str
    part: str
    is_within_epoch: bool


def take_apart(name: str) -> MetricName:
    """Read a metric's name.

    >>> take_apart("train_loss_epoch")
    MetricName(base='loss', label='train', part='train', is_within_epoch=False)
    >>> take_apart("night_eval_f1").label, take_apart("evaluation_loss").label
    ('eval night', 'evaluate()')
    """
    match = _NAME.match(name)
    if match is None:
        return MetricName(name, name.rpartition("/")[2], "", False)
    base, _, detail = match["base"].partition("/")
    is_whole = base.endswith("_epoch")
    base = base.removesuffix("_epoch") or base
    part = _PARTS.get(match["part"], "eval")
    is_running = part == "train" and base == "loss" and not is_whole  # the mean so far
    is_within = is_running or match["part"].startswith("intermediate")
    shown = "evaluate()" if match["part"] == "evaluation" else part
    label = " ".join(filter(None, (shown, match["data"], detail)))
    return MetricName(base, f"{label} in epoch" if is_within else label, part, is_within)


def higher_is_better(name: str) -> bool | None:
    """Which way a metric of this name is better; None where the name doesn't say.

    >>> higher_is_better("eval_loss_epoch"), higher_is_better("eval_accuracy")
    (False, True)
    >>> higher_is_better("temperature") is None
    True
    """
    words = name.lower()
    if _LOWER.search(words):
        return False
    return True if _HIGHER.search(words) else None
