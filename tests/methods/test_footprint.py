"""Calibration takes bounded memory, is refused where that is not free, and does not depend on what runs together."""

from __future__ import annotations

import contextlib
import shutil
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
from quantize.progress import Silent
from tests.conftest import POCKET
from tests.methods.test_calibrated import LITTLE, asked
from tests.publishing.workspace import Place


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


MEASURED = """
import re, sys
from pathlib import Path
from quantize import methods, source
from quantize.progress import Silent
from quantize.methods.calibration import quantizer
import transformers.models.llama.modeling_llama

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

recipe = methods.recipe_of({"name": "calibrated", "calibration_windows": 16, "calibration_length": 256, "epochs": 1})
checkout = source.fetch(sys.argv[1], revision=None, trust_remote_code=False, progress=Silent())
before = most()
methods.quantize(methods.Job(checkout, Path(sys.argv[2]), recipe, "cpu", Silent()))
print(most() - before)
"""


@pytest.mark.slow
def test_the_most_that_calibration_takes(place: Place, tmp_path: Path) -> None:
    """A small model with many tokens, of which whole logits of 16 windows alone would be a gigabyte."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=60_000, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, tmp_path / "wide")
    (tmp_path / "out").mkdir()
    ended = place.warm.script(MEASURED, str(tmp_path / "wide"), str(tmp_path / "out"), cwd=tmp_path)
    assert ended.code == 0 and int(ended.out) < 300_000_000, ended
