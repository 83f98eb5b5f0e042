"""Tiny models with random weights of every architecture that transformers has, for tests and scripts/architectures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

POCKET = Path(__file__).parent / "pocket-gpt2"
VOCABULARY = 4096
"""Of the pocket model's tokenizer, which all of them have."""
WIDTH, HEADS, GROUPS, HEAD, LAYERS = 128, 4, 2, 32, 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "lru_width", "embed_dim", "emb_dim", "dim"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "attention_hidden_size", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("projection_dim", "mm_hidden_size", "text_hidden_size", "output_dim", "dim_model"), WIDTH),
    **dict.fromkeys(("qformer_hidden_size", "encoder_hidden_size", "vision_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff", "dff", "n_inner", "dim_ff"), 2 * WIDTH),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "mlp_dim", "feed_forward_size"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), WIDTH),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_blocks"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), GROUPS),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "d_kv", "v_head_dim", "dim_head"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim", "swa_v_head_dim"), HEAD),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("n_mamba_heads", "mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_headdim", "mamba_head_dim", "mamba_d_head"), 32),
    **dict.fromkeys(("mamba_ngroups", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "sliding_window", "attention_window_size"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("image_size", "video_size"), 56),
    **{"vocab_size": VOCABULARY, "time_step_rank": 8, "mamba_expand": 2, "mamba_d_ssm": 256, "expand": 2},
    **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "rotary_dim": 16},
    **{"first_k_dense_replace": 1, "num_kv_shared_layers": 0, "patch_size": 14, "spatial_merge_size": 2},
}
"""By the names of config fields, in whatever part of a config."""
TOWER: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 2),
    "num_key_value_heads": HEADS,
}
"""What is otherwise in the part of a config by which pictures or sounds are read."""
FOUR_LAYERS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid", "bailing_hybrid", "lfm3", "lfm3_text")
"""Types of which the fourth layer is the first that attends."""
SECTIONS = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"), (6, 5, 5)),
    **dict.fromkeys(("qwen2_5_omni_text", "qwen3_omni_moe_text", "paddleocr_vl_text"), (6, 5, 5)),
    **dict.fromkeys(("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "glmga_text"), (6, 5, 5)),
}
"""Of rotary embeddings for time, height and width, by the types of texts that have them."""
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"num_hidden_layers": 4} for kind in FOUR_LAYERS},
    **{
        kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}
        for kind, sections in SECTIONS.items()
    },
    **{kind: {"vision_config": {"num_position_embeddings": 16}} for kind in ("qwen3_vl", "qwen3_5")},
    **{kind: {"vision_config": {"num_position_embeddings": 16}} for kind in ("qwen3_vl_moe", "qwen3_5_moe")},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        **{"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "num_key_value_heads": 4},
        **{"attention_hidden_size": 256, "attention_head_dim": 64},
    },
    "zamba2": {
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "adapter_rank": 4},
        **{"attention_hidden_size": 256, "attention_head_dim": 64, "num_key_value_heads": 4},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [256] * 2},
    "nemotron_h": {"hybrid_override_pattern": "M*-M"},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True},
    "llama4": {"vision_config": {"projector_input_dim": 128, "projector_output_dim": 128, "vision_output_dim": 128}},
    "kimi_linear": {"linear_attn_config": {"num_heads": 4, "head_dim": 32, "full_attn_layers": [2], "kda_layers": [1]}},
    "longcat_flash": {"zero_expert_num": 2},
    "blt": {"encoder_hash_byte_group_vocab": 256},
}
"""What single architectures need besides, by the names of their types; a part's in a mapping of its own."""


def architectures() -> tuple[str, ...]:
    """All types of models that transformers has as causal language models or as models of pictures and text."""
    from transformers.models.auto import modeling_auto

    texts, pictures = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return tuple(sorted({*texts, *pictures}))


def config(kind: str, **changes: Any) -> Any:
    """A config of the type `kind` that describes a tiny model; `changes` count most."""
    from transformers import CONFIG_MAPPING

    chosen = CONFIG_MAPPING[kind]
    return chosen(**_merged(_small(chosen, {}), _merged(KINDS.get(kind, {}), changes)))


def build(kind: str, dtype: str = "bfloat16", **changes: Any) -> Any:
    """A tiny model with random weights of an even spread, at which errors show and nothing overflows."""
    import torch

    described = config(kind, **changes)
    torch.manual_seed(0)
    model = model_class(kind)._from_config(described)
    chance = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            size = 0.05 if re.search("embed|wte|wpe|head", name) else weight.shape[-1] ** -0.5
            weight.data.copy_(torch.randn(weight.shape, generator=chance) * size)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()


def save(kind: str, folder: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    """A tiny model in a folder, as a source has it, with the pocket model's tokenizer."""
    build(kind, dtype, **changes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder


def model_class(kind: str) -> Any:
    """The class by which transformers makes a model of the type `kind`: of pictures and text where there is such."""
    import transformers
    from transformers.models.auto import modeling_auto

    for names in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        if kind in names:
            name = names[kind]
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise KeyError(kind)


def _small(chosen: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Small values of the fields that a config class has, and of those in its parts."""
    defaults = {name: value for part in reversed(chosen.__mro__) for name, value in _fields(part)}
    aliases = getattr(chosen, "attribute_map", {})
    values = {
        name: value
        for name, value in {**SIZES, **sizes}.items()
        if name in defaults and aliases.get(name) not in defaults
    }
    if "kv_lora_rank" in defaults:  # latent attention gives each head keys of its own
        values["num_key_value_heads"] = HEADS
    for name, value in defaults.items():
        if isinstance(value, list | tuple) and "layer" in name and len(value) > LAYERS:
            values[name] = list(value)[: values.get("num_hidden_layers", LAYERS)]
    for name, part in getattr(chosen, "sub_configs_defaults", {}).items():
        values[name] = _small_part(name, part)
    return values


def _small_part(name: str, part: Any) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    known = part.model_type in CONFIG_MAPPING
    described = CONFIG_MAPPING[part.model_type] if known else part.config_class
    own = {"model_type": part.model_type} if part.model_type else {}
    return _merged(
        {**_small(described, {} if "text" in name or "decoder" in name else TOWER), **own},
        KINDS.get(part.model_type, {}),
    )


def _fields(part: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(part, name, None)) for name in getattr(part, "__annotations__", {})]


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, those in mappings one by one."""
    both = {
        name: _merged(values[name], change)
        for name, change in changes.items()
        if isinstance(change, Mapping) and isinstance(values.get(name), Mapping)
    }
    return {**values, **changes, **both}
