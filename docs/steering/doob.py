"""Doob's transform and rewards by draws against enumerated laws, by process, estimator and number of draws.

python docs/steering/doob.py     # two minutes; prints the tables
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from page import table
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.operator import Run
from discdiff.theory.world import all_states, law_of_prior, state_index

V, L = 3, 2
LINEAR = dd.Linear()
PROCESSES: dict[str, dd.Process] = {
    "Masked": dd.Masked(V, LINEAR),
    "Uniform": dd.Uniform(V, LINEAR),
    "Marginal": dd.Marginal(torch.tensor([0.5, 0.3, 0.2]), LINEAR),
    "Hybrid": dd.Hybrid(V, LINEAR, p_uniform=0.4),
    "Ordinal": dd.Ordinal(V, LINEAR),
}
ESTIMATORS = ("self_normalised", "control_variate", "swap", "standardised")
DRAWS, STRONG, ROLLOUTS = (1, 2, 4, 8), (1, 4, 16, 64, 256), (1, 2, 4, 8)
X = all_states(V, L)


@cache
def world(length: int = L) -> T.Enumeration:
    """A law of sites with three tokens: 5 % uniform, 95 % drawn from Dirichlet(1/2)."""
    p0 = 0.05 / V**length + 0.95 * np.random.default_rng(1).dirichlet(np.full(V**length, 0.5))
    return T.Enumeration(torch.as_tensor(p0), vocab_size=V, length=length)


def log_w(length: int = L) -> Tensor:
    """The rewards log W (V^L,), drawn from the standard normal law."""
    return torch.as_tensor(np.random.default_rng(5).normal(size=V**length))


def reward(x: Tensor) -> Tensor:
    """The rewards (N,) of sequences (N, L)."""
    return log_w(x.shape[1])[state_index(x, V)]


@cache
def tilted(length: int = L) -> T.Enumeration:
    """The law p0 W / Z."""
    return world(length).tilted(log_w(length))


def guides(process: dd.Process, length: int = L, log_weights: Tensor | None = None) -> dict[str, dd.Guide]:
    """The guides by exact h, in both forms, and the factorised one where the process takes it."""
    weights = log_w(length) if log_weights is None else log_weights
    log_h = world(length).log_h(process, weights)
    exact: dict[str, dd.Guide] = {
        "neighbours": dd.Doob(log_h), "clean": dd.Doob(clean=world(length).log_clean(process, weights))
    }  # fmt: skip
    return exact if process.rank_one is None else exact | {"factorised": dd.Doob(log_h, form="factorised")}


def law(model: dd.Denoiser, steps: int, operator: dd.Operator | None = None) -> Tensor:
    """The exact law of a sampler from t = 1 to 0."""
    return T.law(dd.Sampler(model.process, model, operator or S.Ancestral(), steps=steps))


def windowed(
    model: dd.Denoiser, operator: dd.Operator, steps: int, window: tuple[float, float], length: int = L
) -> Tensor:
    """The exact law at the end of a window, from the tilted law at its beginning."""
    sampler = dd.Sampler(model.process, model, operator, grid=np.linspace(*window, steps + 1).tolist())
    return T.law(sampler, tilted(length).marginal(model.process, window[0]))


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The fitted slope of -log error against log steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# --- exact h ---------------------------------------------------------------------------------------------------------


def end_errors(process: dd.Process, guide: str, steps: Sequence[int] = (8, 16, 32)) -> list[float]:
    """TV of the end law under a guide to p0 W / Z, by ancestral steps."""
    model = world().denoiser(process, "loo").guided(guides(process)[guide])
    return [T.tv(law(model, n), tilted().p0) for n in steps]


def ends() -> str:
    """TV to p0 W / Z by ancestral steps, and the largest difference to the tilted world's own sampler."""
    rows = []
    for name, process in PROCESSES.items():
        own = tilted().denoiser(process, "loo")
        for guide, made in guides(process).items():
            model = world().denoiser(process, "loo").guided(made)
            apart = max(T.tv(law(model, n), law(own, n)) for n in (8, 32))
            errors = end_errors(process, guide)
            fitted = f"{slope((8, 16, 32), errors):.2f}"
            rows.append([name, guide, *(f"{e:.2e}" for e in errors), fitted, "0" if apart < 1e-12 else f"{apart:.3f}"])
    return table(["process", "form", "8 steps", "16", "32", "slope", "to the tilted world's own law"], rows)


