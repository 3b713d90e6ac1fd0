"""Every public docstring: one first sentence, the shapes of its tensors, its errors, and a link for each paper."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from public_names import Definition, Library, Unit, text

import discdiff as dd

# References without an arXiv identifier or a DOI, by the word before the year, and why.
ELSEWHERE = {
    ("Blelloch", "1990"): "a technical report without a DOI: the page of its institute",
    ("Google", "2026"): "a network without a paper: the page of its weights",
    ("Kelly", "1979"): "a book without a DOI: its author's page",
}
CITED = r"([A-Za-z][\w-]*)(?: et al\.)?(?:,| \(|, \() ?(19\d\d|20[0-2]\d)\b(?:, (https?://[^\s,;)]*[^\s,;).]))?"


def sentence(library: Library, unit: Unit) -> Iterator[str]:
    """The docstring's first line is one sentence: it begins with a capital and ends with a period, or a colon.

    A method may leave its docstring to one that it overrides; a property, to the attributes in its class's docstring;
    a dunder, an overload and a setter, to the class or function.
    """
    decorators = {ast.unparse(one).rpartition(".")[2] for one in unit.node.decorator_list}
    if text(unit.node):
        first = text(unit.node).splitlines()[0]
        second = re.search(r"[\w)\]`][.!?] +[A-Z`]", first.replace("et al.", ""))
        if second or not first[0].isupper() or first[-1] not in ".:":
            yield f"not one sentence: {first}"
    elif not (unit.dunder or unit.above or decorators & {"overload", "setter"}):
        listed = ", ".join(re.findall(r"^ +([\w, ]+):", unit.near, re.MULTILINE)).split(", ")
        if "property" not in decorators or unit.node.name not in listed:
            yield "no docstring"


def shapes(library: Library, unit: Unit) -> Iterator[str]:
    """Each jaxtyping shape of a parameter, return or field is in the docstring, the class's or a base class's.

    " B" is written (B,), "B L" is (B, L), "B *L" is (B,) or (B, L); "_" has any name. "*N" and "..." are any shape.
    """
    if isinstance(unit.node, ast.ClassDef):
        fields = [one for one in unit.node.body if isinstance(one, ast.AnnAssign)]
        notes = [one.annotation for one in fields if ast.unparse(one.target)[0] != "_"]
    else:
        inside = [one for one in ast.walk(unit.node.args) if isinstance(one, ast.arg)]
        notes = [note for note in (*(one.annotation for one in inside), unit.node.returns) if note]
    near = " ".join(unit.near.split())
    for shape in sorted(set(re.findall(r"Tensor, '([^']*)'\]", " ".join(map(ast.unparse, notes))))):
        sizes = [size.lstrip("#") for size in shape.split()] or ["..."]
        if (len(sizes) > 1 or sizes[0][0] not in ".*") and not re.search(_spelled(sizes), near):
            yield f"no shape ({', '.join(sizes)})"


def _spelled(sizes: list[str]) -> str:
    """Return a pattern for a shape in a docstring; sizes with a star may be left out after others."""
    pattern = ""
    for k, size in enumerate(sizes):
        one = rf"(\*?{size[1:]}|\.\.\.)" if size[0] == "*" else size.replace("_", r"\w+")
        pattern += f"(, {one})?" if k and size[0] == "*" else ", " * bool(k) + one
    return rf"\({pattern},?\)"


def errors(library: Library, unit: Unit) -> Iterator[str]:
    """A function that raises has "Raises:" in its docstring, or "raises ValueError", and names each error or its base.

    A dunder may have this in the docstring of the class.
    """
    if isinstance(unit.node, ast.ClassDef):
        return
    owner = unit.family[0] if unit.family else None
    said = "\n".join([text(unit.node), unit.above, text(owner) if unit.dunder else ""])
    for name in sorted(library.raised(unit.module, unit.node, owner)):
        node = library.find(unit.module, name)[1]
        names = [name, *map(ast.unparse, node.bases)] if isinstance(node, ast.ClassDef) else [name]
        if not re.search(r"^Raises:|\b[Rr]aises? (an? )?[A-Z]", said, re.MULTILINE):
            yield "no Raises"
        elif not re.search(rf"\b({'|'.join(names)})\b", said):
            yield f"no {name} in Raises"


@cache
def references(library: Library, module: str) -> dict[tuple[str, str], str]:
    """Map each reference in a module's docstrings, "Name (Year" or "Name, Year", to the link behind it, or to ""."""
    nodes = (node for node in ast.walk(library.trees[module]) if isinstance(node, ast.Module | Definition))
    prose = "\n".join(" ".join(text(node).split()) for node in nodes)
    found = {(who, "without a year"): "" for who in re.findall(r"(\w+) et al\.(?!,? \(?\d{4}\b)", prose)}
    for who, year, link in re.findall(CITED, prose):
        found[who, year] = found.get((who, year)) or link
    return found


