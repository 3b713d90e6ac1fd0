r"""Reflow: train on pairs (first state, sample) of a teacher, so that a student needs fewer steps.

A teacher that keeps what it can of its first state x1, such as ``S.MaximalCoupling`` on ``Uniform`` noise, makes pairs
(x1, x0) in which x0 depends on x1. Given x1 the tokens of x0 then depend less on each other than before. So a step that
draws all of them independently is nearer to the law of the data. The pairs are a coupling: x1 has the law of the first
states and x0 the law of the teacher's samples.

Two students learn from pairs. On an ``Interpolant`` the network sees x1 beside the tokens. It reproduces its pairs, so
a second reflow changes nothing. On ``Uniform`` noise it does not see x1, and its samples are a new coupling: the next
reflow. Draw with ``S.MaximalCoupling``. Steps that convert the denoiser to a leave-one-out, such as ``S.Ancestral``,
use the process's own noise, which pairs do not follow.

References: rectified flow (Liu et al., 2022, https://arxiv.org/abs/2209.03003), here for tokens; random pairs first, as
in SlimFlow (Zhu et al., 2024, https://arxiv.org/abs/2407.12718).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, real, seeded, shown, token_ids, whole
from discdiff.choices import Coins
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.learning.objectives import StagedLoss, surprise, times
from discdiff.process import Process
from discdiff.sampling import Sampler

__all__ = ["Pairs", "Reflow", "reflow"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of data and source sequences; ``Trainer(network, process, Reflow(), pairs.batches(64), ...)``.

    Attributes:
        x0: (N, L) data tokens.
        x1: (N, L) source tokens, those of the first state.

    Raises:
        TypeError, ValueError: if they are not token ids, at least 0, of one shape (N, L), N >= 1.
    """

    x0: Int[Tensor, "N L"]
    x1: Int[Tensor, "N L"]

    def __post_init__(self) -> None:
        for name in ("x0", "x1"):
            object.__setattr__(self, name, token_ids(getattr(self, name), f"Pairs: {name}", "token ids").long())
        if self.x0.ndim != 2 or self.x0.numel() == 0 or self.x0.shape != self.x1.shape:
            got = f"{tuple(self.x0.shape)} and {tuple(self.x1.shape)}"
            raise ValueError(f"Pairs: x0 and x1 must have one shape (N, L) with a row and a site, got {got}")
        if min(int(self.x0.min()), int(self.x1.min())) < 0:
            raise ValueError("Pairs: token ids must be at least 0")

    def __len__(self) -> int:
        return len(self.x0)

    def shuffled(self, seed: SupportsIndex) -> "Pairs":
        """Return the same sequences in random pairs; raises TypeError or ValueError for a bad seed."""
        generator = torch.Generator().manual_seed(whole(seed, "shuffled: seed", 0, LAST_SEED))
        return Pairs(self.x0, self.x1[torch.randperm(len(self), generator=generator)])

    def batches(self, batch: SupportsIndex) -> "PairBatches":
        """Return a function that draws ``batch`` pairs, (B, L, 2), with a generator, for ``Trainer``.

        Raises:
            TypeError, ValueError: unless ``batch`` is a whole number of at least 1.
        """
        return PairBatches(torch.stack([self.x0, self.x1], -1), whole(batch, "batches: batch", 1))

    def __repr__(self) -> str:
        return f"Pairs({len(self)} of {self.x0.shape[1]} tokens)"


@dataclass(frozen=True, eq=False)
class PairBatches:
    """Random batches of pairs: called with a generator it returns (B, L, 2).

    Attributes:
        both: (N, L, 2) data and source tokens.
        batch: B.
    """

    both: Int[Tensor, "N L 2"]
    batch: int

    def __call__(self, generator: torch.Generator) -> Int[Tensor, "B L 2"]:
        return self.both[torch.randint(len(self.both), (self.batch,), generator=generator)]

    @property
    def digest(self) -> str:
        """A fingerprint of the pairs and the size of a batch, for the checkpoint of a training."""
        return f"pairs {hashlib.sha256(self.both.numpy().tobytes()).hexdigest()[:16]}, {self.batch} a batch"


def takes_pairs(process: Process, where: str) -> None:
    """Raise ValueError unless a site between the two sequences of a pair holds the token of one of them."""
    if process.mask_id is not None or (process.pairs is None and not process.one_noise_law):
        raise ValueError(
            f"{where}: takes a process whose source has tokens, and whose noise law does not change with time, such as "
            f"Uniform, Marginal or Interpolant; got {process}"
        )


