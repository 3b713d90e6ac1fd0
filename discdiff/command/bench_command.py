"""``discdiff bench``: time a step, compare steps with their goals, or check that no step has become slower."""

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from discdiff.checks import affordable, placed, whole
from discdiff.command import bench, bench_check, bench_goals

__all__ = ["add_arguments", "run"]

_WIDTH = 120  # of tables in a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--goals",
        action="store_true",
        help="instead of one step: compare steps at small sizes with plain torch's and other packages', and each "
        "promise about cost with what is measured; takes some minutes",
    )
    what.add_argument(
        "--check",
        action="store_true",
        help="instead of one step: compare with the ratios that are stored in the package; the exit status is 1 if a "
        "step takes over twice its ratio; takes half a minute and needs a C compiler",
    )
    one = parser.add_argument_group("one step (without --goals and --check)")
    one.add_argument("--batch", metavar="N", type=int, default=8, help="sequences")
    one.add_argument("--length", metavar="N", type=int, default=256, help="tokens of a sequence")
    one.add_argument("--vocab", metavar="N", type=int, default=50257, help="size of the vocabulary")
    one.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="type of the logits"
    )
    one.add_argument("--device", metavar="NAME", default="cpu", help="where to run, for instance cuda")
    one.add_argument(
        "--peers", action="store_true", help="time other packages' steps too (pip install 'discdiff[bench]')"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=9, help="how often each case is timed")
    parser.add_argument("--json", metavar="FILE", type=Path, default=None, help="file to write the figures to")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the figures and return the exit status: 1 if ``--check`` finds a slower step, else 0.

    Raises:
        TypeError, ValueError: if --batch, --length, --vocab or --rounds is not a whole number of at least 1; for a
            device that this machine does not have, or logits that exceed its memory.
    """
    for name in ("batch", "length", "vocab", "rounds"):
        whole(getattr(arguments, name), f"--{name}", 1)
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    slower: list[bench_check.Slower] = []
    figures: dict[str, object]
    if arguments.check:
        _say(console)
        if bench.machine()["row pass"] != "native":
            console.print("no C compiler: nothing is compared, the stored ratios are of compiled code", soft_wrap=True)
            return 0
        slower, ratios = bench_check.check(arguments.rounds)
        figures = {"machine": bench.machine(), "ratios": ratios}
        for one in slower:
            console.print(f"slower: {one}", highlight=False, soft_wrap=True)
        console.print(f"{len(ratios)} ratios, {len(slower)} over twice the stored one", highlight=False)
    elif arguments.goals:
        aside = Console(stderr=True, style="dim", highlight=False)
        figures = bench_goals.figures(arguments.rounds, aside.print)
        _say(console)
        for table in bench_goals.tables(figures):
            _show(console, table)
    else:
        figures = _one_step(arguments, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if slower else 0


def _one_step(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    placed(arguments.device, "--device")
    affordable(arguments.batch * arguments.length * arguments.vocab, "bench: logits of this size")
    problem = bench.Problem(
        arguments.batch, arguments.length, arguments.vocab, dtype=arguments.dtype, device=arguments.device
    )
    results = bench.measure(bench.cases(problem, problem.logits(), peers=arguments.peers), arguments.rounds)
    rows = [(r.name, f"{r.milliseconds:.1f}", f"{r.reads:.2f}", f"{r.peak_mib:.1f}") for r in results]
    _say(console)
    _show(console, bench_goals.Tabled("", ["case", "ms", "reads of the logits", "MiB allocated"], rows))
    return bench.report(problem, results)


def _say(console: Console) -> None:
    console.print(", ".join(f"{name}: {value}" for name, value in bench.machine().items()), highlight=False)


def _show(console: Console, table: bench_goals.Tabled) -> None:
    shown = Table(*table.header, title=table.title or None, title_justify="left")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)
