"""Secrets are masked wherever settings are shown or recorded."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel, Field, Secret, SecretStr, field_validator

from pa_core import hookimpl
from pa_core.durations import Duration
from pa_core.errors import SettingsError
from pa_core.settings.build import build_from_table
from pa_core.settings.table import Settings
from pa_core.testing import tiny_data, tiny_trainer


class _Account(BaseModel):
    user: str = ""
    password: SecretStr = SecretStr("")


class _WithSecrets:
    class Settings(BaseModel):
        token: SecretStr | None = None
        code: Secret[int] = Secret(0)
        account: _Account = _Account()
        accounts: list[_Account] = []

    def __init__(self, settings):
        self.settings = settings

    @hookimpl
    def on_init_end(self, trainer): ...


SECRETS = {
    "token": "hush-1",
    "code": 567890123456,
    "account": {"user": "ada", "password": "hush-2"},
    "accounts": [{"user": "bob", "password": "hush-3"}],
}


def test_secret_fields_appear_in_no_training_state_and_no_message(tmp_path):
    trainer = tiny_trainer(build_from_table(_WithSecrets, SECRETS))
    (name,) = trainer.plugins.by_name
    trainer.settings = Settings(tables={name: SECRETS})
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    texts = [file.read_text(errors="replace") for file in (tmp_path / "state").iterdir()]
    assert any("ada" in text for text in texts)
    assert not any("hush" in text or "567890123456" in text for text in texts)
    wrong = {
        "token": ["hush-1"],
        "code": "567890123456",
        "account": {"password": 567890123456},
        "accounts": "hush-3",
    }
    with pytest.raises(SettingsError) as caught:
        build_from_table(_WithSecrets, wrong)
    assert len(caught.value.problems) == 4
    assert "token: expected a valid string, got '**********'" in str(caught.value)
    assert not re.search("hush|567890123456", str(caught.value))


class _Validated:
    class Settings(BaseModel):
        every: Duration = Duration(1, "epochs")
        size: int = Field(1, gt=0)
        token: SecretStr = SecretStr("")

        @field_validator("token")
        @classmethod
        def look_up(cls, token):
            return {"": token}[token.get_secret_value()]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({"every": "soon"}, "every: 'soon' is not a valid duration. Expected an integer"),
        ({"every": -1}, "every: A duration must be positive and finite, not -1"),
        ({"size": 0}, "size: expected greater than 0, got 0"),
        ({"every": [1]}, "every: a list is not a valid duration. Expected an integer"),
    ],
)
def test_a_message_shows_the_value_once(table, problem):
    with pytest.raises(SettingsError) as caught:
        build_from_table(_Validated, table)
    assert str(caught.value).startswith(problem)
    (value,) = table.values()
    assert len(re.findall(rf"(?<![\w']){re.escape(repr(value))}(?![\w'])", str(caught.value))) <= 2
    assert str(caught.value).count(", got ") == (value in (0, [1]))


def test_a_validator_that_raises_anything_is_a_mistake_in_the_settings_without_the_secret():
    with pytest.raises(SettingsError, match="^can't be validated: KeyError: '.*'$") as caught:
        build_from_table(_Validated, {"token": "hush-1"})
    assert caught.value.__cause__ is None  # a traceback would show it
    assert caught.value.__suppress_context__
    assert "hush" not in str(caught.value)
