"""The examples run and learn."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pa_core.settings.build import build_plugins
from pa_core.settings.table import read_settings
from tests.warm import run_warm

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, folder: Path, *arguments: str) -> str:
    """Run an example from another folder, so that it finds its files relative to itself."""
    return run_warm(EXAMPLES / script, *arguments, folder=folder, COLUMNS="500")


def column(heading: str, output: str) -> list[float]:
    """The values below a heading of the table that a run prints, without those of `evaluate`."""
    values: list[float] = []
    cell: slice | None = None
    for line in output.splitlines():
        if line.startswith("epoch "):
            headings = list(re.finditer(r"\S+(?: \S+)*", line))
            starts = [0, *(found.end() + 1 for found in headings)]  # a mark may follow a value
            places = {
                found[0]: slice(start, found.end())
                for start, found in zip(starts, headings, strict=False)
            }
            assert heading in places, output
            cell = places[heading]
        elif cell is not None and re.match(r" *\d+ ", line):
            values.append(float(line[cell]))
        elif not line.startswith("--"):
            cell = None
    assert values, output
    return values


def numbers(pattern: str, output: str) -> list[float]:
    """The numbers in the last line that the pattern matches."""
    found = re.findall(pattern, output, re.MULTILINE)
    assert found, output
    return [float(number) for number in re.findall(r"[\d.]+", found[-1])]


@pytest.mark.slow
def test_the_first_command_of_the_readme_trains_and_shows_its_metrics(tmp_path):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits/train.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert numbers(r"^Accuracy on 360 held-out digits: (.+)$", result.stdout)[0] > 0.95
    for metric in ("accuracy", "precision", "recall"):
        assert metric in result.stdout
    assert "\r" not in result.stdout + result.stderr  # a bar is for terminals
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["metrics_by_subclass.py", "metrics_by_callback.py"])
def test_the_tutorial_styles_record_the_same_metrics(script, tmp_path):
    output = run(f"digits/{script}", tmp_path)
    assert numbers(r"^Accuracy on 360 held-out digits: (.+)$", output)[0] > 0.93
    for metric in ("accuracy", "precision", "recall"):
        values = column(metric, output)
        assert len(values) == 10, metric
        assert values[0] < values[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "arguments", "pattern", "least"),
    [
        ("mnist", [], r"^Accuracy: (.+)$", 0.93),
        ("timm_components", [], r"^Accuracy: (.+)$", 0.93),
        ("fine_tuning", [], r"^Accuracy: (.+)$", 0.9),
        ("fine_tuning", ["--by-hand"], r"^Accuracy: (.+)$", 0.9),
        ("progressive_resizing", [], r"^Epochs: 6, accuracy: (.+)$", 0.93),
        (
            "bert_classification",
            [],
            r"F1: (.+)$",
            0.75,
        ),  # 0.44 if it always predicts the larger class
        ("detection", [], r"50 % overlap: (.+)$", 0.7),
    ],
)
def test_an_example_learns_its_task(example, arguments, pattern, least, tmp_path):
    output = run(f"{example}/train.py", tmp_path, *arguments)
    assert least < numbers(pattern, output)[-1] <= 1
    losses = column("train loss", output)
    assert losses[-1] < 0.7 * losses[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_averaged_weights_are_evaluated_too(tmp_path):
    output = run("mixup_ema/train.py", tmp_path)
    plain = numbers(r"^accuracy: ([\d.]+ .+)$", output)
    average = numbers(r"^ema_accuracy: ([\d.]+ .+)$", output)
    assert len(plain) == len(average) == 8
    assert plain != average
    assert min(plain[-1], average[-1]) > 0.93


@pytest.mark.slow
def test_the_perplexity_is_far_below_that_of_letter_frequencies(tmp_path):
    output = run("causal_lm/train.py", tmp_path)
    values = numbers(r"^Perplexity with \d+ tokens: (.+)$", output)
    assert values == sorted(values, reverse=True)
    assert len(values) == 3
    assert 1 < values[-1] < 14  # 23 from the frequencies of letters alone


@pytest.mark.slow
def test_a_search_for_settings_prunes_trials_and_finds_better_ones(tmp_path):
    output = run("sweep/train.py", tmp_path)
    ((pruned, trials),) = re.findall(r"^(\d+) of (\d+) trials were pruned$", output, re.MULTILINE)
    assert 0 < int(pruned) < int(trials) == 12
    assert output.count("\npruned\n") == int(pruned)  # the run of each was stopped
    assert numbers(r"^Lowest loss: ([\d.]+),", output)[0] < 0.15  # the first trial has 0.20


@pytest.mark.slow
def test_a_custom_event_reaches_its_callback(tmp_path):
    output = run("custom_event/train.py", tmp_path)
    (line,) = [line for line in output.splitlines() if line.startswith("Digits seen")]
    counts = [int(count) for count in re.findall(r"\d: (\d+)", line)]
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/*.toml")), ids=lambda f: f.parent.name)
def test_settings_files_are_valid(file):
    settings = read_settings(file)
    names = [name for name, _, _ in build_plugins(settings, callbacks=None, plugins=None)]
    assert {"metrics", "schedulers"} & set(names)


def test_the_readme_links_to_each_example():
    page = (EXAMPLES / "README.md").read_text()
    linked = re.findall(r"^\| \[`(\S+\.py)`\]\(\1\) \|", page, re.MULTILINE)
    scripts = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.glob("*/*.py")}
    assert sorted(linked) == sorted(scripts - {"detection/detection_data.py"})
