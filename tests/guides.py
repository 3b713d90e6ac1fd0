"""Guides of each kind, with the laws that they should give, for the tests of several rooms."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import discdiff as dd
from discdiff.choices import Branch
from discdiff.operator import GuideAt

__all__ = ["Behind", "Coin", "Noisy", "Plain", "by_hand", "table"]


def table(vocab_size: int, length: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A tilt log g (L, V), fixed by its seed."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(length, vocab_size, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Plain(dd.Guide):
    """O' ~ O g, with one g for each site."""

    log_g: Tensor

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        return prediction.tilted(lambda row, position: self.log_g[position])


@dataclass(frozen=True, eq=False)
class Coin(dd.Guide):
    """A coin of each row chooses one of two tilts: a guide that draws."""

    log_g: Tensor  # (2, L, V)
    heads: float = 0.3
    name: str = "side"
    random = True

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        weights = torch.tensor([1 - self.heads, self.heads], dtype=torch.float64)
        side = dd.choose(self.name, Branch(weights, len(state.rows)), state, at)
        return prediction.tilted(lambda row, position: self.log_g[side[row], position])


@dataclass(frozen=True, eq=False)
class Noisy(dd.Guide):
    """A tilt drawn for each row, site and token from fair coins, of the event shape (L V)."""

    scale: float = 1.0
    random = True

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        batch, length = prediction.x.shape
        size = prediction.process.vocab_size
        coins = dd.choose("coins", dd.Coins(torch.full((batch, length * size), 0.5).double()), state, at)
        return prediction.tilted(self.scale * coins.view(batch, length, size).double())


@dataclass(frozen=True, eq=False)
class Behind(dd.Guide):
    """Favours the token that ends the prefix: it looks around."""

    bonus: float = 1.0
    seen: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        assert at.prefix.shape[0] == len(prediction.x) == len(at.offset)
        log_g = torch.zeros(len(prediction.x), prediction.process.vocab_size, dtype=torch.float64)
        some = at.offset > 0
        last = at.prefix[some].gather(1, at.offset[some, None] - 1)
        log_g[some] = log_g[some].scatter(1, last, self.bonus)
        self.seen.append(at.sequence(prediction.x))
        return prediction.tilted(lambda row, position: log_g[row])


def by_hand(model: dd.Denoiser, change: Tensor | dd.Denoiser, weights: tuple[float, float] = (1.0, 1.0)) -> dd.Denoiser:
    """A denoiser of others that predict "loo", with an O that is computed from whole arrays, without the library.

    ``change`` is log g (L, V) for O g, or another denoiser for O^w0 O_other^w1.
    """

    def fn(x: Tensor, t: Tensor) -> Tensor:
        time = t.view(-1, 1) if t.ndim == 1 else t
        rows = [one.evaluate(x, time).loo for one in (model, change) if isinstance(one, dd.Denoiser)]
        if isinstance(change, Tensor):
            return rows[0] + change
        return weights[0] * rows[0] + weights[1] * rows[1]

    return dd.Denoiser(fn, model.process, "loo", time="t", time_dtype=torch.float64, length=model.length)
