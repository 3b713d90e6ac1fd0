"""``discdiff train``: train a small network on a text or an array, in a folder from which a killed run goes on."""

import argparse
import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from discdiff.checks import meant, placed, real, whole
from discdiff.command.arguments import Formatter
from discdiff.command.training_data import TrainingData, read
from discdiff.demo.models import PROCESSES, Card, build, save_trained
from discdiff.learning import Trainer
from discdiff.learning.run import CHECKPOINT
from discdiff.losses import AbsorbingNELBO, AnyOrder, MaskedNELBO, Objective, ScoreEntropy, UniformNELBO

__all__ = ["LOSSES", "MODEL", "add_arguments", "run"]

MODEL, _SETTINGS, _CURVE = "model.safetensors", "train.json", "curve.json"
_MANY = 1 << 20
# The first loss that applies to a process is its default.
LOSSES: dict[str, Objective] = {
    "masked-nelbo": MaskedNELBO(),
    "uniform-nelbo": UniformNELBO(),
    "absorbing-nelbo": AbsorbingNELBO(),
    "any-order": AnyOrder(),
    "score-entropy": ScoreEntropy(),
}
_SHAPES: dict[str, Literal["blocks", "sequence"]] = {"convolution": "sequence", "transformer": "blocks"}
_ABOUT = """\
Train a small network on a text or an array of token ids.

  discdiff train --data book.txt --out runs/book
  discdiff train --data rows.npy --out runs/rows --process uniform --steps 4000
  discdiff sample runs/book --prompt "The "

In a text, each character is a token. An array in a .npy file holds whole numbers from 0: rows (N, L), or one long row
(N,). A part of the data is held out, and its loss is printed. If the run is killed, the same command goes on from its
last checkpoint, and ends with the same weights. A network and a loop of your own: dd.Trainer, docs/guide/train.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``discdiff train`` to its parser."""
    parser.description, parser.formatter_class = _ABOUT, Formatter
    add = parser.add_argument
    none = argparse.SUPPRESS
    add(
        "--data",
        type=Path,
        required=True,
        default=none,
        metavar="FILE",
        help="a text in UTF-8, or a .npy array of token ids",
    )
    add(
        "--out",
        type=Path,
        required=True,
        default=none,
        metavar="FOLDER",
        help="folder of the run; made if it is missing",
    )
    add("--process", metavar="NAME", default="masked", help=f"forward process: {', '.join(PROCESSES)}")
    add(
        "--loss",
        metavar="NAME",
        default=none,
        help=f"{', '.join(LOSSES)} (default: the likelihood bound of the process)",
    )
    add("--steps", metavar="N", type=int, default=2000, help="batches to train on")
    add(
        "--length",
        metavar="N",
        type=int,
        default=none,
        help="tokens of a window (default: 128 for a text, rows as they are)",
    )
    add("--batch", metavar="N", type=int, default=16, help="rows or windows of a batch")
    add("--rate", metavar="X", type=float, default=2e-3, help="highest learning rate")
    add(
        "--network",
        metavar="NAME",
        default="convolution",
        help=f"{', '.join(_SHAPES)}; a convolution learns faster, and samples no more tokens than --length",
    )
    add("--width", metavar="N", type=int, default=128, help="numbers that represent a token, a multiple of 32")
    add("--depth", metavar="N", type=int, default=8, help="layers")
    add("--held-out", metavar="X", type=float, default=0.05, help="share of the data that is not trained on")
    add("--seed", metavar="N", type=int, default=0, help="the same seed gives the same weights on the same machine")
    add("--every", metavar="N", type=int, default=100, help="steps between two checkpoints")
    add("--device", metavar="NAME", default="cpu", help="where to train, for instance cuda; weights depend on it")
    add("--restart", action="store_true", default=none, help="begin anew, although the folder has a checkpoint")


