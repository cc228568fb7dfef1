"""Values of the phased schedulers and the base classes: formulas, timm, transformers, resumed."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from pa_schedulers import (
    ConstantLrScheduler,
    CosineLrScheduler,
    LinearLrScheduler,
    PhasedLrScheduler,
    SchedulerBase,
    StatefulSchedulerBase,
)

ALL = pytest.mark.parametrize(
    "schedule", [CosineLrScheduler, LinearLrScheduler, ConstantLrScheduler]
)


def sgd(*lrs: float) -> SGD:
    """An optimizer with a parameter group for each learning rate."""
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs])


def run(optimizer: Optimizer, scheduler, updates: int) -> list[list[float]]:
    """Each group's learning rate at each update, and the one after the last update."""
    seen: list[list[float]] = [[] for _ in optimizer.param_groups]
    for update in range(updates + 1):
        for values, group in zip(seen, optimizer.param_groups, strict=True):
            values.append(group["lr"])
        if update < updates:
            optimizer.step()
            scheduler.step()
    return seen


@pytest.mark.parametrize("warmup", [0, 1, 9])
def test_the_values_equal_those_of_transformers(warmup):
    from transformers import (
        get_constant_schedule_with_warmup,
        get_cosine_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    theirs: dict[type[PhasedLrScheduler], Callable[..., Any]] = {
        CosineLrScheduler: partial(get_cosine_schedule_with_warmup, num_training_steps=50),
        LinearLrScheduler: partial(get_linear_schedule_with_warmup, num_training_steps=50),
        ConstantLrScheduler: get_constant_schedule_with_warmup,
    }
    for ours, reference in theirs.items():
        optimizer, expected = sgd(0.3, 0.05), sgd(0.3, 0.05)
        scheduler = ours(
            optimizer, 50, 1, lr_min=0.0, num_warmup_epochs=warmup, warmup_starting_lr=0.0
        )
        found = run(optimizer, scheduler, 50)
        wanted = run(expected, reference(expected, num_warmup_steps=warmup), 50)
        for got, want in zip(found, wanted, strict=True):
            assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("noise", [None, 20, (15, 35)])
@pytest.mark.parametrize("k", [1.0, 1.5])
def test_the_cosine_equals_that_of_timm(k, noise):
    from timm.scheduler import CosineLRScheduler

    target, optimizer = sgd(0.3, 0.05), sgd(0.3, 0.05)
    reference = CosineLRScheduler(
        target,
        t_initial=35,
        lr_min=1e-3,
        warmup_t=10,
        warmup_lr_init=1e-4,
        warmup_prefix=True,
        k_decay=k,
        noise_range_t=noise,
        noise_pct=0.5,
        noise_std=0.8,
        noise_seed=7,
        t_in_epochs=False,
    )
    expected: list[list[float]] = [[], []]
    for n in range(51):
        for values, group in zip(expected, target.param_groups, strict=True):
            values.append(group["lr"])
        reference.step_update(n + 1)
    scheduler = CosineLrScheduler(
        optimizer,
        total_num_epochs=50,
        num_update_steps_per_epoch=1,
        k_decay=k,
        lr_min=1e-3,
        num_warmup_epochs=10,
        warmup_starting_lr=1e-4,
        num_cooldown_epochs=5,
        noise_range=noise,
        noise_pct=0.5,
        noise_std=0.8,
        noise_seed=7,
    )
    for got, want in zip(run(optimizer, scheduler, 50), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("k", [1.0, 1.5])
def test_the_cosine_follows_its_formula_through_all_phases(k):
    optimizer = sgd(1.0, 0.01)
    scheduler = CosineLrScheduler(
        optimizer,
        total_num_epochs=4,
        num_update_steps_per_epoch=10,
        k_decay=k,
        min_lr_ratio=0.1,
        num_warmup_epochs=0.7,
        warmup_starting_lr_ratio=0.2,
        num_cooldown_epochs=0.5,
    )
    for peak, found in zip([1.0, 0.01], run(optimizer, scheduler, 40), strict=True):
        rise = [peak * (0.2 + 0.8 * n / 7) for n in range(7)]
        fall = [
            0.1 * peak + 0.9 * peak * math.cos(math.pi / 2 * (n / 28) ** k) ** 2 for n in range(28)
        ]
        assert found == pytest.approx(rise + fall + [0.1 * peak] * 6, rel=1e-12)


def test_absolute_values_are_the_same_for_all_groups():
    optimizer = sgd(1.0, 0.1)
    scheduler = LinearLrScheduler(
        optimizer, 10, 1, lr_min=0.01, num_warmup_epochs=2, warmup_starting_lr=0.05
    )
    first, second = run(optimizer, scheduler, 10)
    assert (first[0], second[0]) == (0.05, 0.05)
    assert (first[1], second[1]) == pytest.approx((0.525, 0.075))
    assert (first[10], second[10]) == (0.01, 0.01)


def test_the_learning_rate_stays_constant_after_the_end():
    optimizer = sgd(1.0)
    (values,) = run(optimizer, CosineLrScheduler(optimizer, 5, 1, lr_min=0.2), 9)
    assert values[5:] == [0.2] * 5


def test_fault_a9_the_cosine_ends_with_the_run_and_not_a_warmup_earlier():
    optimizer = sgd(1.0)
    scheduler = CosineLrScheduler(optimizer, 10, 10, lr_min=0.0, num_warmup_epochs=2)
    (values,) = run(optimizer, scheduler, 100)
    assert values[99] > 0
    assert values[100] == 0
    # no step down is steeper than the cosine's steepest
    drops = [a - b for a, b in itertools.pairwise(values)]
    assert max(drops) < math.pi / 2 / 80


@ALL
def test_fault_a10_a_warmup_from_a_ratio_never_exceeds_the_peak(schedule):
    optimizer = sgd(1.0)
    scheduler = schedule(optimizer, 10, 10, num_warmup_epochs=2, warmup_starting_lr_ratio=0.5)
    (values,) = run(optimizer, scheduler, 100)
    assert values[0] == 0.5
    assert max(values) == values[20] == 1.0


@ALL
def test_fault_a10_the_first_update_has_the_first_value_and_the_second_the_second(schedule):
    optimizer = sgd(1.0)
    scheduler = schedule(optimizer, 10, 1, num_warmup_epochs=4, warmup_starting_lr=0.0)
    (values,) = run(optimizer, scheduler, 4)
    assert values == [0, 0.25, 0.5, 0.75, 1]


class Staircase(StatefulSchedulerBase):
    """As written for pytorch-accelerated: sets attributes after ``super().__init__``."""

    def __init__(self, optimizer, every):
        super().__init__(optimizer)
        self.every = every

    def get_updated_values(self, num_updates):
        return [lr * 0.5 ** (1 + num_updates // self.every) for lr in self.base_lr_values]


def test_a_custom_scheduler_starts_with_its_first_value():
    optimizer = sgd(8.0)
    (values,) = run(optimizer, Staircase(optimizer, every=2), 4)
    assert values == [4, 4, 2, 2, 1]


@ALL
@pytest.mark.parametrize("at", [0, 3, 17, 30])
def test_a_scheduler_continues_from_its_state(schedule, at):
    def build() -> tuple[SGD, PhasedLrScheduler]:
        optimizer = sgd(0.3, 0.1)
        return optimizer, schedule(optimizer, 30, 1, num_warmup_epochs=8, min_lr_ratio=0.1)

    optimizer, scheduler = build()
    whole = run(optimizer, scheduler, 30)
    optimizer, scheduler = build()
    run(optimizer, scheduler, at)
    resumed_optimizer, resumed = build()
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    rest = run(resumed_optimizer, resumed, 30 - at)
    assert rest == [values[at:] for values in whole]


def test_fault_a7_the_count_of_a_custom_scheduler_is_in_its_state():
    optimizer = sgd(8.0)
    scheduler = Staircase(optimizer, every=2)
    run(optimizer, scheduler, 3)
    resumed_optimizer = sgd(8.0)
    resumed = Staircase(resumed_optimizer, every=5)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.step()
    assert resumed_optimizer.param_groups[0]["lr"] == 1


class Rising(SchedulerBase):
    def get_updated_values(self, num_updates):
        return None if num_updates == 1 else 0.1 * (num_updates + 1)


def test_any_field_of_the_parameter_groups_can_be_scheduled():
    optimizer = AdamW([torch.zeros(1)], lr=1.0, weight_decay=0.5)
    scheduler = Rising(optimizer, param_group_field="weight_decay")
    found = []
    for n in (1, 2):
        found.append(optimizer.param_groups[0]["weight_decay"])
        scheduler.step_update(n)
    found.append(optimizer.param_groups[0]["weight_decay"])
    assert found == pytest.approx([0.1, 0.1, 0.3])
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert scheduler.base_lr_values == [0.5]


def test_an_unknown_field_raises_with_its_name():
    with pytest.raises(KeyError, match=r"param_groups\[0\] has no 'betas'"):
        Rising(sgd(1.0), param_group_field="betas")


def test_a_group_added_during_a_run_starts_from_its_own_value():
    optimizer = sgd(1.0)
    scheduler = LinearLrScheduler(optimizer, 10, 1, lr_min=0.0)
    run(optimizer, scheduler, 4)
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 0.1})
    first, second = run(optimizer, scheduler, 2)
    assert first == pytest.approx([0.6, 0.5, 0.4])
    assert second == pytest.approx([0.1, 0.05, 0.04])
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.1, "weight_decay": 0.0})
    assert len(scheduler.state_dict()["base_lr_values"]) == 2


