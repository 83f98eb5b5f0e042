"""The main job on a CUDA device; run by hand with `pytest -m gpu`, figures recorded in docs/gpu.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt

from quantize import methods, package, pipeline
from quantize.formats.bitsandbytes import int8
from quantize.formats.bitsandbytes.packing import table
from quantize.methods.rounding import gptq
from quantize.progress import Silent
from quantize.publishing.audit import require_sound
from quantize.records import EvaluationSettings, Recipe
from tests.conftest import POCKET
from tests.formats.test_writer import RECIPES, by_stock, fetched, require_equal, stream
from tests.hub import LoopbackHub
from tests.hub.distilgpt2 import seed_distilgpt2
from tests.methods.test_calibrated import LITTLE, require_pipeline_and_lora
from tests.package.test_card import snippets
from tests.publishing.workspace import MODEL, TARGET

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SETTINGS = EvaluationSettings(new_tokens=16, require="degraded")


def as_a_person(hub: LoopbackHub, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `command` in a process of its own, whose Hub is the loopback one and whose cache is empty."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = own | hub.env(home=folder / "hf-home")
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> package.Package:
    output = tmp_path_factory.mktemp("gpu") / "pocket-gpt2-bnb-4bit"
    request = pipeline.RunRequest(str(POCKET), output=output, recipe=Recipe(name="rtn"), settings=SETTINGS)
    return pipeline.run(request, Silent()).package


def test_auto_takes_the_gpu_and_the_package_passes(on_gpu: package.Package) -> None:
    assert on_gpu.provenance.quantized.device.startswith("cuda")
    assert on_gpu.evidence.environment.device_name == torch.cuda.get_device_name()
    assert on_gpu.evidence.verdict.passed and on_gpu.evidence.candidate_dtype == "float16"


def test_a_separate_process_loads_and_generates(on_gpu: package.Package) -> None:
    script = (
        "import sys; from transformers import AutoModelForCausalLM, pipeline\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "text = pipeline('text-generation', model=sys.argv[1])('The function', max_new_tokens=5, do_sample=False)\n"
        "print(model.is_loaded_in_4bit, model.device.type, len(text[0]['generated_text']) > 12)"
    )
    outcome = subprocess.run([sys.executable, "-c", script, str(on_gpu.folder)], capture_output=True, text=True)
    assert outcome.stdout.split() == ["True", "cuda", "True"], outcome.stderr


def test_the_snippets_of_the_card_run(on_gpu: package.Package) -> None:
    folders = (on_gpu.folder.parent, on_gpu.folder)
    used, checked = (
        subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
        for code, folder in zip(snippets(on_gpu.folder), folders, strict=True)
    )
    assert used.count("Hello, I'm a language model,") == 4 and "torch.Size([1, " in used
    assert checked == "all checksums match\n"


@pytest.mark.parametrize("recipe", [{"bits": 8}, {"quant_type": "fp4", "double_quant": False}], ids=["int8", "fp4"])
def test_other_recipes(tmp_path: Path, recipe: dict[str, object]) -> None:
    request = pipeline.RunRequest(
        str(POCKET),
        output=tmp_path / "out",
        recipe=Recipe(**{"name": "stock", **recipe}),  # type: ignore[arg-type]
        settings=SETTINGS,
    )
    made = pipeline.run(request, Silent()).package
    assert not [check for check in made.evidence.checks if not check.passed]


def test_eight_bits_are_chosen_as_on_a_cpu_and_lossless(tmp_path: Path) -> None:
    """Products agree with those of the kernels; what is chosen on text of the pocket model's own is what stock has."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 256, generator=generator).half() for rows in (128, 64))
    inputs[3, 40], inputs[7, 41] = 9.0, -4.0
    for threshold in (6.0, 3.0, 1.0):
        stock = Linear8bitLt(256, 128, bias=False, has_fp16_weights=False, threshold=threshold)
        stock.load_state_dict({"weight": weight})
        expected = stock.to("cuda").eval()(inputs.cuda()).float()
        seen, _ = int8.read(inputs.cuda().float(), threshold)
        assert torch.allclose(seen @ int8.stored(weight.cuda()).T, expected, atol=0.05)
    request = pipeline.RunRequest(str(POCKET), output=tmp_path / "out", recipe=Recipe(bits=8), settings=SETTINGS)
    made = pipeline.run(request, Silent()).package
    assert made.provenance.recipe.name == "int8" and made.provenance.quantized.outlier_threshold == 6.0
    assert made.evidence.scores is not None and made.evidence.scores.kld.mean.value < 0.004
    require_sound(made)


def test_a_package_made_on_the_gpu_verifies_on_the_cpu(on_gpu: package.Package) -> None:
    evidence = pipeline.verify(pipeline.VerifyRequest(str(on_gpu.folder), str(POCKET), SETTINGS, "cpu"), Silent())
    assert evidence.verdict.passed and evidence.scores is not None and on_gpu.evidence.scores is not None
    assert evidence.scores.kld.mean.value == pytest.approx(on_gpu.evidence.scores.kld.mean.value, rel=0.05)


