"""Each provider takes the place of the core's own way, each run can be wrapped, each registry
gives things by name: in a real Trainer.
"""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from pa_core import Trainer, hookimpl
from pa_core.callbacks import SaveBestModelCallback
from pa_core.errors import PluginConflictError, PluginNotFoundError
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of


class Offers:
    """A plugin that implements one hook with a function."""

    def __init__(self, hook, function, **options):
        setattr(self, hook, hookimpl(**options)(function) if options else hookimpl(function))


def trainer_with(*plugins, trainer_class=Trainer, model=None):
    model = tiny_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer_class(
        model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=list(plugins)
    )


def test_create_accelerator_makes_the_trainers_accelerator():
    accelerator = Accelerator(cpu=True)
    trainer = trainer_with(Offers("create_accelerator", lambda trainer: accelerator))
    assert trainer._accelerator is accelerator


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_dataloader_of_a_plugin_is_the_one_that_is_used(part):
    loader = DataLoader(tiny_data(12), batch_size=3)
    seen = []

    def create(**arguments):
        seen.append((arguments["batch_size"], arguments[f"{part}_dl_kwargs"]))
        return loader

    trainer = trainer_with(Offers(f"create_{part}_dataloader", create))
    kwargs = {f"{part}_dataloader_kwargs": {"num_workers": 0}}
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8), per_device_batch_size=4, **kwargs)
    assert seen == [(4, {"num_workers": 0})]
    used = {"train": trainer.train_dataloader, "eval": trainer.eval_dataloaders[None]}
    assert used[part] is loader


def test_create_train_dataloader_and_create_eval_dataloader_may_leave_it_to_the_core():
    plugin = Offers("create_train_dataloader", lambda trainer: None)
    plugin.create_eval_dataloader = hookimpl(lambda trainer: None)
    trainer = trainer_with(plugin)
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8), per_device_batch_size=4)
    assert len(trainer.train_dataloader) == len(trainer.eval_dataloaders[None]) == 2


def test_create_scheduler_gives_a_schedule_to_a_run_without_one():
    def create(trainer):
        return torch.optim.lr_scheduler.StepLR(trainer.optimizer, step_size=1, gamma=0.5)

    trainer = trainer_with(Offers("create_scheduler", create))
    trainer.train(tiny_data(12), 1, per_device_batch_size=4)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_calculate_train_batch_loss_and_its_like_replace_the_computation():
    def loss(trainer, batch):
        outputs = trainer.model(batch[0])
        loss = outputs.sum() * 0 + 7
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(outputs)}

    trainer = trainer_with(
        Offers("calculate_train_batch_loss", loss),
        Offers("calculate_eval_batch_loss", loss),
        Offers("calculate_predictions", lambda batch: torch.full((len(batch[0]),), 3.0)),
    )
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8))
    assert trainer.run_history.get_latest_metric("train_loss_epoch") == 7
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == 7
    assert trainer.predict(tiny_data(8)).tolist() == [3.0] * 8


def test_a_wrapper_that_returns_nothing_keeps_what_is_inside():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    def around(trainer):
        yield

    hooks = ["create_train_dataloader", "create_eval_dataloader", "calculate_train_batch_loss"]
    hooks += ["calculate_eval_batch_loss", "create_accelerator", "run_update", "run_training"]
    torch.manual_seed(0)
    trainers = []
    for plugins in ([], [Offers(hook, around, wrapper=True) for hook in hooks]):
        torch.manual_seed(0)
        trainers.append(trainer_with(*plugins, model=Counts(6, 3)))
        trainers[-1].train(tiny_data(8), 1, eval_dataset=tiny_data(8), per_device_batch_size=4)
    plain, wrapped = trainers
    assert plain.model.calls == wrapped.model.calls == 4
    assert_identical(weights_of(wrapped), weights_of(plain))


