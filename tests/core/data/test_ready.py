"""Data whose items are ready batches are not batched a second time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pa_core import Trainer
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.data.ready import is_loader
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

SIZES = (5, 7, 4, 6, 3)
BATCHES = [tiny_data(25)[sum(SIZES[:i]) : sum(SIZES[: i + 1])] for i in range(len(SIZES))]


class Ready(IterableDataset):
    """Yields batches of different sizes, without a length."""

    def __iter__(self):
        return iter([list(batch) for batch in BATCHES])


class SizedReady(Ready):
    def __len__(self):
        return len(BATCHES)


class Stage:
    """A stage of a pipeline, as WebDataset makes it of a function."""

    def __init__(self, f):
        self.f = f


def _batched(source):
    return source


def _unbatched(source):
    return ([x, y] for xs, ys in source for x, y in zip(xs, ys, strict=True))


def _shuffle(source):
    return source


class Pipeline(IterableDataset):
    """An iterable dataset of stages, the first of which is iterated, as WebDataset's is."""

    def __init__(self, *stages):
        self.pipeline = [stages[0], *map(Stage, stages[1:])]

    def __iter__(self):
        items = iter(self.pipeline[0])
        for stage in self.pipeline[1:]:
            items = stage.f(items)
        return iter(items)


class WebLoader(Pipeline):
    def __init__(self, *stages):
        super().__init__(DataLoader(Ready(), batch_size=None), *stages)


class StreamLoader(Ready):
    """A loader by its name."""


class LoaderAndDataset(DataLoader, IterableDataset):
    """A loader by its class."""


class Holder(IterableDataset):
    """Holds a loader, and may yield anything."""

    def __init__(self, flat=False):
        self.inner, self.flat = DataLoader(Ready(), batch_size=None), flat

    def __iter__(self):
        return _unbatched(self.inner) if self.flat else iter(self.inner)


NONE = {"batch_size": None}
READY = [
    pytest.param(Ready, NONE, id="batch_size=None"),
    pytest.param(SizedReady, NONE, id="batch_size=None with a length"),
    pytest.param(Ready, NONE | {"num_workers": 1}, id="batch_size=None and a worker"),
    pytest.param(WebLoader, {}, id="WebLoader"),
    pytest.param(lambda: WebLoader(_shuffle), NONE, id="WebLoader and batch_size=None"),
    pytest.param(lambda: Pipeline(Ready(), _batched), {}, id="batched pipeline"),
    pytest.param(lambda: WebLoader(_unbatched, _rebatch), {}, id="unbatched and batched"),
    pytest.param(StreamLoader, {}, id="named Loader"),
    pytest.param(lambda: LoaderAndDataset(Ready(), batch_size=None), {}, id="DataLoader"),
    pytest.param(Holder, NONE, id="holder"),
]


def _rebatch(source):
    samples = iter(source)
    for size in SIZES:
        xs, ys = zip(*(next(samples) for _ in range(size)), strict=True)
        yield [torch.stack(xs), torch.stack(ys)]


_rebatch.__name__ = "_batched"


def new_trainer(*callbacks):
    model = tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), 0.1),
        callbacks=callbacks,
        plugins=(),
    )


def by_hand(accumulation):
    """The loop in plain PyTorch: each gradient is the mean over the accumulated samples."""
    model = tiny_model()
    optimizer, loss = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    for _ in range(2):
        for start in range(0, len(BATCHES), accumulation):
            group = BATCHES[start : start + accumulation]
            optimizer.zero_grad()
            loss(
                model(torch.cat([x for x, _ in group])), torch.cat([y for _, y in group])
            ).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize(("make", "kwargs"), READY)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_item_is_one_batch(make, kwargs, accumulation):
    trainer, right = new_trainer(), by_hand(accumulation)
    trainer.train(
        make(), 2, eval_dataset=make(), gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs=kwargs, eval_dataloader_kwargs=kwargs,
    )  # fmt: skip
    for name, value in right.state_dict().items():
        torch.testing.assert_close(weights_of(trainer)[name], value, atol=1e-6, rtol=0)
    assert trainer.updates == 2 * -(-len(BATCHES) // accumulation)
    assert trainer.position.samples == 2 * sum(SIZES)
    x, y = tiny_data(25).tensors
    loss = nn.functional.cross_entropy(right(x), y).item()
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == pytest.approx(loss, abs=1e-6)
    predictions = trainer.predict(make(), dataloader_kwargs=kwargs)
    torch.testing.assert_close(predictions, right(x).detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("data", "planned"),
    [(SizedReady(), 6), (LoaderAndDataset(SizedReady(), None), 6), (Ready(), None)],
)
def test_the_length_counts_batches(data, planned):
    trainer = new_trainer()
    trainer.train(
        data, 2, gradient_accumulation_steps=2, per_device_batch_size=2,
        train_dataloader_kwargs=NONE,
    )  # fmt: skip
    assert trainer.num_updates == planned
    assert trainer.updates == 6


@pytest.mark.parametrize(("data", "kwargs"), [(Ready, NONE), (WebLoader, {})])
def test_a_run_resumes_within_an_epoch(data, kwargs, tmp_path):
    whole = new_trainer()
    whole.train(data(), 2, train_dataloader_kwargs=kwargs)
    states = SaveTrainingStateCallback(tmp_path, save_every_n_steps=7, save_at_end=False)
    new_trainer(states).train(data(), 2, train_dataloader_kwargs=kwargs)
    resumed = new_trainer(SaveTrainingStateCallback(tmp_path / "more", save_every_n_steps=7))
    resumed.train(data(), 2, train_dataloader_kwargs=kwargs, resume_from=tmp_path)
    assert_identical(weights_of(resumed), weights_of(whole))


def test_a_pipeline_that_unbatches_yields_samples():
    trainer = new_trainer()
    trainer.train(WebLoader(_unbatched), 1, per_device_batch_size=10)
    assert trainer.updates == 3


def test_a_dataset_that_holds_a_loader_must_be_explained():
    with pytest.raises(
        ValueError, match=r"Holder .* holds a DataLoader \(inner\).*batch_size=None"
    ):
        new_trainer().train(Holder(), 1)
    trainer = new_trainer()
    trainer.train(Holder(flat=True), 1, train_dataloader_kwargs={"batch_size": 10})
    assert trainer.updates == 3


def test_a_map_dataset_makes_batches_of_samples():
    class Items(Dataset):
        def __len__(self):
            return len(BATCHES)

        def __getitem__(self, index):
            return list(BATCHES[index])

    assert not is_loader(Items())
    with pytest.raises(ValueError, match="pass a DataLoader with batch_size=None"):
        new_trainer().train(Items(), 1, train_dataloader_kwargs=NONE)
    trainer = new_trainer()
    trainer.train(DataLoader(Items(), batch_size=None), 2)
    for name, value in by_hand(1).state_dict().items():
        torch.testing.assert_close(weights_of(trainer)[name], value, atol=1e-6, rtol=0)
