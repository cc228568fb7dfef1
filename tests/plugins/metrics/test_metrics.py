"""Metrics in whole runs: their values against scikit-learn, and the records in the run history."""

from pathlib import Path

import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset
from torchmetrics import Metric

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.errors import SettingsError
from pa_metrics import MetricsPlugin

CLASSES = 3


def data(samples: int = 50, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    noise = torch.randn(samples, CLASSES, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + noise).argmax(1))


def trainer_with(*plugins, settings: Path | None = None, callbacks=(), **options) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)
    return Trainer(
        model,
        options.get("loss_func", nn.CrossEntropyLoss()),
        SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
        plugins=None if settings is not None else plugins,
        settings=settings,
    )


def write(folder: Path, text: str) -> Path:
    file = folder / "pyproject.toml"
    file.write_text('[tool.pa-core]\nplugins = ["metrics"]\n' + text)
    return file


class Outputs(TrainerCallback):
    """Keeps the predictions and targets of training."""

    def __init__(self):
        self.preds, self.target = [], []

    def on_train_step_end(self, trainer, *, batch, batch_output, **kwargs):
        self.preds += batch_output["model_outputs"].argmax(1).tolist()
        self.target += batch[1].tolist()


def test_metrics_of_the_settings_equal_those_of_scikit_learn(tmp_path):
    settings = write(
        tmp_path,
        """
        [tool.pa-core.metrics]
        task = "multiclass"
        num_classes = 3
        on = ["eval", "train"]
        [tool.pa-core.metrics.metrics]
        accuracy = {}
        precision = { average = "macro" }
        recall = { average = "macro" }
        top2 = { class = "Accuracy", top_k = 2 }
        kappa = "CohenKappa"
        confusion = "confusion_matrix"
        """,
    )
    outputs = Outputs()
    trainer = trainer_with(settings=settings, callbacks=[outputs])
    held_out = data(43, seed=1)
    trainer.train(data(), num_epochs=2, eval_dataset=held_out, per_device_batch_size=8)

    def expected(target, preds) -> dict[str, float]:
        average = {"average": "macro", "zero_division": 0}
        return {
            "accuracy": sklearn_metrics.accuracy_score(target, preds),
            "precision": sklearn_metrics.precision_score(target, preds, **average),
            "recall": sklearn_metrics.recall_score(target, preds, **average),
            "kappa": sklearn_metrics.cohen_kappa_score(target, preds),
        }

    history = trainer.run_history
    scores = trainer.predict(held_out)
    target = held_out.tensors[1]
    wanted = expected(target, scores.argmax(1)) | {
        "top2": sklearn_metrics.top_k_accuracy_score(target, scores, k=2)
    }
    assert {name: history.get_latest_metric(name) for name in wanted} == pytest.approx(wanted)
    confusion = sklearn_metrics.confusion_matrix(target, scores.argmax(1))
    assert history.get_latest_metric("confusion") == confusion.tolist()

    wanted = expected(outputs.target[50:], outputs.preds[50:])
    found = {name: history.get_latest_metric(f"train_{name}") for name in wanted}
    assert found == pytest.approx(wanted)
    assert len(list(history.get_metric_values("accuracy"))) == 2


def test_evaluate_returns_the_metrics():
    trainer = trainer_with(MetricsPlugin(task="multiclass", num_classes=CLASSES))
    held_out = data()
    results = trainer.evaluate(held_out, per_device_batch_size=7)
    preds = trainer.predict(held_out).argmax(1)
    assert results["accuracy"] == pytest.approx((preds == held_out.tensors[1]).double().mean())
    assert set(results) == {"accuracy", "evaluation_loss"}


def test_each_evaluation_set_has_its_own_values():
    trainer = trainer_with(MetricsPlugin(task="multiclass", num_classes=CLASSES))
    sets = {"near": data(30, seed=2), "far": data(20, seed=3)}
    trainer.train(data(), num_epochs=1, eval_dataset=sets, per_device_batch_size=8)
    for name, dataset in sets.items():
        preds = trainer.predict(dataset).argmax(1)
        right = (preds == dataset.tensors[1]).double().mean().item()
        assert trainer.run_history.get_latest_metric(f"{name}_accuracy") == pytest.approx(right)


