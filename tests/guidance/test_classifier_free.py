"""Classifier-free guidance: which law it follows and which not, and what rules tokens out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import families, named, pairs, states, strong, two_sites, weak
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.kernels import native

# Enumerations and hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")

LINEAR = dd.Linear()
MASKED, UNIFORM = dd.Masked(3, LINEAR), dd.Uniform(3, LINEAR)
MARGINAL = dd.Marginal(torch.tensor([0.5, 0.3, 0.2]), LINEAR)
THREE = [MASKED, UNIFORM, MARGINAL]
PREDICTS: list[dd.prediction.Predicts] = ["denoiser", "loo", "ratio"]


CONDITIONAL, FREE = two_sites(1), two_sites(2)


def worlds(process: dd.Process) -> tuple[T.Enumeration, T.Enumeration]:
    if process.vocab_size == 3:
        return strong(), weak()
    p = np.random.default_rng(4).dirichlet(np.full(process.vocab_size**3, 0.7), 2)
    one, other = (T.Enumeration(torch.as_tensor(row), vocab_size=process.vocab_size, length=3) for row in p)
    return one, other


def law(model: dd.Denoiser, steps: int, operator: dd.Operator | None = None) -> Tensor:
    return T.law(dd.Sampler(model.process, model, operator or S.Ancestral(), steps=steps))


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# --- D and O ---------------------------------------------------------------------------------------------------------


def posteriors(world: T.Enumeration, process: dd.Process, t: float, z: Tensor, itself: bool) -> Tensor:
    """p(x0_i = v | z), or p(x0_i = v | z without z_i), (S^L, L, V), by Bayes' rule on whole sequences."""
    x, q = states(process.vocab_size, world.length), process.marginals(t)
    like = q[x[None], z[:, None]]  # (z, x, L)
    laws = []
    for site in range(world.length):
        seen = [other for other in range(world.length) if itself or other != site]
        weight = like[:, :, seen].prod(-1) * world.p0
        laws.append(torch.stack([weight[:, x[:, site] == v].sum(-1) for v in range(process.vocab_size)], -1))
    law = torch.stack(laws, 1)
    return law / law.sum(-1, keepdim=True)


@pytest.mark.parametrize("process", [*families(), *pairs()], ids=named)
@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("others", PREDICTS)
def test_a_combination_of_denoisers_is_one_of_leave_one_outs(
    process: dd.Process, predicts: dd.prediction.Predicts, others: dd.prediction.Predicts
) -> None:
    """Against Bayes' rule; of two weights and of three, if they sum to 1."""
    t, (one, other) = 0.6, worlds(process)
    third = T.Enumeration(one.p0.flip(0), vocab_size=process.vocab_size, length=3)
    z = states(process.states, 3)[other.reachable(process, t)]
    models = [world.denoiser(process, kind) for world, kind in ((one, predicts), (other, others), (third, "loo"))]
    said = [model(z, t) for model in models]
    d, o = ([posteriors(world, process, t, z, own) for world in (one, other, third)] for own in (True, False))
    settled = process.settled(z, torch.full(z.shape, 1 - t, dtype=torch.float64))
    known = ~settled if predicts != "loo" or others != "loo" else torch.ones_like(settled)
    for weights in ((2.0, -1.0), (0.3, 0.7), (1.5, -1.2, 0.7)):
        found = said[0].combined(said[1 : len(weights)], weights)
        by_d, by_o = (sum(w * law.log() for w, law in zip(weights, laws, strict=False)) for laws in (d, o))
        assert apart(found[known].loo.dense().softmax(-1), by_o.softmax(-1)[known]) < 1e-12  # type: ignore[union-attr]
        by_d = by_d.nan_to_num(-torch.inf).masked_fill((d[0] == 0) | (d[1] == 0), -torch.inf)  # type: ignore[union-attr]
        assert apart(found.denoiser.exp(), by_d.softmax(-1)) < 1e-12
    if not process.absorbing:  # planted: weights that do not sum to 1, where the evidence of z_i is counted twice
        found, by_d = said[0].combined([said[1]], [1.0, 1.0]), d[0].log() + d[1].log()
        assert apart(found.denoiser.exp(), by_d.softmax(-1)) > 1e-2


