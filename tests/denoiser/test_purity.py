"""Functions that edit what they are given, reuse the memory they handed out, or drop units: refused, or harmless."""

import functools
import re
import warnings

import pytest
import torch
from problems import block_network
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S

pytestmark = pytest.mark.usefixtures("as_user")

V = 3
UNIFORM = dd.Uniform(V, dd.Linear())
WEIGHT = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
REUSED = "written to in place before it was read.*buffer"


def pure(x: Tensor, t: Tensor | None) -> Tensor:
    return WEIGHT[x]


def edits(x: Tensor, t: Tensor | None) -> Tensor:
    out = WEIGHT[x].clone()
    x.clamp_(max=0)
    return out


def edits_time(x: Tensor, t: Tensor) -> Tensor:
    out = WEIGHT[x] * t.view(len(x), -1, 1)
    t.mul_(1000)
    return out


class Buffered:
    """One buffer of the largest size, handed out again and again."""

    def __init__(self) -> None:
        self.memory = torch.empty(64, 8, V)

    def __call__(self, x: Tensor, t: Tensor | None) -> Tensor:
        return self.memory[: len(x), : x.shape[1]].copy_(WEIGHT[x])


def tokens(fn: object, operator: dd.Operator, time: str | None = None, **options: object) -> Tensor:
    model = dd.Denoiser(fn, UNIFORM, "loo", time=time, **options)
    return dd.Sampler(UNIFORM, model, operator, steps=6).sample(3, 5, seed=0).tokens


@pytest.mark.parametrize(
    "operator", [S.Ancestral(), S.Multistep(), S.SplitLeap(), S.Ancestral() >> S.Gibbs()], ids=repr
)
def test_edits_of_the_input_do_no_harm(operator: dd.Operator) -> None:
    assert torch.equal(tokens(edits, operator), tokens(pure, operator))
    fresh = functools.partial(tokens, operator=operator, time="t")
    for dtype in (torch.float32, torch.float64):  # a float64 time could be the state's own
        right = fresh(lambda x, t: WEIGHT[x] * t.view(len(x), -1, 1), time_dtype=dtype)
        assert torch.equal(fresh(edits_time, time_dtype=dtype), right)


def test_a_reused_buffer_is_refused_where_it_matters() -> None:
    for operator in (
        S.Ancestral(),
        S.Ancestral() >> S.Gibbs(),
        S.SplitLeap(),
    ):  # each looks at one prediction at a time
        assert torch.equal(tokens(Buffered(), operator), tokens(pure, operator))
    for operator in (S.Multistep(), S.ThetaTrapezoidal(), S.Adaptive()):  # these compare two
        with pytest.raises(ValueError, match=REUSED):
            tokens(Buffered(), operator)


def test_what_is_kept_by_hand_is_looked_at_too() -> None:
    x = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(1))
    model = dd.Denoiser(Buffered(), UNIFORM, "loo", time=None)
    first, second = model(x, 0.5), model(x.flip(0), 0.5)
    assert torch.equal(second.loo, WEIGHT[x.flip(0)].log_softmax(-1))
    for use in (
        lambda: first.loo,
        lambda: first.logits,
        lambda: first.select(torch.tensor([0])),
        lambda: first[x > 0].loo,
    ):
        with pytest.raises(ValueError, match=REUSED):
            use()


def test_pure_functions_that_share_memory_are_not_refused() -> None:
    constant = torch.randn(3, 5, V, generator=torch.Generator().manual_seed(2))
    layer = nn.Parameter(constant.clone())
    for fn in (
        lambda x, t: constant[: len(x)],  # the same object again and again
        lambda x, t: layer[: len(x)],  # a view of weights
        lambda x, t: WEIGHT[0].expand(*x.shape, V),
    ):
        for operator in (S.Multistep(), S.ThetaTrapezoidal()):
            copied = tokens(lambda x, t, fn=fn: fn(x, t).detach().clone(), operator)
            assert torch.equal(tokens(fn, operator), copied), operator


def test_under_inference_mode_a_buffer_does_no_harm() -> None:
    """No version is counted there, so outputs are copied."""
    with torch.inference_mode():
        for operator in (S.Multistep(), S.ThetaTrapezoidal()):
            assert torch.equal(tokens(Buffered(), operator), tokens(pure, operator))
            assert torch.equal(tokens(edits, operator), tokens(pure, operator))


