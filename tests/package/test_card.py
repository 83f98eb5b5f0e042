"""The card: golden texts, metadata that the client accepts, numbers that are the evidence's, snippets that run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import model_card
from model_card import CardFacts, CardPublisher, metadata, source_card
from model_card.escape import plain
from quantize import package
from quantize.evidence import DatasetRecord, Evidence
from quantize.package import card as cards
from quantize.package.card import command as reproduction
from quantize.records import EvaluationSettings, Provenance, Publisher, Recipe, Source
from quantize.serialization import read_record
from tests.conftest import POCKET, Outcome
from tests.publishing.workspace import Place

DATA = Path(__file__).parents[1] / "data"
EVIDENCE, GOLDEN = DATA / "evidence", DATA / "golden"
SOURCE_CARD = (DATA / "source-card.md").read_text("utf-8")
FIGURES = ("figures/kld-distribution.png", "figures/perplexity-ratio.png")
LINKS = {"Website": "https://example.org/herons", "Mail": "mailto:herons@example.org"}
COMMIT, DATA_COMMIT = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


def recorded() -> tuple[Provenance, Evidence]:
    """The records of a real run on the pocket model, with controls and standard perplexities."""
    return read_record(Provenance, EVIDENCE / "provenance.json"), read_record(Evidence, EVIDENCE / "parity.json")


def pocket_facts() -> CardFacts:
    provenance, evidence = recorded()
    text = (POCKET / "README.md").read_text("utf-8")
    return cards.facts(dataclasses.replace(provenance, name="pocket-gpt2-bnb-4bit"), evidence, text, FIGURES)


def full_facts() -> CardFacts:
    """Everything that a card can have at once: a Hub source, a publisher, a Hub data set, a card full of traps."""
    provenance, evidence = recorded()
    assert evidence.corpus is not None
    dataset = DatasetRecord("Salesforce/wikitext", "wikitext-2-raw-v1", "test", DATA_COMMIT)
    source = dataclasses.replace(provenance.source, name="heron", repo_id="heron/heron", commit=COMMIT)
    provenance = dataclasses.replace(
        provenance,
        source=source,
        publisher=Publisher("Ada Reed", LINKS),
        name="rookery/heron-bnb-4bit",
        key="5eed" * 16,
    )
    evidence = dataclasses.replace(evidence, corpus=dataclasses.replace(evidence.corpus, dataset=dataset))
    return cards.facts(provenance, evidence, SOURCE_CARD, FIGURES)


@pytest.mark.parametrize(("name", "facts"), [("pocket.md", pocket_facts), ("full.md", full_facts)])
def test_golden_cards(name: str, facts: Callable[[], CardFacts]) -> None:
    """Read the difference; UPDATE_GOLDEN=1 accepts it."""
    text = model_card.render(facts())
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(text, "utf-8")
    assert text == (GOLDEN / name).read_text("utf-8")


def test_metadata_of_the_full_card(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(model_card.render(full_facts()), "utf-8")
    data = ModelCard.load(path).data
    assert (data.language, data.license, data.license_name) == (["en", "gsw"], "other", "heron-1.0")
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("heron/heron", "transformers", "text-generation")
    found: dict[str, Any] = data.to_dict()
    assert found["base_model_relation"] == "quantized" and found["quantized_by"] == "Ada Reed"
    assert found["widget"] == [{"text": "The heron stands", "example_title": "Heron"}]
    assert found["extra_gated_prompt"].startswith("Tell us") and found["extra_gated_fields"] == {"Purpose": "text"}
    assert found["tags"] == ["4-bit", "bitsandbytes", "nf4", "birds", "{{ 7 * 7 }}"]
    assert "co2_eq_emissions" not in found and "149200 g CO2eq" in path.read_text()
    results = {result.metric_name: result for result in data.eval_results}
    assert 21.1 not in [result.metric_value for result in results.values()]
    ours = results["perplexity of this model"]
    assert (ours.dataset_type, ours.dataset_split) == ("Salesforce/wikitext", "test")
    assert ours.dataset_revision == DATA_COMMIT
    _, evidence = recorded()
    assert evidence.scores is not None
    assert ours.metric_value == pytest.approx(evidence.scores.candidate_perplexity.value, abs=1e-6)


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)


@given(
    title=texts,
    fields=st.fixed_dictionaries(
        {},
        optional={
            "language": st.lists(texts, min_size=1, max_size=3),
            "tags": st.lists(texts, max_size=4),
            "license": texts,
            "license_name": texts,
            "datasets": st.lists(texts, min_size=1, max_size=2),
        },
    ),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.slow
def test_metadata_survives_the_round_trip(title: str, fields: dict[str, Any]) -> None:
    text = f"---\n{yaml.safe_dump(fields, allow_unicode=True)}---\n# {title}\n"
    facts = dataclasses.replace(pocket_facts(), source_card=text, publisher=CardPublisher(title, ()))
    expected = metadata.build(facts, source_card.split(text))
    found = ModelCard(model_card.render(facts)).data.to_dict()  # type: ignore[no-untyped-call]
    results = expected.pop("model-index")
    assert [one["value"] for one in found.pop("model-index")[0]["results"][0]["metrics"]] == [
        one["value"] for one in results[0]["results"][0]["metrics"]
    ]
    assert found == expected
    for name in ("language", "license_name", "datasets"):
        assert found.get(name) == as_texts(fields.get(name, found.get(name)))


def as_texts(value: Any) -> Any:
    """A text without blanks around it, or a list of texts that are not empty, each once."""
    if not isinstance(value, list):
        return value and (plain(value) or None)
    return list(dict.fromkeys(word for word in map(plain, value) if word)) or None


def test_metadata_loads_and_is_inherited(finished: Path) -> None:
    card = ModelCard.load(finished / "README.md")
    source = ModelCard.load(POCKET / "README.md")
    assert card.data.license == source.data.license == "apache-2.0"
    assert card.data.language == source.data.language
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"4-bit", "bitsandbytes", "nf4"} <= set(card.data.tags)
    assert card.data.base_model is None


def cells(card: str, begin: str) -> list[str]:
    """The cells of the first table row that begins with `begin`."""
    row = next(line for line in card.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_every_measured_number_on_the_card_is_the_evidence(finished: Path) -> None:
    card, evidence = (finished / "README.md").read_text(), json.loads((finished / "parity.json").read_text())
    scores, sizes = evidence["scores"], evidence["sizes"]

    def interval(estimate: dict[str, float], digits: int = 4) -> str:
        return f"{estimate['low']:.{digits}f} to {estimate['high']:.{digits}f}"

    ratio, kld, top = scores["perplexity_ratio"], scores["kld"], scores["same_top"]
    reference, candidate = scores["reference_perplexity"], scores["candidate_perplexity"]
    assert cells(card, "perplexity |")[1:4] == [
        *(f"{reference['value']:.3f}", f"{candidate['value']:.3f}", interval(candidate, 3)),
    ]
    assert cells(card, "perplexity ratio")[1:4] == ["1", f"{ratio['value']:.4f}", interval(ratio)]
    assert cells(card, "mean KL")[2:4] == [f"{kld['mean']['value']:.4f}", interval(kld["mean"])]
    assert cells(card, "median / 99th")[2] == f"{kld['percentiles']['p50']:.4f} / {kld['percentiles']['p99']:.4f}"
    assert cells(card, "same most likely")[2] == f"{100 * top['value']:.2f} %"
    assert cells(card, "RMS change")[2] == f"{100 * scores['delta_p_rms']['value']:.2f} %"
    assert cells(card, "weight files |")[1:] == [
        f"{sizes['source_bytes'] / 1e6:.1f} MB",
        f"{sizes['package_bytes'] / 1e6:.1f} MB",
    ]
    assert cells(card, "bits per parameter")[2] == f"{sizes['bits_per_parameter']:.2f}"
    corpus = evidence["corpus"]
    assert f"Measured on {corpus['scored'] * (corpus['window'] - 1):,} tokens" in card
    assert f"{sizes['parameters']:,} parameters" in card and "times the original's, and the KL divergence" in card
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["metrics"][1]["value"] == round(
        candidate["value"], 6
    )


def test_comparisons_and_origin_on_the_card_are_the_records() -> None:
    card = model_card.render(full_facts())
    provenance, evidence = recorded()
    for control in evidence.controls:
        assert control.perplexity_ratio is not None and control.kld is not None and control.same_top is not None
        kld = control.kld.value
        assert cells(card, f"{control.name} |")[1:] == [
            f"{control.weight_bytes / 1e6:.1f} MB",
            f"{control.perplexity_ratio.value:.4f}",
            f"{kld:.4f}" if kld >= 0.001 else f"{kld:.1e}",
            f"{100 * control.same_top.value:.2f} %",
            control.grade,
        ]
    assert len(evidence.controls) == 3 and len(evidence.standard_perplexities) == 4
    for figure in evidence.standard_perplexities:
        assert cells(card, f"{figure.name} |")[1:3] == [f"{figure.reference:.4f}", f"{figure.candidate:.4f}"]
        assert figure.method in card
    for name, version in provenance.environment.versions.items():
        assert f"{name} {version}" in card
    assert f"Made {provenance.created} by `quantize` {provenance.tool_version}" in card
    assert f"{len(provenance.quantized.modules)} linear layers hold" in card
    generation = evidence.generation
    assert generation is not None
    for sample in generation.samples[:3]:
        assert sample.reference_sampled in card and sample.candidate_sampled in card
    for share in (generation.prefill_agreement, generation.cached_agreement):
        assert f"{100 * share:.1f} %" in card


@pytest.mark.parametrize(("new_tokens", "compared"), [(4, ()), (16, (16,)), (31, (16,)), (32, (16, 32))])
def test_only_as_many_tokens_are_compared_as_were_made(new_tokens: int, compared: tuple[int, ...]) -> None:
    card = model_card.render(dataclasses.replace(full_facts(), new_tokens=new_tokens))
    assert tuple(int(number) for number in re.findall(r"the same first (\d+)", card)) == compared
    assert (f"by {new_tokens} tokens" in card) == (not compared)


def test_small_divergences_keep_their_digits() -> None:
    kld = model_card.Interval(2.34e-5, 1.12e-5, 3.46e-5)
    assert cells(model_card.render(dataclasses.replace(full_facts(), kld=kld)), "mean KL")[2:4] == [
        *("2.3e-05", "1.1e-05 to 3.5e-05"),
    ]


def test_copies_of_the_originals_files_are_those_with_its_hashes(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    line = next(line for line in card.splitlines() if "Byte-for-byte copies" in line)
    named = re.findall(r"`([^`]+)`", line.split("Byte-for-byte copies")[1])
    same = [path.name for path in POCKET.iterdir() if (finished / path.name).is_file() and path.name != "README.md"]
    assert sorted(named) == sorted(n for n in same if (finished / n).read_bytes() == (POCKET / n).read_bytes())
    assert "tokenizer.json" in named and "config.json" not in named
    facts = dataclasses.replace(full_facts(), copied_files=())
    assert "Byte-for-byte" not in model_card.render(facts)


def snippets(folder: Path) -> tuple[str, str]:
    """The code of a card: its uses, as one script for the folder above, and its check of the hashes for the package."""
    card = (folder / "README.md").read_text().split("## Original model")[0]
    *uses, check = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(uses) == 3
    return "\n".join(uses), check


@pytest.mark.slow
def test_every_snippet_runs(finished: Path, place: Place) -> None:
    uses, check = snippets(finished)
    used = place.warm.script(uses, cwd=finished.parent)
    assert used.out.count("Hello, I'm a language model,") == 4 and "torch.Size([1, " in used.out, used.err
    assert place.warm.script(check, cwd=finished).out == "all checksums match\n"


def test_the_original_text_is_quoted_whole(finished: Path) -> None:
    quoted = (finished / "README.md").read_text().split("## Original model description")[1]
    body = source_card.split((POCKET / "README.md").read_text()).body
    words = re.sub(r"[#\s]+", " ", body).strip()
    assert words in re.sub(r"[#\s]+", " ", quoted)


def test_rendering_again_changes_nothing_but_is_sealed(package_copy: Path, command: Callable[..., Outcome]) -> None:
    before = (package_copy / "README.md").read_text()
    outcome = command("card", package_copy, "--against", POCKET)
    assert outcome.code == 0, outcome.err
    assert (package_copy / "README.md").read_text() == before
    package.require_unchanged(package.open_package(package_copy))


def test_the_reproduction_command_names_what_differs_from_the_defaults() -> None:
    source = Source("m", "org/m", "main", "c0ffee", (), "A", "a", "F16", 1, False)
    recipe = Recipe(quant_type="fp4", double_quant=False, skip_modules=("h.0",))
    assert reproduction(source, recipe, EvaluationSettings(require="parity", corpus="my text.txt")) == (
        "quantize run org/m --revision c0ffee --bits 4 --recipe auto --quant-type fp4 --no-double-quant "
        "--skip-modules h.0 --corpus 'my text.txt' --require parity"
    )


def test_an_unknown_license_is_shown(tmp_path: Path, package_copy: Path, pocket_copy: Path) -> None:
    from model_card import render
    from quantize.package.card import facts

    opened = package.open_package(package_copy)
    text = render(facts(opened.provenance, opened.evidence, "no front matter here", ()))
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "other"
    assert "**License unknown.**" in text


def test_an_own_template_and_its_mistakes(package_copy: Path, tmp_path: Path, command: Callable[..., Outcome]) -> None:
    template = tmp_path / "own.md.j2"
    template.write_text("# {{ source_name }} by {{ publisher.name }}\n\n{{ original_text }}\n")
    given = ("card", package_copy, "--against", POCKET, "--card-template", template)
    outcome = command(*given, "--publisher", "Ada Reed", "--preview", "--html", tmp_path / "card.html")
    assert outcome.code == 0, outcome.err
    card = (package_copy / "README.md").read_text()
    assert "\n# pocket-gpt2 by Ada Reed\n" in card and "quantized_by: Ada Reed" in card
    assert "pocket-gpt2 by Ada Reed" in outcome.err
    page = (tmp_path / "card.html").read_text()
    assert "<h1>pocket-gpt2 by Ada Reed</h1>" in page and "default-src 'none'" in page
    for text, problem in (
        ("{{ nothing }}", "line 1: 'nothing' is undefined"),
        ("\n{% if %}", "line 2: Expected an expression"),
    ):
        template.write_text(text)
        outcome = command(*given)
        assert outcome.code == 1 and problem in outcome.err and outcome.err.count("\n") == 1
    package.require_unchanged(package.open_package(package_copy))


def test_facts_are_printed_and_nothing_is_changed(package_copy: Path, command: Callable[..., Outcome]) -> None:
    before = (package_copy / "provenance.json").read_bytes()
    outcome = command("card", package_copy, "--against", POCKET, "--facts")
    facts = json.loads(outcome.out)
    assert facts["perplexity_ratio"]["value"] > 0.9 and facts["original_text"].startswith("### pocket-gpt2")
    assert {field.name for field in dataclasses.fields(CardFacts)} <= set(facts)
    assert (package_copy / "provenance.json").read_bytes() == before


def test_pages_hold_their_pictures_and_run_nothing(finished: Path) -> None:
    page = model_card.page((finished / "README.md").read_text(), finished)
    assert page.count("data:image/png;base64,") == 4 and "<script" not in page.split("<style>")[0]
    assert 'src="../secret.png"' in model_card.page("![x](../secret.png)", finished)


def test_such_a_license_is_refused_unless_insisted(
    pocket_copy: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    readme = pocket_copy / "README.md"
    readme.write_text(readme.read_text().replace("license: apache-2.0", "license: cc-by-nd-4.0"))
    outcome = command("run", pocket_copy, "-o", tmp_path / "out", "--device", "cpu", "--quiet")
    assert outcome.code == 1 and "has the license cc-by-nd-4.0, which allows no changed copies" in outcome.err
    assert not (tmp_path / "out").exists()


def test_the_publisher_comes_from_options_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.errors import ConfigError
    from quantize.publishing import publisher

    config = tmp_path / "config.toml"
    monkeypatch.setenv("QUANTIZE_CONFIG", str(config))
    assert publisher.chosen(None, ()) is None
    config.write_text('[publisher]\nname = "Ada Reed"\nlinks = { Website = "https://example.org" }\n')
    assert publisher.chosen(None, ()) == Publisher("Ada Reed", {"Website": "https://example.org"})
    assert publisher.chosen("Other", ["Mail=mailto:o@example.org"]) == Publisher(
        "Other", {"Mail": "mailto:o@example.org"}
    )
    for name, links, problem in (
        (None, ["A=https://a.b"], "without its name"),
        ("A", ["https://a.b"], "write it as LABEL=URL"),
        ("A", ["A=javascript:alert(1)"], "is no address"),
        ("A", ["A=https://me:secret@a.b"], "is no address"),
    ):
        with pytest.raises(ConfigError, match=problem):
            publisher.chosen(name, links)
    config.write_text("[publisher]\nname = 3\n")
    with pytest.raises(ConfigError, match="one line of text"):
        publisher.chosen(None, ())
