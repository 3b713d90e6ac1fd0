r"""Likelihoods and losses of blockwise models, from the bounds of single blocks.

    -log p(x) <= sum_b NELBO(x^b | x^{<b})                                     ``Blocks``
    -log sum_k gamma_k p_k(x) <= -log sum_k gamma_k e^{-NELBO_k(x)}            ``BlockMixture.likelihood``
                              <= sum_k gamma_k NELBO_k(x)                      ``BlockMixture``, by Jensen

Blocks of one site need no bound: -log p(x_i | x_{<i}) is an output of the model. The middle line holds for each
sequence. Its Monte-Carlo estimate is too small on average, as -log sum e^{-.} is concave. Let w_k be the share of term
k in the sum, and s_k the standard error of NELBO_k. To second order the bias is -sum_k w_k (1 - w_k) s_k^2 / 2.

Reference: BlockGen (Deschenaux and Gulcehre, 2026, https://arxiv.org/abs/2606.02241).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import real, whole
from discdiff.denoiser import Behind, Denoiser, clean_states
from discdiff.losses.base import Estimate, Objective
from discdiff.prediction import Predicts
from discdiff.process import Process

__all__ = ["BlockLikelihood", "BlockMixture", "Blocks"]


@dataclass(frozen=True)
class Blocks(Objective):
    """Sum of a bound over blocks, each given the clean blocks before it; one denoiser call covers all blocks.

    Args:
        bound: a bound for the model's process, such as ``MaskedNELBO()``.
        block: the block size; with 1 the bound is the autoregressive cross-entropy, without noise.
        times: "sequence" draws one noise time for each sequence, "block" one noise time for each block.

    Raises:
        TypeError, ValueError: if ``block`` is not a whole number of at least 1, or ``bound`` or ``times`` is invalid.
    """

    bound: Objective
    block: int
    times: Literal["sequence", "block"] = "sequence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", whole(self.block, "Blocks: block", 1))
        if not isinstance(self.bound, Objective):
            raise TypeError(f"Blocks: bound must be one of discdiff.losses, such as MaskedNELBO(), got {self.bound!r}")
        if self.times not in ("sequence", "block"):
            raise ValueError(f"Blocks: times must be 'sequence' or 'block', got {self.times!r}")

    def check(self, process: Process) -> None:
        self.bound.check(process)

    def predicts(self, process: Process) -> Predicts:
        return self.bound.predicts(process)

    def at(self, model: Denoiser, x0: Int[Tensor, "B L"], u: Float[Tensor, "B *L"]) -> Float[Tensor, " B"]:
        clean = clean_states(model.process, x0)
        if self.block == 1:
            law = model.autoregressive(clean).denoiser
            return -law.gather(-1, x0[..., None])[..., 0].double().sum(-1)
        future = None
        if model.length is not None:  # it takes only whole sequences
            future = model.process.prior(len(x0), x0.shape[1], x0.device).sample()
        if self.times == "block" and u.ndim == 1:
            blocks = -(-x0.shape[1] // self.block)
            shift = torch.arange(blocks, dtype=u.dtype, device=u.device) / blocks
            shuffled = shift[torch.rand(len(x0), blocks, device=u.device).argsort(-1)]  # times stratified over blocks
            u = ((u[:, None] + shuffled) % 1).repeat_interleave(self.block, 1)[:, : x0.shape[1]]
        return self.bound.at(model.given(Behind(clean, self.block, future)), x0, u)


@dataclass(frozen=True)
class BlockLikelihood:
    """Bounds on -log p(x0) of a mixture of block sizes, (B,) nats a sequence.

    Block size k has the weight gamma_k and the bound NELBO_k.

    Attributes:
        jensen: sum_k gamma_k NELBO_k.
        log_sum_exp: -log sum_k gamma_k e^{-NELBO_k}, from the same draws: too small on average.
        optimism: how much too small ``log_sum_exp`` is on average, to second order. To this order
            ``log_sum_exp + optimism`` is a bound.
        components: NELBO_k of each block size.
    """

    jensen: Estimate
    log_sum_exp: Float[Tensor, " B"]
    optimism: Float[Tensor, " B"]
    components: dict[int, Estimate]


@dataclass(frozen=True)
class BlockMixture(Objective):
    """Mixture of block sizes: each row of a batch trains one block size, drawn by ``weights``.

    Args:
        bound: a bound for the model's process, such as ``MaskedNELBO()``.
        weights: {block size: probability}.
        times: as in ``Blocks``.

    Raises:
        TypeError, ValueError: if the weights are not probabilities that sum to 1, or another argument is invalid.
    """

    bound: Objective
    weights: Mapping[int, float]
    times: Literal["sequence", "block"] = "sequence"

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise TypeError(f"BlockMixture: weights must be {{block size: probability}}, got {self.weights!r}")
        weights = {
            Blocks(self.bound, block, self.times).block: real(p, "BlockMixture: a weight", "[0, 1]")
            for block, p in self.weights.items()
        }
        if not weights or abs(sum(weights.values()) - 1) > 1e-9:
            raise ValueError(f"BlockMixture: the weights must be probabilities, got {weights}")
        object.__setattr__(self, "weights", weights)

    def check(self, process: Process) -> None:
        self.bound.check(process)

    def predicts(self, process: Process) -> Predicts:
        return self.bound.predicts(process)

    def at(self, model: Denoiser, x0: Int[Tensor, "B L"], u: Float[Tensor, "B *L"]) -> Float[Tensor, " B"]:
        edges = torch.tensor(list(self.weights.values()), dtype=torch.float64, device=x0.device).cumsum(0)
        spread = (
            torch.rand((), dtype=torch.float64, device=x0.device) + torch.arange(len(x0), device=x0.device)
        ) / len(x0)
        kind = torch.searchsorted(edges, spread[torch.randperm(len(x0), device=x0.device)] % 1).clamp(
            max=len(edges) - 1
        )
        value = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for number, block in enumerate(self.weights):
            rows = (kind == number).nonzero()[:, 0]
            if len(rows):
                value = value.index_add(0, rows, Blocks(self.bound, block, self.times).at(model, x0[rows], u[rows]))
        return value

    @torch.no_grad()
    def likelihood(self, model: Denoiser, x0: Int[Tensor, "B L"], draws: int, seed: int) -> BlockLikelihood:
        """Estimate the bounds of ``BlockLikelihood`` on -log p(x0) with ``draws`` draws for every block size.

        Raises:
            ValueError: if ``prior_kl`` is infinite, ``draws`` is below 2, or x0 is not data.
        """
        parts = {
            block: Blocks(self.bound, block, self.times).estimate(model, x0, draws, seed, prior=block > 1)
            for block in self.weights
        }
        gamma = torch.tensor(list(self.weights.values()), dtype=torch.float64, device=x0.device)[:, None]
        value, error = (torch.stack([getattr(part, name) for part in parts.values()]) for name in ("value", "error"))
        terms = gamma.log() - value
        share = terms.softmax(0)
        optimism = (share * (1 - share) * error**2).sum(0) / 2
        jensen = Estimate((gamma * value).sum(0), (gamma * error).pow(2).sum(0).sqrt(), draws)
        return BlockLikelihood(jensen, -terms.logsumexp(0), optimism, parts)