def test_a_wrapper_that_spoils_what_it_was_given_is_named():
    def spoils(trainer):
        output = yield
        output["loss"] = output["loss"].item()

    hook = "calculate_train_batch_loss"
    trainer = trainer_with(Offers(hook, spoils, wrapper=True))
    with pytest.raises(TypeError, match="returned float as the loss") as caught:
        trainer.train(tiny_data(8), 1)
    assert "in hook calculate_train_batch_loss of plugin 'Offers'" in caught.value.__notes__[0]

    def around(trainer):
        yield

    trainer = trainer_with(Offers(hook, around, wrapper=True))
    trainer.loss_func = lambda outputs, targets: 3.0
    with pytest.raises(TypeError, match="loss_func returned float as the loss") as caught:
        trainer.train(tiny_data(8), 1)
    assert not any("plugin" in note for note in getattr(caught.value, "__notes__", ()))

    entry = r"1 as the entry \['score'\]\[0\]\[1\]"
    for create, found in (
        (lambda batch: object(), "an object"),
        (lambda batch: {"score": [(torch.zeros(8), 1)]}, entry),
    ):
        trainer = trainer_with(Offers("calculate_predictions", create))
        with pytest.raises(TypeError, match=f"_predictions returned {found}; it must") as caught:
            trainer.predict(tiny_data(8))
        assert "of plugin 'Offers'" in caught.value.__notes__[0]


def test_a_trainer_that_makes_the_backward_pass_itself_may_be_given_any_loss():
    class Mine(Trainer):
        def backward_step(self, loss):
            assert not loss.requires_grad
            (self.output.mean() * 2).backward()

    def loss(trainer, batch):
        trainer.output = trainer.model(batch[0])
        return {"loss": torch.ones(()), "model_outputs": None, "batch_size": 8}

    trainer = trainer_with(Offers("calculate_train_batch_loss", loss), trainer_class=Mine)
    before = weights_of(trainer)
    trainer.train(tiny_data(8), 1)
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def test_a_provider_may_return_a_loss_for_each_evaluated_sample():
    def loss(trainer, batch):
        outputs = trainer.model(batch[0])
        return {"loss": outputs.sum(1) * 0 + torch.arange(8.0), "batch_size": 8}

    trainer = trainer_with(Offers("calculate_eval_batch_loss", loss))
    assert trainer.evaluate(tiny_data(8))["evaluation_loss"] == 3.5


def test_a_trainer_that_overrides_the_method_comes_before_every_plugin():
    class Mine(Trainer):
        def create_scheduler(self):
            return torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.1)

    plugin = Offers("create_scheduler", lambda trainer: pytest.fail("the plugin was asked"))
    trainer = trainer_with(plugin, trainer_class=Mine)
    trainer.train(
        tiny_data(4), 1, per_device_batch_size=4, create_scheduler_fn=lambda optimizer: None
    )
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("run", ["run_training", "run_evaluation", "run_prediction"])
def test_a_wrapped_run_gets_to_close_whatever_is_raised(run):
    log = []

    def around(trainer):
        log.append("open")
        try:
            return (yield)
        finally:
            log.append("closed")

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            raise ZeroDivisionError("of the model")

    trainer = trainer_with(Offers(run, around, wrapper=True), model=Fails())
    start = {
        "run_training": lambda: trainer.train(tiny_data(4), 1),
        "run_evaluation": lambda: trainer.evaluate(tiny_data(4)),
        "run_prediction": lambda: trainer.predict(tiny_data(4)),
    }
    with pytest.raises(ZeroDivisionError) as caught:
        start[run]()
    assert log == ["open", "closed"]
    assert not hasattr(caught.value, "__notes__")  # the model's own fault, and no plugin's


def test_a_prediction_can_be_replaced_and_its_result_changed():
    def double():
        return 2 * (yield)

    plain = trainer_with().predict(tiny_data(10))
    doubled = trainer_with(Offers("run_prediction", double, wrapper=True)).predict(tiny_data(10))
    torch.testing.assert_close(doubled, 2 * plain)
    own = Offers("run_prediction", lambda loader, to: (len(loader), to))
    assert trainer_with(own).predict(tiny_data(10), to="folder") == (2, "folder")


def test_register_models_gives_a_model_by_name():
    plugin = Offers("register_models", lambda: {"tiny": tiny_model})
    trainer = Trainer("tiny", nn.CrossEntropyLoss(), torch.optim.SGD, plugins=[plugin])
    assert isinstance(trainer.model, nn.Sequential)


