"""Log runs to CSV and JSON lines files, one row per logged update.

Each row is appended without a buffer, so that a process that dies loses at most the row in
progress. If the disk takes only a part of a row, that part is removed again, and the row is written
later. Resuming a run drops an incomplete row, and the rows that were written after the training
state it resumes from.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import uuid
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pa_core.plugin import RunLock, save_file
from pa_tracking.conversion import hyperparameters, numbers_in
from pa_tracking.service import Place, Service, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLACE = ("epoch", "update", "samples", "seconds")


class FileService(Service):
    """A folder per run, ``LOGGING_DIR/PROJECT/RUN_NAME``, with `file_name` and ``run.json``."""

    can_rewind = True
    file_name: ClassVar[str]
    num_header_lines: ClassVar[int] = 0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.settings.logging_dir / self.run.project / self.run.name

    @property
    def file(self) -> Path:
        """The file with the rows."""
        return self.folder / self.file_name

    def start(self, config: Mapping[str, Any] | None) -> None:
        self._lock: RunLock | None = None
        try:
            if config is not None:
                self._begin(config)
            else:
                self._resume()
        except BaseException:
            self._unlock()
            raise
        self._write_description("running")
        self._open()
        self._read_header()

    def log(
        self, values: Mapping[str, Any], place: Place, tags: Mapping[str, str] | None = None
    ) -> None:
        # A metric with the name of a column of the place gets an underscore.
        metrics = {f"{name}_" if name in PLACE else name: v for name, v in values.items()}
        self._write({**asdict(place), **metrics})
        self.run.rows = (self.run.rows or 0) + 1
        self._description.setdefault("metrics", {}).update(numbers_in(values))

    def log_images(self, name: str, images: Sequence[NDArray[Any]], update: int) -> None:
        from PIL import Image

        folder = self.folder / "images"
        stem = re.sub(r"[^\w.-]", "_", name)
        for number, image in enumerate(images):
            which = f"-{number}" if len(images) > 1 else ""
            save = partial(Image.fromarray(image).save, format="PNG")
            save_file(folder / f"{stem}-{update:06d}{which}.png", save)

    def finish(self, status: Status) -> None:
        try:
            self._out.close()
            self._write_description(status)
        finally:
            self._unlock()

    @abstractmethod
    def _write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""

    def _open(self) -> None:
        self._out = self.file.open("ab", buffering=0)
        self._size = self._out.seek(0, os.SEEK_END)  # of the complete rows

    def _append(self, row: bytes) -> None:
        """Append a whole row, or nothing.

        Raises:
            OSError: if the disk doesn't take it, as one that is full.
        """
        os.truncate(self._out.fileno(), self._size)  # a part of a row that could not be removed
        rest = memoryview(row)
        try:
            while rest:
                rest = rest[self._out.write(rest) :]
        except OSError:
            with suppress(OSError):
                os.truncate(self._out.fileno(), self._size)
            raise
        self._size += len(row)

    def _read_header(self) -> None:
        """Read what the file begins with, if the format has a header."""

    def _begin(self, config: Mapping[str, Any]) -> None:
        """Create the run's folder, or begin anew in that of the same run if it was killed.

        A number is appended to a name that another run has.
        """
        name, number = self.run.name, 1
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.run.id = self.run.name
            self._description = {
                **asdict(self.run),
                "tags": self.settings.tags,
                "hyperparameters": hyperparameters(config),
                "config": config,
            }
            self._description.pop("rows")
            if self._create_folder() or self._is_same_run():
                break
            number += 1
            self.run.name = f"{name}-{number}"
        self._take_lock()
        self.run.rows = _truncate(self.file, self.num_header_lines, 0)

    def _create_folder(self) -> bool:
        """Create the folder together with the run's description; False if it exists."""
        new = self.folder.parent / f".new-{uuid.uuid4().hex}"
        new.mkdir()
        try:
            self._write_description("running", new)
            os.rename(new, self.folder)
        except OSError:
            shutil.rmtree(new, ignore_errors=True)
            if not self.folder.exists():
                raise
            return False
        return True

    def _is_same_run(self) -> bool:
        return self.run.run_id is not None and self._known_id() == self.run.run_id

    def _is_other_run(self) -> bool:
        """Whether the folder is that of another run, as where a state was copied."""
        return None not in (self.run.run_id, self._known_id()) and not self._is_same_run()

    def _known_id(self) -> str | None:
        """The identity of the run whose folder it is; None if there is none, or no such run."""
        try:
            known = json.loads((self.folder / "run.json").read_text()).get("run_id")
        except (OSError, ValueError, AttributeError):
            return None
        return known if isinstance(known, str) else None

    def _take_lock(self) -> None:
        """Keep out another live run that has resumed from a state of this one."""
        lock = RunLock(self.folder, is_folder=True)
        lock.acquire(print)
        self._lock = lock

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _resume(self) -> None:
        if self._is_other_run():
            folder = self.folder
            self._begin({})
            warnings.warn(
                f"{folder} holds another run, so the resumed one continues in {self.folder.name}, "
                "without its earlier rows",
                stacklevel=2,
            )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        description = self.folder / "run.json"
        if description.exists():
            self._description = json.loads(description.read_text())
        else:  # the training state was moved to another machine
            self._description = asdict(self.run)
        self.run.rows = _truncate(self.file, self.num_header_lines, self.run.rows)

    def _write_description(self, status: str, folder: Path | None = None) -> None:
        self._description["status"] = status
        text = json.dumps(_strict(self._description), indent=1, default=str)
        save_file(
            (folder or self.folder) / "run.json",
            lambda path: path.write_text(text, encoding="utf-8"),
        )


class JsonLinesFile(FileService):
    """A line of JSON per row; NaN and infinity are written as ``"nan"`` and ``"inf"``."""

    file_name = "metrics.jsonl"

    def _write(self, row: Mapping[str, Any]) -> None:
        self._append(json.dumps(_strict(row), allow_nan=False).encode() + b"\n")


class CsvFile(FileService):
    """A table with a column per metric; a new metric adds a column to all rows."""

    file_name = "metrics.csv"
    num_header_lines = 1

    def _read_header(self) -> None:
        self._columns: list[str] = next(_rows(self.file), [])

    def _write(self, row: Mapping[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            self._add_columns(new)
        self._append(_line([_cell(row.get(name)) for name in self._columns]))

    def _add_columns(self, new: list[str]) -> None:
        """Rewrite the file with a longer header, atomically."""
        rows = [row for number, row in enumerate(_rows(self.file)) if number]
        columns = [*self._columns, *new]
        padded = (row + [""] * (len(columns) - len(row)) for row in rows)
        content = b"".join(map(_line, [columns, *padded]))
        self._out.close()
        try:
            save_file(self.file, lambda path: path.write_bytes(content))
            self._columns = columns
        finally:
            self._open()


def _truncate(file: Path, num_header_lines: int, num_rows: int | None) -> int:
    """Truncate a file to its complete lines and at most `num_rows` rows; return their number."""
    if not file.exists():
        return 0
    *lines, _incomplete = file.read_bytes().split(b"\n")
    if num_rows is not None:
        lines = lines[: num_header_lines + num_rows] if num_rows else []
    os.truncate(file, sum(len(line) + 1 for line in lines))
    return max(0, len(lines) - num_header_lines)


def _rows(file: Path) -> Iterator[list[str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        yield from csv.reader(lines)


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("\n", " ")  # each row is one line
    return str(value) if isinstance(value, int | float) else json.dumps(_strict(value))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
