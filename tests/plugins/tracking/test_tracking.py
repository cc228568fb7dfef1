"""Records are sent once, at the right time, across interruptions, failures and evaluations."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from pa_core import Trainer, hookimpl
from pa_core.builtins.step_evaluation import StepBasedEvaluationCallback
from pa_core.tracking import RunHistory
from pa_tracking import TrackingPlugin
from tests.helpers import tiny_data
from tests.plugins.tracking.runs import (
    UPDATES,
    VARYING,
    Fail,
    SaveAt,
    description,
    new_trainer,
    points,
    recorded,
    rows,
    table,
    tracked,
    train,
)

MEASURED = {"learning_rate", "gradient_norm"}


def sent(folder, name="run"):
    """The history's records that were sent."""
    return [point for point in points(rows(folder, name)) if point[0] not in MEASURED]


def history_of(trainer):
    return [point for point in recorded(trainer) if point[0] not in MEASURED]


def test_all_metrics_of_the_history_are_sent_once_with_their_updates(tmp_path):
    class Own:
        @hookimpl
        def on_train_step_end(self, trainer):
            if trainer.updates % 4 == 0:
                trainer.run_history.update_metric("own", trainer.updates)

    evaluate = StepBasedEvaluationCallback(5)
    trainer = new_trainer(Own(), evaluate, tracked(tmp_path, every="4 updates"))
    train(trainer, eval_dataset={"a": tiny_data(9), "b": tiny_data(5)})
    assert sent(tmp_path) == history_of(trainer)
    names = {name for name, _, _ in sent(tmp_path)}
    assert {"own", "train_loss", "train_loss_epoch", "a_eval_loss_epoch"} <= names
    assert "a_intermediate_eval_loss" in names
    assert description(tmp_path)["status"] == "finished"


def test_an_update_is_one_row(tmp_path):
    train(new_trainer(tracked(tmp_path, every=3)))
    assert [row["update"] for row in rows(tmp_path)] == [3, 6, 9, 12, 15, 18]
    assert {"train_loss", "train_loss_epoch", "eval_loss_epoch"} <= rows(tmp_path)[1].keys()
    assert [row["samples"] for row in rows(tmp_path)][:2] == [24, 44]


class Restless:
    """Records in steps, in events of an epoch and in evaluations, at updates of its own."""

    @hookimpl
    def on_train_epoch_start(self, trainer):
        trainer.run_history.update_metric("start", trainer.updates)

    @hookimpl
    def on_train_step_end(self, trainer):
        if trainer.updates % 5 == 0:
            trainer.run_history.update_metric("own", trainer.updates)
        if trainer.updates in (3, 6):
            trainer.control.evaluate(everywhere=True)

    @hookimpl
    def on_training_run_epoch_end(self, trainer):
        trainer.control.log(everywhere=True)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("saved_at", [None, 3, 6])
def test_rows_are_in_the_order_of_updates_for_any_cadences(saved_at, accumulation, tmp_path):
    def new(*more):
        files = tracked(tmp_path, service="csv", run_name="csv", every=4)
        lines, board = tracked(tmp_path), tracked(tmp_path / "other", run_name="own", every=3)
        return new_trainer(files, lines, Restless(), board, *more)

    state, arguments = tmp_path / "state", {"gradient_accumulation_steps": accumulation}
    if saved_at is not None:
        with pytest.raises(RuntimeError):
            train(new(SaveAt(saved_at, state), Fail(7)), **arguments)
        resumed = new(SaveAt(0, state), Fail(-1))
        trainer = train(resumed, resume_from=state, **arguments)
    else:
        trainer = train(new(), **arguments)
    for found in (table(tmp_path, "csv"), rows(tmp_path), rows(tmp_path / "other", "own")):
        updates = [int(row["update"]) for row in found]
        assert updates == sorted(set(updates))
        assert {0, 3, 4, 5, 6, 8, 9} <= set(updates)
        values = [(name, update) for name, update, _ in points(found)]
        assert {(name, update) for name, update, _ in recorded(trainer)} <= set(values)
        assert [row["epoch"] for row in found] == sorted(row["epoch"] for row in found)


def test_by_default_there_is_one_row_per_epoch(tmp_path):
    train(new_trainer(tracked(tmp_path)))
    assert [row["update"] for row in rows(tmp_path)] == [6, 12, 18]
    expected = {"train_loss_epoch", "eval_loss_epoch", *VARYING, *MEASURED}
    assert expected <= rows(tmp_path)[0].keys()


