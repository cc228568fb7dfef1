import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.durations import Progress
from pa_core.tracking import InMemoryRunHistory, LossTracker
from tests.helpers import MinimalHistory, tiny_data, tiny_model


def recorded(*pairs):
    history = InMemoryRunHistory()
    for name, value in pairs:
        history.update_metric(name, value)
    return history


def test_metrics_are_kept_in_order_and_by_name():
    history = recorded(("loss", 3.0), ("accuracy", 0.5), ("loss", 2.0))
    assert list(history.get_metric_names()) == ["loss", "accuracy"]
    assert history.get_metric_values("loss") == [3.0, 2.0]
    assert history.get_latest_metric("loss") == 2.0


def test_a26_names_are_in_the_order_of_their_first_record_and_combine_with_sets():
    names = [f"metric_{number}" for number in range(50)]
    history = recorded(*((name, 1.0) for name in reversed(names)))
    assert list(history.get_metric_names()) == names[::-1]
    assert history.get_metric_names() == set(names)
    assert history.get_metric_names() - {"metric_0"} == set(names[1:])


def test_names_can_be_iterated_over_while_more_are_recorded():
    history = recorded(("loss", 1.0))
    for name in history.get_metric_names():
        history.update_metric(f"smooth_{name}", 1.0)
    assert list(history.get_metric_names()) == ["loss", "smooth_loss"]


def test_an_unknown_metric_is_an_error_that_names_the_nearest_and_records_nothing():
    history = recorded(("eval_loss_epoch", 1.0))
    with pytest.raises(ValueError, match="eval_loss_epoch"):
        history.get_latest_metric("eval_los_epoch")
    assert history.get_metric_values("eval_los_epoch") == []
    assert list(history.get_metric_names()) == ["eval_loss_epoch"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor([1, 2]), [1, 2]),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array([0.5, 1.0]), [0.5, 1.0]),
        ([torch.tensor(1.0), np.float64(2.0)], [1.0, 2.0]),
        ({"cat": np.float64(0.5)}, {"cat": 0.5}),
        (7, 7),
        ("text", "text"),
    ],
)
def test_values_are_converted_to_plain_python(given, kept):
    value = recorded(("metric", given)).get_latest_metric("metric")
    assert value == kept
    assert type(value) is type(kept)
    json.dumps(value)


def test_latest_records_returns_copies_of_the_last_records():
    history = InMemoryRunHistory()
    for value in range(3):
        history.update_metric("loss", value)
    assert history.latest_records(2) == history.records[1:]
    assert history.latest_records(0) == []
    history.latest_records(1)[0]["value"] = None  # a copy
    assert history.get_latest_metric("loss") == history.records[-1]["value"] == 2


def test_changing_a_returned_value_does_not_change_the_history():
    history = recorded(("loss", 1.0))
    history.get_metric_values("loss").clear()
    history.records[0]["value"] = 7.0
    assert history.get_latest_metric("loss") == 1.0
    assert history.records[0]["value"] == 1.0


def test_the_prefix_is_prepended_to_recorded_names():
    history = InMemoryRunHistory()
    history.set_metric_name_prefix("ema_")
    history.update_metric("loss", 1.0)
    assert history.metric_name_prefix == "ema_"
    history.set_metric_name_prefix()
    history.update_metric("loss", 2.0)
    assert history.get_metric_values("ema_loss") == [1.0]
    assert history.get_metric_values("loss") == [2.0]


def test_a_deleted_metric_is_removed_from_names_values_and_records():
    history = recorded(("loss", 1.0), ("accuracy", 0.5))
    history.delete_metric("loss")
    assert list(history.get_metric_names()) == ["accuracy"]
    assert [record["metric"] for record in history.records] == ["accuracy"]
    with pytest.raises(KeyError):
        history.delete_metric("loss")


def test_each_record_has_its_position_in_the_run():
    history = InMemoryRunHistory()
    history.update_metric("before", 1.0)
    history._increment_epoch()
    history.follow(lambda: Progress(1.5, 12, 96, 3.25, 0.75))
    history.update_metric("loss", 0.5)
    before, record = history.records
    assert record == {
        "metric": "loss",
        "value": 0.5,
        "epoch": 2,
        "update": 12,
        "samples": 96,
        "seconds": 3.25,
    }
    assert (before["epoch"], before["update"]) == (1, None)


