"""The documentation matches the code: its tables are compared, and its code is run.

The Python blocks of a page run one after the other in one namespace, and its shell blocks between
them, all in an empty folder. A comment on the line before a block changes that:
``<!-- file: NAME -->`` writes the block into that folder, ``<!-- not run: WHY -->`` skips it.

On the How-to pages and in the tutorials, each Python block can be pasted as it is: it has its own
namespace and folder. ``<!-- continues -->`` joins a block to the one before it. Files belong to the
block that follows them; a shell block without files runs in the folder of the block before it.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    *(README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
]
RECIPES = {
    ROOT / "docs/cookbook.md",
    *ROOT.glob("docs/how_to/*.md"),
    *ROOT.glob("docs/start/tutorial_*.md"),
}
PLUGINS = sorted(ROOT.glob("docs/plugins/**/*.md"))
MARK = re.compile(r"<!-- (?:(file|not run): (.+)|(continues)) -->")
NO_CODE = {"text", "{eval-rst}"}


def each(pages: list[Path]) -> pytest.MarkDecorator:
    """Run a test for each of these pages."""
    return pytest.mark.parametrize(
        "page", pages, ids=lambda page: page.relative_to(ROOT).as_posix()
    )


@dataclass
class Block:
    """A fenced block: its language, its text, its first line, and the mark before it."""

    language: str
    code: str
    line: int
    mark: str | None
    argument: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        mark = MARK.fullmatch(lines[start - 1]) if start else None
        code = "\n".join(lines[start + 1 : number]) + "\n"
        kind, argument, continues = mark.groups() if mark else (None, None, None)
        language = lines[start].removeprefix("```")
        found.append(Block(language, code, start + 1, kind or continues, argument or ""))
        start = None
    assert start is None, f"{page}: the block of line {start} is never closed"
    return [block for block in found if block.language not in NO_CODE]


def recipes(page: Path) -> list[list[Block]]:
    """The blocks that share a namespace and a folder: those of a recipe, or all of the page."""
    found = [block for block in blocks(page) if block.mark != "not run"]
    if page not in RECIPES:
        return [found]
    groups: list[list[Block]] = []
    files: list[Block] = []  # not yet followed by the block they belong to
    for block in found:
        if block.mark == "file" or block.language == "toml":
            files.append(block)
            continue
        has_files = any(file.mark == "file" for file in files)
        opens = block.mark != "continues" and (block.language == "python" or has_files)
        if opens or not groups:
            groups.append([])
        groups[-1] += [*files, block]
        files = []
    return [*groups, files] if files else groups


# Others run at the same time, in test_docs_recipes.py and test_docs_plugins.py.
@each([page for page in PAGES if page not in {*RECIPES, *PLUGINS}])
def test_the_code_on_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch)


def run_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page, each recipe in a separate folder."""
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    for number, recipe in enumerate(recipes(page)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        namespace: dict[str, Any] = {"__name__": "__main__"}  # as in a script
        for block in recipe:
            if block.mark == "file":
                file = folder / block.argument
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.code)
            elif block.language == "python":
                # With empty lines before it, so that errors have the line numbers of the page.
                source = "\n" * block.line + block.code
                exec(compile(source, str(page), "exec", dont_inherit=True), namespace)  # noqa: S102
            elif block.language == "sh":
                run_shell(block.code, folder)
            if block.language == "toml":
                check_toml(block, folder)


def test_the_blocks_of_a_recipe_share_a_folder_and_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = ["", "file: a.py", "", "continues", "file: b.py", "continues", "file: c.py", "", ""]
    languages = ["python"] * 7 + ["sh"] * 2
    page = tmp_path / "page.md"
    page.write_text(
        "".join(
            f"<!-- {mark} -->\n```{language}\n{place}\n```\n"
            for place, (mark, language) in enumerate(zip(marks, languages, strict=True))
        )
    )
    assert len(recipes(page)) == 1
    monkeypatch.setattr("tests.test_docs.RECIPES", {page})
    places = [[int(block.code) for block in recipe] for recipe in recipes(page)]
    assert places == [[0], [1, 2, 3, 4, 5], [6, 7, 8]]


def run_shell(commands: str, folder: Path) -> None:
    binaries = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env=os.environ
        | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{commands}{result.stdout}{result.stderr}"


