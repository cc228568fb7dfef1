"""Read runs from reports and training states."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from pa_core.errors import TrainingStateError
from pa_core.plugin import (
    MANIFEST,
    StateReader,
    local_path,
    mask_secrets,
    newest_intact_state,
    state_folders,
)
from pa_report.history import curves_and_matrices
from pa_report.run import DATA_ID, ReportError, Run


def read_run(path: str | Path) -> Run:
    """Read a run from a report, a training state, or the newest training state in a folder.

    Raises:
        ReportError: if the path is none of these.
    """
    path = local_path(path)
    if path.is_dir():
        return _read_state(path)
    data = _data_in(path)
    if not data:
        raise ReportError(
            f"{path} is not the report of a run. Pass files written by the plugin 'report', "
            "training states, or folders of training states"
        )
    try:
        return replace(Run.from_json(data), name=path.stem)
    except ValueError as error:
        raise ReportError(f"Can't read the data in {path}: {error}") from error


def reports_in(path: Path) -> list[Path]:
    """The reports in a folder of reports; of another path, the path itself.

    Other pages in the folder, such as comparisons, are left out.

    Raises:
        ReportError: if a page in the folder can't be read.
    """
    if not path.is_dir() or (path / MANIFEST).exists() or state_folders(path):
        return [path]
    return [file for file in sorted(path.glob("*.html")) if _data_in(file)] or [path]


def _data_in(file: Path) -> str:
    """The embedded data of a report; empty if the file is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"There is no report or training state at {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"Can't read {file} as a report: {error}") from error
    finder = _DataFinder()
    finder.feed(text)
    return "".join(finder.data)


class _DataFinder(HTMLParser):
    """Collects the embedded data of a report."""

    def __init__(self) -> None:
        super().__init__()
        self.data: list[str] = []
        self._is_inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._is_inside = tag == "script" and ("id", DATA_ID) in attrs

    def handle_endtag(self, tag: str) -> None:
        self._is_inside = False

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            self.data.append(data)


def _read_state(folder: Path) -> Run:
    from pa_core.plugin import decode

    state: Path | None = folder
    try:
        if not (folder / MANIFEST).exists() and folder not in state_folders(folder.parent):
            state = newest_intact_state(folder)
        if state is None:
            raise ReportError(f"{folder} contains no report and no training state")
        reader = StateReader(state)
        content = reader.read_json("state.json")
        history = decode(content["run_history"], reader.read_tensors("state.safetensors"))
        metrics, matrices = curves_and_matrices(history["records"])
        position = content["position"]
        progress = {
            "epochs": position["epoch"] - position["first_epoch"],
            **{key: position[key] for key in ("updates", "samples", "seconds")},
        }
    except TrainingStateError as error:
        raise ReportError(str(error)) from error
    except (LookupError, TypeError, ValueError) as error:
        raise ReportError(
            f"{state} has no run history with records, as the trainer's default history keeps them"
        ) from error
    keys = ("plugins", "packages", "seed", "git", "hardware", "run")
    manifest = {key: reader.manifest[key] for key in keys if key in reader.manifest}
    return Run(
        name=folder.name if state == folder else f"{folder.name}/{state.name}",
        status="saved",
        progress=progress,
        metrics=metrics,
        matrices=matrices,
        manifest=mask_secrets(manifest),
    )
