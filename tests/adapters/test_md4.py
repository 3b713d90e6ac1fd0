"""MD4: arrays as its JAX code leaves them, against the network site by site."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load
from discdiff.adapters.md4 import GatedTransformer

VOCAB, HEAD, HEADS, HIDDEN, DEPTH = 7, 8, 2, 20, 2
WIDTH = HEAD * HEADS
X = torch.tensor([[0, 7, 3, 5, 7], [6, 6, 7, 2, 0]])


def arrays(told: bool = True, outside: bool = True) -> dict[str, Tensor]:
    """Random ones by the authors' paths; their matrices are (in, out)."""
    shapes: dict[str, tuple[int, ...]] = {}
    ends: list[dict[str, tuple[int, ...]]] = []
    if told:
        shapes |= {"CondEmbedding_0/dense0/kernel": (HEAD, 4 * HEAD), "CondEmbedding_0/dense0/bias": (4 * HEAD,)}
        shapes |= {"CondEmbedding_0/Dense_0/kernel": (4 * HEAD, HEAD), "CondEmbedding_0/Dense_0/bias": (HEAD,)}
    if outside:
        shapes |= {"Embed_0/embedding": (VOCAB + 1, HEAD)}
        ends.append({"kernel": (HEAD, WIDTH), "bias": (WIDTH,)})
    else:
        shapes |= {"Transformer_0/Embed_0/embedding": (VOCAB + 1, WIDTH)}
    for n in range(DEPTH):
        layer: dict[str, tuple[int, ...]] = {f"attention/w{part}/kernel": (WIDTH, WIDTH) for part in "qkvo"}
        layer |= {f"feed_forward/w{part}/kernel": (WIDTH, HIDDEN) for part in "13"}
        layer |= {"feed_forward/w2/kernel": (HIDDEN, WIDTH)}
        if told:
            layer |= {"Dense_0/kernel": (HEAD, 6 * WIDTH), "Dense_0/bias": (6 * WIDTH,)}
        else:
            layer |= {"RMSNorm_0/scale": (WIDTH,), "RMSNorm_1/scale": (WIDTH,)}
        shapes |= {f"Transformer_0/TransformerBlock_{n}/{name}": shape for name, shape in layer.items()}
    if told:
        ends.append({"kernel": (HEAD, 2 * WIDTH), "bias": (2 * WIDTH,)})
    else:
        shapes |= {"Transformer_0/RMSNorm_0/scale": (WIDTH,)}
    ends.append({"kernel": (WIDTH, VOCAB)})
    shapes |= {f"Transformer_0/Dense_{n}/{name}": shape for n, end in enumerate(ends) for name, shape in end.items()}
    generator = torch.Generator().manual_seed(3)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def written(path: Path, w: dict[str, Tensor], prefix: str = "params/classifier/", **more: Tensor) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.savez(
        path, **{prefix + name: part.numpy() for name, part in w.items()}, **{n: p.numpy() for n, p in more.items()}
    )
    return path


