"""A schedule that doesn't end with the run is told of, with both lengths."""

import warnings
from functools import partial

import pytest
from torch.optim import lr_scheduler

from pa_core import TrainerCallback
from pa_schedulers import CosineLrScheduler, SchedulersPlugin, WSDLrScheduler
from tests.plugins.schedulers.runs import new_trainer, seen_in

EARLY = "{} updates long, and the run has 30: the run goes on after the schedule has ended"
NEVER = "{} updates long, and the run has 30: the run ends before the schedule does"


def told(create=None, **settings) -> str | None:
    """The warning of a run of 30 updates."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen_in(new_trainer(plugins=[SchedulersPlugin(**settings)]), create_scheduler_fn=create)
    messages = [str(warning.message) for warning in caught if "The schedule" in str(warning)]
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
        (partial(CosineLrScheduler, total_num_epochs=2, num_update_steps_per_epoch=10), EARLY),
        (partial(CosineLrScheduler, total_num_epochs=4, num_update_steps_per_epoch=10), NEVER),
        (partial(WSDLrScheduler, total_steps=20), EARLY),
        (partial(WSDLrScheduler, total_steps=40), NEVER),
        (partial(lr_scheduler.OneCycleLR, max_lr=1, total_steps=40), NEVER),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=20), EARLY),
        (partial(lr_scheduler.PolynomialLR, total_iters=20), EARLY),
        (partial(lr_scheduler.LinearLR, total_iters=40), NEVER),
        (partial(lr_scheduler.StepLR, step_size=40), NEVER),
        (partial(lr_scheduler.MultiStepLR, milestones=[10, 40]), NEVER),
        (partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=40), NEVER),
        (partial(timm_cosine, t_initial=20, t_in_epochs=False), EARLY),
        (partial(timm_cosine, t_initial=4), NEVER),
        (partial(huggingface, steps=20), EARLY),
        (partial(huggingface, steps=40), NEVER),
    ],
)
def test_a_schedule_of_code_that_ends_elsewhere_is_told_with_both_lengths(create, message):
    assert message.format(20 if message == EARLY else 40) in (told(create) or "")


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
def test_one_that_ends_with_the_run_or_has_done_its_part_before_is_not_told_of(create):
    assert told(create) is None


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
def test_one_that_the_settings_make_too_long_is_told_of(settings, length):
    assert NEVER.format(length) in (told(**settings) or "")


def test_one_cycle_holds_its_last_value_where_the_original_would_raise():
    plugin = SchedulersPlugin(name="one_cycle", total_steps=20)
    with pytest.warns(UserWarning, match="20 updates long, and the run has 30"):
        found = seen_in(new_trainer(plugins=[plugin]))
    assert found[19] == found[29] == pytest.approx([0.01 / 25e4, 0.001 / 25e4])


def test_a_resumed_run_of_another_length_is_told_of(tmp_path):
    class Save(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 13:
                trainer.save_training_state(tmp_path / "state")

    seen_in(new_trainer(Save(), plugins=[SchedulersPlugin(name="cosine")]))
    with (
        pytest.warns(UserWarning, match="total_iterations: 30 → 50"),
        pytest.warns(UserWarning, match="30 updates long, and the run has 50"),
    ):
        found = seen_in(
            new_trainer(plugins=[SchedulersPlugin(name="cosine")]),
            5,
            resume_from=tmp_path / "state",
        )
    assert found[-1] == [0, 0]  # what the state says holds
