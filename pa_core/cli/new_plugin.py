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

from pa_core import __version__, hookspecs
from pa_core.errors import PaCoreError, nearest
from pa_core.plugins.discovery import distribution_version, find_claims
from pa_core.plugins.implementations import specifications

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
    "plugin.py.txt": "$package/plugin.py",
    "py.typed.txt": "$package/py.typed",
    "test_plugin.py.txt": "tests/test_plugin.py",
}
"""Template file -> path in the package's folder."""


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
    hook: str = "on_train_epoch_end",
    author: str | None = None,
) -> Path:
    """Create a package with a working plugin and passing tests.

    Args:
        name: the plugin's name, as users enable it: ``weight-watch`` gives the distribution
            ``pa-weight-watch``, the package ``pa_weight_watch`` and the plugin ``weight_watch``.
            A leading ``pa-`` is ignored.
        directory: where to create the package's folder; the working directory by default.
        hook: the event that the plugin implements.
        author: the author, for the licence and the package's metadata.

    Returns:
        The package's folder, created completely or not at all.

    Raises:
        NewPluginError: if the name is invalid or taken, the event unknown, or the folder exists.
    """
    plugin = _plugin_name(name)
    words = plugin.split("_")
    distribution = "-".join(("pa", *words))
    parent = Path.cwd() if directory is None else directory
    target = parent / distribution
    _check_free(plugin, distribution)
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
    _write(
        target,
        {
            "plugin": plugin,
            "distribution": distribution,
            "package": distribution.replace("-", "_"),
            "class_name": f"{class_name}Plugin",
            "summary": f"Counts the calls of {hook} and records the count in the run history.",
            "hook": hook,
            "author": author,
            "toml_author": json.dumps(author, ensure_ascii=False),  # TOML quotes text like JSON
            "year": str(datetime.datetime.now(datetime.UTC).year),
            "core_version": f"{major}.{minor}",
            "next_core_version": f"{major}.{int(minor) + 1}",
        },
    )
    return target


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


def _write(target: Path, values: Mapping[str, str]) -> None:
    """Write the package beside its final place, and move it there once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A temporary folder is private to its owner; the one inside has normal permissions.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        template = resources.files("pa_core.cli") / "template"
        for source, place in FILES.items():
            file = unfinished / Template(place).substitute(values)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (template / source).read_text(encoding="utf-8")
            file.write_text(Template(text).substitute(values), encoding="utf-8")
        unfinished.rename(target)