@pytest.mark.parametrize("service", ["csv", "jsonl"])
@pytest.mark.parametrize("saved_at", [4, 6, 9])
def test_a_resumed_run_equals_the_uninterrupted_one(service, saved_at, tmp_path):
    read = {"csv": table, "jsonl": rows}[service]
    settings = {"service": service, "every": 2}
    train(new_trainer(tracked(tmp_path / "whole", **settings)))

    folder, state = tmp_path / "parts", tmp_path / "state"
    with pytest.raises(RuntimeError, match="the power is off"):
        train(new_trainer(SaveAt(saved_at, state), Fail(13), tracked(folder, **settings)))
    assert description(folder)["status"] == "failed"
    assert read(folder)[-1]["update"] == 12  # later than the training state
    train(new_trainer(SaveAt(0, state), Fail(-1), tracked(folder, **settings)), resume_from=state)
    assert points(read(folder)) == points(read(tmp_path / "whole"))
    assert [row["update"] for row in read(folder)] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert [path.name for path in (folder / "pa-core").iterdir()] == ["run"]
    assert description(folder)["status"] == "finished"


def test_a_run_resumed_under_another_name_has_all_records(tmp_path):
    state = tmp_path / "state"
    with pytest.raises(RuntimeError, match="the power is off"):
        train(new_trainer(SaveAt(8, state), Fail(10), tracked(tmp_path, run_name="first")))
    trainer = new_trainer(SaveAt(0, state), Fail(-1), tracked(tmp_path, run_name="second"))
    train(trainer, resume_from=state)
    assert [row["update"] for row in rows(tmp_path, "first")] == [6]
    assert sent(tmp_path, "second") == history_of(trainer)


def test_each_run_of_a_trainer_has_its_own_file(tmp_path):
    trainer = new_trainer(tracked(tmp_path))
    train(trainer, 1)
    train(trainer, 1, reset_run_history=False)
    assert [row["epoch"] for row in rows(tmp_path, "run")] == [1]
    assert [row["epoch"] for row in rows(tmp_path, "run-2")] == [2]


def test_evaluate_continues_the_training_run(tmp_path):
    trainer = train(new_trainer(tracked(tmp_path)), 1)
    trainer.evaluate(tiny_data(9))
    loss = trainer.evaluate(tiny_data(7))["evaluation_loss"]
    assert sent(tmp_path) == history_of(trainer)
    assert len(rows(tmp_path)) == 3
    assert rows(tmp_path)[-1]["update"] == UPDATES
    assert rows(tmp_path)[-1]["evaluation_loss"] == loss


def test_evaluate_alone_is_a_run(tmp_path):
    trainer = new_trainer(tracked(tmp_path))
    trainer.run_history.update_metric("before", 1.0)
    loss = trainer.evaluate(tiny_data())["evaluation_loss"]
    assert sent(tmp_path) == [("evaluation_loss", 0, loss)]
    assert description(tmp_path)["status"] == "finished"


def test_evaluating_a_training_state_continues_its_run(tmp_path):
    state = tmp_path / "state"
    train(new_trainer(SaveAt(4, state), tracked(tmp_path)), 1)
    trainer = new_trainer(SaveAt(0, state), tracked(tmp_path))
    trainer.load_training_state(state)
    trainer.evaluate(tiny_data())
    assert [row["update"] for row in rows(tmp_path)] == [4]  # later rows were dropped


@pytest.mark.parametrize("key", ["name", "id", "project"])
@pytest.mark.parametrize("name", ["../outside", "a/b", "..", ""])
def test_a_name_from_a_training_state_is_not_used_as_a_path(name, key, tmp_path):
    state = tmp_path / "state"
    train(new_trainer(SaveAt(4, state), tracked(tmp_path / "runs", run_name=None)), 1)
    (file,) = state.glob("plugin-*.json")
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"run": saved["run"] | {key: name}}))
    plugin = tracked(tmp_path / "runs", run_name=None)
    trainer = new_trainer(SaveAt(0, state), plugin)
    with pytest.raises(ValueError, match="can't name a file"):
        plugin.on_load_training_state(trainer, state)


@pytest.mark.parametrize("service", ["jsonl", "csv"])
def test_a_state_that_was_copied_leaves_the_run_with_its_name_alone(service, tmp_path):
    state, mine, other = tmp_path / "state", tmp_path / "mine", tmp_path / "other"
    train(new_trainer(SaveAt(4, state), tracked(mine, service=service)), 1)
    train(new_trainer(tracked(other, service=service)), 2)
    (file,) = (other / "pa-core" / "run").glob("metrics.*")
    before = file.read_bytes()
    for _ in range(2):  # the second time, it has a folder there
        trainer = new_trainer(SaveAt(0, state), tracked(other, service=service))
        with pytest.warns(UserWarning, match="holds another run, so the resumed one continues in"):
            train(trainer, 2, resume_from=state)
        assert file.read_bytes() == before
    read = rows if service == "jsonl" else table
    assert [row["update"] for row in read(other, "run-2")] == [6, 12]


