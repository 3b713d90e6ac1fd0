r"""Likelihood bounds, each a Monte-Carlo estimator with an error bar and a differentiable training loss.

Every bound satisfies  -log p(x0) <= prior_kl(x0) + E[value]  for the law p of the reverse process. For an exact
prediction there is equality with -log p0(x0) at every x0 (for ``DiscreteBound`` only in the limit of many steps). The
continuous-time bounds equal one path Kullback-Leibler divergence

    int sum_{v != z} [ R(v) - R*(v) + R*(v) log(R*(v) / R(v)) ] dsigma,        R*(v) = Q(v, z) q_t(v | x0) / q_t(z | x0)

between the reverse rates R of the model and the rates R* of the process given x0. It is written in three forms: with
rates (``PathKL``, Girsanov), with the score (``ScoreEntropy``), and in closed form for masked, uniform and absorbing
processes. Time is drawn uniformly in alpha, where the integrands are bounded. Values are nats a sequence.

References: Campbell et al., 2022, https://arxiv.org/abs/2205.14987; SEDD (Lou et al., 2024,
https://arxiv.org/abs/2310.16834); MDLM (Sahoo et al., 2024, https://arxiv.org/abs/2406.07524); UDLM (Schiff et al.,
2025, https://arxiv.org/abs/2412.10193); D3PM (Austin et al., 2021, https://arxiv.org/abs/2107.03006); Uniform
Diffusion Models Revisited (2026, https://arxiv.org/abs/2605.22765).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from discdiff.checks import LAST_SEED, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.prediction import Prediction, Predicts
from discdiff.process import Process, Uniform

__all__ = [
    "AbsorbingNELBO", "AnyOrder", "Continuous", "DiscreteBound", "Estimate", "MaskedNELBO", "Objective", "PathKL",
    "ScoreEntropy", "UniformNELBO", "prior_kl",
]  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo estimate and its standard error, both (B,) in nats a sequence."""

    value: Float[Tensor, " B"]
    error: Float[Tensor, " B"]
    draws: int


