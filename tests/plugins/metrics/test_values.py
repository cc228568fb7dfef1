"""Values equal those of scikit-learn, for each metric in the README and more."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_metrics import MetricsPlugin

SAMPLES, CLASSES = 101, 4
generator = torch.Generator().manual_seed(11)
LOGITS = torch.randn(SAMPLES, CLASSES, generator=generator)
CLASS = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
SCORES = torch.rand(SAMPLES, generator=generator)
BINARY = torch.randint(0, 2, (SAMPLES,), generator=generator)
LABELS = torch.randint(0, 2, (SAMPLES, CLASSES), generator=generator)
TARGETS = torch.randn(SAMPLES, generator=generator)
MANY = torch.rand(SAMPLES, CLASSES, generator=generator)
CHOSEN, SHARES = LOGITS.argmax(1), LOGITS.softmax(1)


class Same(nn.Module):
    """Returns its input: the test provides the predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x


def evaluated(preds, target, name: str, arguments: dict[str, Any], **options: Any) -> Any:
    plugin = MetricsPlugin(metrics={"value": {"class": name, **arguments}}, **options)
    trainer = Trainer(
        Same(), lambda output, target: output.sum() * 0, None, callbacks=(), plugins=[plugin]
    )
    return trainer.evaluate(TensorDataset(preds, target), per_device_batch_size=16)["value"]


MULTICLASS = {"task": "multiclass", "num_classes": CLASSES}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("accuracy", {"average": "micro"}, lambda: sk.accuracy_score(CLASS, CHOSEN)),
        ("accuracy", {"average": "macro"}, lambda: sk.balanced_accuracy_score(CLASS, CHOSEN)),
        (
            "accuracy",
            {"average": "micro", "top_k": 2},
            lambda: sk.top_k_accuracy_score(CLASS, SHARES, k=2),
        ),
        (
            "precision",
            {"average": "macro"},
            lambda: sk.precision_score(CLASS, CHOSEN, average="macro"),
        ),
        (
            "recall",
            {"average": "weighted"},
            lambda: sk.recall_score(CLASS, CHOSEN, average="weighted"),
        ),
        ("f1_score", {"average": "macro"}, lambda: sk.f1_score(CLASS, CHOSEN, average="macro")),
        ("F1Score", {"average": "none"}, lambda: sk.f1_score(CLASS, CHOSEN, average=None)),
        ("auroc", {}, lambda: sk.roc_auc_score(CLASS, SHARES, multi_class="ovr")),
        (
            "average_precision",
            {},
            lambda: sk.average_precision_score(np.eye(CLASSES)[CLASS], SHARES),
        ),
        ("cohen_kappa", {}, lambda: sk.cohen_kappa_score(CLASS, CHOSEN)),
        ("matthews_corr_coef", {}, lambda: sk.matthews_corrcoef(CLASS, CHOSEN)),
        (
            "jaccard_index",
            {"average": "macro"},
            lambda: sk.jaccard_score(CLASS, CHOSEN, average="macro"),
        ),
        ("confusion_matrix", {}, lambda: sk.confusion_matrix(CLASS, CHOSEN)),
    ],
)
def test_metrics_of_classes(name, arguments, expected):
    value = evaluated(LOGITS, CLASS, name, arguments, **MULTICLASS)
    np.testing.assert_allclose(value, expected(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", lambda: sk.accuracy_score(BINARY, SCORES > 0.5)),
        ("specificity", lambda: sk.recall_score(BINARY, SCORES > 0.5, pos_label=0)),
        ("auroc", lambda: sk.roc_auc_score(BINARY, SCORES)),
        ("average_precision", lambda: sk.average_precision_score(BINARY, SCORES)),
    ],
)
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_metrics_of_two_classes_with_integer_or_float_targets(name, expected, kind):
    value = evaluated(SCORES, BINARY.to(kind), name, {}, task="binary")
    assert value == pytest.approx(expected(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "f1_score",
            lambda: sk.f1_score(LABELS, MANY > 0.5, average="macro", zero_division=0),
        ),
        ("hamming_distance", lambda: sk.hamming_loss(LABELS, MANY > 0.5)),
        ("auroc", lambda: sk.roc_auc_score(LABELS, MANY, average="macro")),
    ],
)
def test_metrics_of_several_labels(name, expected):
    value = evaluated(
        MANY,
        LABELS.float(),
        name,
        {"average": "macro"},
        task="multilabel",
        num_labels=CLASSES,
    )
    assert value == pytest.approx(expected(), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean_squared_error", lambda: sk.mean_squared_error(TARGETS, SCORES)),
        ("mean_absolute_error", lambda: sk.mean_absolute_error(TARGETS, SCORES)),
        ("r2_score", lambda: sk.r2_score(TARGETS, SCORES)),
        ("explained_variance", lambda: sk.explained_variance_score(TARGETS, SCORES)),
        ("pearson_corr_coef", lambda: np.corrcoef(TARGETS, SCORES)[0, 1]),
    ],
)
def test_metrics_of_regression(name, expected):
    assert evaluated(SCORES, TARGETS, name, {}) == pytest.approx(expected(), abs=1e-5)


