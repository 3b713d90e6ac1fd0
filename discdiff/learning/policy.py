r"""Policies: a sampler's network learns from rewards of its samples, by the gradient of the law of its runs.

A run is all that a sampler draws, the first state and the choices of every step; r is the reward of its sample. For
independent runs 1..n, n >= 2, of one prompt the leave-one-out baseline keeps the policy gradient (REINFORCE) unbiased:

    grad E[r] = E[r grad log p(run)] = E[ mean_i A_i grad log p(run_i) ],      A_i = r_i - mean_{j != i} r_j

as E[grad log p] = 0 and the other rewards do not depend on run i. Here log p(run) is the sum over the steps k of
log p(choices of step k | state before it). It is exact for every operator that decides by choices; a greedy decision
has no gradient.

A penalty for leaving a reference q is part of the reward, r' = r - c (log p(run) - log q(run)), held constant:

    grad (E[r] - c KL(runs p || runs q)) = E[r' grad log p(run)] - c E[grad log p(run)] = E[r' grad log p(run)]

References: leave-one-out baselines, RLOO (Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740); PPO (Schulman et
al., 2017, https://arxiv.org/abs/1707.06347); GRPO (Shao et al., 2024, https://arxiv.org/abs/2402.03300); the steps of a
diffusion sampler as actions, DDPO (Black et al., 2024, https://arxiv.org/abs/2305.13301); branches and backward
progressive training, B2-DiffuRL (Hu et al., 2025, https://arxiv.org/abs/2503.11240).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from discdiff.checks import array, check_tokens, decided, real, shown, whole
from discdiff.denoiser import Denoiser, check_denoiser
from discdiff.learning.likelihoods import one_step_log_prob
from discdiff.learning.objectives import StagedLoss, evaluating, refuse_own
from discdiff.learning.run import told
from discdiff.prediction import Predicts
from discdiff.process import Process
from discdiff.sampling import Sampler, Samples, check_model

__all__ = ["Branch", "Likelihood", "PolicyGradient", "advantages"]

Branch = Literal["progressive"] | int | Callable[[float], int] | None
Likelihood = Literal["run", "one_step"]


def advantages(reward: Float[Tensor, "B G"], normalise: bool = False) -> Float[Tensor, "B G"]:
    """Return the rewards (B, G) of B groups less the mean of the others in the group, (B, G).

    With ``normalise`` they are divided by the group's standard deviation, as in GRPO. GRPO subtracts the mean of the
    whole group; its advantages are (G - 1) / G times these. The gradient is then not that of the mean reward.
    """
    others = (reward.sum(1, keepdim=True) - reward) / (reward.shape[1] - 1)
    return (reward - others) / (reward.std(1, keepdim=True) + 1e-6) if normalise else reward - others


class PolicyGradient(StagedLoss):
    r"""Policy gradient of a reward of samples, minus a KL divergence from a reference.

    Each row of a batch gives a group of runs. The value is -r', minus the penalised reward, and its gradient the policy
    gradient. With ``updates`` > 1 the runs serve for several optimizer steps. From the second on the objective is the
    clipped one of PPO, with one ratio rho_k of new to old probabilities for each step k of the sampler:

        -sum_k min(rho_k A, clip(rho_k, 1 - clip, 1 + clip) A)

    The advantage A, with its penalty, is that of the first update, where rho_k = 1 and the gradient is REINFORCE's.

    With ``branch`` = k > 0 each row makes one run up to step k, the trunk, and the group are its branches. The gradient
    is that of the steps after k alone, for states at step k as the network itself makes them; its earlier steps get
    none. The penalty then counts only the steps after k. k = 0 is the same as None.

    A network in training mode runs in evaluation mode meanwhile, because a run with dropout cannot be made again.

    Args:
        sampler: a sampler on a grid from 1 to 0; its denoiser, which has no guides, is replaced by the one that learns.
        reward: maps tokens (N, L) to finite numbers (N,).
        copies: G, the runs of each row, at least 2.
        frozen: (L,) the sites at which the data are a prompt; without it only their shape counts.
        reference: a denoiser of the process, for the penalty.
        kl: the weight c of the penalty.
        updates: the optimizer steps on the same runs.
        clip: the largest change of a ratio; more than one update takes it.
        normalise: whether to divide by the group's standard deviation (GRPO), which is *another objective*.
        branch: None; a step k; "progressive", which trains the last step first: k falls from N - 1 to 0 over the
            training; or a function of the share of the training that is done, which gives k.
        likelihood: "run", which is exact; or "one_step", *a biased approximation*: ``one_step_log_prob`` in place of
            the runs' log-probabilities, as diffu-GRPO does, with one ratio for each sequence.

    Attributes:
        count: the optimizer steps on the same runs.

    Raises:
        TypeError, ValueError: if an argument has a wrong type, is out of range, or has no effect beside another one.
    """

    whole: ClassVar[bool] = True

    def __init__(
        self, sampler: Sampler, reward: Callable[[Tensor], Tensor], *, copies: SupportsIndex = 8,
        frozen: Bool[Tensor, " L"] | Sequence[bool] | None = None, reference: Denoiser | None = None, kl: float = 0.0,
        updates: SupportsIndex = 1, clip: float | None = None, normalise: bool = False, branch: Branch = None,
        likelihood: Likelihood = "run",
    ) -> None:  # fmt: skip
        name = "PolicyGradient"
        if not isinstance(sampler, Sampler) or not callable(reward):
            raise TypeError(f"{name}: takes a Sampler and a function of tokens, got {shown(sampler)}, {shown(reward)}")
        if sampler.grid[0] != 1 or sampler.grid[-1] != 0 or len(sampler.models) > 1:
            raise ValueError(f"{name}: takes a sampler with one denoiser on a grid from 1 to 0, got {sampler}")
        (own,) = sampler.models.values()
        if own.guides or own.context is not None:
            raise ValueError(f"{name}: the denoiser is replaced, and its guides and context with it; a Plan has guides")
        self.sampler: Sampler = sampler
        self.reward: Callable[[Tensor], Tensor] = reward
        self.copies: int = whole(copies, f"{name}: copies", 2)
        self.frozen: Tensor | None = None if frozen is None else array(frozen, f"{name}: frozen")
        if self.frozen is not None and (self.frozen.dtype != torch.bool or self.frozen.ndim != 1):
            raise ValueError(f"{name}: frozen must be a bool mask (L,), got {shown(frozen)}")
        self.reference: Denoiser | None = reference
        self.kl: float = real(kl, f"{name}: kl", "[0, inf)")
        if reference is not None:
            check_model(sampler.process, reference, f"{name}: reference")
        if (reference is None) != (self.kl == 0):
            raise ValueError(f"{name}: kl > 0 and reference= go together, got kl = {self.kl:g} and {shown(reference)}")
        self.count: int = whole(updates, f"{name}: updates", 1)
        self.clip: float | None = None if clip is None else real(clip, f"{name}: clip", "(0, 1)")
        if self.clip is None and self.count > 1:
            raise ValueError(f"{name}: {self.count} updates on the same runs need clip=, such as 0.2")
        self.normalise: bool = decided(normalise, f"{name}: normalise")
        if isinstance(branch, str) and branch != "progressive":
            raise ValueError(f"{name}: branch must be 'progressive', a step, a function or None, got {branch!r}")
        given = branch is None or isinstance(branch, str) or callable(branch)
        self.branch: Branch = branch if given else self._step(branch)
        if likelihood not in ("run", "one_step"):
            raise ValueError(f"{name}: likelihood must be 'run' or 'one_step', got {shown(likelihood)}")
        if likelihood == "one_step" and (branch is not None or not sampler.process.masks):
            raise ValueError(f"{name}: likelihood='one_step' takes a process with a mask, and no branch=")
        self.likelihood: Likelihood = likelihood

    def _step(self, k: object) -> int:
        return whole(k, "PolicyGradient: branch", 0, len(self.sampler.grid) - 2)

    def check(self, process: Process) -> None:
        if process != self.sampler.process:
            raise ValueError(f"PolicyGradient: the sampler is for {self.sampler.process}, the network for {process}")

    def predicts(self, process: Process) -> Predicts:
        return self.sampler.model.predicts

    def step(self, done: float) -> int:
        """Return k, the last step that the branches share, by the share of the training that is done.

        Raises:
            TypeError, ValueError: if a function of the share gives no step from 0 to N - 1.
        """
        steps = len(self.sampler.grid) - 1
        if self.branch == "progressive":
            return max(0, steps - 1 - int(done * steps + 1e-9))
        return self._step(self.branch(done) if callable(self.branch) else self.branch or 0)

    def details(self) -> tuple[object, ...]:
        return self.reference, self.sampler.grid, self.reward

    def updates(self, model: Denoiser, average: Denoiser, x0: Tensor, done: float) -> Iterator[Float[Tensor, " B"]]:
        with evaluating(model):
            yield from self._updates(model, x0, self.step(done))

    def __call__(self, model: Denoiser, x0: Int[Tensor, "B L"]) -> Float[Tensor, " B"]:
        """Return the loss of one update, as at the end of a training, (B,), for the shape or prompts of x0 (B, L)."""
        self.check(check_denoiser(model, "PolicyGradient").process)
        return next(self._updates(model, x0, self.step(1.0)))

    def _updates(self, model: Denoiser, x0: Tensor, k: int) -> Iterator[Tensor]:
        """Draw runs once, and yield the loss (B,) of each update."""
        refuse_own(self.reference, model, "PolicyGradient: reference")
        out = self.runs(model, x0, k)
        new = self.log_prob(model, out, k)
        old = new.detach()
        with evaluating(self.reference):
            reward = self.rewards(out.tokens) - self.penalty(out, old, k)
        yield self.objective(reward, new, old)
        for _ in range(1, self.count):
            yield self.objective(reward, self.log_prob(model, out, k), old)

    def policy(self, model: Denoiser) -> Sampler:
        """Return the sampler with a denoiser in place of its own."""
        (name,) = self.sampler.models
        return Sampler(self.sampler.process, {name: model}, plan=self.sampler.plan)

    @torch.no_grad()
    def runs(self, model: Denoiser, x0: Int[Tensor, "B L"], k: int) -> Samples:
        """Draw the runs of the groups for x0 (B, L): B G rows, those of a group one after the other.

        Raises:
            TypeError, ValueError: if x0 holds no token ids, or as ``Sampler.sample``.
        """
        check_tokens(x0, "PolicyGradient: x0")
        sampler, (rows, length) = self.policy(model), x0.shape
        x0 = x0 if k else x0.repeat_interleave(self.copies, 0)
        given = {} if self.frozen is None else {"prompt": x0, "frozen": self.frozen}
        if not k:
            return sampler.sample(rows * self.copies, length, record="choices", **given)  # type: ignore[arg-type]
        trunk = sampler.sample(rows, length, record="choices", until=k, **given)  # type: ignore[arg-type]
        return sampler.fork(trunk, step=k, copies=self.copies)

    @torch.no_grad()
    def rewards(self, tokens: Int[Tensor, "N L"]) -> Float[Tensor, " N"]:
        """Return the rewards (N,) float64 of tokens (N, L); raise ValueError unless they are N finite numbers."""
        found = self.reward(tokens.clone())
        if not isinstance(found, Tensor) or found.shape != (len(tokens),) or found.is_complex():
            got = tuple(found.shape) if isinstance(found, Tensor) else shown(found)
            raise ValueError(f"PolicyGradient: the reward must give ({len(tokens)},) numbers, one a row, got {got}")
        found = found.to(tokens.device, torch.float64)
        if not bool(found.isfinite().all()):
            row = int((~found.isfinite()).nonzero()[0])
            raise ValueError(f"PolicyGradient: the reward of {tokens[row].tolist()} is {float(found[row])}")
        return found

    def log_prob(self, model: Denoiser, out: Samples, k: int) -> Float[Tensor, "N K"]:
        """Return the log-probabilities of runs, (N, K), one for each of the K steps that have a gradient.

        Raises:
            TypeError, ValueError: as ``Sampler.log_prob``; ValueError if no choice depends on the network's weights.
        """
        if self.likelihood == "one_step":
            return one_step_log_prob(model, out.tokens, self.frozen)[:, None]
        found = self.policy(model).log_prob(out, since=k, by_step=True)
        if torch.is_grad_enabled() and not found.requires_grad:
            if k == 0:
                raise ValueError(f"PolicyGradient: no choice of {self.sampler} depends on the network's weights")
            parts = model.fn.parameters() if isinstance(model.fn, nn.Module) else ()
            return found + sum(0.0 * part.sum() for part in parts)  # late steps may find all tokens known already
        return found

    @torch.no_grad()
    def penalty(self, out: Samples, own: Float[Tensor, "N K"], k: int) -> Float[Tensor, " N"]:
        """Return c (log p - log q) of runs, (N,), for their log-probabilities (N, K) under the network."""
        if self.reference is None:
            return own.new_zeros(len(own))
        return self.kl * (own - self.log_prob(self.reference, out, k)).sum(1)

    def objective(
        self, reward: Float[Tensor, " N"], new: Float[Tensor, "N K"], old: Float[Tensor, "N K"]
    ) -> Float[Tensor, " B"]:
        """Return the loss (B,): the value is -reward (N,), and the gradient that of the clipped ratios of (N, K)."""
        reward = reward.view(-1, self.copies)
        gain, ratio = advantages(reward, self.normalise).view(-1, 1), (new - old).exp()
        gained = ratio * gain
        if self.clip is not None:
            gained = torch.minimum(gained, ratio.clamp(1 - self.clip, 1 + self.clip) * gain)
        loss = -gained.sum(1).view(-1, self.copies).mean(1)
        return loss - (loss + reward.mean(1)).detach()

    def __repr__(self) -> str:
        branch = told(self.branch) if callable(self.branch) else repr(self.branch)
        sites = None if self.frozen is None else "".join(str(int(here)) for here in self.frozen)
        return (
            f"PolicyGradient({self.sampler}, {told(self.reward)}, copies={self.copies}, frozen={sites}, "
            f"reference={self.reference}, kl={self.kl:g}, updates={self.count}, clip={self.clip}, "
            f"normalise={self.normalise}, branch={branch}, likelihood={self.likelihood!r})"
        )
