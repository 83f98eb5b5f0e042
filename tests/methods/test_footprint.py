"""Calibration takes bounded memory, is refused where that is not free, and does not depend on what runs together."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize import memory, methods, source
from quantize.errors import DeviceError
from quantize.formats.bitsandbytes import checkpoint
from quantize.logits import SlicedLogits
from quantize.methods.calibration import calibration_text, gradients
from quantize.methods.calibration.gradients import OutputGradient
from quantize.methods.calibration.layers import DecoderLayers
from quantize.methods.calibration.quantizer import TOKENS_AT_ONCE
from quantize.progress import Silent
from tests.conftest import POCKET
from tests.methods.test_calibrated import LITTLE, asked


@pytest.fixture(scope="module")
def pocket() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(POCKET).float().eval().requires_grad_(False)


def read(model: Any, batch: int) -> dict[str, OutputGradient]:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    names = [name for name in checkpoint.quantized_names(checkout, LITTLE) if ".h.1." in name]
    decoder = DecoderLayers.of(model, names)
    tokens = torch.randint(0, model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    found = gradients.output_gradients(
        model, decoder.layers, [*names, decoder.name(1)], tokens, "cpu", batch, False, 3, Silent()
    )
    return dict(found)


def test_gradients_do_not_depend_on_what_is_kept_or_runs_together(pocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Window by window, in slices and with layers that run twice: as with all windows, whole logits and kept layers."""
    frugal = read(pocket, batch=1)
    assert not any("forward" in vars(module) for module in pocket.modules())
    monkeypatch.setattr(gradients, "_recomputed", lambda layers: contextlib.nullcontext())
    monkeypatch.setattr(SlicedLogits, "of", lambda model, tokens: SlicedLogits(model, model.config.vocab_size))
    plain = read(pocket, batch=4)
    assert frugal.keys() == plain.keys() and len(plain) == 5
    for name, gradient in plain.items():
        torch.testing.assert_close(frugal[name].hessian, gradient.hessian, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(frugal[name].token_weights, gradient.token_weights, rtol=1e-3, atol=1e-5)


def test_text_does_not_depend_on_what_is_written_side_by_side(pocket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    for cache_bytes in (1, 1 << 30):
        monkeypatch.setitem(calibration_text.CACHE_BYTES, "cpu", cache_bytes)
        texts.append(calibration_text.generated(pocket, asked(LITTLE), 12, "cpu", False, Silent(), (1.0, 1.4)))
    assert torch.equal(*texts)


def test_what_does_not_fit_into_half_of_the_free_memory_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    job = methods.Job(checkout, tmp_path, LITTLE, "cpu", Silent())
    for free, stage in ((10_000_000, "loading weights"), (60_000_000, "writing calibration text")):
        monkeypatch.setattr(memory, "free", lambda free=free: free)
        with pytest.raises(DeviceError, match=f"{stage} for pocket-gpt2 takes about .* GB of memory on cpu, where"):
            methods.quantize(job)
    assert not list(tmp_path.glob("*"))


TOLD = 1_470_000_000
LIMITED = """
import re, resource, sys
from pathlib import Path
import bitsandbytes, matplotlib.pyplot, scipy.stats, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from quantize import memory
from quantize.cli import main

def taken(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

told, *arguments = sys.argv[1:]
allowed = taken("VmData") + int(told)
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
before = taken("VmHWM")
assert memory.free() <= int(told)
try:
    main(["run", *arguments])
finally:
    print(taken("VmHWM") - before, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps to the limit, and tells the peak")
def test_no_stage_of_auto_takes_half_of_what_is_free(tmp_path: Path) -> None:
    """Of a small model with many tokens; the logits of one micro-batch, their softmax and their gradient take more."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    vocabulary, windows, length = 60_000, 8, 128
    assert 3 * 4 * vocabulary * min(windows * length, TOKENS_AT_ONCE["cpu"]) > TOLD / 2
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **shape)
    )
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    model.half().save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, tmp_path / "wide")
    few = {"calibration-windows": windows, "calibration-length": length, "window": 64, "max-windows": 16}
    options = [f"--{name}={number}" for name, number in {**few, "new-tokens": 4}.items()]
    command = [sys.executable, "-c", LIMITED, str(TOLD), str(tmp_path / "wide"), "--output", str(tmp_path / "out")]
    ended = subprocess.run([*command, "--device=cpu", "--force", *options], stderr=subprocess.PIPE, text=True)
    assert ended.returncode in (0, 3), ended.stderr
    folder = tmp_path / ("out" if ended.returncode == 0 else "out-refused")
    evidence = json.loads((folder / "parity.json").read_text("utf-8"))
    assert [attempt["failure"] for attempt in evidence["attempts"]] == [""] * 3
    assert int(ended.stderr.splitlines()[-1]) < TOLD / 2, ended.stderr