# --- which law -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", THREE, ids=repr)
@pytest.mark.parametrize("predicts", ["denoiser", "loo"])
def test_a_scale_of_0_and_minus_1_is_exact(process: dd.Process, predicts: dd.prediction.Predicts) -> None:
    one, other = CONDITIONAL.denoiser(process, predicts), FREE.denoiser(process, predicts)
    for operator in (S.Ancestral(), S.SplitLeap(), S.Euler()):
        for steps in (1, 4):
            laws = [law(model, steps, operator) for model in (one, other)]
            for scale, right in ((0.0, laws[0]), (-1.0, laws[1])):
                assert T.tv(law(dd.classifier_free(one, other, scale), steps, operator), right) <= 1e-15
            if steps > 1:
                assert T.tv(*laws) > 0.1
    assert T.tv(law(dd.classifier_free(one, other, 0.01), 8), law(one, 8)) > 1e-4, "planted: another scale"


def tilted(scale: float) -> Tensor:
    p = CONDITIONAL.p0 ** (1 + scale) * FREE.p0**-scale
    return p / p.sum()


FOUND = {  # TV to p_c^2 / p_u at 16, 32, 64 and 128 steps
    "Masked": (0.1061, 0.1006, 0.0978, 0.0965),
    "Uniform": (0.0736, 0.0814, 0.0865, 0.0894),
    "Marginal": (0.0612, 0.0698, 0.0758, 0.0795),
}


@pytest.mark.parametrize("process", THREE, ids=repr)
def test_a_scale_of_1_is_not_the_tilted_law_with_any_number_of_steps(process: dd.Process) -> None:
    """The distance tends to a number of .08 to .10: each doubling halves what is left, and the limit is not 0."""
    model = dd.classifier_free(CONDITIONAL.denoiser(process, "loo"), FREE.denoiser(process, "loo"), 1.0)
    found = [T.tv(law(model, steps), tilted(1.0)) for steps in (16, 32, 64, 128)]
    assert found == pytest.approx(FOUND[type(process).__name__], abs=5e-4)
    assert 0.95 * 0.08 < found[-1] < 0.10
    limit = 2 * found[3] - found[2]  # of an error of order 1 in the step size
    assert 0.08 < limit < 0.10
    assert abs(found[3] - found[2]) < 0.7 * abs(found[2] - found[1])
    # one network of the tilted world gets there: the distance falls with the steps, to a tenth and less
    world = T.Enumeration(tilted(1.0), vocab_size=3, length=2)
    right = [T.tv(law(world.denoiser(process, "loo"), steps), tilted(1.0)) for steps in (8, 64)]
    assert right[1] < right[0] / 6 < 0.01
    assert right[1] < found[-1] / 10


def test_one_site_is_guided_exactly() -> None:
    """O of a single site is its law, so there the tilted law is that of the samples: an oracle of another kind."""
    p = torch.as_tensor(np.random.default_rng(0).dirichlet(np.ones(4), 2))
    worlds = [T.Enumeration(row, vocab_size=4, length=1) for row in p]
    right = p[0] ** 2.5 * p[1] ** -1.5
    for process in (dd.Masked(4, LINEAR), dd.Uniform(4, LINEAR)):
        one, other = (world.denoiser(process, "loo") for world in worlds)
        for steps in (1, 5):
            assert apart(law(dd.classifier_free(one, other, 1.5), steps), right / right.sum()) < 1e-12


# --- tokens that are ruled out ---------------------------------------------------------------------------------------


def fixed(process: dd.Process, row: Tensor, length: int = 4) -> dd.Denoiser:
    """Logits (L, V), the same at any noise."""
    return dd.Denoiser(lambda x, t: row.expand(len(x), -1, -1).clone(), process, "loo", time=None, length=length)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("process", [dd.Masked(5, LINEAR), dd.Uniform(5, LINEAR)], ids=repr)
