r"""``discdiff verify``: compare operators and processes, given by name, with exact laws.

    discdiff verify "ancestral >> gibbs"                    an expression of shipped operators
    discdiff verify "mine:Op(2)" --process uniform --json   from a module, with literal arguments
    discdiff verify mine:MyProcess                          a process
    discdiff verify                                         all that is shipped, on every process that it accepts

Text is parsed and never evaluated, but a module that it names is imported.
"""

import argparse
import ast
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from discdiff import theory
from discdiff.operator import Operator
from discdiff.process import Linear, Process
from discdiff.theory.catalogue import KINDS
from discdiff.theory.report import Report

__all__ = ["SHIPPED", "Verdict", "add_arguments", "named", "run", "shipped", "summary_table"]

# Every operator of discdiff.samplers, with each setting that changes its declarations.
SHIPPED = (
    "ancestral", "euler", "tau_leaping", "tau_leaping('reject')", "maximal_coupling", "dfm", "dfm(2.0)", "theta_rk2",
    "theta_trapezoidal", "split_leap", "multistep", "remdm", "remdm(1.0, 'rate')", "renoising", "thinning",
    "uniformization", "gillespie", "first_hitting", "adaptive", "any_order", "unmask", "unmask('max_prob')",
    "reveal(calls=2)", "greedy", "threshold", "entropy_bounded", "kl_stable", "p2", "anchored_remask", "arpc", "gibbs",
    "gibbs(2)", "gibbs(scan='systematic')", "forward_backward", "tau_forward_backward", "repaint", "informed_gibbs",
    "informed_gibbs(exact=True)", "locally_balanced", "tau_locally_balanced", "entropy_redraw", "remask",
    "remask(sites=1)", "ancestral >> gibbs", "ancestral >> gibbs ** 2",
)  # fmt: skip

Parse = Callable[[str], Operator]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument(
        "subject",
        nargs="?",
        metavar="SUBJECT",
        help='what to check: an expression such as "ancestral >> gibbs", or yours from a module that can be imported: '
        'my_module:MyOperator, "my_module:Op(2)", my_module:MyProcess; without it, all operators of discdiff',
    )
    parser.add_argument(
        "--process",
        action="append",
        metavar="KIND",
        help="process to check the operator on, may be repeated: one of "
        f"{', '.join(KINDS)}, or my_module:MyProcess (default: the usual ones; without SUBJECT all)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the random worlds and states")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace, parse: Parse) -> int:
    """Check the subject, print the findings and return the exit status: 1 if a claim does not hold, else 0.

    Raises:
        ValueError: if ``--process`` is given and the subject is a process, or for a seed below 0.
    """
    if arguments.seed < 0:
        raise ValueError(f"--seed: a whole number of at least 0, got {arguments.seed}")
    kinds = None if arguments.process is None else [_kind(text) for text in arguments.process]
    if arguments.subject is None:
        return _all(parse, kinds or list(KINDS), arguments.seed, arguments.json)
    subject = named(arguments.subject, parse)
    if not isinstance(subject, Operator):
        if kinds is not None:
            raise ValueError(f"--process: {arguments.subject} is a process itself")
        report = theory.check_process(subject)
    else:
        report = theory.check_operator(subject, processes=kinds, seed=arguments.seed)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        _show(report)
    return 0 if report.ok else 1


def named(text: str, parse: Parse) -> Operator | Process:
    """Return the operator or process that a text names.

    Args:
        text: module:name or module:name(literals); anything else is an expression for ``parse``. A process class
            gets vocab_size=3 and a linear schedule unless the text gives them.
        parse: parses expressions of shipped operators.

    Raises:
        ValueError: if the module cannot be imported or has no such name, if arguments are not literals, or if the
            object is neither an operator nor a process.
    """
    if not re.match(r"[\w.]+:", text):
        return parse(text)
    module, _, expression = text.partition(":")
    name, args, keywords = _call(expression, text)
    sys.path.insert(0, "")  # as ``python -m`` does
    try:
        held = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"verify: cannot import {module!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not hasattr(held, name):
        raise ValueError(f"verify: {module} has no {name!r}")
    found = getattr(held, name)
    if args is not None or isinstance(found, type):
        found = _made(found, args or [], keywords, name)
    if not isinstance(found, Operator | Process):
        raise ValueError(f"verify: {text} is {found!r}, which is no Operator and no Process")
    return found


def _call(expression: str, text: str) -> tuple[str, list[object] | None, dict[str, object]]:
    """Return the name, the positional and the keyword arguments of a call with literals.

    For a name without a call the arguments are None and {}.
    """
    try:
        match ast.parse(expression.strip(), mode="eval").body:
            case ast.Name(id=name):
                return name, None, {}
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                named = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in keywords}
                return name, [ast.literal_eval(arg) for arg in args], named
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"verify: cannot read {expression!r} in {text!r}; accepted: module:name or module:name(literals)")


