"""How classifier-free guidance composes: networks, guides, heads, blocks, scales by step; its calls and memory."""

from dataclasses import dataclass

import pytest
import torch
from guides import Plain, by_hand, table
from operators import STEPS, accepted
from problems import states, strong, two_sites, weak
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.command.bench import Meter
from discdiff.operator import GuideAt
from discdiff.theory.world import law_of_data, law_of_prior

# Enumerations and hundreds of short runs; shapes are checked by the tests that sample.
pytestmark = pytest.mark.usefixtures("as_user")

LINEAR = dd.Linear()
MASKED, UNIFORM = dd.Masked(3, LINEAR), dd.Uniform(3, LINEAR)
THREE = [MASKED, UNIFORM, dd.Marginal(torch.tensor([0.5, 0.3, 0.2]), LINEAR)]
CONDITIONAL, FREE = two_sites(1), two_sites(2)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@dataclass(frozen=True)
class Several(dd.Guide):
    """O' ~ prod_k O_k^{w_k} with any number of networks: the guide that docs/guidance.md shows."""

    others: tuple[dd.Denoiser | str, ...]
    weights: tuple[float, ...]

    @property
    def models(self) -> tuple[dd.Denoiser | str, ...]:
        return self.others

    @property
    def nfe(self) -> float:
        return float(len(self.models))

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        return prediction.combined([at.ask(model, state) for model in self.models], self.weights)


def network(
    world: T.Enumeration, process: dd.Process, name: str, predicts: dd.prediction.Predicts = "loo"
) -> dd.Denoiser:
    exact = world.denoiser(process, predicts)
    return dd.Denoiser(
        exact.fn, process, predicts, time="alpha", time_dtype=torch.float64, length=exact.length, name=name
    )


def matrix(operator: dd.Operator, model: dd.Denoiser, t: float = 0.8, s: float = 0.4) -> Tensor:
    """The kernel from the states that are possible at its start."""
    times = {"t": t, "s": s} if operator.moves else {"t": t}
    return T.kernel(operator, model.process, model, **times)[strong().reachable(model.process, t)]


@pytest.mark.parametrize("process", THREE, ids=repr)
@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap(), S.Euler(), S.Gibbs()], ids=repr)
def test_three_networks_and_guides_of_guides(operator: dd.Operator, process: dd.Process) -> None:
    a, b, c = (
        network(world, process, name)
        for world, name in (
            (strong(), "a"),
            (weak(), "b"),
            (T.Enumeration(strong().p0.flip(0), vocab_size=3, length=3), "c"),
        )
    )
    weights = (1.4, -0.7, 0.3)
    model = a.guided(Several((b, c), weights))
    right = matrix(operator, by_hand(by_hand(a, b, weights[:2]), c, (1.0, weights[2])))
    assert apart(matrix(operator, model), right) < 1e-12
    assert apart(matrix(operator, a.guided(Several((b, c), (1.4, 0.3, -0.7)))), right) > 1e-3, "planted: exchanged"
    # two guides in a row multiply the weights: (1 + u)(1 + w), -w (1 + u), -u
    twice = dd.classifier_free(dd.classifier_free(a, b, 0.5), c, 1.0)
    flat = matrix(operator, by_hand(by_hand(a, b, (3.0, -1.0)), c, (1.0, -1.0)))
    assert apart(matrix(operator, twice), flat) < 1e-11
    # the other network's own guides run: a / (b / c)
    inner = dd.classifier_free(a, dd.classifier_free(b, c, 1.0), 1.0)
    nested = matrix(operator, by_hand(by_hand(a, b, (2.0, -2.0)), c, (1.0, 1.0)))
    assert apart(matrix(operator, inner), nested) < 1e-11
    if operator.moves:
        out = dd.Sampler(process, model, operator, steps=5).sample(60, seed=0)
        counts = out.calls["a"]
        assert out.calls == {"a": counts, "b": counts, "c": counts}
        assert out.nfe == 3 * counts


