"""The ``discdiff`` command."""

import argparse
import importlib
import inspect
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from discdiff import plots, samplers
from discdiff.adapters.diagnostics import sensitivity_curve
from discdiff.adapters.loading import every_family
from discdiff.adapters.own import load_trained
from discdiff.checks import LAST_SEED, affordable, whole
from discdiff.command import bench_command, demo_command, doctor, sample_command, train_command, verify
from discdiff.command.arguments import Formatter, Parser
from discdiff.command.pictures import check_out, picture, pyplot_without_window
from discdiff.demo.data import ASSETS, GREY_LEVELS, SIDE, examples, text
from discdiff.operator import Operator
from discdiff.plugins import plugged
from discdiff.process import Process
from discdiff.samplers.expression import known_operators, parse_operator
from discdiff.sampling import Blockwise, Sampler, Samples

__all__ = ["main", "parse_operator"]


BLOCK, WINDOW = 16, 128  # of the text example
_MANY = 1 << 20  # the largest number accepted for any count
_Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
_ABOUT = "Discrete diffusion samplers that are checked against exact laws."
_FIRST = """first commands:
  discdiff demo                                                draw a labelled sheet, in half a minute
  discdiff sample text --sampler "ancestral >> gibbs"          print samples of a small network
  discdiff verify "ancestral >> gibbs" --process uniform       check a sampler against exact laws
  discdiff COMMAND --help                                      show the options of a command
"""
_OPERATORS = """

An OPERATOR is a name of "discdiff list", perhaps with arguments: ancestral, gibbs(sites=4).
A >> B does A, then B. A ** 3 does A three times. A step has one predictor, such as ancestral,
and any number of correctors, such as gibbs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(sample_command.named(sys.argv[1:] if argv is None else argv))
    try:
        return _RUN[arguments.command](arguments) or 0
    except (ValueError, TypeError, ImportError, OSError, MemoryError) as error:
        print(f"discdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    parser = Parser(prog="discdiff", description=_ABOUT, epilog=_FIRST, formatter_class=Formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(to: _Commands, name: str, told: str, more: str = "", after: str = "") -> Parser:
        about = textwrap.fill(f"{told[0].upper()}{told[1:]}. {more}", 100) + after
        return to.add_parser(name, help=told, description=about, formatter_class=Formatter)

    demo_command.add_arguments(add(commands, "demo", "draw a labelled sheet of what samplers do; start here"))
    train_command.add_arguments(add(commands, "train", "train a small network on a text or an array"))
    sample = add(
        commands, "sample", "sample from small networks that come with the package, or from a folder of discdiff train"
    )
    data = sample.add_subparsers(dest="data", required=True, metavar="DATA")
    for name, steps, batch in (("digits", "32", 40), ("text", "64, or the size of a block", 4)):
        kinds = {"digits": "digits of 8 x 8 pixels, as a picture", "text": "English text, character by character"}
        one = add(data, name, f"sample {kinds[name]}", after=_OPERATORS)
        one.add_argument("--process", choices=["masked", "uniform"], default="masked", help="forward process")
        one.add_argument(
            "--sampler", metavar="OPERATOR", default="ancestral", help='one step, for instance "ancestral >> gibbs(4)"'
        )
        one.add_argument(
            "--corrector",
            metavar="OPERATOR",
            default=argparse.SUPPRESS,
            help="operator to apply after every step, for instance gibbs; arpc instead guides every step but the last",
        )
        one.add_argument(
            "--steps",
            metavar="N",
            type=int,
            default=argparse.SUPPRESS,
            help=f"number of steps, equal in time from t = 1 to 0; with --blocks, of each block (default: {steps})",
        )
        one.add_argument("--batch", metavar="N", type=int, default=batch, help="number of samples")
        one.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed gives the same samples")
    digits, text = data.choices["digits"], data.choices["text"]
    digits.add_argument("--out", metavar="FILE", type=Path, default=Path("digits.png"), help="picture to write")
    text.add_argument(
        "--blocks",
        metavar="N",
        type=int,
        default=argparse.SUPPRESS,
        help="generate from left to right, N characters at once, with another network; it was trained on blocks of "
        f"{BLOCK} and of 1",
    )
    text.add_argument(
        "--length",
        metavar="N",
        type=int,
        default=WINDOW,
        help=f"characters of a sample; more than {WINDOW} only with --blocks",
    )
    text.add_argument("--prompt", metavar="TEXT", default="", help="what each sample begins with")
    text.add_argument("--out", metavar="FILE", type=Path, default=None, help="file to write, instead of printing")
    sample_command.add_arguments(
        data.add_parser(
            sample_command.FOLDER,
            help="the name of a folder that discdiff train wrote; discdiff sample folder --help shows its options",
            usage="discdiff sample FOLDER [options]",
            description="Sample from a network that discdiff train wrote.",
            formatter_class=Formatter,
        )
    )
    probe = add(
        commands,
        "sensitivity",
        "tell whether a network of a uniform process predicts the denoiser or the leave-one-out",
        "It replaces one token and measures how much the prediction at that site changes. The reading that changes "
        "less is right.",
    )
    probe.add_argument("data", metavar="DATA", choices=["digits", "text"], help="its training data: digits or text")
    probe.add_argument(
        "--weights", metavar="FILE", type=Path, default=None, help="file of weights to test, instead of the example's"
    )
    probe.add_argument("--rows", metavar="N", type=int, default=256, help="noised examples at each noise level")
    probe.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed gives the same figures")
    probe.add_argument("--out", metavar="FILE", type=Path, default=Path("sensitivity.png"), help="plot to write")
    verify.add_arguments(
        add(
            commands,
            "verify",
            "check what operators and processes claim, yours too, against exact laws",
            "The exit status is 1 if a claim does not hold.",
        )
    )
    add(commands, "list", "show all operators, processes and families of checkpoints, with those of plug-ins")
    bench_command.add_arguments(add(commands, "bench", "time the steps of samplers on this machine"))
    doctor.add_arguments(
        add(
            commands,
            "doctor",
            "check this installation: versions, compiler, GPU, caches and a self-test",
            "The exit status is 1 if something is wrong; the remedy is printed.",
        )
    )
    return parser


def _digits(arguments: argparse.Namespace) -> None:
    pyplot, out = pyplot_without_window(), arguments.out
    check_out(out, pyplot)
    samples = _run(arguments, SIDE * SIDE, torch.zeros(0, dtype=torch.int64))
    pyplot.imsave(out, picture(samples.tokens).numpy(), cmap="gray_r", vmin=0, vmax=GREY_LEVELS - 1)
    print(f"wrote {out}")


def _text(arguments: argparse.Namespace) -> None:
    _, vocabulary = text()
    if arguments.out is not None:
        check_out(arguments.out)
    try:
        prompt = vocabulary.encode(arguments.prompt)
    except ValueError as error:
        raise ValueError(f"--prompt: {error}") from error
    if len(prompt) > arguments.length > 0:
        raise ValueError(f"--prompt: has {len(prompt)} characters, and --length is {arguments.length}")
    if "blocks" not in arguments and arguments.length > WINDOW:
        raise ValueError(
            f"--length: without --blocks the network takes at most {WINDOW} tokens, got {arguments.length}"
        )
    samples = _run(arguments, arguments.length, prompt)
    lines = "\n\n".join(vocabulary.decode(row) for row in samples.tokens)
    if arguments.out is None:
        print(lines)
    else:
        arguments.out.write_text(lines + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


def _sensitivity(arguments: argparse.Namespace) -> None:
    pyplot = pyplot_without_window()
    check_out(arguments.out, pyplot)
    rows, seed = whole(arguments.rows, "--rows", 2, _MANY), whole(arguments.seed, "--seed", 0, LAST_SEED)
    alphas = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    if arguments.weights is not None and not arguments.weights.is_file():
        raise ValueError(f"--weights: there is no file {arguments.weights}")
    model = load_trained(arguments.weights or ASSETS / f"{arguments.data}-uniform.safetensors")
    size = GREY_LEVELS if arguments.data == "digits" else len(text()[1])
    if model.process.vocab_size != size:
        raise ValueError(
            f"--weights: {arguments.weights} is of a network with a vocabulary of {model.process.vocab_size}, "
            f"and {arguments.data} has {size} tokens"
        )
    x0 = examples(arguments.data, rows, torch.Generator().manual_seed(seed))
    curves = sensitivity_curve(model, x0, alphas, seed)
    table = Table("alpha", *(f"read as {predicts}" for predicts in curves))
    for n, alpha in enumerate(alphas):
        cells = (f"{mean:.4f} ± {error:.4f}" for mean, error in (curve[n].tolist() for curve in curves.values()))
        table.add_row(f"{alpha:g}", *cells)
    console = Console()
    console.print(
        f"{model}\nTV of O(. | z) when the site's own token is replaced; 0 for a leave-one-out", highlight=False
    )
    console.print(table)
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    plots.loo_sensitivity(curves, alphas, axis, declared=model.predicts)
    axis.set_title(f"Sensitivity of the leave-one-out prediction: {arguments.data}")
    figure.savefig(arguments.out, dpi=110)
    pyplot.close(figure)
    print(f"wrote {arguments.out}")


def _list(arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, soft_wrap=True)
    operators, broken = known_operators()
    table = Table("operator", "moves", "order", "keeps p_t", "calls a step")
    for name, kind in sorted(operators.items()):
        try:
            made: Operator | None = kind()
        except TypeError:
            made = None  # its constructor needs arguments
        if made is None:
            table.add_row(f"{name}{inspect.signature(kind)}", "", "", "", "")
        else:
            said = (made.order, made.invariant, made.nfe) if not made.moves else (made.order, "", made.nfe)
            table.add_row(name, "t to s" if made.moves else "", *("" if part is None else str(part) for part in said))
    console.print(table)
    more, faults = plugged("processes")
    here = importlib.import_module("discdiff")
    own = (getattr(here, name) for name in here.__all__)
    processes = sorted({one.__name__ for one in own if isinstance(one, type) and issubclass(one, Process)} | set(more))
    console.print(f"processes: {', '.join(name for name in processes if name not in ('Process', 'RankOne'))}")
    families = Table("family", "what it is")
    for family in every_family():
        families.add_row(family.name, family.about)
    console.print(families)
    for name, error in (broken | faults | plugged("families")[1]).items():
        print(f"discdiff: the plug-in {name!r} cannot be used: {error}", file=sys.stderr)


def _sample(arguments: argparse.Namespace) -> None:
    {"digits": _digits, "text": _text, sample_command.FOLDER: sample_command.run}[arguments.data](arguments)


def _verify(arguments: argparse.Namespace) -> int:
    return verify.run(arguments, partial(parse_operator, option="verify"))


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        check_out(arguments.json, option="--json")
    return bench_command.run(arguments)


def _run(arguments: argparse.Namespace, length: int, prompt: Int[Tensor, " P"]) -> Samples:
    block = getattr(arguments, "blocks", None)
    name = f"{arguments.data}{'' if block is None else '-blocks'}-{arguments.process}"
    for option, most in (("batch", _MANY), ("steps", _MANY), ("blocks", length), ("length", _MANY)):
        if option in arguments:
            whole(getattr(arguments, option), f"--{option}", 1, most)
    whole(arguments.seed, "--seed", 0, LAST_SEED)
    model = load_trained(ASSETS / f"{name}.safetensors")
    affordable(arguments.batch * length * model.process.vocab_size, f"a batch of {arguments.batch} such samples")
    steps = getattr(arguments, "steps", 32 if arguments.data == "digits" else block or 64)
    operator = parse_operator(arguments.sampler)
    if "corrector" in arguments:
        corrector = parse_operator(arguments.corrector, "--corrector")
        operator = corrector.scheduled(steps) if isinstance(corrector, samplers.ARPC) else operator >> corrector
    make: Callable[[], Samples]
    sampler: Sampler | Blockwise
    if block is None:
        sampler = Sampler(model.process, model, operator, steps=steps)
        make = partial(sampler.sample, arguments.batch, length, seed=arguments.seed, prompt=prompt, progress=True)
    else:
        window = WINDOW if length > WINDOW else None
        sampler = Blockwise(model.process, model, operator, block=block, steps=steps, window=window)
        make = partial(sampler.sample, arguments.batch, length, seed=arguments.seed, prompt=prompt)
    console = Console(stderr=True)
    console.print(repr(sampler), style="dim", highlight=False, markup=False, soft_wrap=True)
    start = time.perf_counter()
    samples = make()
    seconds = time.perf_counter() - start
    rate = samples.tokens.numel() / seconds
    console.print(f"nfe {samples.nfe}, {seconds:.2f} s, {rate:,.0f} tokens/s", highlight=False)
    return samples


_RUN: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo": demo_command.run,
    "train": train_command.run,
    "sample": _sample,
    "sensitivity": _sensitivity,
    "verify": _verify,
    "list": _list,
    "bench": _bench,
    "doctor": doctor.run,
}

if __name__ == "__main__":
    sys.exit(main())
