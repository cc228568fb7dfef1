"""A run history as a representation, a table, a data frame and a plot."""

import math
import sys

import pytest
import torch
from torch import nn

from pa_core import Trainer
from pa_core.durations import Progress
from pa_core.tracking import InMemoryRunHistory
from tests.helpers import MinimalHistory, tiny_data, tiny_model


def history_of(*records):
    """A history with ``(epoch, update, name, value)`` recorded."""
    history = InMemoryRunHistory()
    place = [0]
    history.follow(lambda: Progress(0, place[0], 10 * place[0], place[0] / 2, None))
    for epoch, update, name, value in records:
        place[0] = update
        history._set_epoch(epoch)
        history.update_metric(name, value)
    history._increment_epoch()
    return history


HISTORY = history_of(
    (1, 2, "train_loss", 0.95),
    (1, 4, "train_loss", 0.92),
    (1, 4, "train_loss_epoch", 0.9),
    (1, 4, "eval_loss_epoch", 0.8),
    (1, 4, "eval_recall", [0.1, 0.2]),
    (2, 8, "train_loss_epoch", 0.7),
    (2, 8, "eval_loss_epoch", math.nan),
    (2, 8, "eval_<b>", 3),
    (3, 8, "evaluation_loss", 0.4),
)


def values_only():
    history = MinimalHistory()
    for value in (3.0, 2.0):
        history.update_metric("train_loss_epoch", value)
    history.update_metric("eval_loss_epoch", 1.0)
    return history


def test_a_history_is_represented_by_where_it_stands_and_its_latest_values():
    assert repr(InMemoryRunHistory()) == "InMemoryRunHistory(no metrics)"
    assert repr(HISTORY) == (
        "InMemoryRunHistory(epoch 2, update 8: train_loss=0.92, train_loss_epoch=0.7, "
        "eval_loss_epoch=nan, eval_recall=[2 values], eval_<b>=3, evaluation_loss=0.4)"
    )
    assert repr(values_only()) == "MinimalHistory(train_loss_epoch=2, eval_loss_epoch=1)"
    many = history_of(*((1, 1, f"metric_{number}", 1.0) for number in range(30)))
    assert repr(many).endswith("metric_5=1, … and 24 more)")


def test_a_data_frame_has_a_row_per_epoch_with_the_last_value_of_each_metric():
    frame = HISTORY.to_pandas()
    assert frame.index.name == "epoch"
    assert frame.index.tolist() == [1, 2]
    assert frame.columns.tolist() == [
        *("train_loss", "train_loss_epoch", "eval_loss_epoch", "eval_recall", "eval_<b>"),
        "evaluation_loss",
    ]
    assert frame["train_loss_epoch"].tolist() == [0.9, 0.7]
    assert frame["train_loss"].tolist() == [0.92, pytest.approx(math.nan, nan_ok=True)]
    assert frame["eval_recall"][1] == [0.1, 0.2]
    assert frame["evaluation_loss"][2] == 0.4  # the history has advanced, the epoch was the second
    assert frame["eval_loss_epoch"].idxmin() == 1
    assert InMemoryRunHistory().to_pandas().empty
    assert values_only().to_pandas()["train_loss_epoch"].tolist() == [3.0, 2.0]


def test_a_data_frame_has_a_row_per_record():
    frame = HISTORY.to_pandas(per="record")
    for name in ("metric", "epoch", "update", "samples", "seconds"):
        assert frame[name].tolist() == [record[name] for record in HISTORY.records]
    assert repr(frame["value"].tolist()) == repr([record["value"] for record in HISTORY.records])
    outside = values_only().to_pandas(per="record")
    assert outside["epoch"].tolist() == [1, 2, 1]
    assert outside["update"].isna().all()
    with pytest.raises(ValueError, match='expected "epoch" or "record"'):
        HISTORY.to_pandas(per="step")


