"""Trains the pocket GPT-2 that the tests quantize, on text that comes with every Python alone.

The text is the docstrings of the standard library and the topics of Python's own help. About half of the
topics are reserved: they are the toolkit's built-in evaluation text, so neither the tokenizer nor the model
may see any paragraph of them. Which topics those are follows from a hash of their names alone.

Run it from the root of the repository; it takes about a minute on a GPU and one to two hours on two CPU cores:

    python scripts/train_pocket_model.py [OUTPUT_FOLDER] [--steps STEPS] [--library /usr/lib/python3.11]

The folder (by default tests/models/pocket-gpt2) receives the float16 weights, the tokenizer, the
configuration and a model card whose every figure comes from the run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import math
import platform
import re
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Plan:
    vocabulary: int = 4096
    width: int = 192
    layers: int = 4
    heads: int = 6
    window: int = 256
    dropout: float = 0.1
    batch: int = 16
    steps: int = 4000
    warm_up: int = 200
    peak_rate: float = 2e-3
    weight_decay: float = 0.1
    largest_gradient: float = 1.0
    steps_between_checks: int = 100
    seconds_between_lines: float = 15.0
    validation_share: float = 0.05
    seed: int = 20


@dataclass(frozen=True)
class Corpus:
    """Documents, each a run of paragraphs; no paragraph occurs twice, within a part or between parts."""

    training: list[str]
    validation: list[str]
    reserved: str


@dataclass(frozen=True)
class Training:
    steps: int
    best_step: int
    minutes: float


@dataclass(frozen=True)
class Measurement:
    tokens: int
    model: float
    unigram: float


PLAN = Plan()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END = "<|endoftext|>"
PROMPT = "Hello, I'm a language model,"
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
DEFAULT_FOLDER = Path("tests/models/pocket-gpt2")


def first_byte(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0]


def is_reserved(topic: str) -> bool:
    return first_byte(topic) % 2 == 1


def is_for_validation(module: str) -> bool:
    return first_byte(module) < PLAN.validation_share * 256


def help_topics(library: Path) -> dict[str, str]:
    """The topics of a Python's help, read from its library without running it."""
    module = ast.parse((library / "pydoc_data" / "topics.py").read_bytes())
    (value,) = (statement.value for statement in module.body if isinstance(statement, ast.Assign))
    return dict(ast.literal_eval(value))


def docstrings_by_module(library: Path) -> Iterator[tuple[str, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if LEFT_OUT.intersection(parts):
            continue
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, documented)]
        yield ".".join(parts), "\n\n".join(ast.get_docstring(node) or "" for node in nodes)


def new_paragraphs(text: str, seen: set[str]) -> str:
    """The paragraphs not seen before, whatever their white space; from then on they count as seen."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip())
    return "\n\n".join(kept)


def gather_corpus(library: Path) -> Corpus:
    topics = help_topics(library)
    seen: set[str] = set()  # The reserved topics come first: what they hold, nothing later can hold.
    reserved = new_paragraphs("\n\n".join(topics[name] for name in sorted(topics) if is_reserved(name)), seen)
    modules = dict(docstrings_by_module(library))
    validation = [new_paragraphs(text, seen) for name, text in modules.items() if is_for_validation(name)]
    training = [new_paragraphs(topics[name], seen) for name in sorted(topics) if not is_reserved(name)]
    training += [new_paragraphs(text, seen) for name, text in modules.items() if not is_for_validation(name)]
    return Corpus([text for text in training if text], [text for text in validation if text], reserved)


def train_tokenizer(texts: Iterable[str]) -> Any:
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    alphabet = byte_level.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=PLAN.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=PLAN.window, **special)


def encode(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(END.join(documents)).ids, device=DEVICE)


def whole_windows(tokens: torch.Tensor) -> torch.Tensor:
    count = len(tokens) // PLAN.window
    return tokens[: count * PLAN.window].view(count, PLAN.window)


def new_model(tokenizer: Any) -> Any:
    shape = {"n_embd": PLAN.width, "n_layer": PLAN.layers, "n_head": PLAN.heads, "n_positions": PLAN.window}
    dropout = {"embd_pdrop": PLAN.dropout, "resid_pdrop": PLAN.dropout, "attn_pdrop": 0.0}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **dropout, **ends)
    return GPT2LMHeadModel(config).to(DEVICE)


def loss_on(model: Any, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    windows = whole_windows(tokens)
    return sum(loss_on(model, window[None]).item() for window in windows) / len(windows)


def train(model: Any, tokens: torch.Tensor, validation: torch.Tensor, steps: int) -> Training:
    """Trains for `steps` steps and leaves the model with the weights that were best on the validation text."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PLAN.peak_rate, betas=(0.9, 0.95), weight_decay=PLAN.weight_decay
    )
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, PLAN.warm_up, steps)
    best_loss, best_step, best_weights = math.inf, 0, {}
    began = last_line = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - PLAN.window + 1, (PLAN.batch,))
        windows = torch.stack([tokens[start : start + PLAN.window] for start in starts.tolist()])
        loss = loss_on(model, windows)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), PLAN.largest_gradient)
        optimizer.step()
        schedule.step()
        if step % PLAN.steps_between_checks == 0 or step == steps:
            checked = mean_loss(model.eval(), validation)
            model.train()
            if checked < best_loss:
                best_loss, best_step = checked, step
                best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        if time.monotonic() - last_line >= PLAN.seconds_between_lines or step == steps:
            last_line = time.monotonic()
            print(
                f"{last_line - began:6.0f} s  step {step}/{steps}  training loss {loss.item():.3f}  "
                f"best validation loss {best_loss:.3f} at step {best_step}",
                flush=True,
            )
    model.load_state_dict(best_weights)
    return Training(steps, best_step, (time.monotonic() - began) / 60)


