"""The calibrated recipe: what it writes, that stock libraries read it, and that it is better than nearest rounding."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import model_card
from quantize import methods, pipeline, search, source
from quantize.errors import CorpusError
from quantize.formats.bitsandbytes import checkpoint
from quantize.methods import calibrated
from quantize.methods.calibration import calibration_text, quantizer, static_cache
from quantize.methods.calibration.allocation import Offers, StorageOption
from quantize.methods.calibration.hessian import CenteredHessianAccumulator
from quantize.methods.calibration.options import CalibratedOptions
from quantize.methods.calibration.resume import PreparedParts
from quantize.package import Package
from quantize.package.card import facts
from quantize.parity import corpus_text
from quantize.progress import Silent
from quantize.publishing.audit import require_sound
from quantize.records import CalibrationText, Checkout, EvaluationSettings, Quantized, Recipe
from quantize.resume import ResumeFolder
from tests.conftest import POCKET
from tests.hub import Fault, LoopbackHub

LITTLE = methods.recipe_of({"name": "calibrated", "passes": 0, "calibration_windows": 16, "calibration_length": 128})
SETTINGS = EvaluationSettings(max_windows=16, window=64, new_tokens=4, require="degraded")
TINY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "gpt_neox": {},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 32},
}


def made(output: Path, recipe: Recipe, model: Path = POCKET) -> tuple[Checkout, dict[str, torch.Tensor]]:
    """A checkpoint of `model` in the new folder `output`, and its tensors."""
    output.mkdir()
    checkout = source.fetch(str(model), revision=None, trust_remote_code=False, progress=Silent())
    resume = output.with_name(f"{output.name}-work")
    methods.quantize(methods.Job(checkout, output, methods.normalized(recipe), "cpu", Silent(), "", resume))
    return checkout, load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def package(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    output = tmp_path_factory.mktemp("calibrated") / "package"
    request = pipeline.RunRequest(str(shallow), output=output, recipe=LITTLE, settings=SETTINGS, device="cpu")
    return pipeline.run(request, Silent()).package


@pytest.mark.slow
def test_it_diverges_much_less_than_stock_and_says_so(package: Package) -> None:
    """Even on a little text; the run measures stock on the same windows, and the card names both."""
    evidence = package.evidence
    (control,) = evidence.controls
    assert evidence.scores and evidence.verdict.passed and all(check.passed for check in evidence.checks)
    assert control.kld is not None
    assert evidence.scores.kld.mean.value < 0.7 * control.kld.value and control.name == "NF4 rounded to nearest"
    assert package.provenance.quantized.calibration_text == CalibrationText(
        "self",
        0,
        16,
        128,
        0,
        package.provenance.quantized.calibration_text.sha256,  # type: ignore[union-attr]
    )
    card = (package.folder / "README.md").read_text()
    assert "on 16 windows of 128 tokens that the original wrote itself" in card and "| NF4 rounded to nearest |" in card
    assert "--recipe calibrated --passes 0 --calibration-windows 16 --calibration-length 128" in card
    assert not list(package.folder.parent.glob("*.unfinished"))
    learned = dataclasses.replace(package.provenance, recipe=methods.replace(LITTLE, epochs=3))
    card = model_card.render(facts(learned, evidence, None, ()))
    assert "and rounding was then learned in 3 epochs on that text" in card and "--epochs 3" in card


@pytest.mark.slow
def test_as_many_bytes_as_stock(package: Package, shallow: Path, tmp_path: Path) -> None:
    """Names, types and shapes are stock's; only an offset in a header takes fewer digits."""
    _, plain = made(tmp_path / "rtn", Recipe("rtn"), shallow)
    tensors = load_file(package.folder / "model.safetensors")
    assert {name: (one.dtype, one.shape) for name, one in tensors.items() if "bitsandbytes" not in name} == {
        name: (one.dtype, one.shape) for name, one in plain.items() if "bitsandbytes" not in name
    }
    assert tensors.keys() == plain.keys()
    assert sum(one.nbytes for one in tensors.values()) <= sum(one.nbytes for one in plain.values())