class Extremes(Metric):
    """The mean of the predictions, and its extremes over all epochs: torchmetrics resets states."""

    def __init__(self):
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")
        self.values: list[float] = []

    def update(self, preds, target):
        self.total += preds.mean(1).sum()
        self.count += len(preds)

    def compute(self):
        self.values.append(float(self.total / self.count))
        return torch.tensor([self.values[-1], min(self.values), max(self.values)])


def test_what_a_metric_keeps_over_epochs_belongs_to_one_evaluation_and_is_resumed(tmp_path):
    from torchmetrics import MinMaxMetric
    from torchmetrics.classification import MulticlassAccuracy

    def train(epochs, **options):
        metrics = {"mine": Extremes(), "range": MinMaxMetric(MulticlassAccuracy(CLASSES))}
        trainer = trainer_with(MetricsPlugin.of(metrics, on=["train", "eval"]))
        sets = {"near": data(30, seed=2), "far": data(20, seed=3)}
        trainer.train(data(), epochs, eval_dataset=sets, per_device_batch_size=8, **options)
        return trainer

    whole = train(4)
    for name in ("near_", "far_", "train_"):
        recorded = list(whole.run_history.get_metric_values(f"{name}mine"))
        means = [mean for mean, _, _ in recorded]
        for epoch, (_, least, most) in enumerate(recorded, 1):
            assert least == min(means[:epoch])
            assert most == max(means[:epoch])
        raw = list(whole.run_history.get_metric_values(f"{name}raw"))
        assert whole.run_history.get_latest_metric(f"{name}max") == max(raw)

    train(2).save_training_state(tmp_path / "state")
    resumed = train(4, resume_from=tmp_path / "state").run_history
    for name in whole.run_history.get_metric_names():
        values = list(whole.run_history.get_metric_values(name))
        assert list(resumed.get_metric_values(name)) == values, name


def test_plugins_with_trylast_see_the_values_whatever_the_order():
    seen = []

    class Saver:
        @hookimpl(trylast=True)
        def on_eval_epoch_end(self, trainer):
            seen.append(trainer.run_history.get_latest_metric("accuracy"))

    plugin = MetricsPlugin(task="multiclass", num_classes=CLASSES)
    trainer = trainer_with(plugin, callbacks=[Saver()])
    trainer.train(data(), num_epochs=2, eval_dataset=data(), per_device_batch_size=8)
    assert seen == list(trainer.run_history.get_metric_values("accuracy"))


def test_all_mistakes_are_reported_together_when_the_trainer_is_built():
    names = ["acuracy", "f1_score", "no.such.metric", "recal"]
    plugin = MetricsPlugin(
        metrics=names, task="multiclass", num_classes=CLASSES, to_preds_and_target="no.such.inputs"
    )
    with pytest.raises(SettingsError) as error:
        trainer_with(plugin)
    text = str(error.value)
    assert "'accuracy'" in text
    assert "'recall'" in text
    assert "no.such.metric" in text
    assert "to_preds_and_target: can't import 'no.such.inputs'" in text
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'accuracy': missing arguments: task: binary, multiclass or multilabel"),
        ({"task": "multiclass"}, "'accuracy': .*num_classes"),
        (
            {"task": "multiclass", "num_classes": 3, "metrics": {"accuracy": {"clas": 1}}},
            "'accuracy': .*clas",
        ),
        ({"metrics": ["r2_score"], "top_k": 2}, "top_k: none of the metrics r2_score accepts it"),
    ],
)
def test_a_missing_or_wrong_argument_is_an_error_that_names_it(options, message):
    with pytest.raises(SettingsError, match=message):
        trainer_with(MetricsPlugin(**options))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, CLASSES), nn.Linear(4, 2)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


class TwoHeads(Trainer):
    def calculate_train_batch_loss(self, batch):
        outputs = self.model(batch[0])
        loss = sum(
            nn.functional.cross_entropy(
                outputs[head], inputs_of(head)(batch, {"model_outputs": outputs})[1]
            )
            for head in "ab"
        )
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(batch[0])}

    calculate_eval_batch_loss = calculate_train_batch_loss


def inputs_of(head: str):
    classes = {"a": CLASSES, "b": 2}[head]
    return lambda batch, output: (output["model_outputs"][head], batch[1] % classes)


input_of_a, input_of_b = inputs_of("a"), inputs_of("b")


