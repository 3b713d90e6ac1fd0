"""Steps by hand, runs that are cut and resumed, correctors alone, and what operators report."""

from dataclasses import replace

import pytest
import torch
from operators import STEPS, accepted
from problems import processes, strong

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T

WORLD, N = strong(), 5
# Enumerations and hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")


def sampler_of(operator: dd.Operator, process: dd.Process, time: str | None = "t") -> dd.Sampler:
    model = WORLD.denoiser(process, predicts="loo")
    if time is None:  # a denoiser without a time is not called again on the tokens of its last call
        logits = torch.randn(process.states, 3, generator=torch.Generator().manual_seed(0))
        model = dd.Denoiser(lambda x, t: logits[x], process, "loo", time=None, length=3)
    return dd.Sampler(process, model, operator, steps=N)


@pytest.mark.parametrize("process", processes(), ids=repr)
@pytest.mark.parametrize("operator", STEPS, ids=lambda operator: repr(operator).partition(" at 0x")[0])
def test_a_run_cut_at_every_step_is_the_uncut_run(operator: dd.Operator, process: dd.Process) -> None:
    if not accepted(operator, process):
        pytest.skip("not for this process")
    sampler = sampler_of(operator, process)
    for record in (False, True):
        whole = sampler.sample(4, seed=7, record=record)
        for cut in range(1, N):
            part = sampler.sample(4, seed=7, record=record, until=cut)
            rest = sampler.sample(resume=part.state, record=record)
            assert torch.equal(rest.tokens, whole.tokens)
            assert (rest.nfe, rest.queries, rest.seed) == (whole.nfe, whole.queries, whole.seed)
            assert torch.equal(rest.nfe_rows, whole.nfe_rows)
            if record:
                assert part.trajectory is not None
                assert rest.trajectory is not None
                assert whole.trajectory is not None
                assert rest.log_prob is not None
                assert torch.equal(torch.cat([part.trajectory, rest.trajectory[1:]]), whole.trajectory)
                torch.testing.assert_close(rest.log_prob, whole.log_prob)


@pytest.mark.parametrize(
    "operator", [S.Ancestral(), S.Multistep(), S.Unmask(), S.Ancestral() >> S.Gibbs() ** 2], ids=repr
)
@pytest.mark.parametrize("time", ["t", None])
def test_a_step_is_pure_and_steps_make_the_run(operator: dd.Operator, time: str | None) -> None:
    sampler = sampler_of(operator, dd.Masked(3, dd.Linear()), time)
    whole = sampler.sample(4, seed=7)
    state = sampler.start(4, seed=7)
    before = state.tokens.clone()
    for step in range(1, N + 1):
        once, again = sampler.step(state), sampler.step(state)
        assert torch.equal(state.tokens, before)
        assert torch.equal(once.tokens, again.tokens)
        assert (once.step, once.run.tally.nfe) == (step, again.run.tally.nfe)
        state, before = once, once.tokens.clone()
    assert torch.equal(state.tokens, whole.tokens)
    assert state.run.tally.nfe == whole.nfe
    with pytest.raises(ValueError, match="all 5 steps are made"):
        sampler.step(state)


def test_a_step_with_another_number_is_caught() -> None:
    sampler = sampler_of(S.Ancestral(), dd.Uniform(3, dd.Linear()))
    whole, part = sampler.sample(64, seed=7), sampler.sample(64, seed=7, until=2)
    wrong = sampler.on_grid(sampler.grid[2:])  # the same times, numbered from 1 again
    state = replace(part.state, step=0)
    state.run.model.denoiser = wrong.model
    assert not torch.equal(wrong.sample(resume=state).tokens, whole.tokens)


def test_prompts_and_rows_travel_in_the_state() -> None:
    sampler = sampler_of(S.Ancestral() >> S.Gibbs(), dd.Masked(3, dd.Linear()))
    asked = {"batch": 4, "seed": 3, "first_row": 9, "prompt": [2]}
    whole = sampler.sample(**asked)
    assert torch.equal(sampler.sample(resume=sampler.sample(**asked, until=3).state).tokens, whole.tokens)
    assert bool((whole.tokens[:, 0] == 2).all())


def test_a_function_sees_every_step_and_stops_the_run() -> None:
    sampler = sampler_of(S.Ancestral() >> S.LocallyBalanced(), dd.Uniform(3, dd.Linear()))
    seen: list[tuple[int, float, torch.Tensor]] = []

    def look(step: int, state: dd.State, info: dict[str, torch.Tensor]) -> bool:
        seen.append((step, state.t, info["accepted"]))
        return step < 3

    out = sampler.sample(4, seed=7, on_step=look, record=True)
    assert [step for step, _, _ in seen] == [1, 2, 3]
    assert [t for _, t, _ in seen] == list(sampler.grid[1:4])
    assert all(info.shape == (4,) and bool(((info == 0) | (info == 1)).all()) for _, _, info in seen)
    assert out.trajectory is not None
    assert len(out.trajectory) == 4
    assert torch.equal(sampler.sample(resume=out.state).tokens, sampler.sample(4, seed=7).tokens)


def test_reports_of_some_rows_leave_the_others_nan() -> None:
    both = dd.mix({S.Ancestral() >> S.LocallyBalanced(): 0.5, S.Ancestral(): 0.5})
    seen: list[torch.Tensor] = []
    sampler = sampler_of(both, dd.Uniform(3, dd.Linear()))
    sampler.sample(64, seed=7, until=1, on_step=lambda step, state, info: seen.append(info["accepted"]))
    assert 0 < int(seen[0].isnan().sum()) < 64


