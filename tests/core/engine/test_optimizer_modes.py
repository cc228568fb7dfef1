"""Optimizers with modes are in training mode where the model is trained, and nowhere else."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.callbacks import SaveBestModelCallback
from pa_core.control import UpdateResult
from tests.builtin_trainer import Interrupts
from tests.core.engine.test_precision import scaled_on_the_cpu
from tests.helpers import assert_identical, largest_difference, tiny_data, tiny_model, weights_of

SAMPLES, BATCH = 32, 8
PER_EPOCH = SAMPLES // BATCH


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD with warm-up, as in facebookresearch/schedule_free.

    The model holds y in training mode, x in evaluation mode; z is in the state.
    """

    def __init__(self, params, lr=0.3, momentum=0.9, warmup=3):
        group = {"lr": lr, "momentum": momentum, "warmup": warmup}
        super().__init__(params, {**group, "k": 0, "train_mode": False, "weight_sum": 0.0})

    @torch.no_grad()
    def eval(self):
        self._switch(False, lambda momentum: 1 - 1 / momentum)

    @torch.no_grad()
    def train(self):
        self._switch(True, lambda momentum: 1 - momentum)

    def _switch(self, training, share):
        for group in self.param_groups:
            if group["train_mode"] is not training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], share(group["momentum"]))
                group["train_mode"] = training

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("step() in evaluation mode")
            group["k"] += 1
            lr = group["lr"] * min(1.0, group["k"] / group["warmup"])
            group["weight_sum"] += lr**2
            share = lr**2 / group["weight_sum"]
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    p.lerp_(z, share)
                    p.add_(p.grad, alpha=lr * (group["momentum"] * (1 - share) - 1))
                    z.sub_(p.grad, alpha=lr)


def make(*plugins, optimizer=ScheduleFree, **options):
    return Trainer(
        tiny_model(), nn.CrossEntropyLoss(), optimizer, callbacks=plugins, plugins=(), **options
    )


def train(trainer, epochs=2, evaluate=True, **options):
    data, evaluated = tiny_data(SAMPLES), tiny_data(12) if evaluate else None
    options = {"train_dataloader_kwargs": {"shuffle": False}, **options}
    trainer.train(data, epochs, evaluated, per_device_batch_size=BATCH, **options)
    return trainer


def loss_of(model, data):
    with torch.no_grad():
        return nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()


def by_hand(epochs=2, after_update=lambda model: None, batches=range(PER_EPOCH)):
    """The loop by hand, switched after each update; and the losses of its evaluations."""
    model, losses = tiny_model(), []
    optimizer = ScheduleFree(model.parameters())
    x, y = tiny_data(SAMPLES).tensors
    for _ in range(epochs):
        optimizer.train()
        for number in batches:
            batch = slice(number * BATCH, (number + 1) * BATCH)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.eval()
            after_update(model)
            optimizer.train()
        optimizer.eval()
        losses.append(loss_of(model, tiny_data(12)))
    return model, losses


class EvaluatesOften(TrainerCallback):
    """Evaluates, predicts and saves in the middle of an epoch, and records what it meets."""

    def __init__(self, folder):
        self.folder, self.losses, self.predictions, self.files = folder, [], [], []

    def on_optimizer_step_end(self, trainer):
        trainer.control.evaluate()
        self.predictions.append(trainer.predict(tiny_data(12), per_device_batch_size=12))
        self.losses.append(trainer.evaluate(tiny_data(12))["evaluation_loss"])
        trainer.save_checkpoint(self.folder / "now.pt")
        self.files.append(torch.load(self.folder / "now.pt", weights_only=True))


def test_it_is_the_loop_by_hand_and_every_evaluation_meets_the_evaluated_weights(tmp_path):
    expected = []
    hand, losses = by_hand(after_update=lambda model: expected.append(weights_of_module(model)))
    often = EvaluatesOften(tmp_path)
    trainer = train(make(often))
    history = trainer.run_history
    assert largest_difference(weights_of(trainer), weights_of_module(hand)) < 1e-6
    assert history.get_metric_values("eval_loss_epoch") == pytest.approx(losses, abs=1e-6)
    model, data, by_update = tiny_model(), tiny_data(12), []
    for weights, predicted, file in zip(expected, often.predictions, often.files, strict=True):
        model.load_state_dict(weights)
        torch.testing.assert_close(predicted, model(data.tensors[0]).detach())
        assert largest_difference(file["model_state_dict"], weights) < 1e-6
        assert file["optimizer_state_dict"]["param_groups"][0]["train_mode"] is False
        by_update.append(loss_of(model, data))
    assert often.losses == pytest.approx(by_update, abs=1e-6)
    assert history.get_metric_values("intermediate_eval_loss") == pytest.approx(by_update, abs=1e-6)
    # None of this has changed the training, bit for bit.
    assert_identical(weights_of(trainer), weights_of(train(make(), evaluate=False)))


