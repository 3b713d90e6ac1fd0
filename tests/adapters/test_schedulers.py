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
        return SimpleNamespace(logits=(h + h.mean(1, keepdim=True)).tanh() @ self.out * 0.3)


NETWORK = Network()


def model(process: dd.Process) -> dd.Denoiser:
    return dd.Denoiser(lambda x, time: NETWORK(x).logits[..., :V], process, "denoiser", time=None)


def through_pipeline(
    operator: str, length: int, block: int, prompt: Tensor, seed: int = 3, **options: object
) -> Tensor:
    scheduler = OperatorScheduler(operator, vocab_size=V, seed=seed, block_length=block)
    pipeline = LLaDA2Pipeline(NETWORK, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    told: dict[str, object] = {"temperature": 1.0, "mask_token_id": V, "num_inference_steps": STEPS, **options}
    out = pipeline(input_ids=prompt, gen_length=length - prompt.shape[1], block_length=block, output_type="seq", **told)
    return torch.cat([prompt, out.sequences], 1)


@pytest.mark.parametrize("operator", ["ancestral", "remdm(eta=0.3)", "euler"])
def test_a_pipeline_gives_the_tokens_of_our_sampler(operator: str) -> None:
    from discdiff.command.cli import parse_operator

    ours = dd.Sampler(MASKED, model(MASKED), parse_operator(operator), steps=STEPS)
    prompt = torch.tensor([[1, 4], [2, 0], [3, 3]])
    theirs = through_pipeline(operator, LENGTH, LENGTH, prompt)
    assert torch.equal(theirs, ours.sample(3, LENGTH, seed=3, prompt=prompt).tokens)
    other = through_pipeline(operator, LENGTH, LENGTH, prompt, seed=4)
    assert not torch.equal(theirs, other)


PROMPT = torch.tensor([[1, 4], [2, 0], [3, 3]])


@pytest.mark.parametrize(
    ("options", "guide"),
    [
        ({"temperature": 0.5}, dd.Truncation(temperature=0.5)),
        ({"temperature": 0.0}, dd.Truncation(temperature=0.0)),
        ({"sampling_method": "greedy"}, dd.Truncation(temperature=0.0)),
        ({"top_k": 2}, dd.Truncation(top_k=2)),
        ({"top_p": 0.6}, dd.Truncation(top_p=0.6)),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.8}, dd.Truncation(2.0, 3, 0.8)),
    ],
)
def test_options_of_what_is_drawn_are_those_of_truncation(options: dict[str, object], guide: dd.Truncation) -> None:
    """Through the pipeline they give the tokens of our sampler under the guide, which are others than without it."""
    ours = dd.Sampler(MASKED, model(MASKED).guided(guide), S.Ancestral(), steps=STEPS)
    theirs = through_pipeline("ancestral", 24, 24, PROMPT, **options)
    assert torch.equal(theirs, ours.sample(3, 24, seed=3, prompt=PROMPT).tokens)
    assert not torch.equal(theirs, through_pipeline("ancestral", 24, 24, PROMPT))


