"""The parts of the metrics plugin: names, inputs, compute groups and the metrics of an epoch."""

import copy

import pytest
import torch
from torch import nn

from pa_core.checkpoint.codec import decode, encode
from pa_core.errors import SettingsError
from pa_metrics import MetricsPlugin, to_preds_and_target
from pa_metrics.compute_groups import find_compute_groups
from pa_metrics.epoch_metrics import EpochMetrics, to_plain
from pa_metrics.factory import find_metric, history_name


def collection():
    from torchmetrics import ClasswiseWrapper, MeanMetric, MetricCollection
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassAUROC,
        MulticlassJaccardIndex,
        MulticlassPrecision,
    )

    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(3),
            "auroc": MulticlassAUROC(3),  # keeps all predictions
            "precision": MulticlassPrecision(3),
            "overlap": ClasswiseWrapper(MulticlassJaccardIndex(3, average=None)),
            "mean": MeanMetric(),
        }
    )


def batches(count: int):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        target = torch.randint(3, (8,), generator=generator)
        preds = torch.rand(8, 3, generator=generator)
        yield {"preds": preds, "target": target, "value": preds[:, 0]}


@pytest.mark.parametrize("name", ["F1Score", "f1_score", "f1score", "torchmetrics.F1Score"])
def test_a_metric_is_found_by_any_form_of_its_name(name):
    import torchmetrics

    assert find_metric(name, {}) is torchmetrics.F1Score
    assert history_name(name) in ("f1_score", "f1score")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("binary_auroc", "torchmetrics.classification.BinaryAUROC"),
        ("perplexity", "torchmetrics.text.Perplexity"),
        ("RetrievalMAP", "torchmetrics.retrieval.RetrievalMAP"),
        ("mean_iou", "torchmetrics.segmentation.MeanIoU"),
        ("BLEUScore", "torchmetrics.text.BLEUScore"),
        ("mean_average_precision", "torchmetrics.detection.MeanAveragePrecision"),
    ],
)
def test_metrics_are_found_in_their_subpackage_not_as_deprecated_aliases(name, path):
    assert find_metric(name, {}) is find_metric(path, {})


def test_an_unknown_name_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown metric 'presicion'.*'precision'"):
        find_metric("presicion", {})


def epoch_metrics(metrics, **options):
    """Metrics whose batches are their inputs."""
    names = metrics.keys(keep_base=True)
    return EpochMetrics(metrics, dict.fromkeys(names, lambda batch, output: batch), **options)


def members(metrics):
    return [module for metric in metrics.metrics.values() for module in metric.modules()]


def test_metrics_with_equal_settings_form_a_compute_group():
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassAUROC,
        MulticlassAveragePrecision,
        MulticlassPrecision,
        MulticlassRecall,
    )
    from torchmetrics.detection import GeneralizedIntersectionOverUnion, IntersectionOverUnion

    found = find_compute_groups(
        {
            "accuracy": MulticlassAccuracy(3),
            "precision": MulticlassPrecision(3),
            "auroc": MulticlassAUROC(3, thresholds=5),
            "top2": MulticlassAccuracy(3, top_k=2),
            "area": MulticlassAveragePrecision(3, thresholds=5),
            "finer": MulticlassAveragePrecision(3, thresholds=torch.linspace(0, 1, 6)),
            "recall": MulticlassRecall(3),
            "overlap": IntersectionOverUnion(),
            "distance": GeneralizedIntersectionOverUnion(),  # the same code calls other code
        }
    )
    assert found == [
        ["accuracy", "precision", "recall"],
        ["auroc", "area"],
        ["top2"],
        ["finer"],
        ["overlap"],
        ["distance"],
    ]


@pytest.mark.parametrize("at", [0, 1, 3, 6])
@pytest.mark.parametrize("reused", [False, True])
def test_metrics_continue_from_their_state(at, reused):
    whole = epoch_metrics(collection())
    whole.reset()
    for batch in batches(6):
        whole.update(batch, {})

    first = epoch_metrics(collection())
    first.reset()
    for batch in list(batches(6))[:at]:
        first.update(batch, {})
    tensors: dict[str, torch.Tensor] = {}
    saved = encode(first.state_dict(), tensors, "metrics")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    rest = epoch_metrics(collection())
    rest.reset()
    if reused:  # metrics in a compute group share their state from the first update
        for batch in batches(2):
            rest.update(batch, {})
    rest.load_state_dict(decode(saved, tensors))
    for batch in list(batches(6))[at:]:
        rest.update(batch, {})
    values = [{k: to_plain(v) for k, v in m.compute().items()} for m in (rest, whole)]
    assert values[0] == values[1]
    assert not any(torch.is_tensor(value) for value in values[0].values())


