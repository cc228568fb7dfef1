"""Validation of a plugin's table with its pydantic model, with messages in terms of TOML."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, get_args, get_origin

from pydantic import AliasChoices, BaseModel, Secret, SecretBytes, SecretStr, ValidationError

from pa_core.errors import AddressError, SettingsError, nearest
from pa_core.settings.paths import local_path
from pa_core.settings.secrets import MASK, mask_secrets, mask_values

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_Path = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


def settings_model(plugin: object) -> type[BaseModel] | None:
    """The settings model of a plugin class; None if it has none."""
    model = getattr(plugin, "Settings", None) if inspect.isclass(plugin) else None
    return model if inspect.isclass(model) and issubclass(model, BaseModel) else None


def has_wrong_settings(plugin: object) -> bool:
    """Whether a class is meant to have settings, but its ``Settings`` isn't a pydantic model."""
    if not inspect.isclass(plugin) or settings_model(plugin) is not None:
        return False
    try:
        parameters = inspect.signature(plugin).parameters.values()
    except ValueError:  # a class that has no signature
        return False
    is_required = any(
        one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        for one in parameters
    )
    return is_required and inspect.isclass(getattr(plugin, "Settings", None))


def check_table(model: type[M], table: Mapping[str, Any]) -> tuple[M | None, list[str]]:
    """Validate a table.

    TOML has types, so a string isn't converted to a number. Unknown keys are mistakes, unless the
    model allows them explicitly.

    Args:
        model: the plugin's settings.
        table: the content of the table.

    Returns:
        The settings, or None and all mistakes, each with its key.

    Raises:
        SettingsError: if a validator fails in another way than pydantic expects.
    """
    values, problems = _check(model, table)
    return (None if problems else values), list(problems.values())


def check_options(
    model: type[M], options: Mapping[str, Any], *, complete: bool = True
) -> tuple[M | None, list[str]]:
    """Validate options given in code, as `check_table` does the keys of a table.

    Code has values that TOML does not have: tuples and sets, numbers of NumPy, paths, durations,
    and objects in options for another library. They are valid where the field's type takes them.

    Args:
        model: the plugin's settings.
        options: the options by name.
        complete: whether an option that is missing is a mistake if the model requires it.

    Returns:
        The settings, or None and all mistakes, each with its key.
    """
    objects: set[_Path] = set()
    table = {name: _as_toml(value, (name,), objects) for name, value in options.items()}
    strict = _check(model, table)[1]
    # What isn't a value of TOML is judged as the object that it is.
    problems = {
        path: message
        for path, message in strict.items()
        if not any(path[: len(place)] == place for place in objects)
    }
    given = {
        name: table[name] if isinstance(value, Real) else value for name, value in options.items()
    }
    values = None
    try:
        values = model.model_validate(given)
    except ValidationError as error:
        for path, message in _by_key(error, table, without_secrets(model, table)).items():
            problems.setdefault(path, message)
    if not complete:
        problems = {path: text for path, text in problems.items() if {*path[:1]} <= options.keys()}
    return (None if problems else values), list(problems.values())


def _as_toml(value: Any, place: _Path, objects: set[_Path]) -> Any:
    """A value as TOML has it; `objects` gets the place of anything that TOML does not have."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _as_toml(item, (*place, key), objects) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_toml(item, (*place, number), objects) for number, item in enumerate(value)]
    objects.add(place)
    return value


def _check(model: type[M], table: Mapping[str, Any]) -> tuple[M | None, dict[_Path, str]]:
    """The settings, if pydantic can build them, and all mistakes by their places."""
    problems: dict[_Path, str] = {
        path: _unknown_key(path, keys) for path, keys in _unknown_keys(model, table)
    }
    values = None
    try:
        # Strict JSON mode lets a list become a set, and a string a path or a member of an enum.
        values = model.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        shown = without_secrets(model, table)
        for path, messages in _by_key(error, table, shown).items():
            problems.setdefault(path, messages)
    except (Exception, SystemExit) as error:  # of a validator, which may raise anything
        text = f"can't be validated: {type(error).__name__}: {error}"
        shown = without_secrets(model, table)
        raise SettingsError([mask_values(text, table, shown)]) from error
    if values is not None:
        problems |= dict(_addresses(values, table))
    return values, problems


def without_secrets(model: type[BaseModel] | None, table: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a table that can be shown and recorded, with its secrets masked.

    Args:
        model: the plugin's settings, if it has any. Fields of the types `SecretStr`,
            `SecretBytes` and `Secret` are secrets, and fields that their JSON schema declares
            write-only: ``Field(json_schema_extra={"writeOnly": True})``.
        table: the content of the table.
    """
    shown: dict[str, Any] = mask_secrets(table)
    for key, info in (_fields(model) if model is not None else {}).items():
        if key not in table:
            continue
        inner = info.annotation
        if _is_write_only(info) or (_holds_secret(inner) and not _is_model(inner)):
            shown[key] = MASK
        elif _is_model(inner) and isinstance(table[key], Mapping) and shown[key] != MASK:
            shown[key] = without_secrets(inner, table[key])
    return shown


