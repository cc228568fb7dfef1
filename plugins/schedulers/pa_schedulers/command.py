"""The command ``pa schedule``: draw a schedule before anyone trains."""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pa_core.errors import SettingsError
from pa_core.settings.table import find_settings_file, read_settings
from pa_core.settings.validation import check_table

if TYPE_CHECKING:
    from pa_schedulers.settings import ScheduleSettings


def schedule(
    name: Annotated[
        str | None,
        typer.Argument(help="The schedule; by default what this folder's settings say."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Length of the run in updates.")] = 1000,
    epochs: Annotated[float | None, typer.Option(min=0, help="The same length in epochs.")] = None,
    lr: Annotated[float, typer.Option(help="The peak, which the optimizer is given.")] = 1.0,
    warmup: Annotated[
        str | None, typer.Option(help="Length of the warm-up: 50, 0.05, 5%, '1 epoch'.")
    ] = None,
    cooldown: Annotated[str | None, typer.Option(help="Length of the cool-down.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", help="An option of the schedule, as NAME=VALUE."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture, too.")] = None,
    names: Annotated[bool, typer.Option("--names", help="List the names of schedules.")] = False,
) -> None:
    """Draw a schedule in the terminal, and as a picture, before anyone trains."""
    from pa_schedulers.catalogue import schedule_names

    if names:
        typer.echo("\n".join(schedule_names()))
        return
    try:
        if name is None:
            if warmup is not None or cooldown is not None or option:
                raise ValueError("Options are those of a schedule: name one")
            parts = list(_of_settings())
        else:
            options = _options(option or [])
            lengths = {"warmup": warmup, "cooldown": cooldown}
            options |= {key: _value(text) for key, text in lengths.items() if text is not None}
            parts = [(name, name, options)]
        _draw(parts, steps, epochs, lr, png)
    except (ValueError, ImportError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from None


def _draw(
    parts: list[tuple[str, str, dict[str, Any]]],
    steps: int,
    epochs: float | None,
    lr: float,
    png: Path | None,
) -> None:
    from pa_schedulers.lengths import RunLength
    from pa_schedulers.options import Request, import_library
    from pa_schedulers.preview import draw, plot_values, values_of

    axes = None
    if png is not None:
        axes = import_library("matplotlib.figure", "A picture").Figure(layout="tight").subplots()
    columns = min(shutil.get_terminal_size().columns, 100) - 12
    for title, name, options in parts:
        values = values_of(Request(name, RunLength(steps, epochs), options), lr)
        low, high, last = min(values), max(values), values[-1]
        typer.echo(f"{title}: {steps} updates, from {values[0]:.4g} to {last:.4g}, ", nl=False)
        typer.echo(f"at least {low:.4g}, at most {high:.4g}")
        typer.echo(_printable(draw(values, width=max(10, columns))))
        if axes is not None:
            plot_values(values, axes, title)
    if axes is not None and png is not None:
        axes.figure.savefig(png)
        typer.echo(f"Written to {png}")


def _of_settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Title, name and options of each schedule of this folder's settings."""
    from pa_schedulers.settings import SchedulersSettings

    settings = read_settings(find_settings_file(script=Path.cwd()))
    values, problems = check_table(SchedulersSettings, settings.tables.get("schedulers", {}))
    if problems or not isinstance(values, SchedulersSettings):
        raise SettingsError(
            [f"{settings.file}: [tool.pa-core.schedulers] {problem}" for problem in problems]
        )
    tables: dict[str, ScheduleSettings | None] = {
        "learning rate": values,
        "weight decay (as a share)": values.weight_decay,
        "momentum (as a share)": values.momentum,
    }
    for group, own in values.groups.items():
        tables[f"learning rate of {group}"] = own
        tables[f"weight decay of {group} (as a share)"] = own.weight_decay
        tables[f"momentum of {group} (as a share)"] = own.momentum
    named = [(title, table) for title, table in tables.items() if table and table.name]
    if not named:
        raise ValueError(
            f"No schedule is named {f'in {settings.file}' if settings.file else 'in settings'} "
            "here: name one, as in 'pa schedule cosine'"
        )
    for title, table in named:
        yield f"{title}, {table.name}", table.name or "", table.options


def _options(given: list[str]) -> dict[str, Any]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"An option is given as NAME=VALUE, such as gamma=0.5, not {text!r}")
        options[key.strip()] = _value(value)
    return options


def _value(text: str) -> Any:
    """A value as TOML has it; what is none is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _printable(drawing: str) -> str:
    """The drawing in the characters that the terminal has."""
    try:
        drawing.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        plain = str.maketrans("▁▂▃▄▅▆▇█┤│└─…", "....:::#||+-~")
        return drawing.translate(plain)
    return drawing
