r"""Conditional and marginal denoisers from one joint denoiser, and denoisers with an extra input.

A denoiser that takes a time for every site also gives every conditional and marginal law of its sites:

    joint         every site moves from noise to data      the model itself
    conditional   the others are held clean, at time 0     p(x_A | x_B)
    marginal      the others are held noise, at time 1     p(x_A), B summed out

At time 0 a site is known exactly; at time 1 its state carries no information. For an exact network both laws are exact.
On an absorbing process the tokens show the time, so any masked denoiser works.

Reference: UniDiffuser, one model for all of them with a time for each modality (Bao et al., 2023,
https://arxiv.org/abs/2303.06555).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, array, shown, token_ids, whole
from discdiff.denoiser.base import Denoiser, check_denoiser
from discdiff.denoiser.context import Along, Context, clean_states
from discdiff.prediction import unshifted
from discdiff.process import noise

__all__ = ["Alphabets", "Among", "conditional", "conditioned", "marginal"]


@dataclass(repr=False)
class Among(Context):
    """Some sites of a longer sequence; the others are held at given states and times.

    Attributes:
        rows: (B,) ids of the rows; a single row serves any id.
        moving: (L,) the sites whose logits are returned.
        states: (B, L) the states of the other sites; those of moving sites are ignored.
        time: (L,) the times of the other sites.
    """

    rows: Int[Tensor, " B"]
    moving: Bool[Tensor, " L"]
    states: Int[Tensor, "B L"]
    time: Float[Tensor, " L"]

    def logits(self, model: Denoiser, x: Int[Tensor, "R n"], t: Float[Tensor, "#R #n"], rows: Tensor) -> Tensor:
        moving = self.moving.to(x.device)
        whole = self.states.to(x.device)[self.places(rows)].clone()
        whole[:, moving] = x
        time = self.time.to(t.device, t.dtype).expand(len(x), -1).clone()
        time[:, moving] = t.expand(x.shape)
        out = model.called(whole, time)
        return (unshifted(out) if model.shift else out)[:, moving]

    def queries(self, width: int, rows: Tensor) -> int:
        return len(self.moving) * len(rows)

    def __repr__(self) -> str:
        return f"Among({int(self.moving.sum())} of {len(self.moving)} sites move)"


def conditional(model: Denoiser, x0: Int[Tensor, "*B L"], moving: Bool[Tensor, " L"], first_row: int = 0) -> Denoiser:
    """Return the denoiser of p(x_A | x_B): its sequences are the moving sites A; the other sites are held clean.

    Args:
        model: the denoiser of whole sequences; it takes a time for each site, or its process is absorbing.
        x0: (L,) or (B, L) tokens; those of moving sites are ignored.
        moving: (L,) the sites A.
        first_row: the id of the first row of x0.

    Raises:
        ValueError: if the model cannot give sites different times, or for tokens or sites out of range.
    """
    check_denoiser(model, "conditional")
    x0, first_row = token_ids(x0, "conditional: x0", "tokens"), whole(first_row, "conditional: first_row", 0)
    if x0.ndim not in (1, 2):
        raise ValueError(f"conditional: x0 must be (L,) or (B, L), got {tuple(x0.shape)}")
    rows = x0.expand(1, -1) if x0.ndim == 1 else x0
    moving = array(moving, "conditional: moving")
    _check(model, rows.shape[1], moving, "conditional")
    known = torch.where(moving, model.process.data_tokens[0], rows)
    model.check_data(known, "x0", (~moving).expand(known.shape))
    return _held(model, moving, clean_states(model.process, known), 0.0, first_row)


def marginal(model: Denoiser, moving: Bool[Tensor, " L"], seed: int = 0) -> Denoiser:
    """Return the denoiser of p(x_A): its sequences are the moving sites A; the other sites hold one draw of noise.

    The output of an exact network does not depend on noise at time 1, so the draw does not matter.

    Args:
        model: the denoiser of whole sequences; it takes a time for each site, or its process is absorbing.
        moving: (L,) the sites A.
        seed: the seed of the noise.

    Raises:
        ValueError: if the model cannot give sites different times, or for sites out of range.
    """
    check_denoiser(model, "marginal")
    moving, seed = array(moving, "marginal: moving"), whole(seed, "marginal: seed", 0, LAST_SEED)
    _check(model, moving.numel(), moving, "marginal")
    return _held(model, moving, noise(model.process, 1, len(moving), seed), 1.0, 0)


def conditioned(model: Denoiser, condition: Tensor, first_row: int = 0) -> Denoiser:
    """Return the same model with an extra input for each row, a class or an embedded text: fn(x, time, condition).

    Args:
        model: a denoiser whose function takes a third argument.
        condition: (B, ...), one entry a row, of a type that the function takes; a single row serves any id.
        first_row: the id of the first row.

    Raises:
        ValueError: if ``condition`` has no row.
    """
    check_denoiser(model, "conditioned")
    first_row = whole(first_row, "conditioned: first_row", 0)
    if not isinstance(condition, Tensor) or condition.ndim < 1 or len(condition) < 1:
        raise ValueError(f"conditioned: condition must have a row for each sequence, got {shown(condition)}")
    other = model.given(Along(torch.arange(first_row, first_row + len(condition)), condition))
    other.length = model.length
    return other


class Alphabets:
    """A network's function restricted to the allowed tokens of each site: several vocabularies in one sequence.

    The joint vocabulary holds all alphabets side by side. Non-absorbing processes are refused: their noise would have
    to differ between sites, which no process here supports.

    Shapes: tokens x (B, L).

    Args:
        model: the denoiser whose function is restricted, on an absorbing process.
        allowed: (L, V), the tokens that each site may hold.

    Raises:
        ValueError: if the process is not absorbing, the shape is wrong, or a site allows no token.
    """

    def __init__(self, model: Denoiser, allowed: Bool[Tensor, "L V"]) -> None:
        if not check_denoiser(model, "Alphabets").process.absorbing:
            raise ValueError(f"Alphabets: needs an absorbing process, got {model.process}")
        allowed, size = array(allowed, "Alphabets: allowed"), model.process.vocab_size
        if allowed.ndim != 2 or allowed.shape[1] != size or allowed.dtype != torch.bool:
            raise ValueError(
                f"Alphabets: allowed must be (L, {size}), of bools, got {allowed.dtype} of {tuple(allowed.shape)}"
            )
        empty = (~allowed.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"Alphabets: site {empty[0]} may hold no token")
        self.fn, self.allowed = model.fn, allowed

    def __call__(self, x: Int[Tensor, "B L"], time: Tensor | None) -> Tensor:
        return self.fn(x, time).masked_fill(~self.allowed.to(x.device), -torch.inf)

    @property
    def frame(self) -> tuple[int, int] | None:
        """The ``frame`` of the wrapped function."""
        return getattr(self.fn, "frame", None)

    @classmethod
    def of(cls, model: Denoiser, allowed: Bool[Tensor, "L V"]) -> Denoiser:
        """Return the same model with its function restricted."""
        return model.calling(cls(model, allowed))


def _held(model: Denoiser, moving: Tensor, states: Tensor, time: float, first_row: int) -> Denoiser:
    rows = torch.arange(first_row, first_row + len(states))
    other = model.given(Among(rows, moving, states, torch.full((len(moving),), time, dtype=torch.float64)))
    other.length = int(moving.sum())
    return other


def _check(model: Denoiser, length: int, moving: Tensor, where: str) -> None:
    if not (model.process.absorbing or model.sees_site_times):
        raise ValueError(
            f"{where}: {model} takes one time a row, or none, and cannot be told that some sites are held; "
            "a denoiser with a time for every site can, or one of an absorbing process"
        )
    if moving.dtype != torch.bool or tuple(moving.shape) != (length,) or not bool(moving.any()):
        raise ValueError(f"{where}: moving must be a bool mask ({length},) with a site in it, got {moving}")
    if model.length is not None and model.length != length:
        raise ValueError(f"{where}: the model is for length {model.length}, got {length}")
