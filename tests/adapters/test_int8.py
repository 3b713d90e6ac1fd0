"""Denoisers of int8 weights: what they change in the law, exactly; and hidden features at chosen noise levels."""

import copy
from pathlib import Path

import checkpoints
import pytest
import torch
from small import UNIFORM, WORLD, Small, trained
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters import load
from discdiff.adapters.diagnostics import features
from discdiff.adapters.int8 import Int8Linear, Remembered, quantize
from discdiff.adapters.own import load_trained
from discdiff.demo.data import ASSETS
from discdiff.denoiser import Cached


@pytest.fixture(scope="module")
def model() -> dd.Denoiser:
    return trained(1500)


def law(model: dd.Denoiser, steps: int = 8) -> Tensor:
    return T.law(dd.Sampler(UNIFORM, model, S.Ancestral(), steps=steps))


def test_int8_changes_the_law_little_and_the_time_features_are_what_must_stay(model: dd.Denoiser) -> None:
    float_law, p0 = law(model), WORLD.p0
    own = T.kl(p0, float_law)
    assert own < 0.1  # it has learned something: the product of marginals is at .3
    int8 = T.kl(float_law, law(quantize(model)))
    everything = T.kl(float_law, law(quantize(model, whole=lambda name: False)))
    coarse = T.kl(float_law, law(quantize(model, levels=7)))
    coarse_time = T.kl(float_law, law(quantize(model, whole=lambda name: "time" not in name, levels=7)))
    assert everything >= int8 * 0.1
    assert int8 < 1e-3
    assert int8 < 0.1 * own
    assert coarse > 20 * int8  # the planted fault
    assert coarse_time > int8


def test_rows_of_weights_are_within_half_a_step() -> None:
    layer = nn.Linear(20, 30).requires_grad_(False)
    small = Int8Linear(layer)
    assert isinstance(small.weight, Tensor)
    assert isinstance(small.scale, Tensor)
    assert small.weight.dtype == torch.int8
    error = (small.weight * small.scale[:, None] - layer.weight).abs()
    assert float((error / small.scale[:, None]).max()) <= 0.5 + 1e-4
    x = torch.randn(4, 20)
    torch.testing.assert_close(small(x), x @ (small.weight * small.scale[:, None]).T + layer.bias)


def test_what_is_said_of_a_time_is_remembered_exactly(model: dd.Denoiser) -> None:
    small = quantize(model)
    assert isinstance(small.fn, nn.Module)
    clock = small.fn.get_submodule("time")
    assert isinstance(clock, Remembered)
    sampler = dd.Sampler(UNIFORM, small, S.Ancestral(), steps=6)
    first, second = (sampler.sample(5, 3, seed=2).tokens for _ in range(2))
    assert len(clock.known) == 6
    assert torch.equal(first, second)
    forgetful = copy.deepcopy(small.fn)
    forgetful.set_submodule("time", clock.module)
    plain = dd.Sampler(UNIFORM, small.calling(forgetful), S.Ancestral(), steps=6)
    assert torch.equal(plain.sample(5, 3, seed=2).tokens, first)


@pytest.mark.parametrize("name", ["text-blocks-masked", "text-blocks-uniform", "digits-uniform"])
def test_the_examples_can_be_quantized(name: str) -> None:
    model = load_trained(ASSETS / f"{name}.safetensors")
    if name == "digits-uniform":  # a network of convolutions has its only linear layers in the time and the head
        with pytest.raises(ValueError, match="may be quantized"):
            quantize(model, whole=lambda name: True)
        return
    small = quantize(model)
    x = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    if model.process.mask_id is not None:
        x[:, ::2] = model.process.mask_id
    with torch.no_grad():
        a, b = (one(x, 0.5).denoiser for one in (model, small))
    finite = a.isfinite()
    assert 0 < float((a - b)[finite].abs().max()) < 1.0
    assert float((a.exp() - b.exp()).abs().sum(-1).max()) < 0.3


def test_hidden_features_are_those_of_the_call(model: dd.Denoiser) -> None:
    x0 = torch.tensor([[0, 1, 2], [2, 2, 1]])
    found = features(model, x0, [1.0, 0.4], ["middle", "out"])
    assert found["middle"].shape == (2, 2, 64)
    assert isinstance(model.fn, nn.Module)
    clean = model.fn(x0, torch.ones(2))
    torch.testing.assert_close(found["out"][0].view(2, 3, 3), clean)
    assert not torch.equal(found["out"][0], found["out"][1])
    assert not model.fn.get_submodule("out")._forward_hooks
    with pytest.raises(ValueError, match="there is no module 'nothing'; some there are: time"):
        features(model, x0, [0.5], ["nothing"])
    with pytest.raises(ValueError, match=r"alphas must lie in \(0, 1\]"):
        features(model, x0, [0.0], ["out"])


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        quantize(WORLD.denoiser(UNIFORM))
    with pytest.raises(ValueError, match=r"levels must lie in 1\.\.127"):
        quantize(dd.Denoiser(Small(), UNIFORM, "loo"), levels=200)


def test_checkpoints_can_be_quantized_and_looked_into(tmp_path: Path) -> None:
    """Under their modules' own names; layers of transformers that give tuples give their hidden states."""
    model = load(checkpoints.llada2(tmp_path / "hub").folder, quiet=True)
    small = quantize(model)
    assert isinstance(small, dd.adapters.Loaded)
    layers = [part for part in small.network.modules() if isinstance(part, Int8Linear)]
    assert layers
    assert not any(isinstance(part, Int8Linear) for part in model.network.modules())
    x0 = torch.randint(4, 36, (2, 8), generator=torch.Generator().manual_seed(0))
    name = "network.model.layers.1"
    a, b = (features(one, x0, [0.9, 0.5], [name])[name] for one in (model, small))
    assert a.shape == (2, 2, 8, 32)
    assert 0 < float((a - b).abs().max()) < 0.1 * float(a.abs().max())
    assert isinstance(small.fn, Cached)
    with pytest.raises(AttributeError, match="which is no network"):
        _ = model.calling(lambda x, time: model.fn(x, time)).network  # type: ignore[attr-defined]