@pytest.mark.parametrize("process", processes(), ids=repr)
def test_a_corrector_alone_has_the_power_of_its_kernel(process: dd.Process) -> None:
    model, law = WORLD.denoiser(process), torch.zeros(process.states**3, dtype=torch.float64)
    law[-1 if process.mask_id is None else 5] = 1.0
    alone = dd.Sampler(process, model, S.Gibbs() ** 10, time=0.4)
    right = law @ torch.linalg.matrix_power(T.kernel(S.Gibbs(), process, model, t=0.4), 10)
    torch.testing.assert_close(T.law(alone, initial=law), right, rtol=0, atol=1e-12)
    z = process.marginal(torch.tensor([[0, 1, 2]] * 3), 0.4).sample()
    out = alone.sample(initial=z, seed=0)
    assert out.nfe == 10
    assert alone.nfe == 10
    assert torch.equal(out.tokens, alone.step(alone.start(initial=z, seed=0)).tokens)
    assert repr(alone).endswith("Gibbs(sites=1) ** 10, time=0.4)")


def test_the_last_step_by_hand_leaves_no_mask() -> None:
    class Lazy(dd.Predictor):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            return state.at(state.tokens, at.s)

    sampler = sampler_of(Lazy(), dd.Masked(3, dd.Linear()))
    state = sampler.start(2, seed=0)
    for _ in range(N - 1):
        state = sampler.step(state)
    with pytest.raises(ValueError, match="the mask is left at time 0"):
        sampler.step(state)


def test_what_cannot_be_is_refused() -> None:
    process = dd.Uniform(3, dd.Linear())
    sampler, model = sampler_of(S.Ancestral(), process), WORLD.denoiser(process)
    state = sampler.sample(2, seed=1, until=2).state
    for call, error, text in (
        (lambda: sampler.sample(2, resume=state), TypeError, "began with its own batch"),
        (lambda: sampler.sample(resume=state, seed=1, prompt=[1]), TypeError, "its own seed, prompt"),
        (lambda: sampler.sample(resume=state, until=2), ValueError, "has made 2 steps"),
        (lambda: sampler.sample(resume=state, record=True), ValueError, "record=True from its first step"),
        (lambda: sampler.sample(2, seed=1, on_step=5), TypeError, "called as on_step"),
        (lambda: sampler.sample(2, seed=1, until=6), ValueError, "until must"),
        (lambda: sampler.sample(2, seed=1, until=0), ValueError, "until must"),
        (lambda: sampler.on_grid([1.0, 0.7, 0.0]).sample(resume=state), ValueError, "is not of Sampler"),
        (lambda: sampler.step(state.at(state.tokens, 0.3)), ValueError, "is not of Sampler"),
        (lambda: sampler.step(dd.State(state.tokens, 1.0, state.rows)), ValueError, "takes a state of start"),
        (lambda: dd.Sampler(process, model, S.Gibbs(), steps=3), TypeError, "time=t runs a corrector alone"),
        (lambda: dd.Sampler(process, model, S.Ancestral(), time=0.3), TypeError, "for a corrector alone"),
        (lambda: dd.Sampler(process, model, S.Gibbs(), time=1.3), ValueError, "time must"),
        (lambda: dd.Sampler(process, model, S.Gibbs(), time=0.3, steps=2), ValueError, "either steps"),
        (lambda: dd.Samples(state.tokens, 1, state.rows, 0).state, ValueError, "have no state"),
    ):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("process", [dd.Masked(3, dd.Linear()), dd.Uniform(3, dd.Linear())], ids=repr)
@pytest.mark.parametrize("operator", [S.TauLeaping(), S.Euler(), S.Multistep()], ids=repr)
def test_leaps_report_how_many_sites_jumped(operator: dd.Operator, process: dd.Process) -> None:
    told: list[torch.Tensor] = []
    out = sampler_of(operator, process).sample(
        64, seed=7, record=True, on_step=lambda step, state, info: told.append(info.get("jumped", info))
    )
    assert out.trajectory is not None
    moved = (out.trajectory[1:] != out.trajectory[:-1]).sum(-1)
    first = 1 if process.absorbing else 2  # on uniform noise the rates of the first step are infinite
    for step in range(first, N):  # the last step is ancestral
        assert torch.equal(told[step - 1], moved[step - 1].double())
    assert "jumped" not in told[N - 1]
    assert not torch.equal(told[first - 1], moved[first].double()), "planted: the changes of another step"


def test_events_and_step_sizes_are_reported() -> None:
    process, told = dd.Masked(3, dd.Linear()), []
    sampler_of(S.Gillespie(), process).sample(16, seed=7, on_step=lambda step, state, info: told.append(info))
    assert torch.equal(sum(info["events"] for info in told), torch.full((16,), 3.0).double())
    sizes: list[torch.Tensor] = []
    adaptive = sampler_of(S.Adaptive(1.0), process)
    adaptive.sample(16, seed=7, on_step=lambda step, state, info: sizes.append(info["step_size"]))
    assert all(bool(((size > 0) & (size <= 0.2 + 1e-12)).all()) for size in sizes)
    blocks = dd.Blockwise(process, WORLD.denoiser(process), S.Ancestral(), block=1, steps=2)
    seen: list[float] = []
    blocks.sample(2, 3, seed=0, on_step=lambda step, state, info: seen.append(float(info["block"].max())))
    assert seen == [0.0, 1.0, 2.0]


def test_an_enumeration_reports_nothing() -> None:
    """A sum over sites would make every path of a site a row, so that the tree explodes."""
    process = dd.Uniform(3, dd.Linear())
    kernel = T.kernel(S.TauLeaping(), process, WORLD.denoiser(process), 0.8, 0.4)
    torch.testing.assert_close(kernel.sum(-1), torch.ones(27, dtype=torch.float64))
