"""The card's YAML front matter: what stays true of the source, and what is new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_card.facts import CardFacts

INHERITED = ("language", "license", "license_name", "license_link", "datasets", "pipeline_tag")
UNKNOWN_LICENSE = "other"


def build(facts: CardFacts, source: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of the derived model, given its source's: the Hub's field names, in the Hub's order."""
    metadata: dict[str, Any] = {name: source[name] for name in INHERITED if source.get(name)}
    metadata.setdefault("license", UNKNOWN_LICENSE)
    metadata.setdefault("pipeline_tag", "text-generation")
    metadata["library_name"] = "transformers"
    if facts.source_repo_id:
        metadata["base_model"] = facts.source_repo_id
        metadata["base_model_relation"] = "quantized"
    metadata["tags"] = _tags(facts, source)
    return metadata


def _tags(facts: CardFacts, source: Mapping[str, Any]) -> list[str]:
    own = [f"{facts.bits}-bit", "bitsandbytes", facts.quant_type if facts.bits == 4 else "llm.int8"]
    inherited = source.get("tags") or []
    kept = [tag for tag in inherited if isinstance(tag, str)] if isinstance(inherited, list) else []
    return list(dict.fromkeys([*own, *kept]))
