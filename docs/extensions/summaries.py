"""The first sentences of all pages, in the page that shows the results of a search."""

from __future__ import annotations

import json
import re
from typing import Any

from docutils import nodes

LENGTH = 200


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-read", remember)
    app.connect("html-page-context", add_to_search)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def remember(app: Any, doctree: nodes.document) -> None:
    paragraphs = doctree.findall(nodes.paragraph)
    first = next((node for node in paragraphs if isinstance(node.parent, nodes.section)), None)
    if first is not None:
        app.env.metadata[app.env.docname]["summary"] = shortened(first.astext())


def shortened(text: str) -> str:
    """Whole sentences, as many as fit."""
    text = re.sub(":$", ".", " ".join(text.split()))
    end = text.rfind(". ", 0, LENGTH)
    if len(text) <= LENGTH:
        return text
    return text[: end + 1] if end > 0 else text[:LENGTH].rpartition(" ")[0] + " …"


def add_to_search(app: Any, pagename: str, template: str, context: Any, doctree: Any) -> None:
    if pagename == "search":
        found = {page: data.get("summary", "") for page, data in app.env.metadata.items()}
        text = json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")
        app.add_js_file(None, body=f"const SUMMARIES = {text};")
