"""The table of docs/plugins/schedulers.md: what a scheduler does in a run whose length changes.

The values of a run of 3 epochs are compared with those of the schedulers' own library, stepped by
hand.
"""

import math
import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from pa_core import TrainerPlaceholderValues
from pa_core.callbacks import SaveTrainingStateCallback
from pa_schedulers import CosineLrScheduler, SchedulersPlugin, StatefulSchedulerBase, WSDLrScheduler
from pa_schedulers.base import SchedulerBase
from tests.plugins.schedulers.runs import RecordGroups, data, new_trainer

PEAK = 0.01  # of the first of two groups; there are 10 updates in an epoch
UPDATES, EPOCHS = TrainerPlaceholderValues.NUM_UPDATES, TrainerPlaceholderValues.NUM_EPOCHS


def by_hand(create, steps=30, every=1):
    """The learning rate of each update under a scheduler that is stepped after `every` updates."""
    optimizer = SGD([torch.zeros(1)], lr=PEAK, momentum=0.9)
    scheduler, values = create(optimizer), []
    for update in range(1, steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if update % every == 0 and update < steps:
            scheduler.step()
    return values


def timm_by_hand(create, every=1):
    optimizer = SGD([torch.zeros(1)], lr=PEAK)
    scheduler, values = create(optimizer), []
    for update in range(30):
        if scheduler.t_in_epochs and update % 10 == 0 and update:
            scheduler.step(update // 10)
        scheduler.step_update(update)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def timm(name, optimizer, **options):
    from timm.scheduler import create_scheduler_v2

    return create_scheduler_v2(optimizer, name, updates_per_epoch=1, **options)[0]


def timm_cosine(optimizer, total, in_epochs):
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, total, t_in_epochs=in_epochs)


def hugging_face(name, optimizer, warmup=0, total=30, **options):
    from transformers import get_scheduler

    return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=options)


def cosine(update, warmup=0, total=30):
    if update < warmup:
        return PEAK * update / warmup
    return PEAK * (1 + math.cos(math.pi * (update - warmup) / (total - warmup))) / 2


def wsd(update, total=30):
    """A warm-up of 10 %, then the peak, then 1 minus the root in the last 20 %."""
    if update < 3:
        return PEAK * update / 3
    return PEAK * (1 - math.sqrt(max(0, update - 0.8 * total) / (0.2 * total)))


class Without(SchedulerBase):
    """Keeps no count."""

    def __init__(self, optimizer, total):
        super().__init__(optimizer)
        self.total = total

    def get_updated_values(self, num_updates):
        return [value * (1 - num_updates / self.total) for value in self.base_lr_values]


class With(StatefulSchedulerBase):
    """Keeps a count."""

    def __init__(self, optimizer, total):
        super().__init__(optimizer)
        self.total = total

    get_updated_values = Without.get_updated_values


