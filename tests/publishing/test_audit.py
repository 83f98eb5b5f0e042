"""Packages that were edited, with right hashes: none of them is published."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize import methods, package, source
from quantize.errors import PackageError
from quantize.files import blob_ids, records_of
from quantize.package.sealing import UNSEALED
from quantize.progress import Silent
from quantize.publishing.audit import require_sound
from quantize.records import Recipe
from tests.conftest import POCKET, Outcome

Document = dict[str, Any]


class Forged:
    """A copy of a package whose records can be edited, and sealed again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parity: Document = json.loads((folder / "parity.json").read_text("utf-8"))
        self.provenance: Document = json.loads((folder / "provenance.json").read_text("utf-8"))

    def card(self, pattern: str, replacement: str) -> None:
        path = self.folder / "README.md"
        text, count = re.subn(pattern, replacement, path.read_text("utf-8"), count=1)
        assert count, pattern
        path.write_text(text, "utf-8")

    def config(self, **changes: Any) -> None:
        path = self.folder / "config.json"
        config = json.loads(path.read_text("utf-8"))
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config), "utf-8")

    def seal(self) -> None:
        """As a careful forger would."""
        (self.folder / "parity.json").write_text(json.dumps(self.parity), "utf-8")
        files = records_of(self.folder, without=UNSEALED)
        self.provenance["files"] = [vars(file) for file in files]
        self.provenance["blob_ids"] = blob_ids(self.folder, files)
        (self.folder / "provenance.json").write_text(json.dumps(self.provenance), "utf-8")


def grade(forged: Forged) -> None:
    forged.parity["verdict"]["grade"] = "lossless"


def required_grade(forged: Forged) -> None:
    forged.parity["verdict"]["required"] = forged.provenance["settings"]["require"] = "good"


def scores(forged: Forged) -> None:
    forged.parity["scores"]["kld"]["mean"] = {"value": 0.001, "low": 0.0005, "high": 0.002}


def perplexity(forged: Forged) -> None:
    forged.parity["scores"]["candidate_perplexity"]["value"] *= 0.99


def interval_of_a_look(forged: Forged) -> None:
    forged.parity["looks"][-1]["kld"]["high"] /= 2


def figures_of_windows(forged: Forged) -> None:
    figures = forged.parity["scores"]["window_figures"]
    figures["kld"] = [figure / 2 for figure in figures["kld"]]


def fewer_windows(forged: Forged) -> None:
    for figures in forged.parity["scores"]["window_figures"].values():
        del figures[-4:]


def missing_check(forged: Forged) -> None:
    forged.parity["checks"] = [check for check in forged.parity["checks"] if check["name"] != "tokenizer"]


def failed_check(forged: Forged) -> None:
    forged.parity["checks"][0]["passed"] = False


def weight_errors(forged: Forged) -> None:
    forged.parity["weight_errors"][next(iter(forged.parity["weight_errors"]))] = 0.9


def share_of_the_error(forged: Forged) -> None:
    forged.parity["look_plan"]["error"] = 0.5


def package_size(forged: Forged) -> None:
    forged.parity["sizes"] |= {"package_bytes": 1000, "bits_per_parameter": 4.1}


def bits_per_parameter(forged: Forged) -> None:
    forged.parity["sizes"]["bits_per_parameter"] = 4.1


def parameters(forged: Forged) -> None:
    sizes = forged.parity["sizes"]
    sizes["parameters"] *= 2
    sizes["bits_per_parameter"] = round(8 * sizes["package_bytes"] / sizes["parameters"], 4)


def quantized_modules(forged: Forged) -> None:
    gone = forged.provenance["quantized"]["modules"].pop()
    del forged.parity["weight_errors"][gone]


def half_precision_modules(forged: Forged) -> None:
    quantized = forged.provenance["quantized"]
    quantized["half_precision_modules"] = quantized["modules"][:1]
    quantized["kept_modules"] += quantized["modules"][:1]


def small_blocks(forged: Forged) -> None:
    quantized = forged.provenance["quantized"]
    quantized["block_32_modules"] = quantized["modules"][:3]


def quant_type(forged: Forged) -> None:
    forged.config(bnb_4bit_quant_type="fp4")


def skip_list(forged: Forged) -> None:
    forged.config(llm_int8_skip_modules=["lm_head", "transformer.h.0"])


def skip_list_without_the_head(forged: Forged) -> None:
    forged.config(llm_int8_skip_modules=[])


def compute_dtype(forged: Forged) -> None:
    forged.config(bnb_4bit_compute_dtype="bfloat16")


def recipe(forged: Forged) -> None:
    forged.provenance["recipe"]["double_quant"] = False


def corpus(forged: Forged) -> None:
    forged.parity["corpus"]["name"] = "contracts.txt"


def corpus_hash(forged: Forged) -> None:
    forged.parity["corpus"]["sha256"] = "0" * 64


def scored_windows(forged: Forged) -> None:
    forged.parity["corpus"]["scored"] *= 2


def seed(forged: Forged) -> None:
    forged.provenance["settings"]["seed"] = 7


def largest_number_of_windows(forged: Forged) -> None:
    forged.provenance["settings"]["max_windows"] = 8


def everything_scored(forged: Forged) -> None:
    forged.provenance["settings"]["full"] = True


