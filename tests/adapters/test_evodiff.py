"""EvoDiff: files written as its authors do, the network site by site, the noise against the product of its steps."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import discdiff as dd
from discdiff import samplers as S
from discdiff import theory as T
from discdiff.adapters import load
from discdiff.adapters.byte_net import ByteNet, bytenet
from discdiff.adapters.evodiff import ALPHABET, Squared, Tabulated, blosum, blosum_rates, uniform
from discdiff.adapters.settings import Settings

ROWS, NARROW, WIDTH, INNER, DEPTH, KERNEL = 31, 4, 12, 6, 9, 5
MASK, STEPS = 28, 499
AUTHORS = {
    "AS": 0.0379827,
    "WY": 0.0008887,
    "IV": 0.2290394,
    "CW": 6.1e-6,
    "DN": 0.0052006,
    "EZ": 0.3048098,
    "JO": 3.331e-4,
}
X = torch.tensor([[0, 28, 3, 5, 19, 1, 28, 7], [7, 7, 25, 2, 0, 12, 4, 4]])


def weights() -> dict[str, Tensor]:
    """Random ones under the authors' names."""
    shapes: dict[str, tuple[int, ...]] = {"embedder.embedder.weight": (ROWS, NARROW)}
    shapes |= {"embedder.up_embedder.conv.weight": (WIDTH, NARROW, 1), "embedder.up_embedder.conv.bias": (WIDTH,)}
    for n in range(DEPTH):
        layer = {"conv.weight": (INNER, INNER, KERNEL), "conv.bias": (INNER,)}
        layer |= {f"sequence1.0.{part}": (WIDTH,) for part in ("weight", "bias")}
        layer |= {"sequence1.2.conv.weight": (INNER, WIDTH, 1), "sequence1.2.conv.bias": (INNER,)}
        layer |= {f"sequence1.3.{part}": (INNER,) for part in ("weight", "bias")}
        layer |= {f"sequence2.0.{part}": (INNER,) for part in ("weight", "bias")}
        layer |= {"sequence2.2.conv.weight": (WIDTH, INNER, 1), "sequence2.2.conv.bias": (WIDTH,)}
        shapes |= {f"embedder.layers.{n}.{name}": shape for name, shape in layer.items()}
    shapes |= {"last_norm.weight": (WIDTH,), "last_norm.bias": (WIDTH,)}
    shapes |= {"decoder.conv.weight": (ROWS, WIDTH, 1), "decoder.conv.bias": (ROWS,)}
    generator = torch.Generator().manual_seed(3)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def written_out(w: dict[str, Tensor], x: Tensor, steps: list[int] | None, given: Tensor | None = None) -> Tensor:
    """The network site by site, in float64."""
    w, length = {name: part.double() for name, part in w.items()}, x.shape[1]
    given = torch.ones(x.shape) if given is None else given

    def norm(h: Tensor, name: str) -> Tensor:
        h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
        return h * w[f"{name}.weight"] + w[f"{name}.bias"]

    def act(h: Tensor) -> Tensor:
        return h * (1 + torch.erf(h / math.sqrt(2))) / 2

    def linear(h: Tensor, name: str) -> Tensor:
        return w[f"{name}.conv.weight"][:, :, 0] @ h + w[f"{name}.conv.bias"]

    out = []
    for row in range(len(x)):
        sites = [w["embedder.embedder.weight"][v] for v in x[row]]
        if steps is not None:
            angle = [steps[row] / 10_000 ** (2 * j / NARROW) for j in range(NARROW // 2)]
            sites = [h + torch.tensor([f(a) for a in angle for f in (math.sin, math.cos)]).double() for h in sites]
        sites = [linear(h, "embedder.up_embedder") for h in sites]
        for n in range(DEPTH):
            name, far = f"embedder.layers.{n}", (1, 2, 4, 8, 16, 32, 64, 128)[n % 8]
            inside = []
            for l, h in enumerate(sites):
                h = linear(act(norm(h, f"{name}.sequence1.0")), f"{name}.sequence1.2")
                inside.append(act(norm(h, f"{name}.sequence1.3")) * given[row, l])
            kernel, moved = w[f"{name}.conv.weight"], []
            for l in range(length):
                near = [(k, l + (k - KERNEL // 2) * far) for k in range(KERNEL)]
                seen = [kernel[:, :, k] @ inside[m] for k, m in near if 0 <= m < length]
                h = torch.stack(seen).sum(0) + w[f"{name}.conv.bias"]
                moved.append(sites[l] + linear(act(norm(h, f"{name}.sequence2.0")), f"{name}.sequence2.2"))
            sites = moved
        out.append(torch.stack([linear(norm(h, "last_norm"), "decoder") for h in sites]))
    return torch.stack(out)


def written(folder: Path, name: str, rows: dict[str, Tensor] | None = None) -> Path:
    """A file as their training script leaves it."""
    path = folder / name
    optimiser = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    named = {f"module.{key}": part for key, part in (rows or weights()).items()}
    torch.save(
        {"step": 5, "tokens": 9, "model_state_dict": named, "optimizer_state_dict": optimiser.state_dict(), "epoch": 1},
        path,
    )
    return path


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timed", [False, True])
def test_the_network_is_its_formula(timed: bool) -> None:
    w = weights()
    network = bytenet(
        {name: tuple(part.shape) for name, part in w.items()}, Settings({}, "config.json"), timed
    ).double()
    network.load_state_dict(w)
    given = torch.ones(2, 8).double()
    given[1, 5:] = 0
    steps = [3, 401] if timed else None
    out = network(X, None if steps is None else torch.tensor(steps), given[..., None])
    torch.testing.assert_close(out, written_out(w, X, steps, given), atol=1e-5 if timed else 1e-10, rtol=0)
    whole = network(X, torch.tensor([3, 401]))  # one that is told no time looks at none
    torch.testing.assert_close(whole, written_out(w, X, steps), atol=1e-5 if timed else 1e-10, rtol=0)
    assert (whole - written_out(w, X, [4, 401])).abs().max() > 1e-3  # the planted fault


def test_what_is_no_such_network_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel must be odd"):
        ByteNet(5, 4, 8, 4, 2, kernel=4)
    with pytest.raises(ValueError, match="told the step"):
        ByteNet(31, 4, 8, 4, 2, timed=True)(X)
    with pytest.raises(ValueError, match=r"embedder\.embedder\.weight is missing; there are head"):
        bytenet({"head.weight": (3, 4)}, Settings({}, "config.json"), False)
    shapes = {name: tuple(part.shape) for name, part in weights().items()}
    for said, message in (
        ({"activation": "swish"}, "activation must be one of gelu, relu, got 'swish'"),
        ({"causal": True}, "causal must be false"),
        ({"n_layers": 16}, "n_layers says 16, and the weights have 9"),
        ({"r": "128"}, "r must be a whole number, got '128'"),
    ):
        with pytest.raises(ValueError, match=message):
            bytenet(shapes, Settings(said, "config.json"), False)


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_order_agnostic_one_loads_from_its_file(tmp_path: Path) -> None:
    model = load(written(tmp_path, "oaar-38M.tar"), quiet=True)
    assert model.process == dd.Masked(31, dd.Linear(), mask_id=MASK)
    assert (model.predicts, model.call.time, ALPHABET[MASK]) == ("denoiser", None, "#")
    x = torch.where(X == 25, MASK, X)
    found = model(x, 0.5).denoiser
    expected = written_out(weights(), x, None)
    expected[..., 20:] = -math.inf  # only the twenty amino acids
    hidden = x == MASK
    torch.testing.assert_close(
        found[hidden].double(), expected.log_softmax(-1)[hidden][..., : found.shape[-1]], atol=1e-5, rtol=0
    )
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=4).sample(3, 9, seed=1)
    assert int(out.tokens.max()) < 20


@pytest.mark.parametrize("kind", ["uniform", "blosum"])
def test_those_that_replace_load_from_their_files(tmp_path: Path, kind: str) -> None:
    model = load(written(tmp_path, f"d3pm-{kind}-38M.tar"), quiet=True)
    assert model.process == {"uniform": uniform, "blosum": blosum}[kind]()
    x = X.clamp(max=25)
    for k in (1, 17, STEPS):
        found = model(x, k / STEPS).loo.exp().double()
        said = written_out(weights(), x, [k, k])[..., :26].softmax(-1)[..., :20]
        torch.testing.assert_close(found[..., :20], said**2 / (said**2).sum(-1, keepdim=True), atol=1e-5, rtol=0)
        assert float(found[..., 20:].sum()) == 0
        wrong = written_out(weights(), x, [k + 1, k + 1])[..., :26].softmax(-1)[..., :20] ** 2
        assert (found[..., :20] - wrong / wrong.sum(-1, keepdim=True)).abs().max() > 1e-4
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=5).sample(2, 7, seed=1)
    assert int(out.tokens.max()) < 20


def test_files_that_do_not_say_which_they_are_are_asked_about(tmp_path: Path) -> None:
    path = written(tmp_path, "checkpoint538468.tar")
    with pytest.raises(ValueError, match="EvoDiff-OADM, EvoDiff-uniform, EvoDiff-BLOSUM"):
        load(path, quiet=True)
    assert load(path, family="EvoDiff-BLOSUM", quiet=True).convention.family == "EvoDiff-BLOSUM"
    with pytest.raises(ValueError, match="a clock of their own"):
        load(path, family="EvoDiff-uniform", schedule=dd.Linear(), quiet=True)
    short = {name: part for name, part in weights().items() if not name.endswith("decoder.conv.bias")}
    with pytest.raises(ValueError, match=r"1 missing, such as decoder\.conv\.bias"):
        load(written(tmp_path, "oaar-640M.tar", short), quiet=True)


# --- the noise ------------------------------------------------------------------------------------------------------


def products(matrices: list[Tensor]) -> Tensor:
    found = [matrices[0]]
    for matrix in matrices[1:]:
        found.append(found[-1] @ matrix)
    return torch.stack(found)


def betas_of_blosum() -> list[float]:
    rise = [1e-5 + (0.999 - 1e-5) * math.exp(6 * k / 499) for k in range(500)]
    return [b / rise[-1] + 1 / 500 for b in rise]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest total variation between rows."""
    return float((a - b).abs().sum(-1).max()) / 2


def test_the_uniform_noise_is_the_product_of_its_steps() -> None:
    beta = [1 / (500 - k + 1) for k in range(500)]
    eye, flat = torch.eye(26).double(), torch.full((26, 26), 1 / 26, dtype=torch.float64)
    bars = products([(1 - b) * eye + b * flat for b in beta])
    process = uniform()
    for k in (1, 2, 100, 499):
        assert distance(process.kernel(k / STEPS), bars[k]) < 1e-12
        assert distance(process.kernel(k / STEPS), bars[k - 1]) > 1e-3  # the planted fault: an index too low


def test_the_rates_of_substitution_are_the_authors() -> None:
    rates = blosum_rates()
    assert torch.equal(rates, rates.T)
    assert float(rates.sum(1).abs().max()) < 1e-15
    assert float(rates[~torch.eye(26).bool()].min()) > 0
    # as their code gives them, which stops scaling at five digits
    for pair, value in AUTHORS.items():
        a, b = (ALPHABET.index(letter) for letter in pair)
        assert abs(float(rates[a, b]) - value) < 5e-6


def test_the_noise_of_similar_amino_acids_is_near_the_product_of_its_steps() -> None:
    rates, beta, process = blosum_rates(), betas_of_blosum(), blosum()
    eye = torch.eye(26).double()
    bars = products([eye + b * rates for b in beta])
    far = [distance(process.kernel(k / STEPS), bars[k]) for k in range(1, 500, 6)]
    assert max(far) < 2e-3
    assert far[0] < 2e-5
    linear = dd.General(rates, Tabulated((0.0, *torch.linspace(0, sum(beta), 500).tolist()[1:])))
    assert distance(linear.kernel(0.5), bars[249]) > 0.1  # the planted fault: the same noise on another clock
    assert distance(process.kernel(1.0), torch.full((26, 26), 1 / 26)) > 0.7  # the end is not the stationary law


def test_late_steps_have_no_generator() -> None:
    values, vectors = torch.linalg.eigh(blosum_rates())
    least = []
    for b in betas_of_blosum():
        log = (vectors * (b * values).log1p()) @ vectors.T
        least.append(float((log - torch.diag(log.diag())).min()))
    assert min(least[:384]) > -1e-14
    assert max(least[384:]) < -1e-14


@pytest.mark.parametrize("kind", ["uniform", "blosum"])
def test_a_step_back_is_the_authors_formula(kind: str) -> None:
    process: dd.Process = {"uniform": uniform, "blosum": blosum}[kind]()
    beta = [1 / (500 - k + 1) for k in range(500)] if kind == "uniform" else betas_of_blosum()
    eye, flat = torch.eye(26).double(), torch.full((26, 26), 1 / 26, dtype=torch.float64)
    steps = [(1 - b) * eye + b * flat if kind == "uniform" else eye + b * blosum_rates() for b in beta]
    bars = products(steps)
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0)).double()  # what a network says of a state

    class Said(nn.Module):
        def forward(self, x: Tensor, step: Tensor) -> Tensor:
            return table[x]

    def kernel(network: nn.Module, k: int) -> Tensor:
        model = dd.Denoiser(lambda x, time: network(x, (STEPS * time).round().long()), process, "loo", scalar_time=True)
        return T.kernel(S.Ancestral(), process, model, t=k / STEPS, s=(k - 1) / STEPS, length=1)

    p = table.softmax(-1)
    for k, near in ((2, 1e-3), (250, 1e-3), (400, 3e-2)):
        theirs = ((p * p) @ bars[k - 1]) * steps[k].T
        theirs = theirs / theirs.sum(-1, keepdim=True)
        assert distance(kernel(Squared(Said()), k), theirs) < (1e-7 if kind == "uniform" else near)
        if k == 2:
            assert distance(kernel(Said(), k), theirs) > 0.05  # the planted fault: not squared


# --- the clock ------------------------------------------------------------------------------------------------------


def test_a_clock_by_table_goes_back_and_forth() -> None:
    clock = Tabulated((0.0, 0.5, 0.7, 3.0))
    t = torch.linspace(0, 1, 31).double()
    torch.testing.assert_close(clock.time(clock.alpha(t)), t)
    torch.testing.assert_close(
        clock.sigma(torch.tensor([1 / 3, 0.5, 1.0]).double()), torch.tensor([0.5, 0.6, 3]).double()
    )
    inner = torch.tensor([0.1, 0.4, 0.9]).double().requires_grad_()
    (slope,) = torch.autograd.grad(clock.alpha(inner).sum(), inner)
    torch.testing.assert_close(slope, clock.alpha_derivative(inner.detach()))
    for wrong in ((0.0,), (0.1, 0.2), (0.0, 0.3, 0.3)):
        with pytest.raises(ValueError, match="begin at 0 and grow"):
            Tabulated(wrong)
