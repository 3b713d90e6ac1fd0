"""MDLM, Duo, UDLM, SEDD, RADD, BD3LM, GIDD and BlockGen from the hub's folders, and their Lightning checkpoints."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from discdiff.adapters.block_dit import BlockTransformer, CausalBlockTransformer
from discdiff.adapters.dit import DiffusionTransformer, Ratios
from discdiff.adapters.files import Files
from discdiff.adapters.inert import plain
from discdiff.adapters.loading import Asked, Family, fit
from discdiff.convention import Convention
from discdiff.hybrid import Hybrid
from discdiff.process import Process
from discdiff.rank_one import Masked, Uniform
from discdiff.schedule import Geometric, LogLinear, Schedule

__all__ = ["DIFFUSION_TRANSFORMERS", "HybridClock"]

Config = dict[str, Any]
_PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.", "backbone.", "dit.")
_GPU = "its authors compute in bfloat16 on GPUs: replace(convention, autocast=torch.bfloat16)"
_LOO = "trained by the plug-in bound, so that it predicts the leave-one-out (Uniform Diffusion Models Revisited, 2026)"


def stripped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the prefixes of wrappers, and without what is computed anew (rotary tables, noise)."""
    found = {}
    for name, tensor in weights.items():
        while name.startswith(_PREFIXES):
            name = name.removeprefix(next(prefix for prefix in _PREFIXES if name.startswith(prefix)))
        if not name.startswith(("rotary_emb.", "noise.", "sampling_eps_", "limiting_distribution", "logit_bias")):
            found[name] = tensor
    return found


