"""The page of what plugins use is complete: each public name of a trainer, and nothing else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from pa_core import Trainer, plugin
from pa_core.testing import tiny_data, tiny_trainer

PAGE = (Path(__file__).parent.parent / "docs" / "plugins" / "plugin_interface.md").read_text()
TRAINER_TABLES, _, REST = PAGE.partition("## What to import from pa_core.plugin")
ATTRIBUTES = re.findall(r"^\| `(\w+)` \|", TRAINER_TABLES, re.MULTILINE)
METHODS = re.findall(r"^\| `(\w+)\((.*?)\)` \|", TRAINER_TABLES, re.MULTILINE)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    trainer: Trainer = tiny_trainer()
    trainer.train(tiny_data(), 1, eval_dataset=tiny_data())
    return trainer


def test_the_page_has_each_public_name_of_a_trainer_once_and_nothing_else(trainer: Trainer) -> None:
    on_page = [*ATTRIBUTES, *(name for name, _ in METHODS)]
    assert sorted(set(on_page)) == sorted(on_page)
    public = {name for name in dir(trainer) if not name.startswith("_")}
    assert set(on_page) == public


def test_methods_have_the_arguments_of_the_page_and_attributes_are_none(trainer: Trainer) -> None:
    for name, arguments in METHODS:
        listed = [one.strip() for one in arguments.replace("*,", "").split(",") if one.strip()]
        parameters = [
            f"*{one.name}" if one.kind is inspect.Parameter.VAR_POSITIONAL else one.name
            for one in inspect.signature(getattr(trainer, name)).parameters.values()
            if one.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        assert listed == parameters[: len(listed)] if name == "train" else listed == parameters
    functions = {name for name in ATTRIBUTES if inspect.ismethod(getattr(trainer, name, None))}
    assert functions == set()


def test_only_the_attributes_that_may_be_set_can_be_set_on_a_trainer(trainer: Trainer) -> None:
    to_set, _, to_read = TRAINER_TABLES.partition("## Attributes to read")
    for name in re.findall(r"^\| `(\w+)` \|", to_set, re.MULTILINE):
        setattr(trainer, name, getattr(trainer, name))
    for name in re.findall(r"^\| `(\w+)` \|", to_read, re.MULTILINE):
        found = inspect.getattr_static(Trainer, name, None)
        if isinstance(found, property):
            assert found.fset is None, name


def test_the_page_has_each_name_that_plugins_import() -> None:
    table = REST.partition("## Reserved names")[0]
    rows = re.findall(r"^\| [^|`]+ \| (.+) \|$", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(names) == sorted(plugin.__all__)


def test_properties_of_the_trainer_are_documented() -> None:
    for name in dir(Trainer):
        if not name.startswith("_"):
            assert inspect.getdoc(inspect.getattr_static(Trainer, name)), name