def test_reset_returns_to_epoch_one_and_keeps_the_prefix():
    history = recorded(("loss", 1.0))
    history.set_metric_name_prefix("a_")
    history._set_epoch(4)
    history.reset()
    assert history.current_epoch == 1
    assert list(history.get_metric_names()) == []
    assert history.records == []
    assert history.metric_name_prefix == "a_"


def test_the_state_of_a_history_can_be_saved_as_json():
    history = recorded(("loss", np.float64(1.5)), ("loss", 0.5), ("f1", [0.1, 0.2]))
    history._increment_epoch()
    state = json.loads(json.dumps(history.state_dict()))
    restored = recorded(("stale", 1.0))
    restored.load_state_dict(state)
    assert restored.records == history.records
    assert restored.current_epoch == 2
    assert restored.get_metric_values("loss") == [1.5, 0.5]
    assert list(restored.get_metric_names()) == ["loss", "f1"]


def test_a_history_written_for_pytorch_accelerated_works_and_keeps_its_epoch():
    model = tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(),
        plugins=(),
        run_history=MinimalHistory(),
    )
    trainer.train(tiny_data(16), 2, eval_dataset=tiny_data(8))
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2
    restored = MinimalHistory()
    restored.load_state_dict(json.loads(json.dumps(trainer.run_history.state_dict())))
    assert restored.current_epoch == trainer.run_history.current_epoch == 3


def test_the_history_of_a_run_has_the_position_of_each_value():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.train(tiny_data(20), 2, eval_dataset=tiny_data(8))
    positions = [
        (record["metric"], record["epoch"], record["update"], record["samples"])
        for record in trainer.run_history.records
    ]
    assert positions == [
        ("train_loss_epoch", 1, 3, 20),
        ("eval_loss_epoch", 1, 3, 20),
        ("train_loss_epoch", 2, 6, 40),
        ("eval_loss_epoch", 2, 6, 40),
    ]
    seconds = [record["seconds"] for record in trainer.run_history.records]
    assert 0 < seconds[0] <= seconds[-1]


def test_a15_the_mean_loss_is_over_samples():
    tracker = LossTracker()
    tracker.update(torch.tensor(2.0), 3)
    tracker.update(torch.tensor(6.0), 1)
    assert tracker.average == 3.0
    assert tracker.total_loss == 12.0
    assert tracker.running_count == 4
    assert tracker.loss_value == 6.0


def test_a_tracker_accepts_plain_numbers_and_tensor_counts():
    tracker = LossTracker()
    tracker.update(2.0)
    tracker.update(4.0, torch.tensor(3))
    assert tracker.average == 3.5
    assert tracker.running_count == 4


def test_sums_on_the_cpu_are_in_double_precision():
    tracker = LossTracker()
    for _ in range(1000):
        tracker.update(torch.tensor(0.1), 1)
    assert math.isclose(tracker.average, float(torch.tensor(0.1)), rel_tol=1e-14)


def test_a_batch_without_samples_is_ignored_even_if_its_loss_is_nan():
    tracker = LossTracker()
    tracker.update(1.0, 2)
    tracker.update(torch.tensor(math.nan), 0)
    assert tracker.average == 1.0


def test_the_mean_of_an_empty_tracker_is_zero():
    assert LossTracker().average == 0


def test_a_reset_tracker_equals_a_new_one():
    tracker = LossTracker()
    tracker.update(1.0, 2)
    tracker.reset()
    assert tracker.state_dict() == LossTracker().state_dict()


def test_sums_is_a_tensor_of_sum_and_count():
    tracker = LossTracker()
    tracker.update(2.0, 3)
    sums = tracker.sums("cpu")
    assert sums.dtype == torch.float64
    assert sums.tolist() == [6.0, 3.0]


def test_a_tracker_continues_identically_from_a_state_saved_as_json():
    losses = [(1 / number, number + 2) for number in range(1, 9)]
    whole, first, second = LossTracker(), LossTracker(), LossTracker()
    for loss in losses:
        whole.update(*loss)
    for loss in losses[:3]:
        first.update(*loss)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in losses[3:]:
        second.update(*loss)
    assert second.state_dict() == whole.state_dict()


