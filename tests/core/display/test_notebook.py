"""What a run shows in a notebook; tests/distributed/test_launch.py executes one."""

import base64
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.builtins import live_plot
from pa_core.display import notebook_screen, streams
from pa_core.display.notebook import NotebookOutput
from pa_core.display.streams import in_notebook
from tests.helpers import tiny_data, tiny_model


class Outputs:
    """The outputs of a cell, each with all that it has shown."""

    def __init__(self):
        self.all = []

    def create(self):
        shown = []
        self.all.append(shown)
        return SimpleNamespace(show=shown.append)


@pytest.fixture
def outputs(monkeypatch):
    """The outputs of a cell of a notebook in which the test runs."""
    found = Outputs()
    monkeypatch.setattr(streams, "kernel", SimpleNamespace)
    for module in (live_plot, notebook_screen):
        monkeypatch.setattr(module, "NotebookOutput", found.create)
    return found


def new_trainer(*plugins, **settings):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Trainer(
        model, nn.CrossEntropyLoss(), optimizer, plugins=list(plugins), settings=settings
    )


def cells_of(html):
    return html.partition("</style>")[2]


def test_the_table_and_the_bar_share_an_output_and_the_bar_goes(outputs, monkeypatch, capsys):
    monkeypatch.setattr(notebook_screen, "_LEAST_SECONDS", 0.0)
    trainer = new_trainer(progress_table={"interval": 1e-9})
    trainer.train(tiny_data(), 30, eval_dataset=tiny_data())
    (shown,) = outputs.all
    pages = [cells_of(content["text/html"]) for content in shown]
    assert any("<progress" in page and "Epoch 2/30" in page for page in pages)
    assert "<progress" not in pages[-1]
    assert max(page.count("<tr>") for page in pages[:-1]) <= 1 + 20 + 3
    assert pages[-1].count("<tr>") == 1 + 30
    assert pages[-1].count('class="best"') == 1
    assert shown[-2]["text/plain"].startswith("epoch 30, train loss ")
    text = shown[-1]["text/plain"].splitlines()
    assert text[0].split() == ["epoch", "train", "loss", "eval", "loss", "lr", "time"]
    assert [line.split()[0] for line in text[2:]] == [str(epoch) for epoch in range(1, 31)]
    assert sum("*" in line for line in text) == 1
    printed = capsys.readouterr()
    assert "train loss" not in printed.out
    assert printed.err == ""


def test_short_epochs_are_displayed_at_a_bounded_rate(outputs, monkeypatch):
    monkeypatch.setattr(notebook_screen, "_LEAST_SECONDS", 1e6)
    new_trainer().train(tiny_data(), 60)
    (shown,) = outputs.all
    assert len(shown) == 2  # the first and the last
    assert "<td>60</td>" in shown[-1]["text/html"]


def test_the_bar_goes_when_a_run_fails(outputs):
    class Fails(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 9:
                raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        new_trainer(Fails()).train(tiny_data(), 3)
    (shown,) = outputs.all
    assert "<td>1</td>" in shown[-1]["text/html"]
    assert "<progress" not in cells_of(shown[-1]["text/html"])


def test_an_evaluation_within_a_run_has_a_table_for_itself(outputs):
    class Evaluates(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 1:
                trainer.evaluate(tiny_data())

    new_trainer(Evaluates()).train(tiny_data(), 2)
    tables = [cells_of(shown[-1]["text/html"]) for shown in outputs.all]
    of_epochs, of_evaluation = sorted(tables, key=lambda table: "<th>epoch</th>" not in table)
    assert of_epochs.count("<tr>") == 3
    assert of_evaluation.count("<tr>") == 2


def test_an_evaluation_is_shown_once_where_its_result_is_the_last_line(outputs, monkeypatch):
    cell = SimpleNamespace(execution_count=1)
    monkeypatch.setattr(streams, "kernel", lambda: cell)

    class Undefined(TrainerCallback):
        def on_eval_epoch_end(self, trainer):
            trainer.run_history.update_metric("undefined", math.nan)

    trainer = new_trainer(Undefined())
    results = [trainer.evaluate(tiny_data(size)) for size in (8, 16)]
    assert results[0]._repr_html_()
    assert [bool(shown[-1]["text/html"]) for shown in outputs.all] == [False, True]
    cell.execution_count = 2
    assert results[1]._repr_html_()  # in another cell
    assert outputs.all[1][-1]["text/html"]


def test_a_live_plot_is_drawn_at_a_bounded_rate_and_at_the_end(outputs, capsys):
    plot = live_plot.LivePlotCallback(["loss", "acuracy"], interval=1e-9)
    trainer = new_trainer(plot, progress_table={"rows": False, "bar": False})
    trainer.train(tiny_data(), 2, eval_dataset=tiny_data())
    (shown,) = [one for one in outputs.all if one]
    assert 1 < len(shown) < 12  # of 12 updates: a drawing waits for 20 times as long as one takes
    assert base64.b64decode(shown[-1]["image/png"]).startswith(b"\x89PNG")
    assert shown[-1]["text/plain"] == "Plot of loss after 12 updates"
    assert "live_plot: the metric 'acuracy' was not recorded" in capsys.readouterr().out
    assert "train_loss" not in trainer.run_history.get_metric_names()


def test_a_live_plot_outside_of_notebooks_says_so_and_needs_nothing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    new_trainer(live_plot.LivePlotCallback()).train(tiny_data(), 1)
    assert "live_plot: this is not a notebook, so nothing is plotted" in capsys.readouterr().out


def test_a_live_plot_without_matplotlib_is_an_error_with_the_command(outputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="live_plot needs matplotlib: pip install matplotlib"):
        new_trainer(live_plot.LivePlotCallback()).train(tiny_data(), 1)


def test_a_script_that_imports_ipython_is_not_a_notebook(monkeypatch):
    shell = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert not in_notebook()
    shell.kernel = SimpleNamespace()
    assert in_notebook()
    assert NotebookOutput()._handle is None