def measure(model: Any, tokens: torch.Tensor, training_tokens: torch.Tensor) -> Measurement:
    counts = torch.bincount(training_tokens, minlength=PLAN.vocabulary) + 1
    predicted = whole_windows(tokens)[:, 1:].flatten()
    unigram_loss = -(counts.double() / counts.sum()).log()[predicted].mean()
    return Measurement(len(predicted), math.exp(mean_loss(model, tokens)), float(unigram_loss.exp()))


def continuation(model: Any, tokenizer: Any) -> str:
    torch.manual_seed(PLAN.seed)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(DEVICE)
    options = {"do_sample": True, "top_k": 40, "max_new_tokens": 60, "pad_token_id": tokenizer.eos_token_id}
    tokens = model.generate(**prompt, **options)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).strip()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def processor() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"


def card(
    library: str, size: int, tokens: int, run: Training, held: Measurement, checked: Measurement, text: str
) -> str:
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, testing, tiny]
---

# pocket-gpt2

A GPT-2 of {size / 1e6:.2f} million parameters, trained from nothing, so that tests have a language model that is
small enough to carry along and has learned enough for a loss of quality to show. It is for testing, not for use:
it knows nothing.

It has {PLAN.layers} layers, {PLAN.heads} heads, width {PLAN.width}, windows of {PLAN.window} tokens, tied
embeddings and a byte-level BPE of {PLAN.vocabulary} tokens, made from the training text alone. The weights are
float16.

## What it learned from

{tokens:,} tokens that come with {library}: the docstrings of the standard library and
part of the topics of Python's help (`pydoc_data.topics`), each paragraph once. The topics whose name has an odd
first byte in its SHA-256 hash are reserved for measuring: no paragraph of theirs was in the training text. The
docstrings of about {PLAN.validation_share:.0%} of the modules are for validation; they chose the step to keep.

It trained for {run.steps} steps of {PLAN.batch} windows ({run.minutes:.1f} minutes on {processor()})
with AdamW at a peak learning rate of {PLAN.peak_rate}, a cosine schedule, weight decay {PLAN.weight_decay} and
dropout {PLAN.dropout}; step {run.best_step} was kept. This was with Python {platform.python_version()}, torch
{torch.__version__} and transformers {transformers.__version__}.

## How well it does

Perplexity in float32, of the weights as saved, over whole windows of {PLAN.window} tokens. The unigram model
knows only how often each token occurs in the training text (plus one).

| Text | Tokens predicted | pocket-gpt2 | Unigram model |
|---|---:|---:|---:|
| Reserved topics | {held.tokens:,} | {held.model:.2f} | {held.unigram:.2f} |
| Validation docstrings | {checked.tokens:,} | {checked.model:.2f} | {checked.unigram:.2f} |

A sampled continuation of `{PROMPT}`:

````text
{text}
````

## How to load it, and how to make it again

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{DEFAULT_FOLDER}")
model = AutoModelForCausalLM.from_pretrained("{DEFAULT_FOLDER}")
```

```bash
python scripts/train_pocket_model.py{"" if run.steps == PLAN.steps else f" --steps {run.steps}"}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the pocket GPT-2 that the tests quantize.")
    parser.add_argument("output_folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--steps", type=int, default=PLAN.steps, help="fewer, to see that everything works")
    parser.add_argument(
        "--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="text to learn from"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.output_folder
    torch.manual_seed(PLAN.seed)

    corpus = gather_corpus(arguments.library)
    tokenizer = train_tokenizer(corpus.training)
    training, validation = encode(tokenizer, corpus.training), encode(tokenizer, corpus.validation)
    reserved = encode(tokenizer, [corpus.reserved])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(training):,} training tokens", flush=True)
    run = train(model, training, validation, arguments.steps)
    save(model, tokenizer, folder)

    saved = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    held_out, checked = measure(saved, reserved, training), measure(saved, validation, training)
    sample = continuation(saved, tokenizer)
    text = card(arguments.library.name, saved.num_parameters(), len(training), run, held_out, checked, sample)
    (folder / "README.md").write_text(text, encoding="utf-8")
    for name, result in {"reserved topics": held_out, "validation docstrings": checked}.items():
        print(f"{name}: perplexity {result.model:.2f}, unigram {result.unigram:.2f}")
    print(f"{run.minutes:.1f} minutes of training; step {run.best_step} kept; saved in {folder}")


if __name__ == "__main__":
    main()
