"""Records what lm-evaluation-harness itself reports for the pocket model, for tests/parity/test_standard_perplexity.py.

Run it in a separate environment, since the harness brings many dependencies that nothing else here needs:

    python -m venv /tmp/harness && /tmp/harness/bin/pip install torch==2.13.0 'lm_eval[hf]' datasets
    /tmp/harness/bin/python scripts/record_harness.py

With a model folder and a WikiText file as arguments it prints the harness's figures for those instead.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL, TEXT = ROOT / "tests" / "models" / "pocket-gpt2", ROOT / "tests" / "data" / "wikitext-like.txt"
RECORD = ROOT / "tests" / "data" / "harness.json"
FIGURES = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def evaluate(model: Path, pages: list[str]) -> dict[str, float]:
    """The harness's task wikitext, with its own detokenizer, on `pages` instead of the Hub's data set."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks.wikitext import preprocess_wikitext

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pages.jsonl"
        data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), "utf-8")
        task: dict[str, Any] = {
            "task": "pages",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
            "process_results": preprocess_wikitext.process_results,
            "metric_list": [{"metric": name} for name in FIGURES],
        }
        arguments = {"pretrained": str(model), "dtype": "float32"}
        report = simple_evaluate("hf", model_args=arguments, tasks=[task], device="cpu", batch_size=1)
    return {name: report["results"]["pages"][f"{name},none"] for name in FIGURES}


def main(arguments: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    from quantize.parity.corpus import pages_of

    model, text = (Path(argument) for argument in arguments) if arguments else (MODEL, TEXT)
    figures = evaluate(model, pages_of(text.read_text("utf-8")))
    record = {"lm_eval": metadata.version("lm_eval"), "transformers": metadata.version("transformers"), **figures}
    print(json.dumps(record, indent=2))
    if not arguments:
        RECORD.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
