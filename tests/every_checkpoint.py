"""One checkpoint of every family and kind of file that the tests write, by name."""

import json
from collections.abc import Callable
from pathlib import Path

import checkpoints
import torch
from adapters import test_diffusion_transformers as dit
from adapters import test_evodiff as evodiff
from adapters import test_md4 as md4

import discdiff as dd
from discdiff.demo.data import ASSETS
from discdiff.denoiser import Denoiser

Writer = Callable[[Path], Path]


def _lightning(path: Path) -> Path:
    """With an average, and hyperparameters of a class that is not ours."""
    path.mkdir()
    average = [2 * part for part in dit.weights().values()]
    content: dict[str, object] = {"model": {"n_heads": dit.HEADS}, "algo": {"name": "mdlm"}, "time_conditioning": True}
    return dit.lightning(path / "last.ckpt", average, content)[0]


def _blockgen(path: Path) -> Path:
    """Trained with several block sizes: its clean tokens are causal."""
    path.mkdir()
    model = {"type": "block-dit", "n_heads": dit.HEADS, "x0_causal": True}
    algo = {"name": "blockgen-uniform", "block_weights": "0.05 0.0 0.95", "parameterization": "subs"}
    return dit.lightning(path / "last.ckpt", None, {"model": model, "algo": algo})[0]


def _sedd_run(path: Path) -> Path:
    """A folder of SEDD's trainer: YAML, and the average in a file of torch.save."""
    (path / ".hydra").mkdir(parents=True)
    (path / "checkpoints-meta").mkdir()
    lines = ["tokens: 12", "graph: {type: absorb}", "noise: {type: geometric, sigma_min: 0.001, sigma_max: 20.0}"]
    lines.append(f"model: {{hidden_size: {dit.WIDTH}, n_heads: {dit.HEADS}, scale_by_sigma: true}}")
    (path / ".hydra" / "config.yaml").write_text("\n".join(lines) + "\n")
    w = dit.weights()
    saved = {"model": w, "ema": {"shadow_params": [2 * part for part in w.values()], "decay": 0.9}, "step": 3}
    torch.save(saved, path / "checkpoints-meta" / "checkpoint.pth")
    return path


def _evodiff(name: str) -> Writer:
    def write(path: Path) -> Path:
        path.mkdir()
        return evodiff.written(path, name)

    return write


def _md4(told: bool, **said: object) -> Writer:
    def write(path: Path) -> Path:
        path.mkdir()
        md4.written(path / "arrays.npz", md4.arrays(told))
        (path / "config.json").write_text(json.dumps({"model_type": "md4", "mlp_type": "swiglu", **said}))
        return path

    return write


def _gemma(path: Path) -> Path:
    from adapters import test_gemma  # it needs a newer transformers than some have

    test_gemma.write(path)
    return path


def _fairseq(path: Path) -> Path:
    from adapters import test_fairseq  # it looks for a package of its own

    path.mkdir()
    test_fairseq.written(path / "checkpoint_mlm.pt")
    return path / "checkpoint_mlm.pt"


def _saved(path: Path) -> Path:
    return by_hand().save(path)


def by_hand() -> Denoiser:
    """A denoiser that was made and not loaded, of a network of this package."""
    torch.manual_seed(5)
    network = dd.adapters.dit.DiffusionTransformer(7, 8, 2, 1, 4)
    for part in network.parameters():
        part.data.normal_(std=0.3)
    return dd.Denoiser(network.eval(), dd.Marginal(torch.arange(1.0, 8) / 28, dd.LogLinear()), "loo", time="sigma")


def _native(write: Callable[[Path], checkpoints.Written]) -> Writer:
    return lambda path: write(path).folder


def _configured(name: str) -> Writer:
    return lambda path: dit.write(name, path)[0]


EVERY: dict[str, Writer] = {
    **{name: _native(write) for name, write in checkpoints.NATIVE.items()},
    **{name: _configured(name) for name in dit.CONFIGS},
    "MDLM of Lightning": _lightning,
    "BlockGen": _blockgen,
    "SEDD's trainer": _sedd_run,
    "EvoDiff-OADM": _evodiff("oaar-38M.tar"),
    "EvoDiff-uniform": _evodiff("d3pm-uniform-38M.tar"),
    "EvoDiff-BLOSUM": _evodiff("d3pm-blosum-38M.tar"),
    "RoBERTa-fairseq": _fairseq,
    "MD4": _md4(True, feature_dim=md4.HEAD, noise_schedule="cosine"),
    "MD4 untold": _md4(False, feature_dim=md4.HEAD, noise_schedule="poly2"),
    "discdiff": lambda path: ASSETS / "digits-uniform.safetensors",
    "discdiff blocks": lambda path: ASSETS / "text-blocks-masked.safetensors",
    "DiffusionGemma": _gemma,
    "saved": _saved,
}

__all__ = ["EVERY", "by_hand"]
