"""``pa new-plugin``: create a package for a plugin from a template."""

from __future__ import annotations

import datetime
import importlib.util
import json
import keyword
import re
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

from pa_core import __version__, hookspecs
from pa_core.cli.console import console
from pa_core.errors import PaCoreError, nearest
from pa_core.plugins.discovery import find_claims
from pa_core.plugins.implementations import specifications
from pa_core.plugins.requirements import distribution_version
from pa_core.settings.paths import short_path

_NAME = re.compile(r"[a-z]([a-z0-9]|[-_.](?=[a-z0-9]))*")  # as PyPI normalises names
_MAX_LENGTH = 32  # a longer name would make lines of the template too long
_FIRST, _LAST = "on_train_epoch_start", "on_training_run_end"
_NOT_ALWAYS_CALLED = ("on_optimizer_step_skipped", "on_watched_metric")

FILES: Mapping[str, str] = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "CHANGELOG.md.txt": "CHANGELOG.md",
    "LICENSE.txt": "LICENSE",
    "noxfile.py.txt": "noxfile.py",
    "gitignore.txt": ".gitignore",
    "test.yml.txt": ".github/workflows/test.yml",
    "init.py.txt": "$package/__init__.py",
    "py.typed.txt": "$package/py.typed",
}
"""Template file -> path in the package's folder, for every kind of plugin."""


class Kind(NamedTuple):
    """A kind of plugin: the texts for its README, which describe the files of its template.

    Attributes:
        summary: what the plugin does, in a sentence.
        setting: an example of a line in its table.
        settings: name, default and description of each setting.
    """

    summary: str
    setting: str
    settings: tuple[tuple[str, str, str], ...]

    @property
    def rows(self) -> str:
        """The settings as rows of a table."""
        return "\n".join(
            f"| `{name}` | `{value}` | {text} |" for name, value, text in self.settings
        )


KINDS: Mapping[str, Kind] = {
    "event": Kind(
        "Counts the calls of $hook and records the count in the run history.",
        "every = 2",
        (("every", "1", "Number of calls between two records of the count."),),
    ),
    "provider": Kind(
        "Provides a learning-rate scheduler: exponential decay.",
        "decay = 0.9",
        (("decay", "0.99", "Factor of the learning rate per optimizer update."),),
    ),
    "wrapper": Kind(
        "Adds the mean square of the model's outputs to the training loss.",
        "weight = 0.1",
        (("weight", "0.01", "Weight of the mean square in the loss."),),
    ),
    "registry": Kind(
        "Registers a model by name.",
        "classes = 10",
        (
            ("features", "6", "Length of the vectors that are classified."),
            ("classes", "3", "Number of classes."),
        ),
    ),
}
"""The kinds of plugins: ``KIND.py.txt`` is the plugin, and ``test_KIND.py.txt`` are its tests."""


def files_of(kind: str) -> dict[str, str]:
    """Template file -> path in the folder of a package of this kind."""
    own = {f"{kind}.py.txt": "$package/plugin.py", f"test_{kind}.py.txt": "tests/test_plugin.py"}
    return {**FILES, **own}


class NewPluginError(PaCoreError):
    """A package can't be created: its name is invalid or taken, or its folder exists."""


def event_names() -> list[str]:
    """The events that a new plugin may implement first: those of every training epoch."""
    events = [name for name in specifications(hookspecs) if name.startswith("on_")]
    events = events[events.index(_FIRST) : events.index(_LAST) + 1]
    # The new package's tests need one that is called in any run.
    return [name for name in events if name not in _NOT_ALWAYS_CALLED]


