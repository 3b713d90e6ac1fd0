r"""Fit a product law to the posterior with the denoiser as prior, without a sampler. A heuristic.

    q = argmin KL(q || p0 W / Z),    at a fixed point:    q_i(v) ~ exp(E_{q_-i} log [p0 W](x with x_i = v))

The prior enters by conditional laws. As p0(x) = p0(x_-i) p0(x_i | x_-i), only log D_i(v | x_-i), the prediction at a
site that alone is masked, depends on v. So an exact denoiser gives the exact fixed points. What ``mean_field`` says of
products holds here: local optima, modes that are left out, no dependence between sites.

References: variational posteriors by diffusion models, there Gaussian (RED-Diff; Mardani et al., 2023,
https://arxiv.org/abs/2305.04391); stochastic steps in natural parameters (Hoffman et al., 2013,
https://arxiv.org/abs/1206.7051).
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, array, check_ids, check_tokens, real, shown, whole
from discdiff.choices import Subset
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.guidance.mean_field import coordinate_ascent, listed, refuse_never, step_size, swaps
from discdiff.guidance.measurement import LogLikelihood, likelihoods
from discdiff.kernels import dispatch as kernels
from discdiff.process import Process

__all__ = ["MeanFieldPosterior", "variational_posterior"]

_ROWS = 1 << 24  # limit of the logits in one call of the network


@dataclass(frozen=True, repr=False, eq=False)
class MeanFieldPosterior:
    """A product law over sequences that approximates a posterior; made by ``variational_posterior``.

    Attributes:
        log_q: (L, V) log-probabilities of the tokens at each site.
        bound: a lower bound on the log-evidence log Z, in nats: E_q[log W - log q + the masked bound on log p0]. With
            an exact denoiser it is log Z - KL(q || posterior).
        error: the standard error of ``bound``; 0 if all sequences were listed.
        change: the largest change of a probability in the last step. A large one says that the ascent has not ended.
        sequences: the number of sequences that the network was given.
        rewards: the number of sequences whose log-likelihood was computed.
    """

    log_q: Float[Tensor, "L V"]
    bound: float
    error: float
    change: float
    sequences: int
    rewards: int

    def sample(self, batch: int, seed: int, first_row: int = 0) -> Int[Tensor, "B L"]:
        """Draw sequences (B, L) from q; the tokens of a row are a function of the seed and its id.

        Raises:
            TypeError, ValueError: for a number out of range.
        """
        batch = whole(batch, "sample: batch", 1)
        first_row = whole(first_row, "sample: first_row", 0, 2**32 - batch)
        rows = torch.arange(first_row, first_row + batch, device=self.log_q.device)
        return _draw(self.log_q, rows, whole(seed, "sample: seed", 0, LAST_SEED), 0)

    def log_prob(self, x: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Return log q(x) of sequences (B, L), (B,) natural logs.

        Raises:
            ValueError: for sequences of another length or ids outside the vocabulary.
        """
        length, size = self.log_q.shape
        check_tokens(x, "log_prob: x")
        if x.shape[1] != length:
            raise ValueError(f"log_prob: x must be (B, {length}), got {tuple(x.shape)}")
        check_ids(x, "log_prob: x", f"0..{size - 1}", (x < 0) | (x >= size))
        return self.log_q[torch.arange(length, device=x.device), x].sum(-1)

    def denoiser(self, process: Process) -> Denoiser:
        """Return the exact denoiser of the law q for a process, whose leave-one-out prediction is q itself.

        Raises:
            ValueError: for a process of another vocabulary.
        """
        if process.vocab_size != self.log_q.shape[1]:
            raise ValueError(f"denoiser: q has {self.log_q.shape[1]} tokens, but the process is {process}")
        log_q = self.log_q
        return Denoiser(lambda x, t: log_q.to(x.device).expand(len(x), -1, -1), process, "loo", length=len(log_q))

    def __repr__(self) -> str:
        error = f" +- {self.error:.2g}" if self.error else ""
        return f"MeanFieldPosterior({tuple(self.log_q.shape)} tokens, bound={self.bound:.4g}{error})"