def leap_errors(process: dd.Process, guide: str, steps: Sequence[int] = (8, 16, 32)) -> list[float]:
    """TV to the tilted law at t = .2 of SplitLeap steps from t = .8, three sites."""
    model = world(3).denoiser(process, "loo").guided(guides(process, 3)[guide])
    return [
        T.tv(windowed(model, S.SplitLeap(), n, (0.8, 0.2), 3), tilted(3).marginal(process, 0.2)) for n in steps
    ]  # fmt: skip


def leaps() -> str:
    """The order of a second-order predictor under exact and factorised guidance."""
    rows = []
    for name in ("Masked", "Uniform"):
        for guide in ("neighbours", "factorised"):
            errors = leap_errors(PROCESSES[name], guide)
            rows.append([name, guide, *(f"{e:.2e}" for e in errors), f"{slope((8, 16, 32), errors):.2f}"])
    return table(["process", "form", "8 steps", "16", "32", "slope"], rows)


def frozen_errors(steps: Sequence[int] = (8, 16, 32), guide: str = "neighbours") -> list[float]:
    """TV to the tilted law given a first site that is frozen, three sites, masked."""
    process, x = PROCESSES["Masked"], all_states(V, 3)
    right = torch.where(x[:, 0] == 1, tilted(3).p0, 0.0)
    model = world(3).denoiser(process, "loo").guided(guides(process, 3)[guide])
    laws = [
        T.law(dd.Sampler(process, model, S.Ancestral(), steps=n), prompt=[1, 0, 0], frozen=[True, False, False])
        for n in steps
    ]
    return [T.tv(one, right / right.sum()) for one in laws]


def start_errors(process: dd.Process, steps: Sequence[int] = (8, 16, 32, 64)) -> dict[str, list[float]]:
    """TV of the end law to the law of an unguided run times W, by the law of the initial states.

    The unguided run is one with infinitely many steps from the prior, whose end law is found by Bayes' rule.
    """
    clean = process.marginals(1.0)
    seen = posterior(clean, all_states(process.states, L))
    right = (law_of_prior(process, L) @ seen) * log_w().exp()
    guide = dd.Doob(world().log_h(process, log_w()))
    samplers = [
        dd.Sampler(process, world().denoiser(process, "loo").guided(guide), S.Ancestral(), steps=n) for n in steps
    ]
    laws = {"the prior": None, "the prior times h": guide.initial_law(process, L)}
    return {
        name: [T.tv(T.law(sampler, initial), right / right.sum()) for sampler in samplers]
        for name, initial in laws.items()
    }


def starts() -> str:
    """Where alpha(1) = .2, the initial states need a tilt too."""
    rows = [
        [name, *(f"{e:.4f}" for e in errors)] for name, errors in start_errors(dd.Uniform(V, dd.LogLinear(0.2))).items()
    ]
    return table(["initial states from", "8 steps", "16", "32", "64"], rows)


# --- draws -----------------------------------------------------------------------------------------------------------


def posterior(clean: Tensor, z: Tensor) -> Tensor:
    """p(x0 | z), (n, V^L), by Bayes' rule from q_t(z_i | x_i), a matrix (V, S); 0 where no data agrees with z."""
    like = torch.stack([clean[X[:, i]][:, z[:, i]].T for i in range(L)]).prod(0) * world().p0
    return like / like.sum(-1, keepdim=True).clamp(min=1e-300)


