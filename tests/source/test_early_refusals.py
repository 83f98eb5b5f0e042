"""What cannot be quantized is refused by its config.json and its list of files: no weight leaves the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize import source
from quantize.errors import SourceError
from quantize.progress import Silent
from tests.conftest import POCKET
from tests.hub import LoopbackHub

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
DBRX = {"hidden_size": 32, "ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "xlnet": (
        {**SMALL, "model_type": "xlnet", "architectures": ["XLNetLMHeadModel"]},
        "lets each token see those behind it",
    ),
    "dbrx": (
        {
            **{"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "d_model": 32, "n_heads": 2, "n_layers": 1},
            **{"vocab_size": 64, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": DBRX},
        },
        "stacked expert tensors, in modules that are not known here .*DbrxExpertGLU",
    ),
    "t5": ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "an encoder and a decoder"),
    "hears": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "audio_config": {"a": 1}},
        "reads more than text",
    ),
    "fp8": (
        {
            **SMALL,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": {"quant_method": "fp8"},
        },
        r"8-bit floats \(fp8\)",
    ),
}
LISTINGS: dict[str, tuple[list[str], str]] = {
    "gguf": (["model-Q4_K_M.gguf"], "GGUF weights"),
    "variant": (["config.json", "model.fp16.safetensors", "tokenizer.json"], "only a variant"),
    "adapter-beside": (["config.json", "model.safetensors", "adapter_config.json", "tokenizer.json"], "an adapter"),
    "consolidated": (["config.json", "consolidated.safetensors", "tokenizer.json"], "their author's own layout"),
    "subfolder": (["config.json", "model/model.safetensors", "tokenizer.json"], "a folder of their own"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def refused(hub: LoopbackHub, files: dict[str, bytes], said: str) -> None:
    hub.create_repo("other/model")
    hub.commit("other/model", files)
    with pytest.raises(SourceError, match=said):
        source.fetch("other/model", revision=None, trust_remote_code=False, progress=Silent())
    assert hub.downloaded("other/model") <= {"config.json"}


@pytest.mark.parametrize("name", CONFIGS)
def test_by_its_config(name: str, hub: LoopbackHub) -> None:
    config, said = CONFIGS[name]
    content = json.dumps(config).encode()
    refused(hub, {"config.json": content, "model.safetensors": b"weights", "tokenizer.json": b"{}"}, said)


@pytest.mark.parametrize("name", LISTINGS)
def test_by_its_files(name: str, hub: LoopbackHub) -> None:
    paths, said = LISTINGS[name]
    config = (POCKET / "config.json").read_bytes()
    refused(hub, {path: config if path == "config.json" else b"content" for path in paths}, said)