def test_a_trained_history_has_the_same_values_in_all_forms():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, settings={})
    trainer.train(tiny_data(), 3, eval_dataset=tiny_data())
    result = trainer.evaluate(tiny_data())
    history, frame = trainer.run_history, trainer.run_history.to_pandas()
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        assert frame[name].tolist() == history.get_metric_values(name)
    assert frame["evaluation_loss"][3] == result["evaluation_loss"]
    lines = history.plot("loss", x="epoch").axes[0].lines
    drawn = {line.get_label(): list(line.get_ydata()) for line in lines}
    assert drawn["eval"] == history.get_metric_values("eval_loss_epoch")
    assert list(lines[0].get_xdata()) == [1, 2, 3]
    assert result == dict(result)
    assert "evaluation_loss" in result._repr_html_()
    assert "<th>num_epochs</th>" in trainer.run_config._repr_html_()


def test_the_table_of_a_history_is_html_with_its_best_values_marked_and_text_escaped():
    html = HISTORY._repr_html_()
    assert html.count("<tr>") == 3  # the header and two epochs
    assert html.count("<tr class=within>") == 1
    assert '<td class="best" title="best"><b>0.8000</b></td>' in html
    assert "<td class=nan>nan</td>" in html
    assert "&lt;b&gt;</th>" in html
    assert "<b></th>" not in html
    assert "evaluation_loss = 0.4" in html
    assert "no metrics" in InMemoryRunHistory()._repr_html_()
    assert "2.0000" in values_only()._repr_html_()


def test_the_table_of_a_long_history_has_its_first_last_and_best_rows():
    losses = [abs(epoch - 300.0) for epoch in range(1, 501)]
    found = ((epoch, epoch, "eval_loss_epoch", loss) for epoch, loss in enumerate(losses, 1))
    html = history_of(*found)._repr_html_()
    assert html.count("<tr>") == 1 + 60 + 1 + 2  # header, rows, the best one, two gaps
    assert "<b>0.0000</b>" in html
    assert "… 294 rows …" in html
    assert "… 145 rows …" in html
    assert len(html) < 10_000


def test_metrics_are_plotted_over_updates_epochs_and_time():
    figure = HISTORY.plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "recall", "<b>"]
    loss, recall, _ = figure.axes
    assert loss.get_xlabel() == "updates (4 per epoch)"
    drawn = {line.get_label(): list(line.get_xdata()) for line in loss.lines}
    assert drawn == {
        "train in epoch": [2, 4],
        "train": [4, 8],
        "eval (1 NaN or infinite)": [4, 8],
        "evaluate()": [8],
    }
    assert [line.get_label() for line in recall.lines] == ["eval 0", "eval 1"]
    in_epochs = HISTORY.plot("train_loss", x="epoch").axes[0].lines[0]
    assert list(in_epochs.get_xdata()) == [0.5, 1.0]
    assert list(HISTORY.plot("train_loss", x="seconds").axes[0].lines[0].get_xdata()) == [1, 2]
    (axes,) = values_only().plot().axes  # without positions, over epochs
    assert axes.get_xlabel() == "epochs"
    assert list(axes.lines[0].get_xdata()) == [1, 2]
    assert HISTORY.plot("loss", log=True).axes[0].get_yscale() == "log"
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_second_run_in_the_same_history_is_plotted_after_the_first():
    history = history_of(
        *((epoch, 5 * epoch, "train_loss_epoch", 1.0) for epoch in (1, 2)),
        *((epoch, 5 * (epoch - 2), "train_loss_epoch", 1.0) for epoch in (3, 4)),
    )
    assert list(history.plot().axes[0].lines[0].get_xdata()) == [5, 10, 15, 20]


def test_mistakes_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'eval_loss_epoch'"):
        HISTORY.plot("eval_loss_epok")
    with pytest.raises(ValueError, match="Did you mean 'update'"):
        HISTORY.plot(x="updates")
    with pytest.raises(ValueError, match="nothing to plot"):
        InMemoryRunHistory().plot()
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        HISTORY.to_pandas()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        HISTORY.plot()
