"""Sources that are wrong or meant to hurt, a row each: one line that names the thing, in seconds and within memory."""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quantize.formats.safetensors import INDEX
from tests.conftest import QUICK_OPTIONS, Outcome

SECONDS, BYTES = 30, 2 << 30
"""What one refusal may take."""

Damage = Callable[[Path], object]


@contextmanager
def within(memory: int, seconds: float) -> Iterator[None]:
    """Fails where what runs in it takes more address space, or more time."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, began = resource.getrlimit(resource.RLIMIT_AS), time.monotonic()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - began < seconds


def config(**changes: Any) -> Damage:
    """Other values in config.json; None takes a key out."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return damage


def text(name: str, content: str | bytes) -> Damage:
    """Another file of that name."""

    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder.parent / "secret").write_text("TOP SECRET")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


def header(content: dict[str, Any] | bytes, body: bytes = b"") -> Damage:
    """Weights with this header."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return text("model.safetensors", len(data).to_bytes(8, "little") + data + body)


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **others: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **others}


def sparse(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def renamed(name: str, *after: Damage) -> Damage:
    """The weights under another name."""

    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)
        for other in after:
            other(folder)

    return damage


def index(weight_map: Any) -> Damage:
    return renamed("model-00001-of-00001.safetensors", text(INDEX, json.dumps({"weight_map": weight_map})))


def only(*names: str) -> Damage:
    """Nothing but a card and empty files of these names."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink() if path.name != "README.md" else None
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")

    return damage


