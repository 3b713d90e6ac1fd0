"""MDLM, Duo, UDLM, SEDD, RADD, BD3LM and GIDD from the hub's folders, and their Lightning checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

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


def shaped(shapes: dict[str, tuple[int, ...]], heads: int, block: int | None = None) -> DiffusionTransformer:
    """A network of the sizes that the weights have."""
    rows, width = shapes["vocab_embed.embedding"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
    clock = shapes.get("sigma_map.mlp.2.weight")
    time_width, norm_shift = None if clock is None else clock[0], "output_layer.norm_final.bias" in shapes
    labels = shapes.get("cond_map.embedding_table.weight")
    classes = None if labels is None else labels[0]
    return DiffusionTransformer(rows, width, heads, depth, time_width, block, norm_shift, classes)


def averaged(files: Files, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The exponential moving average of a Lightning checkpoint, where it has one: a list in the weights' own order.

    Raises:
        ValueError: if its number or shapes are not those of the weights.
    """
    kept = plain(files.saved.get("ema")) if files.saved else None
    shadow = kept.get("shadow_params") if isinstance(kept, dict) else None
    if not shadow:
        return weights, False
    if [tuple(part.shape) for part in shadow] != [tuple(part.shape) for part in weights.values()]:
        raise ValueError(f"load: the {len(shadow)} averages in {files.path} are not of its {len(weights)} weights")
    return dict(zip(weights, shadow, strict=True)), True


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
        weights, ema = averaged(files, stripped(files.weights))
        shapes = {name: tuple(part.shape) for name, part in weights.items()}
        if "vocab_embed.embedding" not in shapes:
            raise ValueError(
                f"load: {files.path} does not hold a diffusion transformer; its weights: {', '.join(list(shapes)[:4])}"
            )
        said = self.convention(config, shapes["vocab_embed.embedding"][0], asked)
        block = config.get("block_size") if self.name == "BD3LM" and config.get("cross_attn", True) else None
        network = shaped(shapes, _first(config, "n_heads", "num_attention_heads"), block)
        fit(network, weights, files.path)
        wrapped: nn.Module = network
        if said.predicts == "ratio":
            wrapped = Ratios(network, bool(config.get("scale_by_sigma")))
        return wrapped, replace(said, weights="ema" if ema else "raw")


def configuration(files: Files) -> Config:
    """One flat configuration: of config.json, or of the hyperparameters of a Lightning checkpoint."""
    config = files.config
    if not config and files.saved:
        held = plain(files.saved.get("hyper_parameters"))
        config = held.get("config", held) if isinstance(held, dict) else {}
    flat = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for part in ("model", "algo", "noise", "graph", "data"):
        inner = config.get(part)
        if isinstance(inner, dict):
            own = ("type", "name", "eps")
            flat |= {(f"{part}_{name}" if name in own else name): value for name, value in inner.items()}
    return flat


def _first(config: Config, *names: str) -> int:
    found = [config[name] for name in names if name in config]
    if not found:
        raise ValueError(f"load: the configuration does not say the number of heads ({' or '.join(names)})")
    return int(found[0])


def _masked(config: Config, rows: int, asked: Asked) -> Convention:
    """MDLM and BD3LM: the mask is the last row, and time is told only where the configuration says so."""
    schedule, source = asked.schedule or _noise(config), "the family's rule: the last row"
    if asked.mask_id is None and "bert" in str(config.get("tokenizer_name_or_path", "")):
        raise ValueError(
            f"load: trained with the tokenizer {config['tokenizer_name_or_path']}, which has a mask of its own; "
            "pass its id as mask_id="
        )
    process = Masked(rows - 1, schedule)
    if asked.mask_id is not None and asked.mask_id != rows - 1:
        process, source = Masked(rows, schedule, mask_id=asked.mask_id), "given"
    told = bool(config.get("time_conditioning", False))
    return Convention(
        "MDLM", process, "denoiser", rows, source, time="sigma" if told else None,
        ids="", clock="", notes=(_GPU,),
    )  # fmt: skip