@pytest.mark.parametrize("process", THREE, ids=repr)
@pytest.mark.parametrize("cut", [dd.Truncation(temperature=0.5), dd.Truncation(top_k=2, temperature=1.5)], ids=repr)
def test_truncations_act_in_the_order_of_composition(cut: dd.Truncation, process: dd.Process) -> None:
    one, other, w = strong().denoiser(process, "loo"), weak().denoiser(process, "loo"), 0.8

    def truncated(log_p: Tensor) -> Tensor:
        log_p = log_p / cut.temperature
        return log_p if cut.top_k is None else log_p.masked_fill(log_p < log_p.topk(2).values[..., 1:], -torch.inf)

    def hand(before: bool, after: bool) -> dd.Denoiser:
        def fn(x: Tensor, t: Tensor) -> Tensor:
            a, b = (model.evaluate(x, t.view(-1, 1)).loo for model in (one, other))
            total = (1 + w) * (truncated(a) if before else a) - w * b
            return truncated(total) if after else total

        return dd.Denoiser(fn, process, "loo", time="t", time_dtype=torch.float64, length=3)

    found = {
        (True, False): dd.classifier_free(one.guided(cut), other, w),
        (False, True): dd.classifier_free(one, other, w).guided(cut),
        (True, True): dd.classifier_free(one.guided(cut), other, w).guided(cut),
        (False, False): dd.classifier_free(one, other, w),
    }
    kernels = {order: matrix(S.Ancestral(), model) for order, model in found.items()}
    for order in found:
        assert apart(kernels[order], matrix(S.Ancestral(), hand(*order))) < 1e-12
    assert apart(kernels[True, False], kernels[False, True]) > 1e-3, "planted: the other order"
    # confidence reads the combination, not what was cut afterwards
    z = states(process.states, 3)[strong().reachable(process, 0.6)]
    assert torch.equal(found[False, True](z, 0.6).untruncated.denoiser, found[False, False](z, 0.6).denoiser)


def test_what_the_unconditional_network_may_not_cut() -> None:
    """A truncation of the other network alone rules tokens out by a negative weight."""
    model = dd.classifier_free(
        strong().denoiser(MASKED, "loo"), weak().denoiser(MASKED, "loo").guided(dd.Truncation(top_k=1)), 1.0
    )
    with pytest.raises(ValueError, match=r"row 0, position 0"):
        dd.Sampler(MASKED, model, S.Ancestral(), steps=1).sample(4, seed=0)


@pytest.mark.parametrize("process", [dd.Masked(40, LINEAR), dd.Uniform(40, LINEAR)], ids=repr)
@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap(), S.Ancestral() >> S.Gibbs()], ids=repr)
def test_heads_are_run_where_logits_are_read(operator: dd.Operator, process: dd.Process) -> None:
    torch.manual_seed(0)
    sizes: list[int] = []

    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(x.shape[:-1].numel())
            return super().forward(x)

    bodies = [nn.Embedding(process.states, 8).double() for _ in range(2)]
    heads = [[kind(8, 40).double() for kind in (Head, nn.Linear)] for _ in range(2)]
    for mine, plain in heads:
        plain.load_state_dict(mine.state_dict())

    def models(kind: int, inside: bool) -> list[dd.Denoiser]:
        made = []
        for body, head in zip(bodies, heads, strict=True):
            layer = head[kind]
            fn = (
                (lambda x, t, b=body, h=layer: h(b(x.roll(1, 1)))) if inside else (lambda x, t, b=body: b(x.roll(1, 1)))
            )
            made.append(dd.Denoiser(fn, process, "loo", time=None, head=None if inside else layer))
        return made

    found = []
    with torch.no_grad():
        for kind, inside in ((1, True), (1, False), (0, False)):
            model = dd.classifier_free(*models(kind, inside), scale=1.5)
            found.append(dd.Sampler(process, model, operator, steps=4).sample(12, 6, seed=3).tokens)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert sizes
    if process.absorbing:
        assert max(sizes) < 12 * 6
    mixed = dd.classifier_free(models(1, False)[0], models(1, True)[1], 1.5)  # a head and logits at hand
    with torch.no_grad():
        assert torch.equal(dd.Sampler(process, mixed, operator, steps=4).sample(12, 6, seed=3).tokens, found[0])
        exchanged = dd.classifier_free(*models(1, False)[::-1], scale=1.5)  # planted
        assert not torch.equal(dd.Sampler(process, exchanged, operator, steps=4).sample(12, 6, seed=3).tokens, found[0])


@dataclass
class Last:
    """The cache of a network that looks one site back."""

    token: Tensor

    def select(self, index: Tensor) -> "Last":
        return Last(self.token[index])