def check_toml(block: Block, folder: Path) -> None:
    """Settings that a page shows are right, but for those in a folder named ``wrong``."""
    from pa_core.settings.build import build_plugins
    from pa_core.settings.table import read_settings

    content = tomllib.loads(block.code)
    if "pa-core" in content.get("tool", {}) and not block.argument.startswith("wrong/"):
        file = folder / (block.argument or "shown/pyproject.toml")
        file.parent.mkdir(exist_ok=True)
        file.write_text(block.code)
        assert build_plugins(read_settings(file))


@each(PAGES)
def test_each_block_of_a_page_has_a_known_language(page: Path) -> None:
    for block in blocks(page):
        place = f"{page.name}:{block.line}"
        assert block.language in {"python", "sh", "toml"}, f"{place}: {block.language!r}"


def test_the_page_of_built_ins_has_each_with_its_settings() -> None:
    from importlib import import_module

    from pa_core.plugins.builtin_names import BUILTINS, DEFAULTS

    text = (ROOT / "docs" / "plugins" / "builtins.md").read_text()
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(BUILTINS)
    for name, target in BUILTINS.items():
        module, _, attribute = target.partition(":")
        settings = getattr(getattr(import_module(module), attribute), "Settings", None)
        fields = settings.model_fields if settings is not None else {}
        expected = [setting_row(key, field) for key, field in fields.items()]
        assert re.findall(r"^\| `.+$", sections[name], re.MULTILINE) == expected, name
        assert ("On by default." in sections[name]) == (name in DEFAULTS), name


def setting_row(key: str, field: Any) -> str:
    default = field.default
    if field.is_required():
        shown = "needed"
    elif isinstance(default, str | Path):
        shown = f'`"{default}"`'
    elif isinstance(default, tuple | list):
        shown = f"`{json.dumps(default)}`"
    else:
        shown = f"`{str(default).lower()}`" if default is not None else "none"
    return f"| `{key}` | {shown} | {field.description} |"


def test_the_page_of_the_command_line_has_each_command() -> None:
    from pa_core.cli.app import app

    text = (ROOT / "docs" / "reference" / "command.md").read_text()
    commands = [c.name or c.callback.__name__ for c in app.registered_commands if c.callback]
    assert re.findall(r"^## `pa ([\w-]+)`$", text, re.MULTILINE) == commands


def test_the_table_of_the_ladder_matches_its_code() -> None:
    page = ROOT / "docs" / "understand" / "ladder.md"
    scripts = {block.argument: block.code for block in blocks(page) if block.mark == "file"}
    row = re.compile(r"^\| `(\w+)\.py` \| .+? \| (.+) \| (\d+) \|$", re.MULTILINE)
    user_line = re.compile(r"^(?! *(?:#|import |from |$)).+$", re.MULTILINE)
    rows = row.findall(page.read_text())
    comparison = blocks(page)[-1].code  # asserts the figures when the page is run
    assert ["digits.py", *(f"{name}.py" for name, *_ in rows)] == list(scripts)
    for name, figures, lines in rows:
        assert f'"{name}": ({figures.replace(" | ", ", ")}),\n' in comparison
        assert len(user_line.findall(scripts[f"{name}.py"])) == int(lines), name


def test_the_first_two_shell_blocks_of_the_readme_are_its_commands() -> None:
    demo, checks = [block.code for block in blocks(README) if block.language == "sh"][:2]
    assert demo.count("\n") == checks.count("\n") == 1
    assert demo.startswith("python3 -m venv ")
    assert demo.rstrip().endswith("python examples/digits/train.py")
    assert checks.startswith("python3 -m venv ")
    assert checks.rstrip().endswith("/nox")


def test_the_readmes_plugin_takes_at_most_fifteen_lines_and_works_in_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [block for block in blocks(README) if block.mark == "file"]
    assert [block.language for block in files] == ["python", "toml"]
    assert len([line for line in files[0].code.splitlines() if line.strip()]) <= 15
    for block in files:
        (tmp_path / block.argument).write_text(block.code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    (script,) = [b for b in blocks(README) if b.language == "python" and b.mark is None]
    namespace: dict[str, Any] = {"__name__": "__page__"}
    exec(compile(script.code, str(README), "exec", dont_inherit=True), namespace)  # noqa: S102
    assert namespace["trainer"].run_history.get_latest_metric("learning_rate") == 0.01
