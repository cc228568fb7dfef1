"""The reference is complete: each hook, each public name, and each module in the diagram."""

import ast
import inspect
import re
import runpy
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pa_core.hookspecs import LOOP
from pa_core.plugins.manager import PluginManager
from tests.test_docs import ROOT, blocks

DOCS = ROOT / "docs"
HOOKS = PluginManager().hooks
PUBLIC = [
    *("pa_core", "pa_core.trainer", "pa_core.callbacks", "pa_core.plugin", "pa_core.testing"),
    *("pa_metrics", "pa_schedulers", "pa_models", "pa_tracking", "pa_report", "pa_lab"),
]


# -- Hooks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "hook_tables.py"))


def test_the_loop_and_its_tables_are_made_from_the_hookspecs(tables: dict[str, Any]) -> None:
    for page in tables["PAGES"]:
        text = page.read_text()
        assert tables["updated"](text) == text, "run: python docs/hook_tables.py"


def test_both_pages_have_every_hook(tables: dict[str, Any]) -> None:
    loop, overview = [page.read_text() for page in tables["PAGES"]]
    assert LOOP in loop
    assert sorted(re.findall(r"^\| `(\w+)` \| .* \| (?:yes|no) \|$", loop, re.MULTILINE)) == sorted(
        HOOKS
    )
    rows = re.findall(r"^\| \[`(\w+)`\]\(hooks/(\w+)\.md\) \| .+ \|$", overview, re.MULTILINE)
    assert rows == [(name, name) for name in tables["ORDER"]]
    assert re.findall(r"^hooks/(\w+)$", overview, re.MULTILINE) == tables["ORDER"]


def test_each_page_of_a_hook_begins_with_its_specification() -> None:
    pages = sorted(DOCS.glob("plugins/hooks/*.md"))
    assert [page.stem for page in pages] == sorted(HOOKS)
    for page in pages:
        directive = f".. autofunction:: pa_core.hookspecs.{page.stem}"
        start = f"# `{page.stem}`\n\n```{{eval-rst}}\n{directive}\n```\n\n## Example\n"
        assert page.read_text().startswith(start), page.name


class _EmptyImplementations(ast.NodeTransformer):
    """Removes the bodies of a hook's implementations, and counts them."""

    def __init__(self, hook: str) -> None:
        self.hook, self.count = hook, 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        marks = [ast.unparse(decorator) for decorator in node.decorator_list]
        if node.name == self.hook and any("hookimpl" in mark for mark in marks):
            self.count += 1
            is_wrapper = any("wrapper=True" in mark for mark in marks)
            node.body = [ast.Return(ast.Yield() if is_wrapper else None)]
        return node


@pytest.mark.parametrize("name", HOOKS)
def test_the_example_of_a_hook_fails_if_its_implementation_does_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = DOCS / "plugins" / "hooks" / f"{name}.md"
    code = "".join(block.code for block in blocks(page) if block.language == "python")
    transformer = _EmptyImplementations(name)
    tree = ast.fix_missing_locations(transformer.visit(ast.parse(code)))
    assert transformer.count, "the example has no implementation of the hook"
    with pytest.raises(Exception):  # noqa: B017, PT011 - any, depending on the example
        exec(compile(tree, str(page), "exec"), {"__name__": "__page__"})  # noqa: S102


# -- Public names ---------------------------------------------------------------------------------


def _api() -> str:
    return "\n".join(page.read_text() for page in sorted(DOCS.glob("reference/api/*.md")))


def _documented() -> Iterator[Any]:
    """The objects whose docstrings the API reference shows."""
    directive = re.compile(r"^\.\. auto(\w+):: ([\w.]+)\n((?: +:.+\n)*)", re.MULTILINE)
    for kind, target, options in directive.findall(_api()):
        if kind != "module":
            home, _, name = target.rpartition(".")
            yield getattr(import_module(home), name)
        elif ":members:" in options:
            module = import_module(target)
            for name in getattr(module, "__all__", ()):
                yield getattr(module, name)
            for value in vars(module).values():
                if getattr(value, "__module__", None) == target:
                    yield value


@pytest.mark.parametrize("module", PUBLIC)
def test_each_public_name_is_in_the_api_reference_with_a_docstring(module: str) -> None:
    shown, text = list(_documented()), _api()
    for name in import_module(module).__all__:
        value = getattr(import_module(module), name)
        if f"{module}.{name}" == "pa_core.__version__":
            assert f"{module}.{name}" in text  # a string
        else:
            assert any(other is value for other in shown), f"{module}.{name}"
            assert inspect.getdoc(value), f"{module}.{name}"


def test_the_overview_of_the_api_has_each_of_its_pages() -> None:
    overview = (DOCS / "reference" / "api.md").read_text()
    pages = sorted(f"api/{page.stem}" for page in DOCS.glob("reference/api/*.md"))
    assert sorted(re.findall(r"^\| \[[\w.]+\]\((.+)\.md\) \|", overview, re.MULTILINE)) == pages
    assert sorted(re.findall(r"^api/.+$", overview, re.MULTILINE)) == pages


# -- The picture of the layers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "layers.py"))


def test_the_picture_is_what_its_script_draws_from_the_code(picture: dict[str, Any]) -> None:
    assert (DOCS / "understand" / "layers.svg").read_text() == picture["draw"](), (
        "run: python docs/layers.py"
    )


def test_the_picture_has_every_module_and_every_distribution() -> None:
    shown = " ".join(
        re.findall(r">([^<]+)</text>", (DOCS / "understand" / "layers.svg").read_text())
    )
    for file in (ROOT / "pa_core").rglob("*.py"):
        if file.name != "__init__.py":
            assert re.search(rf"\b{file.stem}\b", shown), file
    for file in ROOT.glob("plugins/*/pyproject.toml"):
        assert tomllib.loads(file.read_text())["project"]["name"] in shown


# -- Links into the code --------------------------------------------------------------------------


def test_links_to_lines_lead_to_the_lines_that_they_quote() -> None:
    figures = runpy.run_path(str(DOCS / "figures.py"))
    page = DOCS / "understand" / "inside.md"
    assert figures["with_line_numbers"](page) == page.read_text(), "run: python docs/figures.py"
    links = figures["LINE_LINK"].findall(page.read_text())
    assert len(links) == len(re.findall(r"#L\d+", page.read_text())), "a link has another form"
    files = {path.rpartition("/")[2] for _, path, *_ in links}
    assert {"trainer.py", "hookspecs.py"} <= files
    with pytest.raises(ValueError, match=r"2 lines of lines_of in figures\.py contain 'files'"):
        figures["line_of"](DOCS / "figures.py", "lines_of", "files")
    with pytest.raises(ValueError, match=r"figures\.py has no lines_in"):
        figures["line_of"](DOCS / "figures.py", "lines_in", "files")


# -- Links ----------------------------------------------------------------------------------------


def test_links_to_files_lead_to_files() -> None:
    link = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
    pages = [*DOCS.glob("**/*.md"), *ROOT.glob("*.md"), *ROOT.glob("plugins/*/README.md")]
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in link.findall(text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