class Left:
    """A network whose logits depend on the site and its left neighbour: with a cache, the same function as without."""

    def __init__(self, process: dd.Process, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(process.states, process.states, 3, generator=generator).mul(2).double()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.table[nn.functional.pad(x[:, :-1], (1, 0)), x]

    def prefill(self, x: Tensor, length: Tensor, capacity: int) -> Last:
        last = x.gather(1, (length[:, None] - 1).clamp(min=0))[:, 0]
        return Last(torch.where(length > 0, last, 0))

    def extend(self, cache: Last, tokens: Tensor) -> None:
        cache.token = tokens[:, -1]

    def evaluate(self, cache: Last, x: Tensor, time: Tensor | None) -> Tensor:
        return self.table[torch.cat([cache.token[:, None], x[:, :-1]], 1), x]


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=repr)
@pytest.mark.parametrize("operator", [S.Ancestral(), S.SplitLeap(), S.Ancestral() >> S.Gibbs()], ids=repr)
def test_blocks_behind_a_prefix_with_caches_and_without(operator: dd.Operator, process: dd.Process) -> None:
    nets = Left(process, 0), Left(process, 1)

    def run(cached: tuple[bool, bool], scale: float = 0.8) -> dd.Samples:
        one, other = (
            dd.Denoiser(net if kept else net.__call__, process, "loo", name=name)
            for net, kept, name in zip(nets, cached, ("c", "u"), strict=True)
        )
        sampler = dd.Blockwise(process, dd.classifier_free(one, other, scale), operator, block=2, steps=3)
        return sampler.sample(24, 6, seed=2, prompt=[[0, 1, 2, 1][: row % 4] for row in range(24)])

    out = {cached: run(cached) for cached in ((True, True), (False, False), (True, False), (False, True))}
    plain = out[False, False]
    assert plain.calls["c"] == plain.calls["u"] > 0
    for cached, other in out.items():
        assert torch.equal(other.tokens, plain.tokens)
        for kept, name in zip(cached, ("c", "u"), strict=True):  # a cache takes one call to be filled
            assert other.calls[name] == plain.calls[name] + kept
    assert not torch.equal(run((True, True), 3.0).tokens, plain.tokens), "planted: another scale"


def test_a_tilt_after_a_combination_multiplies_it() -> None:
    g = table(3, 3)
    for process in THREE:
        one, other = strong().denoiser(process, "loo"), weak().denoiser(process, "loo")
        found = matrix(S.Ancestral(), dd.classifier_free(one, other, 0.6).guided(Plain(g)))
        right = matrix(S.Ancestral(), by_hand(by_hand(one, other, (1.6, -0.6)), g))
        assert apart(found, right) < 1e-12
        first = dd.classifier_free(one.guided(Plain(g)), other, 0.6)
        assert apart(matrix(S.Ancestral(), first), right) > 1e-3, "planted: there g has the exponent 1.6"


# --- scales and intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", THREE, ids=repr)
def test_a_scale_for_each_step_by_plan(process: dd.Process) -> None:
    one, other = network(CONDITIONAL, process, "c"), network(FREE, process, "u")
    scales, grid = (0.0, 1.5, -0.4, 3.0), [1.0, 0.7, 0.5, 0.2, 0.0]
    guides = [[dd.ClassifierFree("free", scale)] for scale in scales]
    plan = dd.Plan(grid, [dd.Step(S.Ancestral(), guides=each) for each in guides])
    models = {"main": one, "free": other}
    found = T.law(dd.Sampler(process, models, plan=plan))

    def by_kernels(scales: tuple[float, ...]) -> Tensor:
        p = law_of_prior(process, 2)
        for scale, t, s in zip(scales, grid, grid[1:], strict=False):
            p = p @ T.kernel(S.Ancestral(), process, dd.classifier_free(one, other, scale), t, s)
        return law_of_data(process, p, 2)

    assert apart(found, by_kernels(scales)) < 1e-12
    assert apart(found, by_kernels(scales[::-1])) > 1e-3
    again = dd.Sampler(process, models, plan=dd.Plan.from_json(plan.to_json()))
    assert apart(T.law(again), found) == 0
    out = again.sample(200, seed=0)
    assert out.calls == {"main": 4, "free": 3}, "a scale of 0 asks nothing"
    assert out.nfe == 7