def test_a_window_continues_from_its_state():
    from torchmetrics import MetricCollection, SumMetric
    from torchmetrics.wrappers import Running

    def window():
        metrics = epoch_metrics(MetricCollection({"last": Running(SumMetric(), window=3)}))
        metrics.reset()
        return metrics

    first, rest = window(), window()
    for value in (1.0, 2.0, 4.0, 8.0):
        first.update((value,), {})
    rest.load_state_dict(first.state_dict())
    rest.update((16.0,), {})
    assert rest.compute()["last"] == 4 + 8 + 16


def test_a_state_is_not_changed_by_later_batches():
    metrics = epoch_metrics(collection())
    metrics.reset()
    first, second = batches(2)
    metrics.update(first, {})
    state = metrics.state_dict()
    before = copy.deepcopy(state)
    metrics.update(second, {})
    assert str(state) == str(before)
    metrics.load_state_dict(state)
    metrics.update(second, {})
    assert str(state) == str(before)
    assert str(metrics.state_dict()) != str(before)


def test_a_state_of_other_metrics_is_an_error():
    from torchmetrics import MeanMetric, MetricCollection

    other = epoch_metrics(MetricCollection({"loss": MeanMetric()}))
    with pytest.raises(ValueError, match="not from loss"):
        other.load_state_dict(epoch_metrics(collection()).state_dict())


def test_values_are_validated_on_the_first_batch_of_an_epoch_only():
    metrics = epoch_metrics(collection(), check_once={"accuracy", "overlap"})
    checks = [m for m in members(metrics) if hasattr(m, "validate_args")]
    metrics.reset()
    assert all(metric.validate_args for metric in checks)
    for batch in batches(2):
        metrics.update(batch, {})
    still = {type(metric).__name__ for metric in checks if metric.validate_args}
    assert still == {"MulticlassAUROC", "MulticlassPrecision"}  # not in check_once
    metrics.reset()
    assert all(metric.validate_args for metric in checks)


def test_training_metrics_keep_no_graph():
    from torchmetrics import CatMetric, MetricCollection

    metric = CatMetric()
    metrics = epoch_metrics(MetricCollection({"kept": metric}))
    metrics.reset()
    metrics.update((nn.Linear(1, 1)(torch.ones(2, 1)),), {})
    assert not metric.value[0].requires_grad


class Output:
    """An object with `logits`, as transformers' models return."""

    def __init__(self, logits):
        self.logits = logits


def test_predictions_and_targets_are_found_in_usual_batches():
    logits, labels = torch.rand(4, 3), torch.arange(4)
    for batch, outputs in [
        ((None, labels), logits),
        ([None, labels, None], Output(logits)),
        ({"labels": labels}, {"logits": logits}),
        ({"label": labels}, Output(logits)),
        ({"target": labels}, logits),
    ]:
        preds, target = to_preds_and_target(batch, {"model_outputs": outputs})
        assert preds is logits
        assert target is labels


def test_shapes_are_converted_to_those_of_torchmetrics():
    def shape(preds, target, *, by_name: bool):
        batch = {"labels": target} if by_name else (None, target)
        found, _ = to_preds_and_target(batch, {"model_outputs": preds})
        return tuple(found.shape)

    one = torch.zeros(4, 1), torch.zeros(4)
    assert shape(*one, by_name=False) == (4,)
    tokens = torch.zeros(2, 5, 7), torch.zeros(2, 5)
    assert shape(*tokens, by_name=True) == (2, 7, 5)
    picture = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2)
    assert shape(*picture, by_name=False) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("batch", "outputs"),
    [
        (torch.zeros(3), torch.zeros(3)),
        ({"input_ids": torch.zeros(3)}, torch.zeros(3)),
        ((None, torch.zeros(3)), {"loss": torch.zeros(())}),
        ((None, [{"boxes": 1}]), torch.zeros(3)),
    ],
)
def test_the_error_for_unknown_data_names_the_setting(batch, outputs):
    with pytest.raises(TypeError, match="to_preds_and_target"):
        to_preds_and_target(batch, {"model_outputs": outputs})


def test_on_accepts_one_phase_or_both():
    assert MetricsPlugin(on="train").settings.on == ["train"]
    assert MetricsPlugin(on=["eval", "train"]).settings.on == ["eval", "train"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"on": "test"},
        {"task": "multi"},
        {"num_classes": 0},
        {"metrics": {"accuracy": {"class": 5}}},
        {"metric": ["accuracy"]},
    ],
)
def test_wrong_settings_are_an_error(wrong):
    with pytest.raises(SettingsError):
        MetricsPlugin(**wrong)


def test_a_loss_method_without_outputs_is_named():
    message = (
        "Metrics need the model's outputs, .* without 'model_outputs'; it has loss, batch_size"
    )
    with pytest.raises(TypeError, match=message):
        to_preds_and_target((None, torch.zeros(2)), {"loss": torch.tensor(0.0), "batch_size": 2})