def test_a_pipeline_draws_the_most_probable_by_default() -> None:
    """Its own default is temperature 0."""
    scheduler = OperatorScheduler(vocab_size=V)
    pipeline = LLaDA2Pipeline(NETWORK, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(input_ids=PROMPT, gen_length=6, block_length=LENGTH, mask_token_id=V, output_type="seq")
    greedy = through_pipeline("ancestral", LENGTH, LENGTH, PROMPT, seed=0, temperature=0.0, num_inference_steps=6)
    assert torch.equal(out.sequences, greedy[:, 2:])


def test_a_generator_draws_the_seed_of_a_run() -> None:
    def run(seed: int, configured: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return through_pipeline("ancestral", LENGTH, 4, PROMPT[:, :0], seed=configured, generator=generator)

    assert torch.equal(run(0), run(0, configured=4))
    assert not torch.equal(run(0), run(1))
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    ours = dd.Blockwise(MASKED, model(MASKED), S.Ancestral(), block=4, steps=STEPS)
    assert torch.equal(run(0), ours.sample(3, LENGTH, seed=seed).tokens)


def test_steps_are_those_that_are_asked_for() -> None:
    for steps in (1, 2, 5):
        ours = dd.Sampler(MASKED, model(MASKED), S.ReMDM(0.3), steps=steps)
        theirs = through_pipeline("remdm(eta=0.3)", LENGTH, LENGTH, PROMPT, num_inference_steps=steps)
        assert torch.equal(theirs, ours.sample(3, LENGTH, seed=3, prompt=PROMPT).tokens)


def test_what_is_hidden_again_after_all_was_revealed_is_revealed_in_the_end() -> None:
    """A row of two sites is often without masks early on, and remasking hides them again in steps to come."""
    ours = dd.Sampler(MASKED, model(MASKED), S.ReMDM(0.9), steps=2)
    prompt, early = torch.zeros(1, 1, dtype=torch.int64), 0
    for seed in range(12):
        theirs = through_pipeline("remdm(eta=0.9)", 3, 3, prompt, seed, num_inference_steps=2)
        out = ours.sample(1, 3, seed=seed, prompt=prompt, record=True)
        assert out.trajectory is not None
        early += bool((out.trajectory[1] != V).all())
        assert torch.equal(theirs, out.tokens)
        assert bool((theirs != V).all())
    assert early > 0


def test_a_row_that_has_ended_stays_as_it_is() -> None:
    """With an end token, rows freeze where it stands behind nothing masked, and the run stops when all have ended."""
    prompt = torch.zeros(4, 0, dtype=torch.int64)
    whole = through_pipeline("ancestral", 16, 4, prompt)
    ended = through_pipeline("ancestral", 16, 4, prompt, eos_token_id=2)
    assert not torch.equal(whole, ended)
    stopped = 0
    for row, other in zip(ended.tolist(), whole.tolist(), strict=True):
        first = row.index(2) if 2 in row else len(row)
        assert row[: first + 1] == other[: first + 1]  # the same tokens up to the end
        behind = row[(first // 4 + 1) * 4 :]
        stopped += bool(behind) and set(behind) == {V}  # blocks behind it were not begun
    assert stopped > 0
    late = through_pipeline("ancestral", 16, 4, prompt, eos_token_id=2, eos_early_stop=False)
    assert torch.equal(late, whole)


def test_callbacks_see_each_step_and_may_change_it() -> None:
    """They are called with (pipeline, step of the run, step of the block, tensors), all about that step."""
    seen: list[tuple[int, int]] = []
    states: list[Tensor] = []
    keys = ["block_x", "transfer_index", "editing_transfer_index", "sampled_tokens", "sampled_probs", "active_block"]

    def look(pipeline: LLaDA2Pipeline, step: int, within: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(pipeline.scheduler, OperatorScheduler)
        assert list(tensors) == keys
        seen.append((step, within))
        x, filled, edited, tokens, probs, active = (tensors[key] for key in keys)
        assert torch.equal(x[:, -4:], tokens)
        assert torch.equal(filled, active & (tokens != V))
        assert not bool((edited & active).any())
        assert bool(((probs > 0) & (probs < 1))[tokens != V].all())
        assert bool((probs[tokens == V] == 0).all())
        states.append(x.clone())
        return {}

    told: dict[str, object] = {"callback_on_step_end_tensor_inputs": keys}
    tokens = through_pipeline("remdm(eta=0.3)", LENGTH, 4, PROMPT[:, :0], callback_on_step_end=look, **told)
    assert seen == [(n, n % STEPS) for n in range(2 * STEPS)]
    assert torch.equal(states[-1], tokens)

    def change(pipeline: LLaDA2Pipeline, step: int, within: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"block_x": torch.where(tensors["block_x"] == V, V, 1)}

    changed = through_pipeline("ancestral", LENGTH, 4, PROMPT[:, :0], callback_on_step_end=change)
    assert bool((changed == 1).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_token_id": 2}, r"mask_token_id = 2, but the mask of Masked\(5, Linear\(\)\) is 5"),
        ({"temperature": -1.0}, "temperature must lie in"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"threshold": 0.9}, r"operator's to say, not threshold = 0.9"),
        ({"editing_threshold": 0.8}, r"operator's to say, not editing_threshold = 0.8"),
        ({"minimal_topk": 2}, r"operator's to say, not minimal_topk = 2"),
        ({"max_post_steps": 3}, "max_post_steps = 3"),
        ({"generator": [torch.Generator()]}, "generator must be one torch.Generator"),
    ],
)
@pytest.mark.usefixtures("as_user")
def test_options_that_cannot_be_kept_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        through_pipeline("ancestral", LENGTH, LENGTH, PROMPT, **options)


@pytest.mark.usefixtures("as_user")
def test_more_that_cannot_be_kept() -> None:
    scheduler = OperatorScheduler("euler", "uniform", V)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.prior(1, 2)
    with pytest.raises(TypeError, match="num_inference_steps must be a whole number"):
        scheduler.set_timesteps(2.5)
    scheduler.set_timesteps(STEPS)
    x, logits = scheduler.prior(1, 2), torch.zeros(1, 2, V)
    with pytest.raises(ValueError, match="mask_token_id = 5, but the mask of"):
        scheduler.step(logits, 0, x, mask_token_id=5)
    with pytest.raises(ValueError, match="sampling_method must be"):
        scheduler.step(logits, 0, x, sampling_method="beam")
    scheduler.step(logits, 0, x)
    with pytest.raises(ValueError, match="from the first step on"):
        scheduler.step(logits, 1, x, generator=torch.Generator())
    with pytest.raises(ValueError, match="noise must be None"):
        scheduler.add_noise(x, x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"timesteps must lie in 0\.\.4"):
        scheduler.add_noise(x, None, torch.tensor([9]))


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
