"""Make links of names in code: where a page says ``S.Gibbs(sites=4)``, the reference has a page of it."""

import re

from docutils import nodes
from names import public
from sphinx.application import Sphinx

SHORT = {"dd": "discdiff", "S": "discdiff.samplers", "T": "discdiff.theory", "losses": "discdiff.losses"}
NAME = re.compile(r"((?:dd|S|T|losses|discdiff)(?:\.\w+)+)(?:\(.*\))?", re.DOTALL)


def address(text: str, known: set[str]) -> str | None:
    """Return the address of the public name that a text in code is, perhaps with arguments; None if it is none."""
    found = NAME.fullmatch(text)
    if found is None:
        return None
    first, _, rest = found[1].partition(".")
    full = f"{SHORT.get(first, first)}.{rest}"
    return full if full in known else None


def link(app: Sphinx, doctree: nodes.document) -> None:
    """Put links around the names of a page that was read."""
    docname = app.env.current_document.docname
    for literal in list(doctree.findall(nodes.literal)):
        found = address(literal.astext(), KNOWN)
        if found is None or isinstance(literal.parent, nodes.title | nodes.reference):
            continue
        uri = app.builder.get_relative_uri(docname, f"reference/{found}")
        target = nodes.reference("", "", internal=True, refuri=uri)
        literal.replace_self(target)
        target += literal


KNOWN = set(public())


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect it."""
    app.connect("doctree-read", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