def without_tokenizer(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        for name in names:
            (folder / name).touch()

    return damage


def latin(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/LICENSE\xff")).write_text("terms")


NESTED = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
BESIDE = '{"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8, "target_modules": ["c_attn"]}'
SOURCES: dict[str, tuple[Damage, str]] = {
    # files that lie elsewhere or are none
    "license-leads-out": (link("LICENSE", "../secret"), "LICENSE in .* a link to a file outside"),
    "weights-lead-out": (link("model.safetensors", "../secret"), r"model\.safetensors in .* outside"),
    "config-leads-out": (link("config.json", "/proc/self/environ"), r"config\.json in .* outside"),
    "tokenizer-leads-out": (link("tokenizer_config.json", "../secret"), r"tokenizer_config\.json in .* outside"),
    "card-leads-out": (link("README.md", "../secret"), r"README\.md in .* outside"),
    "link-to-a-device": (link("NOTICE", "/dev/zero"), "NOTICE in .* outside"),
    "link-in-a-circle": (link("LICENSE", "LICENSE"), "LICENSE in .* leads nowhere"),
    "link-to-nothing": (link("LICENSE", "absent"), "LICENSE in .* leads nowhere"),
    "pipe-as-config": (pipe("config.json"), r"config\.json in .* neither a file"),
    "pipe-as-weights": (pipe("model.safetensors"), r"model\.safetensors in .* neither a file"),
    "pipe-as-license": (pipe("LICENSE"), "LICENSE in .* neither a file"),
    # names
    "name-not-text": (latin, "LICENSE"),
    "name-paints": (text("LICENSE\x1b[2J\n::error::x", "terms"), r"LICENSE\\x1b\[2J ::error::x"),
    # texts
    "config-deep": (text("config.json", NESTED), r"config\.json is not JSON"),
    "config-of-lists": (text("config.json", "[]"), r"config\.json is not a JSON object"),
    "config-not-utf-8": (text("config.json", b'{"a": "\xff"}'), r"config\.json is not UTF-8"),
    "config-huge": (sparse("config.json", 1 << 40), r"config\.json has 1,099,511,627,776 bytes"),
    "config-surrogate": (text("config.json", '{"model_type": "\\ud800"}'), r"config\.json is not JSON"),
    "config-long-number": (text("config.json", '{"n_layer": ' + "9" * 6000 + "}"), r"config\.json is not JSON"),
    "config-means-two-things": (text("config.json", '{"n_head": 1, "n_head": 2}'), r"config\.json.*n_head.*twice"),
    "generation-deep": (text("generation_config.json", NESTED), r"generation_config\.json"),
    "generation-of-lists": (text("generation_config.json", "[1]"), r"generation_config\.json"),
    "tokenizer-settings-deep": (text("tokenizer_config.json", NESTED), r"tokenizer_config\.json"),
    "tokenizer-settings-a-number": (text("tokenizer_config.json", "1"), r"tokenizer_config\.json"),
    "special-tokens-not-json": (text("special_tokens_map.json", "{"), r"special_tokens_map\.json"),
    "tokenizer-deep": (text("tokenizer.json", NESTED), "tokenizer of"),
    "tokenizer-empty": (text("tokenizer.json", ""), "tokenizer of"),
    "card-not-utf-8": (text("README.md", b"\xff"), r"README\.md is not UTF-8"),
    # the index
    "index-of-lists": (index(["model-00001-of-00001.safetensors"]), "weight_map"),
    "index-of-numbers": (index({"a": 1}), "weight_map"),
    "index-of-nothing": (index({}), "names no shard"),
    "index-leads-out": (index({"a": "../secret.safetensors"}), r"\.\./secret\.safetensors, which is missing"),
    "index-of-pickles": (index({"a": "pytorch_model.bin"}), r"pytorch_model\.bin, which is no safetensors file"),
    "index-deep": (renamed("model-1.safetensors", text(INDEX, NESTED)), r"index\.json is not JSON"),
    # headers
    "header-memory": (header(tensor("BF16", ["y", 2**31], [0, 0])), r"model\.safetensors is damaged"),
    "header-deep": (header(b'{"a":' + b"[" * 5000), r"model\.safetensors is damaged"),
    "header-a-list": (header(b"[]"), r"model\.safetensors is damaged"),
    "header-longer-than-the-file": (text("model.safetensors", b"\xff" * 8), r"model\.safetensors is damaged"),
    "header-type-unknown": (header(tensor("F99"), bytes(4)), r"model\.safetensors is damaged"),
    "header-shape-too-large": (header(tensor("F32", [2**62, 2**62, 0], [0, 0])), r"model\.safetensors is damaged"),
    "header-shape-a-word": (header(tensor("F32", "4"), bytes(4)), r"model\.safetensors is damaged"),
    "header-shape-negative": (header(tensor("F32", [-1, -1]), bytes(4)), r"model\.safetensors is damaged"),
    "header-shape-broken": (header(tensor("F32", [1.0]), bytes(4)), r"model\.safetensors is damaged"),
    "header-offsets-three": (header(tensor(offsets=[0, 4, 4]), bytes(4)), r"model\.safetensors is damaged"),
    "header-beyond-the-end": (header(tensor(shape=[4], offsets=[0, 16]), bytes(4)), r"model\.safetensors is damaged"),
    "header-with-a-hole": (header(tensor(offsets=[4, 8]), bytes(8)), r"model\.safetensors is damaged"),
    "header-overlaps": (
        header(tensor(b={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}), bytes(4)),
        r"model\.safetensors is damaged",
    ),
    "header-names-twice": (
        header(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        r"model\.safetensors is damaged",
    ),
    "header-metadata-no-text": (header(tensor(__metadata__={"format": 1}), bytes(4)), r"model\.safetensors is damaged"),
    "no-tensor": (header({}), "without a single tensor"),
    "tensors-of-8-bits": (header(tensor("F8_E4M3", [4]), bytes(4)), "F8_E4M3.*16 or 32 bits"),
    # what a config says
    "type-a-number": (config(model_type=7), "model_type is to be a name"),
    "architectures-a-word": (config(architectures="GPT2LMHeadModel"), "architectures a list"),
    "architecture-paints": (config(architectures=["\x1b]0;x\x07\n::error::x"]), r"\\x1b\]0;x\\x07 ::error::x"),
    "encoder-and-decoder": (config(model_type="t5", architectures=["T5ForConditionalGeneration"]), "an encoder and a"),
    "hears": (config(audio_config={"model_type": "x"}), "reads more than text"),
    "masked": (config(model_type="bert", architectures=["BertForMaskedLM"]), "not a causal language model"),
    "already-in-4-bits": (config(quantization_config={"load_in_4bit": True}), r"already quantized \(bitsandbytes\)"),
    "already-gptq": (config(quantization_config={"quant_method": "gptq"}), r"already quantized \(gptq\)"),
    "already-by-a-word": (config(quantization_config="awq"), r"already quantized \(awq\)"),
    "published-in-8-bits": (config(quantization_config={"quant_method": "fp8"}), r"8-bit floats \(fp8\).*16 bits"),
    # code
    "own-code": (
        config(model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"}),
        "needs code.*--trust-remote-code",
    ),
    "code-of-another-repo": (
        config(model_type="own", auto_map={"AutoModelForCausalLM": "other/repo--modeling.Own"}),
        r"code from another repo \(other/repo\)",
    ),
    "attention-from-the-hub": (config(attn_implementation="some/kernel"), "attn_implementation some/kernel.*Hub"),
    "attention-older-name": (config(_attn_implementation="some/kernel:f"), "_attn_implementation some/kernel:f"),
    "attention-by-part": (config(attn_implementation={"text_config": "a/b@v1"}), "attn_implementation a/b@v1"),
    "attention-nested": (config(text_config={"attn_implementation": "a/b"}), "attn_implementation a/b"),
    "attention-flash": (config(attn_implementation="flash_attention_2"), "flash_attention_2.*--trust-remote-code"),
    "experts-from-the-hub": (config(experts_implementation="sonicmoe"), "experts_implementation sonicmoe"),
    # what lies there
    "gguf": (only("model-Q4_K_M.gguf"), r"GGUF weights \(model-Q4_K_M\.gguf\)"),
    "gguf-with-a-config": (renamed("model-Q8_0.gguf"), r"GGUF weights \(model-Q8_0\.gguf\)"),
    "adapter-alone": (only("adapter_config.json", "adapter_model.safetensors"), "only an adapter"),
    "adapter-beside": (text("adapter_config.json", BESIDE), r"an adapter \(adapter_config\.json\) beside"),
    "diffusers": (only("model_index.json", "unet/config.json"), "a pipeline of diffusers"),
    "variant": (renamed("model.fp16.safetensors"), r"a variant of the weights \(model\.fp16\.safetensors\)"),
    "consolidated": (renamed("consolidated.safetensors"), r"layout \(consolidated\.safetensors\)"),
    "other-name": (renamed("weights.safetensors"), r"another name \(weights\.safetensors\)"),
    "shards-alone": (renamed("model-00001-of-00001.safetensors"), "without the list of them.*add model.safetensors.in"),
    "folder-of-its-own": (renamed("gpt/model.safetensors"), r"a folder of their own \(gpt/model\.safetensors\)"),
    "pickles": (renamed("pytorch_model.bin"), "only pickle weights.*convert them to safetensors"),
    "onnx": (renamed("onnx/model.onnx"), r"another program \(onnx/model\.onnx\)"),
    "nothing": (only(), "has no config.json"),
    "no-tokenizer": (without_tokenizer(), "has no tokenizer"),
    "sentencepiece-absent": (without_tokenizer("tokenizer.model"), r"tokenizer\.model only.*without"),
    "tiktoken-absent": (without_tokenizer("qwen.tiktoken"), r"qwen\.tiktoken only.*without tiktoken"),
}


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the libraries of other tokenizers are not installed."""
    from quantize.source import selection

    others = ("sentencepiece", "google.protobuf", "tiktoken", "mistral_common")
    monkeypatch.setattr(selection, "_is_installed", lambda module: module not in others)


@pytest.mark.parametrize("name", SOURCES)
def test_hostile_sources(name: str, pocket_copy: Path, tmp_path: Path, command: Callable[..., Outcome]) -> None:
    damage, said = SOURCES[name]
    damage(pocket_copy)
    with within(BYTES, SECONDS):
        outcome = command("run", pocket_copy, "--output", tmp_path / "out", "--device", "cpu", *QUICK_OPTIONS)
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 1, outcome
    assert last.startswith("error: ") and "Traceback" not in outcome.err, outcome.err
    assert re.search(said, last), last
    assert "\x1b" not in outcome.err and "\n::" not in outcome.err
    assert not list(tmp_path.glob("out*"))
