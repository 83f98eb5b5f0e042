"""Small mixtures of experts with random weights, of every family that is known to stack its experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tests.conftest import POCKET

SHAPE: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 4096},
    **{"max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
FOUR_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FOUR_ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "n_shared_experts": 1},
}
LATENT = {
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8},
    **{"q_lora_rank": None, "num_key_value_heads": 4},
}
LINEAR_ATTENTION = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_moe": {**FOUR, "shared_expert_intermediate_size": 64},
    "qwen3_moe": FOUR,
    "qwen3_next": {**FOUR, **LINEAR_ATTENTION},
    "qwen3_5_moe_text": {**FOUR, **LINEAR_ATTENTION},
    "mixtral": FOUR_LOCAL,
    "olmoe": FOUR,
    "flex_olmo": FOUR,
    "deepseek_v2": {**FOUR_ROUTED, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**FOUR_ROUTED, **LATENT},
    "glm4_moe": FOUR_ROUTED,
    "dots1": FOUR_ROUTED,
    "exaone_moe": {**FOUR_ROUTED, **FOUR, "num_shared_experts": 1},
    "gpt_oss": {**FOUR_LOCAL, "sliding_window": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "granitemoe": FOUR_LOCAL,
    "granitemoeshared": {**FOUR_LOCAL, "shared_intermediate_size": 64},
    "phimoe": FOUR_LOCAL,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "lfm2_moe": {**FOUR, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "minimax": {**FOUR_LOCAL, "layer_types": ["full_attention", "linear_attention"]},
    "minimax_m2": FOUR_LOCAL,
    "gemma4_text": {
        **{"num_experts": 4, "top_k_experts": 2, "enable_moe_block": True, "num_kv_shared_layers": 0},
        **{"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16},
        **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 4096},
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "nemotron_h": {
        **FOUR_ROUTED,
        **{"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 64},
        **{"mamba_num_heads": 4, "mamba_head_dim": 16},
    },
    "cohere2_moe": FOUR,
    "llama4_text": {**FOUR_LOCAL, "intermediate_size_mlp": 96},
    "jetmoe": {**FOUR_LOCAL, "kv_channels": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    "longcat_flash": {**FOUR_ROUTED, **LATENT, "q_lora_rank": 16, "zero_expert_num": 2, "moe_topk": 3, "num_layers": 2},
    "deepseek_v32": {**FOUR_ROUTED, **LATENT, "q_lora_rank": 16, "index_n_heads": 4, "index_head_dim": 16},
    "afmoe": {**FOUR, "num_dense_layers": 1, "num_shared_experts": 1},
}


def mixture(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of transformers, whose experts are stacked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    for name, buffer in model.named_buffers():
        if "bias" in name:
            buffer.zero_()
    return model


def saved(family: str, folder: Path, *, stacked: bool = False, **changes: Any) -> Path:
    """A mixture in a folder, as its authors publish it, or with the tensors that transformers 5 has in memory."""
    mixture(family, **changes).save_pretrained(folder, save_original_format=not stacked)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder
