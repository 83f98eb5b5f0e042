"""The main job on real trained weights: what lies in the package, and what running again does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantize import package, pipeline
from quantize.progress import Silent
from quantize.publishing.audit import require_sound
from quantize.records import EvaluationSettings, Recipe
from tests.conftest import POCKET, QUICK_OPTIONS, Outcome
from tests.publishing.workspace import MEASURING

SMALL = EvaluationSettings(max_windows=16, window=64, new_tokens=2, require="degraded")


def small_run(
    output: Path, model: Path = POCKET, settings: EvaluationSettings = SMALL, **recipe: Any
) -> package.Package:
    request = pipeline.RunRequest(
        str(model),
        output=output,
        recipe=Recipe(**{"name": "stock", **recipe}),
        settings=settings,
        device="cpu",
    )
    return pipeline.run(request, Silent()).package


def test_the_package_is_complete(finished: Path) -> None:
    names = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "config.json",
        "figures/kld-by-position.png",
        "figures/kld-distribution.png",
        "figures/perplexity-ratio.png",
        "figures/weight-errors.png",
        "generation_config.json",
        "model.safetensors",
        "parity.json",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (finished / name).read_bytes() == (POCKET / name).read_bytes()
    assert (finished / "model.safetensors").stat().st_mode & 0o044


def test_conv1d_becomes_4bit_ties_stay_and_the_head_stays(finished: Path) -> None:
    made = package.open_package(finished)
    assert made.provenance.quantized.modules == tuple(
        f"transformer.h.{block}.{part}"
        for block in range(4)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    tensors = load_file(finished / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].dtype == torch.uint8
    assert tensors["transformer.wte.weight"].dtype == torch.float16
    assert "lm_head.weight" not in tensors
    assert all(check.passed for check in made.evidence.checks)
    assert {check.name for check in made.evidence.checks} == {
        *("config", "quant_state", "finite", "loads", "modules", "ties", "size", "tokenizer", "weights"),
        *("special tokens", "added tokens", "chat template", "eos tokens", "generation settings", "processor files"),
        *("arithmetic", "outputs", "generation", "cached decoding", "repetition", "end of text"),
    }


def test_a_finished_package_is_left_alone(finished: Path, command: Callable[..., Outcome]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    outcome = command("run", POCKET, "-o", finished, "--device", "cpu", *QUICK_OPTIONS, "--json")
    assert outcome.code == 0
    assert "already finished: nothing to do" in outcome.err
    assert json.loads(outcome.out)["created"] is False
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_stricter_requirement_is_not_answered_by_an_older_package(
    finished: Path, command: Callable[..., Outcome]
) -> None:
    outcome = command("run", POCKET, "-o", finished, "--device", "cpu", *QUICK_OPTIONS[:-1], "lossless")
    assert outcome.code == 1 and "was measured with other settings" in outcome.err


def test_a_package_that_was_being_replaced_gets_its_name_back(package_copy: Path) -> None:
    package_copy.rename(package_copy.with_name(f"{package_copy.name}.building-old"))
    with package.staging_folder(package_copy):
        package.require_unchanged(package.open_package(package_copy))


@pytest.mark.slow
def test_generation_settings_that_saving_would_refuse_are_copied(tmp_path: Path, pocket_copy: Path) -> None:
    own = json.dumps({"do_sample": False, "temperature": 0.6, "eos_token_id": 0, "bos_token_id": 0})
    (pocket_copy / "generation_config.json").write_text(own)
    made = small_run(tmp_path / "out", pocket_copy)
    assert (made.folder / "generation_config.json").read_text() == own
    assert made.evidence.generation is not None


def test_another_recipe_does_not_take_a_finished_name(finished: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("run", POCKET, "-o", finished, "--quant-type", "fp4", *QUICK_OPTIONS)
    assert outcome.code == 1
    assert "holds a package of another source or recipe" in outcome.err


@pytest.mark.slow
def test_force_replaces_and_leaves_nothing_behind(package_copy: Path) -> None:
    request = pipeline.RunRequest(
        str(POCKET), output=package_copy, recipe=Recipe(name="rtn"), settings=SMALL, device="cpu", force=True
    )
    before = package.open_package(package_copy)
    result = pipeline.run(request, Silent())
    assert result.created
    assert package.open_package(package_copy).provenance.settings == SMALL != before.provenance.settings
    assert [path.name for path in package_copy.parent.iterdir()] == [package_copy.name]
    same = {file.path: file.sha256 for file in before.provenance.files}
    again = {file.path: file.sha256 for file in result.package.provenance.files}
    assert same["model.safetensors"] == again["model.safetensors"]


@pytest.mark.slow
def test_a_refused_package_keeps_its_evidence_under_a_name_that_shows_it(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    output = tmp_path / "pocket"
    outcome = command(
        *("run", POCKET, "-o", output, "--recipe", "rtn", "--quant-type", "fp4"),
        *("--require", "lossless", "--device", "cpu"),
        *("--max-windows", "8", "--window", "64", "--new-tokens", "2", "--json"),
    )
    assert outcome.code == 3
    assert outcome.err.splitlines()[-1].startswith("error: ") and "was refused" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["pocket-refused"]
    refused = package.open_package(tmp_path / "pocket-refused")
    assert not refused.evidence.verdict.passed and refused.evidence.scores is not None
    assert "**Refused.**" in (refused.folder / "README.md").read_text()
    assert json.loads(outcome.out)["parity"]["verdict"]["passed"] is False
    pushed = command("push", refused.folder, "--to", "someone/pocket")
    assert pushed.code == 3 and "did not pass parity" in pushed.err


@pytest.mark.parametrize(
    "recipe",
    [
        {"quant_type": "fp4", "double_quant": False},
        {"bits": 8},
        {"compute_dtype": "bfloat16", "skip_modules": ("h.0.attn", "mlp.c_proj")},
    ],
    ids=["fp4", "int8", "bfloat16-skip"],
)
@pytest.mark.slow
def test_other_recipes(tmp_path: Path, recipe: dict[str, Any]) -> None:
    made = small_run(tmp_path / "out", **recipe)
    failed = [check for check in made.evidence.checks if not check.passed]
    if made.evidence.verdict.passed:
        require_sound(made)
    assert not failed and made.evidence.scores is not None
    config = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] is (made.provenance.recipe.bits == 8)
    if recipe == {"bits": 8}:
        assert made.evidence.scores.kld.mean.value < 0.01
    if "skip_modules" in recipe:
        assert len(made.provenance.quantized.modules) == 16 - 2 - 4
        assert "lm_head" in made.provenance.quantized.kept_modules


def test_unknown_modules_to_skip_are_named(tmp_path: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("run", POCKET, "-o", tmp_path / "out", "--skip-modules", "h.99", "--device", "cpu")
    assert outcome.code == 1 and "--skip-modules h.99: pocket-gpt2 has no linear module of that name" in outcome.err


@pytest.mark.slow
def test_untied_llama_with_grouped_heads(tmp_path: Path, llama: Path) -> None:
    made = small_run(tmp_path / "out", llama)
    assert not [check for check in made.evidence.checks if not check.passed]
    assert len(made.provenance.quantized.modules) == 2 * 7
    assert made.provenance.quantized.dtype == "bfloat16"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Random weights of Llama's shape, two shards, bfloat16, head not tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="2MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def test_verify_measures_again_and_says_the_same(finished: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("verify", finished, "--against", POCKET, "--device", "cpu", *MEASURING, "--json")
    assert outcome.code == 0, outcome.err
    again, before = json.loads(outcome.out), json.loads((finished / "parity.json").read_text())
    assert {**again, "seconds": 0} == {**before, "seconds": 0}


@pytest.mark.slow
def test_verify_judges_a_checkpoint_that_is_no_package(
    tmp_path: Path, finished: Path, command: Callable[..., Outcome]
) -> None:
    bare = tmp_path / "somebody-elses"
    shutil.copytree(finished, bare, ignore=shutil.ignore_patterns("*.md", "provenance.json", "parity.json", "figures"))
    assert "name its original model with --against" in command("verify", bare).err
    outcome = command("verify", bare, "--against", POCKET, "--device", "cpu", *MEASURING)
    assert outcome.code == 0 and "perplexity ratio" in outcome.err


@pytest.mark.slow
def test_verify_judges_an_8bit_checkpoint_made_by_stock_transformers(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    place = {"": "cpu"}
    AutoModelForCausalLM.from_pretrained(POCKET, quantization_config=config, device_map=place).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path)
    outcome = command("verify", tmp_path, "--against", POCKET, "--device", "cpu", *MEASURING, "--json")
    evidence = json.loads(outcome.out)
    assert outcome.code == 0 and evidence["verdict"]["grade"] == "lossless"
    assert evidence["checks"][0]["detail"] == "config.json says 8-bit, so do the files"


def test_verify_of_a_local_source_asks_where_it_is(finished: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("verify", finished, "--device", "cpu")
    assert outcome.code == 1 and "say where it is with --against FOLDER" in outcome.err


def test_verify_refuses_another_source(finished: Path, pocket_copy: Path, command: Callable[..., Outcome]) -> None:
    (pocket_copy / "README.md").write_text("another card")
    outcome = command("verify", finished, "--against", pocket_copy, "--device", "cpu")
    assert outcome.code == 1 and "is not the source that this package was made from" in outcome.err