def test_pixels_of_a_segmentation():
    logits = torch.randn(6, CLASSES, 5, 5, generator=generator)
    target = torch.randint(0, CLASSES, (6, 5, 5), generator=generator)
    value = evaluated(logits, target, "mean_io_u", {"num_classes": CLASSES, "per_class": True})
    pairs = zip(target, logits.argmax(1), strict=True)
    expected = [
        sk.jaccard_score(t.flatten(), p.flatten(), average=None, labels=range(CLASSES))
        for t, p in pairs
    ]
    np.testing.assert_allclose(value, np.mean(expected, axis=0), atol=1e-6)


def test_a_curve_with_thresholds_is_close_to_the_exact_one():
    exact = evaluated(SCORES, BINARY, "auroc", {}, task="binary")
    binned = evaluated(SCORES, BINARY, "auroc", {"thresholds": 500}, task="binary")
    assert binned == pytest.approx(exact, abs=5e-3)


def test_wrappers_build_the_metric_they_wrap():
    plugin = MetricsPlugin(
        metrics={
            "each": {"class": "ClasswiseWrapper", "metric": {"class": "recall", "average": "none"}},
            "range": {"class": "MinMaxMetric", "metric": "accuracy"},
        },
        **MULTICLASS,
    )
    trainer = Trainer(
        Same(), lambda output, target: output.sum() * 0, None, callbacks=(), plugins=[plugin]
    )
    values = trainer.evaluate(TensorDataset(LOGITS, CLASS))
    recall = sk.recall_score(CLASS, CHOSEN, average=None)
    found = [value for name, value in values.items() if "multiclassrecall" in name]
    np.testing.assert_allclose(found, recall, atol=1e-6)
    assert any(name.endswith("max") for name in values)


# -- Inputs of metrics ----------------------------------------------------------------------------


def fields(metric: dict[str, Any], *pairs: tuple[Any, dict[str, Any]], model=None) -> Any:
    from pa_metrics.factory import build_metric
    from pa_metrics.preds_and_target import inputs_for

    built = build_metric(metric.pop("class"), metric, {}, {}, set())
    function = inputs_for(built, model or Same())
    for batch, output in pairs:
        inputs = function(batch, output)
        built.update(**inputs) if isinstance(inputs, dict) else built.update(*inputs)
    return built.compute()


def test_queries_of_a_retrieval():
    indexes = torch.arange(SAMPLES) % 5
    value = fields({"class": "retrieval_map"}, ((None, BINARY, indexes), {"model_outputs": SCORES}))
    each = [
        sk.average_precision_score(BINARY[indexes == query], SCORES[indexes == query])
        for query in range(5)
    ]
    assert float(value) == pytest.approx(np.mean(each), abs=1e-6)


def test_boxes_of_a_detection():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    target = [{"boxes": boxes, "labels": torch.tensor([1])}]
    preds = [{**target[0], "scores": torch.tensor([0.9])}]
    value = fields({"class": "mean_average_precision"}, ((None, target), {"model_outputs": preds}))
    assert float(value["map"]) == 1


