"""The comparison with other frameworks shows what was recorded, and so does the README's table."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.side_by_side.frameworks import FRAMEWORKS, count_lines
from benchmarks.side_by_side.page import PAGE, render_page

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
RECORDED = json.loads((ROOT / "benchmarks" / "side_by_side" / "results.json").read_text())


def test_the_page_shows_what_was_recorded():
    assert PAGE.read_text() == render_page(RECORDED), "run: nox -s looks -- --only"
    assert list(RECORDED) == [framework.key for framework in FRAMEWORKS]
    assert all(
        one["script_lines"] == count_lines(FRAMEWORKS[i]) for i, one in enumerate(RECORDED.values())
    )


def test_each_picture_exists_is_small_and_shows_no_path_of_this_machine():
    names = [f"side_by_side/{one.key}.{kind}" for one in FRAMEWORKS for kind in ("svg", "png")]
    sizes = {name: (IMAGES / name).stat().st_size for name in names}
    assert sorted(names) == sorted(
        f"side_by_side/{path.name}" for path in (IMAGES / "side_by_side").iterdir()
    )
    assert sum(sizes.values()) < 1_000_000
    assert (IMAGES / "report.png").stat().st_size < 200_000
    for svg in IMAGES.rglob("*.svg"):
        text = svg.read_text()
        assert not re.search(r"/(tmp|root|work)/|url\(http|site-packages", text), svg.name


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of the README's comparison by their first cell."""
    table = text[text.index("## Compared") :].split("\n\n")[1]
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    return {first: cells for first, *cells in rows}


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("lines of code of the same script", "script_lines"),
        ("rows on the screen per epoch", "rows_per_epoch"),
        ("epochs of five that can be read afterwards", "epochs_on_screen"),
        ("bytes in a log file", "log_bytes"),
        ("carriage returns in it", "log_returns"),
    ],
)
def test_the_readme_shows_the_counts(label, name):
    rows = rows_of((ROOT / "README.md").read_text())
    systems = ["pa_core", "pytorch_accelerated", "transformers", "lightning", "ignite"]
    assert rows[label] == [f"{RECORDED[system][name]:,g}" for system in systems]


def test_the_readme_shows_the_times_of_the_benchmarks():
    """Each is in the table of RESULTS.md with this title."""
    rows = rows_of((ROOT / "README.md").read_text())
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    systems = ["pa-core", "pytorch-accelerated", "hf", "lightning", "ignite"]
    for label, title, start, column in [
        ("time per step, tensors in memory", "In-memory tensors", "", 4),
        ("time per step, map dataset", "A plain map dataset", "", 4),
        ("set-up in ms, tensors in memory", "In-memory tensors", "", 8),
        ("time per step, two processes", "Two processes", "training, two processes", 2),
    ]:
        section = results.split(f"## {title}")[1].split("\n## ")[0]
        for system, shown in zip(systems, rows[label], strict=True):
            line = re.search(rf"^\|( {start} \|)? {system} \|.*$", section, re.MULTILINE)
            cells = [cell.strip() for cell in line[0].strip("|").split("|")] if line else ["–"] * 9
            value = cells[column + bool(start)].split(" ")[0]
            assert shown == value, (label, system)