def reflow(
    sampler: Sampler, count: SupportsIndex, *, length: SupportsIndex | None = None, seed: SupportsIndex | None = None,
    batch: SupportsIndex = 256, first_row: SupportsIndex = 0,
) -> Pairs:  # fmt: skip
    """Draw ``count`` samples of a teacher and keep each with its first state.

    Args:
        sampler: the teacher. Of an ``Interpolant`` x1 are the source tokens of the first state.
        count: N.
        length: L; optional if the model accepts only one length.
        seed: the seed; pair n depends on (seed, first_row + n).
        batch: the rows of a batch.
        first_row: the id of the first row.

    Raises:
        TypeError: if ``sampler`` is no ``Sampler``.
        ValueError: for a number out of range, a grid that does not end at 0, or a process with a mask, whose first
            states tell nothing, or with noise that changes with time; and as ``Sampler.sample``.
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"reflow: sampler must be a Sampler, got {shown(sampler)}")
    process, total, size = sampler.process, whole(count, "reflow: count", 1), whole(batch, "reflow: batch", 1)
    seed, row = seeded(seed, "reflow: seed"), whole(first_row, "reflow: first_row", 0)
    if sampler.grid[-1] != 0:
        raise ValueError(f"reflow: the grid must end at 0, where the states are data; got {sampler.grid[-1]}")
    takes_pairs(process, "reflow")
    x0, x1 = [], []
    for start in range(0, total, size):
        rows = min(size, total - start)
        first = sampler.start(rows, length, seed=seed, first_row=row + start)
        x1.append(first.tokens if process.pairs is None else process.pairs.split(first.tokens)[1])
        x0.append(sampler.sample(resume=first).tokens)
    return Pairs(torch.cat(x0).cpu(), torch.cat(x1).cpu())


@dataclass(frozen=True)
class Reflow(StagedLoss):
    r"""Cross-entropy of the data given a state between the two sequences of a pair; it trains a student.

    x_t has the token of x0 with probability alpha(t) at each site, else that of x1. On an ``Interpolant`` the network
    sees x1 too. The loss is -log D(x0 | x_t), summed over the sites, in nats a sequence; t is uniform in (0, 1].

    Args:
        anneal: the part of the training in which the share of random pairs falls from 1 to 0 (annealing reflow). Random
            pairs are those of the batch in another order, so both laws stay as they are.

    Raises:
        TypeError, ValueError: if ``anneal`` is not in [0, 1].
    """

    rows: ClassVar[bool] = False
    anneal: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "anneal", real(self.anneal, "Reflow: anneal", "[0, 1]"))

    def check(self, process: Process) -> None:
        takes_pairs(process, "Reflow")

    def updates(self, model: Denoiser, average: Denoiser, x0: Tensor, done: float) -> Iterator[Tensor]:
        yield self.at(model, x0, 1 - done / self.anneal if done < self.anneal else 0.0)

    def __call__(self, model: Denoiser, x0: Tensor) -> Tensor:
        self.check(check_denoiser(model, "Reflow").process)
        return self.at(model, x0, 0.0)

    def at(self, model: Denoiser, pairs: Int[Tensor, "B L 2"], share: float) -> Float[Tensor, " B"]:
        """Return a draw of the loss of pairs (B, L, 2), (B,) nats; a ``share`` of rows gets another's source.

        Raises:
            ValueError: if the pairs have another shape, or hold other ids than data tokens.
        """
        if pairs.ndim != 3 or pairs.shape[-1] != 2:
            raise ValueError(f"Reflow: takes pairs (B, L, 2) of Pairs.batches(B), got shape {tuple(pairs.shape)}")
        process, device = model.process, pairs.device
        x0, x1 = pairs.unbind(-1)
        mixed = torch.rand(len(x0), device=device) < share
        rows = mixed.nonzero()[:, 0]
        order = rows[torch.randperm(len(rows), device=device)]  # each row gets the source of the next in this order
        x1 = x1.index_copy(0, order, x1[order.roll(1)])
        t = times(x0)
        if process.pairs is not None:
            x_t = process.pairs.noised_pair(x0, x1, t).sample()
        else:
            process.check_data(x0, "x0")
            process.check_states(x1, "x1")
            kept = Coins(process.schedule.alpha(t[:, None]).expand(x0.shape)).sample()
            x_t = torch.where(kept, x0, x1)
        return surprise(model.evaluate(x_t, t[:, None]).denoiser, x0)