@pytest.mark.parametrize("shifts", [False, True])
def test_perplexity_equals_that_of_the_loss(shifts):
    logits = torch.randn(3, 7, 11, generator=generator)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    model = Same()
    if shifts:
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    value = fields(
        {"class": "perplexity"},
        ({"labels": labels}, {"model_outputs": {"logits": logits}}),
        model=model,
    )
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(value) == pytest.approx(float(loss.exp()), rel=1e-5)


def test_texts():
    batch = {"references": [["the cat sat on the mat"]]}
    output = {"model_outputs": None, "texts": ["the cat sat on the mat"]}
    assert float(fields({"class": "bleu_score"}, (batch, output))) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("retrieval_map", "indexes"), ("bleu_score", "'texts'"), ("perplexity", "of tokens")],
)
def test_missing_inputs_are_an_error_that_names_them(name, expected):
    batch, output = (None, BINARY), {"model_outputs": [] if name == "perplexity" else SCORES}
    with pytest.raises(TypeError, match=expected):
        fields({"class": name}, (batch, output))


def test_inputs_that_a_metric_refuses_are_described():
    with pytest.raises(ValueError, match="shape of `preds`") as raised:
        evaluated_tokens(["accuracy"], more={"logits": TOKEN_LOGITS[:, :5]}, model=nn.Linear)
    assert (
        "accuracy, updated with predictions of shape (3, 5, 5) and targets of shape (3, 7). If"
        in raised.value.__notes__[0]
    )


# -- Metrics of tokens ----------------------------------------------------------------------------


WORDS = 5
drawn = torch.Generator().manual_seed(5)
TOKEN_LOGITS = torch.randn(24, 7, WORDS, generator=drawn)
TOKEN_LABELS = torch.randint(0, WORDS, (24, 7), generator=drawn)
TOKEN_LABELS[:, 5:] = -100
TOKEN_LABELS[3] = -100
OF_WORDS = {"task": "multiclass", "num_classes": WORDS}


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


def evaluated_tokens(
    names: list[str] | dict[str, Any],
    labels: Tensor = TOKEN_LABELS,
    model: type[nn.Linear] = Causal,
    more: dict[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    plugin = MetricsPlugin(metrics=names, **{**OF_WORDS, "average": "micro"} | options)
    trainer = Words(model(1, 1), None, None, callbacks=(), plugins=[plugin])
    trainer.extra = extra or {}
    columns = {"logits": TOKEN_LOGITS, "labels": labels, **(more or {})}
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
NEXT = TOKEN_LOGITS[:, :-1], TOKEN_LABELS[:, 1:]
PLACES = torch.where(torch.rand(TOKEN_LABELS.shape, generator=drawn) < 0.2, -100, TOKEN_LABELS)


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (NEXT, {}),
        (NEXT, {"to_preds_and_target": "causal_language_model"}),
        (NEXT, {"to_preds_and_target": "causal_language_model", "model": nn.Linear}),
        ((TOKEN_LOGITS, TOKEN_LABELS), {"to_preds_and_target": "language_model"}),
        ((TOKEN_LOGITS, TOKEN_LABELS), {"model": nn.Linear}),
        ((TOKEN_LOGITS, TOKEN_LABELS), {"model": BartForCausalLM}),
        # What the loss does is better known where it is calculated.
        ((TOKEN_LOGITS, TOKEN_LABELS), {"extra": {"shifts_labels": False}}),
        (NEXT, {"extra": {"shifts_labels": True}, "model": nn.Linear}),
        ((TOKEN_LOGITS, PLACES), {"more": {"shift_labels": PLACES}}),
    ],
)
def test_token_metrics_are_those_of_the_labels_that_the_loss_counts(expected, options):
    found = evaluated_tokens(NAMES, **options)
    for name, value in by_hand(*expected).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_whether_a_custom_model_shifts_labels_is_asked_for():
    class Around(nn.Linear):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.part = Causal(1, 1)

    with pytest.raises(TypeError, match='has a Causal.*Set to_preds_and_target.*"language_model"'):
        evaluated_tokens(["accuracy"], model=Around)
    for name, pair in (
        ("language_model", (TOKEN_LOGITS, TOKEN_LABELS)),
        ("causal_language_model", NEXT),
    ):
        found = evaluated_tokens(["accuracy"], model=Around, to_preds_and_target=name)
        assert found["accuracy"] == pytest.approx(by_hand(*pair)["accuracy"])
    found = evaluated_tokens(["accuracy"], model=Around, extra={"shifts_labels": True})
    assert found["accuracy"] == pytest.approx(by_hand(*NEXT)["accuracy"])


