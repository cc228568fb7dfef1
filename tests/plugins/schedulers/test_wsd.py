"""WSD: values, checkpoints, and continuation from them."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from pa_core import TrainerCallback, TrainerPlaceholderValues
from pa_schedulers import (
    CosineLrScheduler,
    SchedulersPlugin,
    WSDCheckpointCallback,
    WSDLrScheduler,
    estimate_checkpoint_steps,
)
from tests.plugins.schedulers.runs import RecordGroups, new_trainer, seen_in


def sgd(*lrs: float) -> SGD:
    return SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs])


def values(scheduler: WSDLrScheduler, updates: int) -> list[float]:
    """The first group's learning rates as the scheduler steps."""
    seen = [scheduler.optimizer.param_groups[0]["lr"]]
    for _ in range(updates):
        scheduler.step()
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
    return seen


def test_the_values_equal_those_of_timm():
    from timm.scheduler import WSDLRScheduler

    theirs, ours = sgd(0.5, 0.02), sgd(0.5, 0.02)
    reference = WSDLRScheduler(
        theirs, t_initial=90, decay_t=20, warmup_t=10, lr_min=0.0, t_in_epochs=False
    )
    scheduler = WSDLrScheduler(
        ours,
        total_steps=100,
        num_warmup_steps=10,
        decay_phase_ratio=0.2,
        lr_min=0.0,
        warmup_starting_lr=0.0,
    )
    for n in range(101):
        reference.step_update(n)
        scheduler.step_update(n)
        for want, got in zip(theirs.param_groups, ours.param_groups, strict=True):
            assert got["lr"] == pytest.approx(want["lr"], abs=1e-12), n


def test_the_values_equal_those_of_transformers_with_a_linear_warmup():
    from transformers import get_wsd_schedule

    target = sgd(0.5)
    reference = get_wsd_schedule(
        target, num_warmup_steps=5, num_decay_steps=4, num_training_steps=20, decay_type="1-sqrt"
    )
    scheduler = WSDLrScheduler(
        sgd(0.5),
        total_steps=20,
        num_warmup_steps=5,
        decay_phase_ratio=0.2,
        lr_min=0.0,
        warmup_starting_lr=0.0,
    )
    expected = []
    for _ in range(20):
        expected.append(target.param_groups[0]["lr"])
        target.step()
        reference.step()
    assert values(scheduler, 19) == pytest.approx(expected, abs=1e-12)


def test_the_inverse_decay_follows_its_formula():
    scheduler = WSDLrScheduler(
        sgd(0.3), total_steps=10, decay_phase_ratio=0.5, lr_min=0.1, use_inverse_sqrt_decay=False
    )
    decay = [0.3 / (t * (1 / 0.1) + (1 - t)) for t in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    assert values(scheduler, 10) == pytest.approx([0.3] * 5 + decay)
    assert values(scheduler, 3) == pytest.approx([0.03] * 4)


def test_each_period_has_its_decay_and_starts_at_the_peak():
    scheduler = WSDLrScheduler(
        sgd(1.0), total_steps=40, num_checkpoints=3, decay_phase_ratio=0.4, lr_min=0.0
    )
    found = values(scheduler, 40)
    for start, end in itertools.pairwise([0, 10, 20, 40]):
        decay = int(0.4 * (end - start))
        expected = [1.0] * (end - start - decay)
        expected += [1 - math.sqrt(i / decay) for i in range(decay)]
        assert found[start:end] == pytest.approx(expected), (start, end)
    assert found[40] == 0


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [200]), (2, [100, 200]), (3, [50, 100, 200]), (4, [25, 50, 100, 200])],
)
def test_fault_a8_checkpoints_double_up_to_the_end_of_the_run(count, expected):
    assert estimate_checkpoint_steps(200, count) == expected
    scheduler = WSDLrScheduler(sgd(1.0), total_steps=200, num_checkpoints=count)
    assert scheduler.get_checkpoint_steps() == expected
    # The learning rate is below the peak only in a decay.
    found = values(scheduler, 200)
    low = [n for n in range(200) if found[n] < 1]
    decays = scheduler.get_decay_info()
    assert low == [
        n for info in decays for n in range(info["pre_decay_step"] + 1, info["period_end"])
    ]


def test_fault_a7_a_resumed_scheduler_continues_from_its_state():
    def build():
        return WSDLrScheduler(sgd(1.0), total_steps=40, num_warmup_steps=8, num_checkpoints=2)

    scheduler = build()
    whole = values(scheduler, 40)
    for at in (3, 8, 15, 19, 20, 21, 38):
        interrupted, resumed = build(), build()
        values(interrupted, at)
        resumed.load_state_dict(interrupted.state_dict())
        assert resumed.get_current_step() == at
        resumed.step()
        assert values(resumed, 39 - at) == whole[at + 1 :]


