"""Masking secrets in settings, so that they can be shown and recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "**********"
"""Replaces a secret, as in pydantic's own output."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ENDS = (
    *("apikey", "accesskey", "secretkey", "privatekey", "passwd", "password", "passphrase"),
    *("secret", "token", "credential", "authorization", "cookie", "webhook", "webhookurl"),
    *("passcode", "sshkey", "userpass", "dbpass", "sessionid", "connectionstring", "accesskeyid"),
)
_PLURAL_ENDS = tuple(f"{end}s" for end in _ENDS)
_WORDS = {"pwd", "jwt", "otp", "totp"}
_SUFFIXES = {"value", "prod", "dev", "staging", "confirm", "confirmation"}
"""Words after the name of a secret, as in ``api_token_prod``; a number may be there, too."""
_WORDS_OF_TEXTS = {"key", "auth", "oauth", "pass", "pat", "bearer", "pw"}
"""A number of such a name isn't a secret."""
_TOKENS_OF_TEXTS = {
    *("pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "start", "end", "special"),
    *("image", "audio", "video", "class", "dist", "distill", "distillation", "reg", "register"),
    *("registers", "context", "padding", "begin", "separator", "sep", "delimiter", "split"),
    *("prefix", "suffix", "ignored", "vocab", "additional", "bad", "extra", "newline", "text"),
    *("use", "prompt", "query", "added"),
}
_HARMLESS_KEYS = {
    *("sort", "primary", "foreign", "state", "group", "dict", "image", "label", "text"),
    *("metric", "target", "input", "output", "loss", "monitor", "batch", "dataset", "cache"),
    *("prediction", "query", "index", "x", "y", "public", "partition", "feature", "mask"),
}
_COUNTS = {"num", "max", "min", "n", "seen"}

_NAME = (
    r"[\w-]*(?:api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|account[_-]?key|"
    r"access[_-]?key[_-]?id|password|passwd|pwd|pw|passphrase|secret|token|credentials?)"
)
_IN_TEXT = (
    # https://user:password@host, and https://token@host
    re.compile(r"(?P<kept>\b[a-z][\w+.-]*://[^\s:/@?#]*:)[^\s/]+(?=@)", re.IGNORECASE),
    re.compile(r"(?P<kept>\bhttps?://)[^\s:/@?#]+(?=@)", re.IGNORECASE),
    # ?token=…, --api-key=…, password: …, AccountKey=…; in TOML and JSON, too
    re.compile(rf"(?P<kept>\b(?P<name>{_NAME})[\"']?\s*[=:]\s*[\"']?)[^\s\"'&;,]+", re.IGNORECASE),
    re.compile(r"(?P<kept>\b(?:authorization|cookie|x-[\w-]+-key)\s*:\s*)\S.*", re.IGNORECASE),
    re.compile(
        r"(?P<kept>[?&](?:key|auth|code|pass|[\w-]*sig(?:nature)?)=)[^\s\"'&;#]+", re.IGNORECASE
    ),
    re.compile(rf"(?P<kept>(?:^|\s)--(?P<name>{_NAME})\s+)(?!-)\S+", re.IGNORECASE),
    re.compile(r"(?P<kept>\bbearer\s+)\S{6,}", re.IGNORECASE),
    re.compile(
        r"(?P<kept>\bbasic\s+)(?=\S*(?-i:[A-Z\d=]))[\w+/-]{8,}={0,2}(?=$|[\"'\s])", re.IGNORECASE
    ),
    # Prefixes that services give to their tokens, JSON web tokens, and the paths of webhooks
    re.compile(r"(?P<kept>)\b(?:sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[\w-]{16,}"),
    re.compile(r"(?P<kept>)\b(?:hf_|AKIA|AIza)[A-Za-z0-9]{16,}"),
    re.compile(r"(?P<kept>)\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"),
    re.compile(r"(?P<kept>)\bnpm_[A-Za-z0-9]{16,}"),
    re.compile(r"(?P<kept>\bhttps://api\.telegram\.org/bot)[^\s/]+"),
    re.compile(r"(?s)(?P<kept>-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END |$)"),
    re.compile(r"(?P<kept>\bhttps://hooks\.slack\.com/services/)\S+"),
    re.compile(r"(?P<kept>\bhttps://discord(?:app)?\.com/api/webhooks/)\S+"),
)


def is_secret(name: str) -> bool:
    """Whether a setting of this name is likely to be a secret.

    >>> is_secret("api_key"), is_secret("HF_TOKEN"), is_secret("clientSecret")
    (True, True, True)
    >>> is_secret("keys_seen"), is_secret("max_tokens"), is_secret("pad_token")
    (False, False, False)
    """
    words = _words(name)
    while len(words) > 1 and (words[-1].isdigit() or words[-1] in _SUFFIXES):
        if words[-2] in _WORDS_OF_TEXTS and not "".join(words[:-1]).endswith(_ENDS):
            return False  # key_value
        words.pop()
    if not words or _COUNTS & set(words):
        return False
    if words[-1] in ("token", "tokens") and _TOKENS_OF_TEXTS & set(words):
        return False
    if words[-1] == "key" and _HARMLESS_KEYS & set(words[-2:]):
        return False
    if words[-1] in _WORDS | _WORDS_OF_TEXTS:
        return True
    return "".join(words).endswith(_ENDS + _PLURAL_ENDS)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def mask_secrets(value: Any) -> Any:
    """A copy of settings that can be shown and recorded, with its secrets masked.

    A value is a secret if its name is that of one, at any depth (`is_secret`). Within other texts,
    passwords in URLs, values of secret parameters and headers, and tokens with the prefix of a
    well-known service are masked.

    >>> mask_secrets({"lr": 0.1, "wandb": {"apiKey": "x"}, "url": "https://me:pw@host/db"})
    {'lr': 0.1, 'wandb': {'apiKey': '**********'}, 'url': 'https://me:**********@host/db'}

    Args:
        value: a table, a list or a plain value.
    """
    if isinstance(value, Mapping):
        named = _named_secret(value)
        return {
            key: MASK if key in named or _is_secret_entry(key, item) else mask_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        masked = [
            MASK if number and _introduces_secret(value[number - 1], item) else mask_secrets(item)
            for number, item in enumerate(value)
        ]
        return _masked_pairs(value, masked)
    return mask_text(value) if isinstance(value, str) else value


def mask_text(text: str) -> str:
    """The text with what is recognised as a secret in it masked.

    >>> mask_text("GET https://host/path?token=abc&page=2")
    'GET https://host/path?token=**********&page=2'
    """
    for pattern in _IN_TEXT:
        text = pattern.sub(_masked_match, text)
    return text


def _masked_match(match: re.Match[str]) -> str:
    name = match.groupdict().get("name")
    return match["kept"] + MASK if name is None or is_secret(name) else match[0]


def mask_values(text: str, value: Any, shown: Any) -> str:
    """The text with those strings masked that have been masked in a table.

    Args:
        text: a message that may quote values of the table.
        value: the table.
        shown: its copy with secrets masked.
    """
    masked = dict(_masked_texts(value, shown))
    for secret in sorted(masked, key=len, reverse=True):
        text = text.replace(secret, masked[secret])
    return text


def _is_secret_entry(key: object, value: Any) -> bool:
    """Whether an entry is a secret as a whole."""
    if not isinstance(key, str) or value is None or isinstance(value, bool) or not is_secret(key):
        return False
    if isinstance(value, int | float):  # tokens = 1000 is a number of tokens
        words = _words(key)
        return words[-1] not in _WORDS_OF_TEXTS and not "".join(words).endswith(_PLURAL_ENDS)
    return True


def _named_secret(table: Mapping[Any, Any]) -> set[str]:
    """The key of the value in ``{name = "Authorization", value = "…"}``."""
    lower = {key.lower(): key for key in table if isinstance(key, str)}
    name = next((table[lower[key]] for key in ("name", "key", "header") if key in lower), None)
    is_named = isinstance(name, str) and is_secret(name)
    return {lower["value"]} if is_named and "value" in lower else set()


def _introduces_secret(before: Any, value: Any) -> bool:
    """Whether `before` is an option such as ``--api-key`` of a command line."""
    is_option = isinstance(before, str) and before.startswith("-") and "=" not in before
    return is_option and is_secret(before.lstrip("-"))


def _masked_pairs(value: Any, masked: list[Any]) -> list[Any]:
    """Mask the second parts of ``[["Authorization", "…"], …]``."""
    for number, item in enumerate(value):
        if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str):
            if is_secret(item[0]):
                masked[number] = [item[0], MASK]
    return masked


def _masked_texts(value: Any, shown: Any) -> Iterator[tuple[str, str]]:
    """The texts that differ, each with what replaces it."""
    if value == shown:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _masked_texts(item, shown[key] if isinstance(shown, Mapping) else MASK)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _masked_texts(item, shown[number] if isinstance(shown, list) else MASK)
    elif len(str(value)) > 3:  # a shorter one would replace parts of other words
        yield str(value), str(shown)