def test_what_does_not_fit_is_spread_over_gpu_and_cpu(
    on_gpu: package.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = on_gpu.evidence.scores
    cached = pipeline.verify(
        pipeline.VerifyRequest(str(on_gpu.folder), str(POCKET), SETTINGS, "cuda:0", reference_cache=tmp_path / "kept"),
        Silent(),
    )
    rooms = {"cuda:0": 3_000_000, "cpu": 100_000_000}
    monkeypatch.setattr("quantize.devices.usable_memory", lambda device: rooms[device])
    spread = pipeline.verify(pipeline.VerifyRequest(str(on_gpu.folder), str(POCKET), SETTINGS, "cuda:0"), Silent())
    assert spread.reference_dtype == "float16" and set(spread.reference_devices) == {"cuda:0", "cpu"}
    for other in (cached.scores, spread.scores):
        assert together is not None and other is not None
        assert other.kld.mean.value == pytest.approx(together.kld.mean.value, rel=0.01)
    assert spread.verdict.passed and cached.verdict.passed
    assert cached.reference_cache is not None and cached.reference_cache.mean_kld < 1e-7


def test_the_kernel_rounds_as_plain_torch_does() -> None:
    """The same codes but where a float32 sum decides between two neighbours, and the same errors."""
    generator = torch.Generator().manual_seed(0)
    levels = gptq.Levels.of(table("nf4"))
    inputs = torch.randn(500, 64, generator=generator)
    factor = gptq.inverse_factor(inputs.T @ inputs / 500)
    target = torch.randn(64, 3000, generator=generator)
    scales = target.abs().amax(0) * torch.tensor([0.8, 1.0, -0.9])[:, None]
    there = gptq.Levels.of(table("nf4", "cuda"))
    places, errors = gptq.compensate(target, factor, scales[0], levels)
    on_gpu = gptq.compensate(target.cuda(), factor.cuda(), scales[0].cuda(), there)
    alike = (places == on_gpu[0].cpu()).all(0)
    assert alike.float().mean() > 0.99 and torch.allclose(errors[:, alike], on_gpu[1].cpu()[:, alike], atol=1e-4)
    changes = gptq.squared_errors(target.cuda(), factor.cuda(), scales.cuda(), there).cpu()
    close = torch.isclose(changes, gptq.squared_errors(target, factor, scales, levels), rtol=1e-3)
    assert changes.shape == (3, 3000) and close.float().mean() > 0.99


def test_a_cuda_graph_chooses_what_plain_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = gptq.Levels.of(table("nf4", "cuda"))
    options = gptq.GptqOptions(group=32, passes=2)
    for rows, inputs in ((200, 128), (96, 320)):
        weight, activations, gradients = (
            torch.randn(*shape, generator=generator) for shape in ((rows, inputs), (999, inputs), (999, rows))
        )
        hessian, output_hessian = (samples.T @ samples / 999 for samples in (activations, gradients))
        weight, hessian, output_hessian = weight.cuda(), hessian.cuda(), output_hessian.cuda()
        with monkeypatch.context() as plainly:
            plainly.setattr(gptq, "GraphedFunction", lambda function: function)
            plain = gptq.round_compensated(weight, hessian, levels, options=options, output_hessian=output_hessian)
        replayed = gptq.round_compensated(weight, hessian, levels, options=options, output_hessian=output_hessian)
        assert torch.equal(plain.codes, replayed.codes) and torch.equal(plain.scales, replayed.scales)


@pytest.mark.parametrize("recipe", RECIPES, ids=["nf4", "nf4-plain", "fp4", "fp4-plain", "int8"])
def test_streamed_bytes_are_those_of_loading_and_saving(tmp_path: Path, recipe: Recipe) -> None:
    checkout = fetched(POCKET)
    assert stream(checkout, tmp_path / "mine", recipe, device="cuda:0") == []
    by_stock(checkout, tmp_path / "theirs", recipe, "cuda:0")
    require_equal(tmp_path / "mine", tmp_path / "theirs")


def test_the_calibrated_recipe(tmp_path: Path) -> None:
    """Better than stock on the same windows, under a size budget still better; both write text and can be trained."""
    made = {}
    for budget in (1.0, 1.2):
        recipe = methods.replace(LITTLE, size_budget=budget)
        request = pipeline.RunRequest(str(POCKET), output=tmp_path / f"{budget}", recipe=recipe, settings=SETTINGS)
        made[budget] = pipeline.run(request, Silent()).package
        require_pipeline_and_lora(made[budget].folder, "cuda")
    plain, larger = (one.evidence for one in made.values())
    assert all(check.passed for check in (*plain.checks, *larger.checks)) and plain.scores and larger.scores
    assert plain.controls[0].kld is not None
    assert plain.scores.kld.mean.value < 0.7 * plain.controls[0].kld.value
    assert larger.scores.kld.mean.value < plain.scores.kld.mean.value
    on_cpu = pipeline.verify(pipeline.VerifyRequest(str(made[1.0].folder), str(POCKET), SETTINGS, "cpu"), Silent())
    assert on_cpu.scores and on_cpu.scores.kld.mean.value == pytest.approx(plain.scores.kld.mean.value, rel=0.1)


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1."), reason="this client has cards checked at a fixed address"
)
def test_the_whole_job_over_http(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        seed_distilgpt2(hub, POCKET)
        arguments = ("run", "--bits", "4", "--recipe", "rtn", "--require", "degraded", "--json")
        made = as_a_person(hub, tmp_path, "-m", "quantize", *arguments)
        assert made.returncode == 0, made.stderr
        pushed = as_a_person(hub, tmp_path, "-m", "quantize", "push", "distilgpt2-bnb-4bit", "--to", TARGET, "--json")
        assert pushed.returncode == 0, pushed.stderr
        assert json.loads(pushed.stdout)["commit"] == hub.head(TARGET)
        assert MODEL in hub.files(TARGET)["README.md"].decode()
