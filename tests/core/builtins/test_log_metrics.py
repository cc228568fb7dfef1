import pytest

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import LogMetricsCallback, StepBasedEvaluationCallback
from tests.builtin_trainer import Interrupts, Records, make_trainer
from tests.helpers import tiny_data


class Log(LogMetricsCallback):
    """Keeps the metrics that a logger for another service would send."""

    def __init__(self, every=None):
        super().__init__(every)
        self.logged = []

    def log_metrics(self, trainer, metrics):
        self.logged.append(metrics)

    @property
    def names(self):
        return [list(metrics) for metrics in self.logged]


def test_metrics_are_logged_after_training_and_after_evaluation():
    log = Log()
    trainer = make_trainer(log)
    trainer.train(tiny_data(16), 2, eval_dataset=tiny_data(8))
    assert log.names == [["train_loss_epoch"], ["eval_loss_epoch"]] * 2
    history = trainer.run_history
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        values = [metrics[name] for metrics in log.logged if name in metrics]
        assert values == history.get_metric_values(name)


def test_a26_metrics_are_grouped_by_when_they_are_recorded_not_by_name():
    class RecordsInEvaluation(TrainerCallback):
        def on_eval_epoch_end(self, trainer):
            trainer.run_history.update_metric("constrained_acc", 0.5)

    log = Log()
    make_trainer(log, Records([1.0], name="gradient_noise"), RecordsInEvaluation).train(
        tiny_data(16), 1, eval_dataset=tiny_data(8)
    )
    assert log.names == [
        ["train_loss_epoch", "gradient_noise"],
        ["eval_loss_epoch", "constrained_acc"],
    ]


def test_a26_a_metric_that_was_not_recorded_again_is_not_logged_again():
    class Once(TrainerCallback):
        def on_train_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 1:
                trainer.run_history.update_metric("parameters", 83)

    log = Log()
    make_trainer(log, Once).train(tiny_data(16), 3)
    assert log.names == [
        ["train_loss_epoch", "parameters"],
        ["train_loss_epoch"],
        ["train_loss_epoch"],
    ]


def test_a_metric_that_repeats_its_value_is_logged_again():
    log = Log()
    make_trainer(log, Records([0.5, 0.5])).train(tiny_data(16), 2)
    assert [metrics["score"] for metrics in log.logged] == [0.5, 0.5]


def test_c6_metrics_of_callbacks_after_the_logger_are_logged_in_the_same_epoch():
    log = Log()
    make_trainer(log, Records([0.5])).train(tiny_data(16), 1)
    assert log.names == [["train_loss_epoch", "score"]]


