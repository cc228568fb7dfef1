"""The moving average of the weights: values, runs, evaluations and training states."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import (
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TerminateOnNaNCallback,
)
from pa_core.errors import SettingsError
from pa_models import EmaPlugin, ModelEma, ModelEmaCallback, freeze_batch_norm
from tests.helpers import NoisyModel, assert_identical, tiny_data, tiny_model, weights_of


def trainer_with(*plugins, model=None, settings=None, **arguments) -> Trainer:
    model = tiny_model() if model is None else model
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9),
        callbacks=plugins,
        plugins=None if settings else (),
        settings=settings,
        **arguments,
    )


class Weights(TrainerCallback):
    """Records the weights at the start and after each update."""

    def __init__(self) -> None:
        self.all: list[dict[str, torch.Tensor]] = []

    def on_training_run_start(self, trainer) -> None:
        self.on_optimizer_step_end(trainer)

    def on_optimizer_step_end(self, trainer) -> None:
        self.all.append(copy.deepcopy(trainer.get_model().state_dict()))


def average(weights, decays) -> dict[str, torch.Tensor]:
    result = {name: value.double() for name, value in weights[0].items()}
    for new, decay in zip(weights[1:], decays, strict=True):
        for name, value in new.items():
            if value.is_floating_point():
                result[name] = decay * result[name] + (1 - decay) * value.double()
            else:
                result[name] = value
    return result


def assert_close(module: nn.Module, expected, tolerance=1e-6) -> None:
    for name, value in module.state_dict().items():
        assert torch.allclose(value.double(), expected[name].double(), atol=tolerance), name


# -- The average ----------------------------------------------------------------------------------


def test_the_average_is_taken_after_each_update_and_not_after_each_epoch():  # A21
    weights, ema = Weights(), EmaPlugin(decay=0.8, warmup=False)
    trainer = trainer_with(weights, ema, model=NoisyModel())
    trainer.train(tiny_data(), 2, per_device_batch_size=8, gradient_accumulation_steps=2)
    assert len(weights.all) == 1 + 6
    assert_close(ema.ema_model.module, average(weights.all, [0.8] * 6))


def test_warmup_soon_discounts_the_initial_weights():
    weights, ema = Weights(), EmaPlugin(decay=0.9)
    trainer_with(weights, ema).train(tiny_data(), 20, per_device_batch_size=8)
    decays = [min(0.9, (1 + t) / (10 + t)) for t in range(1, 121)]
    assert decays[0] < 0.2
    assert decays[-1] == 0.9
    assert_close(ema.ema_model.module, average(weights.all, decays), tolerance=1e-5)


def test_an_average_of_every_third_update_spans_as_many_updates():
    weights, ema = Weights(), EmaPlugin(decay=0.9, warmup=False, update_every=3)
    trainer_with(weights, ema).train(tiny_data(), 1, per_device_batch_size=4)
    assert len(weights.all) == 1 + 11
    assert_close(ema.ema_model.module, average(weights.all[::3], [0.9**3] * 3))


def test_small_changes_of_16_bit_weights_are_not_lost_to_rounding():  # A21
    model = nn.Linear(4, 4).bfloat16()
    for value in model.parameters():
        nn.init.ones_(value)
    ema = ModelEma(model, decay=0.999)
    for value in model.parameters():
        nn.init.constant_(value, 2)
    for _ in range(1000):
        ema.update(model)
    expected = 2 - 0.999**1000
    state = ema.state_dict()
    assert state["module.weight"].dtype == torch.bfloat16
    assert state["module.weight"][0, 0].item() == pytest.approx(expected, rel=4e-3)
    assert state["wide_0"][0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_the_32_bit_average_is_saved_and_loaded():
    model = nn.Linear(2, 2).bfloat16()
    ema = ModelEma(model, decay=0.999)
    nn.init.constant_(model.weight, 2)
    ema.update(model)
    other = ModelEma(model, decay=0.999)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    ema.update(model), other.update(model)
    assert torch.equal(ema.wide_0, other.wide_0)
    assert torch.equal(ema.module.weight, other.module.weight)


def test_infinite_buffers_caches_and_counts_are_copied():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("cache", torch.tensor([1.0]), persistent=False)
            self.register_buffer("none", None)

    model = Model()
    ema = ModelEma(model, decay=0.9)
    model.norm.running_mean = torch.tensor([1.0, 2.0])  # replaces the tensor, as some modules do
    model.norm.num_batches_tracked = torch.tensor(5)
    model.cache = torch.tensor([2.0])
    ema.update(model)
    module = ema.module
    assert torch.allclose(module.norm.running_mean, torch.tensor([0.1, 0.2]))
    assert module.norm.num_batches_tracked == 5
    assert module.mask.tolist() == [0.0, -torch.inf]
    assert module.cache.item() == 2


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.zeros_(model[0].weight)
    ema = ModelEma(model, decay=0.5)
    nn.init.ones_(model[0].weight)
    ema.update(model)
    first, second = ema.module.children()
    assert second.weight is first.weight
    assert ema.state_dict()["module.0.weight"][0, 0].item() == 0.5


def test_set_restarts_it_and_calling_it_calls_the_average():
    model = tiny_model()
    ema = ModelEma(model, decay=0.5)
    for value in model.parameters():
        nn.init.ones_(value)
    ema.update(model)
    ema.set(model)
    assert ema.updates == 0
    assert_identical(ema.module.state_dict(), model.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(ema(x), model.eval()(x))


def test_frozen_batch_norms_stay_frozen_in_the_copy_and_gradients_are_not_copied():
    model = NoisyModel()
    freeze_batch_norm(model)
    model.layers[0].weight.grad = torch.ones_like(model.layers[0].weight)
    ema = ModelEma(model)
    assert not any(p.requires_grad or p.grad is not None for p in ema.module.parameters())
    model.layers[1].train()
    norm = ema.module.get_submodule("layers.1")
    assert norm.__dict__["train"].args[0] is norm


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_a_decay_out_of_range_is_rejected(decay):
    with pytest.raises(ValueError, match="decay must be between 0 and 1"):
        ModelEma(tiny_model(), decay)


# -- In runs --------------------------------------------------------------------------------------


def test_the_average_is_evaluated_as_well_as_the_model_with_all_plugins():
    class Accuracy(TrainerCallback):
        def on_eval_epoch_start(self, trainer) -> None:
            self.right = self.count = 0

        def on_eval_step_end(self, trainer, batch, batch_output) -> None:
            self.right += (batch_output["model_outputs"].argmax(1) == batch[1]).sum().item()
            self.count += len(batch[1])

        def on_eval_epoch_end(self, trainer) -> None:
            trainer.run_history.update_metric("accuracy", self.right / self.count)

    ema = EmaPlugin(decay=0.9)
    trainer = trainer_with(ema, Accuracy())
    data = tiny_data()
    trainer.train(data, 3, eval_dataset={"a": data, "b": tiny_data(7)})
    names = set(trainer.run_history.get_metric_names())
    assert {"a_accuracy", "b_accuracy", "ema_a_accuracy", "ema_b_eval_loss_epoch"} <= names
    module, (x, y) = ema.ema_model.module, data.tensors
    loss = nn.functional.cross_entropy(module(x), y).item()
    assert trainer.run_history.get_latest_metric("ema_a_eval_loss_epoch") == pytest.approx(loss)
    assert trainer.run_history.get_latest_metric("a_eval_loss_epoch") != pytest.approx(loss)
    results = trainer.evaluate(data)
    assert results["ema_evaluation_loss"] == pytest.approx(loss)


def test_evaluation_of_the_average_can_be_disabled():
    ema = EmaPlugin(evaluate=False)
    trainer = trainer_with(ema)
    trainer.train(tiny_data(), 1, eval_dataset=tiny_data())
    assert "ema_eval_loss_epoch" not in trainer.run_history.get_metric_names()


def test_under_mixed_precision_the_average_itself_is_evaluated():
    ema = EmaPlugin(decay=0.9)
    trainer = trainer_with(ema, mixed_precision="bf16")
    trainer.train(tiny_data(), 3, eval_dataset=tiny_data())
    with torch.no_grad():
        for value in ema.ema_model.module.parameters():
            value.zero_()
    results = trainer.evaluate()
    assert results["ema_evaluation_loss"] == pytest.approx(torch.tensor(3.0).log().item())
    assert results["evaluation_loss"] != pytest.approx(results["ema_evaluation_loss"])


def test_a_resumed_run_has_the_same_average_bit_for_bit(tmp_path):  # A21
    class Save(TrainerCallback):
        def on_train_step_end(self, trainer, step) -> None:
            if trainer.updates in (4, 6):
                trainer.save_training_state(tmp_path / f"at {trainer.updates}")

    def run(*more, **arguments) -> EmaPlugin:
        ema = EmaPlugin(decay=0.9, update_every=2)
        trainer_with(ema, *more, model=NoisyModel()).train(
            tiny_data(), 3, eval_dataset=tiny_data(), per_device_batch_size=16, **arguments
        )
        return ema

    whole = run(Save())
    for state in ("at 4", "at 6"):  # in the middle of an epoch, and after one
        resumed = run(resume_from=tmp_path / state)
        assert resumed.ema_model.updates == whole.ema_model.updates
        assert_identical(resumed.ema_model.module.state_dict(), whole.ema_model.module.state_dict())


class GoesAstray(TrainerCallback):
    """Breaks the weights in one update, so that every later loss is infinite."""

    def on_optimizer_step_end(self, trainer) -> None:
        if trainer.updates == 7:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.fill_(3e38)


class Leaves(TrainerCallback):
    """Skips the updates that a rollback undoes, and the one with the infinite loss."""

    def on_backward_end(self, trainer) -> None:
        if trainer.position.attempts + 1 in (5, 6, 7, 8):
            trainer.control.skip_update()


def test_a_rollback_restores_the_average_bit_for_bit_and_keeps_the_rest_of_the_run(tmp_path):
    best = []

    class Watches(TrainerCallback):
        def on_train_step_end(self, trainer) -> None:
            best.append(average.saver.best_metric)

    def run(*others):
        trainer = trainer_with(average, *others)
        trainer.train(tiny_data(24), 2, eval_dataset=tiny_data(8), per_device_batch_size=4)
        return trainer, average.ema_model

    average = ModelEmaCallback(decay=0.9, save_path=tmp_path / "best.pt")
    states = SaveTrainingStateCallback(tmp_path / "states", None, 4, save_at_end=False)
    guard = TerminateOnNaNCallback(policy="rollback")
    trainer, rolled_back = run(GoesAstray(), guard, states, Watches())
    assert guard.triggered
    # The best model of the first epoch's evaluation, which came after that state, is in a file.
    first = trainer.run_history.get_metric_values("ema_model_eval_loss_epoch")[0]
    assert best == [None] * 6 + [first] * 6

    average = ModelEmaCallback(decay=0.9, save_path=tmp_path / "best.pt")
    other, expected = run(Leaves())
    assert_identical(weights_of(trainer), weights_of(other))
    assert rolled_back.updates == expected.updates == 12 - 4
    assert_identical(rolled_back.module.state_dict(), expected.module.state_dict())


def test_a_state_has_tied_and_16_bit_weights(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(6, 6, bias=False)
            self.out = nn.Linear(6, 6, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x.to(self.embed.weight.dtype))).float()

    torch.manual_seed(0)
    first, second = (trainer_with(EmaPlugin(decay=0.9), model=Tied().bfloat16()) for _ in "12")
    first.train(tiny_data(), 1)
    first.save_training_state(tmp_path / "state")
    second.load_training_state(tmp_path / "state")
    one, two = (t.callback_handler.callbacks[0].ema_model for t in (first, second))
    assert torch.equal(one.wide_0, two.wide_0)
    assert not torch.equal(one.wide_0, one.module.embed.weight.float())
    assert two.module.out.weight is two.module.embed.weight


def deprecated_norms() -> nn.Module:
    """A model with weights that are computed from parameters, and kept, in each forward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))
    prune.l1_unstructured(model[2], "weight", 0.5)
    vars(model[1])["kept"] = [{"loss": model[0].weight.sum()}]
    return model


