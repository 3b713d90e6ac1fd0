r"""Log-probabilities of runs and sequences for learning from rewards: the KL of runs, and the one-step approximation.

A run is all that a sampler draws: the first state and the choices of every step. The runs of two denoisers under one
sampler have

    KL(runs p || runs q) = E_p[log p(run) - log q(run)] >= KL(samples p || samples q)

because a sample is a function of its run.

Reference for the one-step approximation: d1, diffu-GRPO (Zhao et al., 2025, https://arxiv.org/abs/2504.12216).
"""

from typing import SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, array, check_tokens, shown, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.losses import Estimate
from discdiff.sampling import Sampler

__all__ = ["one_step_log_prob", "path_kl"]


@torch.no_grad()
def path_kl(
    sampler: Sampler, reference: Denoiser, *, batch: SupportsIndex, length: SupportsIndex | None = None,
    seed: SupportsIndex, prompt: Tensor | None = None, frozen: Tensor | None = None,
) -> Estimate:  # fmt: skip
    """Estimate KL(runs of p || runs of q) for one sampler with two denoisers.

    It is at least the KL divergence of the samples.

    Args:
        sampler: the sampler of p, on a grid from 1.
        reference: the denoiser of q, of the same process.
        batch: the number of runs, at least 2.
        length: L, as in ``Sampler.sample``.
        seed: the seed of the runs.
        prompt, frozen: (L,) or (batch, L) given tokens and their sites, as in ``Sampler.sample``.

    Returns:
        The mean over the runs and its standard error, both (1,) in nats.

    Raises:
        TypeError, ValueError: as ``Sampler.sample`` and ``Sampler.log_prob``; ValueError if a run is impossible under
            the reference, as then the divergence is infinite.
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"path_kl: takes a Sampler, got {shown(sampler)}")
    batch, seed = whole(batch, "path_kl: batch", 2), whole(seed, "path_kl: seed", 0, LAST_SEED)
    check_denoiser(reference, "path_kl")
    out = sampler.sample(batch, length, seed=seed, prompt=prompt, frozen=frozen, record="choices")
    assert out.log_prob is not None
    ratio = out.log_prob - sampler.log_prob(out, model=reference).to(out.log_prob.device)
    return Estimate(ratio.mean()[None], ratio.std()[None] / batch**0.5, batch)


def one_step_log_prob(
    model: Denoiser, tokens: Int[Tensor, "B L"], frozen: Bool[Tensor, " L"] | None = None
) -> Float[Tensor, " B"]:
    r"""Return the one-step approximation of a sequence's log-probability, sum_i log D(x_i | all hidden), (B,) nats.

    It is the exact log-probability for a sampler of one step. For more steps the samples have another law, so a policy
    gradient with it is *biased*. diffu-GRPO uses it (Zhao et al., 2025, https://arxiv.org/abs/2504.12216), with random
    masks on the tokens of the prompt; here the whole prompt is shown.

    Args:
        model: the denoiser of a process with a mask; it is called once, at t = 1.
        tokens: (B, L) data.
        frozen: (L,) the sites of a prompt, which are shown and do not count.

    Raises:
        TypeError: if ``model`` is no Denoiser.
        ValueError: if its process has no mask, the tokens are no data, or ``frozen`` is no mask of their sites.
    """
    process = check_denoiser(model, "one_step_log_prob").process
    if not process.masks:
        raise ValueError(
            f"one_step_log_prob: takes a process with a mask, under which all can be hidden; got {process}"
        )
    check_tokens(tokens, "one_step_log_prob: tokens")
    model.check_data(tokens, "one_step_log_prob: tokens")
    shown_here = torch.zeros(tokens.shape[1]).bool() if frozen is None else array(frozen, "one_step_log_prob: frozen")
    if shown_here.dtype != torch.bool or shown_here.shape != tokens.shape[1:]:
        raise ValueError(
            f"one_step_log_prob: frozen must be a bool mask {tuple(tokens.shape[1:])}, got {shown(frozen)}"
        )
    here = shown_here.to(tokens.device).expand(tokens.shape)
    time = (~here).double() if bool(here.any()) else torch.ones(1, 1, dtype=torch.float64, device=tokens.device)
    said = model.evaluate(torch.where(here, process.place(tokens, tokens), process.hide(tokens)), time)
    rows = said[~here].denoiser.dense().double().log_softmax(-1)
    nats = rows.gather(-1, process.column(tokens[~here])[:, None])[:, 0]
    return torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device).masked_scatter(~here, nats).sum(-1)
