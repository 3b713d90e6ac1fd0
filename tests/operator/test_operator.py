"""The algebra of operators: the exact kernel is a homomorphism, and what is ill-formed is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from problems import mislabelled, weak
from problems import processes as zoo
from strategies import intervals, processes, worlds

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.samplers._redraw import redraw

P, C, D = S.Ancestral(), S.Gibbs(), S.Gibbs(sites=2)


@settings(max_examples=8)
@given(worlds(), processes(), intervals())
def test_kernel_is_a_homomorphism(world: T.Enumeration, process: dd.Process, interval: tuple[float, float]) -> None:
    """Left: the composition enumerated as one program. Right: matrices of its parts."""
    t, s = interval
    model = world.denoiser(process, predicts="loo")

    def whole(op: dd.Operator) -> torch.Tensor:
        return T.kernel(op, process, model, t=t, s=s if op.moves else None, whole=True)

    def part(op: dd.Operator, time: float) -> torch.Tensor:
        return T.kernel(op, process, model, t=time)

    p = T.kernel(P, process, model, t=t, s=s)
    cases = {
        P >> C: p @ part(C, s),
        C >> P: part(C, t) @ p,
        C >> D: part(C, t) @ part(D, t),
        C**3: part(C, t) @ part(C, t) @ part(C, t),
        C**0: torch.eye(len(p)).double(),
        dd.mix({P: 0.25, P >> C: 0.75}): 0.25 * p + 0.75 * p @ part(C, s),
        dd.mix({C: 0.5, D: 0.5}) ** 2: torch.linalg.matrix_power((part(C, t) + part(D, t)) / 2, 2),
        dd.when(lambda time: time >= t, P >> C, P): p @ part(C, s),
        dd.when(lambda time: time < t, P >> C, P): p,
    }
    for operator, expected in cases.items():
        torch.testing.assert_close(whole(operator), expected, atol=1e-12, rtol=0, msg=repr(operator))
        by_parts = T.kernel(operator, process, model, t=t, s=s if operator.moves else None)
        torch.testing.assert_close(by_parts, expected, atol=1e-12, rtol=0, msg=repr(operator))


def test_the_homomorphism_test_can_fail() -> None:
    """Planted faults: the wrong order, the wrong time, the wrong weight."""
    process, model = dd.Uniform(2, dd.Linear()), weak_2().denoiser(dd.Uniform(2, dd.Linear()), predicts="loo")
    p = T.kernel(P, process, model, t=0.7, s=0.3)
    whole = T.kernel(P >> C, process, model, t=0.7, s=0.3, whole=True)
    c_t, c_s = (T.kernel(C, process, model, t=time) for time in (0.7, 0.3))
    for wrong in (c_s @ p, p @ c_t, p @ c_s @ c_s):
        assert (whole - wrong).abs().max() > 1e-3


def weak_2() -> T.Enumeration:
    return T.Enumeration(torch.tensor([0.4, 0.1, 0.05, 0.45]).double(), vocab_size=2, length=2)


@pytest.mark.parametrize("process", zoo(), ids=repr)
def test_correctors_right_of_the_predictor_see_time_s(process: dd.Process) -> None:
    model = weak().denoiser(process, predicts="loo")
    product = T.kernel(P, process, model, t=0.5, s=0.0) @ T.kernel(C, process, model, t=0.0)
    torch.testing.assert_close(T.kernel(P >> C, process, model, t=0.5, s=0.0), product, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    "compose",
    [
        lambda: P >> P,
        lambda: P >> C >> P,
        lambda: P**2,
        lambda: (P >> C) ** 2,
        lambda: C**0.5,
        lambda: C**True,
        lambda: P >> 3,
        lambda: P >> S.Gibbs,
        lambda: dd.mix({P: 0.5, C: 0.5}),
        lambda: dd.when(lambda t: t > 0, P, C),
        lambda: dd.when(0.5, P, P),
        lambda: dd.mix({P: 0.5, "gibbs": 0.5}),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_ill_formed_compositions_raise_type_errors(compose: object) -> None:
    with pytest.raises(TypeError):
        compose()


@pytest.mark.parametrize("weights", [{C: 0.5, D: 0.6}, {}, {C: -0.5, D: 1.5}])
def test_weights_are_probabilities(weights: dict) -> None:
    with pytest.raises(ValueError, match=r"sum to 1|a weight must lie in \[0, 1\]"):
        dd.mix(weights)


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 0"):
        _ = C**-1


def test_declarations_of_compositions() -> None:
    assert (P.order, P.invariant, P.nfe) == (1.0, None, 1.0)
    assert (C.order, C.invariant, C.nfe) == (None, "exact", 1.0)
    assert (C >> D).invariant == "approximate"
    assert (C**2).invariant == "exact"
    assert (D**0).invariant == "exact"
    assert (P >> C**3).order == 1.0
    assert (P >> D).order is None
    assert (P >> C**3).nfe == 4.0
    assert (P >> C).invariant is None
    assert dd.mix({C: 0.25, C >> C: 0.75}).nfe == 1.75
    assert dd.mix({C: 0.25, D: 0.75}).invariant == "approximate"
    assert dd.mix({P: 0.25, P >> D: 0.75}).order is None
    assert dd.when(lambda t: t < 0.5, P, P >> C).nfe is None
    assert dd.when(lambda t: t < 0.5, P, P >> C).order == 1.0
    assert (P >> C).width == 2
    assert dd.mix({C: 0.5, C**3: 0.5}).width == 5


def test_repr_is_the_composition() -> None:
    operator = S.Ancestral() >> S.Gibbs(sites=1) ** 2
    assert repr(operator) == "Ancestral() >> Gibbs(sites=1) ** 2"
    assert repr(dd.mix({C: 0.25, D: 0.75})) == "mix({Gibbs(sites=1): 0.25, Gibbs(sites=2): 0.75})"
    assert repr((C >> D) ** 2) == "(Gibbs(sites=1) >> Gibbs(sites=2)) ** 2"


@pytest.mark.parametrize("operator", [P, P >> C**2, C >> P >> D, dd.mix({P: 0.3, P >> C: 0.7})], ids=repr)
def test_declared_nfe_is_the_counted_one(operator: dd.Operator) -> None:
    process, model = dd.Uniform(3, dd.Linear()), weak().denoiser(dd.Uniform(3, dd.Linear()), predicts="loo")
    out = dd.Sampler(process, model, operator, steps=10).sample(batch=2000, seed=0)
    assert out.nfe_rows.double().mean() / 10 == pytest.approx(operator.nfe, abs=0.02)
    if not isinstance(operator, dd.operator.Mix):
        assert out.nfe == 10 * operator.nfe


class Twice(dd.Corrector):
    """A user's operator that draws one name twice in a slot."""

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        coins = dd.choices.Coins(torch.full(state.tokens.shape, 0.5).double())
        dd.choose("coin", coins, state, at)
        dd.choose("coin", coins, state, at)
        return state


