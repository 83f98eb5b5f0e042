"""Trains a small mixture of experts on text that comes with Python, for trying quantize on.

The text is that of the pocket model, without the built-in corpus. About 41 million parameters, 38 million of them in
experts: a Qwen3-MoE with 32 experts a layer, of which 4 get a token. Run it from the root of the repository, on a GPU:

    python scripts/train_expert_model.py OUTPUT_FOLDER [--minutes 4]

The folder receives float16 weights, tokenizer and a card with the figures of the run.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from train_pocket_model import DEVICE, encode, gather_corpus, train_tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@dataclass(frozen=True)
class Plan:
    width: int = 256
    layers: int = 6
    heads: int = 8
    experts: int = 32
    experts_a_token: int = 4
    expert_width: int = 256
    window: int = 512
    batch: int = 32
    warm_up: int = 100
    peak_rate: float = 1e-3
    weight_decay: float = 0.1
    largest_gradient: float = 1.0
    seconds_between_lines: float = 15.0
    held_out: int = 32
    seed: int = 20


PLAN = Plan()


def new_model(tokenizer: Any) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=PLAN.width,
        num_hidden_layers=PLAN.layers,
        num_attention_heads=PLAN.heads,
        num_key_value_heads=PLAN.heads,
        head_dim=PLAN.width // PLAN.heads,
        intermediate_size=4 * PLAN.width,
        moe_intermediate_size=PLAN.expert_width,
        num_experts=PLAN.experts,
        num_experts_per_tok=PLAN.experts_a_token,
        norm_topk_prob=True,
        max_position_embeddings=PLAN.window,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3MoeForCausalLM(config).to(DEVICE)


def train(model: Any, tokens: torch.Tensor, minutes: float, most_steps: int) -> int:
    """Trains for so long and returns the number of steps; the loss includes that of an uneven router."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PLAN.peak_rate, betas=(0.9, 0.95), weight_decay=PLAN.weight_decay
    )
    began = last_line = time.monotonic()
    step, done = 0, 0.0
    while done < 1 and step < most_steps:
        for group in optimizer.param_groups:
            rate = min(1.0, (step + 1) / PLAN.warm_up) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
            group["lr"] = PLAN.peak_rate * rate
        starts = torch.randint(len(tokens) - PLAN.window + 1, (PLAN.batch,))
        windows = torch.stack([tokens[start : start + PLAN.window] for start in starts.tolist()])
        loss = model(windows, labels=windows, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), PLAN.largest_gradient)
        optimizer.step()
        step, done = step + 1, (time.monotonic() - began) / (60 * minutes)
        if time.monotonic() - last_line >= PLAN.seconds_between_lines:
            last_line = time.monotonic()
            print(f"{last_line - began:6.0f} s  step {step}  training loss {loss.item():.3f}", flush=True)
    return step


@torch.inference_mode()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """Over the first whole windows."""
    windows = tokens[: len(tokens) // PLAN.window * PLAN.window].view(-1, PLAN.window)[: PLAN.held_out]
    losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small mixture of experts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="at most, to see that everything works")
    asked = parser.parse_args()
    torch.manual_seed(PLAN.seed)
    torch.set_float32_matmul_precision("high")
    corpus = gather_corpus(Path(sysconfig.get_path("stdlib")))
    tokenizer = train_tokenizer(corpus.training)
    tokenizer.model_max_length = PLAN.window
    tokens, reserved = encode(tokenizer, corpus.training), encode(tokenizer, [corpus.reserved])
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text", flush=True)
    steps = train(model, tokens, asked.minutes, asked.steps)
    held_out = perplexity(model.eval(), reserved)
    model.half().save_pretrained(asked.folder)
    tokenizer.save_pretrained(asked.folder)
    (asked.folder / "README.md").write_text(
        f"---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-generation\n---\n\n"
        f"# A small mixture of experts\n\n"
        f"Trained by `scripts/train_expert_model.py` in {steps} steps on text that comes with Python: "
        f"{model.num_parameters():,} parameters, {PLAN.experts} experts a layer. "
        f"Perplexity {held_out:.2f} on topics of Python's help that it never saw.\n"
    )
    print(f"{asked.folder}: {steps} steps, perplexity {held_out:.2f} on text that it never saw")


if __name__ == "__main__":
    main()
