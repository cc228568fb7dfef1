"""Schedulers follow a run whose length changes, or the run says that they don't."""

from __future__ import annotations

import math
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from pa_core import Trainer, TrainerCallback, TrainerPlaceholderValues, hookimpl
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.checkpoint.restore import TrainingState
from pa_core.durations import Every
from pa_core.errors import TrainingStateError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

UPDATES, EPOCHS = TrainerPlaceholderValues.NUM_UPDATES, TrainerPlaceholderValues.NUM_EPOCHS
PER_EPOCH = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
PEAK, DATA = 0.1, tiny_data(32)


class Recorder(TrainerCallback):
    """Records the learning rate of each update, and the samples of the run."""

    def __init__(self):
        self.rates, self.samples = [], 0

    def on_optimizer_step_start(self, trainer):
        self.rates.append(float(trainer.optimizer.param_groups[0]["lr"]))

    def on_train_step_end(self, batch):
        self.samples += len(batch[0])


def run(create, epochs, *plugins, data=DATA, batch=4, accumulation=1, save=None, **options):
    """Train; there are 8 updates in an epoch unless batch or accumulation say otherwise."""
    recorder, model = Recorder(), tiny_model()
    saver = SaveTrainingStateCallback(save or "unused", save and 1, save_at_end=False)
    callbacks = [recorder, *plugins, saver]
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.9),
        callbacks=callbacks,
        plugins=(),
    )
    said = []
    trainer.print = lambda *parts, **_: said.append(" ".join(map(str, parts)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(
            data,
            epochs,
            per_device_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            create_scheduler_fn=create,
            **options,
        )
    texts = [str(one.message) for one in caught]
    return SimpleNamespace(
        trainer=trainer,
        rates=recorder.rates,
        samples=recorder.samples,
        printed=[text for text in said if "The run now has" in text],
        warned=[text for text in texts if "The run now has" in text],
        differences=[text for text in texts if "was saved by a run that differs" in text],
        epochs=len(list(trainer.run_history.get_metric_values("train_loss_epoch"))),
    )


# -- Schedulers, and their values, calculated independently ---------------------------------------


def line(optimizer, total):
    return lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / total)


def long_warmup(optimizer, total):
    return lr_scheduler.LambdaLR(optimizer, lambda n: warmup_then_linear(n, total) / PEAK)


class Line:
    """A function with its length among its attributes, which are part of the state."""

    def __init__(self, total):
        self.total = total

    def __call__(self, update):
        return 1 - update / self.total


def line_of_object(optimizer, total):
    return lr_scheduler.LambdaLR(optimizer, Line(total))


def warmed_up(optimizer, total, warmup):
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.5, total_iters=warmup),
        lr_scheduler.CosineAnnealingLR(optimizer, total - warmup),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [warmup])


class Own:
    """A scheduler that isn't one of PyTorch."""

    def __init__(self, optimizer, total):
        self.optimizer, self.total, self.updates = optimizer, total, 0

    def step(self):
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK * (1 - self.updates / self.total)

    def state_dict(self):
        return {"total": self.total, "updates": self.updates}

    def load_state_dict(self, state):
        vars(self).update(state)


def linear(n, total):
    return PEAK * (1 - n / total)


def cosine(n, total):
    return PEAK * (1 + math.cos(math.pi * n / total)) / 2


def one_cycle(n, total):
    """A cosine up to the peak in 30 % of the run, then one down."""
    top, end = 0.3 * total - 1, total - 1
    start, last = PEAK / 25, PEAK / 25e4
    low, high, x = (start, PEAK, n / top) if n <= top else (PEAK, last, (n - top) / (end - top))
    return high + (low - high) * (1 + math.cos(math.pi * x)) / 2


def warmup_then_cosine(n, total):
    if n < 2:
        return PEAK * (0.5 + 0.25 * n)
    return cosine(n - 2, total - 2)


def warmup_then_linear(n, total):
    """The same for any length up to update 10."""
    return PEAK * n / 10 if n < 10 else PEAK * (total - n) / (total - 10)