def test_a_learning_rate_in_a_tensor_is_filled_in_place():
    parameter = torch.zeros(1, requires_grad=True)
    lr = torch.tensor(1.0)
    optimizer = AdamW([parameter], lr=lr, capturable=False, foreach=False)
    scheduler = LinearLrScheduler(optimizer, 4, 1, lr_min=0.0)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.75
    assert scheduler.base_lr_values == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_min": -0.1}, "lr_min must not be negative"),
        ({"num_warmup_epochs": -1}, "num_warmup_epochs must not be negative"),
        ({"total_num_epochs": 0}, "at least one update"),
        ({"k_decay": 0.0}, "k_decay must be positive"),
        ({"noise_pct": 0.0}, "noise_pct must be positive"),
        ({"noise_std": -1.0}, "noise_std must not be negative"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        CosineLrScheduler(
            sgd(1.0), **{"total_num_epochs": 10, "num_update_steps_per_epoch": 1} | arguments
        )


# -- As in pytorch-accelerated --------------------------------------------------------------------


def peaks(n, warmup=5, start=1e-6):
    """The rate after `n` updates of a warm-up to 1."""
    return start + (1 - start) * n / warmup


@pytest.mark.parametrize(
    ("warmup", "cooldown", "right", "message"),
    [
        (5, 5, [peaks(n) for n in range(4)], "it ends within the warm-up"),
        (2, 5, [1e-6, (1 + 1e-6) / 2, 0.25, 0.25], "it has 2 updates of cool-down"),
    ],
)
def test_a_run_that_is_too_short_for_its_phases_cuts_them(warmup, cooldown, right, message):
    optimizer = sgd(1.0)
    with pytest.warns(UserWarning, match=message):
        scheduler = CosineLrScheduler(
            *(optimizer, 4, 1),
            min_lr_ratio=0.25,
            num_warmup_epochs=warmup,
            num_cooldown_epochs=cooldown,
        )
    assert run(optimizer, scheduler, 3) == [pytest.approx(right)]


STATE_OF_PYTORCH_ACCELERATED = {
    "total_iterations": 20,
    "lr_min_ratio": None,
    "lr_min": 0.0,
    "warmup_iterations": 0,
    "warmup_lr_init": 1e-6,
    "warmup_lr_ratio": None,
    "k_decay": 1.0,
    "num_cooldown_iterations": 0,
    "num_updates": 9,  # there, after 10 updates
}


def test_a_state_of_pytorch_accelerated_continues_at_its_place():
    optimizer = sgd(0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    scheduler = CosineLrScheduler(optimizer, 1, 20)
    optimizer.param_groups[0]["lr"] = 0.0578  # the optimizer's state has the previous value
    scheduler.load_state_dict(STATE_OF_PYTORCH_ACCELERATED)
    right = [0.05 * (1 + math.cos(math.pi * n / 20)) for n in range(10, 14)]
    assert run(optimizer, scheduler, 3) == [pytest.approx(right)]
    # And one of this scheduler has its keys, with its count.
    state = scheduler.state_dict()
    assert state["num_updates"] == 12
    assert STATE_OF_PYTORCH_ACCELERATED.keys() <= state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("num_updates"), "lacks the number of updates"),
        (lambda state: state.update(T_max=20), "another scheduler .* which has no T_max"),
    ],
)
def test_states_of_other_schedulers_change_nothing(change, message):
    state = dict(STATE_OF_PYTORCH_ACCELERATED)
    change(state)
    optimizer = sgd(1.0)
    scheduler = CosineLrScheduler(optimizer, 2, 20)
    before = dict(vars(scheduler))
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(state)
    assert vars(scheduler) == before
    linear = LinearLrScheduler(sgd(1.0), 2, 20)
    with pytest.raises(ValueError, match="LinearLrScheduler, which has no k_decay"):
        linear.load_state_dict(scheduler.state_dict())