class Objective(ABC):
    """An upper bound on -log p(x0), written as an expectation.

    Shapes: data x0 (B, L), uniforms u (B,) or (B, L), results (B,) in nats; densities of sites (B, L).
    """

    @abstractmethod
    def at(self, model: Denoiser, x0: Int[Tensor, "B L"], u: Float[Tensor, "B *L"]) -> Float[Tensor, " B"]:
        """Return a differentiable draw of the bound for each row; its mean over the noise and u is the bound.

        u is uniform in [0, 1) and sets the time. It has one entry for each row, (B,); continuous-time bounds also take
        one for each site, (B, L).
        """

    def check(self, process: Process) -> None:  # noqa: B027  most bounds apply to every process
        """Raise ValueError if this bound does not support the process."""

    def predicts(self, process: Process) -> Predicts:
        """Return what a network trained by this bound predicts, unless its ``Denoiser`` says another quantity.

        It is "denoiser" on an absorbing process and "loo" (leave-one-out) on others, and "ratio" for ``ScoreEntropy``.
        Every bound may also train a denoiser that declares another quantity, as ``Prediction`` converts between them.
        """
        return "denoiser" if process.absorbing else "loo"

    def __call__(self, model: Denoiser, x0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Return an unbiased draw of the bound for each row, (B,) nats a sequence, as training loss.

        The times are stratified over the rows. Gradients flow to the network. A learned schedule gets no gradient
        through the drawn noise.

        Raises:
            ValueError: if the bound does not support the process, or x0 is not data.
        """
        check_denoiser(model, type(self).__name__).check_data(x0, "x0")
        if x0.numel() == 0:
            raise ValueError(f"x0 must hold at least one row and one site, got shape {tuple(x0.shape)}")
        model.process.schedule.check_length(x0.shape[1])
        start = torch.rand((), dtype=torch.float64, device=x0.device)
        u = (start + torch.arange(len(x0), dtype=torch.float64, device=x0.device) / len(x0)) % 1
        return self.at(model, x0, u)

    @torch.no_grad()
    def estimate(self, model: Denoiser, x0: Int[Tensor, "B L"], draws: int, seed: int, prior: bool = True) -> Estimate:
        """Estimate the bound on -log p(x0) by Monte Carlo.

        Args:
            model: the denoiser.
            x0: (B, L) data.
            draws: independent draws, at least 2.
            seed: the seed of the draws.
            prior: whether to add ``prior_kl``. Without it the value is not a bound for a sampler that starts from the
                prior.

        Raises:
            ValueError: if ``prior_kl`` is infinite, as on a masked process whose alpha(1) is not 0.
        """
        draws, seed = whole(draws, "estimate: draws, for an error bar,", 2), whole(seed, "estimate: seed", 0, LAST_SEED)
        check_denoiser(model, "estimate").check_data(x0, "x0")
        start = prior_kl(model.process, x0) if prior else torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        if not bool(torch.isfinite(start).all()):
            raise ValueError(
                f"estimate: at t = 1 {model.process} keeps tokens that the prior never has, so the bound is infinite; "
                "use model.with_schedule(s) with a schedule that ends at alpha(1) = 0, or leave it out with prior=False"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values = torch.stack([self(model, x0) for _ in range(draws)])
        return Estimate(values.mean(0) + start, values.std(0) / draws**0.5, draws)


def prior_kl(process: Process, x0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """Return KL(q_1(. | x0) || prior) summed over the sites of x0 (B, L), (B,) nats; 0 where alpha(1) = 0."""
    one = torch.ones(1, x0.shape[1], dtype=torch.float64)
    alpha = process.schedule.alpha(one)
    if bool((alpha == 0).all()):
        return torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    prior = process.prior(x0.shape[0], x0.shape[1], x0.device)
    end, noise = (law.table()[0] for law in (process.noised(x0, alpha.to(x0.device)), prior))  # type: ignore[attr-defined]
    return torch.where(end > -torch.inf, end.exp() * (end - noise), 0.0).sum((-1, -2))


# --- continuous time ------------------------------------------------------------------------------------------------


class Continuous(Objective):
    """A bound that is an integral over alpha of a density at each site."""

    @abstractmethod
    def density(self, prediction: Prediction, x0: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """Return the part of the bound at each site, in nats per unit of the site's alpha, float64."""

    def at(self, model: Denoiser, x0: Int[Tensor, "B L"], u: Float[Tensor, "B *L"]) -> Float[Tensor, " B"]:
        process, schedule = model.process, model.process.schedule
        self.check(process)
        u = u if u.ndim == 2 else u[:, None]
        if schedule.sites is None:  # uniform in alpha
            least = schedule.alpha(1.0)
            t, width = schedule.time(least + (1 - least) * u), torch.tensor(1 - least, dtype=torch.float64)
        else:  # every site has its own alpha: uniform in t
            t = u.expand(x0.shape)
            width = -schedule.alpha_derivative(t)
        x_t = process.noised(x0, schedule.alpha(t).detach()).sample()
        return (self.density(model.evaluate(x_t, t), x0) * width.to(x0.device)).sum(-1)


@dataclass(frozen=True)
class MaskedNELBO(Continuous):
    """Bound of masked processes (MDLM, Sahoo et al., 2024), where D is the denoiser's prediction:

    int sum_{masked i} -log D(x0_i) dalpha / (1 - alpha)
    """

    def check(self, process: Process) -> None:
        if not (process.one_noise_law and process.masks):
            raise ValueError(f"MaskedNELBO applies to a Masked process, got {process}; ScoreEntropy applies to any")

    def density(self, prediction: Prediction, x0: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        hidden = prediction.x == prediction.process.hide(prediction.x)
        return _surprise(prediction, x0, hidden) / (1 - prediction.alpha).clamp(min=1e-300)


@dataclass(frozen=True)
class UniformNELBO(Continuous):
    r"""Plug-in bound of the uniform process in closed form, for a leave-one-out prediction O.

    Let z be the noisy token, xbar = V alpha x0 + 1 - alpha with one-hot x0, and obar = V alpha O + 1 - alpha. The
    integrand per unit of alpha is

        1 / (V alpha) [V / obar_z - V / xbar_z + sum_v (xbar_v / xbar_z) log((xbar_v obar_z) / (xbar_z obar_v))]

    References: UDLM (Schiff et al., 2025, https://arxiv.org/abs/2412.10193); Duo (Sahoo et al., 2025,
    https://arxiv.org/abs/2506.10892).
    """

    def check(self, process: Process) -> None:
        if not isinstance(process, Uniform):
            raise ValueError(f"UniformNELBO applies to a Uniform process, got {process}; ScoreEntropy applies to any")

    def density(self, prediction: Prediction, x0: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        size, alpha = prediction.process.vocab_size, prediction.alpha
        keep, rest = size * alpha, 1 - alpha
        obar = keep[..., None] * prediction.loo.double().exp() + rest[..., None]
        at_z, at_x = (obar.gather(-1, site[..., None])[..., 0] for site in (prediction.x, x0))
        same = (prediction.x == x0).double()
        x_z, x_x = keep * same + rest, keep + rest
        # xbar takes two values: keep + rest at x0, rest elsewhere
        cross = rest * (size - 1) * rest.log() + x_x * x_x.log() - rest * obar.log().sum(-1) - keep * at_x.log()
        log_ratio = size * (at_z.log() - x_z.log())  # sum_v xbar_v = V
        return (size / at_z - size / x_z + (cross + log_ratio) / x_z) / keep


@dataclass(frozen=True)
class AbsorbingNELBO(Continuous):
    r"""Bound of ``AbsorbingUniform``, where only sites whose token z equals their source token u contribute:

    1 / (1 - alpha) [1 - D(u) - 1(x0 != u) (1 + log D(x0))] per unit of alpha. The denoiser D gets the tokens z and the
    source tokens u of all sites.
    """

    def check(self, process: Process) -> None:
        if process.pairs is None or not process.absorbing:
            raise ValueError(
                f"AbsorbingNELBO applies to pairs without stochasticity, as AbsorbingUniform; got {process}"
            )

    def density(self, prediction: Prediction, x0: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        source = prediction.process.hide(prediction.x)
        hidden, u = prediction.x == source, prediction.process.column(source)
        nats = _surprise(prediction, x0, hidden)
        own = torch.exp(-_surprise(prediction, u, hidden))
        nats = 1 - own - (x0 != u).double() * (1 - nats)
        return torch.where(hidden, nats, 0.0) / (1 - prediction.alpha).clamp(min=1e-300)


@dataclass(frozen=True)
class ScoreEntropy(Continuous):
    r"""Diffusion-weighted denoising score entropy, for every process (DWDSE; SEDD, Lou et al., 2024):

    1 / alpha sum_{v != z} Q(v, z) [s_v - r_v log s_v + r_v (log r_v - 1)] per unit of alpha. Here z is the state of the
    site, s the predicted concrete score and r_v = q_t(v | x0) / q_t(z | x0).
    """

    def predicts(self, process: Process) -> Predicts:
        return "ratio"

    def density(self, prediction: Prediction, x0: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        process, x = prediction.process, prediction.x
        rate = process.inflow(x, prediction.alpha)
        active = (rate > 0).any(-1)  # other states have no inflow, and a masked model gives no score there
        log_s = torch.zeros(*x.shape, process.columns, dtype=torch.float64, device=x.device)
        log_s = log_s.index_put((active,), prediction[active].ratio.dense().double())
        log_r = torch.where(active[..., None], _pinned_ratio(prediction, x0), 0.0)
        r = log_r.exp()
        flux = r * (log_r - 1 - log_s).where(r > 0, 0.0) + log_s.exp()
        flux = flux.scatter(-1, process.column(x)[..., None], 0.0)
        return torch.where(active, (rate * flux).sum(-1), 0.0) / prediction.alpha


@dataclass(frozen=True)
class PathKL(Continuous):
    r"""Path Kullback-Leibler divergence between the reverse rates of the model and those of the process given x0.

    The model's rates R = sum_x D(x) R*_x are the rates R*_x given a clean token x, averaged over the denoiser D. This
    is Girsanov's formula for jumps (Campbell et al., 2022). The bound holds for every process.
    Its arrays are dense, for small V only.
    """

    def density(self, prediction: Prediction, x0: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        process, x = prediction.process, prediction.x
        rate = process.inflow(x, prediction.alpha).expand(*x.shape, process.columns)
        model = torch.zeros_like(rate)
        d = prediction.denoiser.double().exp()
        for v in process.data_tokens.tolist():
            # a token that cannot lead to z has D = 0; its ratio is undefined and set to 0
            pinned = _pinned_ratio(prediction, torch.full_like(x0, v)).exp()
            share = d[..., v, None]
            model = model + share * rate * pinned.where(share > 0, 0.0)
        own = process.column(x)[..., None]
        true = (rate * _pinned_ratio(prediction, x0).exp()).scatter(-1, own, 0.0)
        model = model.scatter(-1, own, 0.0)
        jumps = true > 0  # masked inside the logarithms too, or gradients are NaN at rate 0
        kl = true * (true.where(jumps, 1.0).log() - model.where(jumps, 1.0).log())
        return (model - true + kl).sum(-1) / prediction.alpha


def _surprise(prediction: Prediction, tokens: Tensor, where: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """Return -log D(tokens) at the chosen sites, 0 elsewhere, float64; only logits of these sites are read."""
    rows = prediction[where].denoiser.dense()
    rows = rows if rows.dtype == torch.float64 else rows.float()
    nats = torch.nn.functional.cross_entropy(rows, tokens[where], reduction="none")
    return torch.zeros_like(prediction.alpha).masked_scatter(where, nats.double())


def _pinned_ratio(prediction: Prediction, x0: Tensor) -> Float[Tensor, "B L C"]:
    """Return log q_t(v | x0) / q_t(z | x0) at every column v."""
    process, x = prediction.process, prediction.x
    one_hot = torch.nn.functional.one_hot(x0, process.vocab_size).double().log()
    log_q = process.conditional(one_hot.flatten(0, 1), x.flatten(), prediction.alpha.flatten()).unflatten(
        0, tuple(x.shape)
    )
    return log_q - log_q.gather(-1, process.column(x)[..., None])


# --- discrete time, and no time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiscreteBound(Objective):
    r"""Bound of a sampler with N ancestral steps t -> s: the sum over steps of KL(q(x_s | x_t, x0) || p(x_s | x_t)).

    p is q(x_s | x_t, x0) with the leave-one-out in place of x0, for any process. The last step gives the reconstruction
    -log p(x0 | x_t). In the mean over data the bound exceeds -log p0(x0), p0 the data law, and approaches it with more
    steps. For a single x0 the bound may be smaller than -log p0(x0) (D3PM, Austin et al., 2021).

    Args:
        steps: N, the number of equal intervals of t.

    Raises:
        TypeError, ValueError: if ``steps`` is not a whole number of at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole(self.steps, "DiscreteBound: steps", 1))

    def at(self, model: Denoiser, x0: Int[Tensor, "B L"], u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        schedule = model.process.schedule
        k = (u * self.steps).floor()[:, None]
        t, s = (k + 1) / self.steps, k / self.steps
        x_t = model.process.noised(x0, schedule.alpha(t)).sample()
        return self.steps * self.step(model.evaluate(x_t, t), x0, schedule.alpha(s)).sum(-1)

    def step(self, prediction: Prediction, x0: Int[Tensor, "B L"], alpha_s: Float[Tensor, "#B #L"]) -> Tensor:
        """Return KL(q(x_s | x_t, x0) || p(x_s | x_t)) at each site, (B, L) nats."""
        process, x = prediction.process, prediction.x
        moving = ~process.settled(x, prediction.alpha) if process.absorbing else torch.ones_like(x, dtype=torch.bool)
        log_p = prediction[moving].reverse(alpha_s).dense()
        one_hot = torch.nn.functional.one_hot(x0[moving], process.vocab_size).double().log()
        a_s = Process.sitewise(alpha_s, x)[moving]
        log_q = process.plug_in(one_hot, x[moving], prediction.alpha[moving], a_s)
        kl = torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0).sum(-1)
        return torch.zeros_like(prediction.alpha).masked_scatter(moving, kl)


@dataclass(frozen=True)
class AnyOrder(Objective):
    r"""Any-order autoregressive bound of a masked model: L E[mean of -log D(x0_i) over n random hidden sites i].

    D is the denoiser's prediction, and n is uniform on 1..L. The bound does not depend on the schedule. A model with a
    time input gets the time at which alpha = 1 - n / L.

    References: ARDM (Hoogeboom et al., 2022, https://arxiv.org/abs/2110.02037); RADD (Ou et al.,
    2025, https://arxiv.org/abs/2406.03736).
    """

    def check(self, process: Process) -> None:
        if not (process.one_noise_law and process.masks):
            raise ValueError(f"AnyOrder applies to a Masked process, got {process}")

    def at(self, model: Denoiser, x0: Int[Tensor, "B L"], u: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        length = x0.shape[1]
        n = (u * length).floor().long()[:, None] + 1
        hidden = torch.rand(x0.shape, device=x0.device).argsort(-1).argsort(-1) < n
        return self.given(model, x0, hidden)

    def given(self, model: Denoiser, x0: Int[Tensor, "B L"], hidden: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Return L times the mean of -log D(x0_i) over the hidden sites, (B,) nats.

        Raises:
            ValueError: unless the process has rank one and its only noise is the mask.
        """
        process = model.process
        self.check(process)
        share = hidden.double().mean(-1, keepdim=True)
        least = float(process.schedule.alpha(1.0))
        t = process.schedule.time((1 - share).clamp(min=least))
        prediction = model.evaluate(torch.where(hidden, process.hide(x0), x0), t)
        return _surprise(prediction, x0, hidden).sum(-1) / share[:, 0]