def shaped(shapes: dict[str, tuple[int, ...]], config: Config, said: Convention) -> DiffusionTransformer:
    """A network of the sizes that the weights have; one of blocks that is told no time keeps its clean tokens."""
    heads = _first(config, "n_heads", "num_attention_heads")
    rows, width = shapes["vocab_embed.embedding"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    clock = shapes.get("sigma_map.mlp.2.weight")
    time_width, norm_shift = None if clock is None else clock[0], "output_layer.norm_final.bias" in shapes
    labels = shapes.get("cond_map.embedding_table.weight")
    classes = None if labels is None else labels[0]
    if config.get("x0_causal"):
        mask = said.process.mask_id
        return CausalBlockTransformer(rows, width, heads, depth, time_width, blank=0 if mask is None else mask)
    if said.block is not None and said.time is None:
        return BlockTransformer(rows, width, heads, depth, time_width, clean=said.block)
    return DiffusionTransformer(rows, width, heads, depth, time_width, said.block, norm_shift, classes)


@dataclass(frozen=True)
class HybridClock:
    """GIDD's survival, alpha(t) = (1 - t) / (1 + B sqrt(t (1 - t))) with B = 2 p / (1 - p) (GIDD, 2025)."""

    p_uniform: float

    def __call__(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + 2 * self.p_uniform / (1 - self.p_uniform) * (t * (1 - t)).sqrt())


@dataclass(frozen=True)
class _Kind:
    """A family: how its convention follows from its configuration and the number of rows.

    Attributes:
        name, about: of the ``Family``.
        recognises: by the configuration and the names of weights.
        convention: all but what every one of them has in common.
    """

    name: str
    about: str
    recognises: Callable[[Files], bool]
    convention: Callable[[Config, int, Asked], Convention]

    def family(self) -> Family:
        return Family(self.name, self.about, self.recognises, self.build)

    def build(self, files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
        config = configuration(files)
        if asked.mask_id is None:
            mask, source = files.mask_id(-1, None)
            asked = asked if mask == -1 else replace(asked, mask_id=mask, mask_source=source)
        weights, ema = stripped(files.weights), files.averaged
        shapes = {name: tuple(part.shape) for name, part in weights.items()}
        if "vocab_embed.embedding" not in shapes:
            raise ValueError(
                f"load: {files.path} does not hold a diffusion transformer; its weights: {', '.join(list(shapes)[:4])}"
            )
        said = self.convention(config, shapes["vocab_embed.embedding"][0], asked)
        network = shaped(shapes, config, said)
        fit(network, weights, files)
        wrapped: nn.Module = network
        if said.predicts == "ratio":
            scaled = config.get("scale_by_sigma") if "graph_type" in config else True
            wrapped = Ratios(network, bool(scaled))
        return wrapped, replace(said, weights="ema" if ema else "raw")


def _said(files: Files) -> Config:
    """What config.json says, or the hyperparameters in a Lightning checkpoint, or the YAML of a training run."""
    held = {} if files.config else plain(files.saved.get("hyper_parameters"))
    inside = held.get("config", held) if isinstance(held, dict) else {}
    return dict(files.config) or inside or dict(files.run)


def configuration(files: Files) -> Config:
    """One flat configuration."""
    config = _said(files)
    flat = {name: _resolved(value, config) for name, value in config.items() if not isinstance(value, dict)}
    for part in ("model", "algo", "noise", "graph", "data"):
        inner = config.get(part)
        if isinstance(inner, dict):
            own = ("type", "name", "eps")
            named = {(f"{part}_{name}" if name in own else name): value for name, value in inner.items()}
            flat |= {name: _resolved(value, config) for name, value in named.items()}
    return flat | _in_blocks(flat, files)


def _resolved(value: object, config: Config) -> object:
    """What "${model.length}" stands for, as Hydra leaves it in what it saves; anything else as it is."""
    said = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if said is None:
        return value
    found: Any = config
    for name in said[1].split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _in_blocks(config: Config, files: Files) -> Config:
    """BlockGen's noise and its largest block: said by a training run's configuration, or else by the folders' names."""
    algorithm = str(config.get("algo_name", ""))
    if config.get("type") != "block-dit" and not algorithm.startswith("blockgen-"):
        return {}
    said = algorithm.rpartition("-")[2]
    named = files.path.absolute().as_posix()
    found = [said] if said else [kind for kind in ("absorb", "uniform") if f"/{kind}" in named]
    size = re.search(r"block_size/(\d+)/", named)
    weights = [float(weight) for weight in str(config.get("block_weights", "")).split()]
    largest = 2 ** max((n for n, weight in enumerate(weights) if weight > 0), default=0)
    sizes = {"block_size": largest} if weights else {} if size is None else {"block_size": int(size[1])}
    return {"in_blocks": found[0] if len(found) == 1 else "", **sizes}


def _first(config: Config, *names: str) -> int:
    found = [config[name] for name in names if name in config]
    if not found:
        raise ValueError(f"load: the configuration does not say the number of heads ({' or '.join(names)})")
    return int(found[0])


def _masked(config: Config, rows: int, asked: Asked) -> Convention:
    """MDLM and BD3LM: the mask is the tokenizer's or the last row; time is told where the configuration says so."""
    schedule, source = asked.schedule or _noise(config), "the family's rule: the last row"
    if asked.mask_id is None and "bert" in str(config.get("tokenizer_name_or_path", "")):
        raise ValueError(
            f"load: trained with the tokenizer {config['tokenizer_name_or_path']}, which has a mask of its own; "
            "pass its id as mask_id="
        )
    process = Masked(rows - 1, schedule)
    if asked.mask_id is not None and asked.mask_id != rows - 1:
        process, source = Masked(rows, schedule, mask_id=asked.mask_id), asked.mask_source
    told = bool(config.get("time_conditioning", False))
    return Convention(
        "MDLM", process, "denoiser", rows, source, time="sigma" if told else None,
        ids="", clock="", notes=(_GPU,),
    )  # fmt: skip


def _uniform(config: Config, rows: int, asked: Asked) -> Convention:
    """Duo and UDLM: no mask, and the time is always told unless the configuration says otherwise."""
    if asked.mask_id is not None and asked.mask_source == "given":
        raise ValueError(f"load: uniform noise has no mask, got mask_id={asked.mask_id}")
    process = Uniform(rows, asked.schedule or _noise(config))
    told = bool(config.get("time_conditioning", True))
    return Convention("Duo", process, "loo", rows, time="sigma" if told else None, ids="", clock="", notes=(_LOO, _GPU))


def _ratios(config: Config, rows: int, asked: Asked) -> Convention:
    """SEDD on either graph; what MDLM's relatives train under this name is always absorbing."""
    schedule, absorbs = asked.schedule or _noise(config), config.get("graph_type", "absorb") == "absorb"
    process: Process = Masked(rows - 1, schedule) if absorbs else Uniform(rows, schedule)
    if absorbs and asked.mask_id not in (None, rows - 1):
        raise ValueError(f"load: ratios of a mask that is not the last row ({asked.mask_id}, {rows} rows) are not read")
    source = "the family's rule: the last row" if absorbs else "none needed"
    return Convention("SEDD", process, "ratio", rows, source, time="sigma", ids="", clock="", notes=(_GPU,))


def _noise(config: Config) -> Schedule:
    """The clock the configuration names; log-linear where it names none.

    Raises:
        ValueError: for one that is not known here, rather than sampling on another.
    """
    kind = str(config.get("noise_type", "loglinear")).replace("-", "")
    if kind == "geometric":
        return Geometric(float(config["sigma_min"]), float(config["sigma_max"]))
    if kind != "loglinear":
        raise ValueError(f"load: the noise {kind!r} of the configuration is not known; pass schedule=")
    eps = config.get("noise_eps")
    return LogLinear() if eps is None else LogLinear(float(eps))


def _radd(config: Config, rows: int, asked: Asked) -> Convention:
    return replace(_masked({}, rows, asked), family="RADD")


def _gidd(config: Config, rows: int, asked: Asked) -> Convention:
    """The mask is the tokenizer's, or the last id; rows are rounded up to a multiple of 128 beyond it in some files."""
    p_uniform, known = float(config["p_uniform"]), int(config.get("vocab_size", rows))
    mask, source = (known - 1, "the family's rule") if asked.mask_id is None else (asked.mask_id, asked.mask_source)
    if asked.schedule is not None:
        raise ValueError("load: this network is told t of its own clock; use load(...).with_schedule(schedule)")
    own = HybridClock(p_uniform)
    process: Process = Hybrid(mask, own, p_uniform=p_uniform) if p_uniform > 0 else Masked(mask, own)
    return Convention(
        "GIDD", process, "loo" if p_uniform > 0 else "denoiser", rows, source, time="t",
        ids="", clock="", notes=(_LOO, _GPU) if p_uniform > 0 else (_GPU,),
    )  # fmt: skip


def _kind(*names: str) -> Callable[[Files], bool]:
    """By ``model_type``, or by the algorithm or backbone that a Lightning checkpoint was trained with."""

    def recognises(files: Files) -> bool:
        config = configuration(files)
        if config.get("diffusion") == "uniform":  # as UDLM's repository says it, whose parameterization is d3pm
            return "udlm" in names
        found = (files.config.get("model_type"), config.get("algo_name"), config.get("parameterization"))
        said = [str(name).lower() for name in found if name is not None]
        return bool(said) and said[0] in names and "p_uniform" not in config

    return recognises


_trained_as_sedd = _kind("sedd", "score")


def _sedd(files: Files) -> bool:
    said = _said(files)
    own = isinstance(said.get("graph"), dict) and "tokens" in said
    return _trained_as_sedd(files) or (own and any("sigma_map." in name for name in files.shapes))


def _is_radd(files: Files) -> bool:
    own = {"tokens", "model"} <= set(_said(files))
    return own and not any("sigma_map." in name for name in files.shapes)


def _is_blockgen(noise: str) -> Callable[[Files], bool]:
    return lambda files: configuration(files).get("in_blocks") == noise


def _named(name: str, convention: Callable[[Config, int, Asked], Convention]) -> Callable[..., Convention]:
    return lambda config, rows, asked: replace(convention(config, rows, asked), family=name)


def _blocks(config: Config, rows: int, asked: Asked) -> Convention:
    block = (asked.block or config.get("block_size")) if config.get("cross_attn", True) else None
    return _in_blocks_of(replace(_masked(config, rows, asked), family="BD3LM"), block)


def _in_blocks_of(said: Convention, block: int | None) -> Convention:
    if block is None:
        return said
    note = f"blocks of {block}, causal between them: sample it with Blockwise(block={block})"
    return replace(said, block=block, notes=(note, *said.notes))


def _blockgen(noise: Callable[[Config, int, Asked], Convention], name: str) -> Callable[..., Convention]:
    """BlockGen, whose network is never told the time."""

    def convention(config: Config, rows: int, asked: Asked) -> Convention:
        said = replace(noise(config, rows, asked), family=name, time=None)
        block, several = asked.block or config.get("block_size"), bool(config.get("x0_causal"))
        if block is None and not several:
            raise ValueError("load: nothing says the block size of this BlockGen; pass load(..., block=...)")
        note = ("trained on blocks of 1 as well: it is autoregressive, and ARPC needs no other verifier",)
        said = _in_blocks_of(said, block)
        return replace(said, aligned=not several, notes=said.notes + note * several)

    return convention


DIFFUSION_TRANSFORMERS: tuple[Family, ...] = tuple(
    kind.family()
    for kind in (
        _Kind("MDLM", "MDLM, masked diffusion (Sahoo et al., 2024)", _kind("mdlm", "subs"), _masked),
        _Kind("Duo", "Duo, uniform diffusion (Sahoo et al., 2025)", _kind("duo", "duo_base", "distillation"), _uniform),
        _Kind("UDLM", "UDLM, uniform diffusion (Schiff et al., 2025)", _kind("udlm"), _named("UDLM", _uniform)),
        _Kind("SEDD", "SEDD, concrete scores, absorbing or uniform (Lou et al., 2024)", _sedd, _ratios),
        _Kind("RADD", "RADD, masked diffusion without a time (Ou et al., 2025)", _is_radd, _radd),
        _Kind("BD3LM", "BD3LM, block diffusion (Arriola et al., 2025)", _kind("bd3lm"), _blocks),
        *(
            _Kind(
                name, f"BlockGen, {noise} diffusion in blocks of several sizes (Deschenaux and Gulcehre, 2026)",
                _is_blockgen(word), _blockgen(convention, name),
            )
            for name, noise, word, convention in (
                ("BlockGen-masked", "masked", "absorb", _masked), ("BlockGen-uniform", "uniform", "uniform", _uniform)
            )
        ),
        _Kind(
            "GIDD", "GIDD, masks and uniform noise together (von Ruette et al., 2025)",
            lambda files: "p_uniform" in configuration(files), _gidd,
        ),
    )
)  # fmt: skip