def test_instances_record_under_their_own_names(tmp_path):
    text = '[tool.pa-core]\nplugins = ["metrics:a", "metrics:b"]\n'
    for head, classes in (("a", CLASSES), ("b", 2)):
        text += (
            f'[tool.pa-core."metrics:{head}"]\nmetrics = ["accuracy", "confusion_matrix"]\n'
            f'on = ["eval", "train"]\ntask = "multiclass"\nnum_classes = {classes}\n'
            f'to_preds_and_target = "{__name__}.input_of_{head}"\nplots = "{tmp_path}"\n'
        )
    file = tmp_path / "pyproject.toml"
    file.write_text(text)
    torch.manual_seed(0)
    model = Heads()
    trainer = TwoHeads(model, None, SGD(model.parameters(), lr=0.1), callbacks=(), settings=file)
    trainer.train(data(), 2, eval_dataset=data())
    x, y = data().tensors
    outputs = model(x)
    for head, classes in (("a", CLASSES), ("b", 2)):
        right = sklearn_metrics.accuracy_score(y % classes, outputs[head].argmax(1))
        values = trainer.run_history.get_metric_values(f"{head}_accuracy")
        assert (len(values), values[-1]) == (2, pytest.approx(right))
        assert len(trainer.run_history.get_metric_values(f"train_{head}_accuracy")) == 2
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        f"{part}{head}_{name}"
        for part in ("", "train_")
        for head in "ab"
        for name in ("accuracy", "confusion_matrix")
    }


def test_two_plugins_with_one_metric_are_refused_before_the_first_batch():
    class Data(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("a batch was drawn")

    plugins = [MetricsPlugin(task="multiclass", num_classes=CLASSES) for _ in "ab"]
    wrong = Data(*data().tensors)
    with pytest.raises(ValueError, match="'accuracy' is recorded by .*'MetricsPlugin:2'"):
        trainer_with(*plugins).train(wrong, 1, eval_dataset=wrong)


def test_an_aggregation_needs_the_values_that_it_aggregates():
    with pytest.raises(SettingsError, match=r"'mean' aggregates values.*record_mean"):
        trainer_with(MetricsPlugin(metrics={"mean": {"class": "MeanMetric"}}))
    plugin = MetricsPlugin(
        metrics={"mean": {"class": "MeanMetric"}},
        to_preds_and_target=lambda batch, output: output["model_outputs"],
    )
    trainer = trainer_with(plugin)
    found = trainer.evaluate(data(6), per_device_batch_size=2)["mean"]  # one tensor is one argument
    assert found == pytest.approx(trainer.predict(data(6)).mean().item())


def test_a_plugin_that_is_added_later_builds_its_metrics_when_a_run_starts():
    trainer = trainer_with()
    trainer.plugins.register(MetricsPlugin())
    with pytest.raises(SettingsError, match="'accuracy': missing arguments: task"):
        trainer.evaluate(data())


@pytest.mark.parametrize(
    "to_preds_and_target",
    [None, lambda batch, output: (output["model_outputs"].argmax(1), batch[1])],
    ids=["scores", "classes"],
)
def test_too_few_classes_are_an_error_on_the_first_batch(to_preds_and_target):
    plugin = MetricsPlugin(
        task="multiclass", num_classes=CLASSES - 1, to_preds_and_target=to_preds_and_target
    )
    with pytest.raises((RuntimeError, ValueError), match=r"number of classes|more unique values"):
        trainer_with(plugin).evaluate(data())


def test_metric_objects_are_recorded_under_their_names():
    from torchmetrics import MeanMetric, MetricCollection
    from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

    collection = MetricCollection({"macro_f1": MulticlassF1Score(CLASSES), "last": MeanMetric()})
    trainer = trainer_with(
        MetricsPlugin.of(MulticlassAUROC(CLASSES)),
        MetricsPlugin.of(
            collection,
            to_preds_and_target=lambda batch, output: {
                "preds": output["model_outputs"],
                "target": batch[1],
                "value": batch[1],
            },
        ),
    )
    held_out = data()
    results = trainer.evaluate(held_out)
    scores, target = trainer.predict(held_out), held_out.tensors[1]
    area = sklearn_metrics.roc_auc_score(target, scores.softmax(1), multi_class="ovr")
    f1 = sklearn_metrics.f1_score(target, scores.argmax(1), average="macro")
    assert results["multiclass_auroc"] == pytest.approx(area)
    assert results["macro_f1"] == pytest.approx(f1)
    assert results["last"] == pytest.approx(target.double().mean().item())


def test_a_metric_registered_by_another_plugin_is_found_by_name():
    from torchmetrics import MeanMetric

    class Registers:
        @hookimpl
        def register_metrics(self):
            return {"mean_target": MeanMetric}

    plugin = MetricsPlugin(
        metrics=["mean_target"], to_preds_and_target=lambda batch, output: (batch[1],)
    )
    held_out = data()
    results = trainer_with(Registers(), plugin).evaluate(held_out)
    assert results["mean_target"] == pytest.approx(held_out.tensors[1].double().mean().item())


def test_the_settings_accept_the_dotted_path_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "regression_inputs.py").write_text(
        "def first_output(batch, batch_output):\n"
        "    return batch_output['model_outputs'][:, 0], batch[1].float()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = write(
        tmp_path,
        """
        [tool.pa-core.metrics]
        metrics = ["MeanSquaredError", "r2_score"]
        to_preds_and_target = "regression_inputs.first_output"
        """,
    )
    trainer, held_out = trainer_with(settings=settings), data()
    results = trainer.evaluate(held_out)
    target, preds = held_out.tensors[1], trainer.predict(held_out)[:, 0]
    assert results["mean_squared_error"] == pytest.approx(
        sklearn_metrics.mean_squared_error(target, preds)
    )
    assert results["r2_score"] == pytest.approx(sklearn_metrics.r2_score(target, preds), abs=1e-5)


