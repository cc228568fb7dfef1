"""Values that are secrets by their names, or by what they look like, are masked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, Field, field_validator

from pa_core import hookimpl
from pa_core.checkpoint.fingerprint import describe
from pa_core.errors import SettingsError
from pa_core.settings.build import build_from_table
from pa_core.settings.secrets import MASK, is_secret, mask_secrets, mask_text
from pa_core.settings.table import Settings
from pa_core.testing import tiny_data, tiny_trainer


@pytest.mark.parametrize(
    "name",
    [
        *("key", "api_key", "apiKey", "APIKey", "api-key", "apikey", "x-api-key", "AWS_SECRET_KEY"),
        *("accessToken", "HF_TOKEN", "refresh_tokens", "db.password", "userPassword", "passwd"),
        *("clientSecret", "secrets", "credentials", "Authorization", "Proxy-Authorization"),
        *("Cookie", "basic_auth", "smtp_pass", "pwd", "webhookUrl", "private_key", "passphrase"),
        *("password2", "api_token_prod", "passcode", "DBPASS", "otp", "connection_string"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "keys_seen", "max_tokens", "num_tokens", "pad_token", "eosToken", "token_type"),
        *("author", "password_file", "secretary", "monkey", "sort_key", "label_key", "url"),
        *("passes", "keyboard", "tokenizer", "authors", "cookie_jar_size", "key_value"),
        *("metric_key", "target_key", "class_token", "special_tokens", "stop_tokens"),
    ],
)
def test_names_of_other_settings(name: str) -> None:
    assert not is_secret(name)


HIDDEN = {
    "within lists of tables": {"services": [{"token": "HUSH", "name": "x"}]},
    "within nested lists": {"a": [[{"b": {"apiKey": "HUSH"}}]]},
    "whole tables": {"credentials": {"user": "HUSH", "more": ["HUSH"]}},
    "lists of secrets": {"tokens": ["HUSH", "HUSH-2"]},
    "numbers": {"password": 90210},
    "headers": {"headers": {"Authorization": "Bearer HUSH", "X-Api-Key": "HUSH"}},
    "pairs of headers": {"headers": [["Authorization", "HUSH"], ["Cookie", "HUSH"]]},
    "lines of headers": {"headers": ["Authorization: Basic HUSH", "X-Api-Key: HUSH"]},
    "a header's value": {"header": "Bearer HUSH-TOKEN"},
    "names beside values": {"environment": [{"name": "API_KEY", "value": "HUSH"}]},
    "command lines": {"arguments": ["--token", "HUSH", "--api-key=HUSH"]},
    "a URL's password": {"url": "postgresql://me:HUSH@host:5432/db"},
    "a password with signs": {"url": "redis://:HU@SH#90210@host/0"},
    "a URL's user": {"url": "https://HUSH@host/repository.git"},
    "a URL's parameters": {"url": "https://host/x?page=2&access_token=HUSH&apiKey=HUSH"},
    "a URL within a list": {"urls": ["https://me:HUSH@host", "https://host"]},
    "a connection string": {"database": "Server=host;AccountKey=HUSH;Pwd=HUSH"},
    "webhooks": {"url": "https://hooks.slack.com/services/HUSH/HUSH"},
    "well-known prefixes": {"a": "ghp_HUSH567890123456x", "b": "sk-proj-HUSH567890123456"},
    "a URL's key": {"url": "https://host/x?key=HUSH&page=2"},
    "a signed URL": {"url": "https://host/x?X-Amz-Signature=HUSH&sig=HUSH"},
    "capital names beside values": {"environment": [{"Name": "API_KEY", "Value": "HUSH"}]},
    "a command as text": {"command": "serve --api-key HUSH --port 80"},
    "a bot's URL": {"url": "https://api.telegram.org/bot123:HUSH/sendMessage"},
    "private keys": {"a": "-----BEGIN PRIVATE KEY-----\nHUSH\n-----END PRIVATE KEY-----"},
    "JSON web tokens": {"a": "eyJHUSH90210a.eyJHUSH.HUSH"},
}


@pytest.mark.parametrize("place", HIDDEN)
def test_secrets_are_masked_at_any_depth(place: str) -> None:
    shown = mask_secrets(HIDDEN[place])
    assert "HUSH" not in str(shown)
    assert "90210" not in str(shown)
    assert MASK in str(shown)
    assert shown.keys() == HIDDEN[place].keys()
    assert mask_secrets(shown) == shown


def test_other_values_stay_as_they_are() -> None:
    table = {
        "lr": 0.1,
        "tokens": 1000,
        "key": 3,
        "token": None,
        "use_auth": True,
        "url": "https://host:8080/path?page=2#part",
        "columns": ["image", "label"],
        "text": "Basic things, and a bearer of news: the token was lost",
        "remote": "git@host:me/repository.git",
        "advice": "eos_token: </s>, sig = 3, and basic training",
        "nested": {"eos_token": "</s>", "max_tokens": 512, "path": "sk-learn/model"},
    }
    assert mask_secrets(table) == table
    assert mask_text("weights of hf_transformers") == "weights of hf_transformers"


class _Marked(BaseModel):
    region: str = ""
    pin: str = Field("", json_schema_extra={"writeOnly": True})


class _Plugin:
    class Settings(BaseModel):
        pin: str = Field("", json_schema_extra={"writeOnly": True})
        places: list[_Marked] = []
        address: str = ""
        api_key: str = ""

        @field_validator("address", "api_key")
        @classmethod
        def _refused(cls, value: str) -> str:
            raise ValueError(f"{value} can't be reached")

    def __init__(self, settings: Settings) -> None: ...

    @hookimpl
    def on_init_end(self) -> None: ...


def test_settings_can_mark_more_values_as_secrets() -> None:
    plugin = _Plugin(_Plugin.Settings())
    table = {"pin": "HUSH", "places": [{"region": "x", "pin": "HUSH"}], "other": "shown"}
    shown = Settings(tables={"plugin": table}).shown("plugin", plugin)
    assert shown == {"pin": MASK, "places": MASK, "other": "shown"}


def test_messages_quote_no_secret() -> None:
    table = {"pin": ["HUSH-1"], "address": "ftp://me:HUSH-2@host", "api_key": "HUSH-3"}
    with pytest.raises(SettingsError) as caught:
        build_from_table(_Plugin, table)
    text = str(caught.value)
    assert "HUSH" not in text
    assert "pin: expected a valid string" in text
    assert f"ftp://me:{MASK}@host can't be reached" in text
    assert f"api_key: {MASK} can't be reached" in text


@dataclass
class _Store:
    bucket: str
    accessToken: str  # noqa: N815
    url: str


def test_objects_are_described_without_secrets() -> None:
    assert describe(_Store("data", "HUSH", "https://me:HUSH@host")) == {
        "class": "_Store",
        "bucket": "data",
        "accessToken": MASK,
        "url": f"https://me:{MASK}@host",
    }


def test_a_state_describes_data_and_loss_without_secrets(tmp_path: Path) -> None:
    class Loss(torch.nn.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.clientSecret = "HUSH"

    trainer = tiny_trainer()
    trainer.loss_func = Loss()
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    texts = [file.read_text(errors="replace") for file in (tmp_path / "state").iterdir()]
    assert any('"clientSecret"' in text for text in texts)
    assert not any("HUSH" in text for text in texts)
