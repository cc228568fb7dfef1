"""Micro-batches without labelled items: they count for nothing, as in a loop over whole batches."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.callbacks import SaveTrainingStateCallback, TerminateOnNaNCallback
from pa_core.loop import no_items
from pa_core.loop.loss_items import is_sum, items_of_mean
from tests.helpers import largest_difference, tiny_data, tiny_model, weights_of

IGNORED = -100


def labelled(samples=16, unlabelled=(2, 3, 6, 7, 8, 9, 10, 11)):
    """Data whose samples of some numbers have no label; the third four have none at all."""
    x, y = tiny_data(samples).tensors
    y = y.clone()
    y[list(unlabelled)] = IGNORED
    return TensorDataset(x, y)


def of_torch(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, ignore_index=IGNORED)


def of_sums(outputs, targets):
    """The same mean; the gradient of 0 / 0 is NaN, even if nothing depends on it."""
    each = nn.functional.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none")
    return each.sum() / (targets != IGNORED).sum()


class Labelled(Trainer):
    """Counts the labelled samples."""

    count = int

    def calculate_train_batch_loss(self, batch):
        x, y = batch
        outputs, items = self.model(x), (y != IGNORED).sum()
        right = (outputs.argmax(1) == y).sum() / items  # NaN without labels
        return {
            "loss": self.loss_func(outputs, y),
            "model_outputs": outputs,
            "batch_size": len(x),
            "num_items_in_batch": self.count(items),
            "log": {"accuracy": right},
        }

    calculate_eval_batch_loss = calculate_train_batch_loss


class Recomputes(TrainerCallback):
    needs_recompute = True

    def __init__(self):
        self.losses = []

    @hookimpl
    def run_update(self, trainer):
        self.losses.append(trainer.recompute_gradients().item())
        trainer.clip_gradients()
        return trainer.apply_update()


class RecordsMeans(TrainerCallback):
    def on_train_step_end(self, trainer, batch, batch_output):
        items = (batch[1] != IGNORED).sum()
        trainer.record_mean("again", batch_output["log"]["accuracy"], items)


def train(loss_func, size, *callbacks, count=int, data=None, **options):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    trainer = Labelled(model, loss_func, optimizer, callbacks=callbacks, plugins=())
    trainer.count = count
    data = labelled() if data is None else data
    trainer.train(
        data,
        2,
        data,
        per_device_batch_size=size,
        gradient_accumulation_steps=4 // size,
        train_dataloader_kwargs={"shuffle": False},
        **options,
    )
    return trainer


def by_hand(data, epochs=2, clip=None):
    """Whole batches of 4 in plain PyTorch; returns the model and the recorded means."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    means = {"train_loss_epoch": [], "train_accuracy": [], "eval_loss_epoch": []}
    x, y = data.tensors
    for _ in range(epochs):
        total = right = 0.0
        for start in range(0, len(x), 4):
            rows = slice(start, start + 4)
            outputs, count = model(x[rows]), (y[rows] != IGNORED).sum().item()
            loss = nn.functional.cross_entropy(
                outputs, y[rows], ignore_index=IGNORED, reduction="sum"
            )
            total += loss.item()
            right += (outputs.argmax(1) == y[rows]).sum().item()
            optimizer.zero_grad()
            (loss / max(count, 1)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        count = (y != IGNORED).sum().item()
        means["train_loss_epoch"].append(total / count)
        means["train_accuracy"].append(right / count)
        with torch.no_grad():
            means["eval_loss_epoch"].append(of_torch(model(x), y).item())
    return model, means


def check(trainer, model, means):
    assert trainer.stop_reason is None
    assert (trainer.updates, trainer.position.skipped) == (8, 0)
    assert largest_difference(weights_of(trainer), model.state_dict()) < 1e-6
    for name, values in means.items():
        assert trainer.run_history.get_metric_values(name) == pytest.approx(values, abs=1e-6), name


@pytest.mark.parametrize("count", [int, torch.Tensor.clone], ids=["number", "tensor"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("loss_func", [of_torch, of_sums])
def test_the_numbers_are_those_of_whole_batches_by_hand(loss_func, size, count):
    trainer = train(loss_func, size, TerminateOnNaNCallback(), RecordsMeans(), count=count)
    check(trainer, *by_hand(labelled()))
    again, accuracy = map(trainer.run_history.get_metric_values, ("train_again", "train_accuracy"))
    assert again == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_a_count_that_is_not_read_gives_the_same_numbers(size, monkeypatch):
    """As on a GPU, where reading it would synchronise."""
    monkeypatch.setattr(no_items, "_has_items", lambda items: False)
    trainer = train(of_sums, size, Recomputes(), count=torch.Tensor.clone)
    check(trainer, *by_hand(labelled()))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_no_policy_skips_an_update_for_them(policy, tmp_path):
    states = SaveTrainingStateCallback(tmp_path, 1)
    trainer = train(of_sums, 2, TerminateOnNaNCallback(policy), states, gradient_clip_norm=0.5)
    check(trainer, *by_hand(labelled(), clip=0.5))


@pytest.mark.parametrize("size", [2, 4])
def test_recomputed_gradients_leave_them_out_too(size):
    recomputes = Recomputes()
    check(train(of_sums, size, recomputes), *by_hand(labelled()))
    assert all(map(math.isfinite, recomputes.losses))
    assert recomputes.losses[2] == 0  # the mean over an update without labels


@pytest.mark.parametrize("is_read", [True, False])
def test_a_sparse_gradient_of_them_is_left_out(is_read, monkeypatch):
    if not is_read:
        monkeypatch.setattr(no_items, "_has_items", lambda items: False)

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(5, 3, sparse=True)

        def forward(self, x):
            return self.embedding(x)

    x = torch.arange(8) % 5
    y = torch.tensor([0, 1, IGNORED, IGNORED, 2, 0, 1, IGNORED])
    model, whole = Bag(), Bag()
    trainer: Any = Labelled(
        model, of_sums, torch.optim.SGD(model.parameters(), lr=0.3), callbacks=(), plugins=()
    )
    trainer.count = int if is_read else torch.Tensor.clone
    trainer.train(
        TensorDataset(x, y),
        1,
        per_device_batch_size=2,
        gradient_accumulation_steps=4,
        train_dataloader_kwargs={"shuffle": False},
    )
    of_sums(whole(x), y).backward()
    expected = whole.embedding.weight - 0.3 * whole.embedding.weight.grad.to_dense()
    torch.testing.assert_close(model.embedding.weight, expected)


def test_a_nan_loss_of_labelled_items_still_stops_the_run():
    x, y = labelled().tensors
    x = x.clone()
    x[5] = math.nan
    trainer = train(of_torch, 2, TerminateOnNaNCallback(), data=TensorDataset(x, y))
    assert trainer.stop_reason == "Stopping: the training loss is NaN or infinite"
    assert (trainer.updates, trainer.position.skipped) == (1, 1)


def test_an_epoch_without_any_item_has_no_mean_and_says_so():
    data = labelled(8, range(8))
    with pytest.warns(UserWarning, match="^No ") as caught:
        trainer = train(of_torch, 2, TerminateOnNaNCallback(), data=data)
    text = "No {}: none of the batches had an item that counts, such as a labelled token"
    names = ["train_loss_epoch", "eval_loss_epoch"]
    assert [str(one.message) for one in caught] == [text.format(name) for name in names * 2]
    assert trainer.updates == 4
    assert largest_difference(weights_of(trainer), tiny_model().state_dict()) == 0
    assert not set(names) & set(trainer.run_history.get_metric_names())


# -- Losses whose mean isn't over samples ---------------------------------------------------------

WEIGHTS = torch.tensor([1.0, 5.0, 0.5])
CLASSIFICATION: dict[str, Any] = {
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "class weights, smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    "ignored label": nn.CrossEntropyLoss(ignore_index=2),
    "a function": partial(nn.functional.cross_entropy, weight=WEIGHTS, ignore_index=2),
    "the method of a module": nn.CrossEntropyLoss(weight=WEIGHTS).forward,
}


def classified(pixels: int | None):
    """Sixteen samples with a label each, or with one for each of `pixels`; the first four alike."""
    generator = torch.Generator().manual_seed(3)
    shape = (16,) if pixels is None else (16, pixels)
    labels = torch.randint(3, shape, generator=generator)
    labels[:4] = 1
    labels[12:] = 2 if pixels is None else IGNORED
    return TensorDataset(torch.randn(16, 4, generator=generator), labels)


class PerPixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 15)

    def forward(self, x):
        return self.layer(x).unflatten(1, (3, 5))


def per_sample():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("loss_func", "build", "pixels"),
    [(one, per_sample, None) for one in CLASSIFICATION.values()]
    + [(nn.CrossEntropyLoss(), PerPixel, 5), (nn.functional.cross_entropy, PerPixel, 5)],
    ids=[*CLASSIFICATION, "pixels", "pixels by a function"],
)
def test_a_classification_loss_counts_its_labels(loss_func, build, pixels):
    data = classified(pixels)
    x, y = data.tensors
    expected = build()
    whole = loss_func(expected(x), y)
    whole.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
        after = loss_func(expected(x), y).item()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, loss_func, optimizer, callbacks=(), plugins=())
    order = {"train_dataloader_kwargs": {"shuffle": False}}
    options = {"per_device_batch_size": 4, "gradient_accumulation_steps": 4, "eval_dataset": data}
    trainer.train(data, 1, **options, **order)
    assert largest_difference(weights_of(trainer), expected.state_dict()) < 1e-6
    history = trainer.run_history
    assert history.get_latest_metric("train_loss_epoch") == pytest.approx(whole.item(), abs=1e-6)
    assert history.get_latest_metric("eval_loss_epoch") == pytest.approx(after, abs=1e-6)


