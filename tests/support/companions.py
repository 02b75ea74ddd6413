"""What is served together with a model, in Hugging Face format: a LoRA adapter, an EAGLE-3 draft; random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def write_lora(directory: Path, twin: Path, rank: int = 8) -> Path:
    """An adapter, as PEFT writes it, of every layer's query and output projections and MLP of the twin in `twin`."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    modules = ("q_proj", "o_proj", "down_proj")
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(twin / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(modules):
            out_features, in_features = weight.shape
            path = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, in_features, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator)
    save_file({name: tensor / 4 for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    settings |= {"target_modules": list(modules), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def write_eagle3(directory: Path, hidden: int, vocab: int) -> Path:
    """An EAGLE-3 draft for a target of the given hidden size and vocabulary."""
    directory.mkdir(parents=True)
    heads, head_dim, mlp = 2, 128, 128
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": 1,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "draft_vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {
        "embed_tokens": (vocab, hidden),
        "fc": (hidden, 3 * hidden),
        "norm": (hidden,),
        "lm_head": (vocab, hidden),
        "midlayer.hidden_norm": (hidden,),
        "midlayer.input_layernorm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,),
        **{f"midlayer.self_attn.{name}_proj": (heads * head_dim, 2 * hidden) for name in "qkv"},
        "midlayer.self_attn.o_proj": (hidden, heads * head_dim),
        "midlayer.mlp.gate_proj": (mlp, hidden),
        "midlayer.mlp.up_proj": (mlp, hidden),
        "midlayer.mlp.down_proj": (hidden, mlp),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, directory / "model.safetensors")
    return directory
