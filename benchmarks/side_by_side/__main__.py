"""The same job in seven frameworks: what each shows in a terminal, in a log file and in a notebook.

    python -m benchmarks.side_by_side                 # measures all, and writes the page
    python -m benchmarks.side_by_side --only pa_core  # the others stay as recorded
    python -m benchmarks.side_by_side --only          # only writes the page again

The job is in the folder `scripts`: a small network, scikit-learn's digits, five epochs, and the
accuracy on held-out images. Each script is what a user of the framework would write, with its
defaults. The counts go to `results.json`, the pictures to `docs/images/side_by_side`, and the page
to `docs/understand/side_by_side.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.side_by_side.frameworks import FRAMEWORKS, SCRIPTS, Framework, count_lines
from benchmarks.side_by_side.page import PAGE, render_page

HERE = Path(__file__).parent
IMAGES = HERE.parent.parent / "docs" / "images" / "side_by_side"
RESULTS = HERE / "results.json"
EPOCHS, SHORT = 5, 2
CHECK = """\
import torch

with torch.no_grad():
    right = network(test_set.tensors[0]).argmax(-1) == test_set.tensors[1]
print(right.float().mean().item())
"""


@dataclass
class Result:
    """What was counted for one framework.

    Attributes:
        version: of its distribution.
        accuracy: on the held-out images after training in the notebook.
        script_lines: lines of code in its script.
        rows: rows on the screen after the run.
        rows_per_epoch: rows that each further epoch adds to the screen.
        epochs_on_screen: epochs whose accuracy can be read on the screen after the run.
        log_bytes: size of the file with the output of the same run without a terminal.
        log_returns: carriage returns in that file.
        epochs_in_log: epochs whose accuracy can be read in that file.
        notebook_pixels: height of the output in the notebook.
    """

    version: str
    accuracy: float
    script_lines: int
    rows: int
    rows_per_epoch: float
    epochs_on_screen: int
    log_bytes: int
    log_returns: int
    epochs_in_log: int
    notebook_pixels: int


def measure(framework: Framework) -> Result:
    """Run the script of a framework in terminals, into a file and in a notebook."""
    from benchmarks.side_by_side.notebook import execute, take_picture
    from benchmarks.side_by_side.terminal import draw, record

    release = version(framework.distribution)
    with tempfile.TemporaryDirectory() as temporary:
        names = {str(Path(temporary).resolve()): "/home/me", sys.prefix: "/home/me/.venv"}
        command = [sys.executable, "train.py"]
        environment = _environment()

        folder = _copy(framework, Path(temporary) / "short", epochs=SHORT)
        short = record(command, folder, environment, names=names)
        folder = _copy(framework, Path(temporary) / "terminal", epochs=EPOCHS)
        run = record(command, folder, environment, names=names)
        if short.code or run.code:
            raise SystemExit("\n".join(row.plain for row in run.screen()))
        screen = run.screen()
        draw(screen, f"{framework.name} {release}", IMAGES / f"{framework.key}.svg")

        folder = _copy(framework, Path(temporary) / "file", epochs=EPOCHS)
        log = subprocess.run(
            command, cwd=folder, env=environment, stdout=-1, stderr=-2, check=True
        ).stdout

        folder = _copy(framework, Path(temporary) / "notebook", epochs=EPOCHS)
        os.environ.update(environment)  # of the kernel
        executed = execute([(folder / "train.py").read_text(), CHECK], folder)
        pixels = take_picture(executed, IMAGES / f"{framework.key}.png")
    return Result(
        version=release,
        accuracy=round(float(executed.text(1)), 3),
        script_lines=count_lines(framework),
        rows=len(screen),
        rows_per_epoch=(len(screen) - len(short.screen())) / (EPOCHS - SHORT),
        epochs_on_screen=_epochs(framework, "\n".join(row.plain for row in screen)),
        log_bytes=len(log),
        log_returns=log.count(b"\r"),
        epochs_in_log=_epochs(framework, log.decode().replace("\r", "\n")),
        notebook_pixels=pixels,
    )


def _environment() -> dict[str, str]:
    """The environment of every run: no warnings of libraries about each other, and one thread."""
    changes = {"KERAS_BACKEND": "torch", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changes}


def _copy(framework: Framework, folder: Path, epochs: int) -> Path:
    """A folder with the script of a framework and the data of all."""
    folder.mkdir()
    data = (SCRIPTS / "digits.py").read_text()
    (folder / "digits.py").write_text(data.replace(f"EPOCHS = {EPOCHS}\n", f"EPOCHS = {epochs}\n"))
    (folder / "train.py").write_text((SCRIPTS / f"{framework.key}.py").read_text())
    return folder


def _epochs(framework: Framework, output: str) -> int:
    """How many epochs have their accuracy in an output."""
    return len(set(re.findall(framework.accuracy, output, re.MULTILINE)))


def main() -> None:
    """Measure, record and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    keys = [framework.key for framework in FRAMEWORKS]
    parser.add_argument("--only", nargs="*", choices=keys, default=keys, metavar="NAME")
    chosen = parser.parse_args().only
    IMAGES.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for framework in FRAMEWORKS:
        if framework.key in chosen:
            print(f"{framework.name} …", flush=True)
            results[framework.key] = asdict(measure(framework))
            ordered = {key: results[key] for key in keys if key in results}
            RESULTS.write_text(json.dumps(ordered, indent=2) + "\n")
    PAGE.write_text(render_page(results))


if __name__ == "__main__":
    main()
