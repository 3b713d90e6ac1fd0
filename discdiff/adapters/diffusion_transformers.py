"""Load MDLM, Duo, UDLM, SEDD, RADD, BD3LM, GIDD and BlockGen from hub folders or Lightning checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from discdiff.adapters.block_dit import BlockTransformer, CausalBlockTransformer
from discdiff.adapters.convention import Convention
from discdiff.adapters.dit import DiffusionTransformer, Ratios
from discdiff.adapters.files import Files
from discdiff.adapters.loading import Asked, Family, fit
from discdiff.adapters.run_settings import check_known, configuration, said
from discdiff.adapters.settings import Refused, Settings
from discdiff.adapters.shapes import Shapes, depth, matrix
from discdiff.checks import shown
from discdiff.process import LARGEST, Geometric, Hybrid, LogLinear, Masked, Process, Schedule, Uniform

__all__ = ["DIFFUSION_TRANSFORMERS", "HybridClock"]

_PREFIXES = ("_forward_module.", "_orig_mod.", "module.", "model.", "backbone.", "dit.")
_GPU = "its authors compute in bfloat16 on GPUs: replace(convention, autocast=torch.bfloat16)"
_LOO = "trained by the plug-in bound, so that it predicts the leave-one-out (Uniform Diffusion Models Revisited, 2026)"


def stripped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from names, and drop weights that are recomputed (rotary tables, noise).

    Raises:
        Refused: if two weights have the same name without prefixes.
    """
    found = dict[str, Tensor]()
    for name, tensor in weights.items():
        while name.startswith(_PREFIXES):
            name = name.removeprefix(next(prefix for prefix in _PREFIXES if name.startswith(prefix)))
        if name in found:
            raise Refused(f"two of its weights are called {name} without their prefixes")
        if not name.startswith(("rotary_emb.", "noise.", "sampling_eps_", "limiting_distribution", "logit_bias")):
            found[name] = tensor
    return found


def shaped(shapes: Shapes, config: Settings, said: Convention) -> DiffusionTransformer:
    """Make a network whose weights have the given shapes.

    If it was trained in blocks and takes no time, its class has a cache of clean tokens.

    Raises:
        Refused: if the configuration gives other sizes.
    """
    rows, width = matrix(shapes, "vocab_embed.embedding")
    heads = config.whole("n_heads", "num_attention_heads", least=1, most=width)
    layers = depth(shapes, "blocks.")
    clock = matrix(shapes, "sigma_map.mlp.2.weight")[0] if "sigma_map.mlp.2.weight" in shapes else None
    for keys, size in ((("hidden_size", "hidden_dim"), width), (("n_blocks", "num_hidden_layers"), layers)):
        told = config.whole(*keys, default=size)
        if told != size:
            raise config.refused(f"{' or '.join(keys)} says {told}, and the weights have {size}")
    norm_shift = "output_layer.norm_final.bias" in shapes
    labels = "cond_map.embedding_table.weight"
    classes = matrix(shapes, labels)[0] if labels in shapes else None
    try:
        if config.flag("x0_causal", default=False):
            mask = said.process.mask_id
            return CausalBlockTransformer(rows, width, heads, layers, clock, blank=0 if mask is None else mask)
        if said.block is not None and said.time is None:
            return BlockTransformer(rows, width, heads, layers, clock, clean=said.block)
        return DiffusionTransformer(rows, width, heads, layers, clock, said.block, norm_shift, classes)
    except ValueError as error:
        raise Refused(str(error)) from error


@dataclass(frozen=True)
class HybridClock:
    """GIDD's schedule, alpha(t) = (1 - t) / (1 + B sqrt(t (1 - t))), B = 2 p / (1 - p), p = ``p_uniform``.

    Reference: GIDD (von Ruette et al., 2025, https://arxiv.org/abs/2503.04482).
    """

    p_uniform: float

    def __call__(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + 2 * self.p_uniform / (1 - self.p_uniform) * (t * (1 - t)).sqrt())


