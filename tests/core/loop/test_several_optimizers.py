"""Several optimizers are stepped, clipped, scheduled and saved together, or one at a time."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from pa_core import Trainer, TrainerCallback, TrainerPlaceholderValues, hookimpl
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.builtins.speedups import SpeedupsCallback
from pa_core.errors import TrainingStateError
from tests.builtin_trainer import Interrupts
from tests.core.engine.test_optimizer_modes import ScheduleFree
from tests.core.engine.test_precision import scaled_on_the_cpu
from tests.helpers import assert_identical, largest_difference, tiny_data, tiny_model, weights_of

SAMPLES, BATCH = 24, 4


def sgd(model):
    return torch.optim.SGD(model[0].parameters(), lr=0.2, momentum=0.9)


def adam(model):
    return torch.optim.Adam([{"params": [p]} for p in model[2].parameters()], lr=0.01)


def make(*plugins, model=None, optimizers=(sgd, adam), **options):
    model = tiny_model() if model is None else model
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        [create(model) for create in optimizers],
        callbacks=plugins,
        plugins=(),
        **options,
    )


def train(trainer, epochs=2, **options):
    options = {"train_dataloader_kwargs": {"shuffle": False}, **options}
    trainer.train(tiny_data(SAMPLES), epochs, per_device_batch_size=BATCH, **options)
    return trainer


def by_hand(epochs=2, accumulation=1, clip=None, schedule=None, turns=None):
    """The loop by hand; `turns` has the positions of the optimizers that each update steps."""
    model = tiny_model()
    optimizers = [sgd(model), adam(model)]
    schedulers = [schedule(one) for one in optimizers] if schedule else []
    x, y = tiny_data(SAMPLES).tensors
    size = BATCH * accumulation
    for update, part in enumerate(epochs * list(range(0, SAMPLES, size))):
        nn.functional.cross_entropy(model(x[part : part + size]), y[part : part + size]).backward()
        stepped = range(2) if turns is None else [turns[update % len(turns)]]
        for number in {0, 1} - set(stepped):
            optimizers[number].zero_grad()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for number in stepped:
            optimizers[number].step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler before its optimizer's first step
            for scheduler in schedulers:
                scheduler.step()
        for one in optimizers:
            one.zero_grad()
    return model.state_dict()


def halves(optimizer):
    return StepLR(optimizer, 3, gamma=0.5)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("turns", [None, (0, 1), (0, 0, 1)])
def test_they_are_the_loop_by_hand(accumulation, turns):
    norms = []

    class Takes(TrainerCallback):
        def on_train_step_start(self, trainer):
            if turns is not None:
                trainer.update_only(turns[trainer.position.attempts % len(turns)])

        def on_optimizer_step_start(self, trainer):
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))

    options = {"gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.05}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = train(make(Takes()), create_scheduler_fn=halves, **options)
    hand = by_hand(accumulation=accumulation, clip=0.05, schedule=halves, turns=turns)
    assert largest_difference(weights_of(trainer), hand) < 1e-6
    assert norms == pytest.approx([0.05] * (12 // accumulation), rel=1e-4)
    assert trainer.updates == 12 // accumulation
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    factor = 0.5 ** (trainer.updates // 3)
    assert rates == pytest.approx([0.2 * factor, 0.01 * factor, 0.01 * factor])
    assert [one.last_epoch for one in trainer.scheduler.schedulers] == 2 * [trainer.updates]


def test_a_turn_is_for_one_update_and_is_chosen_within_its_steps():
    trainer = make(optimizers=(sgd,))
    with pytest.raises(RuntimeError, match="hook of a training step"):
        trainer.update_only(0)

    def run(event, *calls, accumulation=1):
        def choose(self, trainer, **arguments):
            step = arguments.get("step", 0)
            if trainer.updates < 2:
                for chosen in calls[step % accumulation] if accumulation > 1 else calls:
                    trainer.update_only(*chosen)

        plugin = type("Chooses", (TrainerCallback,), {event: choose})()
        return train(make(plugin), gradient_accumulation_steps=accumulation)

    for event in ("on_optimizer_step_end", "on_train_step_end", "on_gradients_ready"):
        with pytest.raises(RuntimeError, match="from on_train_step_start to on_backward_end"):
            run(event, [0])
    with pytest.raises(ValueError, match=r"for the optimizers \[0\] and for \[1\] in the same"):
        run("on_backward_end", [[0]], [[1]], accumulation=2)
    with pytest.raises(ValueError, match="2 is none of the Trainer's optimizers: .* from 0 to 1"):
        run("on_train_step_start", [2])
    with pytest.raises(ValueError, match="at least one"):
        run("on_train_step_start", [])
    same = run("on_train_step_start", [0], [0], [0])
    assert largest_difference(weights_of(same), weights_of(train(make()))) > 0
    assert_identical(weights_of(run("on_backward_start", [0, 1])), weights_of(train(make())))


class Turns:
    """A subclass' loss method or a plugin's: which one is updated depends on the update."""

    @hookimpl
    def calculate_train_batch_loss(self, trainer, batch):
        trainer.update_only(trainer.optimizers[trainer.position.attempts % 2])
        outputs = trainer.model(batch[0])
        loss = trainer.loss_func(outputs, batch[1])
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(batch[0])}


class TwoPasses(Turns):
    needs_recompute = True

    @hookimpl
    def run_update(self, trainer):
        before = [p.grad is None for p in trainer.model.parameters()]
        trainer.recompute_gradients()
        assert before == [p.grad is None for p in trainer.model.parameters()]
        assert 0 < sum(before) < len(before)
        trainer.clip_gradients()
        return trainer.apply_update()


def test_recomputed_gradients_of_the_others_are_discarded_too():
    assert_identical(weights_of(train(make(TwoPasses()))), weights_of(train(make(Turns()))))


@pytest.mark.parametrize("turns", [(), (Turns(),)])
@pytest.mark.parametrize("at", [3, 7])
def test_a_run_resumes_bit_for_bit_and_every_optimizer_is_saved(at, turns, tmp_path):
    schedule = partial(OneCycleLR, max_lr=0.3, total_steps=TrainerPlaceholderValues.NUM_UPDATES + 1)
    options = {"create_scheduler_fn": schedule}
    whole = train(make(*turns), **options)
    states = SaveTrainingStateCallback(tmp_path, 1, 1, save_at_end=False)
    with pytest.raises(KeyboardInterrupt):
        train(make(*turns, states, Interrupts(at)), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = train(make(*turns, states), resume_from=tmp_path, strict=True, **options)
    assert_identical(weights_of(resumed), weights_of(whole))
    for one, other in zip(whole.optimizers, resumed.optimizers, strict=True):
        first, second = one.state_dict(), other.state_dict()
        assert first["param_groups"] == second["param_groups"]
        assert first["state"].keys() == second["state"].keys() == set(range(2))
        for entry, restored in zip(first["state"].values(), second["state"].values(), strict=True):
            assert_identical(entry, restored)
    swapped = make(states, optimizers=(adam, sgd))
    single = make(states, optimizers=(lambda m: torch.optim.SGD(m.parameters(), 0.1),))
    with pytest.raises(TrainingStateError, match="can't be loaded into another"):
        train(swapped, resume_from=tmp_path, **options)
    with pytest.raises(TrainingStateError, match="can't be loaded into another"):
        train(single, resume_from=tmp_path)


def test_a_checkpoint_file_holds_each_and_the_wrong_number_is_refused(tmp_path):
    trainer = train(make(), create_scheduler_fn=halves)
    trainer.save_checkpoint(tmp_path / "c.pt")
    fresh = train(make(), 1, create_scheduler_fn=halves)
    fresh.load_checkpoint(tmp_path / "c.pt")
    assert fresh.optimizers[1].state_dict()["state"][0]["step"] == 12
    assert fresh.scheduler.get_last_lr() == trainer.scheduler.get_last_lr()
    single = make(optimizers=(sgd,))
    single.save_checkpoint(tmp_path / "single.pt")
    with pytest.raises(ValueError, match="the state of one optimizer, and the Trainer has 2"):
        fresh.load_checkpoint(tmp_path / "single.pt")


def test_schedulers_may_differ_and_may_be_left_out():
    ready = []

    class Keeps(TrainerCallback):
        def on_training_run_end(self, trainer):
            ready.append([group["lr"] for group in trainer.optimizer.param_groups])

    trainer = make(Keeps())
    first, second = trainer.optimizers
    train(trainer, create_scheduler_fn=[halves, None])
    for scheduler in (StepLR(second, 2, 0.5), [None, StepLR(second, 2, 0.5)]):
        first.param_groups[0]["lr"] = 0.2
        for group in second.param_groups:
            group["lr"] = 0.01
        train(trainer, 1, create_scheduler_fn=scheduler)
    assert ready[0] == pytest.approx([0.2 / 16, 0.01, 0.01])
    assert ready[1] == ready[2] == pytest.approx([0.2, 0.01 / 8, 0.01 / 8])
    train(trainer, 1, create_scheduler_fn=[None, None])
    assert trainer.scheduler is None
    with pytest.raises(ValueError, match="has 1 entries and the Trainer 2 optimizers"):
        train(trainer, create_scheduler_fn=[halves])


def test_a_learning_rate_is_recorded_for_each():
    class Logs(TrainerCallback):
        def on_train_step_end(self, trainer):
            trainer.control.log()

    history = train(make(Logs()), 1, create_scheduler_fn=halves).run_history
    assert history.get_metric_values("learning_rate_0")[-1] == pytest.approx(0.2 / 4)
    assert history.get_metric_values("learning_rate_1")[-1] == pytest.approx(0.01 / 4)


class Overflows(TrainerCallback):
    """Makes the gradients of the third update infinite, at the first optimizer's parameters."""

    def __init__(self, chosen=None):
        self.chosen = chosen

    def on_backward_end(self, trainer):
        if trainer.position.attempts == 2:
            trainer.get_model()[0].weight.grad.fill_(torch.inf)
            if self.chosen is not None:
                trainer.update_only(self.chosen)


