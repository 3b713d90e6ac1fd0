"""Blockwise sampling and likelihoods: against autoregression, exact laws and whole-sequence runs."""

import zlib

import pytest
import torch
from problems import block_network, chain, strong
from scipy.stats import chisquare
from torch import Tensor

import discdiff as dd
from discdiff import kernels
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.command.bench import Meter
from discdiff.demo.transformer import Transformer
from discdiff.denoiser import ShownPrefix
from discdiff.kernels.dispatch import TAGS
from discdiff.losses import base as losses
from discdiff.losses import blocks as block_losses
from discdiff.operator import stream

pytestmark = pytest.mark.usefixtures("as_user")
MASKED, UNIFORM = dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())
FAMILIES = [MASKED, UNIFORM, dd.AbsorbingUniform(3, dd.Linear())]


def counted(tokens: Tensor, p: Tensor) -> float:
    """The p-value that draws of three sites follow a law."""
    count = torch.bincount((tokens * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    seen = p > 1e-12
    assert not bool(count[~seen].any())
    return float(chisquare(count[seen].numpy(), (p[seen] / p.sum()).numpy() * len(tokens)).pvalue)


# --- exact laws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", FAMILIES, ids=repr)
def test_blocks_of_one_site_are_exact(process: dd.Process) -> None:
    law = T.law(dd.Blockwise(process, strong().denoiser(process), S.Ancestral(), block=1, steps=3))
    assert T.tv(law, strong().p0) < 1e-12


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_smaller_blocks_and_more_steps_are_nearer(process: dd.Process) -> None:
    model, p0 = strong().denoiser(process), strong().p0

    def kl(block: int | list[int] | dict[int, float], steps: int) -> float:
        return T.kl(p0, T.law(dd.Blockwise(process, model, S.Ancestral(), block=block, steps=steps)))

    whole = T.law(dd.Sampler(process, model, S.Ancestral(), steps=4))
    assert T.tv(T.law(dd.Blockwise(process, model, S.Ancestral(), block=3, steps=4)), whole) < 1e-12
    assert kl(1, 4) < 1e-12 < kl(2, 8) < kl(2, 4) < kl(3, 4)
    assert kl(2, 4) != kl([1, 2], 4)
    parts = [T.law(dd.Blockwise(process, model, S.Ancestral(), block=b, steps=4)) for b in (1, 3)]
    mixed = T.law(dd.Blockwise(process, model, S.Ancestral(), block={1: 0.25, 3: 0.75}, steps=4))
    assert T.tv(mixed, 0.25 * parts[0] + 0.75 * parts[1]) < 1e-12


@pytest.mark.parametrize("process", FAMILIES, ids=repr)
@pytest.mark.parametrize("block", [2, {1: 0.5, 2: 0.5}], ids=repr)
def test_samples_follow_the_law(process: dd.Process, block: int | dict[int, float], failure_rate: float) -> None:
    sampler = dd.Blockwise(process, strong().denoiser(process), S.Ancestral(), block=block, steps=2)
    out, law = sampler.sample(40_000, 3, seed=3), T.law(sampler)
    assert counted(out.tokens, law) > failure_rate
    assert counted(out.tokens, strong().p0) < failure_rate  # two steps are not enough, and 40,000 draws see it


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_a_prompt_that_ends_within_a_block_conditions_it(process: dd.Process, failure_rate: float) -> None:
    """The block starts at t = 1 with its first sites given; a start at an earlier time from the prior does not do."""
    world = strong()
    model, given = world.denoiser(process), 2
    sampler = dd.Blockwise(process, model, S.Ancestral(), block=3, steps=64)
    out = sampler.sample(20_000, 3, seed=4, prompt=[given])
    assert bool((out.tokens[:, 0] == given).all())
    p = world.p0.clone()
    p[: 9 * given] = 0
    p[9 * given + 9 :] = 0
    assert counted(out.tokens, p) > failure_rate
    late = dd.Sampler(process, model, S.Ancestral(), grid=[0.5, 0.25, 0.0])
    noise = process.prior(20_000, 3).sample().index_fill(1, torch.tensor([0]), given)
    frozen = torch.tensor([True, False, False])
    early = late.sample(20_000, 3, seed=4, initial=noise, frozen=frozen, prompt=torch.full((3,), given))
    if process is UNIFORM:
        assert counted(early.tokens, p) < failure_rate


# --- autoregression -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [dd.Masked(5, dd.Linear()), dd.Uniform(5, dd.Linear())], ids=repr)
def test_block_size_one_is_the_autoregressive_sampler(process: dd.Process) -> None:
    """Tokens and log-probability, against a loop of its own over one causal pass a token."""
    model, length, seed = block_network(process), 12, 11
    net = model.fn
    assert isinstance(net, Transformer)
    sampler = dd.Blockwise(process, model, S.Ancestral(), block=1, steps=8)
    out = sampler.sample(4, length, seed=seed, record=True)
    x, ids = torch.zeros(4, length, dtype=torch.int64), torch.arange(4)
    for i in range(length):
        logits = net.blocks_at_once(x, torch.zeros_like(x), torch.zeros(4), 1)[:, i]
        key = {"seed": stream(seed, 1, i), "step": 1, "tag": zlib.crc32(b"token") % TAGS}
        x[:, i] = kernels.draw(logits, rows=ids, positions=torch.zeros_like(ids), **key)
    assert torch.equal(out.tokens, x)
    log_p = model.autoregressive(x).denoiser.gather(-1, x[..., None])[..., 0].sum(-1)
    assert out.log_prob is not None
    if isinstance(process, dd.Masked):  # on the others a fresh token is accepted first: another choice
        assert (out.log_prob - log_p).abs().max() < 1e-4
    assert out.nfe == sampler.nfe(length) == length
    objective = losses.MaskedNELBO() if isinstance(process, dd.Masked) else losses.UniformNELBO()
    exact = block_losses.Blocks(objective, 1)(model, x)
    assert (exact + log_p).abs().max() < 1e-4


@pytest.mark.parametrize("process", FAMILIES, ids=repr)
def test_the_autoregressive_law_of_an_oracle_is_the_chain_rule(process: dd.Process) -> None:
    world = strong()
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)
    states = x if not isinstance(process, dd.AbsorbingUniform) else process.join(x, torch.zeros_like(x))
    rows = world.denoiser(process).autoregressive(states).denoiser
    assert (rows.gather(-1, x[..., None])[..., 0].sum(-1) - world.p0.log()).abs().max() < 1e-9


def test_a_network_that_cannot_be_told_has_no_autoregressive_law() -> None:
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), UNIFORM, "loo", scalar_time=True)
    with pytest.raises(ValueError, match="cannot be told that the first tokens are clean"):
        model.autoregressive(torch.zeros(1, 4, dtype=torch.int64))