def controls_asked_for(forged: Forged) -> None:
    forged.provenance["settings"]["controls"] = True


def figure_on_the_card(forged: Forged) -> None:
    forged.card(r"(\| perplexity ratio \| 1 \| )[\d.]+", r"\g<1>1.0001")


def limit_on_the_card(forged: Forged) -> None:
    forged.card(r"(\| perplexity ratio .* )1\.05 \|", r"\g<1>1.5 |")


def grade_on_the_card(forged: Forged) -> None:
    forged.card(r"\*\*Grade: \w+", "**Grade: lossless")


def results_in_the_metadata(forged: Forged) -> None:
    forged.card(r"value: [\d.]+(\n +name: perplexity of this model)", r"value: 1.0\g<1>")


def results_under_a_template(forged: Forged) -> None:
    results_in_the_metadata(forged)
    forged.provenance["card_template"] = "0" * 64


def license_in_the_metadata(forged: Forged) -> None:
    forged.card(r"license: \S+", "license: wtfpl")


def base_model(forged: Forged) -> None:
    forged.card(r"library_name: transformers\n", "library_name: transformers\nbase_model: heron/grand\n")


def original_s_card(forged: Forged) -> None:
    forged.provenance["source_card"] = forged.provenance["source_card"].replace("license:", "license: wtfpl #", 1)


def generated_texts(forged: Forged) -> None:
    forged.parity["generation"]["identical_at_16"] = 0.125


def generated_tokens(forged: Forged) -> None:
    forged.parity["generation"]["new_tokens"] = 64


def attempts(forged: Forged) -> None:
    attempt = {"recipe": forged.provenance["recipe"], "grade": "parity", "weight_bytes": 10, "seconds": 1.0}
    measured = {"perplexity_ratio": None, "kld": None, "same_top": None, "chosen": True}
    forged.parity["attempts"] = [attempt | measured]


def environment(forged: Forged) -> None:
    forged.parity["environment"]["device_name"] = "NVIDIA H100"


def source_commit(forged: Forged) -> None:
    forged.provenance["source"] |= {"repo_id": "heron/grand", "commit": "0" * 40}


def impossible_sizes(forged: Forged) -> None:
    forged.parity["sizes"]["parameters"] = 0


def unknown_grade(forged: Forged) -> None:
    forged.parity["verdict"]["required"] = forged.provenance["settings"]["require"] = "splendid"


def weights_of(recipe: Recipe, forged: Forged, model: Path = POCKET) -> None:
    """Put weights by another recipe into a package, and their size into its evidence."""
    made = forged.folder.with_name("weights")
    made.mkdir()
    checkout = source.fetch(str(model), revision=None, trust_remote_code=False, progress=Silent())
    methods.quantize(methods.Job(checkout, made, recipe, "cpu", Silent()))
    shutil.copy(made / "model.safetensors", forged.folder)
    size = (forged.folder / "model.safetensors").stat().st_size
    sizes = forged.parity["sizes"]
    sizes |= {"package_bytes": size, "bits_per_parameter": round(8 * size / sizes["parameters"], 4)}


def weights_of_another_format(forged: Forged) -> None:
    weights_of(Recipe("rtn", quant_type="fp4"), forged)


EDITS = [
    *(grade, required_grade, scores, perplexity, interval_of_a_look, figures_of_windows, fewer_windows),
    *(missing_check, failed_check, weight_errors, share_of_the_error),
    *(package_size, bits_per_parameter, parameters, quantized_modules, half_precision_modules, small_blocks),
    *(quant_type, skip_list, skip_list_without_the_head, compute_dtype, recipe),
    *(corpus, corpus_hash, scored_windows, seed, largest_number_of_windows, everything_scored, controls_asked_for),
    *(figure_on_the_card, limit_on_the_card, grade_on_the_card),
    *(results_in_the_metadata, results_under_a_template, license_in_the_metadata, base_model, original_s_card),
    *(generated_texts, generated_tokens, attempts, environment, source_commit),
    *(impossible_sizes, unknown_grade, weights_of_another_format),
]


@pytest.mark.parametrize("edit", EDITS, ids=[edit.__name__ for edit in EDITS])
def test_an_edited_package_is_not_published(
    package_copy: Path, command: Callable[..., Outcome], edit: Callable[[Forged], None]
) -> None:
    forged = Forged(package_copy)
    edit(forged)
    forged.seal()
    ended = command("push", package_copy, "--to", "tester/forged", "-q")
    assert ended.code == 1, (ended.code, ended.err)
    assert ended.err.startswith(f"error: {package_copy} is not published, since it contradicts itself: ")
    assert len(ended.err.splitlines()) == 1


def test_an_honest_package_is_sound(package_copy: Path) -> None:
    require_sound(package.open_package(package_copy))
    forged = Forged(package_copy)
    forged.seal()
    require_sound(package.open_package(package_copy))


def test_a_package_without_figures_of_windows_is_to_be_measured_again(package_copy: Path) -> None:
    forged = Forged(package_copy)
    del forged.parity["scores"]["window_figures"], forged.parity["look_plan"]
    forged.seal()
    with pytest.raises(PackageError, match="measure it again with `quantize run --force`"):
        require_sound(package.open_package(package_copy))
