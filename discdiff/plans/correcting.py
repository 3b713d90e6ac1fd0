r"""Where a corrector pays: how much less likely a sampler's states are than noisy data, site by site.

Let mu_t be the law of a sampler's states at time t and p_t the law of noisy data. The excess at t is

    e(t) = E_{z ~ mu_t} sum_i -log p_t(z_i | z_{-i})  -  E_{z ~ p_t} sum_i -log p_t(z_i | z_{-i})

in nats a sequence, with the network's own conditionals, which ``Gibbs`` draws from. It is 0 if mu_t = p_t. A redraw of
one site i lowers KL(mu_t || p_t) by E KL(mu_t(z_i | z_{-i}) || p_t(z_i | z_{-i})). The excess is the sum of these gains
over the sites, plus the difference of the conditional entropies of mu_t and p_t. So a large excess suggests where a
corrector pays, before any corrector is tried.

The gain of a redraw follows from the chain rule of KL. The sum of -log p(z_i | z_{-i}) is the negative log
pseudo-likelihood (Besag, 1975, https://doi.org/10.2307/2987782).
"""

from dataclasses import dataclass
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import seeded, shown, token_ids, whole
from discdiff.denoiser import Denoiser
from discdiff.plans.intervals import noise_path
from discdiff.sampling import Sampler

__all__ = ["Excess", "excess"]


@dataclass(frozen=True)
class Excess:
    """What ``excess`` found at the n times of a grid after the first.

    Attributes:
        times: the times, decreasing.
        nats: (n,), e(t) in nats a sequence.
        standard_error: (n,), the standard error of ``nats``.
    """

    times: tuple[float, ...]
    nats: Float[Tensor, " n"]
    standard_error: Float[Tensor, " n"]


@torch.no_grad()
def excess(sampler: Sampler, data: Int[Tensor, "N L"], *, sites: SupportsIndex = 8, seed: SupportsIndex = 0) -> Excess:
    """Measure how much less likely a sampler's states are than noisy data, at every time of its grid.

    It takes one run of N samples, and two calls of the network with N rows at each time. On an absorbing process it
    takes two such calls for each site that is read, with this site hidden.

    Args:
        sampler: the sampler, whose grid begins at 1. The conditionals are those of the denoiser of its first step.
        data: (N, L) data tokens, on the device of the denoiser.
        sites: the number of random sites of each row that are read; the sum over all sites is estimated from them.
        seed: the seed of the samples, the noise and the sites.

    Raises:
        TypeError, ValueError: if ``sampler`` is no ``Sampler`` or its grid does not begin at 1; for tokens that are no
            data, a number or seed out of range, or a denoiser that does not determine the conditional of a clean site.
    """
    sites, seed = whole(sites, "excess: sites", 1), seeded(seed, "excess: seed")
    if not isinstance(sampler, Sampler):
        raise TypeError(f"excess: takes a Sampler, got {shown(sampler)}")
    if sampler.grid[0] != 1:
        raise ValueError(f"excess: takes a sampler whose grid begins at t = 1, got {sampler.grid[0]:g}")
    data = token_ids(data, "excess: data", "data tokens (N, L)")
    process, model = sampler.process, sampler.model
    process.check_data(data, "excess: data")
    count, length = data.shape
    path = sampler.sample(count, length, seed=seed, record=True, device=data.device).trajectory
    assert path is not None
    times = tuple(sampler.grid[1:])
    noisy = noise_path(process, data.cpu(), times, seed)
    generator, found = torch.Generator().manual_seed((seed + 1) % 2**63), list[Tensor]()  # not the noise's numbers
    for time, one, other in zip(times, path[1:], noisy, strict=True):
        where = torch.rand(count, length, generator=generator).argsort(-1) < min(sites, length)
        parts = [_surprise(model, z.to(data.device), time, where.to(data.device)) for z in (one.long(), other)]
        found.append(torch.stack(parts).cpu() * (length / min(sites, length)))
    values = torch.stack(found)  # (n, 2, N)
    return Excess(times, values[:, 0].mean(-1) - values[:, 1].mean(-1), (values.var(-1).sum(-1) / count).sqrt())


def _surprise(model: Denoiser, z: Int[Tensor, "N L"], time: float, where: Tensor) -> Float[Tensor, " N"]:
    """Return the sum (N,) of -log p_t(z_i | z_{-i}) over chosen sites (N, L)."""
    process, count = model.process, len(z)
    row, site = where.nonzero(as_tuple=True)
    if process.absorbing:  # a revealed site must be hidden, and no other one: a row for each chosen site
        z, where = z[row], torch.zeros_like(where[row]).scatter(1, site[:, None], True)
    log_p = torch.cat(
        [_log_conditionals(model, *part, time) for part in zip(z.split(count), where.split(count), strict=True)]
    )
    return torch.zeros(count, dtype=torch.float64, device=z.device).index_add(0, row, -log_p)


def _log_conditionals(model: Denoiser, z: Int[Tensor, "R L"], where: Tensor, time: float) -> Float[Tensor, " K"]:
    """Return log p_t(z_i | z_{-i}) at the K chosen sites of (R, L)."""
    process = model.process
    asked = torch.where(where, process.hide(z), z) if process.absorbing else z
    return model(asked, time)[where].conditional.known(at=process.column(z)[where]).log_prob.double()