def test_a_run_resumed_within_an_epoch_has_the_metrics_of_the_whole_epoch(tmp_path):
    class SaveAt(TrainerCallback):
        def on_train_step_end(self, trainer, *, step, **kwargs):
            if step == 2 and trainer.run_history.current_epoch == 2:
                trainer.control.save(tmp_path / "state")

    def build(*callbacks) -> Trainer:
        plugin = MetricsPlugin(
            metrics=["accuracy", "auroc", "recall"],
            on=["train"],
            task="multiclass",
            num_classes=CLASSES,
        )
        return trainer_with(plugin, callbacks=callbacks)

    whole = build(SaveAt())
    whole.train(data(), num_epochs=2, per_device_batch_size=8)
    resumed = build()
    resumed.train(data(), num_epochs=2, per_device_batch_size=8, resume_from=tmp_path / "state")
    for name in ("train_accuracy", "train_auroc", "train_recall"):
        values = list(whole.run_history.get_metric_values(name))
        assert len(values) == 2
        assert list(resumed.run_history.get_metric_values(name)) == values


def test_metrics_of_training_and_of_evaluation_do_not_mix():
    class Halfway(TrainerCallback):
        def on_train_step_end(self, trainer, *, step, **kwargs):
            if step == 2:
                trainer.control.evaluate()

    def train(*callbacks) -> Trainer:
        plugin = MetricsPlugin(on=["train", "eval"], task="multiclass", num_classes=CLASSES)
        trainer = trainer_with(plugin, callbacks=callbacks)
        trainer.train(data(), num_epochs=1, eval_dataset=data(seed=5), per_device_batch_size=8)
        return trainer

    with_evaluation, without = train(Halfway()).run_history, train().run_history
    assert len(list(with_evaluation.get_metric_values("accuracy"))) == 2
    for name in ("accuracy", "train_accuracy"):
        assert with_evaluation.get_latest_metric(name) == without.get_latest_metric(name)


def test_a_failed_evaluation_does_not_affect_the_next():
    class Breaks(TensorDataset):
        def __getitem__(self, index):
            if index == 20:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

        __getitems__ = None

    trainer = trainer_with(MetricsPlugin(task="multiclass", num_classes=CLASSES))
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.evaluate(Breaks(*data(seed=6).tensors))
    after = trainer.evaluate(data())["accuracy"]
    fresh = trainer_with(MetricsPlugin(task="multiclass", num_classes=CLASSES))
    assert after == fresh.evaluate(data())["accuracy"]


def test_predictions_are_freed_once_the_values_are_recorded():
    plugin = MetricsPlugin(metrics=["auroc"], on=["train"], task="multiclass", num_classes=CLASSES)
    trainer_with(plugin).train(data(), num_epochs=1)
    assert plugin.state_dict() == {
        "process": 0,
        "train": {"auroc": {"updates": 0, "state": {"preds": [], "target": []}}},
    }
