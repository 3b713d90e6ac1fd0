"""The judge is judged: enumeration against Pyro's own, against sampling, and against brute force."""

import math

import pytest
import torch
from hypothesis import given
from problems import joint, mislabelled, states, strong, weak
from problems import processes as zoo
from pyro import poutine
from pyro.infer.enum import iter_discrete_traces
from strategies import processes, worlds

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.choices import Coins
from discdiff.operator import Run
from discdiff.theory.world import all_states, state_index


def pyros_kernel(operator: dd.Operator, process: dd.Process, model: dd.Denoiser, t: float, s: float) -> torch.Tensor:
    """The matrix by Pyro's sequential enumeration: one start state and one trace at a time."""
    z = states(process.states, model.length)
    matrix = torch.zeros(len(z), len(z), dtype=torch.float64)

    def one_row(row: int) -> torch.Tensor:
        return operator(*Run.start(model, 1, 0, listen=True).begin(z[row : row + 1], t, s, 1)).tokens

    for row in range(len(z)):
        marked = poutine.infer_config(
            one_row, lambda site: {"enumerate": "sequential"} if site["type"] == "sample" else {}
        )
        for trace in iter_discrete_traces("flat", marked, row):
            end = state_index(trace.nodes["_RETURN"]["value"], process.states)
            matrix[row, end] += trace.log_prob_sum().exp()
    return matrix


@pytest.mark.parametrize("process", zoo(2), ids=repr)
@pytest.mark.parametrize(
    "operator",
    [
        S.Ancestral(),
        pytest.param(S.Gibbs() >> S.Gibbs(2), marks=pytest.mark.slow),
        dd.mix({S.Gibbs(): 0.3, S.Gibbs(2): 0.7}),
    ],
    ids=repr,
)
def test_prefix_enumeration_is_pyros_enumeration(process: dd.Process, operator: dd.Operator) -> None:
    world = T.Enumeration(torch.tensor([0.4, 0.1, 0.05, 0.45]), vocab_size=2, length=2)
    model = world.denoiser(process, predicts="loo")
    interval = (0.7, 0.3) if operator.moves else (0.7, 0.7)
    ours = T.kernel(operator, process, model, t=0.7, s=0.3 if operator.moves else None, whole=True)
    torch.testing.assert_close(ours, pyros_kernel(operator, process, model, *interval), atol=1e-14, rtol=0)


@given(worlds(), processes())
def test_rows_sum_to_one_everywhere(world: T.Enumeration, process: dd.Process) -> None:
    model = world.denoiser(process, predicts="loo")
    for k in (
        T.kernel(S.Ancestral(), process, model, t=0.9, s=0.2),
        T.kernel(S.Gibbs(), process, model, t=1.0),
        T.kernel(S.Gibbs(2), process, model, t=0.0),
    ):
        torch.testing.assert_close(k.sum(-1), torch.ones(len(k)).double(), atol=1e-12, rtol=0)
        assert (k >= 0).all()


@given(worlds(vocab_size=2, length=3), processes())
def test_marginal_and_reachable_are_the_joints(world: T.Enumeration, process: dd.Process) -> None:
    for t in (0.0, 0.4, 1.0):
        p_t = joint(world, process, [t] * 3).sum(0)
        torch.testing.assert_close(world.marginal(process, t), p_t, atol=1e-14, rtol=0)
        if 0 < float(process.schedule.alpha(t)) < 1:  # at the ends p_t may be 0 where data agrees
            assert torch.equal(world.reachable(process, t), p_t > 0)


def test_oracles_are_total() -> None:
    """Where no data agrees the row is uniform, and such states are not reachable."""
    world = T.Enumeration(torch.tensor([1.0, 0, 0, 0]), vocab_size=2, length=2)
    process = dd.Masked(2, dd.Linear())
    z = torch.tensor([[1, 2]])
    assert world.denoiser(process, predicts="loo")(z, 0.5).logits.exp()[0, 1].tolist() == [0.5, 0.5]
    assert not world.reachable(process, 0.5)[state_index(z, 3)]
    assert world.reachable(process, 1.0)[state_index(torch.tensor([[0, 2]]), 3)], "the limit alpha -> 0+"


