"""The ``discdiff`` command."""

import argparse
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from discdiff import samplers
from discdiff.adapters.diagnostics import sensitivity_curve
from discdiff.adapters.loading import every_family
from discdiff.adapters.own import load_trained
from discdiff.checks import LAST_SEED, affordable, whole
from discdiff.command import bench_command, sample_command, train_command, verify
from discdiff.demo.data import ASSETS, GREY_LEVELS, SIDE, examples, text
from discdiff.operator import Operator
from discdiff.plugins import plugged
from discdiff.process import Process
from discdiff.samplers.expression import known_operators, parse_operator
from discdiff.sampling import Blockwise, Sampler, Samples

__all__ = ["main", "parse_operator"]


BLOCK, WINDOW = 16, 128  # of the text example
_MANY = 1 << 20  # the largest number accepted for any count


class _Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"discdiff: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _Parser(prog="discdiff", description="Discrete diffusion samplers that are checked against exact laws.")
    commands = parser.add_subparsers(dest="command", required=True)
    train_command.add_arguments(commands.add_parser("train", help="train a small network on a text or an array"))
    sample = commands.add_parser("sample", help="sample from a trained example, or from a folder of discdiff train")
    data = sample.add_subparsers(dest="data", required=True, metavar="{digits,text,FOLDER}")
    for name, steps, batch in (("digits", "32", 40), ("text", "64, or the size of a block", 4)):
        one = data.add_parser(name, help=f"sample {name}", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        one.add_argument("--process", choices=["masked", "uniform"], default="masked", help="forward process")
        one.add_argument(
            "--sampler", default="ancestral", help='operator of a step, for instance "ancestral >> gibbs(sites=4)"'
        )
        one.add_argument(
            "--corrector",
            default=argparse.SUPPRESS,
            help="operator after every step; or arpc, in whose place every step but the last is a guided one",
        )
        one.add_argument(
            "--steps",
            type=int,
            default=argparse.SUPPRESS,
            help=f"equal steps of t from 1 to 0, of each block if there are blocks (default: {steps})",
        )
        one.add_argument("--batch", type=int, default=batch, help="how many")
        one.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples")
    data.choices["digits"].add_argument("--out", type=Path, default=Path("digits.png"), help="picture to write")
    data.choices["text"].add_argument(
        "--blocks",
        type=int,
        default=argparse.SUPPRESS,
        help=f"characters that are denoised at once, by a transformer that was trained on blocks of {BLOCK} and of 1",
    )
    data.choices["text"].add_argument(
        "--length", type=int, default=WINDOW, help=f"characters; more than {WINDOW} only with --blocks"
    )
    data.choices["text"].add_argument("--prompt", default="", help="text to begin with")
    data.choices["text"].add_argument("--out", type=Path, default=None, help="file to write; otherwise print")
    sample_command.add_arguments(
        data.add_parser(
            sample_command.FOLDER,
            help="the name of a folder that discdiff train wrote; discdiff sample folder --help shows its options",
            usage="discdiff sample FOLDER [options]",
            description="Sample from a network that discdiff train wrote.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    probe = commands.add_parser(
        "sensitivity",
        help="how much a leave-one-out prediction looks at the token it leaves out",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    probe.add_argument("data", choices=["digits", "text"], help="what the weights were trained on")
    probe.add_argument("--weights", type=Path, default=None, help="file of save_trained; else the example's")
    probe.add_argument("--rows", type=int, default=256, help="noised examples at each noise level")
    probe.add_argument("--seed", type=int, default=0, help="the same seed gives the same figures")
    probe.add_argument("--out", type=Path, default=Path("sensitivity.png"), help="plot to write")
    bench_command.add_arguments(
        commands.add_parser(
            "bench",
            help="time steps beside one read of the logits, plain steps and other packages' steps",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    verify.add_arguments(
        commands.add_parser("verify", help="check operators' declarations, and processes, against exact laws")
    )
    commands.add_parser("list", help="operators, processes and families of checkpoints, other packages' among them")
    arguments = parser.parse_args(sample_command.named(sys.argv[1:] if argv is None else argv))
    try:
        if arguments.command == "verify":
            return verify.run(arguments, partial(parse_operator, option="verify"))
        if arguments.command == "bench":
            return _bench(arguments)
        sampling = {"digits": _digits, "text": _text, sample_command.FOLDER: sample_command.run}
        named = {"sensitivity": _sensitivity, "list": _list, "train": train_command.run}
        run = named[arguments.command] if arguments.command in named else sampling[arguments.data]
        run(arguments)
    except (ValueError, TypeError, ImportError, OSError, MemoryError) as error:
        print(f"discdiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _digits(arguments: argparse.Namespace) -> None:
    pyplot, out = _pyplot(), arguments.out
    _check_out(out, pyplot)
    samples = _run(arguments, SIDE * SIDE, torch.zeros(0, dtype=torch.int64))
    pyplot.imsave(out, picture(samples.tokens).numpy(), cmap="gray_r", vmin=0, vmax=GREY_LEVELS - 1)
    print(f"wrote {out}")


def picture(tokens: Int[Tensor, "B 64"], columns: int = 10, zoom: int = 6, gap: int = 1) -> Int[Tensor, "H W"]:
    """Arrange images (B, 64) in a picture (H, W), ``columns`` in a row, with magnified pixels and white gaps."""
    columns = min(columns, len(tokens))
    rows = -(-len(tokens) // columns)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, rows * columns - len(tokens)))
    tiles = torch.nn.functional.pad(padded.view(-1, SIDE, SIDE), (gap, gap, gap, gap))
    side = SIDE + 2 * gap
    grid = tiles.view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    return grid.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def _text(arguments: argparse.Namespace) -> None:
    _, vocabulary = text()
    if arguments.out is not None:
        _check_out(arguments.out)
    prompt = vocabulary.encode(arguments.prompt)
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
    pyplot = _pyplot()
    _check_out(arguments.out, pyplot)
    rows, seed = whole(arguments.rows, "--rows", 2, _MANY), whole(arguments.seed, "--seed", 0, LAST_SEED)
    alphas = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
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
    for predicts, curve in curves.items():
        declared = ", as declared" if predicts == model.predicts else ""
        axis.errorbar(alphas, curve[:, 0], curve[:, 1], marker="o", capsize=2, label=f"read as {predicts}{declared}")
    axis.set(xlabel="alpha", ylabel="TV when the site's own token is replaced", ylim=(0, None))
    axis.set_title(f"Sensitivity of the leave-one-out: {arguments.data}")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(arguments.out, dpi=110)
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


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'discdiff[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _check_out(out: Path, pyplot: ModuleType | None = None, option: str = "--out") -> None:
    """Raise ValueError for an unsuitable output path; called before the work starts."""
    if not out.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {out.parent}")
    if out.is_dir():
        raise ValueError(f"{option}: {out} is a folder, and a file is to be written")
    if pyplot is not None:
        kinds = pyplot.gcf().canvas.get_supported_filetypes()
        pyplot.close()
        if out.suffix[1:].lower() not in kinds:
            raise ValueError(f"{option}: {out} must end in one of {', '.join(sorted(kinds))}, which are pictures")


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        _check_out(arguments.json, option="--json")
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


if __name__ == "__main__":
    sys.exit(main())
