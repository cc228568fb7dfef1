"""Warnings for a scheduler whose length differs from the run's."""

import warnings
from functools import partial

import pytest
from torch.optim import lr_scheduler

from pa_core import TrainerCallback
from pa_schedulers import CosineLrScheduler, SchedulersPlugin, WSDLrScheduler
from tests.plugins.schedulers.runs import new_trainer, seen_in

TOO_SHORT = "{} updates long, but the run has 30: the run continues after the schedule has ended"
TOO_LONG = "{} updates long, but the run has 30: the schedule won't complete"


def warning_of_run(create=None, **settings) -> str | None:
    """The warning of a run of 30 updates, if there is one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen_in(new_trainer(plugins=[SchedulersPlugin(**settings)]), create_scheduler_fn=create)
    messages = [str(warning.message) for warning in caught if "The scheduler" in str(warning)]
    assert len(messages) <= 1
    return messages[0] if messages else None


def timm_cosine(optimizer, **options):
    from timm.scheduler import CosineLRScheduler

    return CosineLRScheduler(optimizer, **options)


def huggingface(optimizer, steps):
    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, 2, steps)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (partial(CosineLrScheduler, total_num_epochs=2, num_update_steps_per_epoch=10), TOO_SHORT),
        (partial(CosineLrScheduler, total_num_epochs=4, num_update_steps_per_epoch=10), TOO_LONG),
        (partial(WSDLrScheduler, total_steps=20), TOO_SHORT),
        (partial(WSDLrScheduler, total_steps=40), TOO_LONG),
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=40), TOO_LONG),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=20), TOO_SHORT),
        (partial(lr_scheduler.PolynomialLR, total_iters=20), TOO_SHORT),
        (partial(lr_scheduler.LinearLR, total_iters=40), TOO_LONG),
        (partial(lr_scheduler.StepLR, step_size=40), TOO_LONG),
        (partial(lr_scheduler.MultiStepLR, milestones=[10, 40]), TOO_LONG),
        (partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=40), TOO_LONG),
        (partial(timm_cosine, t_initial=20, t_in_epochs=False), TOO_SHORT),
        (partial(timm_cosine, t_initial=4), TOO_LONG),
        (partial(huggingface, steps=20), TOO_SHORT),
        (partial(huggingface, steps=40), TOO_LONG),
    ],
)
def test_a_scheduler_from_code_of_another_length_warns_with_both_lengths(create, message):
    assert message.format(20 if message == TOO_SHORT else 40) in (warning_of_run(create) or "")


@pytest.mark.parametrize(
    "create",
    [
        None,
        CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.33),
        WSDLrScheduler.create_scheduler_fn(),
        partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=30),
        partial(lr_scheduler.LinearLR, total_iters=5),
        partial(lr_scheduler.StepLR, step_size=5),
        partial(timm_cosine, t_initial=3),
        partial(huggingface, steps=30),
    ],
)
def test_one_that_ends_with_the_run_or_may_end_before_it_does_not_warn(create):
    assert warning_of_run(create) is None


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"name": "one_cycle", "total_steps": "4 epochs"}, 40),
        ({"name": "one_cycle", "total_steps": 4, "interval": "epoch"}, 40),
        ({"name": "multi_step", "milestones": ["50%", "4 epochs"]}, 40),
        ({"name": "timm/cosine", "num_epochs": 4}, 40),
        ({"name": "transformers/linear", "num_training_steps": 40}, 40),
        ({"weight_decay": {"name": "polynomial", "total_iters": 40}}, 40),
    ],
)
def test_one_that_the_settings_make_too_long_warns(settings, length):
    assert TOO_LONG.format(length) in (warning_of_run(**settings) or "")


def test_one_cycle_keeps_its_last_value_where_the_original_would_raise():
    plugin = SchedulersPlugin(name="one_cycle", total_steps=20)
    with pytest.warns(UserWarning, match="20 updates long, but the run has 30"):
        found = seen_in(new_trainer(plugins=[plugin]))
    assert found[19] == found[29] == pytest.approx([0.01 / 25e4, 0.001 / 25e4])


def test_a_resumed_run_of_another_length_warns_of_a_scheduler_of_its_own_length(tmp_path):
    class Save(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 13:
                trainer.save_training_state(tmp_path / "state")

    plugin = SchedulersPlugin(name="cosine_annealing", T_max=30)
    seen_in(new_trainer(Save(), plugins=[plugin]))
    with pytest.warns(UserWarning, match="30 updates long, but the run has 50"):
        found = seen_in(new_trainer(plugins=[plugin]), 5, resume_from=tmp_path / "state")
    assert found[30 - 13] == pytest.approx([0, 0])
