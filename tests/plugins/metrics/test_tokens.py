"""Metrics of tokens: the next ones of causal models, and labels of -100, which don't count."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn

from pa_core import Trainer
from pa_metrics import MetricsPlugin

WORDS = 5
generator = torch.Generator().manual_seed(5)
LOGITS = torch.randn(24, 7, WORDS, generator=generator)
LABELS = torch.randint(0, WORDS, (24, 7), generator=generator)
LABELS[:, 5:] = -100
LABELS[3] = -100
MULTICLASS = {"task": "multiclass", "num_classes": WORDS}


class Words(Trainer):
    """Its batches hold the logits; `extra` is what a plugin adds to the batch output."""

    extra: ClassVar[dict[str, Any]] = {}

    def calculate_eval_batch_loss(self, batch):
        logits = batch["logits"] if isinstance(batch, dict) else batch[0]
        loss = logits.sum() * 0
        return {"loss": loss, "model_outputs": logits, "batch_size": len(logits), **self.extra}


class Causal(nn.Linear):
    loss_type = "ForCausalLM"


class BartForCausalLM(Causal):
    """Of this class of transformers, labels are shifted already."""


def evaluated(
    names: list[str] | dict[str, Any],
    labels: Tensor = LABELS,
    model: type[nn.Linear] = Causal,
    more: dict[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    plugin = MetricsPlugin(metrics=names, **{**MULTICLASS, "average": "micro"} | options)
    trainer = Words(model(1, 1), None, None, callbacks=(), plugins=[plugin])
    trainer.extra = extra or {}  # type: ignore[misc]
    columns = {"logits": LOGITS, "labels": labels, **(more or {})}
    data = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return trainer.evaluate(data, per_device_batch_size=3)


def by_hand(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """The values of scikit-learn and of `cross_entropy` for the labels that count."""
    counts = labels != -100
    target, scores = labels[counts], logits[counts]
    chosen = scores.argmax(-1)
    return {
        "accuracy": sk.accuracy_score(target, chosen),
        "macro": sk.f1_score(target, chosen, average="macro"),
        "auroc": sk.roc_auc_score(target, scores.softmax(-1), multi_class="ovr"),
        "top": sk.top_k_accuracy_score(target, scores, k=2, labels=range(WORDS)),
        "confusion_matrix": sk.confusion_matrix(target, chosen).tolist(),
        "perplexity": nn.functional.cross_entropy(scores, target).exp().item(),
    }


NAMES = {
    "accuracy": {},
    "macro": {"class": "f1_score", "average": "macro"},
    "auroc": {"average": "macro"},
    "top": {"class": "accuracy", "top_k": 2},
    "confusion_matrix": {},
    "perplexity": {},
}
NEXT = LOGITS[:, :-1], LABELS[:, 1:]
PLACES = torch.where(torch.rand(LABELS.shape, generator=generator) < 0.2, -100, LABELS)


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (NEXT, {}),
        (NEXT, {"to_preds_and_target": "causal_language_model"}),
        (NEXT, {"to_preds_and_target": "causal_language_model", "model": nn.Linear}),
        ((LOGITS, LABELS), {"to_preds_and_target": "language_model"}),
        ((LOGITS, LABELS), {"model": nn.Linear}),
        ((LOGITS, LABELS), {"model": BartForCausalLM}),
        # What the loss does is better known where it is calculated.
        ((LOGITS, LABELS), {"extra": {"shifts_labels": False}}),
        (NEXT, {"extra": {"shifts_labels": True}, "model": nn.Linear}),
        ((LOGITS, PLACES), {"more": {"shift_labels": PLACES}}),
    ],
)
def test_token_metrics_are_those_of_the_labels_that_the_loss_counts(expected, options):
    found = evaluated(NAMES, **options)
    for name, value in by_hand(*expected).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_targets_in_a_tuple_belong_to_the_outputs_one_by_one():
    plugin = MetricsPlugin(metrics=["accuracy"], ignore_index=-100, average="micro", **MULTICLASS)
    trainer = Words(Causal(1, 1), None, None, callbacks=(), plugins=[plugin])
    found = trainer.evaluate(torch.utils.data.TensorDataset(LOGITS.movedim(-1, 1), LABELS))
    assert found["accuracy"] == pytest.approx(by_hand(LOGITS, LABELS)["accuracy"])


def late() -> Tensor:
    """A label of -100 in the last batch only; metrics check the values of the first one."""
    labels = LABELS[:, 0].clamp(min=0)
    labels[-1] = -100
    return labels


@pytest.mark.parametrize(
    ("names", "labels", "options"),
    [
        (["accuracy"], LABELS[:, 3], {}),
        (["accuracy"], late(), {}),
        (["accuracy"], late(), {"ignore_index": 0}),
        (["accuracy"], LABELS, {"ignore_index": 0, "model": nn.Linear}),
        ({"accuracy": {"class": "mean_squared_error"}}, LABELS, {"model": nn.Linear}),
    ],
)
def test_labels_of_minus_100_that_a_metric_would_count_are_an_error(names, labels, options):
    more = {"logits": LOGITS[:, 0]} if labels.ndim == 1 else {"logits": LOGITS.clone()}
    if "mean_squared_error" in str(names):
        more = {"logits": LOGITS[..., 0].clone()}
    with pytest.raises(ValueError, match=r"these metrics count them: accuracy\. Set ignore_index"):
        evaluated(names, labels, more=more, **options)


def test_labels_of_minus_100_are_ignored_if_asked_for():
    found = evaluated(["accuracy"], late(), more={"logits": LOGITS[:, 0]}, ignore_index=-100)
    right = LOGITS[:-1, 0].argmax(-1) == late()[:-1]
    assert found["accuracy"] == pytest.approx(right.float().mean().item())