# --- rows, prefixes, stops ------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 0], [], [2] * 9, [0] * 16, [1]]


def models() -> list[dd.Denoiser]:
    """With a cache; without one; one that is always shown whole sequences."""
    oracles = [chain(3, 16).denoiser(process) for process in (UNIFORM, MASKED)]
    return [block_network(MASKED), block_network(UNIFORM), *oracles]


@pytest.mark.parametrize("model", models(), ids=lambda model: f"{type(model.fn).__name__} {model.process}")
@pytest.mark.parametrize("block", [4, [1, 3, 5], {1: 0.5, 4: 0.5}], ids=repr)
@pytest.mark.parametrize("stop", [(), 0], ids=["no stop", "stop"])
def test_rows_are_their_own(model: dd.Denoiser, block: int | list[int] | dict[int, float], stop: int) -> None:
    """A row has the same tokens in any batch, its prompt does not change, and what follows its stop is the stop."""
    sampler = dd.Blockwise(model.process, model, S.Ancestral(), block=block, steps=3)
    out = sampler.sample(5, 16, seed=7, prompt=PROMPTS, stop=stop)
    assert out.lengths is not None
    for row, prompt in enumerate(PROMPTS):
        one = sampler.sample(1, 16, seed=7, first_row=row, prompt=[prompt], stop=stop)
        assert torch.equal(one.tokens[0], out.tokens[row])
        tokens, length = out.tokens[row].tolist(), int(out.lengths[row])
        assert tokens[: len(prompt)] == prompt
        drawn = tokens[len(prompt) : length]
        if stop == ():
            assert length == 16
        else:
            assert 0 not in drawn[:-1]
            assert length == 16 or drawn[-1] == 0
            assert set(tokens[length:]) <= {0}
    assert not torch.equal(sampler.sample(5, 16, seed=8, prompt=PROMPTS, stop=stop).tokens, out.tokens)


