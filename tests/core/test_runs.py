"""Evaluating, predicting, and the lengths that a run may have."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback, TerminateOnNaNCallback
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of


def make(callbacks=(), model=None, trainer_class=Trainer, **kwargs):
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer_class(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, plugins=(), **kwargs
    )


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_evaluate_is_the_mean_over_all_samples(length):
    trainer, data = make(), tiny_data(length)
    x, y = data.tensors
    expected = nn.functional.cross_entropy(trainer.model(x), y).item()
    assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(expected, abs=1e-6)


def test_several_evaluation_datasets_have_names_of_their_own():
    trainer = make()
    trainer.train(tiny_data(), 2, eval_dataset={"easy": tiny_data(8), "hard": tiny_data(4)})
    names = trainer.run_history.get_metric_names()
    assert set(names) == {"train_loss_epoch", "easy_eval_loss_epoch", "hard_eval_loss_epoch"}
    assert set(trainer.evaluate({"new": tiny_data(5)})) == {"new_evaluation_loss"}


def test_an_evaluation_does_not_drop_what_an_overridden_method_drops_in_training():
    class Drops(Trainer):
        def get_default_train_dl_kwargs(self, batch_size):
            return super().get_default_train_dl_kwargs(batch_size) | {"drop_last": True}

    model, data = tiny_model(), tiny_data(10)
    trainer = Drops(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.train(data, 1, data, per_device_batch_size=4)
    right = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).item()
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == pytest.approx(right)
    assert trainer.evaluate(data, 4)["evaluation_loss"] == pytest.approx(right)
    assert len(trainer.predict(data, 4)) == 10


def test_every_record_says_where_the_run_stood():
    trainer = make()
    trainer.train(tiny_data(44), 2, per_device_batch_size=8)
    records = trainer.run_history.records
    assert [(r["epoch"], r["update"], r["samples"]) for r in records] == [(1, 6, 44), (2, 12, 88)]
    assert 0 < records[0]["seconds"] < records[1]["seconds"]


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_predict_returns_every_sample_in_order(length):
    trainer, data = make(), tiny_data(length)
    expected = trainer.model(data.tensors[0]).detach()
    assert torch.allclose(trainer.predict(data, 4), expected, atol=1e-6)


def test_predict_leaves_mode_model_and_history_alone():
    trainer = make()
    trainer.model[1].eval()
    trainer.predict(tiny_data(4))
    assert [module.training for module in trainer.model] == [True, False, True]
    assert not list(trainer.run_history.get_metric_names())


class Ragged(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((index % 3 + 1,), float(index))


def test_predictions_of_different_shapes_come_as_a_list_of_samples():
    class Identity(Trainer):
        def calculate_predictions(self, batch):
            return {"row": list(batch), "size": torch.tensor([len(row) for row in batch])}

    predictions = make(trainer_class=Identity).predict(Ragged(), 2, collate_fn=list)
    assert predictions["size"].tolist() == [1, 2, 3, 1, 2]
    assert [row[0].item() for row in predictions["row"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("length", "updates", "epochs"),
    [(2, 12, 2), ("2 epochs", 12, 2), ("1.5 epochs", 9, 2), ("7 updates", 7, 2),
     ("100 samples", 14, 3), ("44 samples", 6, 1)],
)  # fmt: skip
def test_a_run_may_have_its_length_in_any_unit(length, updates, epochs):
    trainer = make()
    trainer.train(tiny_data(44), length, eval_dataset=tiny_data(4))
    assert trainer.updates == trainer.num_updates == updates
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == epochs


def test_a_run_may_be_limited_in_time():
    trainer = make()
    trainer.train(tiny_data(44), "0.3 seconds")
    assert trainer.updates > 6
    assert trainer.num_updates is None


def test_a_percentage_is_no_length_of_a_run():
    with pytest.raises(ValueError, match="percentage"):
        make().train(tiny_data(), "5%")


def test_auto_resume_starts_afresh_and_then_goes_on(tmp_path):
    def train(epochs):
        saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=2, max_checkpoints=2)
        trainer = make([saving])
        trainer.train(tiny_data(44), epochs, resume_from="auto")
        return trainer

    assert train(2).updates == 12
    longer, whole = train(4), make()
    whole.train(tiny_data(44), 4)
    assert longer.updates == 24
    assert_identical(weights_of(whole), weights_of(longer))


def test_bfloat16_is_used_where_asked_for_and_by_no_later_trainer():
    low = make(mixed_precision="bf16")
    low.train(tiny_data(44), 3)
    high = make()
    high.train(tiny_data(44), 3)
    assert low.run_config.mixed_precision == "bf16"
    assert high.run_config.mixed_precision == "no"
    losses = [t.run_history.get_metric_values("train_loss_epoch") for t in (low, high)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]


def test_a_model_and_an_optimizer_may_be_given_as_recipes():
    model = copy.deepcopy(tiny_model())
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), lambda p: torch.optim.SGD(p, lr=0.1), callbacks=(), plugins=()
    )
    trainer.train(DataLoader(tiny_data(), batch_size=4), "2 updates")
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.updates == 2


def test_a_nan_in_an_evaluation_is_told():
    stops = []

    class Told(TrainerCallback):
        def on_stop_training_error(self, trainer, error):
            stops.append(str(error))

    trainer = make([TerminateOnNaNCallback, Told])
    with torch.no_grad():
        trainer.model[0].weight.fill_(float("nan"))
    trainer.evaluate(tiny_data(8))
    assert len(stops) == 1
    assert "NaN" in stops[0]


def test_predictions_may_be_lists_of_outputs_or_of_samples_and_hold_nothing():
    class Outputs(Trainer):
        def calculate_predictions(self, batch):
            outputs = self.model(batch[0])
            texts = [str(row.argmax().item()) for row in outputs]
            return {"both": [outputs, 2 * outputs], "texts": texts, "cache": None}

    predictions = make(trainer_class=Outputs).predict(tiny_data(10), 4)
    first, second = predictions["both"]
    assert first.shape == (10, 3)
    assert torch.equal(second, 2 * first)
    assert predictions["texts"] == [str(row.argmax().item()) for row in first]
    assert predictions["cache"] is None


@pytest.mark.parametrize("option", [{"shuffle": True}, {"drop_last": True}])
def test_predict_refuses_what_would_leave_out_or_reorder_samples(option):
    with pytest.raises(ValueError, match="in the dataset's order: remove"):
        make().predict(tiny_data(4), 4, option)


def test_predict_refuses_a_loader_of_a_subclass_that_would_leave_out_or_reorder_samples():
    class Options(Trainer):
        def get_default_eval_dl_kwargs(self, batch_size):
            return super().get_default_eval_dl_kwargs(batch_size) | options

    class Loader(Trainer):
        def create_eval_dataloader(self, batch_size, eval_dl_kwargs=None):
            return DataLoader(self.eval_dataset, batch_size, **options)

    for option, what in (("shuffle", "shuffles"), ("drop_last", "drops")):
        options = {option: True}
        for trainer_class in (Options, Loader):
            trainer = make(trainer_class=trainer_class)
            with pytest.raises(ValueError, match=f"create {what} samples: remove {option} there"):
                trainer.predict(tiny_data(10), 4)
        ready = DataLoader(tiny_data(10), 4, **options)  # its order is asked for
        assert len(make().predict(ready)) == (8 if option == "drop_last" else 10)
    assert len(make(trainer_class=Options).predict(tiny_data(8), 4)) == 8  # nothing to drop


def test_a_prediction_for_the_batch_as_a_whole_is_an_error():
    class Mean(Trainer):
        def calculate_predictions(self, batch):
            return self.model(batch[0]).mean()

    with pytest.raises(TypeError, match="samples as their first dimension.* a scalar tensor"):
        make(trainer_class=Mean).predict(tiny_data(4))


def test_two_trainers_that_are_alive_keep_their_precision():
    half, full = make(mixed_precision="bf16"), make()
    half.train(tiny_data(8), 1)
    assert half.run_config.mixed_precision == "bf16"
    full.train(tiny_data(8), 1)
    assert full.run_config.mixed_precision == "no"


def test_a_window_without_items_leaves_the_weights_as_they_are():
    class Tokens(Trainer):
        def calculate_train_batch_loss(self, batch):
            outputs = self.model(batch[0])
            items = torch.tensor(0 if self.updates == 1 else len(batch[0]))
            loss = nn.functional.cross_entropy(outputs, batch[1]) if items else outputs.sum() * 0
            return {
                "loss": loss,
                "model_outputs": outputs,
                "batch_size": len(outputs),
                "num_items_in_batch": items,
            }

    trainer = make(trainer_class=Tokens)
    trainer.train(tiny_data(32), 1, per_device_batch_size=4, gradient_accumulation_steps=2)
    assert trainer.updates == 4
    assert all(value.isfinite().all() for value in trainer.get_model().state_dict().values())


def test_numbers_of_numpy_are_numbers(tmp_path):
    class Sized(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return output | {"batch_size": np.int64(len(batch[0]))}

    trainer = make(trainer_class=Sized)
    trainer.train(tiny_data(8), np.int64(2), per_device_batch_size=np.int64(4))
    assert trainer.updates == 4
    trainer.save_training_state(tmp_path / "state")


def test_a_state_is_loaded_for_evaluation_without_the_runs_schedule_or_optimizer(tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    trained = make()
    trained.train(tiny_data(8), 1, create_scheduler_fn=schedule)
    trained.save_training_state(tmp_path / "state")
    fresh = Trainer(tiny_model(), nn.CrossEntropyLoss(), None, callbacks=(), plugins=())
    fresh.load_training_state(tmp_path / "state")
    assert torch.equal(fresh.predict(tiny_data(4)), trained.predict(tiny_data(4)))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: make().train(None, 1), "train.. needs a dataset"),
        (
            lambda: make().train(tiny_data(4), 1, train_dataloader_kwargs={"batch_size": None}),
            "batch size is None; expected a positive integer",
        ),
        (lambda: make(callbacks="metrics"), "callbacks must be a list"),
    ],
)
def test_arguments_that_make_no_sense_are_told(mistake, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mistake()


def test_a_limit_in_the_environment_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setenv("PT_ACC_LIMIT_BATCHES", "two")
    with pytest.raises(ValueError, match="PT_ACC_LIMIT_BATCHES must be a positive integer"):
        make()


def test_the_outputs_of_a_step_are_freed_before_the_next_forward_pass():
    outputs, are_alive = [], []

    class Model(nn.Linear):
        def forward(self, x):
            are_alive.extend(output() is not None for output in outputs[-1:])
            result = super().forward(x)
            outputs.append(weakref.ref(result))
            return result

    class Watching(TrainerCallback):
        def on_train_step_end(self, batch_output):
            assert batch_output["model_outputs"] is outputs[-1]()

        on_eval_step_end = on_train_step_end

    trainer = make([Watching], Model(6, 3))
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data(), gradient_accumulation_steps=2)
    assert len(are_alive) > 20
    assert not any(are_alive)
