"""Pages with the highlighted source of the files that the documentation links to.

A link to a file of the repository, and ``[source]`` in the API reference, lead to a page below
``_modules`` in which each line has an anchor. Sphinx itself would offer the file as a download, and
its ``viewcode`` has no anchors of lines and only modules whose names are documented.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from functools import reduce
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

ROOT = Path(__file__).parents[2]
SCHEME = "source"  # of the links between here and `resolve`
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(?:#L(\d+))?(?=[)\s])")


def setup(app: Any) -> dict[str, bool]:
    app.setup_extension("sphinx.ext.linkcode")
    app.config.linkcode_resolve = link_to_object
    app.connect("source-read", rewrite_page)
    app.connect("include-read", rewrite_included)
    app.connect("doctree-resolved", resolve)
    app.connect("html-collect-pages", source_pages)
    app.connect("html-page-context", share_contents, priority=100)  # before the theme's
    app.linked_files, app.contents = set(), {}
    return {"parallel_read_safe": True, "parallel_write_safe": False}


# -- Links in the text ----------------------------------------------------------------------------


def rewrite_page(app: Any, docname: str, source: list[str]) -> None:
    source[0] = with_schemes(source[0], Path(app.env.doc2path(docname)).parent, app.srcdir)


def rewrite_included(app: Any, path: Path, parent: str, source: list[str]) -> None:
    source[0] = with_schemes(source[0], (Path(app.srcdir) / path).parent, app.srcdir)


def with_schemes(text: str, folder: Path, docs: Path) -> str:
    """Give links to files outside the documentation a scheme that `resolve` finds again."""

    def with_scheme(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / found[1]))
        if not target.is_file() or target.is_relative_to(docs):
            return found[0]
        anchor = f"#L-{found[2]}" if found[2] else ""
        return f"]({SCHEME}:{target.relative_to(ROOT).as_posix()}{anchor}"

    return LINK.sub(with_scheme, text)


# -- Links of the API reference -------------------------------------------------------------------


def link_to_object(domain: str, info: dict[str, str]) -> str | None:
    """A link to the first line of a documented class or function."""
    if domain != "py" or not info["module"]:
        return None
    try:
        found = reduce(getattr, info["fullname"].split("."), import_module(info["module"]))
        found = getattr(found, "fget", None) or getattr(found, "func", None) or found
        file = Path(inspect.getsourcefile(inspect.unwrap(found)) or "")
        line = inspect.getsourcelines(inspect.unwrap(found))[1]
    except (AttributeError, TypeError, OSError):
        return None  # an attribute
    if not file.is_relative_to(ROOT):
        return None  # inherited from a library
    return f"{SCHEME}:{file.relative_to(ROOT).as_posix()}#L-{line}"


# -- Pages ----------------------------------------------------------------------------------------


def resolve(app: Any, doctree: nodes.document, docname: str) -> None:
    """Replace the links by those to the pages, and remember which files need one."""
    for node in doctree.findall(nodes.reference):
        scheme, _, target = node.get("refuri", "").partition(":")
        if scheme == SCHEME:
            path, _, anchor = target.partition("#")
            app.linked_files.add(path)
            node["refuri"] = app.builder.get_relative_uri(docname, page_name(path))
            node["refuri"] += f"#{anchor}" if anchor else ""
            node["internal"] = True


def page_name(path: str) -> str:
    return f"_modules/{path.removesuffix('.py').removesuffix('/__init__')}"


def source_pages(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    formatter = HtmlFormatter(linenos="inline", linespans="L", wrapcode=True)
    for path in sorted(app.linked_files):
        lines = highlight((ROOT / path).read_text(), get_lexer_for_filename(path), formatter)
        body = f'<h1>{escape(path)}</h1>\n<div class="source-code">{lines}</div>'
        yield page_name(path), {"title": path, "body": body, "parents": []}, "page.html"


def share_contents(app: Any, pagename: str, template: str, context: Any, doctree: Any) -> None:
    """Make the table of contents once for all source pages of a depth: it takes half a second."""
    if pagename.startswith("_modules/"):
        make, depth = context["toctree"], pagename.count("/")

        def toctree(**options: Any) -> str:
            key = (depth, *sorted(options.items()))
            if key not in app.contents:
                app.contents[key] = make(**options)
            return app.contents[key]

        context["toctree"] = toctree
