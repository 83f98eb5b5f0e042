"""Makes a 4-bit checkpoint: ours against the usual three lines, each in its own process.

`benchmark.py` has the commands; here are the contenders and the models of random weights that they work on.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

POCKET = Path(__file__).resolve().parents[1] / "tests" / "models" / "pocket-gpt2"
LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
SHAPES: dict[str, dict[str, Any]] = {
    "distilgpt2": {"model_type": "gpt2", "vocab_size": 50_257, "n_embd": 768, "n_layer": 6, "n_head": 12},
    "smollm2-135m": {
        **{"model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
    "1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32},
    "20gb": LLAMA | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 41},
}
SHARD = 5_000_000_000
SEED_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Task:
    """What a contender makes: from `source` into the new folder `output`, measured on `corpus` by the whole job."""

    source: str
    output: str
    device: str
    corpus: str = "builtin"
    gpu_limit: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Of one run, after its libraries are loaded: seconds; most bytes of memory, of which `libraries` were there
    before; most bytes of GPU memory; bytes read and written by calls (what is mapped into memory is not counted)."""

    seconds: float
    memory: int
    libraries: int
    gpu_memory: int
    read: int
    written: int
    size: int


def made_up(shape: str, folder: Path) -> Path:
    """A model of random weights in bfloat16 (GPT-2's in float32, as on the Hub), with the pocket tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quantize.formats.safetensors import Shard, Slot, file_names, in_files, write_index

    dtype = torch.float32 if shape == "distilgpt2" else torch.bfloat16
    options = dict(SHAPES[shape])
    config = AutoConfig.for_model(options.pop("model_type"), **options, architectures=None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = set(model.all_tied_weights_keys)
    numbers = torch.randn(SEED_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    slots = [Slot(name, dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items() if name not in tied]
    groups = in_files(slots, lambda slot: slot.size, SHARD)
    folder.mkdir(parents=True)
    names = file_names(len(groups))
    for name, group in zip(names, groups, strict=True):
        with Shard(folder / name, group) as shard:
            for slot in group:
                count = math.prod(slot.shape or ())
                for first in range(0, count, SEED_NUMBERS):
                    shard.write(slot.name, numbers[: min(SEED_NUMBERS, count - first)], first)
    if len(names) > 1:
        write_index(folder, names)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return folder


def three_lines(task: Task) -> None:
    """The three lines: load in 4 bits, save."""
    _load_in_4_bits(task).save_pretrained(task.output)


def ours(task: Task) -> None:
    from quantize import methods
    from quantize.progress import Silent
    from quantize.records import Checkout, FileRecord, Recipe, Source

    # as a source is after it has been fetched; hashing belongs to fetching, and the three lines do none
    folder = Path(task.source)
    files = tuple(FileRecord(path.name, path.stat().st_size, "") for path in sorted(folder.iterdir()))
    config = json.loads((folder / "config.json").read_text())
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[config["dtype"]]
    made_of = Source("made-up", None, None, None, files, "", config["model_type"], dtype, 0, False)
    Path(task.output).mkdir()
    checkout = Checkout(made_of, folder)
    methods.quantize(methods.Job(checkout, Path(task.output), Recipe(name="rtn"), task.device, Silent()))


def obvious_job(task: Task) -> None:
    """Load in 4 bits, save, and the perplexity of both by the loop of the Hugging Face guide over the whole text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantize.parity import corpus

    model = _load_in_4_bits(task)
    model.save_pretrained(task.output)
    original = AutoModelForCausalLM.from_pretrained(task.source, device_map={"": task.device}).eval()
    text = AutoTokenizer.from_pretrained(task.source)(corpus.load(task.corpus).text, return_tensors="pt", verbose=False)
    for contender in (original, model.eval()):
        guide_loop(contender, text.input_ids, min(1024, contender.config.max_position_embeddings), task.device)


def our_job(task: Task) -> None:
    """`quantize run --recipe rtn`: hashes, structure, verdict, generation, figures and card included."""
    from quantize import pipeline
    from quantize.progress import Silent
    from quantize.records import EvaluationSettings, Recipe

    settings = EvaluationSettings(corpus=task.corpus, require="degraded")
    request = pipeline.RunRequest(
        task.source, output=Path(task.output), recipe=Recipe(name="rtn"), settings=settings, device=task.device
    )
    pipeline.run(request, Silent())


def guide_loop(model: Any, text: Any, window: int, device: str, stride: int = 512) -> float:
    import torch

    total, counted, scored_until = 0.0, 0, 0
    for begin in range(0, text.shape[1], stride):
        end = min(begin + window, text.shape[1])
        tokens = text[:, begin:end].to(device)
        labels = tokens.clone()
        labels[:, : tokens.shape[1] - (end - scored_until)] = -100
        with torch.no_grad():
            loss = model(tokens, labels=labels).loss
        own = int((labels != -100).sum()) - 1
        total, counted, scored_until = total + float(loss) * own, counted + own, end
        if end == text.shape[1]:
            break
    return math.exp(total / counted)


def _load_in_4_bits(task: Task) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    half = AutoConfig.from_pretrained(task.source).dtype
    half = torch.float16 if half in (None, torch.float32) else half
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=half
    )
    return AutoModelForCausalLM.from_pretrained(
        task.source, quantization_config=config, dtype=half, device_map={"": task.device}
    )


OURS, THREE_LINES = "ours", "from_pretrained, save_pretrained"
OUR_JOB, OBVIOUS = "quantize run", "the obvious script"
CONTENDERS: dict[str, Callable[[Task], None]] = {
    THREE_LINES: three_lines,
    OURS: ours,
    OBVIOUS: obvious_job,
    OUR_JOB: our_job,
}


def cost(name: str, task: Task) -> Cost:
    """What a contender costs in this process."""
    import psutil
    import torch
    import transformers  # noqa: F401 - loaded before the clock starts, for every contender alike
    from bitsandbytes import functional  # noqa: F401
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: F401

    from quantize import pipeline  # noqa: F401
    from quantize.formats.bitsandbytes import checkpoint  # noqa: F401

    on_gpu = task.device.startswith("cuda")
    if on_gpu:
        torch.zeros(1, device=task.device)
        if task.gpu_limit:
            whole = torch.cuda.get_device_properties(task.device).total_memory
            torch.cuda.set_per_process_memory_fraction(task.gpu_limit / whole)
        torch.cuda.reset_peak_memory_stats()
    process = psutil.Process()
    libraries, before = process.memory_info().rss, process.io_counters()
    begun = time.perf_counter()
    CONTENDERS[name](task)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    after = process.io_counters()
    return Cost(
        seconds=seconds,
        memory=_most_memory(),
        libraries=libraries,
        gpu_memory=torch.cuda.max_memory_reserved() if on_gpu else 0,
        read=after.read_chars - before.read_chars,
        written=after.write_chars - before.write_chars,
        size=sum(path.stat().st_size for path in Path(task.output).rglob("*.safetensors")),
    )


def _most_memory() -> int:
    """Most bytes that this process ever held; unlike `getrusage` it does not count what its parent held before."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024


def line(name: str, task: str) -> str:
    """One contender's one run as a line of JSON, for the process that started this one."""
    return json.dumps(asdict(cost(name, Task(**json.loads(task)))))