def test_other_losses_are_means_over_samples():
    class Mine(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            return super().forward(outputs, targets)

    labels, probabilities = torch.ones(4, 5, dtype=torch.long), torch.ones(4, 3)
    for loss_func in (Mine(), nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum"), of_torch):
        assert items_of_mean(loss_func, labels) is None
    assert items_of_mean(nn.CrossEntropyLoss(weight=WEIGHTS), probabilities) is None


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_samples_without_a_label_are_not_counted_by_default(accumulation):
    data = labelled()
    x, y = data.tensors
    expected = tiny_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    total = 0.0
    for start in range(0, 16, 4 * accumulation):
        rows = slice(start, start + 4 * accumulation)
        loss = nn.functional.cross_entropy(expected(x[rows]), y[rows])
        count = int((y[rows] != IGNORED).sum())
        if count:
            optimizer.zero_grad()
            loss.backward()
            total += loss.item() * count
        optimizer.step()  # without a label, the gradient is 0
        optimizer.zero_grad()
    model = tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[TerminateOnNaNCallback],
        plugins=(),
    )
    trainer.train(
        data,
        1,
        eval_dataset=data,
        per_device_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs={"shuffle": False},
    )
    assert largest_difference(weights_of(trainer), expected.state_dict()) < 1e-6
    latest = trainer.run_history.get_latest_metric
    assert latest("train_loss_epoch") == pytest.approx(total / int((y != IGNORED).sum()))
    after = nn.functional.cross_entropy(expected(x), y).item()
    assert latest("eval_loss_epoch") == pytest.approx(after, abs=1e-6)


def test_samples_without_a_label_on_several_processes_are_refused(monkeypatch):
    model, data = tiny_model(), labelled()
    trainer = Trainer(model, nn.CrossEntropyLoss(), None, callbacks=(), plugins=())
    monkeypatch.setattr(Trainer, "num_processes", 2)
    with pytest.raises(
        ValueError, match=r"8 of 16 samples .* nn\.CrossEntropyLoss\(ignore_index=-1\)"
    ):
        trainer.calculate_train_batch_loss(list(data.tensors))
    assert trainer.calculate_eval_batch_loss(list(data.tensors))["num_items_in_batch"] == 8
    complete = [tensor[:2] for tensor in data.tensors]
    assert "num_items_in_batch" not in trainer.calculate_train_batch_loss(complete)


def test_a_compiled_loss_counts_what_the_plain_one_counts():
    labels, functional = torch.tensor([0, 1, 2, 2]), nn.functional
    for loss_func in CLASSIFICATION.values():
        compiled: Any = torch.compile(loss_func, backend="eager")
        assert items_of_mean(compiled, labels) == items_of_mean(loss_func, labels) is not None
    compiled = torch.compile(functional.cross_entropy, backend="eager")
    assert items_of_mean(partial(compiled, ignore_index=2), labels) == 2


def test_sums_are_recognised():
    module, function = nn.MSELoss(reduction="sum"), nn.functional.mse_loss
    sums: list[Any] = [module, module.forward, partial(module), partial(function, reduction="sum")]
    for loss_func in sums:
        assert is_sum(loss_func)
        assert is_sum(torch.compile(loss_func, backend="eager"))
    for loss_func in (nn.MSELoss(), function, partial(function), of_torch):
        assert not is_sum(loss_func)


def test_a_sum_is_reported_and_refused_where_gradients_are_averaged(monkeypatch):
    model, data, loss_func = tiny_model(), tiny_data(8), nn.CrossEntropyLoss(reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, loss_func, optimizer, callbacks=(), plugins=())
    with pytest.warns(UserWarning, match="is a sum over the batch") as caught:
        trainer.train(data, 2, eval_dataset=data, per_device_batch_size=4)
    assert len(caught) == 1
    with pytest.raises(ValueError, match=r"averaged over micro-batches .* reduction=\"mean\""):
        trainer.train(data, 1, per_device_batch_size=4, gradient_accumulation_steps=2)
    trainer.run_config = None
    monkeypatch.setattr(Trainer, "num_processes", 2)
    with pytest.raises(ValueError, match="averaged over micro-batches and processes"):
        trainer.calculate_train_batch_loss(list(data.tensors))
