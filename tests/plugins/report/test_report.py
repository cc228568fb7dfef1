"""A run's report: its content, that it loads nothing, and that it is written however a run ends."""

import base64
import hashlib
import html
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

import pa_report.plugin
from pa_core import Trainer, hookimpl, hookspec
from pa_lab import ProfileCallback
from pa_metrics import MetricsPlugin
from pa_report import ReportPlugin, read_run
from pa_report.history import downsample
from pa_report.images import Picture
from pa_report.run import Point, Run
from pa_report.run_page import run_page
from tests.helpers import tiny_data
from tests.plugins.report.pages import Page, reported
from tests.plugins.tracking.runs import Fail, SaveAt, new_trainer, train

EVIL = '</script><script>alert("x")</script>'


def curve(run, name):
    return [(point.update, point.value) for point in run.metrics[name]]


def test_a_page_has_the_runs_curves_values_and_settings(tmp_path):
    plugin = reported(tmp_path, title="Three classes")
    trainer = train(new_trainer(plugin), 4)
    page = Page(tmp_path / "run.html")
    assert page.headings[:4] == ["Three classes", "Summary", "Results", "Curves"]
    assert page.headings[4:7] == ["loss", "learning rate", "throughput samples / s"]
    losses = {
        name: trainer.run_history.get_metric_values(f"{name}_loss_epoch")
        for name in ("train", "eval")
    }
    curves = dict(page.curves()[:2])
    assert curves == {name: pytest.approx(values, rel=1e-3) for name, values in losses.items()}
    assert page.num_points() == [4, 4, 24, 4]  # two losses, rates, throughput
    row = page.row("loss")
    for cell, values in zip(row[1:], losses.values(), strict=True):
        final, best, epoch = re.fullmatch(r"([\d.]+)best ([\d.]+) in epoch (\d+)", cell).groups()
        expected = [values[-1], min(values)]
        assert [float(final), float(best)] == pytest.approx(expected, rel=1e-3)
        assert int(epoch) == values.index(min(values)) + 1
    assert {"1", "2", "3", "4", "6", "12", "18", "24"} <= set(page.labels)  # epochs and updates
    number = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert page.fact("parameters") == str(number)
    assert (page.fact("epochs"), page.fact("updates")) == ("4", "24")
    assert page.fact("evaluation data") == f"{len(tiny_data())} samples"
    assert html.escape(sys.orig_argv[-1].split()[0]) in page.fact("command")
    assert page.row("seed") == ["seed", "42"]
    assert page.row("optimizer_settings.0.lr")[1] == "0.1"
    assert page.row("torch")[1] == metadata.version("torch")
    assert page.row("ReportPlugin")[1]
    assert page.row("total")[2] == "100 %"