def test_a_model_with_the_deprecated_weight_norm_has_an_average():
    model = deprecated_norms()
    weights, ema = Weights(), EmaPlugin(decay=0.8, warmup=False)
    trainer = trainer_with(weights, ema, model=model)
    data = tiny_data()
    trainer.train(data, 1, eval_dataset=data, per_device_batch_size=16)
    mean = average(weights.all, [0.8] * 3)
    assert_close(ema.ema_model.module, mean)
    g, v = mean["0.weight_g"], mean["0.weight_v"]
    weight = g * v / v.norm(dim=1, keepdim=True)
    inputs, targets = (torch.stack(column) for column in zip(*data, strict=True))
    hidden = (inputs.double() @ weight.T + mean["0.bias"]).tanh()
    head = mean["2.weight_orig"] * mean["2.weight_mask"]
    loss = nn.functional.cross_entropy(hidden @ head.T + mean["2.bias"], targets)
    found = trainer.run_history.get_latest_metric("ema_eval_loss_epoch")
    assert found == pytest.approx(loss.item(), rel=1e-5)


def test_a_model_that_cant_be_copied_is_refused_at_the_start_by_attribute():
    model = tiny_model()
    model[0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"can't be copied, because of 'lock' of 0: TypeError"):
        trainer_with(EmaPlugin(), model=model).train(tiny_data(), 1)


