"""The examples do what they say."""

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