def test_a_buffer_of_a_fixed_size_is_named() -> None:
    memory = torch.empty(3, 5, V)
    with pytest.raises(ValueError, match=r"failed on [12] of the run's 3 rows .*without a buffer of a fixed size"):
        tokens(lambda x, t: memory.view(len(x), 5, V).copy_(WEIGHT[x]), S.SplitLeap())
    with pytest.raises(RuntimeError, match="of its own"):  # what fails on all rows fails as it is

        def fails(x: Tensor, t: Tensor) -> Tensor:
            raise RuntimeError("of its own")

        tokens(fails, S.Ancestral())


class Network(nn.Module):
    """A table with dropout before it, or with dropout that its attention keeps as a number."""

    def __init__(self, rate: float, own: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)
        self.drop = nn.MultiheadAttention(2, 1, dropout=rate) if own else nn.Dropout(rate)

    def forward(self, x: Tensor, t: Tensor | None) -> Tensor:
        return self.table(x).detach()


NETWORK = Network(0.1)


class Holder:
    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def call(self, x: Tensor, t: Tensor | None) -> Tensor:
        return self.network(x, t) if isinstance(self.network, Network) else WEIGHT[x]


def runs() -> list[object]:
    """Ways in which a denoiser's function may refer to its network."""
    network = NETWORK
    return [
        network,
        network.forward,
        lambda x, t: network(x, t),
        lambda x, t: NETWORK(x, t),
        functools.partial(network),
        Holder(network).call,
    ]


@pytest.mark.parametrize("fn", runs())
def test_dropout_in_training_mode_warns_once(fn: object) -> None:
    NETWORK.train()
    with pytest.warns(UserWarning, match=r"is in training mode and Dropout 'drop' .*network\.eval\(\)") as caught:
        tokens(fn, S.Ancestral())
    assert len(caught) == 1
    NETWORK.eval()
    tokens(fn, S.Ancestral())  # warnings are errors here


def test_samples_are_made_where_the_parameters_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    network, process = Network(0.0).to("meta"), dd.Masked(V, dd.Linear())
    for fn in (network, network.forward, lambda x, t: network(x, t), functools.partial(network), Holder(network).call):
        assert dd.Denoiser(fn, process, "loo").device.type == "meta"
    plain = dd.Denoiser(lambda x, t: torch.zeros(*x.shape, V), process, "loo")
    assert plain.device.type == "cpu"
    assert dd.Denoiser(plain.fn, process, "loo", head=nn.Linear(V, V, device="meta")).device.type == "meta"
    sampler = dd.Sampler(process, plain, S.Ancestral(), steps=2)
    blocks = dd.Blockwise(process, plain, S.Ancestral(), block=2, steps=2)
    monkeypatch.setattr(dd.Denoiser, "device", property(lambda model: torch.device("cuda", 99)))
    for run in (sampler.sample, blocks.sample):
        with pytest.raises(ValueError, match="sample: device must be a device of this machine"):
            run(2, 4, seed=0)
        assert run(2, 4, seed=0, device="cpu").tokens.device.type == "cpu"


def test_where_there_is_nothing_to_drop_nobody_warns() -> None:
    for network in (Network(0.0).train(), Network(0.0, own=True).train(), nn.Embedding(V, V).train()):
        tokens(
            lambda x, t, network=network: network(x, t) if isinstance(network, Network) else WEIGHT[x], S.Ancestral()
        )
    with pytest.warns(UserWarning, match="MultiheadAttention 'drop'"):
        tokens(Network(0.1, own=True), S.Ancestral())


def test_blocks_and_guides_warn_too() -> None:
    process = dd.Masked(V, dd.Linear())
    model = block_network(process)
    said = dd.Denoiser(lambda x, t: WEIGHT[x % V], process, "denoiser", time=None)
    NETWORK.train()

    def guide(prediction: dd.Prediction) -> dd.Prediction:
        return prediction if NETWORK.training else prediction.untruncated

    with pytest.warns(UserWarning, match="Dropout 'drop'") as caught:
        dd.Blockwise(process, said.guided(guide), S.Ancestral(), block=2, steps=2).sample(2, 4, seed=0)
    assert len([w for w in caught if re.search("Dropout", str(w.message))]) == 1
    NETWORK.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dd.Blockwise(process, model, S.Ancestral(), block=2, steps=2).sample(2, 4, seed=0)
