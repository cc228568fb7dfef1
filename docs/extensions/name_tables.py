"""The directive ``names``: a table of what its page documents, with the first sentence of each.

``.. names::`` lists classes, functions and data as they come, ``.. names:: methods`` and
``.. names:: attributes`` the members of the page's classes by the alphabet.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

KINDS = {
    "top": {"class", "exception", "function", "data", "decorator", "fixture"},
    "methods": {"method", "classmethod", "staticmethod"},
    "attributes": {"attribute", "property"},
}
SENTENCE = re.compile(r"\.(?=\s|$)")


class NameTable(nodes.General, nodes.Element):
    """The place of a table."""


class Names(SphinxDirective):
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        return [NameTable(kind=self.arguments[0] if self.arguments else "top")]


def setup(app: Any) -> dict[str, bool]:
    app.add_node(NameTable)
    app.add_directive("names", Names)
    app.connect("doctree-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fill(app: Any, doctree: nodes.document) -> None:
    for place in list(doctree.findall(NameTable)):
        found = [
            one for one in doctree.findall(addnodes.desc) if one["objtype"] in KINDS[place["kind"]]
        ]
        if place["kind"] != "top":
            found.sort(key=name_of)
        place.replace_self(table([described(one) for one in found]))


def name_of(description: addnodes.desc) -> str:
    return description[0].get("fullname", "").rpartition(".")[2]


def described(description: addnodes.desc) -> nodes.row:
    link = nodes.reference("", "", nodes.literal(text=name_of(description)), internal=True)
    link["refid"] = description[0]["ids"][0]
    first = next((node for node in description[-1] if isinstance(node, nodes.paragraph)), None)
    return row([link], first_sentence(first) if first is not None else [])


def first_sentence(paragraph: nodes.paragraph) -> list[nodes.Node]:
    found: list[nodes.Node] = []
    for node in paragraph.children:
        end = SENTENCE.search(node.astext()) if isinstance(node, nodes.Text) else None
        if end:
            return [*found, nodes.Text(node.astext()[: end.start()])]
        found.append(node.deepcopy())
    return found


def row(*cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))


def table(found: list[nodes.row]) -> nodes.table:
    columns = [nodes.colspec(colwidth=width) for width in (30, 70)]
    body = nodes.tbody("", *found)
    return nodes.table("", nodes.tgroup("", *columns, body, cols=2), classes=["names"])
