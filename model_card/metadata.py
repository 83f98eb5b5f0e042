"""The card's YAML front matter: what is inherited from the original, and what is new."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

from model_card import licenses
from model_card.escape import address, plain, plain_lines
from model_card.facts import CardFacts
from model_card.source_card import GATING, SourceCard

LISTS = ("language", "datasets")
PIPELINE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
GATING_KEY = re.compile(rf"{GATING}[a-z_]+")
FORMAT_TAGS = {"pytorch", "tf", "jax", "rust", "onnx", "coreml", "gguf", "ggml", "tflite", "openvino", "mlx"}
"""Tags that name file formats of the source which the package does not have."""
PRECISION = re.compile(
    r"(?:fp|f|mxfp|nvfp|bf|float|bfloat|int|uint|i|u|nf)(?:2|3|4|5|6|8|16|32|64)|e[2-5]m[0-3]\w*"
    r"|i?q[1-8]|w\d+a\d+(?:kv\d+)?|w(?:2|3|4|8)|\d+(?:bits?|bpw)"
    r"|awq|gptq|autoawq|autogptq|gptqmodel|autoround|aqlm|hqq|quanto|quip|exl[23]|eetq|torchao|llmcompressor"
    r"|bnb|bitsandbytes|quantized|quantization"
)
BESIDE_PRECISION = re.compile(
    r"\d+|a\d+|kv\d+|k|s|m|l|xs|xxs|precision|weights|model|compressed|tensors|dynamic|static|auto"
)
"""Words that make a tag of precision longer, such as those of `q4_k_m`."""
LICENSE_FILES = ("LICENSE", "LICENSE.md")


def build(facts: CardFacts, source: SourceCard) -> dict[str, Any]:
    """Metadata of the derived model, given its source's card: the Hub's field names, in the Hub's order."""
    metadata, _ = inherited(source)
    if "license_link" in metadata:
        metadata["license_link"] = _reachable(metadata["license_link"], facts)
    if facts.reads_pictures and not _is_pipeline(source.metadata.get("pipeline_tag")):
        metadata["pipeline_tag"] = "image-text-to-text"
    metadata["library_name"] = "transformers"
    if facts.source_repo_id:
        metadata["base_model"] = facts.source_repo_id
        metadata["base_model_relation"] = "quantized"
    if facts.publisher:
        metadata["quantized_by"] = facts.publisher.name
    if facts.key:
        metadata["quantize_key"] = facts.key
    metadata["tags"] = _tags(facts, source.metadata)
    if facts.perplexity_ratio:
        metadata |= _model_index(facts)
    return metadata


def inherited(source: SourceCard) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a card takes from its source's metadata, each value of the type that the Hub wants, and what was mended."""
    stated = source.metadata
    license_fields = licenses.fields(stated)
    values: dict[str, Any] = {}
    values["language"] = _words(stated.get("language"))
    values |= license_fields
    values["datasets"] = _words(stated.get("datasets"))
    values["pipeline_tag"] = _pipeline(stated.get("pipeline_tag"))
    values["widget"] = _widget(stated.get("widget"))
    values |= {key: _gating(value) for key, value in stated.items() if GATING_KEY.fullmatch(key)}
    values = {key: value for key, value in values.items() if value not in (None, "", [], {})}
    return values, _mended(source, values)


def to_yaml(metadata: Mapping[str, Any]) -> str:
    """Front matter whose texts every reader of YAML, 1.1 or 1.2, takes for texts."""
    return yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as a number, besides what 1.1 would not read as a text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"),
    list("-+.0123456789"),
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?0[box][0-9a-fA-F_]+\Z"), list("-+0"))


def _mended(source: SourceCard, values: Mapping[str, Any]) -> tuple[str, ...]:
    """What the card does not say as the source does, for its author to know before the work begins."""
    notes = []
    if source.problem:
        notes.append(f"the original's metadata cannot be read ({plain(source.problem)}): the card inherits none of it")
    named = licenses.stated(source.metadata)
    if named and values["license"] not in (name.lower() for name in named):
        notes.append(f"the card says license: {licenses.OTHER} for {', '.join(named)}: the Hub takes one known word")
    lost = [key for key, value in source.metadata.items() if value and _inheritable(key) and key not in values]
    return (
        *notes,
        *(f"the card leaves out the original's {plain(key)}: the Hub would not take its value" for key in lost),
    )


