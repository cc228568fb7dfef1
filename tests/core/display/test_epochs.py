"""The table of a run as data."""

import math

from pa_core.display.epochs import column_key, columns_of, epoch_table, number_text, rows_of


def records(*found):
    """Records of ``(epoch, update, seconds, name, value)``."""
    names = ("epoch", "update", "seconds", "metric", "value")
    return [dict(zip(names, one, strict=True)) | {"samples": 0} for one in found]


TWO_EPOCHS = records(
    (1, 3, 1.0, "train_loss_epoch", 0.9),
    (1, 3, 1.0, "train_accuracy", 0.5),
    (1, 3, 1.5, "eval_loss_epoch", 0.8),
    (1, 3, 1.5, "eval_accuracy", 0.6),
    (1, 3, 2.0, "ema_eval_loss_epoch", 0.85),
    (1, 3, 2.0, "eval_confusion", [[1, 2], [3, 4]]),
    (2, 6, 3.0, "train_loss_epoch", 0.7),
    (2, 6, 3.0, "learning_rate", 0.1),
    (2, 6, 4.0, "eval_loss_epoch", math.nan),
    (2, 6, 4.0, "eval_accuracy", 0.6),
    (2, 6, 5.0, "ema_eval_loss_epoch", 0.5),
    (3, 6, 5.0, "evaluation_loss", 0.4),
)


def test_there_is_one_row_per_epoch_and_a_column_for_each_number():
    table = epoch_table(TWO_EPOCHS)
    assert [column.heading for column in table.columns] == [
        *("epoch", "train loss", "train accuracy", "eval loss", "eval accuracy", "ema eval loss"),
        *("lr", "time"),
    ]
    cells = [[table.cell(row, column) for column in table.columns] for row in table.rows]
    assert cells == [
        ["1", "0.9000", "0.5000", "0.8000", "0.6000", "0.8500", "", "2.0s"],
        ["2", "0.7000", "", "nan", "0.6000", "0.5000", "0.1", "3.0s"],
    ]


def test_the_best_value_is_the_first_of_equal_ones_and_never_nan():
    table = epoch_table(TWO_EPOCHS)
    # That of training is compared only in a run without evaluation.
    assert table.best == {"eval_loss_epoch": 0, "eval_accuracy": 0, "ema_eval_loss_epoch": 1}
    assert table.is_best(1, table.columns[5])
    alone = [one for one in TWO_EPOCHS if one["metric"] == "train_loss_epoch"]
    assert epoch_table(alone).best == {"train_loss_epoch": 1}
    odd = records((1, 1, 1.0, "oddity", 1.0), (2, 2, 2.0, "oddity", 2.0))
    assert epoch_table(odd).best == {}
    assert epoch_table(odd, {"oddity": True}).best == {"oddity": 1}


def test_what_is_recorded_within_an_epoch_has_a_row_of_its_update():
    found = records(
        (1, 2, 1.0, "learning_rate", 0.1),
        (1, 2, 1.0, "intermediate_eval_loss", 0.9),
        (1, 2, 1.0, "eval_accuracy", 0.4),
        (1, 2, 1.2, "ema_intermediate_eval_loss", 0.95),
        (1, 2, 1.2, "ema_eval_accuracy", 0.3),
        (1, 4, 2.0, "intermediate_eval_loss", 0.8),
        (1, 4, 2.0, "eval_accuracy", 0.5),
        (1, 4, 2.5, "train_loss_epoch", 1.0),
        (1, 4, 3.0, "eval_loss_epoch", 0.8),
        (1, 4, 3.0, "eval_accuracy", 0.5),
    )
    table = epoch_table(found)
    # The one after the last update is that at the end of the epoch.
    assert [(row.epoch, row.update) for row in table.rows] == [(1, 2), (1, None)]
    within, whole = table.rows
    assert within.values == {
        "eval_loss_epoch": 0.9,
        "eval_accuracy": 0.4,
        "ema_eval_loss_epoch": 0.95,
        "ema_eval_accuracy": 0.3,
    }
    assert whole.values["eval_accuracy"] == 0.5
    assert whole.values["train_loss_epoch"] == 1.0
    assert table.columns[1].key == "update"
    assert table.best["eval_loss_epoch"] == 1


def test_a_second_run_in_the_same_history_times_its_own_epochs():
    found = records((1, 1, 9.0, "train_loss_epoch", 1.0), (2, 1, 4.0, "train_loss_epoch", 1.0))
    assert [row.seconds for row in rows_of(found)] == [9.0, 4.0]
    outside = [one | {"seconds": None, "update": None} for one in found]
    assert [row.seconds for row in rows_of(outside)] == [None, None]
    assert [column.key for column in columns_of(rows_of(outside))] == ["epoch", "train_loss_epoch"]


def test_columns_with_the_same_words_keep_their_whole_names():
    found = records((1, 1, 1.0, "eval_loss_epoch", 1.0), (1, 1, 1.0, "eval_loss", 2.0))
    headings = [column.heading for column in epoch_table(found).columns]
    assert headings == ["epoch", "eval loss epoch", "eval loss", "time"]
    assert column_key("a_train_loss") == "a_train_loss"


def test_numbers_fit_their_column():
    values = (0.0, 9.99996, 99.9999, 999_999.4, -0.5, 1e-10, -123456.7, float("inf"), 10**12)
    shown = [number_text(value) for value in values]
    assert shown == [
        *("0.0000", "10.0000", "100.000", "999999", "-0.5000", "1.00e-10", "-123457", "inf"),
        "1.00e+12",
    ]
    assert max(map(len, shown)) == 8


def test_datasets_may_be_called_like_the_parts_of_a_run():
    names = ["train_loss_epoch", *(f"{name}_eval_loss_epoch" for name in ("train", "evaluation"))]
    table = epoch_table(records(*((1, 1, 1.0, name, 0.5) for name in names)))
    headings = [column.heading for column in table.columns]
    assert headings == ["epoch", "train loss", "train eval loss", "eval eval loss", "time"]
    assert [column.greater_is_better for column in table.columns][1:4] == [None, False, False]
