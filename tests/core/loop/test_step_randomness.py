"""What a step draws from Python's and NumPy's generators depends on its place in the run only.

The generators aren't seeded for code that has never drawn. The numbers must be exact all the same,
wherever the first draw comes: equal weights in a run that was never interrupted and in those
resumed from its training states, each in a process in which other numbers were drawn before.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from pa_core import Trainer, TrainerCallback
from pa_core.data.rng import seed_python_and_numpy
from pa_core.loop.randomness import EpochRandomness
from pa_core.testing import run_on_processes
from tests.helpers import assert_identical, weights_of

EPOCHS, STEPS, BATCH = 3, 4, 4
SAVED = 1, 3, 4, 7  # updates
NEVER = 1000


def draw() -> float:
    return 0.5 + (random.random() + np.random.rand()) / 2


class Rows(Dataset):
    """Draws for sample `first`, wherever it comes in an epoch, and for each after it."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index):
        scale = draw() if index >= self.first else 1.0
        return torch.full((3,), scale * index / 16), torch.tensor([float(index % 5)])


class Net(nn.Module):
    """Draws from step `first` of the run on. torch draws too, for dropout."""

    def __init__(self, first: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.first, self.step = first, 0

    def forward(self, x):
        return self.layers(x) * (draw() if self.training and self.step >= self.first else 1.0)


class Loss(nn.MSELoss):
    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.step = first, 0

    def forward(self, outputs, targets):
        return super().forward(outputs, targets) * (draw() if self.step >= self.first else 1.0)


class Collate:
    """Draws for a batch with sample `first`."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, samples):
        inputs, targets = default_collate(samples)
        return inputs * (draw() if self.first / 16 in inputs else 1.0), targets


class CountSteps(TrainerCallback):
    """Tells model and loss which step of the run it is."""

    def on_train_epoch_start(self, trainer):
        trainer.get_model().step = trainer.loss_func.step = trainer.updates

    on_train_step_end = on_train_epoch_start


class Save(TrainerCallback):
    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_step_end(self, trainer):
        if trainer.updates in SAVED:
            trainer.control.save(self.folder / str(trainer.updates), everywhere=True)


def jitter(hook: str, first: int, *, changes_training: bool = True):
    """A callback that draws in a hook from update `first` on, for the learning rate."""

    def method(self, trainer, **kwargs):
        if trainer.updates >= first:
            self.drawn[trainer.updates] = drawn = draw()
            if changes_training:
                trainer.optimizer.param_groups[0]["lr"] = 0.02 * drawn

    callback = type("Jitter", (TrainerCallback,), {hook: method})()
    callback.drawn = {}
    return callback


def run(callbacks=(), *, model=NEVER, loss=NEVER, data=NEVER, collate=None, **options):
    # Another process, in which other numbers were drawn before.
    seed_python_and_numpy(random.SystemRandom().randrange(2**62))
    net = Net(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    callbacks = [CountSteps(), *callbacks]
    trainer = Trainer(net, Loss(loss), optimizer, callbacks=callbacks, plugins=())
    collate_fn = None if collate is None else Collate(collate)
    options = {"per_device_batch_size": BATCH, "collate_fn": collate_fn} | options
    trainer.train(Rows(data), EPOCHS, **options)
    return weights_of(trainer)


HOOKS = (
    *("on_train_step_start", "on_backward_start", "on_backward_end", "on_optimizer_step_start"),
    *("on_optimizer_step_end", "on_train_step_end"),
)


@pytest.mark.parametrize("first", [0, 2, 5], ids="draws from step {}".format)
@pytest.mark.parametrize("place", ["nowhere", "model", "loss", "data", "collate", "all", *HOOKS])
def test_resuming_is_exact_wherever_the_first_draw_comes(place, first, tmp_path):
    places = ["model", "loss", "data", "collate"] if place == "all" else [place]
    draws = {name: first for name in places if name in ("model", "loss", "data", "collate")}
    hook = {"all": "on_optimizer_step_end"}.get(place, place)

    def callbacks():
        return [jitter(hook, first)] if hook.startswith("on_") else []

    whole = run([*callbacks(), Save(tmp_path)], **draws)
    for update in SAVED:
        resumed = run(callbacks(), resume_from=tmp_path / str(update), **draws)
        assert_identical(resumed, whole)


class DrawEverywhere(TrainerCallback):
    """Draws from the three global generators in any event, and from those of `rng`."""

    def __init__(self) -> None:
        self.drawn: dict[str, list[float]] = {}
        self.own: list[float] = []

    def draw(self, trainer, event, step=None):
        epoch = None if event == "run start" else trainer.position.epoch
        place = f"{event} {epoch} {step}"
        self.drawn[place] = [torch.rand(()).item(), random.random(), np.random.rand()]

    def on_training_run_start(self, trainer):
        self.draw(trainer, "run start")

    def on_train_epoch_start(self, trainer):
        self.draw(trainer, "epoch start")

    def on_train_step_start(self, trainer, step):
        self.draw(trainer, "step start", step=step)

    def on_train_step_end(self, trainer, step):
        self.draw(trainer, "step end", step=step)
        ours, mine = trainer.rng("a"), trainer.rng("b", per_rank=True)
        self.own += [torch.rand((), generator=generator).item() for generator in (ours, mine)]

    def on_train_epoch_end(self, trainer):
        self.draw(trainer, "epoch end")

    def on_training_run_epoch_end(self, trainer):
        self.draw(trainer, "epoch of the run")

    def on_training_run_end(self, trainer):
        self.draw(trainer, "run end")


def test_events_draw_the_same_when_a_run_is_resumed(tmp_path):
    whole = DrawEverywhere()
    run([whole, Save(tmp_path)], model=2)
    for update in SAVED:
        resumed = DrawEverywhere()
        run([resumed], model=2, resume_from=tmp_path / str(update))
        assert resumed.drawn == {place: whole.drawn[place] for place in resumed.drawn}
        assert resumed.own == whole.own[-len(resumed.own) :]
    numbers = [number for drawn in whole.drawn.values() for number in drawn]
    assert len(numbers) == 3 * (2 + 3 * EPOCHS + 2 * EPOCHS * STEPS)
    # In the first step, Python's and NumPy's generators are at rest at its start and at its end.
    assert len(set(numbers)) == len(numbers) - 2


def on_two_processes() -> bool:
    """Whether a run on two processes, of which only one draws at first, resumes exactly."""
    everywhere = DrawEverywhere()
    run([everywhere], model=0, loss=3)
    numbers = torch.tensor(list(everywhere.drawn.values()), dtype=torch.float64)
    both = [torch.empty_like(numbers) for _ in range(2)]
    torch.distributed.all_gather(both, numbers)
    assert torch.equal(*both)
    own = torch.tensor(everywhere.own).unflatten(0, (-1, 2))
    both = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(both, own)
    assert torch.equal(both[0][:, 0], both[1][:, 0])
    assert (both[0][:, 1] != both[1][:, 1]).all()

    rank = int(os.environ["RANK"])
    folder = Path(os.environ["STATES"])

    def drawn(*callbacks, **options):
        plugin = jitter("on_backward_end", 2 + 4 * rank, changes_training=False)
        weights = run([plugin, *callbacks], loss=3 + 5 * rank, data=5, **options)
        return weights, plugin.drawn

    options = {"per_device_batch_size": BATCH // 2}
    whole, expected = drawn(Save(folder), **options)
    for update in SAVED:
        weights, found = drawn(resume_from=folder / str(update), **options)
        assert_identical(weights, whole)
        assert found == {step: number for step, number in expected.items() if step >= update}
    return len(set(expected.values())) == len(expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_each_process_knows_whose_code_draws_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STATES", str(tmp_path))
    assert run_on_processes(on_two_processes, 2) == [True, True]
    states = [json.loads((tmp_path / f"3/process-0000{n}.json").read_text()) for n in (0, 1)]
    assert [state["drawing"] for state in states] == [["plugins"], []]


def test_no_draw_is_repeated_in_another_step():
    plugins = [jitter(hook, first=2) for hook in HOOKS]
    run(plugins, model=3)
    drawn = [number for plugin in plugins for number in plugin.drawn.values()]
    assert len(set(drawn)) == len(drawn) > 50


@pytest.mark.parametrize("first", [0, 2, 5])
def test_workers_change_nothing(first):
    def once(workers):
        plugin = jitter("on_optimizer_step_end", first)
        options = {"train_dataloader_kwargs": {"num_workers": workers}}
        return run([plugin], model=first + 1, data=3, collate=5, **options), plugin.drawn

    (weights, drawn), (expected, drawn_without) = once(2), once(0)
    assert_identical(weights, expected)
    assert drawn == drawn_without


class Evaluate(TrainerCallback):
    def on_train_step_end(self, trainer):
        trainer.control.evaluate()
        if trainer.updates == 2:
            trainer.evaluate(Rows(0))


@pytest.mark.parametrize("model", [0, 6])
@pytest.mark.parametrize("others", ["plugins", "evaluations", "states", "data"])
def test_other_draws_do_not_change_what_the_model_draws(others, model, tmp_path):
    plugins = [jitter(hook, first, changes_training=False) for hook in HOOKS for first in (0, 5)]
    callbacks = {"plugins": plugins, "evaluations": [Evaluate()], "states": [Save(tmp_path)]}
    options: dict[str, Any] = {"eval_dataset": Rows(0)} if others == "evaluations" else {}
    if others == "data":  # a draw that changes no number
        options["collate_fn"] = lambda samples: draw() and default_collate(samples)
    assert_identical(run(callbacks.get(others, ()), model=model, **options), run(model=model))


def test_evaluations_and_states_do_not_change_what_plugins_draw(tmp_path):
    def drawn(*others, **options):
        plugin = jitter("on_optimizer_step_end", 5)
        run([plugin, *others], **options)
        return plugin.drawn

    expected = drawn()
    assert len(expected) == len(set(expected.values())) == EPOCHS * STEPS - 4
    assert drawn(Save(tmp_path)) == expected

    class RequestEvaluation(TrainerCallback):
        def on_train_step_end(self, trainer):
            trainer.control.evaluate()

    assert drawn(RequestEvaluation(), eval_dataset=Rows(0)) == expected


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ({}, ([], [])),
        ({"data": 0, "collate": 0}, ([], [])),
        ({"loss": 5}, ([], ["model"])),
        ({"callbacks": "on_optimizer_step_end"}, ([], ["plugins"])),
        ({"callbacks": "on_train_step_start", "model": 5}, ([], ["model", "plugins"])),
    ],
)
def test_a_state_records_whose_code_draws(draws, expected, tmp_path):
    draws = dict(draws)
    hook = draws.pop("callbacks", None)
    run([*([jitter(hook, 5)] if hook else []), Save(tmp_path)], **draws)
    states = [json.loads((tmp_path / n / "process-00000.json").read_text()) for n in ("4", "7")]
    assert tuple(state["drawing"] for state in states) == expected


def test_a_step_that_is_computed_again_draws_the_same():
    randomness = EpochRandomness(5, 1, 0, torch.device("cpu"), set())

    def step(number: int, draws: bool) -> float:
        randomness.seed_model(number)
        drawn = draw() if draws else 0.0
        randomness.seed_hooks(number)
        return drawn

    drawn = [step(number, draws=number > 0) for number in range(4)]
    assert len(set(drawn)) == 4
    assert [step(number, draws=number > 0) for number in range(4)] == drawn


def test_generators_are_not_seeded_in_runs_that_do_not_draw(monkeypatch):
    from pa_core.data import rng
    from pa_core.loop import randomness

    seeded, seed = [], rng.seed_python_and_numpy

    def record(key):
        seeded.append(key)
        seed(key)

    for module in (rng, randomness):
        monkeypatch.setattr(module, "seed_python_and_numpy", record)
    run()
    events = 2 + 3 * EPOCHS
    assert len(seeded) == EPOCHS + events  # once at rest in each epoch