def new_plugin(
    name: str,
    directory: Path | None = None,
    *,
    kind: str = "event",
    hook: str | None = None,
    author: str | None = None,
) -> Path:
    """Create a package with a working plugin and passing tests.

    Args:
        name: the plugin's name, as users enable it: ``weight-watch`` gives the distribution
            ``pa-weight-watch``, the package ``pa_weight_watch`` and the plugin ``weight_watch``.
            A leading ``pa-`` is ignored.
        directory: where to create the package's folder; the working directory by default.
        kind: ``"event"`` for a plugin that is called at an event of the loop, ``"provider"`` for
            one that creates a part of the run, ``"wrapper"`` for one that wraps a hook of others,
            ``"registry"`` for one that registers objects by name.
        hook: the event that a plugin of the first kind implements; ``on_train_epoch_end`` if None.
        author: the author, for the licence and the package's metadata.

    Returns:
        The package's folder, created completely or not at all.

    Raises:
        NewPluginError: if the name is invalid or taken, the kind or the event unknown, or the
            folder exists.
    """
    plugin = _plugin_name(name)
    words = plugin.split("_")
    distribution = "-".join(("pa", *words))
    parent = Path.cwd() if directory is None else directory
    target = parent / distribution
    _check_free(plugin, distribution)
    if kind not in KINDS:
        raise NewPluginError(
            f"Unknown template {kind!r}.{nearest(kind, KINDS)} Choose from {', '.join(KINDS)}"
        )
    if hook is not None and kind != "event":
        raise NewPluginError(f"Only the template event takes a hook; the hook of {kind} is fixed")
    hook = hook or "on_train_epoch_end"
    if hook not in event_names():
        raise NewPluginError(
            f"A new plugin can't implement {hook!r} first.{nearest(hook, event_names())} "
            f"Choose an event of a training epoch: {', '.join(event_names())}"
        )
    if target.exists():
        raise NewPluginError(f"{target} already exists; choose another name or --directory")
    author = author or f"The {distribution} authors"
    if not author.isprintable():
        raise NewPluginError(f"The author must be a single line of text, not {author!r}")
    class_name = "".join(word.capitalize() for word in words)
    major, minor = __version__.split(".")[:2]
    made = KINDS[kind]
    _write(
        target,
        files_of(kind),
        {
            "plugin": plugin,
            "distribution": distribution,
            "package": distribution.replace("-", "_"),
            "class_name": f"{class_name}Plugin",
            "summary": Template(made.summary).substitute(hook=hook),
            "setting": made.setting,
            "setting_rows": made.rows,
            "hook": hook,
            "author": author,
            "toml_author": json.dumps(author, ensure_ascii=False),  # TOML quotes text like JSON
            "year": str(datetime.datetime.now(datetime.UTC).year),
            "core_version": f"{major}.{minor}",
            "next_core_version": f"{major}.{int(minor) + 1}",
        },
    )
    return target


def show_new_plugin(target: Path) -> None:
    """Print what to do next with a package that was created."""
    folder, out = short_path(target), console()
    out.print(f"Created {folder}. Try it:")
    out.print(f"    cd {folder}\n    pip install -e . pytest\n    pytest")


def _plugin_name(name: str) -> str:
    normal = re.sub(r"[-_.]+", "_", name.removeprefix("pa-").removeprefix("pa_"))
    if not _NAME.fullmatch(name) or not normal or not normal[0].isalpha():
        raise NewPluginError(
            f"{name!r} is not a valid plugin name: use lower-case letters, digits and single "
            "hyphens, starting with a letter, such as weight-watch"
        )
    if len(normal) > _MAX_LENGTH:
        raise NewPluginError(f"{name!r} is too long: use at most {_MAX_LENGTH} characters")
    return normal


def _check_free(plugin: str, distribution: str) -> None:
    claims = find_claims()
    if plugin in claims:
        raise NewPluginError(
            f"The plugin name {plugin!r} is taken by {claims[plugin][0]}; choose another"
        )
    package = distribution.replace("-", "_")
    if distribution_version(distribution) or importlib.util.find_spec(package):
        raise NewPluginError(f"{distribution} is already installed; choose another name")
    if keyword.iskeyword(plugin):
        raise NewPluginError(f"{plugin!r} is a Python keyword; choose another name")


def _write(target: Path, files: Mapping[str, str], values: Mapping[str, str]) -> None:
    """Write the package beside its final place, and move it there once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder is private to its owner; the one inside has normal permissions.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        template = resources.files("pa_core.cli") / "template"
        for source, place in files.items():
            file = unfinished / Template(place).substitute(values)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (template / source).read_text(encoding="utf-8")
            file.write_text(Template(text).substitute(values), encoding="utf-8")
        unfinished.rename(target)
