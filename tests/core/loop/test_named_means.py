"""Means that plugins and loss methods record by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.builtins.checkpoint import SaveTrainingStateCallback
from pa_core.loop.means import EpochMeans
from tests.helpers import tiny_data, tiny_model


class Logs(Trainer):
    """Logs the mean of the inputs, by the output of the loss method."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return output | {"log": {"input": batch[0].mean()}}

    def calculate_eval_batch_loss(self, batch):
        return super().calculate_eval_batch_loss(batch) | {"log": {"input": batch[0].mean()}}


def make(*plugins, kind=Trainer):
    model = tiny_model()
    return kind(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(),
        plugins=plugins,
    )


def values(trainer, name):
    return trainer.run_history.get_metric_values(name)


def mean_of(data):
    return data.tensors[0].double().mean().item()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_method_logs_means_over_samples_in_every_part(accumulation):
    train, small, large = tiny_data(22), tiny_data(9), tiny_data(13)  # uneven last batches
    trainer = make(kind=Logs)
    trainer.train(
        train,
        2,
        eval_dataset={"small": small, "large": large},
        per_device_batch_size=4,
        gradient_accumulation_steps=accumulation,
    )
    assert values(trainer, "train_input") == pytest.approx([mean_of(train)] * 2, abs=1e-6)
    assert values(trainer, "small_eval_input") == pytest.approx([mean_of(small)] * 2, abs=1e-6)
    assert values(trainer, "large_eval_input") == pytest.approx([mean_of(large)] * 2, abs=1e-6)
    result = trainer.evaluate(small, per_device_batch_size=4)
    assert result["evaluation_input"] == pytest.approx(mean_of(small), abs=1e-6)


class Records(TrainerCallback):
    def __init__(self, event, *, items=None, value=None):
        def record(trainer, **arguments):
            batch = arguments.get("batch")
            mean = batch[0].mean() if value is None else value
            trainer.record_mean("x", mean, *([len(batch[0])] if items else []))

        setattr(self, event, lambda trainer, batch, **rest: record(trainer, batch=batch))


@pytest.mark.parametrize("event", ["on_backward_start", "on_backward_end", "on_train_step_end"])
def test_a_plugin_records_means_with_the_items_of_the_loss(event):
    data = tiny_data(22)
    trainer = make(Records(event))
    trainer.train(data, 1, per_device_batch_size=4)
    assert values(trainer, "train_x") == pytest.approx([mean_of(data)], abs=1e-6)


def test_items_are_required_before_the_batch_size_is_known():
    with pytest.raises(ValueError, match=r"record_mean\('x'\) needs items here"):
        make(Records("on_train_step_start")).train(tiny_data(8), 1)
    data = tiny_data(22)
    trainer = make(Records("on_train_step_start", items=True))
    trainer.train(data, 1, per_device_batch_size=4)
    assert values(trainer, "train_x") == pytest.approx([mean_of(data)], abs=1e-6)
    with pytest.raises(ValueError, match="needs items here"):
        make(Records("on_eval_step_start")).evaluate(tiny_data(8))