def test_evaluate_within_a_run_is_sent_with_it(tmp_path):
    class Evaluate:
        @hookimpl
        def on_train_epoch_end(self, trainer):
            trainer.evaluate(tiny_data(9))

    trainer = train(new_trainer(Evaluate(), tracked(tmp_path)), 2)
    assert sent(tmp_path) == history_of(trainer)
    assert [row["update"] for row in rows(tmp_path)] == [6, 12]


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no"), "failed"), (KeyboardInterrupt(), "killed")]
)
def test_the_run_is_closed_after_an_exception(error, status, tmp_path):
    with pytest.raises(type(error)):
        train(new_trainer(Fail(4, error), tracked(tmp_path, every=2)))
    assert description(tmp_path)["status"] == status
    assert [row["update"] for row in rows(tmp_path)] == [2, 4]


def test_a_stopped_run_is_finished(tmp_path):
    class Stop:
        @hookimpl
        def on_optimizer_step_end(self, trainer):
            trainer.control.stop("enough")

    train(new_trainer(Stop(), tracked(tmp_path, every=1)))
    assert description(tmp_path)["status"] == "finished"
    assert [row["update"] for row in rows(tmp_path)] == [1]


# -- Measurements ---------------------------------------------------------------------------------


def test_learning_rates_are_named_after_their_groups(tmp_path):
    trainer = new_trainer(tracked(tmp_path))
    first, second = trainer.model[0].parameters(), trainer.model[2].parameters()
    trainer.optimizer = torch.optim.SGD(
        [{"params": list(first), "lr": 0.5, "name": "body"}, {"params": list(second), "lr": 0.25}]
    )
    train(trainer, 1)
    (row,) = rows(tmp_path)
    assert (row["learning_rate/body"], row["learning_rate/1"]) == (0.5, 0.25)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_norm_equals_that_of_clipping(accumulation, tmp_path):
    norms = {}
    for name, clip in {"clipped": 1e9, "computed": None}.items():
        plugin = tracked(tmp_path / name, every=1)
        arguments = {"gradient_clip_norm": clip, "gradient_accumulation_steps": accumulation}
        train(new_trainer(plugin), 2, **arguments)
        norms[name] = [row["gradient_norm"] for row in rows(tmp_path / name)]
    assert len(norms["clipped"]) == 12 // accumulation
    assert norms["computed"] == pytest.approx(norms["clipped"], rel=1e-6)


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_value": 1e9}, {"gradient_clip_norm": 1e9}])
def test_the_gradient_norm_is_unscaled_under_a_gradient_scaler(clip, tmp_path):
    norms = {}
    for scale in (1.0, 2.0**8):
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = tracked(tmp_path / str(scale), every=1)
        train(new_trainer(plugin, accelerator=accelerator), 1, **clip)
        norms[scale] = [row["gradient_norm"] for row in rows(tmp_path / str(scale))]
    assert len(norms[1.0]) == 6
    assert norms[1.0] == pytest.approx(norms[2.0**8], rel=1e-5)


def test_the_gradient_norm_of_an_epoch_is_that_of_its_last_update(tmp_path):
    train(new_trainer(tracked(tmp_path / "every", every=1)), 2)
    train(new_trainer(tracked(tmp_path / "epoch")), 2)
    every = {row["update"]: row["gradient_norm"] for row in rows(tmp_path / "every")}
    found = {row["update"]: row["gradient_norm"] for row in rows(tmp_path / "epoch")}
    assert found == {6: every[6], 12: every[12]}