@torch.no_grad()
def variational_posterior(
    model: Denoiser,
    log_likelihood: LogLikelihood,
    *,
    length: int | None = None,
    samples: int | None = None,
    steps: int = 100,
    start: Float[Tensor, "L V"] | None = None,
    seed: int = 0,
    tolerance: float = 1e-13,
) -> MeanFieldPosterior:
    r"""Fit the product law q that minimises KL(q || p0 W / Z), with the denoiser as prior; a heuristic posterior.

        log q_i(v) = E_{x ~ q} [log D_i(v | x_-i) + log W(x with x_i = v)] + const

    D_i(. | x_-i) is the prediction at site i if it alone is masked. By default all sequences are listed and sites are
    set in turn. With ``samples`` the expectation is the mean over M draws of q, and all sites move at once, by a
    part of the way in log q: all of it in the first step, half in the first half of the steps, and 1 / (j + 2) in step
    j after it, counted from 0, so that the noise of the draws is averaged out. A step takes M L sequences of the
    network and M L V log-likelihoods.

    Args:
        model: a denoiser of a masked process. To fix some sites, ``model.condition(x0, moving)``.
        log_likelihood: natural log W(x0) of clean sequences (N, L), (N,): a ``Measurement`` or any function of tokens.
        length: L, needed if the model has none of its own.
        samples: M, the number of draws for each step; None lists all sequences.
        steps: the number of steps, or the largest number of sweeps over the sites.
        start: (L, V) log-probabilities of the first q; by default the prediction without any token. There may be
            several local optima; of several starts the one with the largest ``bound`` is the best.
        seed: the seed of the draws.
        tolerance: sweeps end when no probability changes by more.

    Raises:
        TypeError, ValueError: for an argument of a wrong type or size, a process that is not masked, guides that draw,
            or too many sequences to list; or if each token of a site has weight 0.
    """
    where = "variational_posterior"
    process = check_denoiser(model, where).process
    if not (process.one_noise_law and process.masks):
        raise ValueError(f"{where}: takes a denoiser of a Masked process, got {process}")
    size = model.length if length is None else whole(length, f"{where}: length", 1)
    if size is None or (model.length is not None and size != model.length):
        raise ValueError(f"{where}: length= must say how many sites; the model's is {model.length}, got {length}")
    weight = likelihoods(log_likelihood, f"{where}: log_likelihood")
    steps, seed = whole(steps, f"{where}: steps", 1), whole(seed, f"{where}: seed", 0, LAST_SEED)
    tolerance = real(tolerance, f"{where}: tolerance", "[0, inf)")
    prior = _Prior(model, size)
    log_q = prior.blank() if start is None else prior.first(start)
    if samples is None:
        return _fit_listed(prior, weight, log_q, steps, tolerance)
    return _fit_drawn(prior, weight, log_q, whole(samples, f"{where}: samples", 1), steps, seed)