def test_options_may_be_given_by_position():
    optimizer = sgd(1.0)
    scheduler = CosineLrScheduler.create_scheduler_fn(2, 10, 0.5, 0.125)(optimizer)
    assert (scheduler.total_iterations, scheduler.k_decay, scheduler.lr_min) == (20, 0.5, 0.125)
    with pytest.raises(TypeError, match="one of them twice"):
        CosineLrScheduler.create_scheduler_fn(2, 10, 0.5, k_decay=0.5)


class Late(StatefulSchedulerBase):
    """Keeps the rate at the first update, and halves it at each that follows."""

    def get_updated_values(self, num_updates):
        return None if num_updates == 0 else [lr / 2**num_updates for lr in self.base_lr_values]


def test_a_second_scheduler_starts_from_the_initial_value():
    optimizer = sgd(0.8)
    assert run(optimizer, Late(optimizer), 3) == [[0.8, 0.4, 0.2, 0.1]]
    assert run(optimizer, Late(optimizer), 2) == [[0.8, 0.4, 0.2]]


def test_an_attribute_that_is_set_too_late_is_named():
    class Outside(StatefulSchedulerBase):
        def get_updated_values(self, num_updates):
            return self.value

    with pytest.raises(AttributeError) as caught:
        Outside(sgd(1.0))
    assert "set in its constructor all attributes" in caught.value.__notes__[0]