def weights_of_module(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_after_the_run_the_model_holds_the_evaluated_weights_and_outside_runs_stays_so(tmp_path):
    trainer = train(make())
    weights, data = weights_of(trainer), tiny_data(12)
    hand, losses = by_hand()
    assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(losses[-1], abs=1e-6)
    trainer.optimizer.train()  # by the user
    assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(losses[-1], abs=1e-6)
    torch.testing.assert_close(trainer.predict(data), hand(data.tensors[0]).detach())
    trainer.optimizer.train()
    trainer.save_checkpoint(tmp_path / "c.pt")
    saved = torch.load(tmp_path / "c.pt", weights_only=True)["model_state_dict"]
    assert largest_difference(saved, weights) < 1e-6
    fresh = make()
    fresh.load_checkpoint(tmp_path / "c.pt")
    assert_identical(weights_of(fresh), saved)
    train(fresh, 1)  # and trains on


@pytest.mark.parametrize("at", [3, 4, 6, "final"])
def test_a_state_holds_the_evaluated_weights_and_resumes_bit_for_bit(at, tmp_path):
    whole = train(make(), 3)
    states = SaveTrainingStateCallback(tmp_path, 1, 1, save_at_end=at == "final")
    if at == "final":
        train(make(states), 2)
    else:
        with pytest.raises(KeyboardInterrupt):
            train(make(states, Interrupts(at)), 3)
    expected = []
    by_hand(3, lambda model: expected.append(weights_of_module(model)))
    name, updates = ("final", 8) if at == "final" else (f"update_{at:08}", at)
    stored = load_file(tmp_path / name / "model.safetensors")
    assert largest_difference(stored, expected[updates - 1]) < 1e-6
    evaluates = make(states, optimizer=None)
    evaluates.load_training_state(tmp_path / name)
    assert_identical(weights_of(evaluates), stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = train(make(states), 3, resume_from=tmp_path, strict=True)
    assert resumed.updates == 3 * PER_EPOCH
    assert_identical(weights_of(resumed), weights_of(whole))


def test_a_roll_back_and_weights_that_a_plugin_sets_between_epochs_are_trained_on(tmp_path):
    class Loads(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            if trainer.updates == 2 * PER_EPOCH:
                trainer.load_checkpoint(tmp_path / "first.pt")

        def on_train_epoch_end(self, trainer):
            if trainer.updates == PER_EPOCH:
                trainer.save_checkpoint(tmp_path / "first.pt")

    class RollsBack(TrainerCallback):
        def on_optimizer_step_start(self, trainer):
            if trainer.position.attempts == 6:
                from pa_core.checkpoint.resume import find_training_state

                trainer.wait_for_saves()
                find_training_state(tmp_path / "update_00000004", trainer).roll_back(trainer)
                trainer.control.skip_update()

    once = train(make(), 2)
    assert largest_difference(weights_of(train(make(Loads()), 3)), weights_of(once)) < 1e-6
    states = SaveTrainingStateCallback(tmp_path, 1, 1, save_at_end=False)
    rolled = train(make(RollsBack(), states), 3)  # 6 updates, a skipped one, and 5 from the fourth
    hand, _ = by_hand(1, batches=[0, 1, 2, 3, 3, 0, 1, 2, 3])
    assert (rolled.updates, rolled.optimizer.param_groups[0]["k"]) == (11, 9)
    assert largest_difference(weights_of(rolled), weights_of_module(hand)) < 1e-6


def test_the_best_model_is_saved_and_loaded_with_evaluated_weights(tmp_path):
    class MakesEpochsWorse(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            if trainer.position.epoch > 1:
                with torch.no_grad():
                    trainer.get_model()[2].weight.mul_(-20)

        def on_training_run_end(self, trainer):
            trainer.control.save(tmp_path / "loaded")  # once the best model is loaded

    best = SaveBestModelCallback(str(tmp_path / "best.pt"), load_saved_checkpoint=True)
    trainer = train(make(best, MakesEpochsWorse()), 3)
    assert best.best_metric_epoch == 1
    losses = trainer.run_history.get_metric_values("eval_loss_epoch")
    assert trainer.evaluate(tiny_data(12))["evaluation_loss"] == pytest.approx(min(losses))
    assert loss_of(trainer.get_model(), tiny_data(12)) == pytest.approx(min(losses), abs=1e-6)
    # A state of the best model has no training weights of another.
    stored = load_file(tmp_path / "loaded" / "model.safetensors")
    assert_identical(stored, weights_of(trainer))
    assert "training_weights" not in (tmp_path / "loaded" / "state.json").read_text()


class Sharpness(TrainerCallback):
    """Sharpness-aware minimization: the gradients at a point uphill."""

    needs_recompute = True

    @hookimpl
    def run_update(self, trainer) -> UpdateResult:
        moved = [(p, 0.05 * p.grad) for p in trainer.model.parameters()]
        with torch.no_grad():
            for p, step in moved:
                p.add_(step)
        trainer.recompute_gradients()
        with torch.no_grad():
            for p, step in moved:
                p.sub_(step)
        trainer.clip_gradients()
        return trainer.apply_update()


def test_recomputed_gradients_are_those_of_the_training_weights():
    trainer = train(make(Sharpness()), 2)
    hand, optimizer = tiny_model(), None
    optimizer = ScheduleFree(hand.parameters())
    optimizer.train()
    x, y = tiny_data(SAMPLES).tensors
    for part in 2 * list(range(0, SAMPLES, BATCH)):
        batch = slice(part, part + BATCH)
        nn.functional.cross_entropy(hand(x[batch]), y[batch]).backward()
        moved = [(p, 0.05 * p.grad) for p in hand.parameters()]
        optimizer.zero_grad()
        with torch.no_grad():
            for p, step in moved:
                p.add_(step)
        nn.functional.cross_entropy(hand(x[batch]), y[batch]).backward()
        with torch.no_grad():
            for p, step in moved:
                p.sub_(step)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    assert largest_difference(weights_of(trainer), weights_of_module(hand)) < 1e-6


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "event", ["on_training_run_start", "on_optimizer_step_end", "on_eval_epoch_end"]
)
def test_a_trial_run_leaves_no_trace(event, alone):
    def tries(trainer):
        with trainer.trial(alone=alone) as probe:
            probe.train(tiny_data(16), 1, tiny_data(8))

    callback = type("Tries", (TrainerCallback,), {event: lambda self, trainer: tries(trainer)})
    assert_identical(weights_of(train(make(callback()))), weights_of(train(make())))


def test_a_gradient_scaler_steps_in_training_mode():
    accelerator = scaled_on_the_cpu()
    trainer = train(make(accelerator=accelerator))
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    assert trainer.updates == 8
    assert trainer.optimizer.optimizer.param_groups[0] | {"params": None} == {
        **train(make()).optimizer.param_groups[0],
        "params": None,
    }
    assert largest_difference(weights_of(trainer), weights_of(train(make()))) < 2e-2


def test_an_update_in_evaluation_mode_is_an_error_and_a_failed_run_ends_in_evaluation_mode():
    class Evaluates(TrainerCallback):
        def on_backward_end(self, trainer):
            if trainer.updates == 2:
                trainer.optimizer.eval()

    trainer = make(Evaluates())
    with pytest.raises(RuntimeError, match="ScheduleFree is in evaluation mode at an update"):
        train(trainer)
    expected = []
    by_hand(1, lambda model: expected.append(weights_of_module(model)))
    assert largest_difference(weights_of(trainer), expected[1]) < 1e-6


def test_callbacks_that_switch_the_mode_themselves_change_nothing():
    class Switches(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            trainer.optimizer.train()

        def on_eval_epoch_start(self, trainer):
            trainer.optimizer.eval()

        on_training_run_end = on_eval_epoch_start

    trainer = train(make(Switches()), 3)
    assert largest_difference(weights_of(trainer), weights_of(train(make(), 3))) < 1e-6


@pytest.mark.parametrize("sharded_by", ["FSDP", "DeepSpeed"])
def test_a_sharded_model_refuses_them_by_name(sharded_by, monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer._engine, "sharded_by", sharded_by)
    with pytest.raises(ValueError, match=f"ScheduleFree changes the weights .* under {sharded_by}"):
        train(trainer)