def test_an_evaluation_within_an_epoch_logs_only_its_own_metrics():
    class RecordsAtUpdates(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.updates == 1:
                trainer.run_history.update_metric("learning_rate", 0.1)

    log = Log()
    make_trainer(log, StepBasedEvaluationCallback(2), RecordsAtUpdates).train(
        tiny_data(24), 1, eval_dataset=tiny_data(8)
    )
    assert log.names == [
        ["intermediate_eval_loss"],
        ["learning_rate", "train_loss_epoch"],
        ["eval_loss_epoch"],
    ]


def test_metrics_recorded_in_training_run_epoch_end_are_logged_too():
    class Late(Trainer):
        def training_run_epoch_end(self):
            self.run_history.update_metric("late", 1.0)

    log = Log()
    make_trainer(log, trainer_class=Late).train(tiny_data(16), 1)
    assert log.names == [["train_loss_epoch"], ["late"]]


def test_evaluate_logs_the_metrics_it_recorded():
    log = Log()
    trainer = make_trainer(log)
    trainer.train(tiny_data(16), 1)
    log.logged.clear()
    metrics = trainer.evaluate(tiny_data(8))
    assert log.logged == [metrics]


def test_several_evaluation_datasets_are_logged_under_their_names():
    log = Log()
    make_trainer(log).train(tiny_data(16), 1, eval_dataset={"a": tiny_data(8), "b": tiny_data(16)})
    assert log.names == [["train_loss_epoch"], ["a_eval_loss_epoch"], ["b_eval_loss_epoch"]]


@pytest.mark.parametrize("reset", [True, False])
def test_a_second_run_logs_its_own_metrics(reset):
    log = Log()
    trainer = make_trainer(log)
    for _ in range(2):
        trainer.train(tiny_data(16), 1, reset_run_history=reset)
    assert log.names == [["train_loss_epoch"]] * 2


def test_a_resumed_run_does_not_log_earlier_metrics_again(tmp_path):
    class Saves(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            trainer.control.save(tmp_path / "state")

    with pytest.raises(KeyboardInterrupt):
        make_trainer(Log, Saves, Interrupts(4), Records([0.1, 0.2])).train(tiny_data(16), 3)
    log = Log()
    trainer = make_trainer(log, Saves, Records([], name="other"))
    trainer.callback_handler.callbacks[-1].values = [0.3]
    trainer.train(tiny_data(16), 3, resume_from=tmp_path / "state")
    assert log.names == [["train_loss_epoch", "other"]]


def test_a_pytorch_accelerated_logger_with_its_own_constructor_and_start_still_logs():
    class Platform(LogMetricsCallback):
        def __init__(self):
            self.sent, self.tags = [], {}

        def on_training_run_start(self, trainer, **kwargs):
            self.tags = trainer.run_config.to_dict()

        def on_eval_epoch_end(self, trainer, **kwargs):
            super().on_eval_epoch_end(trainer, **kwargs)

        def log_metrics(self, trainer, metrics):
            self.sent.append(metrics)

    platform = Platform()
    trainer = make_trainer(platform)
    for _ in range(2):
        trainer.train(tiny_data(16), 1, eval_dataset=tiny_data(8))
    assert [list(metrics) for metrics in platform.sent] == [
        ["train_loss_epoch"],
        ["eval_loss_epoch"],
    ] * 2
    assert platform.tags["num_epochs"] == 1


def test_metrics_are_logged_within_an_epoch_if_a_plugin_requests_it():
    class Requests(TrainerCallback):
        def on_train_step_end(self, trainer, step):
            if step == 1:
                trainer.control.log()

        def on_training_run_end(self, trainer):
            trainer.run_history.update_metric("learning_rate", 0.5)  # may record it, too

    log = Log()
    trainer = make_trainer(log, Requests)
    trainer.train(tiny_data(44), 1)
    assert log.names[0] == ["train_loss", "learning_rate"]
    assert trainer.run_history.records[0]["update"] == 2
    assert log.names[1:] == [["train_loss_epoch"]]


def test_metrics_are_logged_at_the_given_interval():
    log = Log(every=2)
    trainer = make_trainer(log)
    trainer.train(tiny_data(44), 2)
    updates = [r["update"] for r in trainer.run_history.records if r["metric"] == "train_loss"]
    assert updates == [2, 4, 6, 8, 10, 12]
    assert sum("train_loss" in names for names in log.names) == 6
    for log.every, expected in ((2, [2, 4, 6]), (1, [1, 2, 3, 4, 5, 6]), (1, [1, 2, 3, 4, 5, 6])):
        trainer.train(tiny_data(44), 1)
        updates = [r["update"] for r in trainer.run_history.records if r["metric"] == "train_loss"]
        assert updates == expected


def test_metrics_are_printed_one_per_line(capsys):
    trainer = make_trainer(LogMetricsCallback())
    trainer.train(tiny_data(16), 1)
    trainer.callback_handler.callbacks[0].log_metrics(trainer, {"a": 1 / 3, "b": [1, 2]})
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("train_loss_epoch: 1.") for line in lines)
    assert lines[-2:] == ["a: 0.333333", "b: [1, 2]"]