def _inheritable(key: str) -> bool:
    return key in (*LISTS, "license_link", "pipeline_tag", "widget") or key.startswith(GATING)


def _words(value: Any) -> str | list[str]:
    """One text, or a list of texts with nothing else in it."""
    if isinstance(value, str):
        return plain(value)
    words = [plain(item) for item in value if isinstance(item, str)] if isinstance(value, list) else []
    return list(dict.fromkeys(word for word in words if word))


def _pipeline(value: Any) -> str:
    return str(value) if _is_pipeline(value) else "text-generation"


def _is_pipeline(value: Any) -> bool:
    return isinstance(value, str) and PIPELINE.fullmatch(value) is not None


def _widget(value: Any) -> list[Any]:
    """The examples of a widget that have a text or a conversation."""
    examples = [_clean(item) for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return [item for item in examples if isinstance(item.get("text"), str) or isinstance(item.get("messages"), list)]


def _gating(value: Any) -> Any:
    return _clean(value) if isinstance(value, str | bool | dict) else None


def _clean(value: Any) -> Any:
    """A value without nulls, numbers that JSON cannot say, and characters that nobody sees."""
    if isinstance(value, dict):
        cleaned = {plain(key): _clean(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item is not None}
    if isinstance(value, list):
        return [item for item in map(_clean, value) if item is not None]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return plain_lines(value) if isinstance(value, str) else value


def _reachable(link: str, facts: CardFacts) -> str:
    """A link to the license that the Hub takes: an address, or one of two names."""
    if link.startswith("http") or link in LICENSE_FILES or not facts.source_repo_id:
        return link
    path = address(link.removeprefix("./").lstrip("/"))
    return f"{facts.hub}/{facts.source_repo_id}/blob/{facts.source_commit}/{path}"


def _tags(facts: CardFacts, source: Mapping[str, Any]) -> list[str]:
    own = [f"{facts.bits}-bit", "bitsandbytes", facts.quant_type if facts.bits == 4 else "llm.int8"]
    stated = _words(source.get("tags"))
    kept = [stated] if isinstance(stated, str) else stated
    return list(dict.fromkeys([*own, *(tag for tag in kept if tag and not _of_the_source(tag.lower()))]))


def _of_the_source(tag: str) -> bool:
    """Whether a tag names a file format or a precision, which are others in the copy."""
    words = re.split(r"[-_ .:/]+", re.sub(r"(\d)[-_ ]?bit", r"\1bit", tag).strip("-_ .:/"))
    named = [word for word in words if PRECISION.fullmatch(word)]
    others = (word for word in words if word not in named)
    return tag in FORMAT_TAGS or (bool(named) and all(BESIDE_PRECISION.fullmatch(word) for word in others))


def _model_index(facts: CardFacts) -> dict[str, Any]:
    """The measurements of both models, as the Hub's model-index has them; never results that the source reports."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 6),
            **_dataset(facts),
        )
        for kind, name, value in _measured(facts)
        if value is not None
    ]
    return {"model-index": eval_results_to_model_index(facts.package_name, results)}


def _measured(facts: CardFacts) -> list[tuple[str, str, float | None]]:
    """Kind, name and value of every figure."""
    assert facts.reference_perplexity and facts.candidate_perplexity and facts.perplexity_ratio
    assert facts.kld and facts.same_top
    return [
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


def _dataset(facts: CardFacts) -> dict[str, Any]:
    assert facts.corpus and facts.corpus_sha256
    arguments = {"sha256": facts.corpus_sha256, "window": facts.window, "windows": facts.windows}
    hub = facts.corpus_dataset
    if hub is None:
        return {"dataset_name": facts.corpus, "dataset_type": "text", "dataset_args": arguments}
    return {
        "dataset_name": f"{hub.repo_id} {hub.config}",
        "dataset_type": hub.repo_id,
        "dataset_config": hub.config,
        "dataset_split": hub.split,
        "dataset_revision": hub.revision,
        "dataset_args": arguments,
    }
