"""CSV and JSON lines files: their content, also after a crash."""

import json
import math
import resource
import signal
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from pa_tracking import file_services
from pa_tracking.file_services import CsvFile, JsonLinesFile
from pa_tracking.service import Place, Run
from pa_tracking.settings import TrackingSettings
from tests.plugins.tracking.runs import description, rows, table

KINDS = {"csv": CsvFile, "jsonl": JsonLinesFile}
both = pytest.mark.parametrize("kind", KINDS)


def place(update, epoch=1):
    return Place(epoch=epoch, update=update, samples=8 * update, seconds=0.5)


def opened(folder, kind, num_rows=None, config=None):
    run = Run(kind, "pa-core", "run", "run", num_rows)
    service = KINDS[kind](TrackingSettings(service=kind, logging_dir=folder), run)
    service.start(config)
    return service


def die(service):
    """Close the file as the system does when a process dies, which then holds no lock."""
    service._out.close()
    service._unlock()


def read(folder, kind):
    return table(folder) if kind == "csv" else rows(folder)


@both
def test_each_row_is_written_immediately(kind, tmp_path):
    service = opened(tmp_path, kind, config={})
    for update in (1, 2):
        service.log({"loss": 0.5}, place(update))
        assert [row["update"] for row in read(tmp_path, kind)] == list(range(1, update + 1))
    service.finish("finished")
    assert read(tmp_path, kind)[1] == {
        "epoch": 1,
        "update": 2,
        "samples": 16,
        "seconds": 0.5,
        "loss": 0.5,
    }


