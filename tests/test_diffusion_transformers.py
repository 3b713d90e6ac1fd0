"""Checkpoints of MDLM and its relatives, from hub folders and Lightning files, against the network written out here."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
import torch
from torch import Tensor

import discdiff as dd
from discdiff import samplers as S
from discdiff.adapters import load
from discdiff.adapters.dit import DiffusionTransformer

ROWS, WIDTH, HEADS, DEPTH, CLOCK = 13, 16, 2, 2, 8
X = torch.tensor([[0, 12, 3, 5, 12, 1], [7, 7, 12, 2, 0, 12]])
SIGMA = torch.tensor([0.3, 1.7])


def weights(clock: int | None = CLOCK, shift: bool = False) -> dict[str, Tensor]:
    """Random ones under the authors' names."""
    shapes: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (ROWS, WIDTH)}
    if clock is not None:
        shapes |= {"sigma_map.mlp.0.weight": (clock, 256), "sigma_map.mlp.0.bias": (clock,)}
        shapes |= {"sigma_map.mlp.2.weight": (clock, clock), "sigma_map.mlp.2.bias": (clock,)}
    for n in range(DEPTH):
        block = {"norm1.weight": (WIDTH,), "attn_qkv.weight": (3 * WIDTH, WIDTH), "attn_out.weight": (WIDTH, WIDTH)}
        block |= {"norm2.weight": (WIDTH,), "mlp.0.weight": (4 * WIDTH, WIDTH), "mlp.0.bias": (4 * WIDTH,)}
        block |= {"mlp.2.weight": (WIDTH, 4 * WIDTH), "mlp.2.bias": (WIDTH,)}
        if shift:
            block |= {"norm1.bias": (WIDTH,), "norm2.bias": (WIDTH,)}
        if clock is not None:
            block |= {"adaLN_modulation.weight": (6 * WIDTH, clock), "adaLN_modulation.bias": (6 * WIDTH,)}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    shapes |= {"output_layer.norm_final.weight": (WIDTH,), "output_layer.linear.weight": (ROWS, WIDTH)}
    shapes |= {"output_layer.linear.bias": (ROWS,)}
    if shift:
        shapes["output_layer.norm_final.bias"] = (WIDTH,)
    if clock is not None:
        shapes |= {"output_layer.adaLN_modulation.weight": (2 * WIDTH, clock)}
        shapes |= {"output_layer.adaLN_modulation.bias": (2 * WIDTH,)}
    generator = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def written_out(w: dict[str, Tensor], x: Tensor, time: Tensor, seen: Callable[[int, int], bool]) -> Tensor:
    """The network site by site and head by head, in float64."""
    w, out = {name: part.double() for name, part in w.items()}, []
    for tokens, when in zip(x, time.double(), strict=True):
        c = torch.zeros(0)
        if "sigma_map.mlp.0.weight" in w:
            angle = when * torch.tensor([math.exp(-math.log(1e4) * k / 128) for k in range(128)]).double()
            c = w["sigma_map.mlp.0.weight"] @ torch.cat([angle.cos(), angle.sin()]) + w["sigma_map.mlp.0.bias"]
            c = w["sigma_map.mlp.2.weight"] @ (c * c.sigmoid()) + w["sigma_map.mlp.2.bias"]
            c = c * c.sigmoid()

        def parts(
            name: str, count: int, c: Tensor | None = c if "sigma_map.mlp.0.weight" in w else None
        ) -> list[Tensor]:
            if c is None:
                return [torch.full((WIDTH,), value).double() for value in (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)[:count]]
            return list((w[f"{name}.weight"] @ c + w[f"{name}.bias"]).chunk(count))

        def norm(h: Tensor, name: str) -> Tensor:
            h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            return h * w[f"{name}.weight"] + w.get(f"{name}.bias", torch.zeros(WIDTH).double())

        def turned(h: Tensor, site: int) -> Tensor:
            half = WIDTH // HEADS // 2
            angle = torch.tensor([site / 10_000 ** (k / half) for k in range(half)]).double()
            a, b = h[:half], h[half:]
            return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

        h = w["vocab_embed.embedding"][tokens]
        for n in range(DEPTH):
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts(f"blocks.{n}.adaLN_modulation", 6)
            wide = (norm(h, f"blocks.{n}.norm1") * (1 + scale_1) + shift_1) @ w[f"blocks.{n}.attn_qkv.weight"].T
            q, k, v = (part.view(len(tokens), HEADS, -1) for part in wide.chunk(3, -1))
            mixed = torch.zeros(len(tokens), HEADS, WIDTH // HEADS).double()
            for i in range(len(tokens)):
                for head in range(HEADS):
                    others = [j for j in range(len(tokens)) if seen(i, j)]
                    score = [turned(q[i, head], i) @ turned(k[j, head], j) / (WIDTH / HEADS) ** 0.5 for j in others]
                    mixed[i, head] = torch.stack(score).softmax(0) @ v[others, head]
            h = h + gate_1 * (mixed.flatten(1) @ w[f"blocks.{n}.attn_out.weight"].T)
            m = norm(h, f"blocks.{n}.norm2") * (1 + scale_2) + shift_2
            m = m @ w[f"blocks.{n}.mlp.0.weight"].T + w[f"blocks.{n}.mlp.0.bias"]
            m = 0.5 * m * (1 + ((2 / math.pi) ** 0.5 * (m + 0.044715 * m**3)).tanh())
            h = h + gate_2 * (m @ w[f"blocks.{n}.mlp.2.weight"].T + w[f"blocks.{n}.mlp.2.bias"])
        shift, scale = parts("output_layer.adaLN_modulation", 2)
        h = norm(h, "output_layer.norm_final") * (1 + scale) + shift
        out.append(h @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"])
    return torch.stack(out)


def everyone(i: int, j: int) -> bool:
    return True


def sedd(graph: str) -> dict[str, object]:
    model = {"hidden_size": WIDTH, "cond_dim": CLOCK, "n_heads": HEADS, "scale_by_sigma": graph == "absorb"}
    tokens = ROWS - (graph == "absorb")
    return {"model": model, "graph": {"type": graph}, "noise": {"type": "loglinear"}, "tokens": tokens}


CONFIGS: dict[str, dict[str, object]] = {
    "MDLM": {"model_type": "mdlm", "n_heads": HEADS, "time_conditioning": False},
    "MDLM told the time": {"model_type": "mdlm", "n_heads": HEADS, "time_conditioning": True},
    "Duo": {"model_type": "duo", "n_heads": HEADS},
    "UDLM": {"model_type": "udlm", "n_heads": HEADS, "time_conditioning": True},
    "SEDD": sedd("absorb"),
    "SEDD uniform": sedd("uniform"),
    "RADD": {"model": {"hidden_size": WIDTH, "n_heads": HEADS}, "noise": {"type": "loglinear"}, "tokens": ROWS - 1},
    "BD3LM": {"model_type": "bd3lm", "n_heads": HEADS, "block_size": 2, "time_conditioning": False},
    "GIDD": {"model_type": "dit", "num_attention_heads": HEADS, "p_uniform": 0.2, "vocab_size": ROWS},
    "GIDD masked": {"model_type": "dit", "num_attention_heads": HEADS, "p_uniform": 0.0, "vocab_size": ROWS},
}
PREDICTS = {"Duo": "loo", "UDLM": "loo", "SEDD": "ratio", "SEDD uniform": "ratio", "GIDD": "loo"}


def write(name: str, path: Path) -> tuple[Path, dict[str, Tensor]]:
    w = weights(None, shift=True) if name == "RADD" else weights()
    prefix = "" if name.startswith(("SEDD", "RADD", "GIDD")) else "backbone."
    return checkpoints.folder(path, CONFIGS[name], {prefix + key: part for key, part in w.items()}), w


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_family_says_what_the_network_says(name: str, tmp_path: Path) -> None:
    folder, w = write(name, tmp_path / "hub")
    model = load(folder, quiet=True)
    assert model.convention.family == name.split()[0]
    assert model.predicts == PREDICTS.get(name, "denoiser")
    sigma = SIGMA.double()
    t = model.process.schedule.time((-sigma).exp())[:, None]
    told = {None: torch.zeros(2), "sigma": sigma, "t": t[:, 0]}[model.time]  # type: ignore[index]
    seen = (lambda i, j: j // 2 <= i // 2) if name == "BD3LM" else everyone
    own = written_out(w, X, told, seen)
    if name == "SEDD":
        own = own - (sigma.expm1().log() + math.log(ROWS - 1))[:, None, None]
    if name.startswith("SEDD"):
        own = own.scatter(-1, X[..., None], 0.0)
    said = model.output(X, t).source
    assert said.shape[-1] == (ROWS if model.process.mask_id is None or name == "SEDD" else ROWS - 1)
    assert float((said - own[..., : said.shape[-1]]).abs().max()) < 1e-4
    assert float(own.std()) > 0.2
    predictor = S.Ancestral() if model.process.absorbing else S.Euler()
    x = dd.Sampler(model.process, model, predictor, grid=[0.95, 0.5, 0.0]).sample(2, 6, seed=0, initial=X).tokens
    assert int(x.max()) < model.process.vocab_size


def test_gidds_noise_is_the_papers() -> None:
    """alpha_t = (1 - t) / C, the mask has t / C, uniform tokens share B sqrt(t (1 - t)) / C."""
    from discdiff.adapters.diffusion_transformers import HybridClock

    process = dd.Hybrid(4, HybridClock(0.2), p_uniform=0.2)
    for t in (0.1, 0.5, 0.9):
        c = 2 * 0.2 / 0.8 * (t * (1 - t)) ** 0.5
        row = process.kernel(t)[1] * (1 + c)
        torch.testing.assert_close(row, torch.tensor([c / 4, 1 - t + c / 4, c / 4, c / 4, t]).double())


def test_heads_and_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder, w = write("MDLM", tmp_path / "hub")
    checkpoints.folder(folder, {"model_type": "mdlm"}, w)
    with pytest.raises(ValueError, match=r"does not say the number of heads \(n_heads or num_attention_heads\)"):
        load(folder, quiet=True)
    del w["blocks.1.mlp.2.bias"]
    checkpoints.folder(folder, CONFIGS["MDLM"], w)
    with pytest.raises(ValueError, match=r"fit a DiffusionTransformer: 1 missing, such as blocks\.1\.mlp\.2\.bias"):
        load(folder, quiet=True)
    with pytest.raises(ValueError, match="3 heads of even width do not fit into a width of 16"):
        DiffusionTransformer(4, 16, 3, 1, None)


class Node:
    """Stands for the classes in which hyperparameters are pickled; reading it must not run it."""

    ran: Path

    def __init__(self, content: dict[str, object]) -> None:
        self._content = content

    def __setstate__(self, state: dict[str, object]) -> None:
        Path(str(state["ran"])).touch()


def lightning(path: Path, ema: list[Tensor] | None, content: dict[str, object]) -> tuple[Path, Path]:
    """A file as Lightning writes it, with hyperparameters of a class of ours, and the file that class would touch."""
    node, ran = Node(content), path.parent / "ran"
    node.ran = ran.as_posix()  # type: ignore[assignment]
    saved = {"state_dict": {f"backbone.{name}": part for name, part in weights().items()}, "epoch": 3}
    saved |= {"hyper_parameters": {"config": node}}
    if ema is not None:
        saved |= {"ema": {"decay": 0.99, "num_updates": 5, "shadow_params": ema}}
    torch.save(saved, path)
    return path, ran


def test_a_lightning_checkpoint_gives_its_average_and_runs_nothing(tmp_path: Path) -> None:
    w = weights()
    average = [2 * part for part in w.values()]
    content = {"model": {"n_heads": HEADS}, "algo": {"name": "mdlm"}, "time_conditioning": True}
    path, ran = lightning(tmp_path / "last.ckpt", average, content)
    model = load(path, quiet=True)
    assert (model.convention.family, model.convention.weights, model.time) == ("MDLM", "ema", "sigma")
    own = written_out({name: 2 * part for name, part in w.items()}, X, SIGMA, everyone)
    assert float((model.network(X, SIGMA) - own).abs().max()) < 1e-3 * float(own.abs().max())
    assert not ran.exists()
    torch.load(path, weights_only=False)  # the planted fault: what unpickling would have done
    assert ran.exists()
    raw, _ = lightning(tmp_path / "raw.ckpt", None, content)
    assert load(raw, quiet=True).convention.weights == "raw"
    short, _ = lightning(tmp_path / "short.ckpt", average[1:], content)
    with pytest.raises(ValueError, match=r"averages in .* are not of its"):
        load(short, quiet=True)


def test_what_a_configuration_says_is_kept_or_refused(tmp_path: Path) -> None:
    def hub(name: str, **more: object) -> Path:
        _, w = write("MDLM", tmp_path / name)
        return checkpoints.folder(tmp_path / name, CONFIGS["MDLM"] | more, {f"backbone.{k}": v for k, v in w.items()})

    with pytest.raises(ValueError, match="the noise 'cosine' of the configuration is not known; pass schedule="):
        load(hub("cosine", noise={"type": "cosine"}), quiet=True)
    given = load(tmp_path / "cosine", schedule=dd.Cosine(), quiet=True)
    assert given.process.schedule == dd.Cosine()
    assert load(hub("eps", noise={"type": "log-linear", "eps": 0.01}), quiet=True).process.schedule == dd.LogLinear(
        0.01
    )
    with pytest.raises(ValueError, match="bert-base-uncased, which has a mask of its own; pass its id as mask_id="):
        load(hub("bert", data={"tokenizer_name_or_path": "bert-base-uncased"}), quiet=True)
    model = load(tmp_path / "bert", mask_id=3, quiet=True)
    assert (model.process.mask_id, model.process.vocab_size, model.convention.mask_source) == (3, ROWS, "given")
    with pytest.raises(ValueError, match="uniform noise has no mask, got mask_id=3"):
        load(write("Duo", tmp_path / "duo")[0], mask_id=3, quiet=True)


def test_the_algorithm_says_more_than_the_parameterization(tmp_path: Path) -> None:
    """A block model is parameterised like MDLM, and is none."""
    content: dict[str, object] = {"model": {"n_heads": HEADS}, "algo": {"name": "bd3lm"}, "parameterization": "subs"}
    path, _ = lightning(tmp_path / "blocks.ckpt", None, content | {"block_size": 2})
    assert load(path, quiet=True).convention.family == "BD3LM"
    path, _ = lightning(tmp_path / "other.ckpt", None, content | {"algo": {"name": "blockgen"}})
    with pytest.raises(ValueError, match="recognised by no family"):
        load(path, quiet=True)
    udlm = {"model": {"n_heads": HEADS}, "diffusion": "uniform", "parameterization": "d3pm"}
    path, _ = lightning(tmp_path / "udlm.ckpt", None, udlm)
    assert load(path, quiet=True).convention.family == "UDLM"


def test_a_file_that_is_not_torchs_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        load(tmp_path / "broken.ckpt", quiet=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "mdlm"}))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load(tmp_path / "empty", quiet=True)
