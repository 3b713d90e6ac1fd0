"""Autoregressively informed steps: their kernels by hand, their noise, their calls, and what they do to the law."""

import itertools
import math

import pytest
import torch
from problems import block_network, chain, dirichlet, states, strong
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

pytestmark = pytest.mark.usefixtures("as_user")
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
SCORES = ["nll", "gap", "entropy", "kl", "reverse_kl", "tv"]


# --- one step -------------------------------------------------------------------------------------------------------


def by_hand(world: T.Enumeration, process: dd.Process, t: float, score: str, temperature: float) -> Tensor:
    """The kernel of a guided step that re-noises one of two sites, from p0 alone."""
    z, size = states(process.states, 2), process.states
    d = world.denoiser(process)(z, t).denoiser.exp()
    joint = world.p0.view(3, 3)
    read = torch.stack([joint.sum(1).expand(3, 3), joint / joint.sum(1, keepdim=True)])  # p(. | x_{<i})
    kernel = torch.zeros(len(z), size, size, dtype=torch.float64)
    noise = torch.full((3,), 1 / 3, dtype=torch.float64) if process is UNIFORM else None
    for row, (a, b) in itertools.product(range(len(z)), itertools.product(range(3), range(3))):
        weight, scores = d[row, 0, a] * d[row, 1, b], []
        if weight == 0:
            continue
        for site, own in enumerate((a, b)):
            p, q = read[site, a], d[row, site]
            kl, back = (torch.special.xlogy(u, u / v).sum() for u, v in ((p, q), (q, p)))
            named = {"nll": -p[own].log(), "gap": (p.max() / p[own]).log(), "entropy": torch.special.entr(p).sum()}
            named |= {"kl": kl, "reverse_kl": back, "tv": (p - q).abs().sum() / 2}
            scores.append(named[score].nan_to_num(posinf=1e300))
        first = torch.stack(scores)
        chosen = torch.eye(2)[first.argmax()] if temperature == 0 else (first / temperature).softmax(0)
        for site in (0, 1):
            if noise is None:
                kernel[row, *((size - 1, b) if site == 0 else (a, size - 1))] += weight * chosen[site]
            else:
                kernel[row, :, b] += weight * chosen[site] * noise * (site == 0)
                kernel[row, a, :] += weight * chosen[site] * noise * (site == 1)
    return kernel.flatten(1)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_guided_step_is_its_formula(process: dd.Process, score: str, temperature: float) -> None:
    world = dirichlet(1.0, 3, length=2)
    made = T.kernel(S.ARPC(score, temperature), process, world.denoiser(process), t=0.8, s=0.5)  # type: ignore[arg-type]
    expected = by_hand(world, process, 0.8, score, temperature)
    if temperature > 0 and process is MASKED and score == "kl":  # infinite where a revealed token was not certain
        made, expected = made[-1:], expected[-1:]
    assert (made - expected).abs().max() < 1e-9
    another = by_hand(world, process, 0.8, SCORES[SCORES.index(score) - 1], temperature)[: len(made)]
    assert (made[-1] - another[-1]).abs().max() > 1e-3 or (made - another).abs().max() > 1e-3


