"""Write the reference: a page for each public name, with its facts and pictures, and the lists of names."""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import commands
import facts
import pictures as examples
from docstrings import converted
from names import Name, public

import discdiff as dd
from discdiff.denoiser import Guide
from discdiff.operator import Corrector, Operator

GROUPS = {
    "processes": ("Processes", "How clean tokens become noise."),
    "schedules": ("Schedules and grids", "How fast tokens become noise, and at which times a sampler stops."),
    "predictors": ("Predictors", "Operators that move a state from time t to an earlier time s."),
    "correctors": ("Correctors", "Operators that move a state at a fixed time, and keep its law or come close to it."),
    "guides": ("Guides", "Changes of a prediction, which compose with every operator."),
    "denoisers": ("Denoisers and predictions", "Networks, how they are called, and what they say."),
    "sampling": ("Sampling", "The loop over a grid, and what it returns."),
    "losses": ("Losses", "Training objectives, and bounds on the likelihood."),
    "theory": ("Exact theory", "Perfect denoisers without training, exact laws, and checks."),
    "checkpoints": ("Checkpoints and diagnostics", "Networks that somebody trained, and what they have learned."),
    "training": ("Training", "Train a network of your own."),
    "plots": ("Plots", "Pictures of what is measured."),
    "programs": ("Writing operators", "What an operator, a guide or a choice of your own is made of."),
    "kernels": ("Kernels", "Keyed random words, and passes over rows of logits."),
}
BY_DOOR = {
    "discdiff.theory": "theory", "discdiff.theory.fit": "theory", "discdiff.losses": "losses",
    "discdiff.kernels": "kernels", "discdiff.diagnostics": "checkpoints", "discdiff.bridge": "denoisers",
    "discdiff.grid": "schedules", "discdiff.sampling": "sampling", "discdiff.guidance": "guides",
    "discdiff.prediction": "denoisers", "discdiff.denoiser": "denoisers", "discdiff.operator": "programs",
    "discdiff.choices": "programs", "discdiff.adapters": "checkpoints", "discdiff.learning": "training",
    "discdiff.plots": "plots",
}  # fmt: skip
GUIDING = {"GaussianNoise", "LevelNoise", "Measurement", "Truncation", "classifier_free", "variational_posterior"}
LOADING = {"Convention", "generate", "load", "probe", "quantize"}
PROGRAMS = {"Coins", "Tokens", "Subset", "Ranking", "PointMixture", "At", "State", "choose"}


def group(one: Name) -> str:
    """Return the group of a name: by its class, else by the room that defines it, else by its door."""
    value = one.value
    if inspect.isclass(value):
        if issubclass(value, Operator) and one.door == "discdiff.samplers":
            return "correctors" if issubclass(value, Corrector) else "predictors"
        for base, name in ((dd.Process, "processes"), (dd.Schedule, "schedules"), (Guide, "guides")):
            if issubclass(value, base):
                return name
    if one.name in GUIDING:
        return "guides"
    if one.name in LOADING:
        return "checkpoints"
    if one.name in PROGRAMS:
        return "programs"
    if one.door == "discdiff":
        room = ".".join(str(getattr(value, "__module__", "")).split(".")[:2])
        return "processes" if room == "discdiff.process" else BY_DOOR.get(room, "sampling")
    return "processes" if one.door == "discdiff.process" else BY_DOOR.get(one.door, "sampling")


def grouped() -> dict[str, list[Name]]:
    """Map each group that is not empty to its names."""
    found: dict[str, list[Name]] = {key: [] for key in GROUPS}
    for one in public().values():
        found[group(one)].append(one)
    return {key: sorted(names, key=lambda one: one.name.lower()) for key, names in found.items() if names}


def first_line(one: Name) -> str:
    """Return the first line of an object's own docstring, or the text of a constant."""
    if one.kind == "data":
        return f"``{str(one.value)[:60]}``"
    return (inspect.getdoc(one.value) or "").partition("\n")[0]


def list_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'* -' if k == 0 else '  -'} {cell}" for k, cell in enumerate(row)]
    return [*lines, ""]


def _heading(text: str, mark: str) -> list[str]:
    return [text, mark * len(text), ""]


def _theory(one: Name) -> list[str]:
    """Return the docstring of the module that defines an operator, a process or a guide: formula and source."""
    module = inspect.getmodule(one.value)
    return [*converted(inspect.cleandoc(module.__doc__).splitlines()), ""] if module and module.__doc__ else []