class _Prior:
    """Predictions of a masked denoiser at clean sequences with some sites hidden, over the n data tokens; counted."""

    def __init__(self, model: Denoiser, length: int) -> None:
        self.model, self.length, self.sequences = model, length, 0
        self.tokens = model.process.data_tokens.to(model.device)

    def __call__(self, x: Int[Tensor, "N L"], hidden: Tensor) -> Float[Tensor, "H n"]:
        """Return log D at all hidden sites (N, L) of sequences x (N, L) of indices of data tokens, in their order."""
        process, parts = self.model.process, []
        for rows in torch.arange(len(x), device=x.device).split(max(1, _ROWS // (self.length * process.vocab_size))):
            where, clean = hidden[rows], self.tokens[x[rows]]
            share = where.double().mean(-1).clamp(max=1 - float(process.schedule.alpha(1.0)))
            said = self.model(torch.where(where, process.hide(clean), clean), process.schedule.time(1 - share))
            parts.append(said[where].denoiser.dense().double().log_softmax(-1)[:, self.tokens])
            self.sequences += len(rows)
        return torch.cat(parts)

    def blank(self) -> Float[Tensor, "L n"]:
        """Return log D of a sequence without tokens."""
        x = torch.zeros(1, self.length, dtype=torch.int64, device=self.tokens.device)
        return self(x, torch.ones_like(x, dtype=torch.bool))

    def first(self, start: object) -> Float[Tensor, "L n"]:
        """Return the user's first q, over data tokens.

        Raises:
            TypeError, ValueError: if it is not an array of laws (L, V).
        """
        shape = (self.length, self.model.process.vocab_size)
        log_q = array(start, "variational_posterior: start", torch.float64).detach().to(self.tokens.device)
        if log_q.shape != shape or not bool((log_q.logsumexp(-1).abs() < 1e-6).all()):
            raise ValueError(f"variational_posterior: start must hold {shape} log-probabilities, got {shown(start)}")
        return log_q[:, self.tokens].log_softmax(-1)

    def spread(self, log_q: Float[Tensor, "L n"]) -> Float[Tensor, "L V"]:
        """Return log-probabilities over all tokens; a mask has -inf."""
        full = log_q.new_full((self.length, self.model.process.vocab_size), -torch.inf)
        return full.index_copy(-1, self.tokens, log_q)


def _fit_listed(
    prior: _Prior, weight: LogLikelihood, log_q: Tensor, sweeps: int, tolerance: float
) -> MeanFieldPosterior:
    length, size = log_q.shape
    x = listed(size, length, "variational_posterior").to(log_q.device)
    log_w = weight(prior.tokens[x])
    bound, alone = torch.zeros_like(log_w), torch.zeros(length, len(x), dtype=torch.float64, device=x.device)
    for hidden in itertools.product([False, True], repeat=length):
        count = sum(hidden)
        if not count:
            continue
        where = torch.tensor(hidden, device=x.device).expand(len(x), -1)
        distinct, index = x.masked_fill(where, 0).unique(dim=0, return_inverse=True)
        said = prior(distinct, where[: len(distinct)]).view(len(distinct), count, size)[index]
        log_p = said.gather(-1, x[where].view(len(x), count, 1))[..., 0]
        # each order of the sites has the same weight, and hides these sites with this probability before one of them
        bound += log_p.sum(-1) / count / math.comb(length, count)
        if count == 1:
            alone[hidden.index(True)] = log_p[:, 0]
    zero = torch.zeros(1, length, size, dtype=torch.float64, device=x.device)
    found = coordinate_ascent("variational_posterior", log_q[None], zero, alone + log_w, x, sweeps, tolerance)
    at_x = found.log_q[0][torch.arange(length, device=x.device), x].sum(-1)
    some = at_x > -torch.inf
    value = float((at_x.exp() * (bound + log_w - at_x))[some].sum())
    return MeanFieldPosterior(prior.spread(found.log_q[0]), value, 0.0, found.change, prior.sequences, len(x))


def _fit_drawn(
    prior: _Prior, weight: LogLikelihood, log_q: Tensor, samples: int, steps: int, seed: int
) -> MeanFieldPosterior:
    length, size = log_q.shape
    ids, change, rewards = torch.arange(samples, device=log_q.device), 0.0, 0
    every, positions = torch.arange(size, device=log_q.device), torch.arange(length, device=log_q.device)
    alone = torch.eye(length, dtype=torch.bool, device=log_q.device).repeat(samples, 1)
    for step in range(steps):
        x = _draw(log_q, ids, seed, step)
        target = prior(x.repeat_interleave(length, 0), alone).view(samples, length, size).mean(0)
        swapped = swaps(x.expand(length, -1, -1), positions, every)
        log_w = torch.cat([weight(prior.tokens[part.flatten(0, 1)]) for part in swapped])
        rewards += len(log_w)
        target = target + log_w.view(length, samples, size).mean(1)
        refuse_never(target.amax(-1) == -torch.inf, "variational_posterior")
        part = step_size(step, steps)
        after = (part * target + ((1 - part) * log_q if step else 0.0)).log_softmax(-1)
        change, log_q = float((after.exp() - log_q.exp()).abs().max()), after
    rows = torch.arange(max(2, samples * length), device=log_q.device)
    x, count = _draw(log_q, rows, seed, steps), rows % length + 1
    law = Subset(torch.ones_like(x, dtype=torch.bool), count)
    law.key = kernels.Key(seed, rows, steps, name="hidden")
    hidden = law.sample()
    log_p = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    log_p = log_p.masked_scatter(hidden, prior(x, hidden).gather(-1, x[hidden][:, None])[:, 0])
    value = log_p.sum(-1) * length / count + weight(prior.tokens[x]) - log_q[positions, x].sum(-1)
    error = float(value.std()) / len(rows) ** 0.5
    found = prior.spread(log_q)
    return MeanFieldPosterior(found, float(value.mean()), error, change, prior.sequences, rewards + len(rows))


def _draw(log_q: Float[Tensor, "L n"], rows: Int[Tensor, " B"], seed: int, step: int) -> Int[Tensor, "B L"]:
    length, batch = len(log_q), len(rows)
    index, place = torch.arange(length, device=rows.device).repeat(batch), rows.repeat_interleave(length)
    source = kernels.Rows.of(log_q).subset(index)
    return kernels.draw(source, seed=seed, rows=place, positions=index, step=step).view(batch, length)