@pytest.mark.parametrize("process", THREE, ids=repr)
def test_a_guidance_interval_asks_the_other_network_inside_it_alone(process: dd.Process) -> None:
    one, other = network(CONDITIONAL, process, "c"), network(FREE, process, "u")
    inside = dd.between(0.25, 0.75)
    model = one.guided(dd.when(inside, dd.ClassifierFree(other, 2.0)))
    sampler = dd.Sampler(process, model, S.Ancestral(), steps=8)
    p = law_of_prior(process, 2)
    always = dd.classifier_free(one, other, 2.0)
    for _, t, s in sampler.intervals():
        p = p @ T.kernel(S.Ancestral(), process, always if 0.25 < t <= 0.75 else one, t, s)
    assert apart(T.law(sampler), law_of_data(process, p, 2)) < 1e-12
    assert T.tv(T.law(sampler), T.law(dd.Sampler(process, always, S.Ancestral(), steps=8))) > 1e-3
    out = sampler.sample(200, seed=0)
    assert out.calls == {"c": 8, "u": 4}
    assert sampler.calls == {"c": 8.0, "u": 4.0}
    assert sampler.nfe == out.nfe == 12


@pytest.mark.parametrize("process", [*THREE, dd.AbsorbingUniform(3, LINEAR)], ids=repr)
def test_calls_of_both_networks_are_equal_in_every_operator(process: dd.Process) -> None:
    one, other = network(strong(), process, "c"), network(weak(), process, "u")
    model, tried = dd.classifier_free(one, other, 1.0), 0
    for operator in STEPS:
        if not accepted(operator, process) or isinstance(operator, S.Adaptive):
            continue
        out = dd.Sampler(process, model, operator, steps=4).sample(30, seed=1)
        assert out.calls["c"] == out.calls["u"] > 0, operator
        assert out.nfe == out.calls["c"] + out.calls["u"]
        tried += 1
    assert tried > (25 if process.masks else 8)
    still = dd.Sampler(process, dd.classifier_free(one, other, 0.0), S.Ancestral(), steps=4).sample(30, seed=1)
    assert list(still.calls) == ["c"], "planted: a guide that asks nothing"


# --- memory ----------------------------------------------------------------------------------------------------------


class Dense(dd.Guide):
    """The planted fault: whole arrays."""

    def __init__(self, other: dd.Denoiser) -> None:
        self.other = other

    @property
    def models(self) -> tuple[dd.Denoiser | str, ...]:
        return (self.other,)

    def __call__(self, prediction: dd.Prediction, state: dd.State, at: GuideAt) -> dd.Prediction:
        rows = 2 * prediction.logits - at.ask(self.other, state).logits
        return dd.Prediction(rows, "loo", prediction.x, prediction.alpha, prediction.process)


@pytest.mark.parametrize(("batch", "length", "vocab"), [(4, 16, 50_257), (2, 600, 1500), (300, 40, 130)])
@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_no_temporary_is_larger_than_2_to_the_20_elements(kind: str, batch: int, length: int, vocab: int) -> None:
    """A network whose logits are at hand; all else that a run makes, in bytes of float32."""
    process = dd.Masked(vocab, LINEAR) if kind == "masked" else dd.Uniform(vocab, LINEAR)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 1, vocab, generator=generator).expand(batch, length, vocab) for _ in range(2)]
    one, other = (dd.Denoiser(lambda x, t, y=y: y, process, "loo", time=None) for y in logits)
    model = dd.classifier_free(one, other, 1.0)
    operators: list[dd.Operator] = [S.Ancestral(), S.Ancestral() >> S.Gibbs()]
    operators += [S.Unmask("max_prob"), S.Greedy()] if kind == "masked" else [S.SplitLeap()]
    for operator in operators:
        for guided in (model, model.guided(dd.Truncation(temperature=0.7)), model.guided(dd.Truncation(top_k=5))):
            with Meter() as meter:
                dd.Sampler(process, guided, operator, steps=2).sample(batch, length, seed=0)
            assert meter.largest <= 4 * 2**20, (operator, guided)
    with Meter() as meter:
        dd.Sampler(process, one.guided(Dense(other)), S.Ancestral(), steps=1).sample(batch, length, seed=0)
    assert meter.largest >= 4 * batch * length * vocab > 4 * 2**20
