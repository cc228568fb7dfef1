"""Preview of schedules: as values, as text, as a plot, and by the command."""

import sys

import pytest
import typer
from torch.optim import SGD
from typer.testing import CliRunner

from pa_schedulers import SchedulersPlugin, draw_schedule, plot_schedule, schedule_values
from pa_schedulers.command import schedule
from pa_schedulers.preview import draw
from tests.plugins.schedulers.runs import new_trainer, seen_in

app = typer.Typer()
app.command("schedule")(schedule)


def pa(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {"warmup": "1 epoch", "cooldown": 0.1}),
        ("one_cycle", {}),
        ("exponential", {"interval": "epoch", "gamma": 0.5}),
        ("timm/step", {"step_on_epochs": True, "decay_epochs": 2}),
        ("transformers/cosine_with_restarts", {"num_cycles": 3}),
    ],
)
def test_the_preview_has_the_values_of_a_run(name, options):
    trainer = new_trainer(plugins=[SchedulersPlugin(name=name, **options)], optimizer=SGD)
    run = [first for first, _ in seen_in(trainer)]
    assert schedule_values(name, 30, 3.0, lr=0.01, **options) == pytest.approx(run)


def test_a_metric_driven_scheduler_cannot_be_drawn():
    with pytest.raises(ValueError, match="steps on a metric"):
        schedule_values("reduce_lr_on_plateau", 10)


def test_the_drawing_has_a_column_for_each_slice_of_the_values():
    text = draw([0.0, 0.25, 0.5, 0.75, 1.0, 1.0], width=3, height=4)
    assert text.splitlines() == [
        "  1 ┤  █",
        "    │ ▄█",
        "    │ ██",
        "    │▄██",
        "  0 └───",
        "    0 … 5",
    ]
    assert draw([2.0], height=1).splitlines()[0] == "  2 ┤█"
    assert draw([0.0, 0.0], height=1).splitlines()[0] == "  0 ┤"
    assert len(draw_schedule("cosine", 500).splitlines()) == 12


def test_the_command_draws_a_schedule_and_prints_its_values():
    code, output = pa("cosine", "--steps", "200", "--warmup", "10%", "--lr", "0.5")
    assert code == 0
    assert "cosine: 200 updates, from 0 to 3.808e-05, at least 0, at most 0.5" in output
    assert output.count("│") == 9
    assert "199" in output
    code, output = pa("step", "--epochs", "10", "-o", "step_size=3 epochs", "-o", "gamma=0.5")
    assert code == 0
    assert "step: 1000 updates, from 1 to 0.125" in output
    code, output = pa("multi_step", "-o", "milestones=[0.1, 500]")
    assert "from 1 to 0.01" in output


def test_the_command_lists_the_names():
    code, output = pa("--names")
    assert code == 0
    assert {"cosine", "one_cycle", "OneCycleLR", "timm/tanh"} <= set(output.split())


def test_the_command_draws_the_schedulers_of_the_settings(tmp_path, monkeypatch):
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("""
        [tool.pa-core]
        plugins = ["schedulers"]
        [tool.pa-core.schedulers]
        name = "linear"
        min_lr_ratio = 0.5
        [tool.pa-core.schedulers.weight_decay]
        name = "cosine"
        [tool.pa-core.schedulers.groups.head]
        name = "constant"
    """)
    code, output = pa("--steps", "100", "--lr", "0.1")
    assert code == 0
    assert "learning rate, linear: 100 updates, from 0.1 to 0.0505" in output
    assert "weight decay (relative), cosine" in output
    assert "learning rate of head, constant: 100 updates, from 0.1 to 0.1" in output
    (tmp_path / "pyproject.toml").write_text("[tool.pa-core.schedulers]\nname = 5")
    code, output = pa()
    assert code == 1
    assert "[tool.pa-core.schedulers] name: expected a valid string" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cosinus",), "Did you mean 'cosine'"),
        (("cosine", "-o", "k_decya=2"), "Did you mean 'k_decay'"),
        (("cosine", "-o", "k_decay"), "NAME=VALUE"),
        (("cosine", "--warmup", "soon"), "'soon' is not a valid duration"),
        (("reduce_lr_on_plateau",), "steps on a metric"),
        (("--warmup", "5%"), "need the name of a scheduler"),
        ((), "No scheduler in the settings of this folder"),
    ],
)
def test_the_command_reports_errors_without_a_traceback(arguments, message, tmp_path, monkeypatch):
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    code, output = pa(*arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_the_command_is_registered():
    from importlib.metadata import entry_points

    (point,) = entry_points(group="pa_core.commands", name="schedule")
    assert point.load() is schedule


def test_a_terminal_without_block_characters_gets_an_ascii_drawing(monkeypatch):
    from pa_schedulers import command

    class Plain:
        encoding = "ascii"

    monkeypatch.setattr(command.sys, "stdout", Plain())
    assert command._printable(draw([0.0, 0.5], height=1)).isascii()


def test_a_png_file_is_written_and_a_notebook_gets_axes(tmp_path, monkeypatch):
    import matplotlib

    matplotlib.use("agg")
    file = tmp_path / "cosine.png"
    code, output = pa("cosine", "--png", str(file))
    assert (code, f"Written to {file}" in output) == (0, True)
    assert file.read_bytes().startswith(b"\x89PNG")
    axes = plot_schedule("linear", 10)
    (line,) = axes.get_lines()
    assert list(line.get_ydata()) == pytest.approx(schedule_values("linear", 10))
    assert plot_schedule("cosine", 10, ax=axes) is axes
    assert len(axes.get_lines()) == 2


def test_missing_matplotlib_is_reported_before_anything_is_drawn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    code, output = pa("cosine", "--png", str(tmp_path / "a.png"))
    assert code == 1
    assert "updates" not in output