def test_finished_rows_cost_nothing() -> None:
    """Calls and queries of every row: its own blocks until its stop, the block and what the cache takes in."""
    model = block_network(MASKED)
    sampler = dd.Blockwise(MASKED, model, S.Ancestral(), block=4, grid=[1.0, 0.5, 0.0])
    out = sampler.sample(64, 16, seed=0, stop=[2])
    assert out.lengths is not None
    blocks = torch.div(out.lengths + 3, 4, rounding_mode="floor")
    assert (out.nfe_rows <= 2 * blocks).all()
    assert (out.nfe_rows >= blocks).all()
    assert len(set(blocks.tolist())) > 2
    whole = dd.Blockwise(MASKED, model, S.Unmask(), block=4, steps=2).sample(8, 16, seed=0)
    assert whole.nfe == 8
    assert whole.queries == 8 * (4 * 2 * 4 + 3 * 4)  # two calls a block, and three blocks taken in


def test_one_block_is_the_plain_sampler() -> None:
    for process in (MASKED, UNIFORM):
        model, operator = block_network(process), S.Gibbs(2) >> S.Ancestral() if process is UNIFORM else S.Ancestral()
        whole = dd.Sampler(process, model, operator, steps=4)
        blocks = dd.Blockwise(process, model, operator, block=20, steps=4)
        assert torch.equal(blocks.sample(3, 20, seed=2).tokens, whole.sample(3, 20, seed=2).tokens)


@pytest.mark.parametrize("corrected", [False, True])
def test_calls_are_those_planned(corrected: bool) -> None:
    operator: dd.Operator = S.Gibbs() >> S.Ancestral() if corrected else S.SplitLeap()
    sampler = dd.Blockwise(UNIFORM, block_network(UNIFORM), operator, block=5, steps=4)
    out = sampler.sample(3, 18, seed=0)
    assert sampler.nfe(18) == 8 * 4
    assert out.nfe <= 8 * 4
    assert corrected is (out.nfe == 8 * 4)


def test_16k_tokens_need_no_more_than_the_cache() -> None:
    """Beside the cache nothing is larger than who sees whom, a block or a piece of the prompt against the tokens."""
    process, length, block = dd.Masked(3, dd.Linear()), 16_384, 16
    torch.manual_seed(0)
    net = Transformer(3, 4, 64, 2, sees_alpha=False).eval()
    model = dd.Denoiser(net, process, "denoiser", time=None)
    prompt = torch.randint(3, (length - 512,), generator=torch.Generator().manual_seed(0))
    with Meter() as meter:
        out = dd.Blockwise(process, model, S.Ancestral(), block=block, steps=2).sample(1, length, seed=0, prompt=prompt)
    assert torch.equal(out.tokens[0, : length - 512], prompt)
    keys = length * 64 * 4  # bytes of a layer; the cache has four times as many
    assert meter.largest < 1.1 * keys
    assert meter.peak < 8 * keys


# --- windows, greedy ends, cascades ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_a_window_shows_the_last_tokens_only(cached: bool) -> None:
    """Blocks further on are drawn as the same block behind the window's tokens alone would be."""
    net = block_network(UNIFORM)
    model = net if cached else dd.Denoiser(lambda x, alpha: net.fn(x, alpha), UNIFORM, "denoiser", time="alpha")
    sampler = dd.Blockwise(UNIFORM, model, S.Ancestral(), block=4, steps=3, window=12)
    out = sampler.sample(3, 24, seed=5)
    assert out.nfe == 6 * 3 + (5 if cached else 0)  # a cache is filled anew for every block but the first

    def last(prompt: Tensor) -> Tensor:
        found = sampler.sample(3, 24, seed=9, prompt=prompt, record=True).log_prob
        assert found is not None
        return found

    usual, far, near = (out.tokens[:, :20].clone() for _ in range(3))
    far[:, :12] = (far[:, :12] + 1) % 3  # what the last block is not shown
    near[:, 12:] = (near[:, 12:] + 1) % 3
    assert torch.equal(last(far), last(usual))
    assert not torch.equal(last(near), last(usual))


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
def test_a_window_makes_long_sequences_of_a_short_oracle(process: dd.Process, failure_rate: float) -> None:
    """A Markov chain is exact through a window of two sites, for 40 sites; one of independent blocks is not."""
    short = chain(3, 2)
    sampler = dd.Blockwise(process, short.denoiser(process), S.Ancestral(), block=1, steps=1, window=2)
    stationary = dd.Blockwise(process, short.denoiser(process), S.Ancestral(), block=2, steps=1, window=2)
    found = []
    for one in (sampler, stationary):
        x = one.sample(500, 40, seed=3).tokens
        pairs = torch.bincount((x[:, :-1] * 3 + x[:, 1:]).flatten(), minlength=9).view(3, 3)
        first = short.transition * 0 + pairs.sum(1, keepdim=True)
        found.append(float(chisquare(pairs.numpy().ravel(), (first * short.transition).numpy().ravel(), ddof=2).pvalue))
    assert found[0] > failure_rate > found[1]