FOLLOWING = {
    "LambdaLR": (partial(line, total=UPDATES), linear),
    "LambdaLR of an object": (partial(line_of_object, total=UPDATES), linear),
    "PolynomialLR": (partial(lr_scheduler.PolynomialLR, total_iters=UPDATES), linear),
    "CosineAnnealingLR": (partial(lr_scheduler.CosineAnnealingLR, T_max=UPDATES), cosine),
    "OneCycleLR": (partial(lr_scheduler.OneCycleLR, max_lr=PEAK, total_steps=UPDATES), one_cycle),
    "OneCycleLR, product": (
        partial(lr_scheduler.OneCycleLR, max_lr=PEAK, total_steps=EPOCHS * PER_EPOCH),
        one_cycle,
    ),
    "OneCycleLR, epochs": (
        partial(lr_scheduler.OneCycleLR, max_lr=PEAK, epochs=EPOCHS, steps_per_epoch=PER_EPOCH),
        one_cycle,
    ),
    "SequentialLR": (partial(warmed_up, total=UPDATES, warmup=2), warmup_then_cosine),
    "warm-up of a fixed length": (partial(long_warmup, total=UPDATES), warmup_then_linear),
    "own": (partial(Own, total=UPDATES), linear),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_resumed_run_has_the_learning_rates_of_a_run_of_its_length(name):
    create, value = FOLLOWING[name]
    run(create, 2, save="saved")
    for state, epochs, batch, accumulation, first, total in (
        ("saved/epoch_0001", 2, 4, 1, 8, 16),  # the same
        ("saved/epoch_0001", 4, 4, 1, 8, 32),  # more epochs
        ("saved/epoch_0002", 3, 4, 1, 16, 24),  # after the end
        ("saved/epoch_0001", 2, 8, 1, 8, 12),  # another batch
        ("saved/epoch_0001", 2, 2, 1, 8, 24),
        ("saved/epoch_0001", 3, 4, 2, 8, 16),  # and accumulation
    ):
        resumed = run(create, epochs, batch=batch, accumulation=accumulation, resume_from=state)
        assert resumed.rates == pytest.approx([value(n, total) for n in range(first, total)])
        assert min(resumed.rates) > 0
        assert (resumed.epochs, resumed.trainer.updates) == (epochs, total)
        assert resumed.trainer.progress.fraction == 1
        assert resumed.warned == []
        if total == 16 and epochs == 2:
            assert resumed.printed == []
        else:
            told = f"The run now has {total} updates instead of 16. The scheduler ("
            assert (resumed.printed and resumed.printed[0].startswith(told)) or total == 16


def test_fewer_epochs_end_the_schedule_earlier_and_nothing_is_used_once_they_are_over():
    create = partial(line, total=UPDATES)
    run(create, 4, save="saved")
    fewer = run(create, 3, resume_from="saved/epoch_0002")
    assert fewer.rates == pytest.approx([linear(n, 24) for n in range(16, 24)])
    assert fewer.trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0)
    assert run(create, 1, resume_from="saved/epoch_0002").rates == []


@pytest.mark.parametrize(
    ("length", "total"), [("20 updates", 20), ("80 samples", 8 + 6), ("2.5 epochs", 8 + 6)]
)
def test_lengths_in_any_unit_are_counted_with_the_new_batch(length, total):
    create = partial(line, total=UPDATES)
    run(create, length, save="saved")
    resumed = run(create, length, batch=8, accumulation=1, resume_from="saved/epoch_0001")
    # 8 updates of 4 samples; then updates of 8, of which an epoch has 4.
    assert resumed.trainer.updates == total
    assert resumed.rates == pytest.approx([linear(n, total) for n in range(8, total)])


def test_a_maximum_of_updates_stays_and_is_what_the_schedule_ends_with():
    create = partial(line, total=UPDATES)
    run(create, 4, max_num_train_steps=20, save="saved")
    resumed = run(create, 4, batch=8, max_num_train_steps=20, resume_from="saved/epoch_0001")
    assert resumed.rates == pytest.approx([linear(n, 20) for n in range(8, 20)])
    shorter = run(create, 2, batch=8, max_num_train_steps=20, resume_from="saved/epoch_0001")
    assert shorter.rates == pytest.approx([linear(n, 12) for n in range(8, 12)])


def test_percentages_are_of_the_new_length_and_none_is_due_twice():
    class Notes(TrainerCallback):
        def __init__(self):
            self.every, self.due = Every("25%"), []

        def on_optimizer_step_end(self, trainer):
            if self.every.due(trainer.progress):
                self.due.append(trainer.updates)

        def state_dict(self):
            return self.every.state_dict()

        def load_state_dict(self, state):
            self.every.load_state_dict(state)

    run(None, 2, first := Notes(), save="saved")
    assert first.due == [4, 8, 12, 16]
    run(None, 2, then := Notes(), batch=8, resume_from="saved/epoch_0001")
    assert then.due == [9, 12]  # of 12
    run(None, 4, then := Notes(), resume_from="saved/epoch_0001")
    assert then.due == [24, 32]  # of 32; 25 % and 50 % were due in the first epoch