class Setting:
    """All states that are possible at t = .5, their probabilities, and the laws of a draw at each."""

    def __init__(self, name: str, scale: float = 1.0) -> None:
        self.process, self.t = PROCESSES[name], 0.5
        keep = world().reachable(self.process, self.t)
        self.z, self.p = all_states(self.process.states, L)[keep], world().marginal(self.process, self.t)[keep]
        self.model = world().denoiser(self.process, "loo")
        self.d = self.model(self.z, self.t).denoiser.exp()[..., :V]
        goal = world().tilted(scale * log_w()).denoiser(self.process, "loo")
        self.goal = goal(self.z, self.t).denoiser.exp()[..., :V]
        self.joint = posterior(self.process.marginals(self.t), self.z)
        self.product = torch.stack([self.d[:, i, X[:, i]] for i in range(L)]).prod(0)

    def rolled(self, rollout: int) -> Tensor:
        """The law of a draw by ancestral steps, (n, V^L)."""
        times, law = [self.t * (1 - k / rollout) for k in range(rollout + 1)], None
        for t, s in itertools.pairwise(times):
            step = T.kernel(S.Ancestral(), self.process, self.model, t, s)
            law = step if law is None else law @ step
        assert law is not None
        return law[state_index(self.z, self.process.states)][:, state_index(X, self.process.states)]

    def bias(self, found: Tensor) -> float:
        """The mean over states and sites of TV(found, D^h)."""
        return float((self.p * ((found - self.goal).abs().sum(-1) / 2).mean(-1)).sum())


def estimate(setting: Setting, k: int, draws: Tensor, guide: dd.Reward) -> Tensor:
    """D' (n, L, V) of the guide at the k-th state, when its choice takes given draws (n, M, L)."""
    run = Run.start(setting.model.guided(guide), len(draws), 0)
    run.given = lambda site, law, rows, scored: draws
    state, at = run.begin(setting.z[k].expand(len(draws), -1), setting.t)
    return at.predict(state).denoiser.exp()[..., :V]


def errors(name: str, joint: bool, estimator: str, samples: int) -> tuple[float, float]:
    """Bias and root mean square error of D^h at t = .5, exact over all multisets of draws, from p(x0 | z) or D."""
    setting, guide = Setting(name), dd.Reward(reward, samples, estimator)  # type: ignore[arg-type]
    sets = torch.tensor(list(itertools.combinations_with_replacement(range(len(X)), samples)))
    counts = torch.nn.functional.one_hot(sets, len(X)).sum(1).double()
    orders = math.lgamma(samples + 1) - torch.lgamma(counts + 1).sum(-1)
    mean, square = [], 0.0
    for k, drawn in enumerate(setting.joint if joint else setting.product):
        p = (orders + torch.where(counts > 0, counts * drawn.log(), 0.0).sum(-1)).exp()
        some = p > 0
        found = estimate(setting, k, X[sets[some]], guide)
        mean.append((p[some, None, None] * found).sum(0))
        square += float(setting.p[k] * (p[some] * (found - setting.goal[k]).square().sum((1, 2))).sum())
    return setting.bias(torch.stack(mean)), square**0.5


def estimators() -> str:
    """Bias of D^h by the number of draws, and the root mean square error with eight."""
    rows = []
    for name, joint in itertools.product(("Masked", "Uniform"), (True, False)):
        for estimator in ESTIMATORS:
            found = [errors(name, joint, estimator, samples) for samples in DRAWS]
            draws = "p(x0 given z)" if joint else "product of D"
            rows.append([name, draws, estimator, *(f"{bias:.4f}" for bias, _ in found), f"{found[-1][1]:.3f}"])
    return table(["process", "draws from", "estimator", "M = 1", "2", "4", "8", "rmse at 8"], rows)


