"""What every operator does: it ends at what a model is certain of, keeps what is given, and leaves no mask."""

import pytest
import torch
from operators import STEPS, accepted
from problems import families, pairs

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters.generation import generate

pytestmark = pytest.mark.usefixtures("as_user")  # thousands of runs, whose shapes other tests look at

V, L = 3, 4
ROWS = 200  # rows of a batch are seeds: what is drawn is a function of (seed, row id)
GOAL = torch.tensor([2, 0, 1, 2])
PROCESSES = [*families(V), *pairs(V), dd.Masked(V + 1, dd.Linear(), mask_id=1)]
MASKED, UNIFORM, PAIRS = PROCESSES[0], PROCESSES[1], PROCESSES[8]
KINDS = [MASKED, UNIFORM, PAIRS, *(p for p in PROCESSES if type(p) in (dd.Hybrid, dd.General))]


def name(process: dd.Process) -> str:
    return f"{type(process).__name__}-{process.mask_id}"


def all_but(few: list[dd.Process]) -> list[object]:
    """All processes, of which the short suite takes a few."""
    return [pytest.param(p, id=name(p), marks=[] if p in few else [pytest.mark.slow]) for p in PROCESSES]


def certain(process: dd.Process, goal: torch.Tensor = GOAL) -> dd.Denoiser:
    """Sure of one token at every site, whatever it is shown."""
    ids = process.data_tokens[goal]

    def fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.full((*x.shape, process.vocab_size), -torch.inf).scatter(-1, ids.expand(x.shape)[..., None], 0.0)

    return dd.Denoiser(fn, process, predicts="loo", length=L)


def table(process: dd.Process) -> dd.Denoiser:
    """Logits that depend on the site, the state there and the one before."""
    weight = torch.randn(2, process.states, process.vocab_size, generator=torch.Generator().manual_seed(0))
    return dd.Denoiser(lambda x, t: weight[0][x] + weight[1][x.roll(1, -1)], process, predicts="loo")


def clean(tokens: torch.Tensor, process: dd.Process) -> bool:
    return bool(torch.isin(tokens, process.data_tokens).all())


@pytest.mark.parametrize("process", all_but(KINDS))
def test_a_certain_model_is_followed(process: dd.Process) -> None:
    goal, model = process.data_tokens[GOAL], certain(process)
    for operator in STEPS:
        if accepted(operator, process):
            tokens = dd.Sampler(process, model, operator, steps=2).sample(ROWS, seed=0).tokens
            assert bool((tokens == goal).all()), f"{operator}: {tokens[(tokens != goal).any(-1)][:3].tolist()}"


def test_every_operator_is_tried() -> None:
    def inside(operator: dd.Operator) -> set[str]:
        return {type(operator).__name__}.union(*(inside(part) for part in operator.parts))

    tried = set[str]().union(*(inside(operator) for operator in STEPS if any(accepted(operator, p) for p in PROCESSES)))
    assert tried >= set(S.__all__)


class Leaky(S.Ancestral):
    """The planted fault: it forgets a site."""

    def __call__(self, state: dd.State, at: object) -> dd.State:
        after = super().__call__(state, at)
        return after.at(torch.cat([state.tokens[:, :1], after.tokens[:, 1:]], 1))


def test_one_that_is_not_certain_is_not() -> None:
    """The test above can fail: by a token that the model gives a chance, and by an operator that forgets a site."""
    process, goal = UNIFORM, UNIFORM.data_tokens[GOAL]
    tokens = dd.Sampler(process, table(process), S.Ancestral(), steps=3).sample(ROWS, L, seed=0).tokens
    assert not bool((tokens == goal).all())
    forgot = dd.Sampler(process, certain(process), Leaky(), steps=2).sample(ROWS, seed=0).tokens
    assert not bool((forgot == goal).all())


