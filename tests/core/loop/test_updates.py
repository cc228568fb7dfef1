"""The update as a hook: made, skipped, replaced, and repeated with recomputed gradients."""

from __future__ import annotations

from dataclasses import make_dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.control import UpdateResult
from tests.helpers import assert_identical, largest_difference, tiny_data, tiny_model, weights_of


def make(*plugins, model=None, lr=0.1, **kwargs):
    model = tiny_model() if model is None else model
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=lr),
        callbacks=(),
        plugins=plugins,
        **kwargs,
    )


class Events(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_gradients_ready(self, trainer):
        self.seen.append(("ready", trainer.updates))

    def on_optimizer_step_start(self, trainer):
        self.seen.append(("start", trainer.updates))

    def on_optimizer_step_end(self, trainer):
        self.seen.append(("end", trainer.updates))

    def on_optimizer_step_skipped(self, trainer, reason):
        self.seen.append((reason, trainer.updates))


class Skip(TrainerCallback):
    """Skips some accumulated batches, counted from 0."""

    def __init__(self, *which, reason=None, event="on_backward_end"):
        def skip(trainer):
            if trainer.position.attempts in which:
                trainer.control.skip_update(*([reason] if reason else []))

        setattr(self, event, skip)


def test_skipped_updates_have_their_own_event_and_are_not_counted_as_made():
    events = Events()
    trainer = make(Skip(1), Skip(2, reason="too long", event="on_optimizer_step_start"), events)
    trainer.train(tiny_data(16), 1, per_device_batch_size=4)
    made = [("ready", 0), ("start", 0), ("end", 1)]
    skipped = [("ready", 1), ("request", 1), ("ready", 1), ("start", 1), ("too long", 1)]
    assert events.seen == [*made, *skipped, ("ready", 1), ("start", 1), ("end", 2)]
    position = trainer.position
    assert (trainer.updates, position.skipped, position.samples, position.epoch) == (2, 2, 16, 2)
    assert trainer.progress.fraction == 1


def test_a_number_of_updates_means_updates_that_are_made():
    trainer = make(Skip(1, 2, 5))
    trainer.train(tiny_data(16), "6 updates", per_device_batch_size=4)
    assert (trainer.updates, trainer.position.skipped) == (6, 3)
    assert trainer.progress.fraction == 1
    by_epochs = make(Skip(1, 2, 5))
    by_epochs.train(tiny_data(16), "1.5 epochs", per_device_batch_size=4)
    assert (by_epochs.updates, by_epochs.position.samples) == (3, 24)


def test_too_many_skipped_updates_in_a_row_stop_the_run():
    trainer = make(Skip(*range(1, 1000), reason="bad luck"))
    trainer.train(tiny_data(16), "500 updates", per_device_batch_size=4)
    assert "100 updates in a row were skipped, the last one because of: bad luck" in str(
        trainer.stop_reason
    )
    assert (trainer.updates, trainer.position.skipped) == (1, 100)


def test_a_state_that_is_due_at_a_skipped_update_waits_for_one_that_is_made(tmp_path):
    class Save(TrainerCallback):
        def on_train_step_end(self, trainer, step):
            if step == 1:
                trainer.control.save(tmp_path / "state")

    class Saved(TrainerCallback):
        def on_save_training_state(self, trainer):
            saved.append((trainer.updates, trainer.position.batch))

    saved = []
    make(Skip(1, 2), Save(), Saved()).train(tiny_data(16), 1, per_device_batch_size=4)
    assert saved == [(2, 4)]
    saved.clear()
    make(Skip(1, 2, 3), Save(), Saved()).train(tiny_data(16), 1, per_device_batch_size=4)
    assert saved == [(1, 4)]  # at the end of the training part
    checkpoint = SaveTrainingStateCallback(tmp_path / "all", None, 1, save_at_end=False)
    saved.clear()
    make(Skip(1, 2), checkpoint, Saved()).train(tiny_data(16), 1, per_device_batch_size=4)
    assert saved == [(1, 1), (2, 4)]


def test_skipped_updates_are_part_of_a_state(tmp_path):
    def run(folder, **options):
        checkpoint = SaveTrainingStateCallback(folder, 1, save_at_end=False)
        trainer = make(Skip(1, 4), checkpoint)
        trainer.train(tiny_data(16), 2, per_device_batch_size=4, **options)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume_from=tmp_path / "whole" / "epoch_0001")
    assert_identical(weights_of(resumed), weights_of(whole))
    assert resumed.position.skipped == whole.position.skipped == 2


# -- run_update -----------------------------------------------------------------------------------