def guided_ends(name: str, steps: int = 16) -> dict[str, float]:
    """TV of the end law to p0 W / Z: unguided, by swap with one draw, and by exact h."""
    model = world().denoiser(PROCESSES[name], "loo")
    models = {
        "unguided": model,
        "swap, M = 1": model.guided(dd.Reward(reward, 1)),
        "exact h": model.guided(guides(PROCESSES[name])["neighbours"]),
    }
    return {what: T.tv(law(one, steps), tilted().p0) for what, one in models.items()}


def guided() -> str:
    """TV of end laws after 16 ancestral steps."""
    found = {name: guided_ends(name) for name in ("Masked", "Uniform")}
    rows = [[name, *(f"{value:.3f}" for value in of.values())] for name, of in found.items()]
    return table(["process", *found["Masked"]], rows)


def strong_biases(name: str = "Uniform", scale: float = 4.0) -> list[float]:
    r"""The bias of the self-normalised D^h under W^scale by the number of draws, exact.

    With 1 / S = int_0^inf exp(-u S) du the mean of sum_m w_m f_m / sum_m w_m over independent draws is
    M int E[w f exp(-u w)] E[exp(-u w)]^{M - 1} du, one integral of a sum over sequences.
    """
    setting, w = Setting(name, scale), (scale * (log_w() - log_w().max())).exp()
    hit = torch.stack([torch.nn.functional.one_hot(X[:, i], V).double() for i in range(L)], 1)
    y = torch.linspace(-25, 25, 8001, dtype=torch.float64)
    u = y.exp()
    down = torch.exp(-u[:, None] * w)
    first, rest = torch.einsum("zx,ux,xlv->uzlv", setting.joint * w, down, hit), down @ setting.joint.T
    weight = u * (y[1] - y[0])
    means = [
        samples * torch.einsum("u,uzlv,uz->zlv", weight, first, rest ** (samples - 1)) for samples in STRONG
    ]  # fmt: skip
    return [setting.bias(mean) for mean in means]


def strong() -> str:
    """The bias of the self-normalised estimator under the reward 4 log W."""
    rows = [[name, *(f"{bias:.3f}" for bias in strong_biases(name))] for name in ("Masked", "Uniform")]
    return table(["process", *(f"M = {samples}" for samples in STRONG)], rows)


def limits(name: str, rollout: int) -> dict[str, float]:
    """The bias of D^h that is left with infinitely many draws by so many ancestral steps."""
    setting = Setting(name)
    weighed = setting.rolled(rollout) * log_w().exp()
    hit = torch.stack([torch.nn.functional.one_hot(X[:, i], V).double() for i in range(L)], 1)
    normalised = torch.einsum("zx,xlv->zlv", weighed / weighed.sum(-1, keepdim=True), hit)
    swapped = setting.d.clone()
    for i, v in itertools.product(range(L), range(V)):
        y = X.clone()
        y[:, i] = v
        swapped[:, i, v] *= setting.rolled(rollout) @ reward(y).exp()
    return {
        "self_normalised and control_variate": setting.bias(normalised),
        "swap": setting.bias(swapped / swapped.sum(-1, keepdim=True)),
    }


def rollouts() -> str:
    """What is left of the bias with infinitely many draws, by the number of steps of a rollout."""
    rows = []
    for name in ("Masked", "Uniform"):
        found = [limits(name, rollout) for rollout in ROLLOUTS]
        rows += [[name, kind, *(f"{one[kind]:.4f}" for one in found)] for kind in found[0]]
    return table(["process", "estimator", *(f"rollout = {rollout}" for rollout in ROLLOUTS)], rows)


# --- tables ----------------------------------------------------------------------------------------------------------


TABLES: dict[str, Callable[[], str]] = {
    "doob_ends": ends, "doob_leaps": leaps, "doob_starts": starts, "reward_estimators": estimators,
    "reward_ends": guided, "reward_strong": strong, "reward_rollouts": rollouts,
}  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of the page by name."""
    return {name: build() for name, build in TABLES.items()}


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for name, made in tables().items():
        print(f"{name}\n\n{made}")


if __name__ == "__main__":
    main()