@pytest.mark.parametrize("process", FAMILIES, ids=repr)
def test_a_greedy_end_takes_the_most_probable_token(process: dd.Process) -> None:
    world = strong()
    kernel = T.kernel(S.Greedy(), process, world.denoiser(process), t=0.5, s=0.0)
    z = torch.cartesian_prod(*[torch.arange(process.states)] * 3)
    best = world.denoiser(process)(z, 0.5).denoiser.argmax(-1)
    ends = process.column(z[kernel.argmax(-1)])
    assert bool(((kernel == 0) | (kernel == 1)).all())
    assert torch.equal(ends, best)


def test_a_cascade_conditions_its_second_stage(failure_rate: float) -> None:
    """y from the first site of a law, x from the others given y: the law itself; y of another row is not."""
    world = strong()
    joint = world.p0.view(3, 9)
    given = [T.Enumeration(row / row.sum(), vocab_size=3, length=2).denoiser(UNIFORM) for row in joint]
    first = T.Enumeration(joint.sum(1), vocab_size=3, length=1).denoiser(UNIFORM)

    def fn(x: Tensor, alpha: Tensor, y: Tensor) -> Tensor:
        t = (1 - alpha).double()[:, None]
        return torch.stack([one.evaluate(x, t).denoiser for one in given])[y[:, 0], torch.arange(len(x))]

    second = dd.Denoiser(fn, UNIFORM, "denoiser", time="alpha", time_dtype=torch.float64)  # type: ignore[arg-type]
    cascade = dd.Cascade(
        dd.Sampler(UNIFORM, first, S.Ancestral(), steps=2), dd.Sampler(UNIFORM, second, S.Ancestral(), steps=64)
    )
    y, x = cascade.sample(20_000, (1, 2), seed=0)
    assert counted(torch.cat([y.tokens, x.tokens], 1), world.p0) > failure_rate
    assert counted(torch.cat([y.tokens.roll(1, 0), x.tokens], 1), world.p0) < failure_rate
    part = cascade.sample(5, (1, 2), seed=0, first_row=7)
    assert torch.equal(part[1].tokens, x.tokens[7:12])


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block size must be at least 1, got 0"),
        ({"block": {2: 0.5}}, "must be probabilities"),
        ({"block": 4, "window": 3}, r"must hold a block \(4\)"),
        ({"block": 2, "grid": [0.9, 0.0], "steps": None}, "from t = 1 to 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dd.Blockwise(MASKED, block_network(MASKED), S.Ancestral(), **{"steps": 2, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [[1], [2]]}, "3 rows of them, at most 8 each; got 2 rows"),
        ({"prompt": [0] * 9}, "at most 8 each"),
        ({"prompt": [7]}, "prompt of row 0: row 0, position 0 holds 7"),
        ({"stop": 5}, "stop: row 0, position 0 holds 5"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    sampler = dd.Blockwise(MASKED, block_network(MASKED), S.Ancestral(), block=4, steps=2)
    with pytest.raises(ValueError, match=message):
        sampler.sample(**{"batch": 3, "length": 8, "seed": 0, **options})  # type: ignore[arg-type]


def test_an_approximate_infill_warns() -> None:
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 3), UNIFORM, "loo", scalar_time=True)
    sampler = dd.Blockwise(UNIFORM, model, S.Ancestral(), block=4, steps=2)
    with pytest.warns(UserWarning, match="infill is approximate"):
        sampler.sample(2, 8, seed=0, prompt=[1])


def test_a_shown_prefix_needs_no_padding() -> None:
    """A network without a cache sees each row's own prefix, whatever the others' lengths."""
    seen: list[int] = []

    def fn(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return torch.zeros(*x.shape, 3)

    tokens = torch.zeros(2, 5, dtype=torch.int64)
    context = ShownPrefix(torch.arange(2), torch.tensor([2, 5]), tokens)
    model = dd.Denoiser(fn, MASKED, "denoiser", time="t").given(context)
    model.output(torch.full((2, 3), 3), torch.full((1, 1), 0.5, dtype=torch.float64), torch.arange(2))
    assert sorted(seen) == [5, 8]
