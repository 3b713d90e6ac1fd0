"""The Gibbs corrector: the brute-force matrix, invariance, and what is lost with two sites at once."""

import pytest
import torch
from hypothesis import given
from ledger import caught, within
from problems import dirichlet, gibbs_matrix, mislabelled, strong, weak
from problems import rank_one as zoo
from strategies import processes, worlds

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T


@pytest.mark.parametrize("t", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("process", zoo(), ids=repr)
@pytest.mark.parametrize("predicts", ["denoiser", "loo"])
def test_gibbs_is_the_brute_force_matrix(process: dd.Process, t: float, predicts: str) -> None:
    world = strong()
    k = T.kernel(S.Gibbs(), process, world.denoiser(process, predicts=predicts), t=t)
    expected, reached = gibbs_matrix(world, process, t), world.marginal(process, t) > 0
    torch.testing.assert_close(k[reached], expected[reached], atol=1e-12, rtol=0)


@given(worlds(vocab_size=2, length=3), processes())
def test_gibbs_keeps_p_t_and_moves(world: T.Enumeration, process: dd.Process) -> None:
    model = world.denoiser(process, predicts="loo")
    for t in (0.0, 0.3, 0.8):
        p_t = world.marginal(process, t)
        k = T.kernel(S.Gibbs(), process, model, t=t)
        torch.testing.assert_close(p_t @ k, p_t, atol=1e-12, rtol=0)
        if t == 0.8 and world.p0.max() < 0.9:
            assert (k - torch.eye(len(k))).abs().max() > 0.1


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_two_sites_at_once_do_not(process: dd.Process) -> None:
    world, corrector = strong(), S.Gibbs(sites=2)
    p_t = world.marginal(process, 0.4)
    moved = p_t @ T.kernel(corrector, process, world.denoiser(process, predicts="loo"), t=0.4)
    caught(19, T.tv(moved, p_t), 1e-3)
    assert corrector.invariant == "approximate"
    assert S.Gibbs().invariant == "exact"


@pytest.mark.parametrize("scan", ["random", "systematic"])
@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_of_two_sites_one_move_repairs_whatever_has_the_right_marginals(process: dd.Process, scan: str) -> None:
    """(q - p) K = 0 for L = 2 where each site's law under q is that under p, as an ancestral step leaves it.

    A move keeps the law of one site and draws the other given it. Three sites have laws of pairs, which it keeps.
    """
    t, s, left = 0.8, 0.3, []
    for length in (2, 3):
        world = dirichlet(0.5, 3, length=length)
        model, p = world.denoiser(process, predicts="loo"), world.marginal(process, s)
        q = world.marginal(process, t) @ T.kernel(S.Ancestral(), process, model, t=t, s=s)
        assert T.tv(q, p) > 0.01
        left.append(T.tv(q @ T.kernel(S.Gibbs(scan=scan), process, model, t=s), p))
    within("21a", left[0], 1e-12)
    caught("21a", left[1], 1e-3)


def test_a_mislabelled_denoiser_gives_another_matrix() -> None:
    """With D in the place of O it keeps p_t all the same: drawing x0_i from D and noising it again is a Gibbs step on
    the pair (x0_i, z_i). It is not the heat bath, though: invariance would not have caught the fault, the matrix does.
    """
    world, process = strong(), dd.Uniform(3, dd.Linear())
    p_t = world.marginal(process, 0.4)
    k = T.kernel(S.Gibbs(), process, mislabelled(world, process), t=0.4)
    assert (k - gibbs_matrix(world, process, 0.4)).abs().max() > 0.05
    torch.testing.assert_close(p_t @ k, p_t, atol=1e-12, rtol=0)


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_more_sites_than_there_are_redraws_all(process: dd.Process) -> None:
    model = weak().denoiser(process, predicts="loo")
    three, many = (T.kernel(S.Gibbs(sites=k), process, model, t=0.5) for k in (3, 9))
    torch.testing.assert_close(three, many, atol=1e-14, rtol=0)
    frozen = torch.tensor([True, False, True])
    one = T.kernel(S.Gibbs(sites=9), process, model, t=0.5, frozen=frozen)
    torch.testing.assert_close(
        one, T.kernel(S.Gibbs(sites=1), process, model, t=0.5, frozen=frozen), atol=1e-14, rtol=0
    )


def test_sites_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        S.Gibbs(sites=0)
