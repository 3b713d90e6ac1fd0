r"""Tests of a checkpoint's predictions that need no knowledge of the data's law, and its activations by noise level.

An exact prediction passes both. A leave-one-out prediction must not depend on the token that it leaves out. Concrete
scores must be ratios of one law, so their logarithms sum to 0 around every closed path.

References: Uniform Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765), appendix H; gauge freedom and
conservativity (Horvat and Pfister, 2024, https://arxiv.org/abs/2402.03845).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from discdiff.adapters.convention import Called
from discdiff.checks import LAST_SEED, listing, real, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.prediction import Predicts
from discdiff.process import noised

__all__ = ["Cycles", "cycle_residual", "features", "loo_sensitivity", "sensitivity_curve"]


@torch.no_grad()
def loo_sensitivity(model: Denoiser, x: Int[Tensor, "B L"], t: float, seed: int = 0) -> Float[Tensor, " B"]:
    """Measure how much the LOO of a site changes if that site's token is replaced: total variation, (B,), in [0, 1].

    In each row of x (B, L) one random site gets another random token. The result is 0 for an exact leave-one-out. It is
    far from 0 for a network that was trained by cross-entropy and declared "loo" by mistake.

    Raises:
        ValueError: on an absorbing process, where noise is never a token, or with a single token.
    """
    process = check_denoiser(model, "loo_sensitivity").process
    process.check_states(x, "x")
    seed = whole(seed, "loo_sensitivity: seed", 0, LAST_SEED)
    if process.absorbing or len(process.data_tokens) < 2:
        raise ValueError(f"loo_sensitivity: needs a process whose tokens can be noise, and two of them; got {process}")
    generator = torch.Generator().manual_seed(seed)
    site = torch.randint(x.shape[1], (len(x), 1), generator=generator).to(x.device)
    other = _others(model, process.column(x.gather(-1, site)), generator)
    changed = x.scatter(-1, site, process.place(other, x.gather(-1, site)))
    rows = torch.zeros_like(x, dtype=torch.bool).scatter(-1, site, True)
    before, after = (model(state, t)[rows].loo.dense().double().softmax(-1) for state in (x, changed))
    return (before - after).abs().sum(-1) / 2


def sensitivity_curve(
    model: Denoiser, x0: Int[Tensor, "B L"], alphas: Sequence[float], seed: int = 0
) -> dict[Predicts, Float[Tensor, "A 2"]]:
    """Compute ``loo_sensitivity`` against alpha, with the network's output read as "loo" and as "denoiser".

    A network declared "loo" or "denoiser" is read in both ways. It learned the reading whose LOO depends less on the
    site's own token. A "ratio" is read as such only.

    Args:
        model: the denoiser.
        x0: (B, L) data, to be noised.
        alphas: survival probabilities strictly between 0 and 1.
        seed: the seed of noise, sites and tokens.

    Returns:
        For each reading the mean and its standard error over the batch at every alpha, (A, 2).

    Raises:
        ValueError: for fewer than two rows, alphas out of range, or a process that ``loo_sensitivity`` refuses.
    """
    check_denoiser(model, "sensitivity_curve").check_data(x0, "x0")
    if len(x0) < 2:
        raise ValueError("sensitivity_curve: an error bar needs at least 2 rows of data")
    alphas = [real(alpha, "sensitivity_curve: alphas", "(0, 1)") for alpha in listing(alphas, "alphas")]
    if not alphas:
        raise ValueError("sensitivity_curve: alphas must lie strictly between 0 and 1, got none")
    readings: tuple[Predicts, ...] = ("ratio",) if model.predicts == "ratio" else ("loo", "denoiser")
    found = {}
    for predicts in readings:
        read = copy.copy(model)
        read.predicts = predicts
        rows = []
        for alpha in alphas:
            t = float(model.process.schedule.time(torch.tensor(alpha, dtype=torch.float64)))
            x_t = noised(model.process, x0, t, seed)  # the same noise for every reading
            moved = loo_sensitivity(read, x_t, t, seed)
            rows.append(torch.stack([moved.mean(), moved.std() / len(moved) ** 0.5]))
        found[predicts] = torch.stack(rows)
    return found


@dataclass(frozen=True)
class Cycles:
    """Sums of log ratios around closed paths, (B,) nats each; 0 for the ratios of one law."""

    there_and_back: Float[Tensor, " B"]
    square: Float[Tensor, " B"]


@torch.no_grad()
def cycle_residual(model: Denoiser, x: Int[Tensor, "B L"], t: float, seed: int = 0) -> Cycles:
    r"""Test whether a learned ratio is conservative, on a random pair of sites (i, j) and tokens (v, w) in each row:

        there and back   log r_i(v | z) + log r_i(z_i | z^{i<-v})
        square           log r_i(v | z) + log r_j(w | z^{i<-v}) - log r_j(w | z) - log r_i(v | z^{j<-w})

    Shapes: x (B, L).

    Raises:
        ValueError: for a single site or token, or where the model does not determine the ratio.
    """
    process = check_denoiser(model, "cycle_residual").process
    process.check_states(x, "x")
    length, seed = x.shape[1], whole(seed, "cycle_residual: seed", 0, LAST_SEED)
    if length < 2 or len(process.data_tokens) < 2:
        raise ValueError("cycle_residual: needs two sites and two tokens")
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(length, (len(x), 1), generator=generator).to(x.device)
    j = (i + torch.randint(1, length, (len(x), 1), generator=generator).to(x.device)) % length
    own_i, own_j = x.gather(-1, i), x.gather(-1, j)
    v, w = (_others(model, process.column(own), generator) for own in (own_i, own_j))
    at_i, at_j = x.scatter(-1, i, process.place(v, own_i)), x.scatter(-1, j, process.place(w, own_j))

    def log_ratio(state: Tensor, site: Tensor, token: Tensor) -> Tensor:
        rows = model(state, t).ratio.double()
        chosen = rows.gather(1, site[..., None].expand(-1, -1, rows.shape[-1]))
        return chosen.gather(-1, token[..., None])[:, 0, 0]

    there = log_ratio(x, i, v)
    back = log_ratio(at_i, i, process.column(own_i))
    square = there + log_ratio(at_i, j, w) - log_ratio(x, j, w) - log_ratio(at_j, i, v)
    return Cycles(there + back, square)


@torch.no_grad()
def features(
    model: Denoiser, x0: Int[Tensor, "B L"], alphas: Sequence[float], modules: Sequence[str], seed: int = 0
) -> dict[str, Tensor]:
    """Return the outputs of chosen modules of a denoiser on data at several noise levels.

    Args:
        model: a denoiser whose function is an ``nn.Module``.
        x0: (B, L) data.
        alphas: survival probabilities in (0, 1].
        modules: names of modules, as in ``named_modules``; each must return a tensor, or a tuple that begins with one.
        seed: the seed of the noise.

    Returns:
        For each module its outputs (A, ...), stacked over the A alphas.

    Raises:
        TypeError: if the function is not a module, or a module returns no tensor.
        ValueError: for unknown names, survival probabilities out of range, or a module that does not run once a call.
    """
    check_denoiser(model, "features")
    if not isinstance(model.fn, nn.Module):
        raise TypeError(f"features: the denoiser's function must be an nn.Module, got {type(model.fn).__name__}")
    known = dict((model.fn.network if isinstance(model.fn, Called) else model.fn).named_modules())
    missing = [name for name in modules if name not in known]
    if missing:
        raise ValueError(f"features: there is no module {missing[0]!r}; some there are: {', '.join(list(known)[1:9])}")
    alphas = [real(alpha, "features: alphas", "(0, 1]") for alpha in listing(alphas, "features: alphas")]
    if not alphas:
        raise ValueError("features: alphas must lie in (0, 1], got none")
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def listener(name: str) -> Callable[[nn.Module, object, object], None]:
        def listen(module: nn.Module, arguments: object, out: object) -> None:
            out = out[0] if isinstance(out, tuple) else out  # layers of transformers return hidden states first
            if not isinstance(out, Tensor):
                raise TypeError(f"features: {name} gives a {type(out).__name__}, not a tensor")
            found[name].append(out.detach())

        return listen

    hooks = [known[name].register_forward_hook(listener(name)) for name in modules]
    try:
        for alpha in alphas:
            t = float(model.process.schedule.time(torch.tensor(alpha, dtype=torch.float64)))
            x = noised(model.process, x0, t, seed)
            before = {name: len(parts) for name, parts in found.items()}
            model(x, t)
            for name, parts in found.items():
                if len(parts) != before[name] + 1:
                    raise ValueError(f"features: {name} runs {len(parts) - before[name]} times a call, not once")
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(parts) for name, parts in found.items()}


def _others(model: Denoiser, token: Int[Tensor, "B 1"], generator: torch.Generator) -> Int[Tensor, "B 1"]:
    """Return a random data token different from the given one."""
    data = model.process.data_tokens
    step = torch.randint(1, len(data), token.shape, generator=generator).to(token.device)
    rank = (data.to(token.device) == token[..., None]).long().argmax(-1)
    return data.to(token.device)[(rank + step) % len(data)]


def __dir__() -> list[str]:
    """List the names for tab completion."""
    return sorted(__all__)