def _measured(name: str) -> Iterator[str]:
    if rows := facts.declared(name):
        yield from _heading("What it declares", "-")
        yield from list_table(facts.DECLARED, rows)
        yield "*Order* is that of the total variation from t = 0.95 to 0.1, with exact predictions. *Exact matrix* says"
        yield "whether ``T.kernel`` enumerates it; *weights* whether ``sampler.log_prob`` can weigh its runs under"
        yield "another network."
        yield ""
        yield from _heading("Checked against exact laws", "-")
        yield from list_table(("setting", "processes, and claims that hold", "refused"), facts.checked(name))
        yield "These are the cells of :doc:`/verified`, where the claims are listed."
        yield ""
    if rows := facts.small(name):
        yield from _heading("Measured orders", "-")
        yield from list_table(("setting", "law", "slope inside", "end to end", "KL at 8, 16, 32, 64 calls"), rows)
    if rows := facts.long(name):
        yield from list_table(("setting, 256 sites", "law", facts.LONG), rows)
    if facts.small(name):
        yield "From :doc:`/predictors`, which says how they are measured and which sampler is ahead."
        yield ""
    if rows := facts.kept(name):
        yield from _heading("What it keeps, measured", "-")
        yield from list_table(facts.kept_on(), rows)
        yield "In each cell: total variation from p_t after one move, and of the law that is kept; the probability of a"
        yield "move; the spectral gap for each call. From :doc:`/correctors`."
        yield ""


def _known(one: Name, where: str) -> Iterator[str]:
    """Return what is known of a process or a guide, from an example of it."""
    if where == "processes" and one.name in examples.processes():
        yield from _heading("What it is", "-")
        yield from list_table(("property", "value"), facts.of_process(examples.processes()[one.name]))
        yield f"Checked against exact laws on it: {', '.join(f'``{text}``' for text in facts.accepted(one.name))}."
        yield ""
    elif where == "guides" and (guide := examples.guide(one.name)) is not None:
        yield from _heading("What it declares", "-")
        yield from list_table(("property", "value"), facts.of_guide(guide))


def page(one: Name, pictures: dict[str, str]) -> str:
    """Return the page of a name. ``pictures`` maps names to the caption of their picture."""
    where = group(one)
    # Hundreds of names in the sidebar of every page would take minutes to write; the lists of names lead to them.
    lines = [":orphan:", "", f".. index:: {one.name}", "", *_heading(one.name, "=")]
    lines += [f".. currentmodule:: {one.door}", ""]
    lines += [f":doc:`Reference <index>` / :doc:`{GROUPS[where][0]} <{where}>`", ""]
    operator = where in ("predictors", "correctors")
    if operator or where in ("processes", "guides"):
        lines += _theory(one)
    if one.name in pictures and (operator or where in ("processes", "guides")):
        lines += [f".. figure:: /pictures/{one.name}.png", f"   :alt: {pictures[one.name]}", ""]
        lines += [f"   {pictures[one.name]}", ""]
    known = list(_measured(one.name) if operator else _known(one, where))
    if known:
        lines += [*known, *_heading("The class", "-")]
    options = ["   :members:", "   :show-inheritance:"] if one.kind == "class" else []
    lines += [f".. auto{one.kind}:: {one.name if one.kind != 'module' else one.address}", *options, ""]
    if one.kind == "data":
        lines += [f"   A constant or an alias of a type, offered by ``{one.door}``.", ""]
    return "\n".join(lines)


def listing(key: str, names: list[Name]) -> str:
    """Return the page that lists the names of a group."""
    title, says = GROUPS[key]
    lines = [*_heading(title, "="), says, ""]
    lines += list_table(
        ("name", "what it does"),
        ([f":doc:`{one.address} </reference/{one.address}>`", escaped_first(one)] for one in names),
    )
    return "\n".join(lines)


def escaped_first(one: Name) -> str:
    """Return the first line of a docstring as reStructuredText."""
    return first_line(one) if one.kind == "data" else converted([first_line(one)])[0]


def write(folder: Path, pictures: dict[str, str]) -> int:
    """Write all pages of the reference into a folder, and return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    found = grouped()
    lines = [*_heading("Reference", "="), "Every public name, from the code: signature, shapes, errors and source.", ""]
    lines += [".. toctree::", "   :maxdepth: 1", "", *(f"   {key}" for key in found), "   command", ""]
    (folder / "command.rst").write_text(commands.page())
    (folder / "index.rst").write_text("\n".join(lines))
    for key, names in found.items():
        (folder / f"{key}.rst").write_text(listing(key, names))
        for one in names:
            (folder / f"{one.address}.rst").write_text(page(one, pictures))
    return 2 + len(found) + sum(map(len, found.values()))
