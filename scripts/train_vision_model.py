"""Trains a small model that reads pictures, on the pictures that quantize draws and on text that comes with Python.

For trying quantize on: the pictures are of another seed than those that parity asks about, the text is that of the
pocket model, without the built-in corpus. About 38 million parameters: a SigLIP tower and a Llama decoder in a LLaVA.
Run it from the root of the repository; it is meant for a GPU, and draws pictures on all cores before it trains:

    python scripts/train_vision_model.py OUTPUT_FOLDER [--minutes 4] [--pictures 24000]

The folder receives float16 weights, tokenizer, processor, chat template and a card with the figures of the run.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from train_pocket_model import DEVICE, END, gather_corpus, train_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from quantize.parity.pictures import SIDE, Picture, picture

PATCH = 28
PATCHES = (SIDE // PATCH) ** 2
IMAGE = "<image>"
TRAINING_SEED, HELD_OUT_SEED = 1, 2
IGNORED = -100
"""The label of a position that is not trained on."""
Row = tuple[list[int], list[int]]
"""Tokens of a question about a picture with its answer, and their labels: the answer's alone."""
TEMPLATE = (
    "{% for message in messages %}{{ 'User: ' if message.role == 'user' else 'Answer: ' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


@dataclass(frozen=True)
class Plan:
    """`tower` and `decoder` are width, layers, heads and inner width; `question_length` is without the picture."""

    tower: tuple[int, int, int, int] = (384, 8, 6, 1536)
    decoder: tuple[int, int, int, int] = (512, 6, 8, 1408)
    vocabulary: int = 4160
    window: int = 512
    question_length: int = 64
    pictures_a_step: int = 96
    windows_a_step: int = 12
    warm_up: int = 200
    peak_rate: float = 8e-4
    weight_decay: float = 0.05
    largest_gradient: float = 1.0
    held_out: int = 128
    seed: int = 20


PLAN = Plan()


def drawn(number: int) -> Picture:
    return picture(TRAINING_SEED, number)


def draw_all(count: int) -> list[Picture]:
    """Pictures to train on, drawn on all cores."""
    with multiprocessing.get_context("fork").Pool() as pool:
        return list(pool.imap(drawn, range(count), chunksize=64))


def new_model(tokenizer: Any) -> Any:
    width, layers, heads, inner = PLAN.tower
    tower = SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    width, layers, heads, inner = PLAN.decoder
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    decoder = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=PLAN.vocabulary,
        max_position_embeddings=PLAN.window,
        **ends,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).to(DEVICE)


def conversations(tokenizer: Any, pictures: list[Picture]) -> list[list[Row]]:
    """Of each picture, its questions with their answers."""
    exercises = [exercise for item in pictures for exercise in item.exercises]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    begin = [*tokenizer("User: ").input_ids, *[image] * PATCHES]
    questions = tokenizer([f"{question}\nAnswer:" for question, _ in exercises]).input_ids
    answers = tokenizer([f" {answer}{END}" for _, answer in exercises]).input_ids
    rows = (
        ([*begin, *before, *after], [IGNORED] * (len(begin) + len(before)) + after)
        for before, after in zip(questions, answers, strict=True)
    )
    return [[next(rows) for _ in item.exercises] for item in pictures]


def batches(tokenizer: Any, pictures: list[Picture], tokens: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Without end, in turn: pictures with a question each, and windows of text."""
    chance, length = random.Random(PLAN.seed), PATCHES + PLAN.question_length
    asked = conversations(tokenizer, pictures)
    while True:
        chosen = chance.sample(range(len(pictures)), min(PLAN.pictures_a_step, len(pictures)))
        rows = [chance.choice(asked[number]) for number in chosen]
        ids, labels = (
            torch.tensor([row[:length] + [fill] * (length - len(row)) for row in column])
            for column, fill in zip(zip(*rows, strict=True), (tokenizer.eos_token_id, IGNORED), strict=True)
        )
        pixels = torch.from_numpy(np.stack([pictures[number].pixels for number in chosen])).to(DEVICE)
        yield {
            "input_ids": ids.to(DEVICE),
            "labels": labels.to(DEVICE),
            "pixel_values": pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0,
        }
        starts = [chance.randrange(len(tokens) - PLAN.window) for _ in range(PLAN.windows_a_step)]
        windows = torch.stack([tokens[start : start + PLAN.window] for start in starts]).to(DEVICE)
        yield {"input_ids": windows, "labels": windows}


def train(model: Any, source: Iterator[dict[str, torch.Tensor]], minutes: float) -> int:
    """Train for so long, the rate falling with the time that is left; the number of steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PLAN.peak_rate, betas=(0.9, 0.95), weight_decay=PLAN.weight_decay
    )
    began, step, losses = time.monotonic(), 0, {"pictures": 0.0, "text": 0.0}
    model.train()
    while (elapsed := (time.monotonic() - began) / (60 * minutes)) < 1:
        step += 1
        rate = PLAN.peak_rate * min(1.0, step / PLAN.warm_up) * 0.5 * (1 + math.cos(math.pi * elapsed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        for kind in losses:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                loss = model(**next(source)).loss
            torch.autograd.backward(loss)
            losses[kind] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), PLAN.largest_gradient)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step < 5:
            shown = ", ".join(f"{kind} {value:.3f}" for kind, value in losses.items())
            print(f"step {step}, {100 * elapsed:.0f} % of the time, loss of {shown}", flush=True)
    return step


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """A folder as a repo on the Hub has it."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    images = {"image_processor_type": "SiglipImageProcessor", "size": size}
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
        "image_processor": images | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


@torch.inference_mode()
def right_answers(folder: Path) -> float:
    """The share of questions about pictures never trained on that the saved model answers to the letter."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    right = 0
    for number in range(PLAN.held_out):
        item = picture(HELD_OUT_SEED, number)
        content = [{"type": "image", "image": Image.fromarray(item.pixels)}, {"type": "text", "text": item.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(DEVICE)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        written = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right += written == dict(item.exercises)[item.question]
        if number < 8:
            print(f"{item.question} {written} ({dict(item.exercises)[item.question]})")
    return right / PLAN.held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, after the pictures are drawn")
    parser.add_argument("--pictures", type=int, default=24_000)
    asked = parser.parse_args()
    torch.manual_seed(PLAN.seed)
    began = time.monotonic()
    pictures = draw_all(asked.pictures)
    print(f"drew {len(pictures)} pictures in {time.monotonic() - began:.0f} s", flush=True)
    corpus = gather_corpus(Path(sysconfig.get_path("stdlib")))
    words = [f"{question} {answer}" for item in pictures[:2000] for question, answer in item.exercises]
    tokenizer = train_tokenizer([*corpus.training, *words])
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.pad_token, tokenizer.model_max_length = END, PLAN.window
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(END.join(corpus.training)).ids)
    model = new_model(tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {len(tokens):,} tokens of text, {time.monotonic() - began:.0f} s", flush=True)
    steps = train(model, batches(tokenizer, pictures, tokens), asked.minutes)
    save(model, tokenizer, asked.folder)
    share = right_answers(asked.folder)
    (asked.folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: image-text-to-text\n---\n\n# A small model that reads "
        f"pictures\n\nTrained by `scripts/train_vision_model.py` for {asked.minutes:g} minutes ({steps} steps) on "
        f"{len(pictures)} drawn pictures and on text that comes with Python: {parameters:,} parameters. It answers "
        f"{100 * share:.0f} % of {PLAN.held_out} questions about pictures that it never saw to the letter.\n"
    )
    print(f"{asked.folder}: {steps} steps, {100 * share:.0f} % right, {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