class OneCoin(dd.Corrector):
    """A user's operator whose law has the wrong batch shape."""

    def __call__(self, state: dd.State, at: dd.At) -> dd.State:
        dd.choose("coin", dd.choices.Coins(torch.full((1, state.tokens.shape[1]), 0.5).double()), state, at)
        return state


def test_users_mistakes_in_programs_are_named() -> None:
    process = dd.Uniform(3, dd.Linear())
    model = weak().denoiser(process, predicts="loo")
    with pytest.raises(ValueError, match=r"site 1\.0\.coin: a site of this name"):
        T.kernel(Twice(), process, model, t=0.5)
    with pytest.raises(ValueError, match=r"site 1\.1\.coin: a site of this name"):
        dd.Sampler(process, model, P >> Twice(), steps=1).sample(4, seed=0)
    with pytest.raises(ValueError, match="batch shape must be"):
        dd.Sampler(process, model, P >> OneCoin(), steps=1).sample(4, seed=0)


def test_an_unbounded_operator_is_refused_by_name() -> None:
    class Gillespie(S.Gibbs):
        enumerable = False

    process = dd.Uniform(3, dd.Linear())
    model = weak().denoiser(process, predicts="loo")
    with pytest.raises(TypeError, match="Gillespie"):
        T.kernel(P >> Gillespie(), process, model, t=0.5, s=0.1)


def test_a_denoiser_in_the_loos_place_is_refused_by_the_type() -> None:
    """A tensor cannot be plugged in; a Denoiser must say what it predicts."""
    process = dd.Uniform(3, dd.Linear())
    world = weak()

    class PlugIn(dd.Predictor):
        def __call__(self, state: dd.State, at: dd.At) -> dd.State:
            everywhere = torch.ones_like(state.frozen if state.frozen is not None else state.free)
            plugged = replace(state, t=at.s, seen=at.predict(state).denoiser)
            return plugged.at(redraw(plugged, everywhere, 0.5, at))

    with pytest.raises(TypeError, match=r"redraw takes a Prediction.*got Tensor|Expected type: .*Prediction"):
        dd.Sampler(process, world.denoiser(process), PlugIn(), steps=2).sample(3, seed=0)
    with pytest.raises(TypeError, match="predicts"):
        dd.Denoiser(world.denoiser(process).fn, process)
    # said truthfully, either prediction gives the same kernel; said falsely, another
    k = [T.kernel(P, process, world.denoiser(process, predicts=what), t=0.6, s=0.3) for what in ("denoiser", "loo")]
    torch.testing.assert_close(k[0], k[1], atol=1e-12, rtol=0)
    assert (T.kernel(P, process, mislabelled(world, process), t=0.6, s=0.3) - k[1]).abs().max() > 0.01
