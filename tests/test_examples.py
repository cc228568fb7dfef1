"""The examples do what they say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DIGITS = Path(__file__).parent.parent / "examples" / "digits"


def held_out_accuracy(output: str) -> float:
    found = re.fullmatch(
        r"Accuracy on 360 held-out digits: (0\.\d{4}|1\.0000)", output.strip().splitlines()[-1]
    )
    assert found is not None, output
    return float(found[1])


@pytest.mark.slow
def test_the_main_job_reads_more_than_95_percent_of_the_digits(tmp_path):
    # as a user starts it, from another folder
    result = subprocess.run(
        [sys.executable, str(DIGITS / "train.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert held_out_accuracy(result.stdout) > 0.95
    for metric in ("accuracy", "precision", "recall"):
        assert metric in result.stdout
    assert "%|" in result.stderr  # the progress bars
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["metrics_by_subclass.py", "metrics_by_callback.py"])
def test_the_tutorial_styles_measure_the_same_things(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(DIGITS)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    runpy.run_path(str(DIGITS / script), run_name="__main__")
    output = capsys.readouterr().out
    assert held_out_accuracy(output) > 0.93
    for metric in ("precision", "recall"):
        assert metric in output


# -- The other examples: each is started as a user starts it, and says how good it has become -----

EXAMPLES = Path(__file__).parent.parent / "examples"


def lines_of(example: str, folder: Path, *arguments: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / example / "train.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip().splitlines()


def number(pattern: str, line: str) -> float:
    found = re.search(pattern, line)
    assert found is not None, line
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "pattern", "low", "high"),
    [
        ("mnist", r"^Accuracy: ([\d.]+)$", 0.93, 1),
        ("timm_components", r"^Accuracy: ([\d.]+)$", 0.3, 1),
        ("mixup_ema", r"of the average: ([\d.]+)$", 0.9, 1),
        ("progressive_resizing", r"^Epochs: 6, accuracy: ([\d.]+)$", 0.75, 1),
        ("fine_tuning", r"^Accuracy: ([\d.]+)$", 0.85, 1),
        ("bert_classification", r"^Accuracy: ([\d.]+), F1", 0.7, 1),
        ("causal_lm", r"^Perplexity: ([\d.]+) of", 1, 25),  # of about 95 letters
        ("detection", r"overlap: ([\d.]+)$", 0.5, 1),
    ],
)
def test_an_example_learns_what_it_is_to_learn(example, pattern, low, high, tmp_path):
    assert low < number(pattern, lines_of(example, tmp_path)[-1]) <= high


@pytest.mark.slow
def test_fine_tuning_by_hand_does_as_well(tmp_path):
    line = lines_of("fine_tuning", tmp_path, "--by-hand")[-1]
    assert number(r"^Accuracy: ([\d.]+)$", line) > 0.85


@pytest.mark.slow
def test_an_event_of_ones_own_reaches_its_callback(tmp_path):
    (line,) = [line for line in lines_of("custom_event", tmp_path) if line.startswith("Digits")]
    assert sum(map(int, re.findall(r": (\d+)", line))) == 1797