def run(arguments: argparse.Namespace) -> None:
    """Train as the arguments say.

    Raises:
        FileNotFoundError: if there is no file of data.
        ValueError: for an option that is out of range, data that cannot be used, or a folder of another run.
        SystemExit: if the user stops the training.
    """
    process = _known(arguments.process, PROCESSES, "--process")
    shape = _SHAPES[_known(arguments.network, _SHAPES, "--network")]
    for option, least in (("steps", 1), ("batch", 1), ("depth", 1), ("width", 1), ("every", 1), ("length", 1)):
        if option in arguments:
            whole(getattr(arguments, option), f"--{option}", least, _MANY)
    whole(arguments.seed, "--seed", 0, 2**63 - 1)
    device = placed(arguments.device, "--device")
    if arguments.width % 32:
        raise ValueError(f"--width: must be a multiple of 32, got {arguments.width}")
    real(arguments.rate, "--rate", "(0, inf)"), real(arguments.held_out, "--held-out", "(0, 1)")
    data = read(arguments.data)
    loss_name, loss = _loss(getattr(arguments, "loss", None), process, data.vocab_size)
    length = _length(arguments, data)
    known, held = data.parts(arguments.held_out, length)
    uniform = process != "masked"
    card = Card(shape, process, data.vocab_size, length, arguments.width, arguments.depth,  # type: ignore[arg-type]
                predicts="loo" if process == "uniform" else "denoiser", time="alpha" if uniform else None)  # fmt: skip
    settings = _settings(arguments, loss_name, length, data)
    restart = "restart" in arguments
    _check_folder(arguments.out, settings, restart)
    torch.manual_seed(arguments.seed)
    network, model = build(card)
    trainer = Trainer(
        network.to(device), model.process, loss, known, predicts=card.predicts, time=card.time, batch=arguments.batch,
        length=length, held_out=held, rate=arguments.rate, seed=arguments.seed, folder=arguments.out,
        every=arguments.every, warmup=min(100, arguments.steps // 10),
    )  # fmt: skip
    if restart:
        for name in (CHECKPOINT, MODEL, _CURVE):
            (arguments.out / name).unlink(missing_ok=True)
    _write(arguments.out / _SETTINGS, settings)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    size = sum(part.numel() for part in network.parameters())
    console.print(f"{model.process}, {loss}, {size:,} weights, vocabulary of {data.vocab_size}", markup=False)
    try:
        trained = trainer.fit(arguments.steps)
    except KeyboardInterrupt:
        raise SystemExit("discdiff: stopped; the same command goes on from the last checkpoint") from None
    assert isinstance(trained.fn, torch.nn.Module)
    save_trained(arguments.out / MODEL, trained.fn, card, torch.float32, data.characters)
    _write(arguments.out / _CURVE, {"train": trainer.curve, "held out": trainer.held_out_curve})
    _report(arguments.out, trainer, data)


def _report(out: Path, trainer: Trainer, data: TrainingData) -> None:
    """Print the losses and how to sample."""
    (_, loss), (_, held) = trainer.curve[-1], trainer.held_out_curve[-1]
    print(f"loss {loss:.3f} nats a {data.unit}, held out {held:.3f}; wrote {out / MODEL}")
    folder = shlex.quote(str(out))
    fitting = (word for word in ("The ", "the ") if set(word) <= set(data.characters or ""))
    prompt = next((f' --prompt "{word}"' for word in fitting), "")
    print(f"sample:  discdiff sample {folder}{prompt}\npython:  model = dd.load({str(out)!r})")


def _known(word: str, words: Iterable[str], option: str) -> str:
    """Return a word that is one of the accepted words.

    Raises:
        ValueError: for another word; the error suggests the nearest one.
    """
    if word in words:
        return word
    hint = meant(word.replace("_", "-"), words)
    raise ValueError(f"{option}: there is no {word!r}{hint}; accepted: {', '.join(words)}")


def _loss(name: str | None, process: str, vocab_size: int) -> tuple[str, Objective]:
    """Return the loss and its name; by default the first that applies to the process."""
    made, fitting = PROCESSES[process](vocab_size), []
    for each, loss in LOSSES.items():
        try:
            loss.check(made)
        except ValueError:
            continue
        fitting.append(each)
    name = fitting[0] if name is None else _known(name, LOSSES, "--loss")
    if name not in fitting:
        raise ValueError(f"--loss: {name} does not apply to --process {process}; accepted: {', '.join(fitting)}")
    return name, LOSSES[name]


def _length(arguments: argparse.Namespace, data: TrainingData) -> int:
    """Return the length of a window, or of the rows."""
    if data.tokens.ndim == 1:
        return int(getattr(arguments, "length", 128))
    rows = data.tokens.shape[1]
    if getattr(arguments, "length", rows) != rows:
        raise ValueError(f"--length: the array has rows of {rows} tokens; leave the option out, or give {rows}")
    return rows


def _settings(arguments: argparse.Namespace, loss: str, length: int, data: TrainingData) -> dict[str, Any]:
    """Return the options that determine the weights, as they are named, and the fingerprint of the data."""
    names = ("process", "steps", "batch", "rate", "network", "width", "depth", "held_out", "seed", "device")
    said = {name.replace("_", "-"): getattr(arguments, name) for name in names}
    return {**said, "loss": loss, "length": length, "data": data.digest}


def _check_folder(out: Path, settings: dict[str, Any], restart: bool) -> None:
    """Raise ValueError if the folder cannot hold this run."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file, and the name of a folder is needed")
    record = out / _SETTINGS
    if out.is_dir() and any(out.iterdir()) and not record.is_file():
        raise ValueError(f"--out: {out} holds other files; give a new folder")
    if not record.is_file() or restart:
        return
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--out: {record} cannot be read ({error}); give another folder") from error
    other = [
        "the data are not the same file" if name == "data" else f"--{name} was {found.get(name)}, now {value}"
        for name, value in settings.items()
        if found.get(name) != value
    ]
    if other:
        raise ValueError(
            f"--out: {out} is of another run: {'; '.join(other)}. Give the same options, another folder, or --restart"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)
