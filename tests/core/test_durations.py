import re

import pytest
from pydantic import BaseModel, ValidationError

from pa_core.durations import Duration, Every, Progress


def progress(epochs=0.0, updates=0, samples=0, seconds=0.0, fraction=None) -> Progress:
    return Progress(epochs, updates, samples, seconds, fraction)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1 epoch", 1, "epochs"),
        ("2.5 epochs", 2.5, "epochs"),
        ("500 updates", 500, "updates"),
        ("500 steps", 500, "updates"),
        ("20_000 samples", 20000, "samples"),
        ("1e6 samples", 1000000, "samples"),
        ("90 seconds", 90, "seconds"),
        ("15 minutes", 900, "seconds"),
        ("0.5 hours", 1800, "seconds"),
        ("5%", 5, "percent"),
        (" 2.5 percent ", 2.5, "percent"),
        ("10 EPOCHS", 10, "epochs"),
    ],
)
def test_a_number_with_a_unit_is_a_duration(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)


def test_a_plain_number_has_the_default_unit():
    assert Duration.parse(3) == Duration(3, "epochs")
    assert Duration.parse(3, default_unit="updates") == Duration(3, "updates")
    assert Duration.parse(Duration(3, "samples"), default_unit="updates") == Duration(3, "samples")


@pytest.mark.parametrize(
    "wrong", ["10", "epochs", "ten epochs", "-1 epochs", "1 epochs 2", "", "nan epochs", None, True]
)
def test_an_invalid_duration_is_an_error_that_shows_valid_ones(wrong):
    with pytest.raises(ValueError, match="is not a valid duration.*'10 epochs', '500 updates'"):
        Duration.parse(wrong)


def test_a_misspelt_unit_is_an_error_that_suggests_the_nearest():
    message = "'15 minuets' is not a valid duration. Did you mean 'minutes'?"
    with pytest.raises(ValueError, match=message):
        Duration.parse("15 minuets")


@pytest.mark.parametrize("wrong", [0, -1, "0 epochs", float("inf"), float("nan")])
def test_a_duration_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        Duration.parse(wrong)


@pytest.mark.parametrize(
    ("text", "short", "enough"),
    [
        ("2 epochs", progress(epochs=1.9), progress(epochs=2.0)),
        ("7 updates", progress(updates=6), progress(updates=7)),
        ("64 samples", progress(samples=63), progress(samples=64)),
        ("1 minute", progress(seconds=59.9), progress(seconds=60.0)),
        ("50%", progress(fraction=0.49), progress(fraction=0.5)),
    ],
)
def test_each_unit_is_compared_with_its_progress(text, short, enough):
    duration = Duration.parse(text)
    assert not duration.reached(short)
    assert duration.reached(enough)


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_percentage_is_reached_at_its_update_despite_rounding(percent):
    duration = Duration.parse(f"{percent}%")
    assert duration.reached(progress(fraction=percent / 100))
    assert not duration.reached(progress(fraction=(percent - 1) / 100))


def test_a_percentage_of_a_run_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="5% of the run is unknown"):
        Duration.parse("5%").reached(progress(updates=3))


@pytest.mark.parametrize("text", ["5%", "10 epochs", "2.5 epochs", "500 updates", "90 seconds"])
def test_a_duration_is_parsed_from_its_own_text(text):
    assert str(Duration.parse(text)) == text
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)


def test_every_is_due_once_for_each_multiple():
    every = Every("3 updates")
    due = [n for n in range(1, 13) if every.due(progress(updates=n))]
    assert due == [3, 6, 9, 12]


def test_every_is_due_once_if_several_multiples_are_passed_at_once():
    every = Every("10 samples")
    assert [every.due(progress(samples=n)) for n in (35, 36, 40)] == [True, False, True]


def test_every_is_not_late_because_of_rounding():
    every = Every("0.1 epochs")
    assert sum(every.due(progress(epochs=n / 10)) for n in range(1, 101)) == 100


def test_every_starts_over_with_a_new_run():
    every = Every("2 updates")
    assert every.due(progress(updates=4))
    assert [every.due(progress(updates=n)) for n in (1, 2)] == [False, True]


def test_every_continues_from_its_state():
    every = Every("3 updates")
    every.due(progress(updates=7))
    resumed = Every("3 updates")
    resumed.load_state_dict(every.state_dict())
    assert [resumed.due(progress(updates=n)) for n in (7, 8, 9)] == [False, False, True]


def test_a_duration_can_be_a_field_of_settings():
    class Settings(BaseModel):
        every: Duration | None = None

    assert Settings.model_validate({"every": "15 minutes"}).every == Duration(900, "seconds")
    assert Settings.model_validate_json('{"every": 3}', strict=True).every == Duration(3, "epochs")
    assert Settings(every=Duration(5, "percent")).model_dump(mode="json") == {"every": "5%"}
    with pytest.raises(ValidationError, match="'soon' is not a valid duration"):
        Settings.model_validate({"every": "soon"})
    schema = Settings.model_json_schema()["properties"]["every"]
    (text,) = (one for one in schema["anyOf"] if one.get("type") == "string")
    assert re.search(text["pattern"], "15 minutes")
    assert not re.search(text["pattern"], "soon")