def _made(kind: object, args: Sequence[object], keywords: dict[str, object], name: str) -> object:
    if not callable(kind):
        raise ValueError(f"verify: {name} is {kind!r}, which takes no arguments")
    try:
        given = dict(keywords)
        if isinstance(kind, type) and issubclass(kind, Process):
            signature = inspect.signature(kind)
            bound = signature.bind_partial(*args, **keywords).arguments
            given |= {
                key: value
                for key, value in (("vocab_size", 3), ("schedule", Linear()))
                if key in signature.parameters and key not in bound
            }
        build: Callable[..., object] = kind
        return build(*args, **given)
    except TypeError as error:
        raise ValueError(
            f"verify: {name} needs other arguments ({error}); give literals or name an instance"
        ) from error


def _kind(text: str) -> str | Process:
    if ":" not in text:
        return text  # the check looks up the name
    found = named(text, lambda _: Operator)  # type: ignore[arg-type, return-value]
    if isinstance(found, Operator | type):
        raise ValueError(f"--process: {text} is {found!r}, which is no Process")
    return found


def _show(report: Report) -> None:
    console = Console()
    console.print(report.subject, highlight=False, markup=False)
    colours = {"ok": "green", "FAIL": "red", "not checked": "yellow"}
    for group, checks in report.groups.items():
        table = Table("", "claim", "seen", "allowed", "where", title=group or None, title_justify="left")
        for check in checks:
            seen = (f"{check.error:.2g}", f"{check.allowed:.2g}") if check.checked else ("", "")
            where = "" if check.ok else check.where + (f"; look at {check.hint}" if check.hint and check.failed else "")
            table.add_row(f"[{colours[check.mark]}]{check.mark}[/]", check.name, *seen, where)
        console.print(table)
    console.print(f"{len(report.checks)} claims: {report.summary}", highlight=False)


# --- all shipped operators --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Findings for one operator on one kind of process; ``report`` is None if the operator refuses the process."""

    operator: str
    kind: str
    report: Report | None

    def __str__(self) -> str:
        if self.report is None:
            return "–"  # noqa: RUF001
        held = sum(check.ok for check in self.report.checks)
        failed, unchecked = len(self.report.failed), len(self.report.unchecked)
        return f"**{failed} fail**" if failed else f"{held}" + (f" ({unchecked} not checked)" if unchecked else "")


def shipped(
    parse: Parse, kinds: Sequence[str | Process], seed: int = 0, only: Sequence[str] = SHIPPED
) -> Iterator[Verdict]:
    """Yield the verdict of each operator on each kind of process, including those that it refuses.

    ``only`` names the operators; the default is all shipped ones.

    Raises:
        ValueError: where ``theory.check_operator`` raises it, but not for a process that the operator refuses.
    """
    for text in only:
        operator = parse(text)
        for kind in kinds:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    report = theory.check_operator(operator, processes=[kind], seed=seed)
            except ValueError as error:
                if "accepts none" not in str(error):
                    raise
                report = None
            yield Verdict(text, kind if isinstance(kind, str) else repr(kind), report)


def summary_table(verdicts: Sequence[Verdict]) -> list[list[str]]:
    """Return a table of text: a header row, then a row for each operator; a column for each kind of process."""
    kinds = list(dict.fromkeys(verdict.kind for verdict in verdicts))
    rows = [["operator", *kinds]]
    for operator in dict.fromkeys(verdict.operator for verdict in verdicts):
        said = {verdict.kind: str(verdict) for verdict in verdicts if verdict.operator == operator}
        rows.append([operator, *(said[kind] for kind in kinds)])
    return rows


def _all(parse: Parse, kinds: Sequence[str | Process], seed: int, as_json: bool) -> int:
    verdicts, error = [], Console(stderr=True)
    for verdict in shipped(parse, kinds, seed):
        verdicts.append(verdict)
        if verdict.report is not None:
            error.print(f"{verdict.operator} on {verdict.kind}: {verdict.report.summary}", highlight=False, style="dim")
    reports = [verdict.report for verdict in verdicts if verdict.report is not None]
    if as_json:
        print(json.dumps([report.as_json() for report in reports], indent=1))
    else:
        heading, *rows = summary_table(verdicts)
        table = Table(*heading)
        for row in rows:
            table.add_row(*row)
        console = Console()
        console.print(table)
        for report in reports:
            if not report.ok:
                console.print(str(report), highlight=False, markup=False)
        checks = [check for report in reports for check in report.checks]
        counts = sum(c.ok for c in checks), sum(c.failed for c in checks), sum(not c.checked for c in checks)
        console.print("{} hold, {} do not hold, {} not checked".format(*counts), highlight=False)
    return 0 if all(report.ok for report in reports) else 1