def test_throughput_excludes_evaluations(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pa_tracking.measurements.time.monotonic", lambda: now[0])

    class Clock:
        @hookimpl
        def on_train_step_end(self):
            now[0] += 0.5

        @hookimpl
        def on_eval_step_end(self):
            now[0] += 100.0

    train(new_trainer(Clock(), StepBasedEvaluationCallback(3), tracked(tmp_path)), 2)
    for row in rows(tmp_path):
        if "train_loss_epoch" in row:
            assert row["updates_per_second"] == 2.0
            assert row["samples_per_second"] == 44 / 3


def test_only_the_requested_values_are_measured(tmp_path):
    train(new_trainer(tracked(tmp_path, log=["memory"])), 1)
    (row,) = rows(tmp_path)
    assert not row.keys() & (MEASURED | {"samples_per_second"})
    assert 0.01 < row["memory_gib"] < 1000
    assert description(tmp_path)["config"] == {}


class Count(TorchDispatchMode):
    """Counts reads of values, which synchronise with a device, and norms."""

    reads = norms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        self.norms += func is torch.ops.aten._foreach_norm.Scalar
        return func(*args, **(kwargs or {}))


def test_values_and_norms_are_read_only_in_steps_that_are_sent(tmp_path):
    counts = []
    for plugins in ([], [tracked(tmp_path / "a")], [tracked(tmp_path / "b", every=2)]):
        with Count() as mode:
            train(new_trainer(*plugins), 3)
        counts.append((mode.reads, mode.norms))
    (reads, _), epochs, often = counts
    assert epochs == (reads + 3, 3)
    assert often[1] == 9


def test_the_configuration_describes_the_run_without_secrets(tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        f'[tool.pa-core]\nplugins = ["tracking:own", "{tmp_path}/hook.py"]\n'
        '[tool.pa-core."tracking:own"]\nservice = "jsonl"\nrun_name = "run"\n'
        f'logging_dir = "{tmp_path}"\ntags = ["first"]\n'
        '[tool.pa-core.hook]\nurl = "http://x"\napi_key = "hidden"\n'
    )
    (tmp_path / "hook.py").write_text(
        "from pydantic import BaseModel\n"
        "from pa_core import hookimpl\n"
        "class Hook:\n"
        "    class Settings(BaseModel):\n        url: str\n        api_key: str\n"
        "    def __init__(self, settings): pass\n"
        "    @hookimpl\n    def on_init_end(self): pass\n"
    )
    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters())
    trainer = Trainer(model, torch.nn.CrossEntropyLoss(), optimizer, (), settings=file)
    train(trainer, 1)
    found = description(tmp_path)
    assert found["tags"] == ["first"]
    config = found["config"]
    assert config["plugins"]["tracking:own"]["settings"]["service"] == "jsonl"
    assert config["seed"] == 42
    assert "torch" in config["packages"]
    assert config["run_config"]["train_total_batch_size"] == 8
    assert "hidden" not in str(found)


def test_several_services_have_one_run_each(tmp_path):
    plugins = [tracked(tmp_path, service=service, every=3) for service in ("csv", "jsonl")]
    trainer = train(new_trainer(*plugins), 2)
    assert [row["update"] for row in table(tmp_path, "run")] == [3, 6, 9, 12]
    assert sent(tmp_path, "run-2") == history_of(trainer)


# -- Failures -------------------------------------------------------------------------------------


def break_writes(monkeypatch, times):
    """Let the first writes fail, as on a full disk."""
    from pa_tracking.file_services import JsonLinesFile

    write, left = JsonLinesFile._write, [times]

    def failing(self, row):
        if left[0]:
            left[0] -= 1
            raise OSError("no space left on device")
        write(self, row)

    monkeypatch.setattr(JsonLinesFile, "_write", failing)


def test_a_failing_service_warns_once_and_gets_all_records_later(tmp_path, monkeypatch):
    break_writes(monkeypatch, 2)
    with pytest.warns(UserWarning, match="OSError: no space left on device") as caught:
        trainer = train(new_trainer(tracked(tmp_path, every=2)))
    assert len(caught) == 1
    assert sent(tmp_path) == history_of(trainer)


def test_unsent_records_are_reported(tmp_path, monkeypatch):
    break_writes(monkeypatch, 1000)
    trainer = new_trainer(tracked(tmp_path))
    with (
        pytest.warns(UserWarning, match="'jsonl' failed"),
        pytest.warns(UserWarning, match="3 records were not sent to jsonl"),
    ):
        train(trainer, 1)
    assert len(list(trainer.run_history.get_metric_names())) == 2


def test_a_failing_service_stops_the_run_with_on_error_stop(tmp_path, monkeypatch):
    break_writes(monkeypatch, 1)
    trainer = train(new_trainer(tracked(tmp_path, every=2, on_error="stop")))
    assert "no space left on device" in trainer.stop_reason
    assert trainer.updates == 3
    assert rows(tmp_path)[0]["update"] == 2