def test_fault_b14_no_decay_is_valid_and_an_inverse_decay_to_0_raises():
    assert values(WSDLrScheduler(sgd(1.0), total_steps=5, decay_phase_ratio=0.0), 5) == [1.0] * 6
    with pytest.raises(ValueError, match="use_inverse_sqrt_decay=True, which reaches 0"):
        WSDLrScheduler(sgd(1.0), total_steps=5, lr_min=0.0, use_inverse_sqrt_decay=False)
    found = values(WSDLrScheduler(sgd(1.0), total_steps=4, decay_phase_ratio=1.0, lr_min=0.0), 4)
    assert found == pytest.approx([1 - math.sqrt(n / 4) for n in range(5)])


def test_phases_are_given_in_updates():
    scheduler = WSDLrScheduler(sgd(1.0), total_steps=40, num_checkpoints=2, decay_phase_ratio=0.1)
    first = {"period_start": 0, "period_end": 20, "decay_steps": 2, "pre_decay_step": 18}
    second = {"period_start": 20, "period_end": 40, "decay_steps": 2, "pre_decay_step": 38}
    assert scheduler.get_decay_info() == [first, second]
    assert [scheduler.get_phase_info(n) for n in (0, 20, 21, 99)] == [first, first, second, second]
    values(scheduler, 21)
    assert (scheduler.get_current_step(), scheduler.get_current_phase_info()) == (21, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either total_steps"),
        ({"total_steps": 5, "num_epochs": 1, "num_update_steps_per_epoch": 5}, "Give either"),
        ({"total_steps": 0}, "total_steps must be positive"),
        ({"total_steps": 5, "decay_phase_ratio": 1.5}, "decay_phase_ratio must be from 0 to 1"),
        ({"total_steps": 5, "lr_min": -1}, "from 0 to 1"),
        ({"total_steps": 5, "warmup_starting_lr": 2}, "above the greatest"),
        ({"total_steps": 5, "num_checkpoints": 4}, "too few for 4 checkpoints"),
        ({"total_steps": 5, "num_checkpoints": 0}, "too few for 0 checkpoints"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        WSDLrScheduler(sgd(1.0), **arguments)


def test_a_warm_up_that_reaches_into_the_decay_comes_first():
    options = {"total_steps": 5, "decay_phase_ratio": 0.6, "warmup_starting_lr": 0.0, "lr_min": 0.0}
    with pytest.warns(UserWarning, match="starts after 2 of 5 updates, within the warm-up of 4"):
        scheduler = WSDLrScheduler(sgd(1.0), num_warmup_steps=4, **options)
    right = [0.0, 0.25, 0.5, 0.75, 1 - math.sqrt(2 / 3), 0.0]
    assert values(scheduler, 5) == pytest.approx(right)


def test_a_continuation_takes_states_of_pytorch_accelerated():
    scheduler = WSDLrScheduler(sgd(1.0), total_steps=10, is_continuation_from_checkpoint=True)
    scheduler.step()
    scheduler.load_state_dict({"is_continuation_from_checkpoint": True, "total_steps": 99})
    assert (scheduler.get_current_step(), scheduler.total_steps) == (0, 10)
    scheduler.load_state_dict({"base_lr_values": [0.5], "total_steps": 99})
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.5
    plain = WSDLrScheduler(sgd(1.0), total_steps=10)
    with pytest.raises(ValueError, match="lacks the number of updates"):
        plain.load_state_dict({"base_lr_values": [0.5], "total_steps": 99})


def test_the_step_before_the_latest_decay_is_known():
    scheduler = WSDLrScheduler(sgd(1.0), total_steps=40, num_checkpoints=2, decay_phase_ratio=0.1)
    found = []
    for _ in range(40):
        found.append(scheduler.previous_checkpoint_step)
        scheduler.step()
    assert found == [None] * 18 + [18] * 20 + [38] * 2


# -- In runs --------------------------------------------------------------------------------------


def wsd_run(folder: Path, *more: object, epochs=4, plugins=(), resume_from=None, **options):
    """A run with checkpoints and 10 updates per epoch, and its first group's learning rates."""
    trainer = new_trainer(WSDCheckpointCallback(folder), *more, plugins=plugins)
    options = {"lr_min": 0.0, "decay_phase_ratio": 0.4, "num_checkpoints": 2} | options
    create = WSDLrScheduler.create_scheduler_fn(**options)
    found = seen_in(trainer, epochs, create_scheduler_fn=create, resume_from=resume_from)
    return trainer, [rate for rate, _ in found]


def test_create_scheduler_fn_fills_in_the_length_in_updates(tmp_path):
    _, found = wsd_run(tmp_path, num_warmup_epochs=0.5, num_checkpoints=1)
    assert len(found) == 40
    assert found[:6] == pytest.approx([1e-6 + n / 5 * (0.01 - 1e-6) for n in range(6)])
    assert found[5:25] == [0.01] * 20
    assert found[39] == pytest.approx(0.01 * (1 - math.sqrt(15 / 16)))


def test_fault_b12_lengths_may_be_calculated_with_placeholders():
    epochs, updates = (
        TrainerPlaceholderValues.NUM_EPOCHS,
        TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
    )
    create = CosineLrScheduler.create_scheduler_fn(
        total_num_epochs=2 * epochs + 1 - epochs,
        num_update_steps_per_epoch=updates * 1,
        num_warmup_epochs=epochs / 4,
        lr_min=0.0,
        warmup_starting_lr=0.0,
    )
    trainer = new_trainer(plugins=())
    found = [rate for rate, _ in seen_in(trainer, 4, create_scheduler_fn=create)]
    assert found[:11] == pytest.approx([0.01 * n / 10 for n in range(11)])
    assert found[30] == pytest.approx(0.005)  # half of the 40 updates of its decay, of 5 epochs
    wsd = WSDLrScheduler.create_scheduler_fn(total_num_epochs=1 + epochs, lr_min=0.0)
    found = [rate for rate, _ in seen_in(new_trainer(plugins=()), 4, create_scheduler_fn=wsd)]
    assert found[1:] == [0.01] * 39


def test_states_before_and_files_after_each_decay_are_saved(tmp_path):
    _, whole = wsd_run(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "checkpoint_12_wsd_pre_decay",
        "checkpoint_20_wsd_post_decay.pt",
        "checkpoint_32_wsd_pre_decay",
        "checkpoint_40_wsd_post_decay.pt",
    }
    content = torch.load(tmp_path / "checkpoint_20_wsd_post_decay.pt", weights_only=True)
    assert content["step"] == 20
    assert content["checkpoint_type"] == "wsd_post_decay"
    assert content["total_steps"] == 40
    # The state before a decay is a training state of the run: resuming it repeats the run.
    for step in (12, 32):
        state = tmp_path / f"checkpoint_{step}_wsd_pre_decay"
        _, rest = wsd_run(tmp_path / f"again_{step}", resume_from=state)
        assert rest == whole[step:]
        again = {path.name for path in (tmp_path / f"again_{step}").iterdir()}
        assert again == {name for name in names if int(name.split("_")[1]) > step}


def test_accumulated_micro_batches_save_no_state_twice(tmp_path):
    saved = []

    class Saves(TrainerCallback):
        def on_save_training_state(self, trainer, state_dir):
            saved.append(trainer.updates)

    trainer = new_trainer(WSDCheckpointCallback(tmp_path), Saves(), plugins=())
    create = WSDLrScheduler.create_scheduler_fn(lr_min=0.0, decay_phase_ratio=0.5)
    found = seen_in(trainer, 2, create_scheduler_fn=create, gradient_accumulation_steps=3)
    assert len(found) == 8
    assert saved == [4]
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint_4_wsd_pre_decay",
        "checkpoint_8_wsd_post_decay.pt",
    }


def test_the_last_decay_is_saved_if_updates_were_skipped(tmp_path):
    class Skip(TrainerCallback):
        def on_optimizer_step_start(self, trainer):
            if trainer.position.attempts == 3:  # as a gradient scaler does
                trainer.control.skip_update()

    trainer, _ = wsd_run(tmp_path, Skip(), num_checkpoints=1)
    assert trainer.scheduler.get_current_step() == 39
    assert (tmp_path / "checkpoint_40_wsd_post_decay.pt").exists()


def continuation(folder: Path, checkpoint: Path, plugins=()):
    recorder = RecordGroups()
    trainer = new_trainer(
        WSDCheckpointCallback(folder, initial_checkpoint=checkpoint), recorder, plugins=plugins
    )
    start: dict = {}

    class First:
        def on_training_run_start(self, trainer):
            start["weights"] = {k: v.clone() for k, v in trainer.get_model().state_dict().items()}
            start["momentum"] = len(trainer.optimizer.state)

    trainer.callback_handler.plugins.register(_as_plugin(First()), "first")
    create = WSDLrScheduler.create_scheduler_fn(
        lr_min=0.0,
        decay_phase_ratio=0.4,
        num_warmup_epochs=0.5,
        is_continuation_from_checkpoint=True,
    )
    seen_in(trainer, 2, create_scheduler_fn=create)
    return trainer, [rate for rate, _ in recorder.seen], start


def _as_plugin(instance):
    from pa_core import hookimpl

    cls = type(instance)
    cls.on_training_run_start = hookimpl(cls.on_training_run_start)
    return instance


@pytest.mark.parametrize(
    "checkpoint", ["checkpoint_32_wsd_pre_decay", "checkpoint_40_wsd_post_decay.pt"]
)
def test_a_run_continues_from_a_checkpoint_with_its_own_stable_phase(tmp_path, checkpoint):
    first, _ = wsd_run(tmp_path)
    trainer, found, start = continuation(tmp_path / "on", tmp_path / checkpoint)
    assert found[:12] == [0.01] * 12  # no warm-up, and the peak of the earlier run
    assert found[12:] == pytest.approx([0.01 * (1 - math.sqrt(n / 8)) for n in range(8)])
    assert trainer.updates == 20
    assert len(trainer.run_history.get_metric_values("train_loss_epoch")) == 2
    assert {path.name for path in (tmp_path / "on").iterdir()} == {
        "checkpoint_12_wsd_pre_decay",
        "checkpoint_20_wsd_post_decay.pt",
    }
    if checkpoint.endswith(".pt"):
        for name, value in first.get_model().state_dict().items():
            assert torch.equal(start["weights"][name], value)
    assert not torch.equal(start["weights"]["0.weight"], new_trainer().get_model()[0].weight)
    # A continuation of the continuation gives the same schedule.
    again, rates, _ = continuation(tmp_path / "2", tmp_path / "on" / "checkpoint_12_wsd_pre_decay")
    assert again.updates == 20
    assert rates == found


def test_an_interrupted_continuation_is_resumed_and_not_restarted(tmp_path):
    wsd_run(tmp_path)
    checkpoint = tmp_path / "checkpoint_32_wsd_pre_decay"
    _, whole, _ = continuation(tmp_path / "on", checkpoint)
    gone = tmp_path / "removed_since"  # not read again
    trainer = new_trainer(
        WSDCheckpointCallback(tmp_path / "3", initial_checkpoint=gone), plugins=()
    )
    create = WSDLrScheduler.create_scheduler_fn(
        lr_min=0.0,
        decay_phase_ratio=0.4,
        num_warmup_epochs=0.5,
        is_continuation_from_checkpoint=True,
    )
    found = seen_in(
        trainer,
        2,
        create_scheduler_fn=create,
        resume_from=tmp_path / "on" / "checkpoint_12_wsd_pre_decay",
    )
    assert [rate for rate, _ in found] == whole[12:]


def test_settings_can_enable_the_callback(tmp_path):
    text = f"""
        [tool.pa-core]
        plugins = ["schedulers", "wsd_checkpoint"]
        [tool.pa-core.schedulers]
        name = "wsd"
        warmup = "10%"
        decay_phase_ratio = 0.2
        [tool.pa-core.schedulers.weight_decay]
        name = "linear"
        [tool.pa-core.wsd_checkpoint]
        save_dir = "{tmp_path}"
        save_optimizer = false
    """
    trainer = new_trainer(settings=text, folder=tmp_path)
    found = [rate for rate, _ in seen_in(trainer, 2)]
    assert found[:3] == pytest.approx([0, 0.005, 0.01])
    assert found[16:] == pytest.approx([0.01 * (1 - math.sqrt(n / 4)) for n in range(4)])
    content = torch.load(tmp_path / "checkpoint_20_wsd_post_decay.pt", weights_only=True)
    assert "optimizer_state_dict" not in content


def test_a_run_without_such_a_scheduler_raises_before_training(tmp_path):
    trainer = new_trainer(
        WSDCheckpointCallback(tmp_path), plugins=[SchedulersPlugin(name="cosine")]
    )
    with pytest.raises(ValueError, match="needs a scheduler with get_checkpoint_steps"):
        seen_in(trainer)
    callback = WSDCheckpointCallback(tmp_path, initial_checkpoint=tmp_path / "nowhere")
    trainer = new_trainer(callback, plugins=[SchedulersPlugin(name="wsd")])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        seen_in(trainer)