@pytest.mark.slow
def test_a_killed_run_continues_at_its_first_unfinished_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bytes of a run that nobody killed: the seed decides all of them."""
    tiny("llama", tmp_path / "tiny")
    _, first = made(tmp_path / "whole", LITTLE, tmp_path / "tiny")
    output, work = tmp_path / "package", tmp_path / "package-work"
    rounded: list[int] = []
    whole = quantizer._quantize_layer

    def counting(stream: Any, index: int, *rest: Any) -> Any:
        rounded.append(index)
        if len(rounded) == 2:
            raise KeyboardInterrupt
        return whole(stream, index, *rest)

    monkeypatch.setattr(quantizer, "_quantize_layer", counting)
    with pytest.raises(KeyboardInterrupt):
        made(output, LITTLE, tmp_path / "tiny")
    assert [path.name for path in (work / "layers").glob("layer-*")] == ["layer-0.safetensors"]
    shutil.rmtree(output)
    _, tensors = made(output, LITTLE, tmp_path / "tiny")
    assert rounded == [0, 1, 1] and tensors.keys() == first.keys()
    assert all(torch.equal(tensors[name], first[name]) for name in first)


@pytest.mark.slow
def test_attempts_share_text_gradients_and_what_sizes_would_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sizes after a plain attempt: nothing of that is made twice, and predictions fall as bytes grow."""
    tiny("llama", tmp_path / "tiny")
    calls: list[str] = []

    def counted(name: str, whole: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            calls.append(name)
            return whole(*arguments)

        return counting

    for module, name in ((calibration_text, "prepare"), (quantizer, "output_gradients"), (quantizer, "_compare_forms")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    checkout = source.fetch(str(tmp_path / "tiny"), revision=None, trust_remote_code=False, progress=Silent())
    sizes: list[int] = []
    for number, budget in enumerate((1.0, 1.02, 1.05)):
        job = methods.Job(
            *(checkout, tmp_path / f"{number}", methods.replace(LITTLE, size_budget=budget), "cpu", Silent(), ""),
            resume=tmp_path / f"{number}-work",
            shared=tmp_path / "shared",
        )
        job.output.mkdir()
        methods.quantize(job)
        sizes.append((job.output / "model.safetensors").stat().st_size)
    assert calls == ["prepare", "output_gradients", "_compare_forms"] and sizes == sorted(sizes)
    offers = quantizer.offers(job, asked(LITTLE))
    divergences = [offers.divergence(times) for times in (1.0, 1.02, 1.05, 9.0)]
    assert divergences == sorted(divergences, reverse=True) and divergences[0] > 0 == divergences[-1]


def test_work_of_another_recipe_is_not_taken_up(tmp_path: Path) -> None:
    checkout = source.fetch(str(POCKET), revision=None, trust_remote_code=False, progress=Silent())
    for recipe in (LITTLE, methods.replace(LITTLE, calibration_seed=1)):
        work = ResumeFolder.begin(tmp_path / "work", {"source": checkout.source.fingerprint(), "recipe": recipe})
        assert [path.name for path in work.folder.iterdir()] == ["parts.json"]
        (work.folder / "layer-0.safetensors").touch()


def test_damaged_parts_are_made_again_with_all_that_came_of_them(tmp_path: Path) -> None:
    prepared = torch.arange(8).view(2, 4), CalibrationText("self", 0, 2, 4, 0, "5eed")
    calls: list[str] = []
    expected = Offers({"h.0": (StorageOption(64, 100, 0.5),)}, 10)

    def prepare() -> tuple[torch.Tensor, CalibrationText]:
        calls.append("text")
        return prepared

    def compare() -> Offers:
        calls.append("offers")
        return expected

    def parts() -> PreparedParts:
        """As a run would go through them."""
        finished = PreparedParts.begin(tmp_path / "work", {"recipe": LITTLE})
        tokens, record = finished.text(prepare)
        assert torch.equal(tokens, prepared[0]) and record == prepared[1]
        assert finished.offers(compare) == expected
        return finished

    parts()
    parts()
    assert calls == ["text", "offers"]
    for name in ("tokens.safetensors", "tokens.json", "offers.json"):
        calls.clear()
        (tmp_path / "work" / name).write_bytes(b"")
        assert set(parts().hashes) == {"tokens.safetensors", "tokens.json", "offers.json"}
        assert calls == (["offers"] if name == "offers.json" else ["text", "offers"])


def test_another_content_of_the_calibration_text_is_another_work(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    asked = CalibratedOptions(calibration=str(file))
    hashes = [calibration_text.content_hash(asked) for content in ("one", "two", "one") if file.write_text(content)]
    assert hashes[0] == hashes[2] != hashes[1]
    assert calibration_text.content_hash(CalibratedOptions()) is None


@pytest.mark.slow
def test_with_a_size_budget_it_is_better_within_its_bytes_and_says_how(
    package: Package, shallow: Path, tmp_path: Path
) -> None:
    """Stock transformers loads matrices of both block sizes and of half precision; the same budget gives the same."""
    recipe = methods.replace(LITTLE, size_budget=1.3)
    request = pipeline.RunRequest(
        str(shallow), output=tmp_path / "package", recipe=recipe, settings=SETTINGS, device="cpu"
    )
    larger = pipeline.run(request, Silent()).package
    require_sound(larger)
    quantized = larger.provenance.quantized
    assert quantized.block_32_modules and quantized.half_precision_modules
    assert not package.provenance.quantized.block_32_modules
    assert set(quantized.block_32_modules) <= set(quantized.modules)
    assert set(quantized.half_precision_modules) <= set(quantized.kept_modules)
    assert all(check.passed for check in larger.evidence.checks)
    assert larger.evidence.scores and package.evidence.scores
    assert larger.evidence.scores.kld.mean.value < 0.9 * package.evidence.scores.kld.mean.value
    assert 1.15 < larger.evidence.sizes.package_bytes / package.evidence.sizes.package_bytes <= 1.3
    card = (larger.folder / "README.md").read_text()
    assert f"or 32 in the {len(quantized.block_32_modules)} of {len(quantized.modules)} layers" in card
    assert f"{len(quantized.half_precision_modules)} sensitive layers stay in float16" in card
    assert "--size-budget 1.3" in card
    verified = pipeline.verify(pipeline.VerifyRequest(str(larger.folder), str(shallow), SETTINGS, "cpu"), Silent())
    assert verified.verdict.passed and verified.checks == larger.evidence.checks


def tiny(kind: str, folder: Path) -> Any:
    """A model of two blocks with random weights, saved with the pocket model's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = AutoConfig.for_model(
        kind, **{**shape, **TINY[kind]}, vocab_size=4096, max_position_embeddings=256, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, folder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    """Llama with grouped heads and an untied head, Qwen2 with tied ones and some biases, OPT and GPT-NeoX with biases,
    Gemma 2 with two kinds of attention: stock transformers loads what was written, and every matrix beats nearest."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / kind
    model = tiny(kind, folder)
    errors = {}
    whole = methods.replace(LITTLE, passes=1)
    tried = {"rtn": Recipe(name="rtn"), "calibrated": whole, "learned": methods.replace(whole, epochs=2)}
    for name, recipe in tried.items():
        checkout, _ = made(tmp_path / name, recipe, folder)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, local_files_only=True)
        linear = [module for module in loaded.modules() if type(module).__name__ == "Linear4bit"]
        assert len(linear) == len(checkpoint.quantized_names(checkout, LITTLE)) > 0
        tokens = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(1))
        loaded.dequantize(dtype=torch.float32)
        with torch.no_grad():
            truth, guess = model.float()(tokens).logits.log_softmax(-1), loaded.float()(tokens).logits.log_softmax(-1)
        errors[name] = float((truth.exp() * (truth - guess)).sum(-1).mean())
    assert errors["calibrated"] < errors["rtn"] and errors["learned"] < errors["rtn"]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_cache_with_room_holds_what_a_growing_one_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text; in layers with a sliding window, which hold no more than it, the library's own cache stays."""
    model = tiny(kind, tmp_path / kind).float().eval()
    layers: list[Any] = []

    def watched(cache: Any, room: int) -> Any:
        layers.extend(static_cache.make_static(cache, room).layers)
        return cache

    texts = []
    for make_static in (watched, lambda cache, room: cache):
        monkeypatch.setattr(calibration_text, "make_static", make_static)
        texts.append(calibration_text.generated(model, asked(LITTLE), 48, "cpu", False, Silent(), (1.0, 1.4)))
    assert torch.equal(*texts) and texts[0].shape == (16, 48)
    held = {type(layer).__name__: layer.keys.shape[-2] for layer in layers}
    assert held["StaticLayer"] == 47 and set(held) <= {"StaticLayer", "DynamicSlidingWindowLayer"}
    assert len(held) == (2 if kind == "gemma2" else 1)


@pytest.mark.slow
def test_inputs_that_64_does_not_divide_are_rounded_to_nearest(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=4096, hidden_size=80, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path / "odd")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET / name, tmp_path / "odd")
    _, mine = made(tmp_path / "mine", LITTLE, tmp_path / "odd")
    _, plain = made(tmp_path / "rtn", Recipe(name="rtn"), tmp_path / "odd")
    assert all(torch.equal(mine[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_auto_stops_at_the_first_attempt_that_is_good_enough(tmp_path: Path, shallow: Path) -> None:
    recipe = dataclasses.replace(LITTLE, name="auto", target_grade="good")
    easy = pipeline.RunRequest(str(shallow), output=tmp_path / "easy", recipe=recipe, settings=SETTINGS, device="cpu")
    made = pipeline.run(easy, Silent()).package
    assert [(one.recipe.name, one.chosen) for one in made.evidence.attempts] == [("rtn", True)]
    assert made.provenance.recipe.name == "rtn" and made.provenance.requested == recipe
    assert made.evidence.verdict.required == "degraded" and made.evidence.verdict.passed
    plan = made.evidence.look_plan
    assert plan is not None and plan.error == pytest.approx(0.05 / search.most_attempts(recipe))
    assert not pipeline.run(easy, Silent()).created


@pytest.mark.slow
def test_auto_climbs_to_the_smallest_file_that_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In more bytes, as refining would not do; their divergence was predicted, and is told with what was measured."""
    monkeypatch.setattr(search, "RESIZED", 1)
    monkeypatch.setattr(search, "MARGIN", 0.7)
    recipe = methods.replace(LITTLE, name="auto", calibration_windows=8, calibration_length=64)
    hard = pipeline.RunRequest(
        *(str(POCKET), None, tmp_path / "hard"),
        recipe=dataclasses.replace(recipe, max_size=2.5),
        settings=dataclasses.replace(SETTINGS, max_windows=32, window=256),
        device="cpu",
    )
    made = pipeline.run(hard, Silent()).package
    require_sound(made)
    tried = made.evidence.attempts
    assert [one.recipe.options.get("size_budget") for one in tried[:2]] == [None, None] and len(tried) > 2
    (chosen,) = [one for one in tried if one.chosen]
    assert chosen in tried[2:] and made.provenance.recipe == chosen.recipe and made.evidence.verdict.passed
    assert all(one.kld and one.predicted == pytest.approx(one.kld.value, rel=0.3) for one in tried[2:])
    assert {path.name for path in made.folder.iterdir()} == {
        *("README.md", "config.json", "figures", "generation_config.json", "model.safetensors", "parity.json"),
        *("provenance.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert "| **calibrated" in (card := (made.folder / "README.md").read_text()) and "(nats), predicted |" in card


def test_eight_bits_have_one_attempt() -> None:
    assert [one.name for one in search.attempts(Recipe(bits=8))] == ["int8"]


def asked(recipe: Recipe) -> CalibratedOptions:
    return CalibratedOptions.of(recipe)


def prepared(recipe: Recipe, corpus: str) -> tuple[torch.Tensor, CalibrationText]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(POCKET) for kind in (AutoModelForCausalLM, AutoTokenizer))
    return calibration_text.prepare(asked(recipe), model.float(), tokenizer, corpus, "cpu", False, Silent(), (1.0,))


@pytest.mark.slow
def test_calibration_never_sees_the_corpus(tmp_path: Path) -> None:
    corpus = corpus_text(EvaluationSettings())
    (tmp_path / "copied.txt").write_text(corpus)
    recipe = methods.replace(LITTLE, calibration=str(tmp_path / "copied.txt"))
    with pytest.raises(CorpusError, match="is in the corpus that the package is judged by"):
        prepared(recipe, corpus)
    tokens, record = prepared(recipe, "something else")
    assert tokens.shape == (16, 128) and record.source == "copied.txt" and record.left_out == 0
    again, _ = prepared(methods.replace(recipe, calibration_seed=5), "something else")
    assert not torch.equal(tokens, again)


@pytest.mark.slow
def test_what_the_model_repeats_of_the_corpus_is_left_out() -> None:
    """The corpus holds one of the windows that the model will write."""
    from transformers import AutoTokenizer

    tokens, _ = prepared(LITTLE, "")
    window = AutoTokenizer.from_pretrained(POCKET).decode(tokens[3])
    kept, record = prepared(LITTLE, f"Before. {window} After.")
    assert record.left_out >= 1 and len(kept) == record.windows == 8
    assert not any(torch.equal(one, tokens[3]) for one in kept)


@pytest.mark.parametrize(
    ("text", "message"),
    [("too short", "has 0 windows of 128 tokens, and 16 are needed"), (None, "no calibration text")],
)
def test_calibration_text_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CorpusError, match=message):
        prepared(methods.replace(LITTLE, calibration=str(file)), "")


def test_auto_refuses_a_calibration_text_before_anything_is_made(tmp_path: Path, shallow: Path) -> None:
    class Stages(Silent):
        def stage(self, title: str) -> None:
            begun.append(title)

    begun: list[str] = []
    recipe = methods.replace(LITTLE, name="auto", calibration="nowhere.txt")
    request = pipeline.RunRequest(str(shallow), output=tmp_path / "out", recipe=recipe, settings=SETTINGS, device="cpu")
    with pytest.raises(CorpusError, match="no calibration text"):
        pipeline.run(request, Stages())
    assert begun == [f"source {shallow}"] and list(tmp_path.iterdir()) == []


def test_calibration_text_of_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = corpus_text(EvaluationSettings())
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.create_repo("org/texts", repo_type="dataset")
        hub.commit("org/texts", {"part/a.txt": text.encode()}, repo_type="dataset")
        hub.inject(Fault("GET", "part/a.txt", status=503))
        recipe = methods.replace(LITTLE, calibration="org/texts:part/a.txt")
        tokens, record = prepared(recipe, "")
        with pytest.raises(CorpusError, match=r"of the calibration text a\.txt is in the corpus"):
            prepared(recipe, text.upper())
        commit = hub.log("org/texts", repo_type="dataset")[0].sha
    assert tokens.shape == (16, 128) and record.source == "a.txt"
    assert (record.repo_id, record.commit) == ("org/texts", commit)
    quantized = Quantized((), (), "float16", "cpu", 0.0, record)
    assert f"of a.txt (data set org/texts at commit {commit})" in calibrated.describe(recipe, quantized)


def test_the_hessian_of_inputs_far_from_zero_keeps_its_digits() -> None:
    """Against float64, with tokens that count differently."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(600, 8, generator=generator) * 0.1 + 50
    token_weights = torch.rand(600, generator=generator)
    hessian = CenteredHessianAccumulator(8, "cpu")
    for part, share in zip(torch.split(inputs, 100), torch.split(token_weights, 100), strict=True):
        hessian.add(part, share)
    weights = (token_weights / token_weights.sum()).double()
    mean = weights @ inputs.double()
    centred = inputs.double() - mean
    assert torch.allclose(hessian.mean.double(), mean, rtol=1e-6)
    assert torch.allclose(hessian.covariance.double(), (centred * weights[:, None]).T @ centred, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about what peft calls
@pytest.mark.slow
def test_a_pipeline_and_a_lora_step(package: Package) -> None:
    require_pipeline_and_lora(package.folder, "cpu")


def require_pipeline_and_lora(folder: Path, device: str) -> None:
    """The package writes text in a stock pipeline, and LoRA on top of it learns a sentence."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import pipeline as stock_pipeline

    write = stock_pipeline("text-generation", model=str(folder), device=device)
    assert len(write("The function", max_new_tokens=4)[0]["generated_text"]) > len("The function")
    quantized = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map={"": device})
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(prepare_model_for_kbit_training(quantized), lora)
    tokens = AutoTokenizer.from_pretrained(folder)("The import statement binds a name.", return_tensors="pt").to(device)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(**tokens, labels=tokens["input_ids"]).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