def test_the_items_are_those_of_the_loss_if_it_counts_others_than_samples():
    class Tokens(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            tokens = (batch[0] > 0).sum()
            return output | {"num_items_in_batch": tokens, "log": {"first": batch[0][0, 0]}}

    data = tiny_data(10)
    trainer = make(kind=Tokens)
    trainer.train(data, 1, per_device_batch_size=4, train_dataloader_kwargs={"shuffle": False})
    batches = [data.tensors[0][start : start + 4] for start in (0, 4, 8)]
    tokens = [(batch > 0).sum().item() for batch in batches]
    expected = sum(b[0, 0].item() * n for b, n in zip(batches, tokens, strict=True)) / sum(tokens)
    assert values(trainer, "train_first") == pytest.approx([expected], abs=1e-6)


def test_a_value_without_items_is_ignored_even_if_it_is_nan():
    class Sometimes(TrainerCallback):
        def on_train_step_end(self, trainer, step):
            trainer.record_mean("x", math.nan if step else 2.0, 0 if step else 4)
            trainer.record_mean("y", torch.tensor(math.nan), torch.tensor(0))

    trainer = make(Sometimes())
    trainer.train(tiny_data(12), 1, per_device_batch_size=4)
    assert values(trainer, "train_x") == [2.0]
    assert "train_y" not in trainer.run_history.get_metric_names()


def test_two_writers_of_one_name_are_an_error_that_names_both():
    class Clash(TrainerCallback):
        def on_backward_end(self, trainer):
            trainer.record_mean("input", 1.0)

    with pytest.raises(ValueError, match=r"'input' is recorded twice in one step, by batch_output"):
        make(Clash(), kind=Logs).train(tiny_data(8), 1)


def test_two_writers_of_one_name_in_different_steps_are_an_error_that_names_both():
    class At(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_train_step_end(self, trainer, step):
            if step == self.step:
                trainer.record_mean("x", 1.0)

    with pytest.raises(ValueError, match=r"'x' is recorded, by .* 'At' and by .* 'At:2'"):
        make(At(0), At(1)).train(tiny_data(8), 1, per_device_batch_size=4)


@pytest.mark.parametrize("name", ["loss", "loss_epoch", "", 3])
def test_a_name_of_the_cores_own_is_refused(name):
    class Wrong(TrainerCallback):
        def on_train_step_end(self, trainer):
            trainer.record_mean(name, 1.0)

    with pytest.raises(ValueError, match="can't name a mean"):
        make(Wrong()).train(tiny_data(8), 1)


@pytest.mark.parametrize("value", [torch.zeros(2), "1", None, torch.tensor(1j)])
def test_a_value_that_is_no_number_is_refused(value):
    class Wrong(TrainerCallback):
        def on_train_step_end(self, trainer):
            trainer.record_mean("x", value)

    with pytest.raises(TypeError, match="'x'"):
        make(Wrong()).train(tiny_data(8), 1)


def test_a_negative_number_of_items_is_refused():
    class Wrong(TrainerCallback):
        def on_train_step_end(self, trainer):
            trainer.record_mean("x", 1.0, -1)

    with pytest.raises(ValueError, match="'x' is over -1 items"):
        make(Wrong()).train(tiny_data(8), 1)


def test_means_belong_in_steps():
    class Late(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            trainer.record_mean("x", 1.0, 1)

    with pytest.raises(RuntimeError, match="in the hooks of a step"):
        make(Late()).train(tiny_data(8), 1)
    with pytest.raises(RuntimeError, match="in the hooks of a step"):
        make().record_mean("x", 1.0, 1)


def test_means_survive_an_interruption_and_an_evaluation_inside_the_epoch(tmp_path):
    class Evaluates(TrainerCallback):
        def on_train_step_end(self, trainer, step):
            if step == 1:
                trainer.control.evaluate()
            if step == 2:
                trainer.evaluate(tiny_data(5))

    def run(folder, **options):
        checkpoint = SaveTrainingStateCallback(folder, None, 1, save_at_end=False)
        trainer = make(Evaluates(), checkpoint, kind=Logs)
        trainer.train(data, 1, eval_dataset=tiny_data(9), per_device_batch_size=4, **options)
        return trainer

    data = tiny_data(22)
    whole = run(tmp_path / "whole")
    assert values(whole, "train_input") == pytest.approx([mean_of(data)], abs=1e-6)
    assert len(values(whole, "eval_input")) == 2
    for update in (2, 5):
        state = tmp_path / "whole" / f"update_{update:08d}"
        resumed = run(tmp_path / "resumed", resume_from=state)
        assert values(resumed, "train_input") == values(whole, "train_input")
        assert values(resumed, "eval_input") == values(whole, "eval_input")


def test_evaluated_models_prefix_their_means():
    class Other(TrainerCallback):
        def register_eval_models(self, trainer):
            return {"other": tiny_model()}

    from pa_core import hookimpl

    Other.register_eval_models = hookimpl(Other.register_eval_models)
    trainer = make(Other(), kind=Logs)
    trainer.train(tiny_data(8), 1, eval_dataset=TensorDataset(*tiny_data(5).tensors))
    assert values(trainer, "other_eval_input") == values(trainer, "eval_input")


def test_different_writers_on_two_processes_are_an_error_on_both():
    class TwoProcesses:
        device = torch.device("cpu")
        sum = staticmethod(lambda tensor: tensor)

        def gather_objects(self, mine):
            return [{"x": "the plugin 'a'"}, mine]

    engine: Any = TwoProcesses()
    means = EpochMeans()
    restored = EpochMeans()
    restored.loss.update(2.0, 3)
    means.load(EpochMeans().loss.state_dict(), {"x": restored.loss.state_dict()})  # of an epoch
    assert means.reduce(engine)[1] == [("x", 2.0, "the plugin 'a'")]
    means.start_step()
    means.record("x", 2.0, 1)
    with pytest.raises(ValueError, match="'x' is recorded by the plugin 'a' on one process and by"):
        means.reduce(engine)
