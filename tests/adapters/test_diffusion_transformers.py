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
from discdiff.adapters.convention import Loaded
from discdiff.adapters.dit import DiffusionTransformer
from discdiff.denoiser import Cached

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


def written_out(
    w: dict[str, Tensor], x: Tensor, time: Tensor, seen: Callable[[int, int], bool], places: list[int] | None = None
) -> Tensor:
    """The network site by site and head by head, in float64; ``places`` are the positions of what is shown."""
    places = list(range(x.shape[1])) if places is None else places
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
                    query = turned(q[i, head], places[i]) / (WIDTH / HEADS) ** 0.5
                    score = [query @ turned(k[j, head], places[j]) for j in others]
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
    told = {None: torch.zeros(2), "sigma": sigma, "t": t[:, 0]}[model.call.time]  # type: ignore[index]
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
    with pytest.raises(ValueError, match=r"config\.json: n_heads or num_attention_heads is missing"):
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
    content = {"model": {"n_heads": HEADS, "type": "ddit"}, "algo": {"name": "mdlm"}, "time_conditioning": True}
    path, ran = lightning(tmp_path / "last.ckpt", average, content)
    model = load(path, quiet=True)
    assert (model.convention.family, model.convention.weights, model.call.time) == ("MDLM", "ema", "sigma")
    own = written_out({name: 2 * part for name, part in w.items()}, X, SIGMA, everyone)
    assert float((model.network(X, SIGMA) - own).abs().max()) < 1e-3 * float(own.abs().max())
    assert not ran.exists()
    torch.load(path, weights_only=False)  # the planted fault: what unpickling would have done
    assert ran.exists()
    raw, _ = lightning(tmp_path / "raw.ckpt", None, content)
    assert load(raw, quiet=True).convention.weights == "raw"
    short, _ = lightning(tmp_path / "short.ckpt", average[1:], content)
    with pytest.raises(ValueError, match=r"averages are not of its"):
        load(short, quiet=True)


def test_what_a_checkpoint_says_itself_comes_before_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {n_heads: 99}\nalgo: {name: duo}\n")
    path, _ = lightning(tmp_path / "last.ckpt", None, {"model": {"n_heads": HEADS}, "algo": {"name": "mdlm"}})
    assert load(path, quiet=True).convention.family == "MDLM"
    bare = {f"backbone.{name}": part for name, part in weights().items()}
    torch.save({"state_dict": bare}, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match=r"config\.yaml: n_heads must lie in 1\.\.16, got 99"):
        load(tmp_path / "bare.ckpt", quiet=True)


