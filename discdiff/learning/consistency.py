r"""Consistency over many paths: a denoiser at time t learns from its own predictions at earlier times s < t.

For the exact denoiser D the prediction at t is the mean of the predictions at s over the process's own paths:

    E[D_s(x_s) | x_t] = D_t(x_t),        x_s ~ q(x_s | x_t, x0), x0 ~ p(x0 | x_t)              (tower rule)

So a network f is trained by  mean_k div(f_s(x_s^k), f_t(x_t))  over K paths of the bridge from one x_t and x0. At s = 0
the prediction is the clean sequence itself; there the loss is the cross-entropy, the anchor. Without it every constant
f has loss 0.

For the forward divergence KL(f_s || f_t) the minimum over f_t is the mean of the f_s, so D is the fixed point at every
step size. Reverse KL and the Jensen-Shannon divergence (JSD) are only *locally* consistent: for exact f_s their minimum
approaches D as s -> t. A training makes many such steps from s = 0 to t, and their errors add up. Only with an anchor
at every t does a smaller step help; that is seen on small worlds, not proved. So these two need an anchor.

The loss always uses the denoiser D. On noise that is not absorbing the rule fails for the leave-one-out.

References: Consistent Diffusion Language Models (2026, https://arxiv.org/abs/2605.00161); SDTT (Deschenaux and
Gulcehre, 2024, https://arxiv.org/abs/2410.21035); consistency distillation in Duo (Sahoo et al., 2025,
https://arxiv.org/abs/2506.10892).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from discdiff.checks import check_tokens, decided, listing, real, seeded, shown, whole
from discdiff.choices import Tokens
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.kernels.dispatch import Key
from discdiff.learning.objectives import StagedLoss, evaluating, refuse_own, surprise
from discdiff.learning.objectives import times as drawn_times
from discdiff.process import Process, Time, require_process

__all__ = ["Consistency", "Divergence", "bridge_paths"]

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
FLOOR = math.log(1e-6)  # least log-probability of a target in the reverse KL, which is infinite at 0
BRIDGE, TEACHER = 1, 2  # slots of keys


# --- divergences of a target p from a prediction q, both log-probabilities (..., V) -----------------------------------


def forward_kl(log_p: Float[Tensor, "*N V"], log_q: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """Return KL(p || q)."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def reverse_kl(log_p: Float[Tensor, "*N V"], log_q: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """Return KL(q || p) with entries of p below 1e-6 raised to it, so that the value is finite.

    The sum of p may then exceed 1 by 1e-6 V.
    """
    here = log_q > -torch.inf  # masked before the product: its gradient would be NaN at q = 0
    log_q = log_q.masked_fill(~here, 0.0)
    return torch.where(here, log_q.exp() * (log_q - log_p.clamp(min=FLOOR)), 0.0).sum(-1)


def jsd(log_p: Float[Tensor, "*N V"], log_q: Float[Tensor, "*N V"]) -> Float[Tensor, "*N"]:
    """Return (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    somewhere = (log_p > -torch.inf) | (log_q > -torch.inf)
    log_p, log_q = log_p.clamp(min=-80), log_q.clamp(min=-80)  # e^-80 in place of 0: logaddexp has no gradient at -inf
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return torch.where(somewhere, both, 0.0).sum(-1) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd,
}  # fmt: skip


# --- paths ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bridge_paths(
    process: Process, x_t: Int[Tensor, "B L"], x0: Int[Tensor, "B L"], t: Time, times: Sequence[Time], *,
    paths: SupportsIndex = 1, chained: bool = False, seed: SupportsIndex | None = None, first_row: SupportsIndex = 0,
) -> Int[Tensor, "K M B L"]:  # fmt: skip
    """Draw K paths of the bridge from x_t to x0 at M earlier times.

    Parallel paths draw the state of every time from q(x_s | x_t, x0), with the same random numbers at all times of a
    path (common random numbers). A chained path draws each state from the one before it, q(x_s | x_m, x0), with new
    numbers at each time, because the state before already depends on the old ones. Both give every state the same law.

    Args:
        process: the forward process.
        x_t: (B, L) states at time t.
        x0: (B, L) data.
        t: the time of x_t: a float, (B,) or (B, L).
        times: M times of the same kinds, at most t; of a chain, each at most the one before it.
        paths: K.
        chained: whether the states of a path form a chain.
        seed: the seed; state k of row b depends on (seed, first_row + b, k) and, if chained, on its place in the chain.
            It is drawn from torch's global generator if None.
        first_row: the id of the first row.

    Returns:
        (K, M, B, L) states.

    Raises:
        TypeError, ValueError: if an argument is out of range, a time is too late, or x_t cannot come from x0 at time t.
    """
    require_process(process, "bridge_paths")
    times, count = listing(times, "bridge_paths: times"), whole(paths, "bridge_paths: paths", 1)
    seed, first = seeded(seed, "bridge_paths: seed"), whole(first_row, "bridge_paths: first_row", 0)
    chained = decided(chained, "bridge_paths: chained")
    check_tokens(x_t, "bridge_paths: x_t")
    check_tokens(x0, "bridge_paths: x0")
    if first + len(x0) > 2**32:
        raise ValueError(f"bridge_paths: row ids must lie in [0, 2**32), got first_row {first} for {len(x0)} rows")
    if not times:
        raise ValueError("bridge_paths: takes at least one time")
    ids, made = torch.arange(first, first + len(x0), device=x0.device), []
    for path in range(count):
        x, now = x_t, t
        for place, s in enumerate(times):
            law = process.bridge(x, x0, now, s)
            law.key = Key(seed, ids, place if chained else 0, BRIDGE, path, "path")
            made.append(law.sample())
            x, now = (made[-1], s) if chained else (x_t, t)
    return torch.stack(made).unflatten(0, (count, len(times)))