def _is_write_only(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("writeOnly"))


def _holds_secret(annotation: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether a type contains a secret anywhere, as an optional one or a list of models may."""
    kind = get_origin(annotation) or annotation
    if kind in seen:  # a model that refers to itself
        return False
    if isinstance(kind, type) and issubclass(kind, SecretStr | SecretBytes | Secret):
        return True
    fields = kind.model_fields.values() if _is_model(kind) else ()
    if any(map(_is_write_only, fields)):
        return True
    inner = (*get_args(annotation), *(info.annotation for info in fields))
    seen |= {kind} if _is_model(kind) else set()
    return any(_holds_secret(part, seen) for part in inner)


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The model's fields by each key that a table may use for them."""
    fields: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        alias = info.validation_alias or info.alias or name
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        fields |= {choice: info for choice in choices if isinstance(choice, str)}
        if model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name"):
            fields[name] = info
    return fields


def _addresses(
    values: BaseModel, table: Mapping[str, Any], path: _Path = ()
) -> Iterator[tuple[_Path, str]]:
    """The place of each path that is an address in truth, with a message."""
    for key, info in _fields(type(values)).items():
        if key not in table:
            continue
        names = [name for name, other in type(values).model_fields.items() if other is info]
        value = getattr(values, names[0])
        if isinstance(value, BaseModel) and isinstance(table[key], Mapping):
            yield from _addresses(value, table[key], (*path, key))
        elif isinstance(value, Path):
            try:
                local_path(table[key])
            except AddressError as error:
                where = ".".join(map(str, (*path, key)))
                yield (*path, key), f"{where}: {mask_secrets(str(error))}"


def _unknown_keys(
    model: type[BaseModel], table: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[_Path, list[str]]]:
    """The path of each unknown key, with the valid keys."""
    fields = _fields(model)
    for key, value in table.items():
        if key in fields:
            inner = fields[key].annotation
            if _is_model(inner) and isinstance(value, dict):
                yield from _unknown_keys(inner, value, (*path, key))
        elif model.model_config.get("extra") != "allow":
            yield (*path, key), list(fields)


def _unknown_key(path: _Path, known: list[str]) -> str:
    key = ".".join(map(str, path))
    valid = f"Valid keys: {', '.join(known)}" if known else "This plugin has no settings"
    return f"has no key {key!r}.{nearest(str(path[-1]), known)} {valid}"


def _by_key(
    error: ValidationError, table: Mapping[str, Any], shown: Mapping[str, Any]
) -> dict[_Path, str]:
    """One sentence per key, although pydantic reports an error for each type of a union.

    Args:
        error: pydantic's error.
        table: the invalid table.
        shown: the same with secrets masked, for the messages.
    """
    expected: dict[_Path, list[str]] = {}
    values: dict[_Path, Any] = {}
    for problem in error.errors(include_url=False):
        path, _ = _place(problem["loc"], table)
        if problem["type"] == "missing":
            path, message = (*path, problem["loc"][-1]), "is required"
        elif problem["type"] == "extra_forbidden":
            message = "is not a valid key"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            message = message.replace("Input should be", "expected").replace(
                ", unable to ", "; can't "
            )
            value = _place(path, shown)[1]
            # The validator of a plugin may show the value itself, as that of a duration does.
            shows_it = problem["type"] in ("value_error", "assertion_error") and re.search(
                rf"(?<!\w){re.escape(repr(value))}(?!\w)", message
            )
            if not shows_it:
                values[path] = value
        messages = expected.setdefault(path, [])
        if message not in messages:
            messages.append(message)
    sentences = {}
    for path, messages in expected.items():
        key = ".".join(map(str, path))
        text = " or ".join([messages[0], *(m.removeprefix("expected ") for m in messages[1:])])
        got = f", got {values[path]!r}" if path in values and path else ""
        colon = " " if text.startswith("is ") else ": "
        sentences[path] = mask_values(f"{key}{colon}{text}{got}" if key else text, table, shown)
    return sentences


def _place(loc: _Path, table: Any) -> tuple[_Path, Any]:
    """The part of pydantic's location that is in the table, and the value there.

    The rest of the location names the members of unions.
    """
    path: _Path = ()
    for part in loc:
        if isinstance(table, Mapping) and part in table:
            table = table[str(part)]
        elif isinstance(table, list) and isinstance(part, int) and part < len(table):
            table = table[part]
        else:
            break
        path = (*path, part)
    return path, table
