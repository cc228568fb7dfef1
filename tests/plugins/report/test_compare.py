"""``pa report`` compares reports and training states; ``plot_history`` plots them."""

import pytest
from typer.testing import CliRunner

from pa_core.cli.app import app
from pa_core.cli.entry_points import with_commands
from pa_core.errors import PaCoreError
from pa_report import plot_history, read_run
from pa_report.run import ReportError
from tests.plugins.report.pages import Page, reported
from tests.plugins.tracking.runs import SaveAt, new_trainer, train


def pa_report(*arguments):
    import typer

    from pa_report.command import report

    command = typer.Typer()
    command.command()(report)
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two reports that differ in seed and batch size, and training states of the second."""
    folder = tmp_path_factory.mktemp("runs")
    train(new_trainer(reported(folder, name="small")), 3)
    save = SaveAt(12, folder / "states" / "update-12")
    trainer = new_trainer(save, reported(folder, name="large"), seed=7)
    train(trainer, 4, per_device_batch_size=11)
    return folder


def test_two_runs_are_compared_on_one_page(runs, tmp_path):
    result = pa_report(runs / "small.html", runs / "large.html", "-o", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    assert "Written to" in result.output
    page = Page(tmp_path / "both.html")
    assert page.row("seed") == ["seed", "42", "7"]
    assert page.row("run.per_device_batch_size") == ["run.per_device_batch_size", "8", "11"]
    assert page.row("plugins.SaveAt.version")[1:] == ["–", "none"]
    assert not [row for row in page.rows if row[0] == "packages.torch"]  # equal
    assert page.num_points()[:4] == [3, 4, 3, 4]
    assert {"small", "large"} <= set(page.labels)
    assert "http" not in page.text.replace("http-equiv", "")
    ranked = page.rows[-2:]  # of the loss in evaluation
    best = {
        name: min(p.value for p in read_run(runs / f"{name}.html").metrics["eval_loss_epoch"])
        for name in ("small", "large")
    }
    assert [row[0] for row in ranked] == sorted(best, key=best.get)
    assert [float(row[1]) for row in ranked] == pytest.approx(sorted(best.values()), rel=1e-3)


def test_a_training_state_and_a_folder_of_states_can_be_compared(runs, tmp_path):
    state = runs / "states" / "update-12"
    run, newest = read_run(state), read_run(runs / "states")
    assert run.metrics == newest.metrics
    assert (run.name, newest.name) == ("update-12", "states/update-12")
    assert run.status == "saved"
    whole = read_run(runs / "large.html").metrics["eval_loss_epoch"]
    assert run.metrics["eval_loss_epoch"] == whole[: len(run.metrics["eval_loss_epoch"])]
    assert run.progress["updates"] == 12
    result = pa_report(runs / "small.html", state, "-o", tmp_path / "both.html")
    assert result.exit_code == 0, result.output
    assert Page(tmp_path / "both.html").row("seed") == ["seed", "42", "7"]


def test_a_single_training_state_gives_a_report(runs, tmp_path):
    assert pa_report(runs / "states", "-o", tmp_path / "one.html").exit_code == 0
    assert read_run(tmp_path / "one.html").metrics == read_run(runs / "states").metrics


def test_runs_with_the_same_name_are_numbered(runs, tmp_path):
    file = runs / "small.html"
    assert pa_report(file, file, "-o", tmp_path / "both.html").exit_code == 0
    assert {"small", "small (2)"} <= set(Page(tmp_path / "both.html").labels)


def test_a_folder_of_reports_stands_for_all_of_them(runs, tmp_path):
    folder, output = tmp_path / "reports", tmp_path / "reports" / "comparison.html"
    folder.mkdir()
    for name in ("small", "large"):
        (folder / f"{name}.html").write_text((runs / f"{name}.html").read_text())
    for _ in range(2):  # the comparison in the folder is no run
        assert pa_report(folder, "-o", output).exit_code == 0
        assert "2 runs" in output.read_text()
        assert {"small", "large"} <= set(Page(output).labels)
    result = pa_report(folder, "-o", folder / "small.html")
    assert "is one of the runs" in result.output


def test_a_report_is_never_overwritten_by_its_comparison(runs):
    before = (runs / "small.html").read_text()
    result = pa_report(runs / "small.html", runs / "large.html", "-o", runs / "small.html")
    assert result.exit_code == 1
    assert "is one of the runs" in result.output
    assert (runs / "small.html").read_text() == before


def test_a_path_that_is_not_a_run_is_an_error(runs, tmp_path):
    (tmp_path / "page.html").write_text("<p>hello</p>")
    (tmp_path / "broken.html").write_text('<script id="pa-report-run">{"format": 1}</script>')
    hostile = '{"format": 1, "name": 7, "progress": {"epochs": "<b>"}}'
    (tmp_path / "hostile.html").write_text(f'<script id="pa-report-run">{hostile}</script>')
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    for name, message in {
        "absent": "There is no report or training state at",
        "page.html": "is not the report of a run",
        "broken.html": "Can't read the data in .*: not a valid run",
        "hostile.html": "not a valid run: name: Input should be a valid string",
        "empty": "contains no report and no training state",
        "damaged": "damaged",
    }.items():
        with pytest.raises(ReportError, match=message):
            read_run(tmp_path / name)
    assert issubclass(ReportError, PaCoreError)  # `pa` prints these without a traceback


def test_pa_has_the_command_report():
    pa = with_commands(app, ["report"])
    assert "report" not in {command.name for command in app.registered_commands}
    result = CliRunner().invoke(pa, ["report", "--help"])
    assert "Compare runs in one HTML file" in result.output


def test_a_history_is_plotted_for_notebooks(runs, tmp_path):
    trainer = train(new_trainer(), 3)
    figure = plot_history(trainer.run_history, save_to=tmp_path / "history.png")
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "loss"
    assert [line.get_label() for line in axes.lines] == ["train", "eval"]
    expected = trainer.run_history.get_metric_values("eval_loss_epoch")
    assert list(axes.lines[1].get_ydata()) == expected
    assert list(axes.lines[1].get_xdata()) == [6, 12, 18]
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_metrics_of_a_report_are_chosen_by_name(runs):
    figure = plot_history(runs / "small.html", ["eval_loss_epoch"])
    assert [len(axes.lines) for axes in figure.axes] == [1]
    with pytest.raises(ValueError, match="Did you mean 'eval_loss_epoch'"):
        plot_history(runs / "small.html", "eval_loss_epok")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_history(new_trainer().run_history)