class Ramp(ModelEma):
    """A decay that rises, with the `update` of pytorch-accelerated."""

    def __init__(self, model, decay=0.999) -> None:
        super().__init__(model, decay)
        self.num_updates = 0
        self.limit = decay
        self.decay = 0.0

    def update(self, model) -> None:  # type: ignore[override]
        super().update(model)
        self.num_updates += 1
        self.decay = self.limit * (1 - 0.5**self.num_updates)


@pytest.mark.parametrize("update_every", [1, 3])
def test_a_subclass_with_an_update_of_its_own_is_called_for_each_update(tmp_path, update_every):
    def run(**arguments) -> tuple[Weights, ModelEmaCallback]:
        weights, ema = Weights(), ModelEmaCallback(0.9, False, tmp_path / "ema.pt", model_ema=Ramp)
        ema.update_every = update_every
        save = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
        trainer = trainer_with(weights, ema, save)
        trainer.train(tiny_data(), 2, per_device_batch_size=16, **arguments)
        return weights, ema

    weights, ema = run()
    assert ema.ema_model.num_updates == 6
    decays = [0.9 * (1 - 0.5**n) for n in range(6)]
    if update_every == 1:
        assert_close(ema.ema_model.module, average(weights.all, decays))
    _, resumed = run(resume_from=tmp_path / "states" / "epoch_0001")
    assert resumed.ema_model.num_updates == 6
    first, second = (each.ema_model.module.state_dict() for each in (resumed, ema))
    assert_identical(first, second)
    assert (ema.watch_metric, ema.greater_is_better) == ("ema_model_eval_loss_epoch", False)