@contextmanager
def files_of_at_most(size):
    """Files can't get longer, as with a quota: a write takes what still fits."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@both
def test_a_row_that_does_not_fit_leaves_no_part(kind, tmp_path):
    service = opened(tmp_path, kind, config={})
    service.log({"loss": 0.5}, place(1))
    before = service.file.read_bytes()
    with files_of_at_most(len(before) + 5):
        with pytest.raises(OSError, match="too large"):
            service.log({"loss": 0.5}, place(2))
        assert service.file.read_bytes() == before
    service.log({"loss": 0.5}, place(2))
    assert [row["update"] for row in read(tmp_path, kind)] == [1, 2]
    assert service.run.rows == 2
    die(service)


@both
def test_a_part_of_a_row_that_could_not_be_removed_goes_before_the_next(
    kind, tmp_path, monkeypatch
):
    service = opened(tmp_path, kind, config={})
    service.log({"loss": 0.5}, place(1))
    before = service.file.read_bytes()
    with files_of_at_most(len(before) + 5), monkeypatch.context() as patch, suppress(OSError):
        real, calls = file_services.os.truncate, []

        def truncate(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise OSError("the disk is gone")
            real(*arguments)

        patch.setattr(file_services.os, "truncate", truncate)
        service.log({"loss": 0.5}, place(2))
    assert len(calls) == 2
    assert service.file.stat().st_size == len(before) + 5
    service.log({"loss": 0.5}, place(2))
    assert [row["update"] for row in read(tmp_path, kind)] == [1, 2]
    die(service)


def test_a_column_that_does_not_fit_is_added_later(tmp_path):
    service = opened(tmp_path, "csv", config={})
    service.log({"loss": 0.5}, place(1))
    before = service.file.read_bytes()
    with files_of_at_most(len(before) + 5), pytest.raises(OSError, match="too large"):
        service.log({"loss": 0.5, "accuracy": 0.9}, place(2))
    assert service.file.read_bytes() == before
    service.log({"loss": 0.5, "accuracy": 0.9}, place(2))
    service.log({"loss": 0.25}, place(3))
    assert [row.get("accuracy") for row in table(tmp_path)] == [None, 0.9, None]
    assert [row["loss"] for row in table(tmp_path)] == [0.5, 0.5, 0.25]
    die(service)


def test_an_image_that_does_not_fit_leaves_no_file(tmp_path):
    service = opened(tmp_path, "jsonl", config={})
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with files_of_at_most(1000), pytest.raises(OSError, match="too large"):
        service.log_images("samples", [image], 1)
    assert list((service.folder / "images").iterdir()) == []
    service.log_images("samples", [image], 1)
    assert [file.name for file in (service.folder / "images").iterdir()] == ["samples-000001.png"]
    die(service)


@both
def test_an_incomplete_row_is_dropped_on_resume(kind, tmp_path):
    service = opened(tmp_path, kind, config={})
    for update in (1, 2, 3):
        service.log({"loss": float(update)}, place(update))
    die(service)
    text = service.file.read_bytes()
    service.file.write_bytes(text[:-4])  # the process died in the middle of the third row
    service = opened(tmp_path, kind, num_rows=3)
    assert service.run.rows == 2
    service.log({"loss": 4.0}, place(4))
    service.finish("finished")
    assert [row["loss"] for row in read(tmp_path, kind)] == [1.0, 2.0, 4.0]


@both
@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_rows_after_the_training_state_are_dropped(kind, num_rows, tmp_path):
    service = opened(tmp_path, kind, config={})
    for update in (1, 2, 3):
        service.log({"loss": float(update)}, place(update))
    die(service)
    service = opened(tmp_path, kind, num_rows=num_rows)
    service.log({"loss": 9.0}, place(9))
    service.finish("finished")
    assert [row["loss"] for row in read(tmp_path, kind)] == [*range(1, num_rows + 1), 9.0]


def test_a_new_column_is_empty_in_earlier_rows(tmp_path):
    service = opened(tmp_path, "csv", config={})
    service.log({"train": 1.0}, place(1))
    service.log({"eval": 2.0, "note, with comma": "two\nlines"}, place(2))
    die(service)
    service = opened(tmp_path, "csv", num_rows=2)  # the header is read again
    service.log({"train": 3.0, "new": [1, 2]}, place(3))
    service.finish("finished")
    lines = service.file.read_text().splitlines()
    assert lines == [
        'epoch,update,samples,seconds,train,eval,"note, with comma",new',
        "1,1,8,0.5,1.0,,,",
        "1,2,16,0.5,,2.0,two lines,",
        '1,3,24,0.5,3.0,,,"[1, 2]"',
    ]


@both
def test_nan_and_infinity_stay_readable(kind, tmp_path):
    service = opened(tmp_path, kind, config={})
    service.log({"loss": math.nan, "peak": math.inf}, place(1))
    service.finish("finished")
    (row,) = read(tmp_path, kind)
    assert math.isnan(float(row["loss"]))
    assert float(row["peak"]) == math.inf


@both
def test_a_metric_with_the_name_of_a_column_keeps_its_value(kind, tmp_path):
    service = opened(tmp_path, kind, config={})
    service.log({"epoch": 7.0}, place(1))
    service.finish("finished")
    (row,) = read(tmp_path, kind)
    assert (row["epoch"], row["epoch_"]) == (1, 7.0)


@both
def test_runs_with_the_same_name_have_their_own_folders(kind, tmp_path):
    names = []
    for _ in range(3):
        service = opened(tmp_path, kind, config={})
        service.finish("finished")
        names.append(service.run.name)
    assert names == ["run", "run-2", "run-3"]


@both
def test_a_resumed_run_whose_folder_is_gone_starts_a_new_file(kind, tmp_path):
    service = opened(tmp_path, kind, num_rows=5)
    service.log({"loss": 1.0}, place(6))
    service.finish("failed")
    assert len(read(tmp_path, kind)) == 1
    assert description(tmp_path)["status"] == "failed"


def test_the_description_has_the_status_of_the_run(tmp_path):
    service = opened(tmp_path, "jsonl", config={"seed": 1, "odd": {"path": tmp_path}})
    assert description(tmp_path)["status"] == "running"
    service.finish("killed")
    found = description(tmp_path)
    assert found["status"] == "killed"
    assert found["config"] == {"seed": 1, "odd": {"path": str(tmp_path)}}
    assert json.dumps(found)
