"""Sphinx's settings of the site; ``python docs/website/make_site.py`` runs it."""

import importlib
import inspect
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from docstrings import converted
from docutils import nodes
from names import door, public
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import discdiff

project = "discdiff"
copyright = "The discdiff developers"
version = release = discdiff.__version__
extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "linking",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "none"
html_theme = "furo"
html_title = "discdiff"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 90
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True
# What other packages and Python define has no page here; so do type variables and the texts of shapes.
nitpick_ignore_regex = [("py:.*", r"(?!discdiff\b).*")]


def _docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = converted(lines)


def _at_its_door(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.Element) -> nodes.Element | None:
    """Resolve an address in the room that defines an object to the page at its door."""
    if node.get("refdomain") != "py":
        return None
    target = node.get("reftarget", "")
    owner, _, member = target.rpartition(".")
    for address in (DOORS.get(target), f"{DOORS[owner]}.{member}" if owner in DOORS else None):
        found = address and env.domains["py"].objects.get(address)
        if found:
            return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", address, node, shown)
    # A private base class or helper has no page; a name that nothing has is an error.
    return shown if _exists(target) else None


def _exists(address: str) -> bool:
    parts = address.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:]:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return True
    return False


DOORS = {one.origin: address for address, one in public().items() if one.kind in ("class", "function")}


def _followed(app: Sphinx, module: str, name: str) -> str | None:
    """Keep viewcode from following aliases of types into the source of Python and torch."""
    found: object = door(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    home = getattr(inspect.unwrap(found) if callable(found) else found, "__module__", None)
    if home is None or str(home).startswith("discdiff"):
        return None
    return module if getattr(door(module), "__file__", None) else f"{module}.dispatch"  # kernels has no file


def _back(app: Sphinx, error: Exception | None) -> None:
    """Correct the links from pages of source to the reference: viewcode knows one door of a module."""
    for page in Path(app.outdir, "_modules").rglob("*.html"):
        text = page.read_text()
        page.write_text(re.sub(r'(/reference/([\w.]+)\.html)#([\w.]+)"', _to_its_place, text))


def _to_its_place(found: re.Match[str]) -> str:
    address, place = found[2], found[3]
    name = address.rpartition(".")[2]
    rest = re.search(rf"\.{name}((?:\.\w+)*)$", place)
    return f'{found[1]}#{address}{rest[1]}"' if rest else found[0]


def setup(app: Sphinx) -> None:
    """Connect the changes of docstrings and addresses."""
    app.connect("viewcode-follow-imported", _followed)
    app.connect("build-finished", _back)
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.connect("missing-reference", _at_its_door)