def test_register_schedulers_gives_a_schedule_by_name_and_its_run():
    seen = []

    def halving(optimizer, num_updates, num_epochs):
        seen.append((num_updates, num_epochs))
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    trainer = trainer_with(Offers("register_schedulers", lambda: {"halving": halving}))
    trainer.train(tiny_data(12), 2, per_device_batch_size=4, create_scheduler_fn="halving")
    assert seen == [(6, 2)]
    with pytest.raises(PluginNotFoundError, match=r"'halvin' among the schedulers. .*'halving'"):
        trainer.train(tiny_data(12), 2, create_scheduler_fn="halvin")


def test_two_plugins_with_one_name_in_register_metrics_are_an_error_that_names_both():
    first = Offers("register_metrics", lambda: {"f1": object})
    trainer = trainer_with(first, Offers("register_metrics", lambda: {"f1": object}))
    with pytest.raises(PluginConflictError, match=r"'f1' .* 'Offers' .* 'Offers:2'"):
        trainer.plugins.registry("register_metrics")


def test_create_optimizer_makes_one_where_the_user_gives_none():
    plugin = Offers(
        "create_optimizer", lambda trainer: torch.optim.SGD(trainer.model.parameters(), lr=0.3)
    )
    trainer = Trainer(tiny_model(), nn.CrossEntropyLoss(), None, plugins=[plugin])
    assert trainer.optimizer.param_groups[0]["lr"] == 0.3
    assert trainer_with(plugin).optimizer.param_groups[0]["lr"] == 0.1


def test_without_an_optimizer_a_model_is_evaluated_and_not_trained():
    trainer = Trainer(tiny_model(), nn.CrossEntropyLoss(), None, callbacks=(), plugins=())
    trainer.evaluate(tiny_data(8))
    assert trainer.run_history.get_latest_metric("evaluation_loss") > 0
    with pytest.raises(ValueError, match="Training needs an optimizer"):
        trainer.train(tiny_data(8), 1)


def test_register_eval_models_has_each_evaluated_beside_the_trained_one():
    class Other:
        def __init__(self):
            self.zero = tiny_model()
            for parameter in self.zero.parameters():
                nn.init.zeros_(parameter)
            self.seen = []

        @hookimpl
        def register_eval_models(self, trainer):
            return {"zero": self.zero}

        @hookimpl
        def on_eval_epoch_end(self, trainer):
            self.seen.append((trainer.model is self.zero, trainer.eval_name))

    plugin = Other()
    trainer = trainer_with(plugin)
    sets = {"a": tiny_data(8), "b": tiny_data(4)}
    trainer.train(tiny_data(8), 1, eval_dataset=sets)
    assert plugin.seen == [(False, "a"), (False, "b"), (True, "a"), (True, "b")]
    history = trainer.run_history
    for name in sets:
        value = history.get_latest_metric(f"zero_{name}_eval_loss_epoch")
        assert value == pytest.approx(math.log(3), rel=1e-6)  # three classes, and no opinion
        assert history.get_latest_metric(f"{name}_eval_loss_epoch") != value
    assert trainer.model is not plugin.zero
    trainer.evaluate(tiny_data(4))
    assert history.get_latest_metric("zero_evaluation_loss") == pytest.approx(math.log(3))


def test_save_best_model_saves_another_evaluated_model_if_asked(tmp_path):
    average = tiny_model()
    plugin = Offers("register_eval_models", lambda trainer: {"average": average})
    save = SaveBestModelCallback(
        tmp_path / "best.pt", watch_metric="average_eval_loss_epoch", model="average"
    )
    trainer = trainer_with(plugin, save)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8))
    assert_identical(weights_of(trainer), before)  # it has gone back to them in the end

    save.model = "averag"
    with pytest.raises(PluginNotFoundError, match="'average'"):
        trainer.train(tiny_data(8), 1, eval_dataset=tiny_data(8))


def test_a_schedule_by_name_hears_that_the_length_of_the_run_is_unknown():
    seen = []

    def create(optimizer, num_updates, num_epochs):
        seen.append((num_updates, num_epochs))
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    trainer = trainer_with(Offers("register_schedulers", lambda: {"any": create}))
    trainer.train(tiny_data(8), "1 minute", max_num_train_steps=1, create_scheduler_fn="any")
    trainer.train(tiny_data(8), "3 updates", per_device_batch_size=4, create_scheduler_fn="any")
    assert seen == [(None, None), (3, 1.5)]