def test_law_is_over_data_and_a_mask_inside_the_vocabulary_is_left_out() -> None:
    world = weak()
    outside, inside = dd.Masked(3, dd.Linear()), dd.Masked(4, dd.Linear(), mask_id=1)
    laws = [T.law(dd.Sampler(p, world.denoiser(p), S.Ancestral(), steps=4)) for p in (outside, inside)]
    assert laws[0].shape == laws[1].shape == (27,)
    torch.testing.assert_close(laws[0], laws[1], atol=1e-14, rtol=0)
    assert float(laws[0].sum()) == pytest.approx(1, abs=1e-12)


def test_a_law_with_masks_left_is_refused() -> None:
    class Idle(dd.Predictor):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            return state.at(state.tokens, at.s)

    process = dd.Masked(3, dd.Linear())
    with pytest.raises(ValueError, match=r"Idle.*leaves masks"):
        T.law(dd.Sampler(process, weak().denoiser(process), Idle(), steps=2))


def test_kernel_with_frozen_sites_keeps_them() -> None:
    process = dd.Uniform(3, dd.Linear())
    frozen = torch.tensor([False, True, False])
    k = T.kernel(S.Ancestral(), process, weak().denoiser(process), t=0.6, s=0.1, frozen=frozen)
    start, end = (k > 0).nonzero(as_tuple=True)
    z = states(3, 3)
    assert (z[start][:, 1] == z[end][:, 1]).all()
    # mass depends on the frozen site being seen as clean
    loose = T.kernel(S.Ancestral(), process, weak().denoiser(process), t=0.6, s=0.1)
    assert (k.view(27, 3, 3, 3).sum(2) - loose.view(27, 3, 3, 3).sum(2)).abs().max() > 0.01


def test_too_many_paths_is_said() -> None:
    class Many(dd.Corrector):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            for n in range(9):
                dd.choose(f"coins {n}", Coins(torch.full(state.tokens.shape, 0.5).double()), state, at)
            return state

    process = dd.Uniform(3, dd.Linear())
    with pytest.raises(ValueError, match=r"more than 10000 paths"):
        T.kernel(Many(), process, weak().denoiser(process), t=0.5, most=10_000)


def test_order_of_a_known_error() -> None:
    """A sampler whose law is p0 plus an error of n^-2 would be measured as order 2: the fit is not tied to 1."""
    process, world = dd.Masked(3, dd.Linear()), strong()
    model = world.denoiser(process)
    steps = lambda n: dd.Sampler(process, model, S.Ancestral(), steps=n)  # noqa: E731
    first = T.order([4, 8, 16], steps)
    assert 0.6 < first < 1.1
    assert T.order([2, 4, 8], lambda n: steps(n * n)) == pytest.approx(2, abs=0.35)
    assert T.order([4, 8, 16], steps, target=T.law(steps(3))) < 0.5, "a wrong target does not come nearer"


def test_divergences() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.25, 0.5, 0.25]).double()
    assert T.kl(p, q) == pytest.approx(0.5 * math.log(2))
    assert T.kl(q, p) == math.inf
    assert T.kl(p, p) == 0
    assert T.tv(p, q) == pytest.approx(0.25)
    assert T.entropy(p) == pytest.approx(math.log(2))


def test_all_states_and_their_indices() -> None:
    z = all_states(3, 4)
    assert torch.equal(state_index(z, 3), torch.arange(81))
    assert z[1].tolist() == [0, 0, 0, 1]
    assert all_states(5, 1).shape == (5, 1)


def test_theory_never_hears_of_a_wrong_label() -> None:
    """The planted fault stays a fault: the mislabelled kernel is a kernel, just not the right one."""
    process = dd.Uniform(3, dd.Linear())
    k = T.kernel(S.Ancestral(), process, mislabelled(weak(), process), t=0.6, s=0.2)
    torch.testing.assert_close(k.sum(-1), torch.ones(27).double(), atol=1e-12, rtol=0)
    p_s = world_step(weak(), process, k)
    assert T.tv(p_s, weak().marginal(process, 0.2)) > 0.02


def world_step(world: T.Enumeration, process: dd.Process, k: torch.Tensor) -> torch.Tensor:
    return world.marginal(process, 0.6) @ k
