"""The streaming engine writes what stock transformers and bitsandbytes write, or leaves it to them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import files, methods, source
from quantize.errors import CorruptModel, UnsupportedModel
from quantize.formats.bitsandbytes import checkpoint, writer
from quantize.formats.safetensors import INDEX
from quantize.progress import Silent
from quantize.records import Checkout, Recipe
from tests.conftest import POCKET

SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"vocab_size": 512, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 32},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 160, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "stablelm": {"num_key_value_heads": 2},
    "olmo2": {"num_key_value_heads": 2},
    "gemma3n_text": {
        **{"num_key_value_heads": 2, "head_dim": 16, "num_kv_shared_layers": 0, "laurel_rank": 16},
        **{"layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
        **{"intermediate_size": [160, 160], "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512},
    },
}
RECIPES = [
    Recipe(name="rtn"),
    Recipe(name="rtn", double_quant=False),
    Recipe(name="rtn", quant_type="fp4"),
    Recipe(name="rtn", quant_type="fp4", double_quant=False),
    Recipe(name="rtn", bits=8),
]


class Notes(Silent):
    """Remembers what was noted."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a small model of an architecture, once."""
    place, made = tmp_path_factory.mktemp("sources"), {}

    def make(kind: str, dtype: torch.dtype = torch.bfloat16) -> Checkout:
        if (kind, dtype) not in made:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(kind, **{**SHAPE, **KINDS.get(kind, {})})
            torch.manual_seed(0)
            folder = place / f"{kind}-{str(dtype)[6:]}"
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(POCKET / name, folder)
            made[kind, dtype] = fetched(folder)
        return made[kind, dtype]

    return make


def fetched(folder: Path) -> Checkout:
    return source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())


def stream(
    checkout: Checkout,
    output: Path,
    recipe: Recipe = RECIPES[0],
    resume: Path | None = None,
    device: str = "cpu",
) -> list[str]:
    """What the engine noted; `output` is a new folder."""
    output.mkdir()
    notes = Notes()
    methods.quantize(methods.Job(checkout, output, recipe, device, notes, "", resume))
    return notes.texts


def by_stock(checkout: Checkout, output: Path, recipe: Recipe, device: str = "cpu") -> None:
    dtype = checkpoint.choose_dtype(checkout, recipe, Silent())
    model = checkpoint.load_quantized(checkout, recipe, dtype, device)
    model.save_pretrained(output, max_shard_size=checkpoint.MAX_SHARD)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