def test_an_update_fn_of_a_subclass_is_called_for_each_averaged_tensor():
    class Largest(ModelEma):
        def update_fn(self, ema_model_weights, updated_model_weights):
            return torch.maximum(ema_model_weights, updated_model_weights)

    class Plain(ModelEma):
        def update_fn(self, ema_model_weights, updated_model_weights):
            assert ema_model_weights.dtype == updated_model_weights.dtype == torch.float32
            return super().update_fn(ema_model_weights, updated_model_weights)

    model = nn.BatchNorm1d(1, dtype=torch.bfloat16)
    largest, plain, usual = (kind(model, decay=0.9) for kind in (Largest, Plain, ModelEma))
    usual.warmup = plain.warmup = True
    for updates, value in enumerate((3.0, 2.0), 1):
        nn.init.constant_(model.weight, value)
        model.num_batches_tracked = torch.tensor(updates)
        for each in (largest, plain, usual):
            each.update(model, num_updates=2)
    assert largest.module.weight.item() == 3
    assert largest.module.num_batches_tracked == 2
    # Each of the two updates with its own decay, and both with that of the second.
    weight = 1.0
    for t, value in enumerate((3.0, 3.0, 2.0, 2.0), 1):
        decay = (1 + t) / (10 + t)
        weight = decay * weight + (1 - decay) * value
    assert plain.wide_0.item() == pytest.approx(weight)
    assert plain.decay == 0.9


def test_each_run_starts_a_new_average():
    ema = EmaPlugin(decay=0.9, warmup=False)
    trainer = trainer_with(ema)
    trainer.train(tiny_data(), 1)
    first = ema.ema_model
    trainer.train(tiny_data(), 1)
    assert ema.ema_model is not first


# -- From settings --------------------------------------------------------------------------------


def settings_file(folder: Path, text: str) -> Path:
    file = folder / "pyproject.toml"
    file.write_text(f"[tool.pa-core]\n{text}")
    return file


def test_settings_enable_it_and_save_best_model_saves_the_average(tmp_path):
    file = settings_file(
        tmp_path,
        f"""
        plugins = ["ema", "save_best_model"]
        [tool.pa-core.ema]
        decay = 0.9
        warmup = false
        update_every = 2
        [tool.pa-core.save_best_model]
        watch_metric = "ema_eval_loss_epoch"
        model = "ema"
        save_path = "{tmp_path}/best.pt"
        load_saved_checkpoint = false
        """,
    )
    trainer = trainer_with(settings=file)
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data())
    (ema,) = [p for p in trainer.callback_handler if isinstance(p, EmaPlugin)]
    assert (ema.decay, ema.warmup, ema.update_every) == (0.9, False, 2)
    saved = torch.load(tmp_path / "best.pt")["model_state_dict"]
    assert_identical(saved, ema.ema_model.module.state_dict())


