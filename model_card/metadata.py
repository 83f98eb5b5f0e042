"""The card's YAML front matter: what is inherited from the original, and what is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_card.facts import CardFacts

INHERITED = (
    "language",
    "license",
    "license_name",
    "license_link",
    "datasets",
    "pipeline_tag",
    "widget",
)
GATING = "extra_gated_"
UNKNOWN_LICENSE = "other"
FORMAT_TAGS = {"pytorch", "tf", "jax", "rust", "onnx", "coreml", "gguf", "tflite", "openvino", "mlx"}
"""Tags that name file formats of the source which the package does not have."""
FORBIDS_DERIVATIVES = ("-nd-", "no-derivatives")


def build(facts: CardFacts, source: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the derived model, given its source's: the Hub's field names, in the Hub's order."""
    metadata: dict[str, Any] = {name: source[name] for name in INHERITED if source.get(name)}
    metadata |= {name: value for name, value in source.items() if str(name).startswith(GATING)}
    metadata.setdefault("license", UNKNOWN_LICENSE)
    metadata.setdefault("pipeline_tag", "text-generation")
    metadata["library_name"] = "transformers"
    if facts.source_repo_id:
        metadata["base_model"] = facts.source_repo_id
        metadata["base_model_relation"] = "quantized"
    if facts.publisher:
        metadata["quantized_by"] = facts.publisher.name
    if facts.key:
        metadata["quantize_key"] = facts.key
    metadata["tags"] = _tags(facts, source)
    if facts.perplexity_ratio:
        metadata["model-index"] = [{"name": facts.package_name, "results": [_results(facts)]}]
    return metadata


def forbids_derivatives(source: Mapping[str, Any]) -> str | None:
    """The source's license where it forbids derivatives, such as cc-by-nc-nd-4.0."""
    named = [str(source.get(name) or "") for name in ("license", "license_name")]
    return next((name for name in named if any(mark in f"{name.lower()}-" for mark in FORBIDS_DERIVATIVES)), None)


def _tags(facts: CardFacts, source: Mapping[str, Any]) -> list[str]:
    own = [f"{facts.bits}-bit", "bitsandbytes", facts.quant_type if facts.bits == 4 else "llm.int8"]
    inherited = source.get("tags") or []
    kept = [tag for tag in inherited if isinstance(tag, str)] if isinstance(inherited, list) else []
    return list(dict.fromkeys([*own, *(tag for tag in kept if tag.lower() not in FORMAT_TAGS)]))


def _results(facts: CardFacts) -> dict[str, Any]:
    """The measurements of both models, as the Hub's model-index has them; never results that the source reports."""
    assert facts.reference_perplexity and facts.candidate_perplexity and facts.perplexity_ratio
    assert facts.kld and facts.same_top
    measured = [
        ("perplexity", f"perplexity of the original ({facts.reference_dtype})", facts.reference_perplexity.value),
        ("perplexity", "perplexity of this model", facts.candidate_perplexity.value),
        ("perplexity_ratio", "perplexity ratio, this model to the original", facts.perplexity_ratio.value),
        ("kl_divergence", "mean KL divergence from the original (nats)", facts.kld.value),
        ("same_top_token", "share of positions with the same most likely token", facts.same_top.value),
        *(
            (figure.name.replace(" ", "_"), f"{figure.name} of the original", figure.original)
            for figure in facts.standard_perplexities
        ),
        *(
            (figure.name.replace(" ", "_"), f"{figure.name} of this model", figure.quantized)
            for figure in facts.standard_perplexities
        ),
    ]
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": _dataset(facts),
        "metrics": [
            {"type": kind, "name": name, "value": round(value, 6)}
            for kind, name, value in measured
            if value is not None
        ],
    }


def _dataset(facts: CardFacts) -> dict[str, Any]:
    assert facts.corpus and facts.corpus_sha256
    arguments = {"args": {"sha256": facts.corpus_sha256, "window": facts.window, "windows": facts.windows}}
    hub = facts.corpus_dataset
    if hub is None:
        return {"name": facts.corpus, "type": "text", **arguments}
    location = {"type": hub.repo_id, "config": hub.config, "split": hub.split, "revision": hub.revision}
    return {"name": f"{hub.repo_id} {hub.config}", **location, **arguments}
