"""The command ``pa schedule``: preview a learning-rate schedule."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pa_schedulers.settings import SchedulerSettings


def schedule(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="The scheduler; by default those of this folder's settings."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Length of the run in updates.")] = 1000,
    epochs: Annotated[float | None, typer.Option(min=0, help="The same length in epochs.")] = None,
    lr: Annotated[float, typer.Option(help="The peak: the optimizer's learning rate.")] = 1.0,
    warmup: Annotated[
        str | None, typer.Option(help="Length of the warm-up: 50, 0.05, 5%, '1 epoch'.")
    ] = None,
    cooldown: Annotated[str | None, typer.Option(help="Length of the cool-down.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of the scheduler, as NAME=VALUE."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the plot to this PNG file.")] = None,
    names: Annotated[bool, typer.Option("--names", help="List all scheduler names.")] = False,
) -> None:
    """Draw a learning-rate schedule in the terminal.

    Without a name, those of this folder's settings. --png also writes a plot to a file.

    Exit code: 1 if there is no such scheduler, or one of its options is wrong.
    """
    from pa_schedulers.registry import schedule_names

    if names:
        typer.echo("\n".join(schedule_names()))
        return
    try:
        if name is None:
            if warmup is not None or cooldown is not None or option:
                raise ValueError("Options need the name of a scheduler, as in 'pa schedule cosine'")
            schedulers = list(_schedulers_in_settings())
        else:
            options = _parse_options(option or [])
            lengths = {"warmup": warmup, "cooldown": cooldown}
            options |= {
                key: _parse_value(text) for key, text in lengths.items() if text is not None
            }
            schedulers = [(name, name, options)]
        _draw(schedulers, steps, epochs, lr, png)
    except (ValueError, ImportError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None


def _draw(
    schedulers: list[tuple[str, str, dict[str, Any]]],
    steps: int,
    epochs: float | None,
    lr: float,
    png: Path | None,
) -> None:
    from pa_schedulers.extras import import_library
    from pa_schedulers.preview import draw, plot_values, preview_values
    from pa_schedulers.run_length import RunLength
    from pa_schedulers.spec import SchedulerSpec

    axes = None
    if png is not None:
        axes = import_library("matplotlib.figure", "--png").Figure(layout="tight").subplots()
    columns = min(shutil.get_terminal_size().columns, 100) - 12
    for title, name, options in schedulers:
        values = preview_values(SchedulerSpec(name, RunLength(steps, epochs), options), lr)
        low, high, last = min(values), max(values), values[-1]
        typer.echo(f"{title}: {steps} updates, from {values[0]:.4g} to {last:.4g}, ", nl=False)
        typer.echo(f"at least {low:.4g}, at most {high:.4g}")
        typer.echo(_printable(draw(values, width=max(10, columns))))
        if axes is not None:
            plot_values(values, axes, title)
    if axes is not None and png is not None:
        axes.figure.savefig(png)
        typer.echo(f"Written to {png}")


def _schedulers_in_settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Title, name and options of each scheduler in this folder's settings."""
    from pa_core.errors import SettingsError
    from pa_core.plugin import check_table, find_settings_file, read_settings
    from pa_schedulers.settings import SchedulersSettings

    settings = read_settings(find_settings_file(script=Path.cwd()))
    values, problems = check_table(SchedulersSettings, settings.tables.get("schedulers", {}))
    if problems or not isinstance(values, SchedulersSettings):
        raise SettingsError(
            [f"{settings.file}: [tool.pa-core.schedulers] {problem}" for problem in problems]
        )
    tables: dict[str, SchedulerSettings | None] = {
        "learning rate": values,
        "weight decay (relative)": values.weight_decay,
        "momentum (relative)": values.momentum,
    }
    for name, group in values.groups.items():
        tables[f"learning rate of {name}"] = group
        tables[f"weight decay of {name} (relative)"] = group.weight_decay
        tables[f"momentum of {name} (relative)"] = group.momentum
    named = [(title, table) for title, table in tables.items() if table and table.name]
    if not named:
        raise ValueError(
            f"No scheduler in {settings.file or 'the settings of this folder'}: "
            "name one, as in 'pa schedule cosine'"
        )
    for title, table in named:
        yield f"{title}, {table.name}", table.name or "", table.options


def _parse_options(given: list[str]) -> dict[str, Any]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"Write an option as NAME=VALUE, such as gamma=0.5, not {text!r}")
        options[key.strip()] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    """Parse a TOML value; anything else is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _printable(drawing: str) -> str:
    """Replace block characters by ASCII if the terminal's encoding lacks them."""
    try:
        drawing.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return drawing.translate(str.maketrans("▁▂▃▄▅▆▇█┤│└─…", "....:::#||+-~"))
    return drawing