def test_c1_losses_on_another_device_are_summed_there_without_reading():
    """The meta device has no values, so reading one would raise."""
    tracker = LossTracker()
    tracker.update(torch.tensor(1.0), 2)
    for count in (4, torch.ones((), dtype=torch.int64, device="meta")):
        tracker.update(torch.zeros((), device="meta"), count)
    assert tracker.sums("meta").shape == (2,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = tracker.average


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_c1_losses_on_a_gpu_are_summed_as_on_the_cpu_without_synchronising():
    losses = torch.rand(100, generator=torch.Generator().manual_seed(1))
    on_gpu, host, device = losses.cuda(), LossTracker(), LossTracker()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(100):
            device.update(on_gpu[number], number)
        sums = device.sums("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for number in range(100):
        host.update(losses[number], number)
    assert sums.tolist() == host.sums("cpu").tolist()
    resumed = LossTracker()
    resumed.load_state_dict(device.state_dict())
    for tracker in (resumed, device):
        tracker.update(on_gpu[0], 3)
    assert resumed.total_loss == device.total_loss


# -- Who records what -----------------------------------------------------------------------------


class Records(TrainerCallback):
    """Records a metric in an event, by the history or as a mean."""

    def __init__(self, event: str, name: str = "score", *, as_mean: bool = False) -> None:
        def record(trainer, **arguments) -> None:
            if as_mean:
                trainer.record_mean(name, 1.0)
            else:
                trainer.run_history.update_metric(name, 2.0)

        setattr(self, event, record)


class Subclass(Trainer):
    def train_epoch_end(self):
        self.run_history.update_metric("score", 3.0)


def train_with(*plugins, kind=Trainer, run_history=None, settings=None, **arguments) -> Trainer:
    model = tiny_model()
    trainer = kind(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=plugins,
        plugins=None if settings else (),
        run_history=run_history,
        settings=settings,
    )
    data = tiny_data(8)
    trainer.train(data, 2, **{"eval_dataset": data} | arguments)
    return trainer


ENDS = "on_train_epoch_end"


@pytest.mark.parametrize("history", [InMemoryRunHistory, MinimalHistory])
@pytest.mark.parametrize(
    ("plugins", "kind", "message"),
    [
        ([Records(ENDS), Records("on_eval_epoch_end")], Trainer, "the plugin 'Records:2'"),
        ([Records(ENDS)], Subclass, "code outside of plugins and by the plugin 'Records'"),
        ([Records(ENDS, "eval_loss_epoch")], Trainer, "'Records' and by the training loop"),
        (
            [Records(ENDS, "eval_x"), Records("on_eval_step_end", "x", as_mean=True)],
            Trainer,
            r"the plugin 'Records' and by record_mean\(\) of the plugin 'Records:2'",
        ),
    ],
)
def test_two_writers_of_a_metric_are_an_error_that_names_both(history, plugins, kind, message):
    with pytest.raises(ValueError, match=f"is recorded by .*{message}"):
        train_with(*plugins, kind=kind, run_history=history())


def test_one_writer_may_record_in_several_events_and_code_outside_of_runs_at_any_time():
    class Twice(Records):
        def on_training_run_start(self, trainer):
            trainer.run_history.claim_metric("score")

        def on_eval_step_end(self, trainer):
            trainer.run_history.update_metric("score", 4.0)

    trainer = train_with(Twice(ENDS))
    trainer.run_history.update_metric("score", 5.0)
    trainer.evaluate(tiny_data(4))
    assert trainer.run_history.get_metric_values("score") == [2.0, 4.0, 2.0, 4.0, 5.0, 4.0]
    # Another plugin, in another run.
    trainer.plugins.unregister("Twice")
    trainer.plugins.register(Records(ENDS))
    trainer.train(tiny_data(8), 1, reset_run_history=False)
    assert trainer.run_history.get_latest_metric("score") == 2.0


def test_a_deleted_metric_has_no_writer():
    class Replaces(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            value = trainer.run_history.get_latest_metric("score")
            trainer.run_history.delete_metric("score")
            trainer.run_history.update_metric("score", -value)

        def on_eval_epoch_end(self, trainer):
            trainer.run_history.delete_metric("score")

    assert "score" not in train_with(Records(ENDS), Replaces()).run_history.get_metric_names()


def test_a_claimed_metric_is_refused_before_the_first_batch():
    class Claims(Records):
        def on_training_run_start(self, trainer):
            trainer.run_history.claim_metric("score")

        def on_train_step_start(self, trainer):
            raise AssertionError("a batch was drawn")

    with pytest.raises(ValueError, match="'Claims' and by the plugin 'Claims:2'"):
        train_with(Claims(ENDS), Claims(ENDS))


@pytest.mark.parametrize("history", [InMemoryRunHistory, MinimalHistory])
def test_instances_record_under_names_of_their_own(tmp_path, history):
    (tmp_path / "watch.py").write_text(
        "from pa_core import TrainerCallback\n"
        "class Watch(TrainerCallback):\n"
        "    def on_train_epoch_end(self, trainer):\n"
        "        trainer.run_history.update_metric('train_score', 1.0)\n"
        "    def on_eval_step_end(self, trainer):\n"
        "        trainer.record_mean('y', 1.0)\n"
    )
    file = tmp_path / "pyproject.toml"
    file.write_text('[tool.pa-core]\nplugins = ["watch.py", "watch.py:a", "watch.py:b"]\n')
    names = set(train_with(settings=file, run_history=history()).run_history.get_metric_names())
    assert {name for name in names if "score" in name or name.endswith("y")} == {
        *("train_score", "train_a_score", "train_b_score", "eval_y", "eval_a_y", "eval_b_y")
    }


def test_names_of_a_dataset_and_of_a_model_on_another_dataset_that_are_equal_are_refused():
    class Average(TrainerCallback):
        @hookimpl
        def register_eval_models(self):
            return {"ema": tiny_model()}

    datasets = {"x": tiny_data(4), "ema_x": tiny_data(4)}
    with pytest.raises(ValueError, match="by the evaluation on 'ema_x' and by .* on 'x'"):
        train_with(Average(), eval_dataset=datasets)


def test_copies_of_a_history_have_no_writers():
    trainer = train_with(Records(ENDS))
    copied = copy.deepcopy(trainer.run_history)
    assert copied._writers is None
    assert copied.records == trainer.run_history.records


# -- As in pytorch-accelerated --------------------------------------------------------------------


def test_names_of_metrics_are_an_ordered_set():
    history = InMemoryRunHistory()
    recorded = [f"metric_{number}" for number in (7, 1, 9, 3, 5)]
    for name in recorded:
        history.update_metric(name, 1.0)
    names = history.get_metric_names()
    assert list(names) == recorded
    assert names == set(recorded)
    assert names.union({"more"}) == {*recorded, "more"}
    assert names.issuperset({"metric_9"})
    assert names.difference(recorded[1:]) == {"metric_7"}
    names.discard("metric_7")
    names.add("more")
    assert list(names) == [*recorded[1:], "more"]
    assert repr(names).startswith("{'metric_1', 'metric_9'")
    assert "metric_7" in history.get_metric_names()  # the history is another


def test_subclasses_read_the_values_of_all_metrics():
    class Mine(InMemoryRunHistory):
        def latest(self):
            return {name: values[-1] for name, values in self._metrics.items()}

    history = Mine()
    history.update_metric("a", 1.0)
    history.update_metric("a", 2.0)
    assert history.latest() == {"a": 2.0}
    with pytest.raises(AttributeError):
        history._metrics["a"].append(3.0)
    with pytest.raises(TypeError):
        history._metrics["b"] = []


def test_a_loss_tracker_that_resets_its_attributes_itself():
    class Mine(LossTracker):
        def reset(self):
            self.loss_value, self._average, self.total_loss, self.running_count = 0, 0, 0, 0

    tracker = Mine()
    tracker.update(2.0, 3)
    tracker.reset()
    tracker.update(torch.tensor(3.0), 2)
    assert (tracker.average, tracker.total_loss, tracker.running_count) == (3.0, 6.0, 2)