def test_two_averages_have_different_names(tmp_path):
    file = settings_file(
        tmp_path,
        """
        plugins = ["ema:fast", "ema:slow"]
        [tool.pa-core."ema:fast"]
        decay = 0.9
        name = "fast"
        [tool.pa-core."ema:slow"]
        decay = 0.99
        name = "slow"
        """,
    )
    trainer = trainer_with(settings=file)
    trainer.train(tiny_data(), 1, eval_dataset=tiny_data())
    names = set(trainer.run_history.get_metric_names())
    assert {"fast_eval_loss_epoch", "slow_eval_loss_epoch"} <= names


def test_invalid_settings_are_rejected(tmp_path):
    file = settings_file(
        tmp_path,
        """
        plugins = ["ema"]
        [tool.pa-core.ema]
        decay = 1.5
        warm_up = true
        """,
    )
    with pytest.raises(SettingsError) as error:
        trainer_with(settings=file)
    assert "decay" in str(error.value)
    assert "'warmup'" in str(error.value)


# -- ModelEmaCallback -----------------------------------------------------------------------------


class GetsWorse(TrainerCallback):
    """Raises the learning rate after a number of updates."""

    def on_optimizer_step_end(self, trainer) -> None:
        trainer.optimizer.param_groups[0]["lr"] = 0.5 if trainer.updates < 4 else 90.0


@pytest.mark.parametrize(
    ("metric", "callbacks"),
    [
        ("ema_model_eval_loss_epoch", []),
        ("ema_model_intermediate_eval_loss", [StepBasedEvaluationCallback(2), GetsWorse()]),
    ],
)
def test_the_callback_saves_the_best_average_under_its_metric(tmp_path, metric, callbacks):
    ema = ModelEmaCallback(decay=0.5, save_path=tmp_path / "ema.pt", watch_metric=metric)
    trainer = trainer_with(ema, *callbacks)
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data())
    losses = trainer.run_history.get_metric_values(metric)
    assert len(losses) == (6 if callbacks else 2)
    content = torch.load(tmp_path / "ema.pt")
    assert content[metric] == min(losses)
    assert not callbacks or losses.index(min(losses)) == 1  # not the last of an epoch
    model = tiny_model()
    model.load_state_dict(content["model_state_dict"])
    x, y = tiny_data().tensors
    assert nn.functional.cross_entropy(model(x), y).item() == pytest.approx(min(losses))
    trainer.load_checkpoint(tmp_path / "ema.pt")


def test_without_evaluation_the_average_of_each_epoch_is_saved(tmp_path):
    ema = ModelEmaCallback(0.9, evaluate_during_training=False, save_path=tmp_path / "ema.pt")
    trainer_with(ema).train(tiny_data(), 2)
    saved = torch.load(tmp_path / "ema.pt")["model_state_dict"]
    assert_identical(saved, ema.ema_model.module.state_dict())


def test_evaluation_needs_a_dataset():
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        trainer_with(ModelEmaCallback()).train(tiny_data(), 1)


def test_callbacks_of_the_average_are_called_in_its_evaluation_only(tmp_path):
    class Count(TrainerCallback):
        def __init__(self) -> None:
            self.evaluated: list[nn.Module] = []

        def on_eval_epoch_end(self, trainer) -> None:
            self.evaluated.append(trainer.model)

    class Other(Count):
        pass

    everywhere, only, twice = Count(), Other(), Count()
    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt", callbacks=[only, twice])
    trainer_with(everywhere, ema).train(tiny_data(), 2, eval_dataset=tiny_data())
    assert len(everywhere.evaluated) == 4
    assert only.evaluated == [ema.ema_model.module] * 2
    assert twice.evaluated == []  # the trainer has another of its class


def test_an_average_of_another_class_is_used_saved_and_resumed(tmp_path):
    import timm.utils as timm_utils

    first, second = (
        ModelEmaCallback(0.9, model_ema=timm_utils.ModelEmaV3, save_path=tmp_path / "ema.pt")
        for _ in "12"
    )
    trainer = trainer_with(first)
    trainer.train(tiny_data(), 1, eval_dataset=tiny_data())
    trainer.save_training_state(tmp_path / "state")
    trainer_with(second).load_training_state(tmp_path / "state")
    assert isinstance(second.ema_model, timm_utils.ModelEmaV3)
    assert_identical(second.ema_model.state_dict(), first.ema_model.state_dict())
    assert second.saver.best_metric == first.saver.best_metric is not None