def test_what_a_configuration_says_is_kept_or_refused(tmp_path: Path) -> None:
    def hub(name: str, **more: object) -> Path:
        _, w = write("MDLM", tmp_path / name)
        return checkpoints.folder(tmp_path / name, CONFIGS["MDLM"] | more, {f"backbone.{k}": v for k, v in w.items()})

    with pytest.raises(ValueError, match=r"config\.json: the noise 'cosine' is not known; pass schedule="):
        load(hub("cosine", noise={"type": "cosine"}), quiet=True)
    given = load(tmp_path / "cosine", schedule=dd.Cosine(), quiet=True)
    assert given.process.schedule == dd.Cosine()
    assert load(hub("eps", noise={"type": "log-linear", "eps": 0.01}), quiet=True).process.schedule == dd.LogLinear(
        0.01
    )
    with pytest.raises(ValueError, match="bert-base-uncased, which has a mask of its own; pass mask_id="):
        load(hub("bert", data={"tokenizer_name_or_path": "bert-base-uncased"}), quiet=True)
    model = load(tmp_path / "bert", mask_id=3, quiet=True)
    assert (model.process.mask_id, model.process.vocab_size, model.convention.mask_source) == (3, ROWS, "given")
    with pytest.raises(ValueError, match="uniform noise has no mask, got mask_id=3"):
        load(write("Duo", tmp_path / "duo")[0], mask_id=3, quiet=True)


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("MDLM", {"n_heads": "2"}, r"config\.json: n_heads must be a whole number, got '2'"),
        ("MDLM", {"n_heads": True}, "n_heads must be a whole number, got True"),
        ("MDLM", {"n_heads": 17}, r"n_heads must lie in 1\.\.16, got 17"),
        ("MDLM", {"time_conditioning": {"x": 1}}, "time_conditioning must be true or false, got {'x': 1}"),
        ("MDLM", {"hidden_dim": 32}, "hidden_size or hidden_dim says 32, and the weights have 16"),
        ("MDLM", {"n_blocks": 12}, "n_blocks or num_hidden_layers says 12, and the weights have 2"),
        ("MDLM", {"causal": True}, "causal must be False, the only network of this family here, got True"),
        ("MDLM", {"rope_theta": 500.0}, r"rope_theta must be 10000, .* got 500\.0"),
        ("MDLM", {"sliding_window": 4}, "sliding_window must be absent"),
        ("MDLM", {"logit_scale": 2.0}, r"'logit_scale' may change .* pass ignore=\['logit_scale'\]"),
        ("MDLM", {"noise": "loud"}, "noise must be a table, got 'loud'"),
        ("MDLM", {"noise": {"type": "loglinear", "eps": 2}}, "noise_eps must lie in"),
        ("MDLM", {"mask_token_id": 40}, r"the mask id is 40 \(config\.json\), and the network knows 0\.\.12"),
        ("Duo", {"model": {"qk_norm": True}}, "qk_norm must be False"),
        ("BD3LM", {"block_size": 2.0}, r"block_size must be a whole number, got 2\.0"),
        ("SEDD", {"graph": {"type": "odd"}}, "graph_type must be one of absorb, uniform, got 'odd'"),
        ("SEDD", {"noise": {"type": "geometric", "sigma_min": 5, "sigma_max": 1}}, "sigma_max must lie in"),
        ("GIDD", {"p_uniform": 1.0}, "p_uniform must lie in"),
        ("GIDD", {"vocab_size": 14}, r"vocab_size must lie in 2\.\.13"),
    ],
)
def test_settings_have_types_and_change_nothing_unseen(
    name: str, said: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder, w = write(name, tmp_path / "hub")
    checkpoints.folder(folder, CONFIGS[name] | said, w)
    with pytest.raises(ValueError, match=message):
        load(folder, quiet=True)


def test_what_may_change_the_network_is_passed_over_as_asked(tmp_path: Path) -> None:
    folder, w = write("MDLM", tmp_path / "hub")
    own = load(folder, quiet=True)
    generic = {"architectures": ["MDLM"], "auto_map": {"AutoConfig": "x.y"}, "dropout": 0.1, "torch_dtype": "float16"}
    generic |= {"attn_implementation": "somebody/attention"}  # attention is torch's own
    checkpoints.folder(folder, CONFIGS["MDLM"] | generic | {"odd": 3, "rope_theta": 5}, w)
    model = load(folder, quiet=True, ignore=["odd", "rope_theta"])
    assert torch.equal(model.network(X), own.network(X))
    with pytest.raises(ValueError, match="MDLM is not in blocks, so block= is not to be given"):
        load(folder, quiet=True, ignore=["odd", "rope_theta"], block=4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("x", r"10 left over, such as blocks\.x"),
        ("1000000000000", r"10 left over, such as blocks\.1000000000000"),
        ("-1", r"left over, such as blocks\.-1"),
        ("3", r"left over, such as blocks\.3"),
    ],
)
def test_layers_are_as_many_as_the_weights_have(layer: str, message: str, tmp_path: Path) -> None:
    folder, w = write("BD3LM", tmp_path / "hub")
    odd = {name.replace("blocks.1.", f"blocks.{layer}."): part for name, part in w.items()}
    checkpoints.folder(folder, CONFIGS["BD3LM"], odd)
    with pytest.raises(ValueError, match=message):
        load(folder, quiet=True)