LINE = [PEAK * (1 - n / 30) for n in range(30)]
NAMED = {  # the settings, and the values of a run of 30 updates
    "cosine": ({"warmup": "10%"}, lambda: [cosine(n, 3) for n in range(30)]),
    "linear": ({}, lambda: LINE),
    "constant": ({"warmup": "10%"}, lambda: [PEAK * min(1, n / 3) for n in range(30)]),
    "wsd": ({"warmup": "10%", "decay_phase_ratio": 0.2}, lambda: [wsd(n) for n in range(30)]),
    "one_cycle": ({}, lambda: by_hand(lambda o: lr_scheduler.OneCycleLR(o, PEAK, 30))),
    "cosine_annealing": ({}, lambda: [cosine(n) for n in range(30)]),
    "polynomial": ({}, lambda: LINE),
    "LinearLR": (
        {"start_factor": 1.0, "end_factor": 0.5},
        lambda: [PEAK * (1 - n / 60) for n in range(30)],
    ),
    "step": (
        {"step_size": "20%"},
        lambda: [PEAK * 0.1 ** (n // 6) for n in range(30)],
    ),
    "exponential": ({"gamma": 0.9}, lambda: [PEAK * 0.9**n for n in range(30)]),
    "sequential": (
        {
            "schedulers": [{"name": "LinearLR", "start_factor": 0.5}, {"name": "cosine_annealing"}],
            "milestones": ["10%"],
        },
        lambda: [PEAK * (0.5 + n / 6) for n in range(3)] + [cosine(n, 3) for n in range(3, 30)],
    ),
    "timm/cosine": ({}, lambda: [cosine(n) for n in range(30)]),
    "timm/tanh": (
        {},
        lambda: timm_by_hand(partial(timm, "tanh", num_epochs=30, step_on_epochs=False)),
    ),
    "timm/poly": (
        {},
        lambda: timm_by_hand(partial(timm, "poly", num_epochs=30, step_on_epochs=False)),
    ),
    "transformers/linear": (
        {"warmup": "10%"},
        lambda: [PEAK * min(n / 3, (30 - n) / 27) for n in range(30)],
    ),
    "transformers/cosine": ({}, lambda: [cosine(n) for n in range(30)]),
    "transformers/polynomial": (  # it ends at 1e-7 of the optimizer's default, which is 1e-3
        {},
        lambda: [PEAK * ((1 - 1e-4) * (1 - n / 30) + 1e-4) for n in range(30)],
    ),
    "transformers/cosine_with_restarts": (
        {"num_cycles": 2},
        lambda: by_hand(partial(hugging_face, "cosine_with_restarts", num_cycles=2)),
    ),
    "transformers/inverse_sqrt": ({}, lambda: by_hand(partial(hugging_face, "inverse_sqrt"))),
}
BY_EPOCHS = {
    "cosine_annealing": ({"interval": "epoch"}, lambda: [cosine(n // 10, 0, 3) for n in range(30)]),
    "one_cycle": (
        {"interval": "epoch"},
        lambda: by_hand(lambda o: lr_scheduler.OneCycleLR(o, PEAK, 3), every=10),
    ),
    "timm/cosine": ({"step_on_epochs": True}, lambda: [cosine(n // 10, 0, 3) for n in range(30)]),
}
IN_CODE = {
    "cosine": (
        CosineLrScheduler.create_scheduler_fn(
            lr_min=0.0, num_warmup_epochs=EPOCHS / 10, warmup_starting_lr=0.0
        ),
        lambda: [cosine(n, 3) for n in range(30)],
    ),
    "wsd": (
        partial(
            WSDLrScheduler,
            total_steps=UPDATES,
            num_warmup_steps=UPDATES // 10,
            decay_phase_ratio=0.2,
            lr_min=0.0,
            warmup_starting_lr=0.0,
        ),
        lambda: [wsd(n) for n in range(30)],
    ),
    "one_cycle": (
        partial(lr_scheduler.OneCycleLR, max_lr=PEAK, total_steps=UPDATES),
        lambda: by_hand(lambda o: lr_scheduler.OneCycleLR(o, PEAK, 30)),
    ),
    "transformers": (
        partial(hugging_face, "cosine", total=UPDATES),
        lambda: [cosine(n) for n in range(30)],
    ),
    "timm": (
        partial(timm_cosine, total=UPDATES, in_epochs=False),
        lambda: [cosine(n) for n in range(30)],
    ),
    "timm by epochs": (
        partial(timm_cosine, total=EPOCHS, in_epochs=True),
        lambda: [cosine(n // 10, 0, 3) for n in range(30)],
    ),
    "without a count": (partial(Without, total=UPDATES), lambda: LINE),
    "with a count": (partial(With, total=UPDATES), lambda: LINE),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(epochs, create=None, *, batch=4, save=False, **settings):
    """The values of the first group's learning rate, and of the second's."""
    recorder = RecordGroups()
    saver = [SaveTrainingStateCallback("states", 1, save_at_end=False)] if save else []
    trainer = new_trainer(recorder, *saver, plugins=[SchedulersPlugin(**settings)])
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(has a state of|has training states of|was saved by|deprecated)"
        )
        trainer.train(
            data(),
            epochs,
            per_device_batch_size=batch,
            create_scheduler_fn=create,
            resume_from=None if save else "states/epoch_0001",
        )
    first, second = zip(*recorder.seen, strict=True)
    return list(first), list(second)


@pytest.mark.parametrize("name", NAMED)
def test_a_scheduler_by_name_follows_a_longer_run(name, capsys):
    options, right = NAMED[name]
    run(1, save=True, name=name, **options)
    rates, _ = run(3, name=name, **options)
    assert rates == pytest.approx(right()[10:], abs=1e-12)
    is_of_no_length = name in ("exponential", "transformers/inverse_sqrt")
    told = "The run now has 30 updates instead of 10. The scheduler ("
    assert (told in capsys.readouterr().out) != is_of_no_length


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "reduce_lr_on_plateau"])
def test_a_run_that_is_made_longer_twice_does_not_differ_from_itself(name):
    for epochs in (1, 2, 3):
        new_trainer(
            SaveTrainingStateCallback("states"),
            plugins=[SchedulersPlugin(name=name, watch_metric="train_loss_epoch")],
        ).train(data(), epochs, resume_from="auto", strict=True)


@pytest.mark.parametrize("name", BY_EPOCHS)
def test_one_that_steps_by_epochs_follows_a_longer_run_and_not_another_batch(name):
    options, right = BY_EPOCHS[name]
    run(1, save=True, name=name, **options)
    assert run(3, name=name, **options)[0] == pytest.approx(right()[10:], abs=1e-12)
    run(3, save=True, name=name, **options)
    doubled, _ = run(3, batch=2, name=name, **options)
    assert doubled[::2] == doubled[1::2] == pytest.approx(right()[10:], abs=1e-12)


@pytest.mark.parametrize("name", IN_CODE)
def test_one_of_placeholders_follows_a_longer_run(name, capsys):
    create, right = IN_CODE[name]
    run(1, create, save=True)
    rates, _ = run(3, create)
    assert rates == pytest.approx(right()[10:], abs=1e-12)
    assert "The run now has 30 updates instead of 10" in capsys.readouterr().out


def test_schedulers_of_groups_and_fields_follow_together():
    settings = {
        "name": "linear",
        "weight_decay": {"name": "cosine"},
        "groups": {"head": {"name": "one_cycle"}},
    }
    run(1, save=True, **settings)
    first, second = run(3, **settings)
    assert first == pytest.approx(LINE[10:])
    head = by_hand(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, PEAK, 30))
    assert second == pytest.approx([rate / 10 for rate in head[10:]])


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "transformers/greedy"])
def test_one_that_follows_a_metric_has_no_length(name, capsys):
    settings = {"name": name, "watch_metric": "train_loss_epoch"}
    run(1, save=True, **settings)
    run(3, **settings)
    assert "The run now has" not in capsys.readouterr().out


@pytest.mark.parametrize("batch", [2, 8])
def test_a_length_in_epochs_counts_the_updates_that_they_had(batch):
    """A warm-up of two epochs, of which the first has 10 updates and the second has 20 or 5."""
    per_epoch = 40 // batch
    run(4, save=True, name="cosine", warmup="2 epochs")
    rates, _ = run(4, batch=batch, name="cosine", warmup="2 epochs")
    warmup, total = 10 + per_epoch, 10 + 3 * per_epoch
    right = [cosine(n, warmup, total) for n in range(10, total)]
    assert rates == pytest.approx(right)


def test_a_run_that_ends_within_its_warm_up_warns():
    run(3, save=True, name="cosine", warmup=15)
    with pytest.warns(UserWarning, match="12 updates of the run: it ends within the warm-up"):
        rates, _ = run("12 updates", name="cosine", warmup=15)
    assert rates == pytest.approx([cosine(n, 15) for n in (10, 11)])


def test_one_with_arguments_of_its_own_beside_others_is_named():
    create = partial(lr_scheduler.StepLR, step_size=4)
    settings = {"weight_decay": {"name": "cosine"}}
    run(1, create, save=True, **settings)
    with pytest.warns(UserWarning, match=r"30 updates. The scheduler \(StepLR\) isn't changed"):
        run(3, create, **settings)