@pytest.mark.parametrize(("chosen", "made"), [(None, 11), (0, 11), (1, 12)])
def test_a_gradient_scaler_unscales_each_once_and_an_overflow_skips_the_update(chosen, made):
    trainer = make(Overflows(chosen), accelerator=scaled_on_the_cpu())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer, gradient_clip_norm=0.05, create_scheduler_fn=halves)
    assert trainer.updates == made
    assert trainer.position.skipped == 12 - made
    steps = int(trainer.optimizers[1].state_dict()["state"][0]["step"])
    assert steps == (11 if chosen in (None, 0) else 12)
    assert len(trainer.optimizers) == 2
    plain = make(accelerator=scaled_on_the_cpu())
    train(plain, gradient_clip_norm=0.05)
    hand = by_hand(clip=0.05)
    assert 0 < largest_difference(weights_of(plain), hand) < 2e-2


def test_a_trial_run_leaves_no_trace_and_one_with_modes_is_switched():
    def free(model):
        return ScheduleFree(model[0].parameters())

    class Tries(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            with trainer.trial() as probe:
                probe.train(tiny_data(8), 1)

    for optimizers in ((sgd, adam), (free, adam)):
        tried = train(make(Tries(), optimizers=optimizers), 1)
        assert_identical(weights_of(tried), weights_of(train(make(optimizers=optimizers), 1)))
    assert not tried.optimizers[0].param_groups[0]["train_mode"]


def test_a_function_or_a_plugin_may_create_them_and_each_is_fused():
    def create(parameters):
        first, second, *rest = parameters
        return torch.optim.SGD([first, second], lr=0.1), torch.optim.AdamW(rest)

    class Creates:
        @hookimpl
        def create_optimizer(self, trainer):
            return list(create(trainer.model.parameters()))

    for optimizer, plugins in ((create, ()), (None, (Creates(),))):
        trainer = Trainer(
            tiny_model(),
            nn.CrossEntropyLoss(),
            optimizer,
            callbacks=[SpeedupsCallback(fused_optimizer=True)],
            plugins=plugins,
        )
        assert [type(one).__name__ for one in trainer.optimizers] == ["SGD", "AdamW"]
        assert all(group["fused"] for group in trainer.optimizer.param_groups)
        train(trainer, 1)
    single = make(optimizers=(sgd,))
    assert single.optimizers == (single.optimizer,)


def test_wrong_lists_are_refused_by_name():
    model = tiny_model()

    def refuses(error, match, optimizer):
        with pytest.raises(error, match=match):
            Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())

    both = r"optimizer\[0\] \(SGD\) and optimizer\[1\] \(AdamW\) both hold `?0.weight`?, `?0.bias`?"
    refuses(ValueError, both, [sgd(model), torch.optim.AdamW(model.parameters())])
    refuses(TypeError, r"optimizer\[1\] is the function adam", [sgd(model), adam])
    refuses(TypeError, r"optimizer\[0\] is the class SGD", [torch.optim.SGD])
    refuses(ValueError, "empty", [])
    refuses(TypeError, r"as a list, .* optimizer=\[a, b\]", {"a": sgd(model), "b": adam(model)})
    refuses(
        ValueError, "holds 2 parameters that aren't in the model", [sgd(tiny_model()), adam(model)]
    )
    with pytest.raises(TypeError, match=r"such as trainer.optimizers\[0\]"):
        make(model=model).optimizer.add_param_group({"params": []})


@pytest.mark.parametrize("sharded_by", ["FSDP", "DeepSpeed"])
def test_a_sharded_model_refuses_them_by_name(sharded_by, monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer._engine, "sharded_by", sharded_by)
    with pytest.raises(ValueError, match=f"Several optimizers aren't supported under {sharded_by}"):
        train(trainer)