def require_equal(mine: Path, theirs: Path) -> None:
    one, other = tensors(mine), tensors(theirs)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert (one[name].dtype, one[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(one[name], tensor), name
    assert config_of(mine) == config_of(theirs)


def config_of(folder: Path) -> dict[str, Any]:
    """What config.json means: the package's is the source's own, while stock writes one anew."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}


QUICKEST = ("llama", "gpt_neox")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in QUICKEST else pytest.mark.slow) for kind in KINDS]
)
def test_architectures(sources: Any, kind: str, tmp_path: Path) -> None:
    """Grouped heads, tied and untied ones, biases and none, Conv1D, fused projections: names, types, bytes, config."""
    checkout = sources(kind)
    for number, recipe in enumerate(RECIPES):
        assert stream(checkout, tmp_path / f"mine-{number}", recipe) == []
        by_stock(checkout, tmp_path / f"theirs-{number}", recipe)
        require_equal(tmp_path / f"mine-{number}", tmp_path / f"theirs-{number}")


@pytest.mark.parametrize("recipe", RECIPES, ids=["nf4", "nf4-plain", "fp4", "fp4-plain", "int8"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_recipes(sources: Any, kind: str, recipe: Recipe, tmp_path: Path) -> None:
    checkout = sources(kind, torch.float32 if kind == "gpt2" else torch.float16)
    assert stream(checkout, tmp_path / "mine", recipe) == []
    by_stock(checkout, tmp_path / "theirs", recipe)
    require_equal(tmp_path / "mine", tmp_path / "theirs")


def test_skipped_modules_and_another_type(sources: Any, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPES[0], skip_modules=("down_proj",), compute_dtype="float16")
    assert stream(sources("llama"), tmp_path / "mine", recipe) == []
    by_stock(sources("llama"), tmp_path / "theirs", recipe)
    require_equal(tmp_path / "mine", tmp_path / "theirs")


def test_the_pocket_model_with_names_that_lack_a_prefix(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(POCKET, folder)
    named = {name.removeprefix("transformer."): one for name, one in load_file(folder / "model.safetensors").items()}
    named["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)  # as old checkpoints have it, and nobody reads it
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    assert stream(fetched(folder), tmp_path / "mine") == []
    by_stock(fetched(folder), tmp_path / "theirs", RECIPES[0])
    require_equal(tmp_path / "mine", tmp_path / "theirs")


def test_a_head_that_is_stored_beside_what_it_is_tied_to(tmp_path: Path) -> None:
    """The same values are one tensor; others are left to transformers, and the note says why."""
    folder = tmp_path / "source"
    shutil.copytree(POCKET, folder)
    for number, change in enumerate((0.0, 1.0)):
        named = load_file(POCKET / "model.safetensors")
        named["lm_head.weight"] = named["transformer.wte.weight"] + change
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        notes = stream(fetched(folder), tmp_path / f"mine-{number}")
        assert notes == [] if change == 0 else "differs from it" in notes[0]
        by_stock(fetched(folder), tmp_path / f"theirs-{number}", RECIPES[0])
        require_equal(tmp_path / f"mine-{number}", tmp_path / f"theirs-{number}")


def test_weights_that_are_missing_are_not_invented(sources: Any, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources("llama").folder, folder)
    named = load_file(folder / "model.safetensors")
    del named["lm_head.weight"]
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptModel, match=r"lm_head\.weight is missing"):
        stream(fetched(folder), tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "value", "recipe", "advice"),
    [
        ("model.layers.1.mlp.up_proj.weight", 1e5, {"compute_dtype": "float16"}, "choose another --compute-dtype"),
        ("model.norm.weight", 1e5, {"compute_dtype": "float16"}, "choose another --compute-dtype"),
        ("model.layers.1.mlp.up_proj.weight", 1e5, {"bits": 8}, "choose --bits 4"),
    ],
)
def test_what_overflows_when_it_is_made_narrower_is_told_as_that(
    sources: Any, tmp_path: Path, name: str, value: float, recipe: dict[str, Any], advice: str
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources("llama").folder, folder)
    named = load_file(folder / "model.safetensors")
    named[name].view(-1)[7] = value
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UnsupportedModel, match=rf"{name} in model\.safetensors holds 99840, and float16 ends .*{advice}"
    ):
        stream(fetched(folder), tmp_path / "mine", Recipe(name="rtn", **recipe))


def test_where_no_weight_was_looked_at_before_the_writer_sees_what_overflows(sources: Any, tmp_path: Path) -> None:
    """A float16 source with one tensor of another type, which is too large for it."""
    folder = tmp_path / "source"
    shutil.copytree(sources("llama", torch.float16).folder, folder)
    named = load_file(folder / "model.safetensors")
    named["model.norm.weight"] = named["model.norm.weight"].float() + 1e5
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight in .* and float16 ends at 65504"):
        stream(fetched(folder), tmp_path / "mine")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_no_numbers(sources: Any, tmp_path: Path, name: str, bits: int) -> None:
    folder = tmp_path / "source"
    shutil.copytree(sources("llama").folder, folder)
    named = load_file(folder / "model.safetensors")
    named[name].view(-1)[7] = float("inf")
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptModel, match=f"{name} in model.safetensors holds NaN or infinity"):
        stream(fetched(folder), tmp_path / "mine", Recipe(name="rtn", bits=bits))


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checkpoint, "MAX_SHARD", 400_000)
    yield


@pytest.mark.usefixtures("small_files")
def test_several_files_with_an_index_that_stock_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert stream(fetched(POCKET), tmp_path / "mine") == []
    names = sorted(path.name for path in (tmp_path / "mine").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "mine" / INDEX).read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "mine").keys()
    by_stock(fetched(POCKET), tmp_path / "theirs", RECIPES[0])
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)(torch.arange(9)[None]).logits
        for name in ("mine", "theirs")
    )
    assert torch.equal(one, other)


@pytest.mark.usefixtures("small_files")
def test_the_same_files_with_any_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for workers in (1, 2, 5):
        monkeypatch.setattr(writer, "READERS", workers)
        monkeypatch.setattr(writer, "WRITERS", workers)
        output = tmp_path / str(workers)
        stream(fetched(POCKET), output)
        sums.append([(file.path, file.sha256) for file in files.records_of(output)])
    assert sums[0] == sums[1] == sums[2]


@pytest.mark.usefixtures("small_files")
def test_a_killed_run_goes_on_at_its_first_unfinished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    whole = writer._write_shard

    def counting(file: Path, **rest: Any) -> None:
        written.append(file.name[6:11])
        if len(written) == 3:
            file.with_suffix(".part").write_bytes(b"half a file")
            raise KeyboardInterrupt
        whole(file, **rest)

    monkeypatch.setattr(writer, "_write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        stream(fetched(POCKET), tmp_path / "killed", resume=tmp_path / "work")
    stream(fetched(POCKET), tmp_path / "mine", resume=tmp_path / "work")
    assert written[:4] == ["00001", "00002", "00003", "00003"] and "00001" not in written[3:]
    stream(fetched(POCKET), tmp_path / "other", Recipe(name="rtn", double_quant=False), tmp_path / "work")
    assert "00001" in written[4:]  # work of another recipe is not mixed in
    stream(fetched(POCKET), tmp_path / "fresh")
    require_equal(tmp_path / "mine", tmp_path / "fresh")


LIMITED = """
import json, re, resource, sys
from pathlib import Path
import torch
from quantize import methods, source
from quantize.formats.bitsandbytes import checkpoint
from quantize.progress import Silent
from quantize.records import Recipe
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
torch.set_num_threads(2)
folder, output, way, spare = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
checkout = source.fetch(str(folder), revision=None, trust_remote_code=False, progress=Silent())
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
held = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + spare, held + spare))
if way == "stream":
    methods.quantize(methods.Job(checkout, output, Recipe(name="rtn"), "cpu", Silent(), "", None))
