"""``discdiff sample FOLDER``: sample from a network that ``discdiff train`` wrote."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from discdiff.adapters.own import load_written
from discdiff.checks import LAST_SEED, affordable, meant, placed, real, whole
from discdiff.command.train_command import MODEL
from discdiff.demo.data import Vocabulary
from discdiff.prediction import Truncation
from discdiff.samplers.expression import parse_operator
from discdiff.sampling import Sampler

__all__ = ["add_arguments", "named", "run"]

_MANY = 1 << 20
FOLDER = "folder"  # the name of the parser in ``discdiff sample``


def named(words: Sequence[str]) -> list[str]:
    """Return the words of a command with "folder" put before the folder of ``discdiff sample FOLDER``."""
    given = list(words)
    if given[:1] == ["sample"] and len(given) > 1 and given[1] not in ("digits", "text", FOLDER) and given[1][0] != "-":
        given.insert(1, FOLDER)
    return given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``discdiff sample FOLDER`` to its parser."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder of a run of discdiff train")
    add(
        "--sampler",
        metavar="OPERATOR",
        default="ancestral",
        help='one step, for instance "ancestral >> gibbs(sites=4)"',
    )
    add("--steps", metavar="N", type=int, default=64, help="equal steps of t from 1 to 0")
    add("--batch", metavar="N", type=int, default=4, help="number of samples")
    add("--length", metavar="N", type=int, default=argparse.SUPPRESS, help="tokens (default: as in training)")
    add("--prompt", metavar="TEXT", default="", help="text to begin with, if the network was trained on a text")
    add("--temperature", metavar="X", type=float, default=1.0, help="below 1: likelier tokens become likelier still")
    add("--seed", metavar="N", type=int, default=0, help="the same seed gives the same samples")
    add("--device", metavar="NAME", default="cpu", help="where to run, for instance cuda")
    add(
        "--out",
        metavar="FILE",
        type=Path,
        default=None,
        help="file to write: text, or .npy for token ids; otherwise print",
    )


def run(arguments: argparse.Namespace) -> None:
    """Sample, and print the samples or write them.

    Raises:
        FileNotFoundError: if the folder has no trained network.
        ValueError: for an option that is out of range, or a prompt that the network cannot take.
    """
    folder, out = arguments.folder, arguments.out
    if not folder.is_dir():
        hint = meant(folder, ("digits", "text"))
        raise FileNotFoundError(
            f"sample: there is no folder {folder}{hint}; accepted: digits, text, or a folder that discdiff train wrote"
        )
    if not (folder / MODEL).is_file():
        raise FileNotFoundError(
            f"sample: {folder} holds no {MODEL}; discdiff train writes it when all its steps are done, and the same "
            "command goes on where it stopped"
        )
    for option in ("batch", "steps", "length"):
        if option in arguments:
            whole(getattr(arguments, option), f"--{option}", 1, _MANY)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out: {out} must be a file in a folder that exists")
    device = placed(arguments.device, "--device")
    model, card, characters = load_written(folder / MODEL)
    assert isinstance(model.fn, torch.nn.Module)
    model.fn.to(device)
    length = getattr(arguments, "length", card.length)
    if length > card.length and card.shape != "blocks":
        raise ValueError(f"--length: this network takes at most {card.length} tokens, got {length}")
    affordable(arguments.batch * length * card.vocab_size, f"a batch of {arguments.batch} such samples")
    vocabulary = None if characters is None else Vocabulary(characters)
    if arguments.prompt and vocabulary is None:
        raise ValueError("--prompt: this network was trained on an array; a prompt is for a text")
    prompt = vocabulary.encode(arguments.prompt) if vocabulary is not None else torch.zeros(0, dtype=torch.int64)
    if len(prompt) > length:
        raise ValueError(f"--prompt: has {len(prompt)} characters, and --length is {length}")
    temperature = real(arguments.temperature, "--temperature", "(0, inf)")
    if temperature != 1:
        model = model.guided(Truncation(temperature=temperature))
    operator = parse_operator(arguments.sampler)
    sampler = Sampler(model.process, model, operator, steps=arguments.steps)
    seed = whole(arguments.seed, "--seed", 0, LAST_SEED)
    Console(stderr=True).print(repr(sampler), style="dim", highlight=False, markup=False, soft_wrap=True)
    tokens = sampler.sample(arguments.batch, length, seed=seed, prompt=prompt, progress=True, device=device).tokens
    _give(tokens.cpu(), vocabulary, out)


def _give(tokens: Tensor, vocabulary: Vocabulary | None, out: Path | None) -> None:
    """Write token ids (B, L), or the text that they stand for, to a file, or print it."""
    if out is not None and out.suffix == ".npy":
        np.save(out, tokens.numpy())
    else:
        rows = [" ".join(map(str, row)) for row in tokens.tolist()]
        lines = "\n".join(rows) if vocabulary is None else "\n\n".join(map(vocabulary.decode, tokens))
        if out is None:
            print(lines)
            return
        out.write_text(lines + "\n", encoding="utf-8")
    print(f"wrote {out}")
