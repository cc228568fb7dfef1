"""Every scheduler by name has the values of the original, in a real run and after a resume."""

import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as originals
from torch.optim.swa_utils import SWALR

from pa_core import TrainerCallback
from pa_schedulers import SchedulersPlugin, create_schedule, schedule_names
from pa_schedulers.builtin_schedulers import BUILTIN_SCHEDULERS
from pa_schedulers.torch_schedulers import torch_scheduler_classes
from tests.plugins.schedulers.runs import new_trainer, seen_in

UPDATES, PER_EPOCH, SAVED_AT = 30, 10, 13
LRS = [[0.01], [0.001]]


class Save(TrainerCallback):
    """Saves a state in the middle of an epoch."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_step_end(self, trainer):
        if trainer.updates == SAVED_AT:
            trainer.save_training_state(self.folder / "state")


def optimizer(kind: Any = SGD) -> Any:
    return kind([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for (lr,) in LRS])


def lrs(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def stepped(build: Callable[[Any], Any], every: int = 1) -> list[list[float]]:
    """As in torch: a step after each update, or after each epoch."""
    target = optimizer()
    schedule, seen = build(target), []
    for update in range(UPDATES):
        seen.append(lrs(target))
        target.step()
        if (update + 1) % every == 0 and update + 1 < UPDATES:
            schedule.step()
    return seen


def watched(build: Callable[[Any], Any], metrics: list[float]) -> list[list[float]]:
    """As for metric-driven schedulers: a step after each evaluation."""
    target = optimizer()
    schedule, seen = build(target), []
    for metric in metrics:
        seen += [lrs(target)] * PER_EPOCH
        schedule.step(metric)
    return seen


def timm_way(build: Callable[[Any], Any], metrics: list[float]) -> list[list[float]]:
    """As in timm's training script."""
    target = optimizer()
    schedule, seen, updates = build(target), [], 0
    for epoch, metric in enumerate(metrics):
        for _ in range(PER_EPOCH):
            seen.append(lrs(target))
            updates += 1
            schedule.step_update(num_updates=updates, metric=metric)
        schedule.step(epoch + 1, metric)
    return seen


def run_and_resume(folder: Any, name: str, options: dict[str, Any]) -> tuple[list, list[float]]:
    """The rates and metrics of a run, after a check that a resumed run has the same rates."""
    trainer = new_trainer(Save(folder), plugins=[SchedulersPlugin(name=name, **options)])
    whole = seen_in(trainer)
    metrics = list(trainer.run_history.get_metric_values("eval_loss_epoch"))
    resumed = new_trainer(plugins=[SchedulersPlugin(name=name, **options)])
    rest = seen_in(resumed, resume_from=folder / "state")
    assert rest == whole[SAVED_AT:]
    assert lrs(resumed.optimizer) == lrs(trainer.optimizer)
    return whole, metrics


def check(found: list, expected: list) -> None:
    assert len(found) == len(expected) == UPDATES
    for update, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got == pytest.approx(want, rel=1e-12, abs=1e-18), update


def in_sequence(target: Any) -> Any:
    first = originals.LinearLR(target, start_factor=0.1, total_iters=6)
    second = originals.CosineAnnealingLR(target, T_max=24)
    return originals.SequentialLR(target, [first, second], milestones=[6])


def in_chain(target: Any) -> Any:
    parts = [originals.ConstantLR(target, factor=0.5, total_iters=4)]
    return originals.ChainedScheduler([*parts, originals.ExponentialLR(target, gamma=0.9)])


