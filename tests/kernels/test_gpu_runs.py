"""Guides, particles, posteriors, training and plans on a GPU: the tokens and the weights of the CPU.

``REHEARSE=1`` runs these tests on the CPU, to see that they are sound.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import named
from torch import Tensor, nn

import discdiff as dd
from discdiff import learning, losses
from discdiff import samplers as S
from discdiff.command.cli import main
from discdiff.learning import Trainer
from discdiff.plans import measure

REHEARSE = os.environ.get("REHEARSE") == "1"
GPU = "cpu" if REHEARSE else "cuda"
pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() or REHEARSE), reason="there is no GPU")

V, L = 5, 8
MASKED, UNIFORM = dd.Masked(V, dd.Linear()), dd.Uniform(V, dd.Linear())
TABLE = torch.randn(V + 1, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = [1.0, 0.6, 0.2, 0.0]
EMBEDDING = torch.randn(V, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Neighbours(nn.Module):
    """A network that looks at a token and the one before it, in float64: the same on every device but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(TABLE.clone())

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        return self.table[x] + self.table[x.roll(1, 1)]


def model(process: dd.Process, device: str) -> dd.Denoiser:
    network = Neighbours().to(device).requires_grad_(False)
    return dd.Denoiser(network, process, "loo", length=L, time=None if process.absorbing else "t")


def reward(x: Tensor) -> Tensor:
    return (x == 3).sum(-1).double() - 0.5 * (x[:, 0] == x[:, -1]).double()


def measurement() -> dd.Measurement:
    forward = torch.randn(3, L * 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return dd.Measurement(EMBEDDING, forward, dd.GaussianNoise([0.3, -0.2, 0.1], 0.7))


def same(draw: Callable[[str], Tensor]) -> Tensor:
    """What is drawn on the CPU, after the GPU was found to draw the same."""
    expected, drawn = draw("cpu"), draw(GPU).cpu()
    if expected.is_floating_point():
        torch.testing.assert_close(drawn, expected, atol=1e-9, rtol=1e-9)
    else:
        assert torch.equal(drawn, expected)
    return expected


GUIDES: dict[str, Callable[[], dd.Guide]] = {
    "swap": lambda: dd.Reward(reward, samples=2),
    "control variate": lambda: dd.Reward(reward, samples=8, estimator="control_variate"),
    "allow": lambda: dd.Allow(torch.ones(L, V, dtype=torch.bool).index_fill(1, torch.tensor([2]), False)),
    "forbid": lambda: dd.Forbid([1]),
    "measurement": lambda: dd.Reward(measurement(), samples=2),
    "aps": lambda: dd.APS(measurement(), inner=5),
    "doob": lambda: dd.Doob(lambda x, t: reward(x) * 0.3),
}


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_leads_to_the_same_tokens_on_a_gpu(name: str, process: dd.Process) -> None:
    def draw(device: str) -> Tensor:
        guided = model(process, device).guided(GUIDES[name]())
        return dd.Sampler(process, guided, S.Ancestral(), steps=4).sample(6, L, seed=3, device=device).tokens

    same(draw)


@pytest.mark.parametrize("operator", [S.Ancestral(), S.Unmask("max_prob")], ids=named)
def test_a_constraint_leads_to_the_same_tokens_on_a_gpu(operator: dd.Operator) -> None:
    transitions = [[(state + token) % 3 for token in range(V)] for state in range(3)]

    def draw(device: str) -> Tensor:
        guided = model(MASKED, device).guided(dd.Constraint(transitions, 0, [True, False, False]))
        return dd.Sampler(MASKED, guided, operator, steps=4).sample(16, L, seed=3, device=device).tokens

    assert bool((same(draw).sum(-1) % 3 == 0).all())


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
def test_particles_have_the_same_evidence_on_a_gpu(process: dd.Process) -> None:
    def run(device: str) -> dd.sampling.ParticleSamples:
        guided = model(process, device).guided(dd.Reward(reward, samples=2))
        sampler = dd.Sampler(process, guided, S.Ancestral(), steps=4)
        steered = dd.Particles(sampler, lambda x, t: reward(x) if t == 0 else 0 * reward(x), per_group=4)
        return steered.sample(12, L, seed=3, device=device)

    same(lambda device: run(device).tokens)
    same(lambda device: run(device).evidence)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=str)
def test_split_gibbs_is_the_same_on_a_gpu(process: dd.Process) -> None:
    def draw(device: str) -> Tensor:
        sampler = dd.Sampler(process, model(process, device), S.Ancestral(), steps=4)
        turns = dd.SplitGibbs(sampler, reward, [0.6, 0.4], proposals=4)
        return turns.sample(5, L, seed=3, device=device).tokens

    same(draw)


def test_the_variational_posterior_is_the_same_on_a_gpu() -> None:
    same(lambda device: dd.variational_posterior(model(MASKED, device), measurement(), samples=64, steps=5).log_q)