def written_out(w: dict[str, Tensor], x: Tensor, time: Tensor | None, gate: str = "glu") -> Tensor:
    """The network site by site and head by head, in float64."""
    w, out = {name: part.double() for name, part in w.items()}, []

    def act(h: Tensor) -> Tensor:
        return h.sigmoid() * (h if gate == "swiglu" else 1)

    def dense(h: Tensor, name: str) -> Tensor:
        return h @ w[f"{name}/kernel"] + w.get(f"{name}/bias", torch.zeros(()).double())

    def normed(h: Tensor, name: str) -> Tensor:
        if name in w:
            return torch.stack([site / ((site**2).mean() + 1e-5).sqrt() for site in h]) * w[name]
        return torch.stack([(site - site.mean()) / (site.var(unbiased=False) + 1e-5).sqrt() for site in h])

    def turned(h: Tensor, site: int) -> Tensor:
        found = h.clone()
        for m in range(HEAD // 2):
            angle, a, b = site / 10_000 ** (2 * m / HEAD), h[2 * m], h[2 * m + 1]
            found[2 * m] = a * math.cos(angle) - b * math.sin(angle)
            found[2 * m + 1] = a * math.sin(angle) + b * math.cos(angle)
        return found

    for row, tokens in enumerate(x):
        told = None
        if time is not None:
            angle = [1000 * float(time[row]) * math.exp(-math.log(1e4) * k / (HEAD // 2 - 1)) for k in range(HEAD // 2)]
            told = torch.tensor([*map(math.sin, angle), *map(math.cos, angle)]).double()
            told = dense(told, "CondEmbedding_0/dense0")
            told = act(dense(told * told.sigmoid(), "CondEmbedding_0/Dense_0"))
        if "Embed_0/embedding" in w:
            h, number = dense(w["Embed_0/embedding"][tokens], "Transformer_0/Dense_0"), 1
        else:
            h, number = w["Transformer_0/Embed_0/embedding"][tokens], 0
        for n in range(DEPTH):
            name = f"Transformer_0/TransformerBlock_{n}"
            parts = [torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double(), torch.ones(WIDTH).double()] * 2
            parts = parts if told is None else list(dense(told, f"{name}/Dense_0").chunk(6))
            m = normed(h, f"{name}/RMSNorm_0/scale") * (1 + parts[1]) + parts[0]
            q, k, v = (dense(m, f"{name}/attention/w{part}").view(len(tokens), HEADS, HEAD) for part in "qkv")
            mixed = torch.zeros(len(tokens), HEADS, HEAD).double()
            for i in range(len(tokens)):
                for head in range(HEADS):
                    score = [turned(q[i, head], i) @ turned(k[j, head], j) / HEAD**0.5 for j in range(len(tokens))]
                    mixed[i, head] = torch.stack(score).softmax(0) @ v[:, head]
            h = h + parts[2] * dense(mixed.flatten(1), f"{name}/attention/wo")
            m = normed(h, f"{name}/RMSNorm_1/scale") * (1 + parts[4]) + parts[3]
            gated = act(dense(m, f"{name}/feed_forward/w1")) * dense(m, f"{name}/feed_forward/w3")
            h = h + parts[5] * dense(gated, f"{name}/feed_forward/w2")
        m = normed(h, "Transformer_0/RMSNorm_0/scale")
        if told is not None:
            shift, scale = dense(told, f"Transformer_0/Dense_{number}").chunk(2)
            m, number = m * (1 + scale) + shift, number + 1
        out.append(dense(m, f"Transformer_0/Dense_{number}"))
    return torch.stack(out)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_it_says_what_the_network_says(told: bool, outside: bool, tmp_path: Path) -> None:
    w = arrays(told, outside)
    folder = written(tmp_path / "md4" / "arrays.npz", w).parent
    (folder / "config.json").write_text(json.dumps({"model_type": "md4", "mlp_type": "glu", "feature_dim": HEAD}))
    model = load(folder, quiet=True)
    assert (model.convention.family, model.process) == ("MD4", dd.Masked(VOCAB, dd.Linear()))
    assert model.call.time == ("t" if told else None)
    t = torch.tensor([0.3, 0.8]).double()
    own = written_out(w, X, t if told else None)
    said = model.output(X, t[:, None]).source
    assert float((said - own).abs().max()) < 1e-4 * float(own.abs().max())
    assert float(own.std()) > 0.2
    if told:
        assert float((written_out(w, X, t + 0.001) - own).abs().max()) > 1e-2  # the planted fault: a thousandth later
    out = dd.Sampler(model.process, model, S.Ancestral(), steps=4).sample(3, 9, seed=1)
    assert int(out.tokens.max()) < VOCAB


def test_averages_and_every_way_to_write_a_path(tmp_path: Path) -> None:
    w = arrays()
    average = {name: 2 * part for name, part in w.items()}
    both = {f"ema_params/classifier/{name}": part for name, part in average.items()}
    model = load(written(tmp_path / "both.npz", w, **both, step=torch.tensor(3)), quiet=True)
    assert model.convention.weights == "ema"
    t = torch.tensor([0.5, 0.5])
    own = written_out(average, X, t)
    assert float((model.network(X, t) - own).abs().max()) < 1e-3 * float(own.abs().max())
    dotted = {name.replace("/", "."): part for name, part in w.items()}
    plain = load(written(tmp_path / "dots.npz", dotted, prefix="state.params.classifier."), quiet=True)
    bare = load(written(tmp_path / "bare.npz", w, prefix=""), quiet=True)
    assert torch.equal(plain.network(X, t), bare.network(X, t))
    assert plain.convention.weights == "raw"


def test_what_arrays_do_not_say_is_read_beside_them(tmp_path: Path) -> None:
    w = arrays()
    folder = written(tmp_path / "md4" / "arrays.npz", w).parent
    content = {"model_type": "md4", "mlp_type": "swiglu", "noise_schedule": "cosine"}
    (folder / "config.json").write_text(json.dumps(content))
    model = load(folder, quiet=True)
    assert float(model.process.schedule.alpha(0.25)) == pytest.approx(1 - math.cos(math.pi / 2 * 0.75))
    t = torch.tensor([0.2, 0.9])
    assert float((model.network(X, t) - written_out(w, X, t, "swiglu")).abs().max()) < 1e-3
    for wrong, message in (
        ({"mlp_type": "other"}, "mlp_type must be one of geglu, glu, swiglu, got 'other'"),
        ({"noise_schedule": "other"}, "'other' is not known; accepted: linear, cosine, poly2"),
        ({"noise_schedule": "poly1.2.3"}, "'poly1.2.3' is not known"),
        ({"feature_dim": "8"}, "feature_dim must be a whole number, got '8'"),
        ({"feature_dim": 64}, r"feature_dim must lie in 2\.\.16, got 64"),
        ({"num_heads": 3, "feature_dim": HEAD}, "num_heads says 3, and feature_dim and the weights make 2"),
        ({"time_features": "none"}, "time_features says 'none', and the weights do"),
        ({"n_kv_heads": 1, "feature_dim": HEAD}, "n_kv_heads must be num_heads"),
    ):
        (folder / "config.json").write_text(json.dumps(content | wrong))
        with pytest.raises(ValueError, match=message):
            load(folder, quiet=True)


def test_other_arrays_and_wishes_are_refused(tmp_path: Path) -> None:
    w = arrays()
    path = written(tmp_path / "md4.npz", w)
    with pytest.raises(ValueError, match="the id after the last, 7; got mask_id=3"):
        load(path, mask_id=3, quiet=True)
    with pytest.raises(ValueError, match=r"its own clock; use load\(\.\.\.\)\.with_schedule"):
        load(path, schedule=dd.Cosine(), quiet=True)
    model = load(path, quiet=True)
    later = model.with_schedule(dd.Cosine())
    assert torch.equal(later(X, 2 / 3).denoiser, model(X, 0.5).denoiser)  # both at alpha = 1/2
    assert (
        load(written(tmp_path / "timeless.npz", arrays(told=False)), schedule=dd.Cosine(), quiet=True).call.time is None
    )
    with pytest.raises(ValueError, match=r"1 arrays are not of MD4's text network, such as .*cond_embeddings"):
        load(written(tmp_path / "classes.npz", w | {"cond_embeddings/embedding": torch.zeros(3, HEAD)}), quiet=True)
    del w["Transformer_0/TransformerBlock_1/attention/wo/kernel"]
    with pytest.raises(ValueError, match=r"1 missing, such as blocks\.1\.wo\.weight"):
        load(written(tmp_path / "short.npz", w), quiet=True)
    with pytest.raises(ValueError, match="this one is told the time"):
        GatedTransformer(8, 16, 8, 20, 1, 8, None)(X)
