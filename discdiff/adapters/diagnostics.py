r"""Test a checkpoint's predictions without the law of the data, and read its activations at several noise levels.

An exact prediction passes both tests. First, a leave-one-out prediction (LOO) must not depend on the token that it
leaves out. Second, concrete scores must be ratios of one law: their logarithms sum to 0 around every closed path.

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
    """Measure how much a site's leave-one-out prediction changes if the site's own token is replaced.

    In each row of x (B, L), noisy tokens at time t, one random site gets another random token. The result (B,) is a
    total variation in [0, 1]. It is 0 for an exact leave-one-out prediction. It is far from 0 for a network that was
    trained by cross-entropy but is declared "loo".

    Raises:
        ValueError: if the process is absorbing, as its noise is never a data token, or if there is only one data token.
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
    """Compute ``loo_sensitivity`` at several alphas, with the network's output read as "loo" and as "denoiser".

    A network declared "loo" or "denoiser" is read in both ways; the reading with the lower sensitivity is the right
    one. A network declared "ratio" is read as "ratio" only.

    Args:
        model: the denoiser.
        x0: (B, L) data; noise is added here.
        alphas: the survival probabilities, A of them, strictly between 0 and 1.
        seed: the seed of noise, sites and tokens.

    Returns:
        A tensor (A, 2) for each reading. It holds, for every alpha, the mean over the batch and its standard error.

    Raises:
        ValueError: for fewer than two rows, alphas outside (0, 1), or a process that ``loo_sensitivity`` refuses.
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
    """Sums of log ratios around closed paths, in nats; they are 0 for the ratios of one law.

    Attributes:
        there_and_back: (B,) the sum over a change of one site and its reversal.
        square: (B,) the sum over a path that changes two sites in one order and changes them back in the other order.
    """

    there_and_back: Float[Tensor, " B"]
    square: Float[Tensor, " B"]


@torch.no_grad()
def cycle_residual(model: Denoiser, x: Int[Tensor, "B L"], t: float, seed: int = 0) -> Cycles:
    r"""Test whether a learned ratio is conservative, by sums of its logarithms around two closed paths in each row.

        there and back   log r_i(v | z) + log r_i(z_i | z^{i<-v})
        square           log r_i(v | z) + log r_j(w | z^{i<-v}) - log r_j(w | z) - log r_i(v | z^{j<-w})

    z is a row of x (B, L); i, j are random sites and v, w random tokens. z^{i<-v} is z with token v at site i, and
    r_i(v | z) is the model's ratio of the probability of z^{i<-v} to that of z.

    Raises:
        ValueError: if there is only one site or only one data token, or if the ratio does not follow from the model's
            prediction.
    """
    process = check_denoiser(model, "cycle_residual").process
    process.check_states(x, "x")
    length, seed = x.shape[1], whole(seed, "cycle_residual: seed", 0, LAST_SEED)
    if length < 2 or len(process.data_tokens) < 2:
        raise ValueError(f"cycle_residual: needs two sites and two tokens, got {length} and {len(process.data_tokens)}")
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
    """Return the outputs of some modules of a denoiser for data at several noise levels.

    Args:
        model: a denoiser whose function is an ``nn.Module``.
        x0: (B, L) data.
        alphas: the survival probabilities, A of them, in (0, 1].
        modules: names of modules, as in ``named_modules``; each must return a tensor, or a tuple that begins with one.
        seed: the seed of the noise.

    Returns:
        The outputs of each module by its name, stacked over the alphas: (A, ...).

    Raises:
        TypeError: if the function is not a module, or a module returns no tensor.
        ValueError: for unknown names, alphas outside (0, 1], or a module that does not run exactly once in a call of
            the denoiser.
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
    """Draw for each row a uniform data token other than the given one."""
    data = model.process.data_tokens
    step = torch.randint(1, len(data), token.shape, generator=generator).to(token.device)
    rank = (data.to(token.device) == token[..., None]).long().argmax(-1)
    return data.to(token.device)[(rank + step) % len(data)]


def __dir__() -> list[str]:
    """List the names for tab completion."""
    return sorted(__all__)