def test_a_service_that_cannot_be_opened_does_not_end_the_run(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.warns(UserWarning, match="'jsonl' failed") as caught:
        trainer = train(new_trainer(tracked(tmp_path / "taken")))
    assert trainer.updates == 18
    assert len(caught) == 1


def test_a_missing_package_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("pa_tracking.settings.find_spec", lambda name: None)
    trainer = new_trainer(tracked(tmp_path, service="comet_ml"))
    for run in (lambda: train(trainer), lambda: trainer.evaluate(tiny_data())):
        with pytest.raises(ImportError, match="needs the package comet-ml: pip install comet-ml"):
            run()
    assert trainer.updates == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"service": "tensorbord"}, "tensorboard"),
        ({"options": {"api_key": "x"}}, "WANDB_API_KEY"),
        ({"run_name": "a/b"}, "can't name a file or folder"),
        ({"every": "2 weeks"}, "not a valid duration"),
        ({"log": ["lr"]}, "learning_rates"),
    ],
)
def test_errors_of_settings_say_what_is_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        TrackingPlugin(**settings)


class LastValues(RunHistory):
    """A custom history that keeps values but no records."""

    def __init__(self):
        self.values, self.epoch = {}, 1

    metric_name_prefix = ""
    current_epoch = property(lambda self: self.epoch)

    def get_metric_names(self):
        return list(self.values)

    def get_metric_values(self, metric_name):
        return self.values[metric_name]

    def get_latest_metric(self, metric_name):
        return self.values[metric_name][-1]

    def set_metric_name_prefix(self, prefix=""):
        pass

    def update_metric(self, metric_name, metric_value):
        self.values.setdefault(metric_name, []).append(metric_value)

    def delete_metric(self, metric_name):
        del self.values[metric_name]

    def _increment_epoch(self):
        self.epoch += 1

    def _set_epoch(self, epoch):
        self.epoch = epoch

    def reset(self):
        self.__init__()


def test_a_history_without_records_is_sent_with_the_current_update(tmp_path):
    trainer = train(new_trainer(tracked(tmp_path), run_history=LastValues()), 2)
    losses = trainer.run_history.get_metric_values("train_loss_epoch")
    found = [(u, value) for name, u, value in sent(tmp_path) if name == "train_loss_epoch"]
    assert found == list(zip([6, 12], losses, strict=True))


def test_a_metric_deleted_and_recorded_again_is_sent_again(tmp_path):
    class Forget:
        @hookimpl
        def on_train_epoch_start(self, trainer):
            if trainer.run_history.current_epoch == 3:
                trainer.run_history.delete_metric("train_loss_epoch")

    train(new_trainer(Forget(), tracked(tmp_path)))
    assert [update for name, update, _ in sent(tmp_path) if name == "train_loss_epoch"] == [
        6,
        12,
        18,
    ]


# -- Images ---------------------------------------------------------------------------------------


def test_images_of_other_plugins_are_saved_with_the_run(tmp_path):
    from PIL import Image

    class Show:
        @hookimpl
        def on_eval_epoch_end(self, trainer):
            images = torch.zeros(2, 1, 4, 6)
            images[1] = 1.0
            call = trainer.callback_handler.call_event
            call("log_images", trainer, name="some samples", images=images)

    train(new_trainer(Show(), tracked(tmp_path)), 2)
    folder = tmp_path / "pa-core" / "run" / "images"
    names = [f"some_samples-{update:06d}-{n}.png" for update in (6, 12) for n in (0, 1)]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(folder / names[1]) as image:
        assert image.size == (6, 4)
        assert image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("saved", [True, False])
def test_plots_of_metrics_are_saved_with_the_run(saved, tmp_path):
    from pa_metrics import MetricsPlugin

    metrics = MetricsPlugin(
        metrics=["confusion_matrix", "accuracy"],
        task="multiclass",
        num_classes=3,
        plots=tmp_path / "plots" if saved else None,
    )
    train(new_trainer(metrics, tracked(tmp_path)), 2)
    folder = tmp_path / "pa-core" / "run" / "images"
    # The values over the epochs are drawn in a folder only.
    over_epochs = ["accuracy-000012.png"] if saved else []
    assert sorted(path.name for path in folder.iterdir()) == [
        *over_epochs,
        *("confusion_matrix-000006.png", "confusion_matrix-000012.png"),
    ]
    assert (tmp_path / "plots" / "confusion_matrix.png").exists() == saved


def test_images_of_a_wrong_shape_are_a_warning(tmp_path):
    class Show:
        @hookimpl
        def on_train_epoch_end(self, trainer):
            images = torch.zeros(4, 6)
            trainer.callback_handler.call_event("log_images", trainer, name="x", images=images)

    with pytest.warns(UserWarning, match=r"Expected images of shape .* got \(4, 6\)"):
        trainer = train(new_trainer(Show(), tracked(tmp_path)), 1)
    assert trainer.updates == UPDATES