TORCH: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "lambda": (
        {"lr_lambda": lambda n: 0.9**n},
        partial(originals.LambdaLR, lr_lambda=lambda n: 0.9**n),
    ),
    "multiplicative": (
        {"lr_lambda": lambda n: 0.9 + n / 1000},
        partial(originals.MultiplicativeLR, lr_lambda=lambda n: 0.9 + n / 1000),
    ),
    "step": ({"step_size": "20%"}, partial(originals.StepLR, step_size=6)),
    "multi_step": (
        {"milestones": [4, 0.5, "2 epochs"], "gamma": 0.5},
        partial(originals.MultiStepLR, milestones=[4, 15, 20], gamma=0.5),
    ),
    "ConstantLR": ({"total_iters": "0.5 epochs"}, partial(originals.ConstantLR, total_iters=5)),
    "LinearLR": (
        {"total_iters": 7, "start_factor": 0.25},
        partial(originals.LinearLR, total_iters=7, start_factor=0.25),
    ),
    "exponential": ({"gamma": 0.95}, partial(originals.ExponentialLR, gamma=0.95)),
    "sequential": (
        {
            "schedulers": [{"name": "LinearLR", "start_factor": 0.1}, {"name": "cosine_annealing"}],
            "milestones": ["20%"],
        },
        in_sequence,
    ),
    "polynomial": ({"power": 2.0}, partial(originals.PolynomialLR, total_iters=30, power=2.0)),
    "cosine_annealing": (
        {"eta_min": 1e-4},
        partial(originals.CosineAnnealingLR, T_max=30, eta_min=1e-4),
    ),
    "chained": (
        {
            "schedulers": [
                {"name": "ConstantLR", "factor": 0.5, "total_iters": 4},
                {"name": "exponential", "gamma": 0.9},
            ]
        },
        in_chain,
    ),
    "cyclic": (
        {"base_lr": 1e-4, "step_size_up": "10%", "mode": "triangular2"},
        partial(
            originals.CyclicLR,
            base_lr=1e-4,
            max_lr=[0.01, 0.001],
            step_size_up=3,
            mode="triangular2",
        ),
    ),
    "cosine_annealing_warm_restarts": (
        {"T_0": "0.7 epochs", "T_mult": 2},
        partial(originals.CosineAnnealingWarmRestarts, T_0=7, T_mult=2),
    ),
    "one_cycle": (
        {"anneal_strategy": "linear", "three_phase": True},
        partial(
            originals.OneCycleLR,
            max_lr=[0.01, 0.001],
            total_steps=30,
            anneal_strategy="linear",
            three_phase=True,
        ),
    ),
    "swa": (
        {"swa_lr": 1e-4, "anneal_epochs": "50%"},
        partial(SWALR, swa_lr=1e-4, anneal_epochs=15),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_scheduler_by_name_is_the_original(name, tmp_path):
    options, build = TORCH[name]
    found, _ = run_and_resume(tmp_path, name, options)
    check(found, stepped(build))


def test_every_torch_scheduler_is_registered_and_tested():
    classes = {torch_scheduler_classes()[name] for name in TORCH}
    every = {
        value
        for name, value in vars(originals).items()
        if isinstance(value, type)
        and issubclass(value, originals.LRScheduler)
        and name[0] != "_"
        and name != "LRScheduler"
    }
    assert classes == (every | {SWALR}) - {originals.ReduceLROnPlateau}
    for schedule in every:
        assert torch_scheduler_classes()[schedule.__name__] is schedule


def test_a_torch_scheduler_can_step_once_per_epoch(tmp_path):
    options = {"interval": "epoch", "gamma": 0.5}
    found, _ = run_and_resume(tmp_path, "exponential", options)
    check(found, stepped(partial(originals.ExponentialLR, gamma=0.5), every=PER_EPOCH))
    options = {"interval": "epoch", "milestones": [1, "20 updates"]}
    found, _ = run_and_resume(tmp_path / "2", "multi_step", options)
    check(found, stepped(partial(originals.MultiStepLR, milestones=[1, 2]), every=PER_EPOCH))
    found, _ = run_and_resume(tmp_path / "3", "one_cycle", {"interval": "epoch"})
    build = partial(originals.OneCycleLR, max_lr=[0.01, 0.001], total_steps=3)
    check(found, stepped(build, every=PER_EPOCH))


def test_one_cycle_also_cycles_the_momentum_and_keeps_its_last_values():
    trainer = new_trainer(plugins=[SchedulersPlugin(name="one_cycle")], optimizer=AdamW)
    found = seen_in(trainer, field="betas")
    target = optimizer(AdamW)
    schedule = originals.OneCycleLR(target, max_lr=[0.01, 0.001], total_steps=UPDATES)
    for update in range(UPDATES):
        assert found[update] == [group["betas"] for group in target.param_groups]
        if update < UPDATES - 1:
            target.step()
            schedule.step()
    assert lrs(trainer.optimizer) == lrs(target)
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.01, 0.001]


def test_one_cycle_works_for_an_optimizer_without_momentum():
    trainer = new_trainer(
        plugins=[SchedulersPlugin(name="one_cycle")], optimizer=torch.optim.Adagrad
    )
    assert max(rate for rate, _ in seen_in(trainer)) == pytest.approx(0.01)


TRANSFORMERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"warmup": "10%"}, {}),
    "cosine": ({"warmup": 3}, {}),
    "cosine_with_restarts": ({"warmup": 3, "num_cycles": 2}, {"num_cycles": 2}),
    "polynomial": ({"warmup": 3, "power": 2.0}, {"power": 2.0}),
    "constant": ({}, {}),
    "constant_with_warmup": ({"warmup": "0.3 epochs"}, {}),
    "inverse_sqrt": ({"warmup": 3, "timescale": "20%"}, {"timescale": 6}),
    "cosine_with_min_lr": ({"warmup": 3, "min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
    "cosine_warmup_with_min_lr": ({"warmup": 3, "min_lr_rate": 0.1}, {"min_lr_rate": 0.1}),
    "warmup_stable_decay": ({"warmup": 3, "num_decay_steps": "20%"}, {"num_decay_steps": 6}),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_scheduler_by_name_is_the_original(name, tmp_path):
    from transformers import get_scheduler

    options, theirs = TRANSFORMERS[name]
    found, _ = run_and_resume(tmp_path, f"transformers/{name}", options)
    build = partial(
        get_scheduler,
        name,
        num_warmup_steps=3,
        num_training_steps=UPDATES,
        scheduler_specific_kwargs=theirs or None,
    )
    check(found, stepped(lambda target: build(optimizer=target)))


TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cosine": (
        {"warmup": "10%", "cooldown": 5, "k_decay": 1.5, "min_lr": 1e-5, "noise": [0.4, 0.9]},
        {"num_epochs": 25, "warmup_epochs": 3, "k_decay": 1.5, "min_lr": 1e-5, "noise": [0.4, 0.9]},
    ),
    "tanh": (
        {"warmup": 3, "warmup_prefix": True},
        {"num_epochs": 27, "warmup_epochs": 3, "warmup_prefix": True},
    ),
    "step": ({"decay_epochs": 0.6, "decay_rate": 0.5}, {"decay_epochs": 6, "decay_rate": 0.5}),
    "multistep": (
        {"decay_milestones": [1, "50%"], "warmup_epochs": 0.3},
        {"decay_milestones": [10, 15], "warmup_epochs": 3},
    ),
    "poly": (
        {"cycle_limit": 3, "decay_rate": 0.5},
        {"num_epochs": 10, "cycle_limit": 3, "decay_rate": 0.5},
    ),
    "wsd": (
        {"warmup": 3, "decay_epochs": 0.5},
        {"num_epochs": 30, "warmup_epochs": 3, "decay_epochs": 0.5},
    ),
    "rsqrt": (
        {"warmup": 3, "decay_epochs": "20%"},
        {"num_epochs": 30, "warmup_epochs": 3, "decay_epochs": 6},
    ),
    "constant": ({"warmup": 3}, {"warmup_epochs": 3}),
}


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_scheduler_by_name_is_the_original_for_each_update(name, tmp_path):
    from timm.scheduler import create_scheduler_v2

    options, theirs = TIMM[name]
    found, metrics = run_and_resume(tmp_path, f"timm/{name}", options)
    arguments = {"step_on_epochs": False, "updates_per_epoch": 1} | theirs
    check(found, timm_way(lambda o: create_scheduler_v2(o, name, **arguments)[0], metrics))


def test_a_timm_scheduler_can_step_once_per_epoch(tmp_path):
    from timm.scheduler import create_scheduler_v2

    options = {"step_on_epochs": True, "warmup": 10, "cooldown": "1 epoch"}
    found, metrics = run_and_resume(tmp_path, "timm/cosine", options)
    arguments = {"num_epochs": 2, "warmup_epochs": 1}
    check(found, timm_way(lambda o: create_scheduler_v2(o, "cosine", **arguments)[0], metrics))
    assert found[-1] == [0, 0]


def test_a_timm_scheduler_built_in_code_needs_no_special_trainer():
    from timm.scheduler import CosineLRScheduler, StepLRScheduler

    for build in (
        partial(CosineLRScheduler, t_initial=30, warmup_t=4, t_in_epochs=False),
        partial(StepLRScheduler, decay_t=1, decay_rate=0.5),
    ):
        trainer = new_trainer(plugins=[SchedulersPlugin()])
        check(seen_in(trainer, create_scheduler_fn=build), timm_way(build, [0.0] * 3))