def links(library: Library, unit: Unit) -> Iterator[str]:
    """Each reference of a module has a link in one of its docstrings: to arXiv or a DOI, or as in ``ELSEWHERE``."""
    for (who, year), link in references(library, unit.module).items():
        known = link.startswith(("https://arxiv.org/abs/", "https://doi.org/10.")) or (who, year) in ELSEWHERE
        if not link or not known:
            yield f"no link of {who} {year}"


RULES = (sentence, shapes, errors, links)


def faults(library: Library) -> list[str]:
    """Return what is wrong with the public names of a library, as "rule: where: what"."""
    found = ((rule, unit, what) for unit in library.public() for rule in RULES for what in rule(library, unit))
    return [f"{rule.__name__}: {unit.module}:{unit.name}: {what}" for rule, unit, what in found]


@pytest.fixture(scope="module")
def library() -> Library:
    root = Path(dd.__file__).parent
    texts = {}
    for file in (file for folder in (root, *filter(Path.is_dir, root.iterdir())) for file in folder.glob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        texts[".".join(["discdiff", *parts]).removesuffix(".__init__")] = file.read_text()
    return Library(texts)


def test_docstrings_keep_the_rules(library: Library) -> None:
    assert faults(library) == []


def test_every_public_name_is_read(library: Library) -> None:
    read = [unit.node.name for unit in library.public()]
    assert {"Masked", "Prediction", "loo", "choose", "Ancestral", "kernel", "draw", "load"} <= set(read)
    assert len(read) > 1000
    defining = {m for m, tree in library.trees.items() for node in tree.body if getattr(node, "name", "_")[0] != "_"}
    assert [module for module in defining if "__all__" not in ast.unparse(library.trees[module])] == []


def test_each_exception_is_used(library: Library) -> None:
    links = {ref: link for module in library.trees for ref, link in references(library, module).items() if link}
    assert {ref for ref, link in links.items() if "arxiv.org" not in link and "doi.org" not in link} == set(ELSEWHERE)


SOUND = '''"""Draw tokens.

Reference: Doe et al. (2020, https://arxiv.org/abs/2001.00001).
"""
from discdiff.checks import whole
__all__ = ["Law", "draw"]
class Law:
    """Law of tokens (B, L), as in Doe et al. (2020, link above).

    Attributes:
        size: L.
        states: S.

    Raises:
        ValueError: for a size below 1.
    """
    table: Float[Tensor, "B L"]
    def __init__(self, size): self.size = whole(size, "Law: size", 1)
    @property
    def states(self): return self.size
    def log_prob(self, x: Int[Tensor, "B L"]):
        """Return log-probabilities."""
def draw(law, seed, times: Float[Tensor, " B"] | None = None) -> Int[Tensor, "*sample B L"]:
    """Draw tokens (..., B, L) at times (B,).

    Raises:
        TypeError: for another law.
    """
    _check(law)
def _check(law):
    if not isinstance(law, Law): raise TypeError("draw: law must be a Law")
'''

PLANTED = [
    ("sentence", "Return log-probabilities.", "return log-probabilities."),
    ("sentence", "Return log-probabilities.", "Return log-probabilities"),
    ("sentence", "Return log-probabilities.", "Return log-probabilities. They are finite."),
    ("sentence", '        """Return log-probabilities."""', "        return 0"),
    ("sentence", "        states: S.\n", ""),
    ("shapes", "(B, L), as", "(L, B), as"),
    ("shapes", "at times (B,)", "at times (B, 1)"),
    ("shapes", "Draw tokens (..., B, L)", "Draw tokens (..., B)"),
    ("errors", "    Raises:\n        ValueError: for a size below 1.\n", ""),
    ("errors", "TypeError: for", "ValueError: for"),
    ("errors", "TypeError(", "KeyError("),
    ("links", ", https://arxiv.org/abs/2001.00001", ""),
    ("links", "https://arxiv.org/abs/2001.00001", "https://example.org/2001.00001"),
    ("links", "as in Doe et al. (2020, link above)", "as in Roe (2021)"),
    ("links", "(2020, link above)", "(link above)"),
]


@pytest.mark.parametrize(("rule", "old", "new"), [("", "", ""), *PLANTED])
def test_each_rule_finds_its_planted_faults(rule: str, old: str, new: str, library: Library) -> None:
    checks = next(name for name in library.trees if name.endswith(".checks"))
    assert SOUND.count(old) == 1 or not old
    planted = SOUND.replace("discdiff.checks", checks).replace(old, new)
    found = faults(Library({"planted": planted, checks: ast.unparse(library.trees[checks])}))
    assert {fault.partition(":")[0] for fault in found} == ({rule} if rule else set())