def test_the_algorithm_says_more_than_the_parameterization(tmp_path: Path) -> None:
    """A block model is parameterised like MDLM, and is none."""
    content: dict[str, object] = {"model": {"n_heads": HEADS}, "algo": {"name": "bd3lm"}, "parameterization": "subs"}
    path, _ = lightning(tmp_path / "blocks.ckpt", None, content | {"block_size": 2})
    assert load(path, quiet=True).convention.family == "BD3LM"
    whole = content | {"model": {"n_heads": HEADS, "length": 6}, "block_size": "${model.length}"}  # as it pretrains
    path, _ = lightning(tmp_path / "whole.ckpt", None, whole)
    assert load(path, quiet=True).convention.block == 6
    path, _ = lightning(tmp_path / "other.ckpt", None, content | {"algo": {"name": "blockgen"}})
    with pytest.raises(ValueError, match="no family recognises its weights' names"):
        load(path, quiet=True)
    udlm = {"model": {"n_heads": HEADS}, "diffusion": "uniform", "parameterization": "d3pm"}
    path, _ = lightning(tmp_path / "udlm.ckpt", None, udlm)
    assert load(path, quiet=True).convention.family == "UDLM"


def test_a_run_of_sedds_trainer_gives_its_average(tmp_path: Path) -> None:
    w, run = weights(), tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / "checkpoints-meta").mkdir()
    lines = ["tokens: 12", "graph: {type: absorb}", "noise: {type: geometric, sigma_min: 0.001, sigma_max: 20.0}"]
    lines.append(f"model: {{hidden_size: {WIDTH}, n_heads: {HEADS}, scale_by_sigma: true}}")
    (run / ".hydra" / "config.yaml").write_text("\n".join(lines) + "\n")
    saved = {"model": w, "ema": {"shadow_params": [2 * part for part in w.values()], "decay": 0.9}, "step": 3}
    torch.save(saved, run / "checkpoints-meta" / "checkpoint.pth")
    for path in (run, run / "checkpoints-meta" / "checkpoint.pth"):
        model = load(path, quiet=True)
        assert (model.convention.family, model.convention.weights) == ("SEDD", "ema")
        assert model.process == dd.Masked(12, dd.Geometric(0.001, 20.0))
    own = written_out({name: 2 * part for name, part in w.items()}, X, SIGMA, everyone)
    own = own - (SIGMA.double().expm1().log() + math.log(ROWS - 1))[:, None, None]
    said = model.network(X, SIGMA)
    assert float((said - own.scatter(-1, X[..., None], 0.0)).abs().max()) < 1e-3 * float(own.abs().max())


@pytest.mark.parametrize("content", [{"parameterization": "sedd"}, {"algo": {"name": "sedd"}}])
def test_sedd_as_mdlm_and_its_relatives_train_it(content: dict[str, object], tmp_path: Path) -> None:
    path, _ = lightning(tmp_path / "last.ckpt", None, {"model": {"n_heads": HEADS, "type": "ddit"}, **content})
    model = load(path, quiet=True)
    assert (model.convention.family, model.predicts, model.process.mask_id) == ("SEDD", "ratio", 12)
    known = (SIGMA.double().expm1().log() + math.log(ROWS - 1))[:, None, None]
    own = written_out(weights(), X, SIGMA, everyone) - known
    assert float((model.network(X, SIGMA) - own.scatter(-1, X[..., None], 0.0)).abs().max()) < 1e-4


