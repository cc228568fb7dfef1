"""The page of the documentation that shows the frameworks side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.frameworks import FRAMEWORKS

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "understand" / "side_by_side.md"
SCRIPTS = "../../benchmarks/side_by_side/scripts"
ROWS = {
    "version": "version",
    "lines of code in the script": "script_lines",
    "**terminal**: rows on the screen per epoch": "rows_per_epoch",
    "… rows after the run": "rows",
    "… epochs that can still be read": "epochs_on_screen",
    "**log file**: bytes": "log_bytes",
    "… carriage returns": "log_returns",
    "… epochs that can be read": "epochs_in_log",
    "**notebook**: height of the output, in pixels": "notebook_pixels",
    "accuracy on the held-out images": "accuracy",
}
TEXT = """\
<!-- Written by benchmarks/side_by_side: nox -s looks -->

# Side by side with Keras, fastai, Lightning and Hugging Face

The same job in seven frameworks: a network with one hidden layer learns scikit-learn's digits in
five epochs, and each epoch ends with the loss and the accuracy on held-out images. This page shows
what you see: in a terminal of 120 columns, in a log file, and in a notebook. `nox -s looks` repeats
the runs and writes this page.

{table}

- **Rows per epoch** are those that each further epoch adds to the screen. Lightning adds none,
  because each epoch replaces the one before.
- **Epochs that can be read** are those whose accuracy is still there after the run.
- **The log file** is what the same run writes if its output goes to a file. A carriage return moves
  the cursor of a terminal back; in a file, each is one more state of a progress bar.
- **The notebook** is shown as its exported page.

Each script is what a user of the framework would write, with the framework's defaults: {scripts}.
They differ in more than their output: fastai drops the last, smaller batch of an epoch, and
Hugging Face's Trainer lowers the learning rate. Keras runs on PyTorch here. Hugging Face's Trainer
is asked to report and to evaluate after each epoch, because by default it would do neither in a run
this short. Lightning's bar shows what is logged with `prog_bar=True`, and Ignite prints what its
script prints. Python's warnings are turned off in all runs.

## In a terminal

{terminals}

## In a notebook

{notebooks}
"""


def render_page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page for recorded results, by the keys of the frameworks."""
    table = [
        f"| | {' | '.join(framework.name for framework in FRAMEWORKS)} |",
        f"| --- |{' ---: |' * len(FRAMEWORKS)}",
    ]
    for label, name in ROWS.items():
        cells = [_cell(results[framework.key][name]) for framework in FRAMEWORKS]
        table.append(f"| {label} | {' | '.join(cells)} |")
    links = [f"[{framework.name}]({SCRIPTS}/{framework.key}.py)" for framework in FRAMEWORKS]
    return TEXT.format(
        table="\n".join(table),
        scripts=", ".join(links),
        terminals=_pictures(results, "svg", "terminal"),
        notebooks=_pictures(results, "png", "notebook"),
    )


def _cell(value: object) -> str:
    return f"{value:,g}" if isinstance(value, int | float) else str(value)


def _pictures(results: Mapping[str, Mapping[str, Any]], kind: str, place: str) -> str:
    folder = "../images/side_by_side"
    return "\n\n".join(
        f"**{framework.name}** {results[framework.key]['version']}\n\n"
        f"![What {framework.name} shows in a {place}]({folder}/{framework.key}.{kind})"
        for framework in FRAMEWORKS
    )