def _uniform(config: Config, rows: int, asked: Asked) -> Convention:
    """Duo and UDLM: no mask, and the time is always told unless the configuration says otherwise."""
    if asked.mask_id is not None:
        raise ValueError(f"load: uniform noise has no mask, got mask_id={asked.mask_id}")
    process = Uniform(rows, asked.schedule or _noise(config))
    told = bool(config.get("time_conditioning", True))
    return Convention("Duo", process, "loo", rows, time="sigma" if told else None, ids="", clock="", notes=(_LOO, _GPU))


def _ratios(config: Config, rows: int, asked: Asked) -> Convention:
    """SEDD on either graph."""
    schedule = asked.schedule or _noise(config)
    process: Process = Masked(rows - 1, schedule) if config.get("graph_type") == "absorb" else Uniform(rows, schedule)
    source = "the family's rule: the last row" if process.mask_id is not None else "none needed"
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
    """The mask is the last of the tokenizer's ids; rows are rounded up to a multiple of 128 beyond it in some files."""
    p_uniform, known = float(config["p_uniform"]), int(config.get("vocab_size", rows))
    mask = asked.mask_id if asked.mask_id is not None else known - 1
    schedule = asked.schedule or HybridClock(p_uniform)
    process: Process = Hybrid(mask, schedule, p_uniform=p_uniform) if p_uniform > 0 else Masked(mask, schedule)
    return Convention(
        "GIDD", process, "loo" if p_uniform > 0 else "denoiser", rows, "the family's rule: the last id", time="t",
        ids="", clock="", notes=(_LOO, _GPU) if p_uniform > 0 else (_GPU,),
    )  # fmt: skip


def _kind(*names: str) -> Callable[[Files], bool]:
    """By ``model_type``, or by the algorithm or backbone that a Lightning checkpoint was trained with."""

    def recognises(files: Files) -> bool:
        config = configuration(files)
        if config.get("diffusion") == "uniform":  # as UDLM's repository says it, whose parameterization is d3pm
            return "udlm" in names
        said = [str(config[key]).lower() for key in ("model_type", "algo_name", "parameterization") if key in config]
        return bool(said) and said[0] in names and "p_uniform" not in config

    return recognises


def _sedd(files: Files) -> bool:
    own = isinstance(files.config.get("graph"), dict) and "tokens" in files.config
    return own and any("sigma_map." in name for name in files.shapes)


def _is_radd(files: Files) -> bool:
    own = "tokens" in files.config and "model" in files.config
    return own and not any("sigma_map." in name for name in files.shapes)


def _named(name: str, convention: Callable[[Config, int, Asked], Convention]) -> Callable[..., Convention]:
    return lambda config, rows, asked: replace(convention(config, rows, asked), family=name)


def _blocks(config: Config, rows: int, asked: Asked) -> Convention:
    said = replace(_masked(config, rows, asked), family="BD3LM", block=config.get("block_size"))
    note = f"blocks of {said.block}, causal between them: sample it with Blockwise(block={said.block})"
    return replace(said, notes=(note, *said.notes))


DIFFUSION_TRANSFORMERS: tuple[Family, ...] = tuple(
    kind.family()
    for kind in (
        _Kind("MDLM", "MDLM, masked diffusion (Sahoo et al., 2024)", _kind("mdlm", "subs"), _masked),
        _Kind("Duo", "Duo, uniform diffusion (Sahoo et al., 2025)", _kind("duo", "duo_base", "distillation"), _uniform),
        _Kind("UDLM", "UDLM, uniform diffusion (Schiff et al., 2025)", _kind("udlm"), _named("UDLM", _uniform)),
        _Kind("SEDD", "SEDD, concrete scores, absorbing or uniform (Lou et al., 2024)", _sedd, _ratios),
        _Kind("RADD", "RADD, masked diffusion without a time (Ou et al., 2025)", _is_radd, _radd),
        _Kind("BD3LM", "BD3LM, block diffusion (Arriola et al., 2025)", _kind("bd3lm"), _blocks),
        _Kind(
            "GIDD", "GIDD, masks and uniform noise together (von Ruette et al., 2025)",
            lambda files: "p_uniform" in configuration(files), _gidd,
        ),
    )
)  # fmt: skip