def test_what_rules_a_token_out(
    process: dd.Process, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    plain = torch.zeros(4, 5).to(dtype)
    without = plain.clone()
    without[:, 2] = -torch.inf
    last = S.Ancestral() if process.absorbing else S.Ancestral() >> S.Gibbs()

    def run(one: Tensor, other: Tensor, scale: float, operator: dd.Operator = last) -> Tensor:
        model = dd.classifier_free(fixed(process, one), fixed(process, other), scale)
        return dd.Sampler(process, model, operator, steps=3).sample(40, 4, seed=1, first_row=7).tokens

    def holds(*asked: object) -> bool:
        return bool((run(*asked) == 2).any())  # type: ignore[arg-type]

    assert holds(plain, plain, 1.0)
    assert not holds(without, plain, 1.0), "the conditional one has a positive weight"
    assert not holds(without, without, 1.0), "and then the other has no say"
    assert not holds(plain, without, -0.5), "both are positive"
    assert not holds(without, plain, -0.5)
    assert holds(without, plain, -1.0), "the conditional one has no weight"
    assert not holds(plain, without, -1.0)
    assert holds(plain, without, 0.0), "it is not asked"
    assert not holds(plain, without, -2.0)
    at = r"row 7, position \d: the denoiser gave logits without mass, or with a NaN or \+inf"
    for scale, one, other in ((1.0, plain, without), (-2.0, without, plain)):
        with pytest.raises(ValueError, match=at):
            run(one, other, scale)
    for bad in (torch.nan, torch.inf):
        for held in (plain, without):
            wrong = held.clone()
            wrong[:, 2] = bad
            for pair in ((wrong, held), (held, wrong), (wrong, wrong), (without, wrong), (wrong, without)):
                with pytest.raises(ValueError, match=at):
                    run(*pair, 1.0)
            assert run(held, wrong, 0.0).shape == (40, 4), "it is not asked"
            assert run(wrong, held, -1.0).shape == (40, 4), "it has no weight"


def test_an_error_names_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.zeros(4, 5)
    other = one.clone()
    other[3, 1] = -torch.inf
    model = dd.classifier_free(fixed(MASKED_5, one), fixed(MASKED_5, other), 1.0)
    for operator in (S.Ancestral(), S.SplitLeap(), S.Unmask("max_prob"), S.Euler(), S.Greedy()):
        for compiled in (True, False):
            with monkeypatch.context() as maybe:
                if not compiled:
                    maybe.setattr(native, "available", lambda: False)
                with pytest.raises(ValueError, match=r"row 9, position 3"):
                    dd.Sampler(MASKED_5, model, operator, steps=1).sample(2, 4, seed=1, first_row=9)


MASKED_5 = dd.Masked(5, LINEAR)


# --- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    one, other = CONDITIONAL.denoiser(MASKED), FREE.denoiser(UNIFORM)
    for call, error, text in (
        (lambda: dd.classifier_free(one, other), ValueError, "is for"),
        (lambda: dd.classifier_free(one, one, float("nan")), ValueError, "ClassifierFree: scale"),
        (lambda: dd.classifier_free(one, one, "1"), TypeError, "ClassifierFree: scale"),  # type: ignore[arg-type]
        (lambda: dd.classifier_free(one, lambda x, t: x), TypeError, "ClassifierFree"),  # type: ignore[arg-type]
        (lambda: dd.classifier_free(lambda x, t: x, one), TypeError, "classifier_free"),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=text):
            call()
    z = torch.full((1, 2), 3)
    said = one(z, 0.5)
    for others, weights in (([said], [1.0]), ([said], [1.0, float("inf")]), ([one(z, 0.6)], [2.0, -1.0])):
        with pytest.raises(ValueError, match="combined"):
            said.combined(others, weights)


def test_a_guide_is_compared_by_its_networks_and_scale() -> None:
    one, other = CONDITIONAL.denoiser(MASKED), FREE.denoiser(MASKED)
    guide = dd.ClassifierFree(other, 1.0)
    assert guide == dd.ClassifierFree(other)
    assert guide != replace(guide, scale=2.0)
    assert dd.classifier_free(one, other, 2.0).guides == (dd.ClassifierFree(other, 2.0),)