def test_targets_in_a_tuple_belong_to_the_outputs_one_by_one():
    plugin = MetricsPlugin(metrics=["accuracy"], ignore_index=-100, average="micro", **OF_WORDS)
    trainer = Words(Causal(1, 1), None, None, callbacks=(), plugins=[plugin])
    found = trainer.evaluate(
        torch.utils.data.TensorDataset(TOKEN_LOGITS.movedim(-1, 1), TOKEN_LABELS)
    )
    assert found["accuracy"] == pytest.approx(by_hand(TOKEN_LOGITS, TOKEN_LABELS)["accuracy"])


def late() -> Tensor:
    """A label of -100 in the last batch only; metrics check the values of the first one."""
    labels = TOKEN_LABELS[:, 0].clamp(min=0)
    labels[-1] = -100
    return labels


@pytest.mark.parametrize(
    ("names", "labels", "options"),
    [
        (["accuracy"], TOKEN_LABELS[:, 3], {}),
        (["accuracy"], late(), {}),
        (["accuracy"], late(), {"ignore_index": 0}),
        (["accuracy"], TOKEN_LABELS, {"ignore_index": 0, "model": nn.Linear}),
        (
            {"accuracy": {"class": "mean_squared_error"}},
            TOKEN_LABELS,
            {"model": nn.Linear, "task": None, "num_classes": None, "average": None},
        ),
    ],
)
def test_labels_of_minus_100_that_a_metric_would_count_are_an_error(names, labels, options):
    more = {"logits": TOKEN_LOGITS[:, 0]} if labels.ndim == 1 else {"logits": TOKEN_LOGITS.clone()}
    if "mean_squared_error" in str(names):
        more = {"logits": TOKEN_LOGITS[..., 0].clone()}
    with pytest.raises(ValueError, match=r"these metrics count them: accuracy\. Set ignore_index"):
        evaluated_tokens(names, labels, more=more, **options)


def test_labels_of_minus_100_are_ignored_if_asked_for():
    found = evaluated_tokens(
        ["accuracy"], late(), more={"logits": TOKEN_LOGITS[:, 0]}, ignore_index=-100
    )
    right = TOKEN_LOGITS[:-1, 0].argmax(-1) == late()[:-1]
    assert found["accuracy"] == pytest.approx(right.float().mean().item())


# -- Plots ----------------------------------------------------------------------------------------


def test_matrices_curves_and_histories_are_plotted(tmp_path):
    plugin = MetricsPlugin(
        metrics=["accuracy", "confusion_matrix", "roc", "precision_recall_curve"],
        plots=tmp_path / "plots",
        **MULTICLASS,
    )
    model = nn.Linear(CLASSES, CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=[plugin])
    data = TensorDataset(LOGITS, CLASS)
    trainer.train(data, 2, eval_dataset=data, per_device_batch_size=16)
    files = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert files == [
        "accuracy.png",
        "confusion_matrix.png",
        "precision_recall_curve.png",
        "roc.png",
    ]
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_input_function_is_an_error_with_the_nearest_name():
    plugin = MetricsPlugin(to_preds_and_target="retreival", **MULTICLASS)
    with pytest.raises(ValueError, match="no 'retreival'.*'retrieval'"):
        Trainer(Same(), None, None, callbacks=(), plugins=[plugin])