@pytest.mark.parametrize("score", [*SCORES, "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exactly_k_sites_are_noise(score: str, temperature: float) -> None:
    """k = max(1, round((1 - alpha_s) n)) of the n free sites, and no given one."""
    model = chain(3, 12).denoiser(MASKED)
    frozen = torch.zeros(12, dtype=torch.bool)
    for free, alpha in itertools.product((12, 7), (0.5, 0.75, 0.97)):
        frozen[: 12 - free] = True
        sampler = dd.Sampler(MASKED, model, S.ARPC(score, temperature), grid=[1.0, 1 - alpha])  # type: ignore[arg-type]
        out = sampler.sample(20, 12, seed=0, prompt=torch.zeros(12).long(), frozen=frozen)
        masks = out.tokens == MASKED.mask_id
        assert (masks.sum(-1) == max(1, round((1 - alpha) * free))).all()
        assert not bool(masks[:, : 12 - free].any())
    last = dd.Sampler(MASKED, model, S.ARPC(score, temperature), steps=1).sample(20, 12, seed=0)  # type: ignore[arg-type]
    assert not bool((last.tokens == MASKED.mask_id).any())


# --- the end law ----------------------------------------------------------------------------------------------------


def ends(process: dd.Process, score: str, steps: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """KL(p0 || law) and the law's entropy, by the number of steps."""
    world = strong()
    sampler = [
        dd.Sampler(process, world.denoiser(process), S.ARPC(score).scheduled(n), steps=n)  # type: ignore[arg-type]
        for n in steps
    ]
    laws = [T.law(one) for one in sampler]
    return [T.kl(world.p0, law) for law in laws], [float(torch.special.entr(law).sum()) for law in laws]


def test_random_renoising_ends_at_the_data_and_informed_does_not() -> None:
    entropy = float(torch.special.entr(strong().p0).sum())
    kl, found = ends(MASKED, "random", (4, 16, 64))
    assert kl[0] > 30 * kl[1] > 300 * kl[2]
    assert kl[2] < 1e-7
    assert abs(found[2] - entropy) < 1e-4
    for score in ("nll", "gap", "entropy"):
        kl, found = ends(MASKED, score, (4, 16, 64))
        assert kl[0] < kl[1] < kl[2]
        assert kl[2] > 1
        assert found[2] < found[0]
    kl, found = ends(MASKED, "nll", (4, 64))
    assert found[1] < entropy / 2


def test_on_a_uniform_process_the_noise_must_be_that_of_its_time() -> None:
    """A fixed number of noisy sites is more noise than alpha_s says, and a denoiser that is told alpha_s keeps it."""
    kl, _ = ends(UNIFORM, "forward", (2, 8))
    assert kl[0] > 3 * kl[1]
    kl, found = ends(UNIFORM, "random", (8, 16))
    assert kl[1] > kl[0]
    assert found[1] > float(torch.special.entr(strong().p0).sum()) + 0.2
    kl, found = ends(UNIFORM, "nll", (4, 16))
    assert kl[1] > kl[0]
    assert found[1] < found[0]


# --- calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "warmup", "period"), [(8, 0, 1), (8, 2, 1), (8, 1, 3), (4, 9, 1), (2, 0, 2), (1, 0, 1)]
)
@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_calls_are_the_formula(process: dd.Process, steps: int, warmup: int, period: int) -> None:
    operator = S.ARPC().scheduled(steps, warmup=warmup, period=period)
    sampler = dd.Blockwise(process, block_network(process), operator, block=8, steps=steps)
    guided = (steps - 2 - warmup) // period + 1 if steps - 2 >= warmup else 0
    out = sampler.sample(4, 24, seed=0)
    assert sampler.nfe(24) == 3 * (steps + guided)
    assert out.nfe <= 3 * (steps + guided)
    if guided == steps - 1:  # no plain step that may find nothing to change, but the last
        assert out.nfe >= 3 * (steps + guided - 1)
    blind = dd.Blockwise(process, block_network(process), S.ARPC("random").scheduled(steps), block=8, steps=steps)
    assert blind.nfe(24) == 3 * steps


def test_a_score_takes_two_queries_a_token() -> None:
    operator = S.ARPC()
    whole = dd.Sampler(MASKED, block_network(MASKED), operator, grid=[1.0, 0.5]).sample(3, 8, seed=0)
    assert (whole.nfe, whole.queries) == (2, 3 * (8 + 16))
    shown = dd.Sampler(MASKED, chain(3, 8).denoiser(MASKED), operator, grid=[1.0, 0.5]).sample(3, 8, seed=0)
    assert (shown.nfe, shown.queries) == (2, 3 * (8 + 64))


def test_guided_steps_are_those_of_the_schedule() -> None:
    guided = S.ARPC().scheduled(8, warmup=1, period=3)
    assert repr(guided) == (
        "when(guided(steps=8, warmup=1, period=3), ARPC(score='nll', temperature=0.0), Ancestral())"
    )
    model = chain(3, 8).denoiser(MASKED)
    with pytest.raises(ValueError, match="8 equal steps"):
        dd.Sampler(MASKED, model, guided, steps=5).sample(1, 8, seed=0)
    which = [guided.at(1 - i / 8) for i in range(8)]  # type: ignore[attr-defined]
    assert [isinstance(operator, S.ARPC) for operator in which] == [i in (1, 4) for i in range(8)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: S.ARPC("best"), "score must be one of 'nll'"),  # type: ignore[arg-type]
        (lambda: S.ARPC(temperature=-1.0), "temperature must lie in"),
        (lambda: S.ARPC().scheduled(8, period=0), "period must be at least 1"),
        (lambda: S.ARPC(temperature=math.nan), "temperature must lie in"),
    ],
)
def test_bad_options_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