def test_a_wrapper_sees_gradients_before_clipping_and_the_result():
    class Around:
        def __init__(self):
            self.norms, self.results = [], []

        @hookimpl(wrapper=True)
        def run_update(self, trainer):
            gradients = [p.grad for p in trainer.get_model().parameters()]
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
            result = yield
            self.results.append(result)
            return result

    around = Around()
    trainer = make(around, Skip(1))
    trainer.train(tiny_data(8), 1, per_device_batch_size=4, gradient_clip_norm=1e-3)
    assert min(around.norms) > 1e-2
    assert around.results == [UpdateResult(True), UpdateResult(False, "request")]


def test_a_replacement_that_clips_by_itself_makes_the_same_update():
    class Clips:
        @hookimpl
        def run_update(self, trainer):
            torch.nn.utils.clip_grad_norm_(trainer.get_model().parameters(), 0.1)
            return trainer.apply_update()

    own, default = make(Clips()), make()
    own.train(tiny_data(16), 2, per_device_batch_size=4)
    default.train(tiny_data(16), 2, per_device_batch_size=4, gradient_clip_norm=0.1)
    assert_identical(weights_of(own), weights_of(default))


@pytest.mark.parametrize(
    ("update", "error", "text"),
    [
        (lambda trainer: None, TypeError, "run_update returned None; it must return UpdateResult"),
        (lambda trainer: (trainer.apply_update(), None)[1], TypeError, "returned None"),
        (
            lambda trainer: "done",
            TypeError,
            "run_update returned 'done'; a replacement or wrapper must",
        ),
        (
            lambda trainer: UpdateResult(True),
            RuntimeError,
            "of Wrong returned without calling trainer",
        ),
        (
            lambda trainer: (trainer.apply_update(), trainer.apply_update())[1],
            RuntimeError,
            "in the hook run_update only, and once",
        ),
    ],
)
def test_a_wrong_replacement_is_an_error(update, error, text):
    class Wrong:
        @hookimpl
        def run_update(self, trainer):
            return update(trainer)

    trainer = make(Wrong())
    with pytest.raises(error, match=text) as caught:
        trainer.train(tiny_data(8), 1)
    assert "Wrong" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    if "None" in text:
        assert trainer.updates <= 1  # the default didn't run as well


def test_two_replacements_of_the_update_are_refused():
    class First:
        @hookimpl
        def run_update(self, trainer):
            return trainer.apply_update()

    class Second(First):
        pass

    trainer = make(First(), Second())
    with pytest.raises(ValueError, match="'First', 'Second' each replace run_update"):
        trainer.train(tiny_data(8), 1)


def test_updates_and_recomputation_belong_in_the_hook():
    with pytest.raises(RuntimeError, match="in the hook run_update only"):
        make().apply_update()
    with pytest.raises(RuntimeError, match="needs_recompute = True"):
        make().recompute_gradients()


# -- recompute_gradients --------------------------------------------------------------------------


class Twice(TrainerCallback):
    """Moves the weights by the gradient, recomputes there, and updates from the old weights."""

    needs_recompute = True

    def __init__(self, step=0.5):
        self.step, self.losses = step, []

    @hookimpl
    def run_update(self, trainer):
        parameters = list(trainer.get_model().parameters())
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad, alpha=self.step)
        self.losses.append(trainer.recompute_gradients().item())
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
        trainer.clip_gradients()
        return trainer.apply_update()


def by_hand(model, data, *, batch_size, accumulation, epochs, lr=0.1, step=0.5):
    """The same in a loop by hand, over whole accumulated batches; returns the second losses."""
    x, y = data.tensors
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for _ in range(epochs):
        for start in range(0, len(x), batch_size * accumulation):
            rows = slice(start, start + batch_size * accumulation)

            def loss(rows=rows):
                return nn.functional.cross_entropy(model(x[rows]), y[rows])

            optimizer.zero_grad()
            loss().backward()
            before = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad, alpha=step)
            optimizer.zero_grad()
            second = loss()
            second.backward()
            losses.append(second.item())
            with torch.no_grad():
                for p, value in zip(model.parameters(), before, strict=True):
                    p.copy_(value)
            optimizer.step()
    return losses


@pytest.mark.parametrize("accumulation", [1, 3])
def test_recomputed_gradients_are_those_of_a_loop_by_hand(accumulation):
    data, twice = tiny_data(22), Twice()
    trainer = make(twice)
    trainer.train(
        data,
        2,
        per_device_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_dataloader_kwargs={"shuffle": False},
    )
    model = tiny_model()
    losses = by_hand(model, data, batch_size=4, accumulation=accumulation, epochs=2)
    assert twice.losses == pytest.approx(losses, abs=1e-6)
    assert largest_difference(weights_of(trainer), model.state_dict()) < 1e-6


