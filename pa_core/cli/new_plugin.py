"""A new plugin's package, made of the template that is installed with pa-core."""

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
_LONGEST = 32  # beyond that, the lines of code would be too long
_FIRST, _LAST = "on_train_epoch_start", "on_training_run_end"

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
"""Where each file of the template goes."""


class NewPluginError(PaCoreError):
    """A package can't be made: its name is wrong or taken, or its place is."""


def event_names() -> list[str]:
    """The events that a new plugin may begin with: those of a run's epochs."""
    events = [name for name in specifications(hookspecs) if name.startswith("on_")]
    return events[events.index(_FIRST) : events.index(_LAST) + 1]


def new_plugin(
    name: str,
    directory: Path | None = None,
    *,
    hook: str = "on_train_epoch_end",
    author: str | None = None,
) -> Path:
    """Make a package with a plugin that works, and with tests that pass.

    Args:
        name: the plugin's name, as users enable it: ``weight-watch`` gives the distribution
            ``pa-weight-watch``, the package ``pa_weight_watch`` and the plugin ``weight_watch``.
            A ``pa-`` before it is left out.
        directory: where the package's folder is put; the working directory by default.
        hook: the event that the plugin begins with.
        author: who is named in the licence and in the package's metadata.

    Returns:
        The package's folder, which is there as a whole or not at all.

    Raises:
        NewPluginError: for a name that is no name or is taken, an unknown event, and a folder
            that is there.
    """
    plugin = _plugin_name(name)
    words = plugin.split("_")
    distribution = "-".join(("pa", *words))
    parent = Path.cwd() if directory is None else directory
    target = parent / distribution
    _check_free(plugin, distribution)
    if hook not in event_names():
        raise NewPluginError(
            f"A new plugin can't begin with {hook!r}.{nearest(hook, event_names())} It takes an "
            f"event of an epoch: {', '.join(event_names())}"
        )
    if target.exists():
        raise NewPluginError(f"{target} is there already; name another plugin, or --directory")
    author = author or f"The {distribution} authors"
    if not author.isprintable():
        raise NewPluginError(f"The author {author!r} must be one line of text")
    class_name = "".join(word.capitalize() for word in words)
    major, minor = __version__.split(".")[:2]
    _write(
        target,
        {
            "plugin": plugin,
            "distribution": distribution,
            "package": distribution.replace("-", "_"),
            "class_name": f"{class_name}Plugin",
            "summary": f"Counts the calls of {hook}, and records the count in the run history.",
            "hook": hook,
            "author": author,
            "toml_author": json.dumps(author, ensure_ascii=False),  # as TOML quotes text, too
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
            f"{name!r} is no name for a plugin: it begins with a letter and goes on with small "
            "letters, digits and single hyphens between them, such as weight-watch"
        )
    if len(normal) > _LONGEST:
        raise NewPluginError(f"{name!r} is too long: take at most {_LONGEST} characters")
    return normal


def _check_free(plugin: str, distribution: str) -> None:
    claims = find_claims()
    if plugin in claims:
        raise NewPluginError(
            f"The plugin name {plugin!r} is taken by {claims[plugin][0]}; choose another"
        )
    package = distribution.replace("-", "_")
    if distribution_version(distribution) or importlib.util.find_spec(package):
        raise NewPluginError(f"{distribution} is installed already; choose another name")
    if keyword.iskeyword(plugin):
        raise NewPluginError(f"{plugin!r} is a word of Python's own; choose another name")


def _write(target: Path, values: Mapping[str, str]) -> None:
    """Write the package beside its place, and move it there when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Its own folder is for its owner alone; the one within has the usual rights.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        template = resources.files("pa_core.cli") / "template"
        for source, place in FILES.items():
            file = unfinished / Template(place).substitute(values)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (template / source).read_text(encoding="utf-8")
            file.write_text(Template(text).substitute(values), encoding="utf-8")
        unfinished.rename(target)