# --- the loss ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consistency(StagedLoss):
    r"""Multi-path consistency loss with an anchor: mean_k div(f_s(x_s^k), f_t(x_t)), or -log f_t(x0) where s = 0.

    The time t is uniform in (0, 1] and stratified over the batch; s = max(t - step, 0). The predictions at s are those
    of the averaged weights (EMA), without gradient. The value is in nats a sequence. ``dd.Sampler`` with
    ``S.Ancestral()`` is the few-step sampler of the trained network: x0 from f_t, then x_s from the bridge.

    With forward KL and no teacher the fixed point is the exact denoiser D. The other two have a bias, which gets
    smaller with the step as long as there is an anchor.

    Args:
        process: the forward process, for a check that the trained network has it.
        divergence: "forward_kl", which is unbiased; "jsd" or "reverse_kl", which are locally consistent.
        paths: K, the bridge paths of a row.
        times: M, the number of times of a path, at equal distances from t down to s; the loss is their mean.
        chained: whether a path is a chain, as in ``bridge_paths``.
        step: the largest t - s at the beginning and at the end of training; it changes linearly.
        anchor: the share of rows, chosen at random, that compare with the data (s = 0). So do all rows with t <= step.
        teacher: a denoiser that draws x_s from x_t by ancestral steps, in place of the exact bridge. At s = 0 the
            target is then what it drew, but for the rows of ``anchor``. Its sites move independently in a step.
        teacher_steps: the number of steps of the teacher from one time of a path to the next.

    Raises:
        TypeError, ValueError: if an argument has a wrong type or is out of range.
    """

    process: Process
    divergence: Divergence = "forward_kl"
    paths: int = 4
    times: int = 1
    chained: bool = False
    step: tuple[float, float] = (0.5, 0.02)
    anchor: float = 0.25
    teacher: Denoiser | None = None
    teacher_steps: int = 1

    def __post_init__(self) -> None:
        require_process(self.process, "Consistency")
        if self.divergence not in DIVERGENCES:
            accepted = ", ".join(map(repr, get_args(Divergence)))
            raise ValueError(f"Consistency: divergence must be one of {accepted}, got {self.divergence!r}")
        for name in ("paths", "times", "teacher_steps"):
            object.__setattr__(self, name, whole(getattr(self, name), f"Consistency: {name}", 1))
        chained = decided(self.chained, "Consistency: chained")
        if chained and (self.times == 1 or self.teacher is not None):
            raise ValueError("Consistency: chained=True needs times= above 1, and no teacher, whose paths are chains")
        if self.teacher is None and self.teacher_steps > 1:
            raise ValueError("Consistency: teacher_steps= needs a teacher")
        step = listing(self.step, "Consistency: step")
        if len(step) != 2:
            raise ValueError(f"Consistency: step takes the first and the last step size, got {shown(self.step)}")
        object.__setattr__(self, "step", tuple(real(size, "Consistency: a step size", "(0, 1]") for size in step))
        object.__setattr__(self, "anchor", real(self.anchor, "Consistency: anchor", "[0, 1]"))
        if self.anchor == 0 and self.divergence != "forward_kl":
            raise ValueError(
                f"Consistency: {self.divergence!r} needs an anchor above 0, as its errors add up without it"
            )
        if self.teacher is not None and check_denoiser(self.teacher, "Consistency: teacher").process != self.process:
            raise ValueError(f"Consistency: the teacher's process is {self.teacher.process}, not {self.process}")

    def check(self, process: Process) -> None:
        if process != self.process:
            raise ValueError(f"Consistency: the loss is for {self.process}, and the network for {process}")

    def details(self) -> tuple[object, ...]:
        return () if self.teacher is None else (self.teacher,)

    def updates(self, model: Denoiser, average: Denoiser, x0: Tensor, done: float) -> Iterator[Tensor]:
        first, last = self.step
        yield self.at(model, average, x0, first + (last - first) * done)

    def __call__(self, model: Denoiser, x0: Tensor) -> Tensor:
        check_denoiser(model, "Consistency").check_data(x0, "x0")
        self.check(model.process)
        return self.at(model, model, x0, self.step[1])

    def at(self, model: Denoiser, target: Denoiser, x0: Int[Tensor, "B L"], step: float) -> Float[Tensor, " B"]:
        """Return a draw of the loss of each row of x0 (B, L), (B,) nats, with targets at s = max(t - step, 0).

        Raises:
            ValueError: for a network of ratios on noise that is not a mask, or one that is its own teacher.
        """
        refuse_own(self.teacher, model, "Consistency: teacher")
        if model.predicts == "ratio" and not self.process.masks:
            raise ValueError(
                "Consistency: a network of ratios gives no denoiser by itself on this noise; train it as D"
            )
        t = drawn_times(x0)
        clean = torch.rand(len(x0), device=x0.device) < self.anchor
        s = torch.where(clean, 0.0, (t - step).clamp(min=0))
        x_t = self.process.marginal(x0, t).sample()
        log_f = model.evaluate(x_t, t[:, None]).denoiser
        value = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        anchored = clean if self.teacher is not None else s == 0
        value = value.masked_scatter(anchored, surprise(log_f[anchored], x0[anchored]))
        if bool((~anchored).any()):
            part = [known[~anchored] for known in (log_f, x_t, x0, t, s)]
            value = value.masked_scatter(~anchored, self.residual(*part, target=target).double())
        return value

    def residual(
        self, log_f: Float[Tensor, "B L V"], x_t: Int[Tensor, "B L"], x0: Int[Tensor, "B L"],
        t: Float[Tensor, " B"], s: Float[Tensor, " B"], *, target: Denoiser, seed: int | None = None,
    ) -> Float[Tensor, " B"]:  # fmt: skip
        """Return the mean over paths and times of div(f_s(x_s), f_t(x_t)), summed over the sites, (B,) nats.

        For the exact denoiser and forward KL its mean over data is not 0, but the mutual information of each token of
        x0 and x_s given x_t, summed over the sites and averaged over the times.

        Args:
            log_f: (B, L, V) the prediction log f_t at x_t.
            x_t: (B, L) states at time t.
            x0: (B, L) data, the end of the bridge; the teacher does not use them.
            t: (B,) the times of x_t.
            s: (B,) the last time of the paths.
            target: the denoiser of the predictions f_s.
            seed: the seed of the paths; drawn from torch's global generator if None.

        Raises:
            TypeError, ValueError: for a bad seed, or as ``bridge_paths``.
        """
        seed, div = seeded(seed, "residual: seed"), DIVERGENCES[self.divergence]
        grid = [t + (s - t) * (n + 1) / self.times for n in range(self.times)]
        grid[-1] = s
        if self.teacher is None:
            drawn = bridge_paths(
                self.process, x_t, x0, t, grid, paths=self.paths, chained=self.chained, seed=seed
            ).flatten(0, 1)
        else:
            with evaluating(self.teacher):
                drawn = torch.stack([x for path in range(self.paths) for x in self._taught(x_t, t, grid, seed, path)])
        total = torch.zeros(len(t), dtype=log_f.dtype, device=log_f.device)
        for x_s, time in zip(drawn, grid * self.paths, strict=True):
            total = total + div(self._known(target, x_s, time).to(log_f.dtype), log_f).sum(-1)
        return total / len(drawn)

    @torch.no_grad()
    def _known(self, target: Denoiser, x_s: Tensor, s: Tensor) -> Float[Tensor, "B L V"]:
        """Return log f_s at x_s; at s = 0 it is the sequence itself, whatever the network says there."""
        log_p, clean = target.evaluate(x_s, s[:, None]).denoiser, s == 0
        tokens = self.process.column(x_s[clean])[..., None]
        log_p[clean] = torch.full_like(log_p[clean], -torch.inf).scatter(-1, tokens, 0.0)
        return log_p

    @torch.no_grad()
    def _taught(self, x_t: Tensor, t: Tensor, grid: Sequence[Tensor], seed: int, path: int) -> list[Tensor]:
        """Return a path of the teacher, a state at each time of the grid."""
        assert self.teacher is not None
        x, now, made, number = x_t, t, [], 0
        ids = torch.arange(len(t), device=t.device)
        for time in grid:
            start = now
            for n in range(self.teacher_steps):
                then = start + (time - start) * (n + 1) / self.teacher_steps if n + 1 < self.teacher_steps else time
                said = self.teacher.evaluate(x, now[:, None])
                where = torch.ones_like(x, dtype=torch.bool)
                if self.process.absorbing:
                    where = ~self.process.revealed(x, said.alpha)
                law = Tokens(said[where].reverse(self.process.schedule.alpha(then[:, None]).expand(x.shape)), x)
                law.key = Key(seed, ids, number, TEACHER, path, "path")
                x, now, number = law.sample(), then, number + 1
            made.append(x)
        return made
