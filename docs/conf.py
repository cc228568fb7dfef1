"""Sphinx settings: MyST pages, docstrings in Google style, furo. Nothing comes from the network."""

import sys
from pathlib import Path
from typing import Any

from sphinx.util.nodes import make_refnode

import pa_core
from pa_core.plugins.discovery import find_plugins, load_plugin
from pa_core.plugins.explain import LoopRow, loop_rows, read_contract
from pa_core.plugins.implementations import hook_names
from pa_core.plugins.manager import PluginManager

EXTENSIONS = Path(__file__).parent / "extensions"
sys.path.insert(0, str(EXTENSIONS))

project = "pa-core"
author = "The pa-core authors"
copyright = author  # noqa: A001 - the name that Sphinx reads
release = version = pa_core.__version__

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"),
    *("sphinx_copybutton", "sphinx_design"),
    *("mathml", "name_tables", "source_code", "summaries"),  # those in `EXTENSIONS`
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pa-core {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False  # pages link to each other, and to the highlighted source of the code
html_search_scorer = str(EXTENSIONS / "search.js")
html_show_search_summary = False  # the extension `summaries` has them
copybutton_prompt_text = r">>> |\.\.\. |\$ "  # copy commands and code, without prompts
copybutton_prompt_is_regexp = True
toc_object_entries_show_parents = "hide"

default_role = "py:obj"  # `Trainer.train` in a docstring becomes a link if it is documented
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "model_config"}  # every pydantic model has it
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # list attributes with their class, and document each only once
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_url_schemes = ["http", "https", "mailto", "source"]  # the last is of `source_code`

HOOKS = PluginManager().hooks
ROWS = {row.hook: row for row in loop_rows() if row.hook}


def setup(app: Any) -> None:
    """Connect the handlers below; the first runs after napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", add_to_hook, priority=900)
    app.connect("missing-reference", find_by_short_name)


def add_to_hook(
    app: Any, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Format a hook's contract as a field list, with its kind of result and its implementers."""
    hook = HOOKS.get(name.removeprefix("pa_core.hookspecs."))
    if hook is None or hook.function is not obj:
        return
    described = read_contract("\n".join(lines))
    contract = {"In the loop": place_of(ROWS[hook.name]), **described.fields}
    if hook.firstresult:
        contract["Result"] = (
            "the first that isn't None; later implementations aren't called (firstresult)."
        )
    else:
        contract["Result"] = "all implementations are called."
    contract["Implemented by"] = (
        ", ".join(implementers().get(hook.name, [])) or "no plugin in this repository"
    )
    fields = [f":{key}: {value}" for key, value in contract.items()]
    lines[:] = [*described.text.splitlines(), "", *fields, ""]


def place_of(row: LoopRow) -> str:
    """Where the table of the loop has a hook: its phases, and the method that comes before it."""
    place = " › ".join(f"``{phase}``" for phase in row.phases)
    return f"{place}, after ``Trainer.{row.method}``." if row.method else f"{place}."


def implementers() -> dict[str, list[str]]:
    """Links to the installed plugins that implement each hook."""
    found: dict[str, list[str]] = {}
    for name, source in find_plugins().items():
        plugin = load_plugin(source)
        place = f"{plugin.__module__}.{plugin.__qualname__}"
        for hook in hook_names(plugin, HOOKS):
            found.setdefault(hook, []).append(f":py:class:`{name} <{place}>`")
    return found


def find_by_short_name(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Resolve `Trainer` or `Trainer.train` if exactly one documented object has that name.

    A method must be written with its class: a bare name may also be that of an argument.
    """
    target, domain = node["reftarget"], env.domains["py"]
    kinds = {"class", "exception", "function", "data"}
    places = {
        (found.docname, found.node_id): (name, found)
        for name, found in domain.objects.items()
        if name.endswith(f".{target}") and ("." in target or found.objtype in kinds)
    }
    if node.get("refdomain") != "py" or len(places) != 1:
        return None
    ((name, found),) = places.values()
    builder, here = app.builder, node["refdoc"]
    return make_refnode(builder, here, found.docname, found.node_id, content, name)