else:
    model = checkpoint.load_quantized(checkout, Recipe(name="rtn"), "bfloat16", "cpu")
    checkpoint.save(model, checkout, output)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the limit")
def test_a_model_larger_than_the_memory_there_is(tmp_path: Path) -> None:
    """A model of 1 GB where 450 MB may be taken, which is not enough to load it in 4 bits and save it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 32, "vocab_size": 4096}
    config = AutoConfig.for_model("llama", **{**SHAPE, **shape}, num_key_value_heads=4, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    numbers = torch.randn(1 << 22).bfloat16()
    folder = tmp_path / "large"
    folder.mkdir()
    save_file(
        {name: numbers[: one.numel()].clone().view(one.shape) for name, one in model.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    assert (folder / "model.safetensors").stat().st_size > 1_000_000_000
    ended = {}
    for way in ("stream", "load"):
        (tmp_path / way).mkdir()
        command = [sys.executable, "-c", LIMITED, str(folder), str(tmp_path / way), way, str(450_000_000)]
        ended[way] = subprocess.run(command, capture_output=True, text=True)
    assert ended["stream"].returncode == 0, ended["stream"].stderr
    assert ended["load"].returncode != 0 and "memory" in ended["load"].stderr.lower(), ended["load"].stderr
    assert len(tensors(tmp_path / "stream")) == 3 + 32 * (2 + 7 * 6)
    shutil.rmtree(tmp_path)