def test_a_run_that_has_followed_resumes_exactly_and_differs_in_nothing():
    create = partial(lr_scheduler.OneCycleLR, max_lr=PEAK, total_steps=UPDATES)
    run(create, 2, save="saved")
    whole = run(create, 4, batch=8, resume_from="saved/epoch_0001", save="again")
    rest = run(create, 4, batch=8, resume_from="again/epoch_0003")
    assert rest.rates == whole.rates[-4:]
    assert_identical(weights_of(rest.trainer), weights_of(whole.trainer))
    assert rest.differences == rest.printed == rest.warned == []


# -- Schedulers that don't follow -----------------------------------------------------------------


def test_a_function_that_the_script_computes_is_used_from_the_next_update_on():
    run(lambda optimizer: line(optimizer, 8), 1, save="saved")
    longer = run(lambda optimizer: line(optimizer, 24), 3, resume_from="saved/epoch_0001")
    assert longer.rates == pytest.approx([linear(n, 24) for n in range(8, 24)])
    assert "the learning rate 0.0666667; it would have been 0" in longer.printed[0]


def test_a_scheduler_with_a_length_of_its_own_keeps_it_and_is_named():
    def create(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, 8)

    run(create, 1, save="saved")
    longer = run(create, 2, resume_from="saved/epoch_0001")
    assert longer.rates == pytest.approx([cosine(n, 8) for n in range(8, 16)], abs=1e-9)
    (told,) = longer.printed
    assert "16 updates instead of 8. The scheduler (CosineAnnealingLR) isn't changed" in told


def test_a_scheduler_that_the_script_gives_another_length_keeps_that_of_the_state():
    run(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8), 1, save="saved")
    longer = run(
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 16),
        2,
        resume_from="saved/epoch_0001",
    )
    assert longer.rates == pytest.approx([cosine(n, 8) for n in range(8, 16)], abs=1e-9)
    (told,) = longer.warned
    assert "The scheduler (CosineAnnealingLR) isn't changed: a new one has another state" in told
    assert "scheduler.T_max: 8 → 16" in longer.differences[0]


class Creates:
    """A plugin that creates a scheduler with its own length."""

    @hookimpl
    def create_scheduler(self, trainer):
        return lr_scheduler.OneCycleLR(trainer.optimizer, PEAK, total_steps=8)


def test_a_scheduler_of_a_plugin_that_would_raise_is_refused_before_an_update():
    run(None, 1, Creates(), save="saved")
    with pytest.raises(RuntimeError, match="OneCycleLR. doesn't follow: it has no method set_num"):
        run(None, 2, Creates(), resume_from="saved/epoch_0001")


@pytest.mark.parametrize("total", [8, 16])
def test_a_scheduler_that_would_raise_is_refused_before_an_update(total):
    def create(total, optimizer):
        return lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=total)

    run(partial(create, 8), 1, save="saved")
    with pytest.raises(
        RuntimeError, match="instead of 8, since its epochs, batch size.*OneCycleLR"
    ):
        run(partial(create, total), 2, resume_from="saved/epoch_0001")


def test_a_scheduler_that_depends_on_more_than_the_count_keeps_its_length_with_a_warning():
    class Changes(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                trainer.scheduler.base_lrs = [PEAK / 2]

    create = partial(line, total=UPDATES)
    run(create, 1, Changes(), save="saved")
    longer = run(create, 2, resume_from="saved/epoch_0001")
    assert "The scheduler (LambdaLR) isn't changed: a new one has another state" in longer.warned[0]
    # That of a run of 8 updates, in the middle of which the peak was halved.
    assert longer.rates == pytest.approx([linear(n, 8) / 2 for n in range(8, 16)])


def test_what_can_not_be_built_for_the_new_length_is_kept_with_the_reason():
    def create(optimizer, total):
        if total > 8:
            raise ValueError("too long for me")
        return line(optimizer, total)

    run(partial(create, total=UPDATES), 1, save="saved")
    longer = run(partial(create, total=UPDATES), 2, resume_from="saved/epoch_0001")
    assert (
        "isn't changed: it couldn't be built for the new one (ValueError: too long"
        in (longer.warned[0])
    )


@pytest.mark.parametrize("kind", ["object", "two"])
def test_a_ready_object_keeps_its_length_and_each_of_several_follows_on_its_own(kind):
    def train(epochs, **options):
        model = tiny_model()
        parts = [torch.optim.SGD(model[n].parameters(), lr=PEAK * (n + 1)) for n in (0, 2)]
        optimizer = parts if kind == "two" else torch.optim.SGD(model.parameters(), lr=PEAK)
        create: Any = [partial(line, total=UPDATES), None]
        if kind == "object":
            create = lr_scheduler.PolynomialLR(optimizer, 8)
        recorder = Recorder()
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[recorder])
        trainer.train(DATA, epochs, per_device_batch_size=4, create_scheduler_fn=create, **options)
        return trainer, recorder.rates

    train(1)[0].save_training_state("saved")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, rates = train(2, resume_from="saved")
    told = [str(one.message) for one in caught if "PolynomialLR) isn't changed" in str(one.message)]
    if kind == "object":
        assert rates == [0] * 8
        assert len(told) == 1
    else:
        assert rates == pytest.approx([linear(n, 16) for n in range(8, 16)])
        assert trainer.optimizer.param_groups[1]["lr"] == PEAK * 3
        assert told == []


