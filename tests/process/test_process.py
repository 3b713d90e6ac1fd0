"""Processes: kernels, marginals and bridges against their definitions."""

import pytest
import torch
from hypothesis import given
from problems import families as zoo
from problems import states
from scipy import stats
from strategies import intervals, processes

import discdiff as dd
from discdiff.choices import PointMixture


@given(processes(vocab_size=3), intervals())
def test_kernels_satisfy_chapman_kolmogorov(process: dd.Process, interval: tuple[float, float]) -> None:
    t, s = interval
    torch.testing.assert_close(process.kernel(s) @ process.kernel(t, s), process.kernel(t), atol=1e-14, rtol=0)
    torch.testing.assert_close(process.kernel(t, s).sum(-1), torch.ones(process.states).double(), atol=1e-14, rtol=0)


@given(processes(vocab_size=3), intervals())
def test_marginal_is_a_row_of_the_kernel(process: dd.Process, interval: tuple[float, float]) -> None:
    t, _ = interval
    x0 = process.data_tokens[:, None]
    for z in range(process.states):
        log_q = process.marginal(x0, t).log_prob(torch.full_like(x0, z))
        torch.testing.assert_close(log_q.exp(), process.kernel(t)[process.data_tokens, z], atol=1e-14, rtol=0)


@given(processes(vocab_size=3), intervals())
def test_bridge_is_bayes_rule(process: dd.Process, interval: tuple[float, float]) -> None:
    t, s = interval
    q_s, q_ts, q_t = process.kernel(s), process.kernel(t, s), process.kernel(t)
    for x0 in process.data_tokens.tolist():
        for x_t in range(process.states):
            if q_t[x0, x_t] > 0:
                expected = q_s[x0] * q_ts[:, x_t] / q_t[x0, x_t]
                pairs = torch.full((process.states, 1), x_t), torch.full((process.states, 1), x0)
                log_q = process.bridge(*pairs, t, s).log_prob(torch.arange(process.states)[:, None])
                torch.testing.assert_close(log_q.exp(), expected, atol=1e-12, rtol=0)


@given(processes(vocab_size=3), intervals())
def test_bridge_keeps_the_marginal(process: dd.Process, interval: tuple[float, float]) -> None:
    t, s = interval
    for x0 in process.data_tokens.tolist():
        reached = (process.kernel(t)[x0] > 0).nonzero()
        rows = process.bridge(reached, torch.full_like(reached, x0), t, s).table()[0][:, 0].exp()
        torch.testing.assert_close(
            process.kernel(t)[x0, reached[:, 0]] @ rows, process.kernel(s)[x0], atol=1e-12, rtol=0
        )


def test_times_may_differ_by_position() -> None:
    for process in zoo():
        x0, t = torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 0.3, 1.0]], dtype=torch.float64)
        for z in states(process.states, 3):
            each = [process.kernel(float(t[0, i]))[x0[0, i], z[i]] for i in range(3)]
            q = process.marginal(x0, t).log_prob(z[None]).exp()
            torch.testing.assert_close(q[0], torch.stack(each).prod(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("process", zoo(), ids=repr)
@pytest.mark.parametrize("which", ["prior", "marginal", "bridge"])
def test_samples_follow_log_prob(process: dd.Process, which: str, failure_rate: float) -> None:
    draws = 100_000

    def law(time: float) -> PointMixture:
        x0 = torch.zeros(draws, 1, dtype=torch.int64)
        if which == "prior":
            return process.prior(draws, 1)
        if which == "marginal":
            return process.marginal(x0, time)
        return process.bridge(torch.full_like(x0, process.states - 1), x0, 0.8, time)

    drawn = torch.bincount(law(0.5).sample()[:, 0], minlength=process.states)
    right, wrong = (law(time).table()[0][0, 0].exp() for time in (0.5, 0.55))
    possible = right > 0
    assert drawn[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(drawn[possible], draws * right[possible]).pvalue > failure_rate
        if which != "prior":  # planted fault: another time
            assert stats.chisquare(drawn[possible], draws * wrong[possible]).pvalue < failure_rate


def test_mask_id_inside_the_vocabulary() -> None:
    process = dd.Masked(4, dd.Linear(), mask_id=1)
    assert process.states == 4
    assert process.data_tokens.tolist() == [0, 2, 3]
    assert process.prior(2, 3).sample().tolist() == [[1] * 3] * 2
    with pytest.raises(ValueError, match="without the mask 1"):
        process.marginal(torch.tensor([[1]]), 0.5)


def test_processes_are_equal_by_what_they_are() -> None:
    assert dd.Uniform(3, dd.Linear()) == dd.Uniform(3, dd.Linear())
    assert dd.Uniform(3, dd.Linear()) != dd.Uniform(3, dd.Cosine())
    assert dd.Uniform(3, dd.Linear()) != dd.Masked(3, dd.Linear())
    assert dd.Masked(3, dd.Linear()) != dd.Masked(3, dd.Linear(), mask_id=0)


def test_impossible_pairs_are_named() -> None:
    with pytest.raises(ValueError, match=r"row 1, position 0: x_t = 2 cannot come from x0 = 0"):
        dd.Masked(3, dd.Linear()).bridge(torch.tensor([[3], [2]]), torch.tensor([[0], [0]]), 0.5, 0.2)


@pytest.mark.parametrize("t", [1.0, 0.5])
def test_one_token_and_no_noise_are_fine(t: float) -> None:
    for process in (dd.Masked(1, dd.Linear()), dd.Uniform(1, dd.Linear())):
        x0 = torch.zeros(2, 1, dtype=torch.int64)
        assert process.marginal(x0, 0.0).sample().tolist() == x0.tolist()
        assert process.bridge(process.marginal(x0, t).sample(), x0, t, 0.0).sample().tolist() == x0.tolist()


def test_candidates_bound_every_reverse_step() -> None:
    """candidate >= the true redraw probability, with equality where the LOO excludes the token."""
    process = dd.Uniform(3, dd.Linear())
    alpha_t, alpha_s, z = 0.3, 0.6, torch.tensor([[0]])
    bound = process.candidate(z, alpha_t, alpha_s)
    for own in (0.0, 0.2, 1.0):
        log_own = torch.tensor([[own]], dtype=torch.float64).log()
        keep = alpha_t / alpha_s * (alpha_s * own + (1 - alpha_s) / 3) / (alpha_t * own + (1 - alpha_t) / 3)
        # the bridge keeps z outright, or redraws it and may draw z again
        redraw = bound * process.acceptance(log_own, z, alpha_t)
        torch.testing.assert_close(redraw, torch.tensor([[1 - keep]], dtype=torch.float64), atol=1e-14, rtol=0)
        assert redraw <= bound + 1e-15
