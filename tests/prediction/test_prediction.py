"""Conversions between denoiser, leave-one-out and ratio, against enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import families as zoo
from problems import joint, mislabelled, states, strong, weak
from strategies import processes, worlds

import discdiff as dd
from discdiff import theory as T

MEANINGS = ("denoiser", "loo", "ratio")


def brute(world: T.Enumeration, process: dd.Process, t: float) -> dict[str, torch.Tensor]:
    """The three predictions at every state, from p(x0, z) alone; rows of unreachable states are NaN."""
    n, length, size = world.alphabet, world.length, process.states
    z, x = states(size, length), process.data_tokens[states(n, length)]
    p = joint(world, process, [t] * length)
    p_z = p.sum(0)
    d, o, r = (torch.zeros(len(z), length, width, dtype=torch.float64) for width in (process.vocab_size, n, size))
    for site in range(length):
        stride = size ** (length - 1 - site)
        base = torch.arange(len(z)) - z[:, site] * stride
        siblings = base[:, None] + torch.arange(size) * stride  # the states that differ at this site only
        r[:, site] = p_z[siblings] / p_z[:, None]
        without = p[:, siblings].sum(-1)  # p(x, z_{-i})
        for v in range(n):
            has = x[:, site] == process.data_tokens[v]
            d[:, site, process.data_tokens[v]] = p[has].sum(0) / p_z
            o[:, site, v] = without[has].sum(0) / without.sum(0)
    columns = torch.zeros(len(z), length, process.vocab_size, dtype=torch.float64)
    columns[..., process.data_tokens] = o
    return {"denoiser": d, "loo": columns, "ratio": r, "p": p_z}


@given(worlds(), processes(), st.sampled_from([0.02, 0.4, 0.9]))
def test_oracle_says_what_enumeration_says(world: T.Enumeration, process: dd.Process, t: float) -> None:
    truth = brute(world, process, t)
    reached = truth["p"] > 0
    z = states(process.states, world.length)
    for meaning in MEANINGS:
        said = world.denoiser(process, predicts=meaning)(z, t).logits.exp()
        torch.testing.assert_close(said[reached], truth[meaning][reached], atol=1e-10, rtol=1e-10)


@given(worlds(), processes(), st.sampled_from([0.02, 0.4, 0.9]))
def test_every_meaning_converts_to_every_other(world: T.Enumeration, process: dd.Process, t: float) -> None:
    truth = brute(world, process, t)
    z = states(process.states, world.length)
    # a masked process leaves a revealed site's LOO undetermined, so only hidden sites are compared
    reached = (truth["p"] > 0) & ((z == process.mask_id).all(-1) if process.absorbing else True)
    for given_as in MEANINGS:
        prediction = world.denoiser(process, predicts=given_as)(z[reached], t)
        for asked in MEANINGS:
            said = getattr(prediction, asked).exp()
            torch.testing.assert_close(said, truth[asked][reached], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_the_conversion_matters(process: dd.Process) -> None:
    """On a uniform process D and O differ, at masked sites they coincide."""
    world = strong()
    z = states(process.states, 3)
    d = world.denoiser(process, predicts="denoiser")(z, 0.4).denoiser.exp()
    o = world.denoiser(process, predicts="loo")(z, 0.4).loo.exp()
    if process.absorbing:
        hidden = z == process.mask_id
        torch.testing.assert_close(d[hidden], o[hidden], atol=1e-14, rtol=0)
    else:
        assert (d - o).abs().max() > 0.1


def test_mislabelled_denoiser_differs() -> None:
    process = dd.Uniform(3, dd.Linear())
    z = states(3, 3)
    wrong, right = mislabelled(weak(), process)(z, 0.4), weak().denoiser(process, predicts="loo")(z, 0.4)
    assert (wrong.loo.exp() - right.loo.exp()).abs().max() > 0.1


@pytest.mark.parametrize("asked", ["loo", "ratio"])
def test_revealed_sites_of_a_masked_process_are_refused_by_name(asked: str) -> None:
    process = dd.Masked(3, dd.Linear())
    model = weak().denoiser(process, predicts="denoiser")
    with pytest.raises(ValueError, match=r"undefined at row 1, position 2 \(state 0"):
        getattr(model(torch.tensor([[3, 3, 3], [3, 3, 0]]), 0.5), asked)
    revealed = model(torch.tensor([[1, 3, 0]]), 0.5).denoiser.exp()
    assert revealed[0, 0].tolist() == [0, 1, 0]
    assert revealed[0, 2].tolist() == [1, 0, 0]


def test_garbage_at_revealed_sites_is_not_read() -> None:
    process = dd.Masked(3, dd.Linear())
    model = dd.Denoiser(lambda x, t: torch.full((*x.shape, 3), -math.inf), process, predicts="denoiser")
    assert model(torch.tensor([[2]]), 0.5).denoiser.exp().tolist() == [[[0, 0, 1]]]


def test_ratio_without_information_is_refused() -> None:
    process = dd.Uniform(3, dd.Linear())
    prediction = weak().denoiser(process, predicts="ratio")(torch.tensor([[0, 1, 2]]), 1.0)
    with pytest.raises(ValueError, match="alpha = 0"):
        _ = prediction.loo


def test_masked_ratio_may_leave_the_mask_out() -> None:
    process, world = dd.Masked(3, dd.Linear()), weak()
    z = torch.tensor([[3, 3, 3]])
    full = world.denoiser(process, predicts="ratio")
    short = dd.Denoiser(lambda x, a: full.fn(x, a)[..., :3], process, "ratio", time="alpha", time_dtype=torch.float64)
    torch.testing.assert_close(short(z, 0.5).loo, full(z, 0.5).loo)
    with pytest.raises(ValueError, match="without the mask's column"):
        _ = short(torch.tensor([[3, 3, 1]]), 0.5).loo


@pytest.mark.parametrize("alpha", [0.0, 1e-12, 0.5, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conversions_are_stable_at_the_ends(alpha: float, dtype: torch.dtype) -> None:
    """LOO -> denoiser -> LOO is the identity as far as the numbers go, and nothing is NaN."""
    process = dd.Uniform(5, dd.Linear())
    x, logits = torch.tensor([[0, 4, 2]]), torch.randn(1, 3, 5, dtype=dtype)
    loo = dd.Prediction(logits, "loo", x, alpha, process)
    denoiser = loo.denoiser
    assert not denoiser.isnan().any()
    torch.testing.assert_close(denoiser.exp().sum(-1), torch.ones(1, 3, dtype=dtype))
    if alpha < 1:
        back = dd.Prediction(denoiser, "denoiser", x, alpha, process).loo
        torch.testing.assert_close(
            back.exp(), logits.softmax(-1), atol=1e-5 if dtype == torch.float32 else 1e-9, rtol=0
        )
    else:
        assert denoiser.exp()[0, 1].tolist() == [0, 0, 0, 0, 1]
        with pytest.raises(ValueError, match="point mass"):
            _ = dd.Prediction(denoiser, "denoiser", x, alpha, process).loo


def test_at_alpha_zero_denoiser_and_loo_agree() -> None:
    process = dd.Uniform(4, dd.Linear())
    prediction = dd.Prediction(torch.randn(2, 3, 4), "loo", torch.tensor([[0, 1, 2], [3, 3, 3]]), 0.0, process)
    torch.testing.assert_close(prediction.denoiser, prediction.loo)


def test_mask_inside_the_vocabulary_is_never_predicted() -> None:
    process = dd.Masked(4, dd.Linear(), mask_id=1)
    model = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, 4), process, predicts="denoiser")
    assert model(torch.tensor([[1, 1]]), 0.5).denoiser.exp()[0, 0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize(
    ("predicts", "width", "message"),
    [("loo", 5, r"must return \(1, 2, 4\) = \(B, L, V\), got \(1, 2, 5\)"), ("guess", 4, "predicts must be one of")],
)
def test_wrong_outputs_are_refused(predicts: str, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dd.Prediction(torch.zeros(1, 2, width), predicts, torch.tensor([[0, 1]]), 0.5, dd.Uniform(4, dd.Linear()))


@pytest.mark.usefixtures("as_user")
def test_a_view_takes_a_mask_of_sites_and_old_names_say_the_new_ones() -> None:
    said = dd.Prediction(torch.zeros(1, 2, 4), "loo", torch.tensor([[0, 1]]), 0.5, dd.Uniform(4, dd.Linear()))
    for where in (0, torch.tensor([0]), torch.ones(2, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"prediction\[where\] takes a bool tensor \(1, 2\), got"):
            said[where]  # type: ignore[index]
    with pytest.raises(AttributeError, match=r"Prediction.loo_at is now prediction\[where\].loo"):
        said.loo_at(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(AttributeError, match="object has no attribute 'guess'"):
        said.guess  # noqa: B018


def test_own_reads_the_chosen_sites_only() -> None:
    process, x = dd.Uniform(3, dd.Linear()), torch.tensor([[0, 1, 2]])
    logits = torch.randn(1, 3, 3, dtype=torch.float64)
    logits[0, 1] = math.nan
    where = torch.tensor([[True, False, True]])
    own = dd.Prediction(logits, "loo", x, 0.4, process)[where].own
    log_o = logits.log_softmax(-1)
    torch.testing.assert_close(own, torch.stack([log_o[0, 0, 0], log_o[0, 2, 2]]))
