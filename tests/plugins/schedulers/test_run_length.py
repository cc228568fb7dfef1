"""Conversion of lengths to updates and epochs of a run."""

import pytest

from pa_schedulers.run_length import RunLength

RUN = RunLength(num_updates=170, num_epochs=1.7)


@pytest.mark.parametrize(
    ("length", "updates", "epochs"),
    [
        (0, 0, 0),
        (12, 12, 12),
        (0.1, 17, 0.17),
        ("10%", 17, 0.17),
        ("40 updates", 40, 0.4),
        ("40 steps", 40, 0.4),
        ("1 epoch", 100, 1),
        ("0.5 epochs", 50, 0.5),
        ("0.333%", 1, 0.005661),
    ],
)
def test_a_length_in_any_unit_converts_to_updates_and_epochs(length, updates, epochs):
    assert RUN.count(length) == updates
    assert isinstance(RUN.count(length), int)
    assert RUN.count(length, "epochs") == pytest.approx(epochs)


@pytest.mark.parametrize("length", [True, -1, 1.0, 5.5, None, "soon", "15 minutes", "9 samples"])
def test_an_invalid_length_is_rejected(length):
    with pytest.raises(ValueError, match="duration|length|expected"):
        RUN.count(length)


def test_a_run_of_unknown_length_converts_no_units():
    run = RunLength(None)
    assert run.count("7 updates") == 7
    assert run.count(7) == 7
    assert run.count("2 epochs", "epochs") == 2
    for length in (0.1, "5%"):
        with pytest.raises(ValueError, match="the run's length is needed"):
            run.count(length)
    with pytest.raises(ValueError, match="'2 epochs' can't be converted to updates"):
        run.count("2 epochs")
    with pytest.raises(ValueError, match="'2 updates' can't be converted to epochs"):
        run.count("2 updates", "epochs")