@pytest.mark.parametrize("process", all_but([MASKED, UNIFORM, PAIRS]))
def test_given_tokens_come_back_and_no_mask_is_left(process: dd.Process) -> None:
    given = process.data_tokens[torch.randint(V, (8, 5), generator=torch.Generator().manual_seed(1))]
    where = torch.tensor([True, False, False, True, False])
    for operator in STEPS:
        if accepted(operator, process):
            sampler = dd.Sampler(process, table(process), operator, steps=3)
            tokens = sampler.sample(8, 5, seed=3, prompt=given, frozen=where).tokens
            assert torch.equal(tokens[:, where], given[:, where]), operator
            assert clean(tokens, process), operator


@pytest.mark.parametrize("process", all_but([MASKED, UNIFORM]))
def test_so_it_is_block_by_block(process: dd.Process) -> None:
    prompt = process.data_tokens[torch.randint(V, (4, 3), generator=torch.Generator().manual_seed(1))]
    for operator in STEPS:
        if accepted(operator, process):
            made = dd.Blockwise(process, table(process), operator, block=2, steps=2).sample(4, 5, seed=3, prompt=prompt)
            assert torch.equal(made.tokens[:, :3], prompt), operator
            assert clean(made.tokens, process), operator


def test_so_it_is_in_generate_and_in_cascades() -> None:
    process = MASKED
    prompt = process.data_tokens[torch.randint(V, (4, 2), generator=torch.Generator().manual_seed(1))]
    for operator in STEPS:
        if accepted(operator, process):
            tokens = generate(table(process), prompt, max_new_tokens=3, operator=operator, steps=2, seed=3)
            assert torch.equal(tokens[:, :2], prompt), operator
            assert clean(tokens, process), operator
    sampler = dd.Sampler(process, table(process), S.Ancestral(), steps=2)
    told = dd.Denoiser(lambda x, t, y: table(process).fn(x, t), process, predicts="loo")
    both = dd.Cascade(sampler, dd.Sampler(process, told, S.Unmask("margin"), steps=2)).sample(4, (3, 5), seed=0)
    assert all(clean(samples.tokens, process) for samples in both)


def test_so_it_is_in_a_pipeline() -> None:
    scheduling = pytest.importorskip("discdiff.adapters.to_diffusers")
    prompt, where = torch.tensor([[2, 0, 1, 1, 0]]).expand(4, -1), torch.tensor([True, False, False, True, False])
    for operator in STEPS:
        scheduler = scheduling.OperatorScheduler(vocab_size=V, predicts="loo", seed=5)
        if not accepted(operator, scheduler.process) or operator.nfe != 1:
            continue
        scheduler.operator = operator
        scheduler.set_timesteps(3)
        x = torch.where(where, prompt, V)
        for n in scheduler.timesteps:
            x = scheduler.step(table(scheduler.process).fn(x, None), n, x, prompt_mask=where).prev_sample
        assert torch.equal(x[:, where], prompt[:, where]), operator
        assert clean(x, scheduler.process), operator


def test_a_mask_that_is_left_is_refused_everywhere() -> None:
    process, model = MASKED, table(MASKED)
    with pytest.raises(ValueError, match="row 7, position 0: the mask is left at time 0"):
        dd.Sampler(process, model, Leaky(), steps=2).sample(2, 5, seed=0, first_row=7)
    with pytest.raises(ValueError, match="position 0: the mask is left"):
        dd.Blockwise(process, model, Leaky(), block=2, steps=2).sample(2, 5, seed=0)
    with pytest.raises(ValueError, match="position 0: the mask is left"):
        generate(model, torch.tensor([[], []], dtype=torch.int64), max_new_tokens=3, operator=Leaky(), seed=0)
    with pytest.raises(ValueError, match="leaves masks"):
        dd.theory.law(dd.Sampler(process, model, Leaky(), steps=2), length=2)
    scheduling = pytest.importorskip("discdiff.adapters.to_diffusers")
    scheduler = scheduling.OperatorScheduler(vocab_size=V)
    scheduler.operator = Leaky()
    scheduler.set_timesteps(1)
    x = torch.full((2, 5), V)
    with pytest.raises(ValueError, match="position 0: the mask is left"):
        scheduler.step(model.fn(x, None), 0, x)
    assert (
        dd.Sampler(process, model, Leaky(), grid=[1.0, 0.5]).sample(2, 5, seed=0).nfe
    )  # before time 0 a mask is right