# -- Within a run ---------------------------------------------------------------------------------


class Grows(TrainerCallback):
    """Trains on 8, 16, 24 … samples."""

    def on_train_epoch_start(self, trainer):
        data = tiny_data(64)
        count = 8 * trainer.run_history.current_epoch
        trainer.train_dataset = torch.utils.data.Subset(data, range(count))


@pytest.mark.parametrize("name", ["LambdaLR", "OneCycleLR, product", "SequentialLR"])
@pytest.mark.parametrize("samples", [8, 16])  # 16 are replaced before the first update
def test_a_schedule_follows_data_that_change_and_ends_with_the_run(name, samples):
    create, value = FOLLOWING[name]
    grown = run(create, 3, Grows(), data=tiny_data(samples))
    # Planned: 6 updates, then 2 + 2 * 4 = 10, then 2 + 4 + 6 = 12.
    right = [value(n, total) for n, total in enumerate([6] * 2 + [10] * 4 + [12] * 6)]
    assert grown.rates == pytest.approx(right)
    first = ["The run now has 6 updates instead of 12"] if samples == 16 else []
    assert [text.partition(". ")[0] for text in grown.printed] == [
        *first,
        "The run now has 10 updates instead of 6",
        "The run now has 12 updates instead of 10",
    ]


@pytest.mark.parametrize("update", [2, 4, 6, 9])
def test_a_run_whose_schedule_follows_its_data_resumes_exactly(update):
    create = FOLLOWING["OneCycleLR, product"][0]
    often = SaveTrainingStateCallback("often", None, 1, save_at_end=False)
    whole = run(create, 3, Grows(), often, data=tiny_data(8))
    rest = run(
        create,
        3,
        Grows(),
        data=tiny_data(8),
        resume_from=f"often/update_{update:08d}",
    )
    assert rest.rates == whole.rates[update:]
    assert_identical(weights_of(rest.trainer), weights_of(whole.trainer))


def test_a_rollback_to_a_state_of_another_length_keeps_the_present_one():
    class RollsBack(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                trainer.wait_for_saves()
                TrainingState("saved/epoch_0001", 0).roll_back(trainer)

    create = partial(line, total=UPDATES)
    grown = run(create, 3, Grows(), RollsBack(), data=tiny_data(8), save="saved")
    # The scheduler is at update 2 again, where the state was saved; its length is the run's.
    right = [linear(n, 6) for n in range(2)] + [linear(n, 10) for n in range(2, 6)]
    right += [linear(n, 12) for n in range(2, 8)]
    assert grown.rates == pytest.approx(right)


# -- Positions in the middle of an epoch ----------------------------------------------------------


def test_within_an_epoch_an_accumulation_that_fits_is_counted_exactly_and_another_refused():
    create = partial(line, total=UPDATES)
    often = SaveTrainingStateCallback("often", None, 1, save_at_end=False)
    run(create, 2, often)
    resumed = run(create, 2, accumulation=2, resume_from="often/update_00000004")
    # 4 of 8 micro-batches were used one by one: 2 updates complete the epoch, 4 are the next.
    assert (resumed.trainer.updates, resumed.samples) == (10, 16 + 32)
    assert resumed.rates == pytest.approx([linear(n, 10) for n in range(4, 10)])
    with pytest.raises(TrainingStateError, match=r"that divides 3, such as 1; it is now 2"):
        run(create, 2, accumulation=2, resume_from="often/update_00000003")
