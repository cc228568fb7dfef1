"""Schedulers by name, from settings and from code, in real runs."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.errors import PluginNotFoundError, SettingsError
from pa_schedulers import CosineLrScheduler, LinearLrScheduler, SchedulersPlugin


class Rates(TrainerCallback):
    """Records the learning rate of each update."""

    def __init__(self):
        self.seen = []

    def on_optimizer_step_start(self, trainer):
        self.seen.append(trainer.optimizer.param_groups[0]["lr"])


def rates(
    *, settings: str | None = None, plugins=None, folder: Path | None = None, epochs=3, **train
):
    """Learning rates of a run with 10 updates per epoch, and the one after the last update."""
    file = None
    if settings is not None:
        assert folder is not None
        file = folder / "pyproject.toml"
        file.write_text(settings)
    model, callback = nn.Linear(2, 1), Rates()
    trainer = Trainer(
        model,
        nn.MSELoss(),
        SGD(model.parameters(), lr=1.0),
        callbacks=[callback],
        plugins=plugins,
        settings=file,
    )
    data = TensorDataset(torch.randn(40, 2), torch.randn(40, 1))
    trainer.train(data, num_epochs=epochs, per_device_batch_size=4, **train)
    return [*callback.seen, trainer.optimizer.param_groups[0]["lr"]]


def cosine(warmup: int, total: int, *, start: float = 0.0, end: float = 0.0) -> list[float]:
    """An independent implementation, for a peak of 1."""
    rise = [start + (1 - start) * n / warmup for n in range(warmup)]
    rest = total - warmup
    return rise + [end + (1 - end) * math.cos(math.pi * n / rest / 2) ** 2 for n in range(rest + 1)]


def test_settings_alone_give_every_run_a_cosine_schedule_with_warmup(tmp_path):
    found = rates(
        folder=tmp_path,
        settings="""
            [tool.pa-core]
            plugins = ["schedulers"]
            [tool.pa-core.schedulers]
            name = "cosine"
            warmup = 0.2
            warmup_starting_lr_ratio = 0.1
            min_lr_ratio = 0.05
        """,
    )
    assert len(found) == 31
    assert found == pytest.approx(cosine(6, 30, start=0.1, end=0.05), abs=1e-12)


@pytest.mark.parametrize("warmup", [6, 0.2, "20%", "6 updates", "0.6 epochs"])
def test_a_warmup_can_be_given_in_any_unit(warmup):
    found = rates(plugins=[SchedulersPlugin(name="cosine", warmup=warmup)])
    assert found == pytest.approx(cosine(6, 30), abs=1e-12)


def test_the_options_apply_to_a_scheduler_named_in_code():
    found = rates(plugins=[SchedulersPlugin(warmup=5)], create_scheduler_fn="linear")
    assert found == pytest.approx(
        [n / 5 for n in range(5)] + [1 - n / 25 for n in range(26)], abs=1e-12
    )


def test_the_options_apply_only_to_the_scheduler_that_the_settings_name():
    plugin = SchedulersPlugin(name="step", step_size=5)
    found = rates(plugins=[plugin], create_scheduler_fn="linear")
    assert found == pytest.approx([1 - n / 30 for n in range(31)], abs=1e-12)
    found = rates(plugins=[plugin], create_scheduler_fn="step")
    assert found[:11] == pytest.approx([1] * 5 + [0.1] * 5 + [0.01])


def test_a_scheduler_passed_in_code_overrides_the_settings():
    def halve(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)

    found = rates(plugins=[SchedulersPlugin(name="cosine")], create_scheduler_fn=halve)
    assert found == [1.0] * 10 + [0.5] * 10 + [0.25] * 10 + [0.125]


def test_without_a_name_the_plugin_leaves_runs_alone():
    assert rates(plugins=[SchedulersPlugin()]) == [1.0] * 31


def test_constant_is_the_peak_after_its_warmup():
    found = rates(plugins=[SchedulersPlugin(name="constant", warmup=4)])
    assert found == [0, 0.25, 0.5, 0.75] + [1.0] * 27


def test_noise_is_added_in_its_range_only():
    calm = rates(plugins=[SchedulersPlugin(name="linear")])
    plugin = SchedulersPlugin(name="linear", noise_range=["1 epoch", 0.5], noise_pct=0.2)
    noisy = rates(plugins=[plugin])
    assert noisy[:10] == calm[:10]
    assert all(got != want for got, want in zip(noisy[10:15], calm[10:15], strict=True))
    assert noisy[10:15] == pytest.approx(calm[10:15], rel=0.2)
    assert noisy[15:] == calm[15:]


def test_the_cooldown_stays_at_the_minimum():
    found = rates(plugins=[SchedulersPlugin(name="linear", cooldown="1 epoch", min_lr_ratio=0.1)])
    assert found == pytest.approx([1 - 0.9 * n / 20 for n in range(20)] + [0.1] * 11)


def test_fault_a11_the_schedule_counts_updates_and_not_micro_batches():
    plugins = [SchedulersPlugin(name="cosine")]
    found = rates(plugins=plugins, gradient_accumulation_steps=4)  # 3 updates per epoch
    assert found == pytest.approx(cosine(0, 9), abs=1e-12)


@pytest.mark.parametrize(
    ("length", "updates"),
    [({"epochs": "17 updates"}, 17), ({"max_num_train_steps": 13}, 13)],
)
def test_fault_a14_the_schedule_ends_exactly_with_a_run_that_ends_within_an_epoch(length, updates):
    expected = cosine(0, updates)
    found = rates(plugins=[SchedulersPlugin(name="cosine")], **length)
    assert found == pytest.approx(expected, abs=1e-12)
    create = CosineLrScheduler.create_scheduler_fn(lr_min=0.0)
    assert rates(plugins=(), create_scheduler_fn=create, **length) == pytest.approx(
        expected, abs=1e-12
    )


def test_a_warmup_in_epochs_counts_full_epochs_in_a_run_that_ends_within_one():
    found = rates(plugins=[SchedulersPlugin(name="cosine", warmup="1 epoch")], epochs="17 updates")
    assert found == pytest.approx(cosine(10, 17), abs=1e-12)


def test_a_scheduler_for_a_run_of_unknown_length_raises():
    with pytest.raises(ValueError, match="the run's length is needed"):
        rates(plugins=[SchedulersPlugin(name="cosine")], epochs="1 second")


def test_create_scheduler_fn_of_a_class_fills_in_the_length_of_the_run():
    create = LinearLrScheduler.create_scheduler_fn(
        lr_min=0.0, num_warmup_epochs=1, warmup_starting_lr=0.0
    )
    found = rates(plugins=(), create_scheduler_fn=create)
    assert found == pytest.approx([n / 10 for n in range(10)] + [1 - n / 20 for n in range(21)])


def test_an_unknown_name_raises_with_the_closest_name():
    with pytest.raises(PluginNotFoundError, match="cosine"):
        rates(plugins=[SchedulersPlugin(name="cosin")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup": 5.0},
        {"warmup": True},
        {"warmup": -1},
        {"warmup": "soon"},
        {"warmup": "15 minutes"},
        {"cooldown": "100 samples"},
        {"nmae": "cosine"},
        {"weight_decay": {"warmup": 5}},
    ],
)
def test_invalid_settings_are_rejected(wrong):
    with pytest.raises(SettingsError):
        SchedulersPlugin(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "constant", "min_lr_ratio": 0.1}, "'constant' has no option 'min_lr_ratio'"),
        ({"name": "linear", "min_lr_ration": 0.1}, "Did you mean 'min_lr_ratio'"),
        ({"name": "linear", "k_decay": 2}, "'linear' has no option 'k_decay'"),
        ({"name": "step", "step_siez": 2}, "Did you mean 'step_size'"),
        ({"name": "step", "warmup": 2}, "'step' has no option 'warmup'"),
        ({"name": "step"}, "requires step_size"),
        ({"name": "step", "step_size": "soon"}, "'soon' is not a valid duration"),
        ({"name": "timm/step", "cooldown": 2}, "'timm/step' has no end, so it can't have"),
        ({"name": "timm/cosine", "warmup": 2, "warmup_epochs": 1}, "has both warmup and warmup_ep"),
        ({"name": "timm/cosine", "cooldown": 30}, "longer than the run"),
        ({"name": "timm/cosine", "t_initial": 2}, "has no option 't_initial'"),
        ({"name": "transformers/linear", "num_cycles": 2}, "has no option 'num_cycles'"),
        ({"name": "cosine", "k_decay": 0}, "k_decay must be positive"),
        ({"name": "cosine", "min_lr_ratio": -1}, "min_lr_ratio must not be negative"),
    ],
)
def test_options_that_do_not_fit_the_scheduler_raise_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        rates(plugins=[SchedulersPlugin(**options)])


def two_optimizers():
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    optimizers = [
        SGD(model[0].parameters(), lr=1.0),
        SGD([{"params": model[1].parameters(), "name": "head"}], lr=0.5),
    ]
    return model, optimizers


def final_rates(optimizers, model, plugin, schedulers=None):
    data = TensorDataset(torch.randn(40, 2), torch.randn(40, 1))
    trainer = Trainer(model, nn.MSELoss(), optimizers, callbacks=(), plugins=[plugin])
    trainer.train(data, 2, data, per_device_batch_size=4, create_scheduler_fn=schedulers)
    return [group["lr"] for group in trainer.optimizer.param_groups]


def test_each_of_several_optimizers_has_a_schedule_of_the_run():
    for given in ("cosine", ["cosine", "cosine"]):
        model, optimizers = two_optimizers()
        assert final_rates(optimizers, model, SchedulersPlugin(), given) == pytest.approx([0, 0])
    plugin = SchedulersPlugin(name="cosine", groups={"head": {"name": "constant"}})
    model, optimizers = two_optimizers()
    assert final_rates(optimizers, model, plugin) == pytest.approx([0, 0.5])


def test_a_ready_plateau_of_one_of_them_follows_its_metric():
    model, (first, second) = two_optimizers()
    plateau = ReduceLROnPlateau(second, patience=0, factor=0.5, threshold=1e9)  # never better
    plugin = SchedulersPlugin()
    found = final_rates([first, second], model, plugin, ["linear", plateau])
    assert found == pytest.approx([0, 0.125])
