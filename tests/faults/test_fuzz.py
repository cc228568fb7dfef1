"""Whatever stands in settings, states and histories: a told error or a right result.

Never a traceback from inside. ``PA_FAULTS_CASES=10000`` tries more cases, other ones each time.
"""

from __future__ import annotations

import copy
import json
import math
import os
import warnings
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from pa_core import Trainer
from pa_core.callbacks import EarlyStoppingCallback
from pa_core.checkpoint.atomic_io import fingerprint
from pa_core.checkpoint.codec import decode, encode
from pa_core.checkpoint.storage import json_bytes, newest_intact_state
from pa_core.errors import PaCoreError, SettingsError, TrainingStateError
from pa_core.plugins.builtin_names import BUILTINS
from pa_core.plugins.discovery import builtin_sources, load_plugin
from pa_core.settings.table import build_plugins, read_settings, settings_model
from pa_core.settings.validation import check_table
from pa_core.tracking import InMemoryRunHistory
from pa_metrics.plugin import MetricsSettings
from pa_models.ema_plugin import EmaSettings
from tests.helpers import tiny_data, tiny_model

CASES = int(os.environ.get("PA_FAULTS_CASES", "300"))
fuzz = hypothesis_settings(
    max_examples=CASES,
    derandomize="PA_FAULTS_CASES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

MODELS = {
    name: settings_model(load_plugin(source))
    for name, source in builtin_sources().items()
    if name in BUILTINS
} | {"metrics": MetricsSettings, "ema": EmaSettings}

text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
durations = st.sampled_from(["2 epochs", "0 updates", "5%", "-1 epochs", "nan minutes", "1e999 s"])
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10), st.integers(), st.floats(), text, durations
)


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=8,
    )


plain = nested(scalars)
toml_values = nested(scalars.filter(lambda value: value is not None))
keys = sorted({field for model in MODELS.values() if model for field in model.model_fields})


@fuzz
@given(
    st.sampled_from([model for model in MODELS.values() if model]),
    st.dictionaries(st.sampled_from(keys) | text, toml_values, max_size=4),
)
def test_a_table_gives_settings_or_a_sentence_for_each_mistake(model, table):
    values, problems = check_table(model, table)
    assert (values is None) == bool(problems)
    assert all(isinstance(problem, str) and problem for problem in problems)


def told(action, *kinds):
    """The error of these kinds that an action ends in, or None; any other is raised."""
    try:
        action()
    except kinds as error:
        return error
    return None


def toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "")
    return repr(value).lower()


names = st.sampled_from(
    [
        "checkpoint",
        "early_stopping",
        "early_stopping:two",
        "limit_batches",
        "ema",
        "x.py",
        "a:",
        ":",
    ]
)


@fuzz
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "plugins": st.lists(names | text, max_size=4) | toml_values,
            "disable": st.lists(st.sampled_from(list(MODELS)) | text, max_size=2) | toml_values,
            "checkpoint": st.dictionaries(st.sampled_from(keys), toml_values, max_size=3)
            | toml_values,
            "early_stopping": toml_values,
            "surprise": toml_values,
        },
    )
)
def test_a_file_of_settings_builds_its_plugins_or_tells_every_mistake(tmp_path_factory, table):
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    file.write_text(f"tool = {toml({'pa-core': table})}\n", encoding="utf-8")
    error = told(lambda: build_plugins(read_settings(file)), SettingsError)
    assert error is None or (error.problems and str(file) in str(error))


@fuzz
@given(st.binary(max_size=200) | text.map(lambda value: f"[tool.pa-core]\n{value}".encode()))
def test_a_file_that_is_no_toml_is_told(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    file.write_bytes(content)
    error = told(lambda: build_plugins(read_settings(file)), SettingsError)
    assert error is None or str(file) in str(error)


def new_trainer() -> Trainer:
    model = tiny_model()
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), lr=0.1),
        callbacks=[EarlyStoppingCallback(watch_metric="train_loss_epoch")],
        plugins=(),
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state with the content of its JSON files, which the tests below write anew."""
    folder = tmp_path_factory.mktemp("states") / "state"
    trainer = new_trainer()
    trainer.train(
        tiny_data(16),
        1,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    trainer.save_training_state(folder)
    content = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return folder, content, trainer


def places(value, path=()):
    """The path of each value in nested JSON."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def changed(content, path, value):
    """A copy with another value at `path`."""
    if not path:
        return value
    whole = copy.deepcopy(content)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return whole


def write(folder, content) -> None:
    """Write a state's JSON files as somebody would who knows how to hash."""
    manifest = content["manifest.json"]
    for name, value in content.items():
        if name != "manifest.json":
            (folder / name).write_bytes(json_bytes(value))
            if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
                manifest["files"] = manifest["files"] | {name: fingerprint(folder / name)}
    if isinstance(manifest, dict):
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        manifest = rest | {"sha256": sha256(json_bytes(rest)).hexdigest()}
    (folder / "manifest.json").write_bytes(json_bytes(manifest))


json_values = nested(scalars.filter(lambda v: not isinstance(v, float) or math.isfinite(v)))


@fuzz
@given(st.data())
def test_a_forged_state_is_taken_or_told(state, data):
    folder, content, trainer = state
    file = data.draw(st.sampled_from(sorted(content)))
    path = data.draw(st.sampled_from(list(places(content[file]))))
    tagged = st.sampled_from(["$tensor", "$array", "$tuple", "$float", "$items"])
    value = data.draw(json_values | st.dictionaries(tagged, json_values, min_size=1, max_size=1))
    write(folder, copy.deepcopy(content) | {file: changed(content[file], path, value)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what differs from the run that was saved
        told(lambda: newest_intact_state(folder.parent), TrainingStateError)
        error = told(lambda: trainer.load_training_state(folder), Exception)
    if not isinstance(error, TrainingStateError | None):
        # A plugin's own error keeps its type, and says whose it is.
        assert "early_stopping" in "".join(getattr(error, "__notes__", ())), (file, path, value)
    write(folder, copy.deepcopy(content))
    trainer.load_training_state(folder)


@fuzz
@given(st.binary(max_size=300) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_place_of_a_manifest_are_told(state, content):
    folder, good, trainer = state
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(PaCoreError):
        trainer.load_training_state(folder)
    write(folder, copy.deepcopy(good))


arrays = st.sampled_from(
    [np.float32(0.5), np.arange(3), np.bool_(True), np.zeros((2, 0)), torch.ones(2, 2), math.nan]
)
metrics = nested(scalars | arrays | st.complex_numbers() | st.binary(max_size=3))


@fuzz
@given(st.lists(st.tuples(text, metrics, st.booleans()), max_size=5))
def test_a_history_comes_back_as_it_was_or_says_what_it_cannot_keep(records):
    history, again = InMemoryRunHistory(), InMemoryRunHistory()
    for name, value, ends_epoch in records:
        history.update_metric(name, value)
        if ends_epoch:
            history._increment_epoch()
    tensors: dict[str, torch.Tensor] = {}
    error = told(lambda: encode(history.state_dict(), {}, "run_history"), TrainingStateError)
    if error is not None:
        assert "run_history.records" in str(error)
        return
    saved = json.loads(json_bytes(encode(history.state_dict(), tensors, "run_history")))
    again.load_state_dict(decode(saved, tensors))
    assert repr(again.records) == repr(history.records)  # NaN is NaN here
    assert again.current_epoch == history.current_epoch
    assert list(again.get_metric_names()) == list(history.get_metric_names())