WATCHING: dict[str, dict[str, Any]] = {
    "reduce_lr_on_plateau": {"patience": 0, "threshold": 0.9, "factor": 0.5},
    "transformers/reduce_lr_on_plateau": {"patience": 0, "threshold": 0.9, "factor": 0.5},
    "transformers/greedy": {"patience": 0, "min_lr": 1e-5, "factor": 0.9},
    "timm/plateau": {"patience_epochs": 0, "decay_rate": 0.5, "warmup_epochs": 1, "noise": 0.0},
}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("name", WATCHING)
def test_a_metric_driven_scheduler_is_the_original(name, tmp_path):
    from timm.scheduler import create_scheduler_v2
    from transformers.optimization import GreedyLR

    options = WATCHING[name]
    found, metrics = run_and_resume(tmp_path, name, options)
    builds: dict[str, Callable[[Any], Any]] = {
        "reduce_lr_on_plateau": partial(originals.ReduceLROnPlateau, **options),
        "transformers/reduce_lr_on_plateau": partial(originals.ReduceLROnPlateau, **options),
        "transformers/greedy": partial(GreedyLR, **options),
        "timm/plateau": lambda target: create_scheduler_v2(
            target, "plateau", plateau_mode="min", num_epochs=3, **options
        )[0],
    }
    way = timm_way if name == "timm/plateau" else watched
    check(found, way(builds[name], metrics))
    assert len({tuple(values) for values in found}) > 1  # the rate has changed


def test_all_names_are_tested_here():
    tested = {*BUILTIN_SCHEDULERS, *TORCH, *(f"timm/{name}" for name in TIMM), *WATCHING}
    tested |= {f"transformers/{name}" for name in TRANSFORMERS}
    classes = {schedule.__name__ for schedule in torch_scheduler_classes().values()}
    assert set(schedule_names()) - classes == tested - classes


def test_the_table_in_the_docs_has_all_names():
    page = (Path(__file__).parents[3] / "docs" / "plugins" / "schedulers.md").read_text()
    section = page.partition("## Names")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(.+?)`", " ".join(rows))) == sorted(schedule_names())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("one_cylce", "one_cycle"),
        ("OnecycleLR", "OneCycleLR"),
        ("timm/cosin", "timm/cosine"),
        ("transformers/linaer", "transformers/linear"),
        ("cosinus", "cosine"),
    ],
)
def test_an_unknown_name_raises_with_the_closest_name(name, hint):
    with pytest.raises(ValueError, match=f"(no|Unknown) scheduler '{name}'. Did you mean '{hint}'"):
        create_schedule(optimizer(), name, 10)


@pytest.mark.parametrize("name", ["step", "transformers/constant_with_warmup", "exponential"])
def test_a_scheduler_without_a_length_needs_none(name):
    options = {"step": {"step_size": 4}, "exponential": {"gamma": 0.9}}.get(name, {"warmup": 4})
    target = optimizer()
    schedule = create_schedule(target, name, None, None, **options)
    schedule.step()
    with pytest.raises(ValueError, match="the run's length is needed"):
        create_schedule(target, "one_cycle", None)


def test_a_scheduler_that_follows_epochs_raises_without_a_caller_of_end_epoch():
    schedule = create_schedule(optimizer(), "exponential", 10, gamma=0.5, interval="epoch")
    with pytest.raises(RuntimeError, match='enable the plugin "schedulers"'):
        schedule.step()


def test_a_missing_library_raises_with_the_pip_command(monkeypatch):
    def absent(module):
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr("pa_schedulers.extras.import_module", absent)
    with pytest.raises(ImportError, match=r"pip install 'pa-schedulers\[timm\]'"):
        create_schedule(optimizer(), "timm/cosine", 10)


def test_learning_rates_in_tensors_are_filled_in_place():
    for name in ("timm/tanh", "transformers/linear", "one_cycle", "cosine", "wsd"):
        rate = torch.tensor(0.5)
        target = AdamW([torch.zeros(1, requires_grad=True)], lr=rate, foreach=False)
        plain = AdamW([torch.zeros(1, requires_grad=True)], lr=0.5)
        schedules = [create_schedule(each, name, 10) for each in (target, plain)]
        for _ in range(9):
            for schedule in schedules:
                schedule.step()
        assert target.param_groups[0]["lr"] is rate, name
        assert rate.item() == pytest.approx(plain.param_groups[0]["lr"]), name


@pytest.mark.parametrize("name", ["cosine", "timm/cosine", "one_cycle", "transformers/cosine"])
def test_the_lr_scale_of_a_group_multiplies_its_learning_rate(name):
    target = SGD([{"params": [torch.zeros(1)], "lr_scale": scale} for scale in (1.0, 0.25)], lr=0.1)
    schedule = create_schedule(target, name, 10)
    for _ in range(4):
        schedule.step()
        first, second = lrs(target)
        assert second == pytest.approx(first / 4)
        assert first > 0


def test_the_originals_issue_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("exponential", "transformers/constant"):
            options = {"gamma": 0.9} if name == "exponential" else {}
            create_schedule(optimizer(), name, 10, **options).step()
