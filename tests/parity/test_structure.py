"""The field's classic failures, planted one by one into a good package; each is refused by its reason."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import pipeline, source
from quantize.evidence import Evidence
from quantize.formats.bitsandbytes import checks as format_checks
from quantize.formats.bitsandbytes.config import ExpectedConfig
from quantize.parity import measure, structure
from quantize.progress import Silent
from quantize.records import EvaluationSettings, Recipe
from quantize.serialization import to_json
from tests.conftest import POCKET

SETTINGS = EvaluationSettings(max_windows=16, window=64, new_tokens=2, require="degraded")
EXPECTED = ExpectedConfig.of(Recipe())
Tensors = dict[str, torch.Tensor]


def judged(folder: Path, expected: ExpectedConfig | None = EXPECTED) -> Evidence:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    return measure(checkout, folder, SETTINGS, "cpu", Silent(), expected)


def failures(evidence: Evidence) -> dict[str, str]:
    assert not evidence.verdict.passed and evidence.verdict.grade == "failed"
    return {check.name: check.detail for check in evidence.checks if not check.passed}


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def without(tensors: Tensors, module: str) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(f"{module}.weight")}


def test_the_good_package_passes(package_copy: Path) -> None:
    evidence = judged(package_copy)
    assert evidence.verdict.passed
    assert set(evidence.weight_errors) == {f"transformer.h.{block}.{part}" for block in range(4) for part in PARTS}
    assert all(0.05 < error < 0.15 for error in evidence.weight_errors.values())


PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.slow
def test_controls_show_the_noise_floor_and_the_alternatives(finished: Path) -> None:
    settings = dataclasses.replace(SETTINGS, controls=True)
    evidence = pipeline.verify(pipeline.VerifyRequest(str(finished), str(POCKET), settings, "cpu"), Silent())
    half, int8, stock = evidence.controls
    assert [half.name, int8.name, stock.name] == ["original in float16", "int8", "NF4 rounded to nearest"]
    assert (half.grade, int8.grade) == ("lossless", "lossless") and stock.grade in ("good", "degraded")
    assert half.kld is not None and int8.kld is not None and stock.kld is not None
    assert 0 < half.kld.value < int8.kld.value < stock.kld.value
    assert evidence.scores is not None and stock.kld.value == pytest.approx(evidence.scores.kld.mean.value)
    assert stock.weight_bytes < int8.weight_bytes < half.weight_bytes


def test_a_weight_left_in_16_bits(package_copy: Path) -> None:
    original = load_file(POCKET / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc"

    def leave(tensors: Tensors) -> Tensors:
        return {**without(tensors, name), f"{name}.weight": original[f"{name}.weight"].T.contiguous()}

    change_tensors(package_copy, leave)
    assert failures(judged(package_copy))["modules"] == f"{name} was left in 16 bits (1 of 16 were)"


def test_config_says_4bit_over_16bit_weights(package_copy: Path) -> None:
    change_tensors(package_copy, lambda _: load_file(POCKET / "model.safetensors"))
    assert "the files hold 16-bit weights only" in failures(judged(package_copy))["config"]


def test_4bit_weights_without_a_config_that_says_so(package_copy: Path) -> None:
    change_config(package_copy, lambda config: config.pop("quantization_config"))
    for expected in (EXPECTED, None):
        detail = failures(judged(package_copy, expected))["config"]
        assert detail == "config.json has no bitsandbytes quantization_config; the files hold quantized tensors"


def test_config_that_differs_from_the_recipe(package_copy: Path) -> None:
    expected = ExpectedConfig.of(Recipe(quant_type="fp4"))
    assert "nf4" in failures(judged(package_copy, expected))["config"]


@pytest.mark.parametrize("part", ["quant_state.bitsandbytes__nf4", "nested_absmax", "absmax"])
def test_a_missing_state_tensor(package_copy: Path, part: str) -> None:
    lost = f"transformer.h.2.mlp.c_proj.weight.{part}"
    change_tensors(package_copy, lambda tensors: {name: value for name, value in tensors.items() if name != lost})
    assert failures(judged(package_copy))["quant_state"] == f"missing {lost} (1 in all)"


def test_a_skipped_module_that_was_quantized_after_all(package_copy: Path) -> None:
    expected = ExpectedConfig.of(Recipe(skip_modules=("h.3.attn",)))
    detail = failures(judged(package_copy, expected))["modules"]
    assert detail == "transformer.h.3.attn.c_attn was quantized and should not be (2 such)"


def test_untied_embeddings(package_copy: Path) -> None:
    change_config(package_copy, lambda config: config.update(tie_word_embeddings=False))
    change_tensors(
        package_copy, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    )
    assert failures(judged(package_copy))["ties"] == "head and embeddings: tied in the source, separate here"


def test_a_wrong_tokenizer(package_copy: Path) -> None:
    path = package_copy / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[700], list(vocabulary)[900]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))
    assert failures(judged(package_copy))["tokenizer"] == "another vocabulary than the source's"


def test_rows_packed_in_the_wrong_orientation(package_copy: Path) -> None:
    """GPT-2 stores Conv1D as [inputs, outputs]: packing it as it is looks fine where the matrix is square."""
    from bitsandbytes import functional

    name = "transformer.h.0.attn.c_proj.weight"
    stored = load_file(POCKET / "model.safetensors")[name]
    codes, state = functional.quantize_4bit(stored, quant_type="nf4", compress_statistics=True)
    packed = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    change_tensors(package_copy, lambda tensors: {**tensors, name: codes, **packed})
    detail = failures(judged(package_copy))["weights"]
    assert "1 modules do not hold their source's weights, transformer.h.0.attn.c_proj" in detail


def test_nan_in_one_block(package_copy: Path) -> None:
    name = "transformer.h.1.attn.c_attn.weight.nested_absmax"

    def poison(tensors: Tensors) -> Tensors:
        tensors[name][0] = torch.nan
        return tensors

    change_tensors(package_copy, poison)
    assert failures(judged(package_copy))["finite"] == f"{name} holds NaN or infinity"


def test_files_that_cannot_be_read_are_a_verdict(package_copy: Path) -> None:
    path = package_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "unreadable" in failures(judged(package_copy))["files"]
    (package_copy / "config.json").write_text("{")
    assert "unreadable" in failures(judged(package_copy, None))["files"]


def test_a_broken_tokenizer_is_a_verdict(package_copy: Path) -> None:
    (package_copy / "tokenizer.json").write_text("{}")
    assert "does not load" in failures(judged(package_copy))["tokenizer"]


@pytest.mark.slow
def test_overflowing_outputs_are_a_verdict(package_copy: Path) -> None:
    def inflate(tensors: Tensors) -> Tensors:
        tensors["transformer.ln_f.weight"].fill_(60000.0)
        return tensors

    change_tensors(package_copy, inflate)
    evidence = judged(package_copy)
    assert "arithmetic" in failures(evidence)
    assert to_json(evidence)


def test_code_that_the_source_does_not_have_is_not_trusted(tmp_path: Path, package_copy: Path) -> None:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    assert structure.same_code(checkout, package_copy)
    (package_copy / "modeling_own.py").write_text("print('hello')")
    assert not structure.same_code(checkout, package_copy)


@pytest.mark.parametrize("part", [{}, {"text_config": {}}])
def test_code_of_another_repo_is_not_trusted(tmp_path: Path, package_copy: Path, part: dict[str, object]) -> None:
    """A config can name a class of any repo, without a file of it beside."""
    code = {"auto_map": {"AutoConfig": "org/other--configuration.Config"}}
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    change_config(package_copy, lambda config: config.update(dict.fromkeys(part, code) or code))
    assert not structure.same_code(checkout, package_copy)
    own = dataclasses.replace(checkout, source=dataclasses.replace(checkout.source, repo_id="org/other"))
    assert not structure.same_code(own, package_copy)


@pytest.mark.parametrize("storage", ["int8", "float16", "bfloat16", "float32", "float64"])
def test_codes_may_be_stored_as_any_type(package_copy: Path, storage: str) -> None:
    """Read as numbers they may be NaN, which means nothing."""
    dtype = getattr(torch, storage)

    def store(tensors: Tensors) -> Tensors:
        codes = {name: value for name, value in tensors.items() if value.dtype == torch.uint8 and value.dim() == 2}
        codes = {name: value.fill_(0xFF).view(1, -1).view(dtype).view(-1, 1) for name, value in codes.items()}
        return {**tensors, **codes}

    change_tensors(package_copy, store)
    assert all(check.passed for check in format_checks.check_files(package_copy, EXPECTED))


def test_two_swapped_layers(package_copy: Path) -> None:
    def swap(tensors: Tensors) -> Tensors:
        trade = {".h.1.": ".h.2.", ".h.2.": ".h.1."}
        swapped = {}
        for name, value in tensors.items():
            mark = next((mark for mark in trade if mark in name), None)
            swapped[name.replace(mark, trade[mark]) if mark else name] = value
        return swapped

    change_tensors(package_copy, swap)
    assert "8 modules do not hold their source's weights" in failures(judged(package_copy))["weights"]


def test_half_precision_that_shifts_the_original_as_well_is_no_fault_of_the_package() -> None:
    checks = [structure.arithmetic_check(0.002, 0.0015, noise) for noise in (0.0, 0.0001, 0.001)]
    assert [check.passed for check in checks] == [False, False, True]
    assert "limit 0.003; the original's own type shifts it by 0.001000" in checks[2].detail
