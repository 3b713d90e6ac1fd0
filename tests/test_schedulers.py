"""An operator of ours inside a pipeline of diffusers': the same tokens as in our own sampler."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import chain
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import LLaDA2Pipeline

    from discdiff.adapters.to_diffusers import OperatorScheduler

V, LENGTH, STEPS = 5, 8, 4
MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())


class Network(torch.nn.Module):
    """A causal-free network of V + 1 columns whose logits depend on every token, and where."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.token = torch.nn.Parameter(torch.randn(V + 1, 16, generator=generator))
        self.out = torch.nn.Parameter(torch.randn(16, V + 1, generator=generator))

    @property
    def device(self) -> torch.device:
        return self.token.device

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> SimpleNamespace:
        h = self.token[x] * torch.arange(1, x.shape[1] + 1)[:, None]
        return SimpleNamespace(logits=(h + h.mean(1, keepdim=True)).tanh() @ self.out)


NETWORK = Network()


def model(process: dd.Process) -> dd.Denoiser:
    return dd.Denoiser(lambda x, time: NETWORK(x).logits[..., :V], process, "denoiser", time=None)


def through_pipeline(operator: str, length: int, block: int, prompt: Tensor, seed: int = 3) -> Tensor:
    scheduler = OperatorScheduler(operator, vocab_size=V, seed=seed, block_length=block)
    pipeline = LLaDA2Pipeline(NETWORK, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        input_ids=prompt, gen_length=length - prompt.shape[1], block_length=block, num_inference_steps=STEPS,
        mask_token_id=V, output_type="seq", editing_threshold=None,
    )  # fmt: skip
    return torch.cat([prompt, out.sequences], 1)


@pytest.mark.parametrize("operator", ["ancestral", "remdm(eta=0.3)", "euler"])
def test_a_pipeline_gives_the_tokens_of_our_sampler(operator: str) -> None:
    from discdiff.cli import parse_operator

    ours = dd.Sampler(MASKED, model(MASKED), parse_operator(operator), steps=STEPS)
    prompt = torch.tensor([[1, 4], [2, 0], [3, 3]])
    theirs = through_pipeline(operator, LENGTH, LENGTH, prompt)
    assert torch.equal(theirs, ours.sample(3, LENGTH, seed=3, prompt=prompt).tokens)
    other = through_pipeline(operator, LENGTH, LENGTH, prompt, seed=4)
    assert not torch.equal(theirs, other)


def test_block_after_block_they_are_those_of_blockwise() -> None:
    prompt = torch.zeros(2, 0, dtype=torch.int64)
    ours = dd.Blockwise(MASKED, model(MASKED), S.Ancestral(), block=4, steps=STEPS).sample(2, LENGTH, seed=3).tokens
    theirs = through_pipeline("ancestral", LENGTH, 4, prompt)
    assert torch.equal(theirs, ours)
    assert not torch.equal(theirs[:, :4], theirs[:, 4:])


@pytest.mark.parametrize("predicts", ["denoiser", "loo"])
def test_a_loop_by_hand_gives_the_tokens_of_our_sampler(predicts: str) -> None:
    world = chain(V, LENGTH)
    exact = world.denoiser(UNIFORM, predicts=predicts)  # type: ignore[arg-type]
    scheduler = OperatorScheduler("euler", "uniform", V, seed=9, predicts=predicts)
    scheduler.set_timesteps(STEPS)
    x = scheduler.prior(4, LENGTH)
    for n in scheduler.timesteps:
        x = scheduler.step(exact(x, 1 - int(n) / STEPS).logits, n, x).prev_sample
    ours = dd.Sampler(UNIFORM, exact, S.Euler(), steps=STEPS)
    assert torch.equal(x, ours.sample(4, LENGTH, seed=9).tokens)


def test_its_configuration_makes_it_again(tmp_path: Path) -> None:
    scheduler = OperatorScheduler("remdm(eta=0.2)", vocab_size=V, schedule="LogLinear(eps=0.01)", seed=7)
    scheduler.save_pretrained(tmp_path)
    again = OperatorScheduler.from_pretrained(tmp_path)
    assert (again.operator, again.process) == (scheduler.operator, scheduler.process)
    assert again.config.seed == 7
    assert again.process.schedule == dd.LogLinear(eps=0.01)


def test_noise_is_that_of_the_process() -> None:
    scheduler = OperatorScheduler(vocab_size=V)
    scheduler.set_timesteps(4)
    x0 = torch.randint(V, (2, 4000), generator=torch.Generator().manual_seed(0))
    noised = scheduler.add_noise(x0, None, torch.tensor([1, 3]))  # t = .75 and .25
    assert (noised == V).double().mean(1).tolist() == pytest.approx([0.75, 0.25], abs=0.04)
    assert bool((noised == x0)[noised != V].all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "split_leap"}, r"handed one model output, and .* needs 2"),
        ({"operator": "gibbs"}, r"handed one model output"),
        ({"process": "other"}, r"process must be 'masked' or 'uniform'"),
        ({"schedule": "Linear"}, r"cannot read the schedule 'Linear'"),
        ({"schedule": "__import__('os')"}, r"cannot read the schedule"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OperatorScheduler(**arguments)


def test_a_step_out_of_order_is_named() -> None:
    scheduler = OperatorScheduler(vocab_size=V)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(torch.zeros(1, 2, V), 0, torch.zeros(1, 2, dtype=torch.int64))
