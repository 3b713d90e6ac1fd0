"""Checkpoints as their authors save them, tiny and random: files that the tests write, and what they should say."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]
V, MASK = 40, 36  # rows of the output, and the mask among them


@dataclass
class Written:
    """A folder on disk and the network that was written to it, called as its authors do."""

    folder: Path
    logits: Callable[[Tensor], Tensor]
    mask_id: int


def folder(path: Path, config: dict[str, Any], weights: Weights, **others: dict[str, Any]) -> Path:
    """config.json, model.safetensors, and other JSON files by their stem."""
    path.mkdir(parents=True, exist_ok=True)
    for stem, content in {"config": config, **others}.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
    return path


def randomised(network: nn.Module) -> nn.Module:
    """Large random weights, so that everything in the network matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator) + 0.1
    return network.eval().requires_grad_(False)


def native(name: str, **settings: Any) -> nn.Module:  # noqa: ANN401
    """A class of transformers' with four heads of width 8."""
    import transformers

    cls = getattr(transformers, name)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return randomised(cls(cls.config_class(**{"vocab_size": V, "pad_token_id": 0} | sizes | settings)))


def everyone_sees_all(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Logits with attention in both directions."""
    return lambda x: network(x, attention_mask=torch.zeros(1, 1, x.shape[1], x.shape[1])).logits


def plain(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: network(input_ids=x).logits


def renamed(weights: Weights, *pairs: tuple[str, str]) -> Weights:
    """Parts of names replaced, in order."""
    found = {}
    for name, tensor in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = tensor
    return found


def llada(path: Path) -> Written:
    network = native("LlamaForCausalLM", num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-5)
    weights = renamed(
        network.state_dict(),
        ("lm_head.", "model.transformer.ff_out."),
        ("model.embed_tokens.", "model.transformer.wte."),
        ("model.norm.", "model.transformer.ln_f."),
        ("model.layers.", "model.transformer.blocks."),
        ("self_attn.o_proj", "attn_out"),
        ("self_attn.", ""),
        ("mlp.gate_proj", "ff_proj"),
        ("mlp.up_proj", "up_proj"),
        ("mlp.down_proj", "ff_out"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ff_norm"),
    )
    config = {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "n_heads": 4, "n_kv_heads": 2,
        "n_layers": 2, "mlp_hidden_size": 48, "mlp_ratio": 4, "vocab_size": V, "embedding_size": V,
        "max_sequence_length": 64, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "mask_token_id": MASK,
    }  # fmt: skip
    return Written(folder(path, config, weights), everyone_sees_all(network), MASK)


def moe_weights(weights: Weights) -> Weights:
    """Experts one by one, as they are on disk; transformers 5 keeps them together."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for n, expert in enumerate(tensor):
                for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                    found[name.replace("gate_up_proj", f"{n}.{part}.weight")] = half
        elif name.endswith("mlp.experts.down_proj"):
            found |= {name.replace("down_proj", f"{n}.down_proj.weight"): expert for n, expert in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def llada_moe(path: Path) -> Written:
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
    network = native("Qwen3MoeForCausalLM", moe_intermediate_size=16, norm_topk_prob=False, rope_theta=5e4, **sizes)
    config = {
        "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "vocab_size": V, "hidden_size": 32,
        "expert_intermediate_size": 16, "dense_intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "norm_topk_prob": None, "rope_theta": 5e4, "rms_norm_eps": 1e-6, **sizes,
    }  # fmt: skip
    tokenizer = {"mask_token": "<|mask|>", "added_tokens_decoder": {str(MASK): {"content": "<|mask|>"}}}
    folder(path, config, moe_weights(network.state_dict()), tokenizer_config=tokenizer)
    return Written(path, everyone_sees_all(network), MASK)


def llada2(path: Path) -> Written:
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
    sizes |= {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_hidden_layers": 3}
    more = {"rope_theta": 6e5, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6}
    rope = {"rope_type": "default", "rope_theta": 6e5, "partial_rotary_factor": 0.5}
    network = native(
        "Glm4MoeForCausalLM", n_routed_experts=8, n_shared_experts=1, use_qk_norm=True, norm_topk_prob=True,
        rope_parameters=rope, **sizes, **more,
    )  # fmt: skip
    weights = moe_weights(network.state_dict())
    weights = {n: t + (0.1 * torch.arange(8.0) if "correction" in n else 0) for n, t in weights.items()}
    network.load_state_dict({n: t for n, t in weights.items() if "correction" in n}, strict=False)
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        weights[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
    weights = renamed(
        weights,
        ("embed_tokens", "word_embeddings"),
        ("self_attn.o_proj", "attention.dense"),
        ("self_attn.q_norm", "attention.query_layernorm"),
        ("self_attn.k_norm", "attention.key_layernorm"),
        ("gate.e_score_correction_bias", "gate.expert_bias"),
    )
    config = {
        "model_type": "llada2_moe", "vocab_size": V, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_experts": 8, "num_shared_experts": 1, "block_size": 4, "mask_token_id": MASK,
        **sizes, **more,
    }  # fmt: skip

    def logits(x: Tensor) -> Tensor:
        block = torch.arange(x.shape[1]) // 4
        later = block > block[:, None]
        mask = torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)
        return network(x, attention_mask=mask[None, None]).logits

    return Written(folder(path, config, weights), logits, MASK)


def dream(path: Path) -> Written:
    network = native("Qwen2ForCausalLM", num_key_value_heads=2)
    config = network.config.to_dict() | {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK}
    folder(path, config, network.state_dict(), generation_config={"mask_token_id": None})
    return Written(path, everyone_sees_all(network), MASK)


def diffugpt(path: Path) -> Written:
    network = native("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    weights = renamed(
        dict(network.state_dict()),
        ("transformer.wte.", "embed_tokens."),
        ("transformer.", "denoise_model."),
    )
    weights["denoise_model.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # the causal table, made whole
    tokenizer = {"mask_token": {"content": "[MASK]"}, "added_tokens_decoder": {str(V - 1): {"content": "[MASK]"}}}
    folder(path, network.config.to_dict(), weights, tokenizer_config=tokenizer)
    return Written(path, everyone_sees_all(network), V - 1)


def diffullama(path: Path) -> Written:
    network = native("LlamaForCausalLM", num_key_value_heads=2)
    names = ("model.embed_tokens.", "embed_tokens."), ("model.", "denoise_model.")
    config = network.config.to_dict() | {"mask_token_id": V - 1}
    return Written(folder(path, config, renamed(network.state_dict(), *names)), everyone_sees_all(network), V - 1)


def a2d(base: str) -> Callable[[Path], Written]:
    def write(path: Path) -> Written:
        more = {"head_dim": 8} if base == "Qwen3" else {}
        network = native(f"{base}ForCausalLM", num_key_value_heads=2, **more)
        config = network.config.to_dict() | {"model_type": f"a2d-{base.lower()}", "mask_token_id": MASK}
        return Written(folder(path, config, network.state_dict()), everyone_sees_all(network), MASK)

    return write


def encoder(name: str, **settings: Any) -> Callable[[Path], Written]:  # noqa: ANN401
    """BERT and its kind, saved by transformers itself, with a tokenizer's word list."""

    def write(path: Path) -> Written:
        network = native(name, **settings)
        network.save_pretrained(path)
        words = ["<cls>", "<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(4, MASK)), "<mask>"]
        (path / "vocab.txt").write_text("\n".join(words) + "\n")
        names = {"mask_token": "<mask>", "cls_token": "<cls>", "pad_token": "<pad>", "eos_token": "<eos>"}
        (path / "special_tokens_map.json").write_text(json.dumps(names))
        return Written(path, plain(network), MASK)

    return write


NATIVE: dict[str, Callable[[Path], Written]] = {
    "LLaDA": llada,
    "LLaDA-MoE": llada_moe,
    "LLaDA2": llada2,
    "Dream": dream,
    "DiffuGPT": diffugpt,
    "DiffuLLaMA": diffullama,
    "A2D-Llama": a2d("Llama"),
    "A2D-Qwen2": a2d("Qwen2"),
    "A2D-Qwen3": a2d("Qwen3"),
    "BERT": encoder("BertForMaskedLM"),
    "RoBERTa": encoder("RobertaForMaskedLM", pad_token_id=1, max_position_embeddings=64),
    "ModernBERT": encoder("ModernBertForMaskedLM"),
    "ESM-2": encoder("EsmForMaskedLM", mask_token_id=MASK, token_dropout=True, position_embedding_type="rotary"),
}