def test_a_page_loads_nothing_and_is_in_one_file(tmp_path):
    train(new_trainer(reported(tmp_path)), 2)
    page = Page(tmp_path / "run.html")
    assert [path.name for path in tmp_path.iterdir()] == ["run.html"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {n for n, _ in page.elements}
    assert "@import" not in page.text
    assert "url(" not in page.text
    assert [script.get("type") for script in page.all("script")] == ["application/json", None]
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'")
    script = page.text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")  # no other script runs


def test_charts_are_well_formed_and_have_a_description(tmp_path):
    train(new_trainer(reported(tmp_path)), 2)
    text = Page(tmp_path / "run.html").text
    parts = [part.partition("</svg>")[0] for part in text.split("<svg")[1:]]
    drawings = [f"<svg{part}</svg>" for part in parts if 'class="key' not in part]
    assert len(drawings) == 3
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert " over updates: " in root.get("aria-label")


def test_small_values_have_their_power_of_ten_in_the_ticks(tmp_path):
    class Small:
        @hookimpl
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric("small", 2e-6 * trainer.updates)

    train(new_trainer(Small(), reported(tmp_path)), 3)
    page = Page(tmp_path / "run.html")
    assert page.headings[5] == "small"
    assert {"1e-5", "2e-5", "3e-5", "4e-5"} <= set(page.labels)


def test_names_and_settings_are_text_whatever_they_hold(tmp_path):
    class Evil:
        @hookimpl
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric(EVIL, 1.0)
            trainer.run_history.update_metric(f"matrix {EVIL}", [[1, 2], [3, 4]])
            images = torch.zeros(1, 1, 2, 2)
            trainer.callback_handler.call_event("log_images", trainer, name=EVIL, images=images)

    trainer = new_trainer(Evil(), Fail(7, RuntimeError(EVIL)), reported(tmp_path, title=EVIL))
    with pytest.raises(RuntimeError):
        train(trainer, 2)
    page = Page(tmp_path / "run.html")
    assert len(page.all("script")) == 2
    assert "alert(" in page.headings[0]
    assert page.row(EVIL)[-1].startswith("1")
    run = read_run(tmp_path / "run.html")
    assert run.metrics[EVIL][0].value == 1.0
    assert EVIL in run.reason


def test_the_file_holds_the_run_as_strict_json(tmp_path):
    class Odd:
        @hookimpl
        def on_train_epoch_end(self, trainer):
            trainer.run_history.update_metric(
                "odd", math.nan if trainer.updates < 12 else -math.inf
            )
            trainer.run_history.update_metric("text", "not a number")

    trainer = train(new_trainer(Odd(), reported(tmp_path)), 3)
    page = Page(tmp_path / "run.html")
    content = page.text.partition('id="pa-report-run">')[2].partition("</script>")[0]
    json.loads(content, parse_constant=pytest.fail)
    run = read_run(tmp_path / "run.html")
    recorded = [
        (record["update"], record["value"])
        for record in trainer.run_history.records
        if record["metric"] == "eval_loss_epoch"
    ]
    assert curve(run, "eval_loss_epoch") == recorded
    assert math.isnan(run.metrics["odd"][0].value)
    assert run.metrics["odd"][2].value == -math.inf
    assert "odd" in page.headings
    assert "2 NaN (epochs 1–2)" not in page.text  # NaN before update 12: the first epoch
    assert "1 NaN (epoch 1)" in page.text
    assert "2 infinite (epochs 2–3)" in page.text
    assert run.progress["updates"] == 18


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("no"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_run_that_ends_by_an_exception_has_its_report(error, status, tmp_path):
    with pytest.raises(type(error)):
        train(new_trainer(Fail(8, error), reported(tmp_path)))
    run = read_run(tmp_path / "run.html")
    assert (run.status, run.progress["updates"]) == (status, 8)
    assert run.reason == ("RuntimeError: no" if status == "failed" else "KeyboardInterrupt")
    assert curve(run, "train_loss_epoch")[-1][0] == 6
    assert Page(tmp_path / "run.html").headings[0] == "run"


def test_a_stopped_run_has_its_reason(tmp_path):
    class Stop:
        @hookimpl
        def on_optimizer_step_end(self, trainer):
            trainer.control.stop("enough")

    train(new_trainer(Stop(), reported(tmp_path)))
    run = read_run(tmp_path / "run.html")
    assert (run.status, run.reason) == ("stopped", "enough")


def test_a_resumed_run_continues_its_curves_in_the_same_file(tmp_path):
    state, folder = tmp_path / "state", tmp_path / "reports"
    settings = {"name": None, "every": "2 updates"}
    train(new_trainer(reported(tmp_path / "whole", every="2 updates")))
    with pytest.raises(RuntimeError, match="the power is off"):
        train(new_trainer(SaveAt(9, state), Fail(13), reported(folder, **settings)))
    trainer = new_trainer(SaveAt(0, state), Fail(-1), reported(folder, **settings))
    train(trainer, resume_from=state)
    (file,) = folder.iterdir()
    whole, resumed = read_run(tmp_path / "whole" / "run.html"), read_run(file)
    assert resumed.status == "finished"
    assert [update for update, _ in curve(resumed, "train_loss")] == list(range(2, 19, 2))
    for name in ("train_loss", "train_loss_epoch", "eval_loss_epoch"):
        assert curve(resumed, name) == curve(whole, name)
    rates = [(p.update, p.value) for p in resumed.measures["learning_rate"]]
    assert rates == [(update, 0.1) for update in range(1, 19)]
    assert [point.update for point in resumed.measures["samples_per_second"]] == [6, 12, 18]


@pytest.mark.parametrize("name", ["../outside", "a/b", "..", "C:\\report", "line\nbreak"])
def test_a_name_from_a_training_state_is_not_used_as_a_path(name, tmp_path):
    plugin = reported(tmp_path, name=None)
    with pytest.raises(ValueError, match="can't name a file"):
        plugin.load_state_dict({**plugin.state_dict(), "name": name})
    plugin.load_state_dict({**plugin.state_dict(), "name": None, "started": name})
    assert plugin._name_file(new_trainer(plugin)).parent == tmp_path


def test_runs_without_a_name_never_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pa_report.plugin.time.strftime", lambda text: "2030-01-01 10:00:00")
    trainer = new_trainer(reported(tmp_path, name=None))
    train(trainer, 1)
    train(trainer, 2)
    names = ["2030-01-01_10-00-00-2.html", "2030-01-01_10-00-00.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert read_run(tmp_path / names[0]).progress["updates"] == 12


def test_evaluate_after_the_run_is_in_its_report(tmp_path):
    class Counts:
        @hookimpl
        def on_eval_epoch_end(self, trainer):
            trainer.run_history.update_metric("batches", trainer.num_eval_batches)

    trainer = new_trainer(Counts(), reported(tmp_path))
    trainer.evaluate(tiny_data())
    assert not list(tmp_path.iterdir())  # no run yet
    train(trainer, 2)
    times = read_run(tmp_path / "run.html").times
    loss = trainer.evaluate(tiny_data(9))["evaluation_loss"]
    run = read_run(tmp_path / "run.html")
    assert (run.status, curve(run, "evaluation_loss")) == ("finished", [(12, loss)])
    assert run.times == times
    batches = [value for _, value in curve(run, "batches")]
    trainer.evaluate({"test": tiny_data(90)})
    run = read_run(tmp_path / "run.html")
    assert [value for _, value in curve(run, "batches")] == batches
    assert len(curve(run, "test_evaluation_batches")) == 1


def test_a_report_is_written_during_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(pa_report.plugin, "WRITE_SECONDS", 0.0)
    seen = []

    class Look:
        @hookimpl
        def on_train_epoch_start(self, trainer):
            file = tmp_path / "run.html"
            seen.append(read_run(file).status if file.exists() else None)

    train(new_trainer(Look(), reported(tmp_path)), 2)
    assert seen == [None, "running"]


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.warns(UserWarning, match="Can't write the report"):
        trainer = train(new_trainer(reported(tmp_path / "taken")), 1)
    assert trainer.updates == 6


def test_only_the_main_process_writes(tmp_path):
    plugin = reported(tmp_path)
    trainer = new_trainer(plugin)

    class Other(Trainer):
        is_main_process = False

    trainer.__class__ = Other
    train(trainer, 1)
    assert not list(tmp_path.iterdir())


def test_throughput_and_times_leave_evaluations_out(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pa_report.measurements.time.monotonic", lambda: now[0])

    class Clock:
        @hookimpl
        def on_train_step_end(self):
            now[0] += 0.5

        @hookimpl
        def on_eval_step_end(self):
            now[0] += 100.0

    train(new_trainer(Clock(), reported(tmp_path)), 2)
    run = read_run(tmp_path / "run.html")
    assert [p.value for p in run.measures["samples_per_second"]] == [44 / 3, 44 / 3]
    assert run.times == {"training": 6.0, "evaluation": 1200.0}


def shares(page):
    rows = {name: page.row(name) for name in ("training", "evaluation", "other", "total")}
    return {name: (row[1], row[2]) for name, row in rows.items()}


def test_the_shares_of_the_time_add_up_whatever_takes_it(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pa_report.measurements.time.monotonic", lambda: now[0])

    class Clock:
        @hookimpl
        def on_train_step_end(self):
            now[0] += 10.0

        @hookimpl
        def on_eval_step_end(self):
            now[0] += 10.0

        @hookimpl
        def on_training_run_end(self):
            now[0] += 60.0

    class Save:
        @hookimpl
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                trainer.save_training_state(tmp_path / "state")

    # 6 steps, 6 evaluation steps, and what follows the last update
    train(new_trainer(Clock(), Save(), reported(tmp_path)), 1)
    expected = {"training": ("1 min 0 s", "34 %"), "evaluation": ("1 min 0 s", "33 %")}
    expected |= {"other": ("1 min 0 s", "33 %"), "total": ("3 min 0 s", "100 %")}
    assert shares(Page(tmp_path / "run.html")) == expected
    now[0] += 1e6
    train(new_trainer(Clock(), reported(tmp_path)), 1, resume_from=tmp_path / "state")
    assert shares(Page(tmp_path / "run.html")) == expected


def test_a_run_whose_times_exceed_its_seconds_has_no_share_above_all(tmp_path):
    train(new_trainer(reported(tmp_path)), 1)
    run = read_run(tmp_path / "run.html")
    run = replace(run, times={"training": 1.0, "evaluation": 24.82})
    run = replace(run, progress=run.progress | {"seconds": 1.0})  # as earlier versions wrote it
    (tmp_path / "old.html").write_text(run_page(run))
    shown = [share for _, share in shares(Page(tmp_path / "old.html")).values()]
    assert shown == ["4 %", "96 %", "0 %", "100 %"]


def test_learning_rates_are_those_of_updates_and_limited_in_number(tmp_path, monkeypatch):
    monkeypatch.setattr("pa_report.measurements.MAX_RATES", 8)

    def halve(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    train(new_trainer(reported(tmp_path)), create_scheduler_fn=halve)
    points = read_run(tmp_path / "run.html").measures["learning_rate"]
    assert [(p.update, p.value) for p in points] == [
        (update, 0.1 * 0.5 ** (update - 1)) for update in (1, 5, 9, 13, 17)
    ]


def test_learning_rates_that_are_tensors_are_read_when_written(tmp_path):
    def halve(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    trainer = new_trainer(reported(tmp_path))
    parameters = trainer.model.parameters()
    trainer.optimizer = torch.optim.SGD(parameters, lr=torch.tensor(0.5), foreach=False)
    train(trainer, 1, create_scheduler_fn=halve)
    points = read_run(tmp_path / "run.html").measures["learning_rate"]
    assert [point.value for point in points] == [0.5**n for n in range(1, 7)]


def test_figures_and_matrices_are_on_the_page(tmp_path):
    import matplotlib.figure as figure_module

    class Show:
        @hookimpl
        def on_eval_epoch_end(self, trainer):
            figure = figure_module.Figure()
            figure.subplots().plot([1, 2])
            call = trainer.callback_handler.call_event
            call("log_figure", trainer, name="roc", figure=figure)
            call("log_figure", trainer, name="confusion_matrix", figure=figure)
            trainer.run_history.update_metric(
                "confusion_matrix", [[30, 1, 0], [2, 20, 3], [0, 0, 9]]
            )
            trainer.run_history.update_metric("recall", [0.25, 0.5, 1.0])

    train(new_trainer(Show(), reported(tmp_path)), 2)
    page = Page(tmp_path / "run.html")
    assert [image["alt"] for image in page.all("img")] == ["roc"]  # the page draws the matrix
    assert page.all("img")[0]["src"].startswith("data:image/svg+xml;base64,")
    assert [row[1:] for row in page.rows if len(row) == 4 and row[0] in {"0", "1", "2"}] == [
        ["30", "1", "0"],
        ["2", "20", "3"],
        ["0", "0", "9"],
    ]
    assert dict(page.curves()[-5:-2]) == {"0": [0.25] * 2, "1": [0.5] * 2, "2": [1.0] * 2}
    assert page.headings.count("recall, eval") == 1  # one chart for the list


def test_metrics_plots_only_what_the_report_does_not_draw(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pa_metrics.plots._draw", lambda folder, name, *others: drawn.append(name))
    metrics = ["accuracy", "confusion_matrix", "roc"]
    plugin = MetricsPlugin(metrics=metrics, task="multiclass", num_classes=3)
    train(new_trainer(plugin, reported(tmp_path)), 2)
    assert drawn == ["roc"] * 2
    assert "confusion matrix" in " ".join(Page(tmp_path / "run.html").headings)


def test_a_figure_replaces_a_table_that_is_not_square():
    run = Run("run", matrices={"roc": [[0.0] * 9] * 3, "confusion_matrix": [[1.0, 0.0]] * 2})
    pictures = [Picture(name, 1, ["data:image/png;base64,"]) for name in run.matrices]
    page = run_page(run, pictures)
    assert ('alt="roc"' in page, 'alt="confusion_matrix"' in page) == (True, False)
    assert page.count('<table class="matrix"') == 1


def test_the_costs_of_plugins_are_on_the_page_where_a_profile_tells_them(tmp_path):
    class Costs:
        @hookimpl
        @hookspec(firstresult=True)
        def calculate_costs(self, trainer):
            rows = [
                {"plugin": "metrics", "hook": "on_train_step_end", "seconds": 0.5, "share": 0.25}
            ]
            return {"hooks": rows, "phases": [{"phase": "forward", "seconds": 1.5}]}

    train(new_trainer(reported(tmp_path), Costs()), 1)
    page = Page(tmp_path / "run.html")
    assert page.row("metrics") == ["metrics", "on_train_step_end", "500 ms", "25.0 %"]
    assert page.row("forward") == ["forward", "1.5 s"]


@pytest.mark.parametrize("is_first", [True, False])
def test_profile_and_report_work_together_whoever_is_listed_first(tmp_path, is_first):
    profile, report = ProfileCallback(), reported(tmp_path)
    train(new_trainer(*((profile, report) if is_first else (report, profile))), 2)
    page = Page(tmp_path / "run.html")
    assert page.row("forward")[:2] == ["forward", "12"]
    hooks = {row[1]: row[2] for row in page.rows if row and row[0] == "ReportPlugin" and row[2:]}
    assert hooks["on_optimizer_step_start"] == "12"
    assert profile.report()["steps"] == 12


def test_settings_that_look_like_secrets_are_masked(tmp_path):
    (tmp_path / "hook.py").write_text(
        "from pydantic import BaseModel\n"
        "from pa_core import hookimpl\n"
        "class Hook:\n"
        "    class Settings(BaseModel):\n        url: str\n        api_key: str\n"
        "    def __init__(self, settings): pass\n"
        "    @hookimpl\n    def on_init_end(self): pass\n"
    )
    file = tmp_path / "pyproject.toml"
    file.write_text(
        f'[tool.pa-core]\nplugins = ["report", "{tmp_path}/hook.py"]\n'
        f'[tool.pa-core.report]\nname = "run"\nfolder = "{tmp_path}/reports"\n'
        '[tool.pa-core.hook]\nurl = "there"\napi_key = "opensesame"\n'
    )
    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters())
    train(Trainer(model, torch.nn.CrossEntropyLoss(), optimizer, (), settings=file), 1)
    page = Page(tmp_path / "reports" / "run.html")
    assert page.row("hook")[2] == 'url = "there", api_key = "**********"'
    assert page.row("report")[1].startswith("pa-report ")
    assert "opensesame" not in page.text


def test_a_long_curve_is_downsampled_and_keeps_its_extremes():
    points = [Point(1, n, n, n, math.sin(n / 500)) for n in range(20_000)]
    points[7777] = points[7777]._replace(value=9.0)
    points[12_345] = points[12_345]._replace(value=math.nan)
    kept = downsample(points)
    assert len(kept) <= 1000
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[7777] in kept
    assert any(math.isnan(point.value) for point in kept)
    assert [point.update for point in kept] == sorted(point.update for point in kept)
    assert downsample(points[:1000]) == points[:1000]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"name": "a/b"}, "can't name a file"), ({"every": "2 weeks"}, "not a valid duration")],
)
def test_errors_of_settings_say_what_is_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        ReportPlugin(**settings)


def test_a_run_of_another_format_is_refused():
    with pytest.raises(ValueError, match="format 1"):
        Run.from_json('{"format": 2, "name": "x"}')
    with pytest.raises(ValueError, match="not a valid run"):
        Run.from_json('{"format": 1, "name": "x", "colour": "red"}')


ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("page", ["docs/plugins/report.md", "plugins/report/README.md"])
def test_the_documented_settings_match_the_code(page):
    from pa_report import ReportSettings

    text = (ROOT / page).read_text().partition("| key | default | meaning |\n")[2]
    rows = [
        f"| `{key}` | {'none' if f.default is None else f'`{chr(34)}{f.default}{chr(34)}`'} "
        f"| {f.description} |"
        for key, f in ReportSettings.model_fields.items()
    ]
    assert text.partition("\n\n")[0].splitlines()[1:] == rows