def test_recomputing_repeats_random_numbers_and_updates_buffers_once():
    class Noisy(nn.Sequential):
        def forward(self, x):
            seen.append(torch.rand(1).item())
            return super().forward(x)

    def new():
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(5)
        return Noisy(nn.Linear(4, 5), norm, nn.Dropout(0.5), nn.Linear(5, 3)), norm

    seen = []
    model, norm = new()
    data = TensorDataset(torch.randn(12, 4), torch.randint(3, (12,)))
    make(Twice(), model=model).train(data, 1, per_device_batch_size=6)
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert norm.num_batches_tracked == 2


def test_a_buffer_that_its_module_replaces_is_updated_once():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean: torch.Tensor | None
            self.register_buffer("mean", None)

        def forward(self, x):
            mean = x.detach().mean(0)
            self.mean = mean if self.mean is None else (self.mean + mean) / 2
            return x

    means = []
    for plugins in ([], [Twice()]):
        model = nn.Sequential(Mean(), tiny_model())
        make(*plugins, model=model).train(tiny_data(12), 1, per_device_batch_size=4)
        means.append(model[0].mean)
    assert torch.equal(*means)


def test_only_on_backward_start_runs_again_and_nothing_is_counted_or_recorded_twice():
    class Counts(TrainerCallback):
        def __init__(self):
            self.calls = []

        def on_train_step_start(self, trainer):
            self.calls.append("step_start")

        def on_backward_start(self, trainer, batch_output):
            self.calls.append("backward_start")
            trainer.record_mean("one", 1.0)
            batch_output["loss"] = batch_output["loss"] * 2

        def on_backward_end(self, trainer):
            self.calls.append("backward_end")

    counts = Counts()
    trainer = make(Twice(), counts)
    trainer.train(tiny_data(8), 1, per_device_batch_size=4, gradient_accumulation_steps=2)
    once = ["step_start", "backward_start", "backward_end"]
    assert counts.calls == [*once, *once, "backward_start", "backward_start"]
    assert trainer.position.samples == 8
    assert trainer.run_history.get_metric_values("train_one") == [1.0]


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_that_is_an_object_is_kept_and_watched_like_a_list(in_place, slots):
    make_samples = make_dataclass("Samples", ["inputs", "targets"], slots=slots)

    class Objects(Trainer):
        def calculate_train_batch_loss(self, batch):
            if in_place:
                batch.inputs.mul_(2)
            else:
                batch.inputs = batch.inputs * 2
            return super().calculate_train_batch_loss((batch.inputs, batch.targets))

    def collate(samples):
        return make_samples(*map(torch.stack, zip(*samples, strict=True)))

    seen = []

    class Sees(nn.Module):
        def forward(self, x):
            seen.append(x.clone())
            return x

    model = nn.Sequential(Sees(), tiny_model())
    trainer = Objects(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(),
        plugins=[Twice()],
    )
    arguments = {"per_device_batch_size": 4, "collate_fn": collate}
    if in_place:
        with pytest.raises(RuntimeError, match="step 0 was changed in place"):
            trainer.train(tiny_data(8), 1, **arguments)
    else:
        trainer.train(tiny_data(8), 1, **arguments)
        assert [torch.equal(seen[n], seen[n + 1]) for n in (0, 1, 2)] == [True, False, True]


def test_a_batch_that_is_changed_in_place_is_refused_and_one_whose_entries_are_taken_is_not():
    class Pops(Trainer):
        def calculate_train_batch_loss(self, batch):
            targets = batch.pop()
            return super().calculate_train_batch_loss([*batch, targets])

    class Changes(Trainer):
        def calculate_train_batch_loss(self, batch):
            batch[0].add_(1)
            return super().calculate_train_batch_loss(batch)

    for kind in (Pops, Changes):
        model = tiny_model()
        trainer = kind(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=(),
            plugins=[Twice()],
        )
        if kind is Pops:
            trainer.train(tiny_data(8), 1, per_device_batch_size=4)
            assert trainer.updates == 2
        else:
            with pytest.raises(RuntimeError, match="step 0 was changed in place"):
                trainer.train(tiny_data(8), 1, per_device_batch_size=4)


@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients_outside_the_optimizer_are_those_of_the_accumulated_batch(recomputes):
    class Twice:
        needs_recompute = True

        @hookimpl
        def run_update(self, trainer):
            trainer.recompute_gradients()
            trainer.clip_gradients()
            return trainer.apply_update()

    data, model, expected = tiny_data(16), tiny_model(), tiny_model()
    optimizer = torch.optim.SGD(expected[2].parameters(), lr=0.1)
    x, y = data.tensors
    for start in (0, 8) * 2:
        expected.zero_grad()
        rows = slice(start, start + 8)
        nn.functional.cross_entropy(expected(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.step()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model[2].parameters(), lr=0.1),
        callbacks=(),
        plugins=[Twice] if recomputes else (),
    )
    trainer.train(
        data,
        2,
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_norm=0.1,
        train_dataloader_kwargs={"shuffle": False},
    )
    assert largest_difference(weights_of(trainer), expected.state_dict()) < 1e-6