def test_gidds_mask_is_that_of_its_tokenizer(tmp_path: Path) -> None:
    """Its trainer adds [PAD] and [MASK] to a tokenizer that lacks them; rows may go on behind."""
    model = {"type": "diffusion", "diffusion_process": "gidd", "p_uniform": 0.1, "n_heads": HEADS}
    added = {"added_tokens_decoder": {"10": {"content": "[PAD]"}, "11": {"content": "[MASK]"}}, "mask_token": "[MASK]"}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"model": model}))  # JSON is YAML
    (run / "tokenizer_config.json").write_text(json.dumps(added))
    torch.save(weights(), run / "model.pt")
    found = load(run, quiet=True)
    assert (found.convention.family, found.process.mask_id, found.process.vocab_size) == ("GIDD", 11, 11)
    assert found.convention.mask_source == "the tokenizer"
    (run / "tokenizer_config.json").unlink()
    assert load(run, quiet=True).process.mask_id == 12  # the family's rule
    (run / "config.yaml").unlink()
    with pytest.raises(ValueError, match="no family recognises its weights' names"):
        load(run, quiet=True)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_bd3lm_keeps_its_clean_tokens(tmp_path: Path) -> None:
    """Block after block behind a memory says what the whole sequence, causal between blocks, says."""
    model = load(write("BD3LM", tmp_path / "hub")[0], quiet=True)
    assert isinstance(model.fn, Cached)
    drawn = [
        dd.Blockwise(model.process, one, S.Ancestral(), block=2, steps=2).sample(3, 6, seed=1)
        for one in uncached(model)
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert drawn[0].nfe == drawn[1].nfe
    assert drawn[0].queries < drawn[1].queries
    hybrid = checkpoints.folder(tmp_path / "told", CONFIGS["BD3LM"] | {"time_conditioning": True}, weights())
    assert not isinstance(load(hybrid, quiet=True).fn, Cached)  # what it keeps would depend on the time


def uncached(model: Loaded) -> list[dd.Denoiser]:
    """The model, and the same shown the prefix again in every call."""
    return [model, model.calling(lambda x, time: model.network(x)[..., : model.process.vocab_size])]


def blockgen(path: Path, causal: bool) -> Path:
    """As its authors publish it: the model's part of the configuration, and averaged weights."""
    config = {"name": "small", "type": "block-dit", "hidden_size": WIDTH, "n_heads": HEADS, "x0_causal": causal}
    return checkpoints.folder(path, config, weights())


@pytest.mark.parametrize("noise", ["absorb", "uniform"])
@pytest.mark.parametrize("causal", [False, True])
def test_blockgen_is_what_its_folders_say(noise: str, causal: bool, tmp_path: Path) -> None:
    kind = "multi_block_size/2/owt/0.05_0.95" if causal else "single_block_size/2/owt"
    model = load(blockgen(tmp_path / kind / noise, causal), quiet=True)
    assert model.convention.family == f"BlockGen-{'masked' if noise == 'absorb' else 'uniform'}"
    assert (model.call.time, model.convention.block) == (None, 2)
    assert model.scores_at_once == causal

    def seen(i: int, j: int) -> bool:  # the sequence of clean tokens, then of noisy ones; 6 each
        clean = (lambda a, b: b <= a) if causal else (lambda a, b: b // 2 <= a // 2)
        if j < 6:
            return clean(i, j) if i < 6 else j // 2 < (i - 6) // 2
        return i >= 6 and (i - 6) // 2 == (j - 6) // 2

    clean = (X + 1) % 12
    own = written_out(weights(), torch.cat([clean, X], 1), torch.zeros(2), seen, places=[*range(6)] * 2)[:, 6:]
    columns = model.process.vocab_size
    said = model.fn.blocks_at_once(clean, X, None, 2)  # type: ignore[union-attr]
    assert float((said - own[..., :columns]).abs().max()) < 1e-4
    memory = model.fn.prefill(clean[:, :2], torch.tensor([2, 2]), 6)  # type: ignore[union-attr]
    behind = model.fn.evaluate(memory, X[:, 2:4], None)  # type: ignore[union-attr]
    assert float((behind - own[:, 2:4, :columns]).abs().max()) < 1e-4
    out = dd.Blockwise(model.process, model, S.Ancestral(), block=2, steps=2).sample(2, 6, seed=0, prompt=[1, 2])
    assert int(out.tokens.max()) < columns
    assert out.tokens[:, :2].tolist() == [[1, 2]] * 2


def test_blockgen_that_does_not_say_what_it_is_is_asked_about(tmp_path: Path) -> None:
    plain = blockgen(tmp_path / "mine", causal=False)
    with pytest.raises(ValueError, match="no family recognises its weights' names"):
        load(plain, quiet=True)
    with pytest.raises(ValueError, match=r"nothing says the block size of this BlockGen; pass load\(\.\.\., block="):
        load(plain, family="BlockGen-uniform", quiet=True)
    assert load(plain, family="BlockGen-uniform", block=4, quiet=True).convention.block == 4
    algo = {"name": "blockgen-absorb", "block_weights": "0.05 0.0 0.95", "parameterization": "subs"}
    content = {"model": {"type": "block-dit", "n_heads": HEADS, "x0_causal": True}, "algo": algo}
    path, _ = lightning(tmp_path / "last.ckpt", None, content)
    model = load(path, quiet=True)
    assert (model.convention.family, model.convention.block, model.process.mask_id) == ("BlockGen-masked", 4, 12)


def test_a_file_that_is_not_torchs_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        load(tmp_path / "broken.ckpt", quiet=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "mdlm"}))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load(tmp_path / "empty", quiet=True)