@dataclass(frozen=True)
class _Kind:
    """A family of diffusion transformers.

    Attributes:
        name, about: fields of the ``Family``.
        recognises: returns whether files are of this family, by the configuration and the names of weights.
        convention: makes the convention from the configuration, the number of token ids and the user's choices.
    """

    name: str
    about: str
    recognises: Callable[[Files], bool]
    convention: Callable[[Settings, int, Asked], Convention]

    def family(self) -> Family:
        return Family(self.name, self.about, self.recognises, self.build)

    def build(self, files: Files, asked: Asked) -> tuple[nn.Module, Convention]:
        config = configuration(files)
        check_known(config, files, asked.ignore)
        if asked.mask_id is None:
            mask, source = files.mask_id(-1, None)
            asked = asked if mask == -1 else replace(asked, mask_id=mask, mask_source=source)
        weights = stripped(files.weights)
        shapes = {name: tuple(part.shape) for name, part in weights.items()}
        if "vocab_embed.embedding" not in shapes:
            raise Refused(f"{files.chosen} holds no diffusion transformer; its weights: {', '.join(list(shapes)[:4])}")
        rows, _ = matrix(shapes, "vocab_embed.embedding", least=2)
        if asked.mask_id is not None and asked.mask_id >= rows:
            raise Refused(f"the mask id is {asked.mask_id} ({asked.mask_source}), and the network knows 0..{rows - 1}")
        said = self.convention(config, rows, asked)
        if asked.block is not None and said.block is None:
            raise Refused(f"{self.name} is not in blocks, so block= is not to be given; sample it with Blockwise")
        scaled = said.predicts == "ratio" and "graph_type" in config
        scale = config.flag("scale_by_sigma", default=False) if scaled else True
        with torch.device("meta"):
            network = shaped(shapes, config, said)
        fit(network, weights, files)
        wrapped: nn.Module = Ratios(network, scale) if said.predicts == "ratio" else network
        return wrapped, replace(said, weights="ema" if files.averaged else "raw")


def _masked(config: Settings, rows: int, asked: Asked) -> Convention:
    """Make the convention of MDLM and BD3LM.

    The mask is the user's or the tokenizer's, else the last id. The network takes a time if ``time_conditioning`` is
    true.
    """
    schedule, source = asked.schedule or _noise(config), "the family's rule: the last row"
    tokenizer = config.word("tokenizer_name_or_path", default="")
    if asked.mask_id is None and "bert" in tokenizer:
        raise config.refused(f"trained with the tokenizer {tokenizer}, which has a mask of its own; pass mask_id=")
    process = Masked(rows - 1, schedule)
    if asked.mask_id is not None and asked.mask_id != rows - 1:
        process, source = Masked(rows, schedule, mask_id=asked.mask_id), asked.mask_source
    told = config.flag("time_conditioning", default=False)
    return Convention(
        "MDLM", process, "denoiser", rows, source, time="sigma" if told else None,
        ids="", clock="", notes=(_GPU,),
    )  # fmt: skip


def _uniform(config: Settings, rows: int, asked: Asked) -> Convention:
    """Make the convention of Duo and UDLM: no mask, and a time input unless ``time_conditioning`` is false."""
    if asked.mask_id is not None and asked.mask_source == "given":
        raise Refused(f"uniform noise has no mask, got mask_id={asked.mask_id}")
    process = Uniform(rows, asked.schedule or _noise(config))
    told = config.flag("time_conditioning", default=True)
    return Convention("Duo", process, "loo", rows, time="sigma" if told else None, ids="", clock="", notes=(_LOO, _GPU))


def _ratios(config: Settings, rows: int, asked: Asked) -> Convention:
    """Make the convention of SEDD: absorbing or uniform by ``graph_type``, and absorbing without this key."""
    schedule = asked.schedule or _noise(config)
    absorbs = config.word("graph_type", accepted=("absorb", "uniform"), default="absorb") == "absorb"
    process: Process = Masked(rows - 1, schedule) if absorbs else Uniform(rows, schedule)
    if absorbs and asked.mask_id not in (None, rows - 1):
        raise Refused(f"ratios of a mask that is not the last row ({asked.mask_id}, {rows} rows) are not read")
    source = "the family's rule: the last row" if absorbs else "none needed"
    return Convention("SEDD", process, "ratio", rows, source, time="sigma", ids="", clock="", notes=(_GPU,))