@pytest.mark.parametrize("operator", [S.Reveal("max_prob", calls=3), S.Reveal("spread", calls=4)], ids=named)
def test_reveal_is_the_same_on_a_gpu(operator: dd.Operator) -> None:
    def draw(device: str) -> Tensor:
        network = Neighbours().to(device).requires_grad_(False)

        def told(x: Tensor, time: Tensor) -> Tensor:  # a time for every site
            return network(x, None) * (1.5 - time).view(len(x), -1, 1)

        asked = dd.Denoiser(told, UNIFORM, "loo", length=L)
        return dd.Sampler(UNIFORM, asked, operator, grid=[1.0, 0.0]).sample(6, L, seed=3, device=device).tokens

    same(draw)


def test_an_interval_is_measured_the_same_on_a_gpu() -> None:
    data = torch.randint(V, (32, L), generator=torch.Generator().manual_seed(4))
    assert bool(
        (
            same(lambda device: measure(MASKED, model(MASKED, device), data.to(device), TIMES).error.nan_to_num()) > 0
        ).any()
    )


def test_the_command_trains_and_samples_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    size = ["--steps", "20", "--length", "16", "--width", "32", "--depth", "2"]
    main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--device", GPU, *size])
    main(["sample", str(tmp_path / "run"), "--device", GPU, "--steps", "4", "--batch", "2"])
    assert "held out" in capsys.readouterr().out


def test_a_plan_is_found_from_data_on_a_gpu() -> None:
    data = torch.randint(V, (16, L), generator=torch.Generator().manual_seed(4))

    def grid(device: str) -> Tensor:
        found = dd.plans.search(MASKED, model(MASKED, device), calls=2, operators=[S.Ancestral()], times=4,
                                objective=dd.plans.KLUB(data=data.to(device)), method=dd.plans.Dynamic())  # fmt: skip
        return torch.tensor(found.grid)

    same(grid)

    def excess(device: str) -> Tensor:
        sampler = dd.Sampler(UNIFORM, model(UNIFORM, device), S.Ancestral(), steps=3)
        return dd.plans.excess(sampler, data.to(device)).nats

    same(excess)


def pairs(device: str) -> learning.Pairs:
    sampler = dd.Sampler(UNIFORM, model(UNIFORM, device), S.MaximalCoupling(), steps=4)
    return learning.reflow(sampler, 64, seed=3, batch=40)


def test_paths_pairs_and_divergences_of_runs_are_the_same_on_a_gpu() -> None:
    x0 = torch.randint(V, (16, L), generator=torch.Generator().manual_seed(4))
    x_t = dd.Masked(V, dd.Linear()).marginal(x0, 0.9).sample()
    for chained in (False, True):
        same(lambda device, chained=chained: learning.bridge_paths(
            MASKED, x_t.to(device), x0.to(device), 0.9, [0.5, 0.2], paths=2, chained=chained, seed=1
        ))  # fmt: skip
    same(lambda device: torch.stack([pairs(device).x0, pairs(device).x1]))

    def kl(device: str) -> Tensor:
        one, other = model(MASKED, device), model(MASKED, device)
        other.fn.table.mul_(0.5)  # type: ignore[union-attr]
        sampler = dd.Sampler(MASKED, one, S.Ancestral(), steps=3)
        return learning.path_kl(sampler, other, batch=32, length=L, seed=2).value

    same(kl)


POLICY = dd.Sampler(MASKED, model(MASKED, "cpu"), S.Ancestral(), steps=3)  # its network is replaced
LOSSES = [
    losses.MaskedNELBO(), losses.UniformNELBO(), learning.Consistency(MASKED, "jsd", paths=2), learning.Reflow(0.5),
    learning.PolicyGradient(POLICY, reward, copies=4, updates=2, clip=0.2, branch="progressive"),
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_training_on_a_gpu_goes_on_from_its_checkpoint(
    loss: losses.Objective | learning.StagedLoss, tmp_path: Path
) -> None:
    process = UNIFORM if isinstance(loss, losses.UniformNELBO | learning.Reflow) else MASKED
    rows = torch.randint(2, (64, L), generator=torch.Generator().manual_seed(5))
    paired = isinstance(loss, learning.Reflow)
    data, held_out = (pairs(GPU).batches(16), None) if paired else (rows, rows[:8])

    def trainer(folder: Path | None) -> Trainer:
        network = Neighbours().to(GPU)
        return Trainer(network, process, loss, data, batch=16, every=10, rate=0.1, warmup=5, folder=folder,
                       progress=False, held_out=held_out)  # fmt: skip

    whole = trainer(None)
    whole.fit(40)
    stopped = trainer(tmp_path)
    update, left = stopped._update, [25]

    def stopping(*given: object) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        update(*given)  # type: ignore[arg-type]

    stopped._update = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(40)
    again = trainer(tmp_path)
    again.fit(40)
    assert again.model.fn.table.device.type == GPU  # type: ignore[union-attr]
    assert torch.equal(again.model.fn.table, whole.model.fn.table)  # type: ignore[union-attr]
    assert again.curve == whole.curve
    if isinstance(loss, losses.Objective):
        assert whole.curve[-1][1] < whole.curve[0][1] - 0.1