def _noise(config: Settings) -> Schedule:
    """Return the schedule that the configuration names; it is log-linear by default.

    Raises:
        ValueError: for an unknown name.
    """
    kind = config.word("noise_type", default="loglinear").replace("-", "")
    if kind == "geometric":
        least = config.number("sigma_min", interval="(0, inf)")
        return Geometric(least, config.number("sigma_max", interval=f"({least!r}, inf)"))
    if kind != "loglinear":
        raise config.refused(f"the noise {shown(kind)} is not known; pass schedule=")
    eps = config.number("noise_eps", interval="(0, 1)", default=None)
    return LogLinear() if eps is None else LogLinear(eps)


def _radd(config: Settings, rows: int, asked: Asked) -> Convention:
    return replace(_masked(Settings({}, config.file), rows, asked), family="RADD")


def _gidd(config: Settings, rows: int, asked: Asked) -> Convention:
    """Make the convention of GIDD: the mask is the user's or the tokenizer's, else the id ``vocab_size`` - 1.

    The number of rows may be larger than ``vocab_size``, as some files round it up to a multiple of 128.
    """
    p_uniform = config.number("p_uniform", interval="[0, 1)")
    known = config.whole("vocab_size", least=2, most=rows, default=rows)
    mask, source = (known - 1, "the family's rule") if asked.mask_id is None else (asked.mask_id, asked.mask_source)
    if mask < 1:
        raise Refused(f"the mask id is {mask} ({source}), and the ids below it are the data")
    if asked.schedule is not None:
        raise Refused("this network is told t of its own clock; use load(...).with_schedule(schedule)")
    own = HybridClock(p_uniform)
    process: Process = Hybrid(mask, own, p_uniform=p_uniform) if p_uniform > 0 else Masked(mask, own)
    return Convention(
        "GIDD", process, "loo" if p_uniform > 0 else "denoiser", rows, source, time="t",
        ids="", clock="", notes=(_LOO, _GPU) if p_uniform > 0 else (_GPU,),
    )  # fmt: skip


def _kind(*names: str) -> Callable[[Files], bool]:
    """Make a function that recognises files by ``model_type``, or by the algorithm or parameterization.

    The latter two are settings of Lightning checkpoints.
    """

    def recognises(files: Files) -> bool:
        config = configuration(files)
        if config.get("diffusion") == "uniform":  # as in UDLM's repository, whose parameterization is d3pm
            return "udlm" in names
        found = (files.config.get("model_type"), config.get("algo_name"), config.get("parameterization"))
        said = [str(name).lower() for name in found if name is not None]
        return bool(said) and said[0] in names and "p_uniform" not in config

    return recognises


_trained_as_sedd = _kind("sedd", "score")


def _sedd(files: Files) -> bool:
    found = said(files)
    own = isinstance(found.get("graph"), Mapping) and "tokens" in found
    return _trained_as_sedd(files) or (own and any("sigma_map." in name for name in files.shapes))


def _is_radd(files: Files) -> bool:
    own = {"tokens", "model"} <= said(files).keys()
    return own and not any("sigma_map." in name for name in files.shapes)


def _is_blockgen(noise: str) -> Callable[[Files], bool]:
    return lambda files: configuration(files).get("in_blocks") == noise


def _named(name: str, convention: Callable[[Settings, int, Asked], Convention]) -> Callable[..., Convention]:
    return lambda config, rows, asked: replace(convention(config, rows, asked), family=name)


def _blocks(config: Settings, rows: int, asked: Asked) -> Convention:
    block = (asked.block or _block(config)) if config.flag("cross_attn", default=True) else None
    return _in_blocks_of(replace(_masked(config, rows, asked), family="BD3LM"), block)


def _block(config: Settings) -> int | None:
    return config.whole("block_size", least=1, most=LARGEST, default=None)


def _in_blocks_of(said: Convention, block: int | None) -> Convention:
    if block is None:
        return said
    note = f"blocks of {block}, causal between them: sample it with Blockwise(block={block})"
    return replace(said, block=block, notes=(note, *said.notes))


def _blockgen(noise: Callable[[Settings, int, Asked], Convention], name: str) -> Callable[..., Convention]:
    """Make the function that returns BlockGen's convention, for a network that takes no time.

    ``noise`` is the function that returns the convention of networks with the same noise that are not in blocks.
    """

    def convention(config: Settings, rows: int, asked: Asked) -> Convention:
        said = replace(noise(config, rows, asked), family=name, time=None)
        block, several = asked.block or _block(config), config.flag("x0_causal", default=False)
        if block is None and not several:
            raise Refused("nothing says the block size of this BlockGen; pass load(..., block=...)")
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
