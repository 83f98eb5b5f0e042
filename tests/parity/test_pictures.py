"""Pictures are drawn alike everywhere, put to both models, count for the verdict, and can be recounted."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

import model_card
from quantize import package, pipeline
from quantize.errors import PackageError, ParityRefused
from quantize.evidence import Estimate, Evidence
from quantize.package import card as cards
from quantize.parity import answers, judged, picture_problem, pictures
from quantize.parity.consistency import contradictions
from quantize.parity.models import Pair, load_tokenizer
from quantize.parity.picture_prompts import NoPictures, Prompter
from quantize.progress import Silent
from quantize.publishing import audit
from quantize.records import Checkout, EvaluationSettings, Recipe
from quantize.source import fetch
from tests import vision

SETTINGS = EvaluationSettings(max_windows=8, window=64, new_tokens=6, require="degraded")


def run(model: Path, output: Path, **changes: Any) -> package.Package:
    settings = dataclasses.replace(SETTINGS, **changes)
    request = pipeline.RunRequest(str(model), output=output, recipe=Recipe(name="rtn"), settings=settings, device="cpu")
    return pipeline.run(request, Silent()).package


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.save(tmp_path_factory.mktemp("vision") / "seer")


@pytest.fixture(scope="module")
def measured(model: Path) -> package.Package:
    """A package of a model that reads pictures, with everything measured."""
    return run(model, model.parent / "seer-bnb-4bit")


def checkout_of(model: Path) -> Checkout:
    return fetch(str(model), revision=None, trust_remote_code=False, progress=Silent())


def pair_of(model: Path, candidate: Path, alone: bool = False) -> Pair:
    tokenizer = load_tokenizer(model, False)
    return Pair(checkout_of(model), candidate, "cpu", trust=False, tokenizer=tokenizer, alone=alone)


def test_pictures_follow_from_the_seed_alone() -> None:
    few, more, other = pictures.draw(4, 0), pictures.draw(6, 0), pictures.draw(4, 1)
    assert pictures.digest(few) == pictures.digest(more[:4]) != pictures.digest(other)
    assert [item.kind for item in few] == ["shapes", "numbers", "charts", "text"]
    for item in more:
        assert item.pixels.shape == (pictures.SIDE, pictures.SIDE, 3) and item.pixels.dtype == np.uint8
        assert len(np.unique(item.pixels.reshape(-1, 3), axis=0)) > 1 and item.question in dict(item.exercises)


def test_a_users_own_style_changes_no_picture() -> None:
    plain = pictures.digest([pictures.picture(0, 2)])
    with matplotlib.rc_context({"axes.grid": True, "font.size": 20.0}):
        assert pictures.digest([pictures.picture(0, 2)]) == plain


def test_pictures_are_measured_and_said_to_be(measured: package.Package) -> None:
    evidence = measured.evidence
    record = evidence.pictures
    assert evidence.verdict.passed and record is not None and record.chat and record.count == 8
    assert evidence.modalities == "text and pictures"
    assert record.kld.low <= record.kld.value <= record.kld.high and record.kld.value > 0.001
    assert record.kld.value == pytest.approx(np.mean(record.figures.kld))
    card = (measured.folder / "README.md").read_text()
    assert "Measured on text and pictures." in card and "pipeline_tag: image-text-to-text" in card
    assert f"| {record.kld.value:.4f} | {record.kld.low:.4f} to {record.kld.high:.4f} | 0.1 |" in card
    assert (measured.folder / "figures" / "kld-by-picture.png").is_file()


def test_the_figures_are_those_of_whole_logits(model: Path, measured: package.Package) -> None:
    """Against the obvious way: the answer that `generate` writes, read whole by both models."""
    (picture,) = pictures.draw(1, SETTINGS.seed)
    with pair_of(model, measured.folder) as pair:
        pair.upcast()
        inputs = dict(Prompter.of(pair.checkout).inputs(picture))
        length = inputs["input_ids"].shape[1]
        whole = pair.reference.generate(
            **inputs, max_new_tokens=SETTINGS.new_tokens, do_sample=False, eos_token_id=0, pad_token_id=0
        )
        given = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
        with torch.inference_mode():
            p, q = (
                each(**given).logits[0, length - 1 : -1].double().log_softmax(-1)
                for each in (pair.reference, pair.candidate)
            )
    record = measured.evidence.pictures
    assert record is not None
    assert record.figures.tokens[0] == whole.shape[1] - length
    assert record.figures.kld[0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert record.figures.same_top[0] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_what_a_processor_says_of_each_position_goes_on_along_the_answer() -> None:
    """Types of tokens and places in a grid of patches, by which Qwen's models count positions; as `generate` does."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**vision.TEXT, "tie_word_embeddings": False, "model_type": "qwen2_5_vl_text", "rope_parameters": rope}
    tower = {"depth": 2, "num_heads": 4, "hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64}
    marks = {"vision_start_token_id": 4092, "vision_end_token_id": 4093, "video_token_id": 4094}
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config=tower, image_token_id=vision.IMAGE_ID, **marks
    )
    model = AutoModelForImageTextToText.from_config(config).float().eval()
    ids = torch.tensor([[5, 4092, *[vision.IMAGE_ID] * 6, 4093, 7, 8, 9]])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == vision.IMAGE_ID).long(),
        "pixel_values": torch.randn(24, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    settings = GenerationConfig(
        max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    written = model.generate(**given, generation_config=settings)
    steps = torch.cat(written.logits)
    logits = answers._logits(model, given, written.sequences[0, ids.shape[1] :].tolist())
    assert torch.allclose(logits, steps.float(), atol=1e-5) and given["input_ids"] is ids and ids.shape[1] == 12


@pytest.mark.slow
def test_one_model_at_a_time_gives_the_same_figures(model: Path, measured: package.Package) -> None:
    with pair_of(model, measured.folder, alone=True) as pair:
        pair.upcast()
        again = answers.compare(pair, SETTINGS, 0.05, Silent()).record
    record = measured.evidence.pictures
    assert again is not None and record is not None
    assert again.figures.kld == pytest.approx(record.figures.kld, rel=1e-4)


@pytest.mark.slow
def test_a_tower_that_was_harmed_is_seen(model: Path, measured: package.Package, tmp_path: Path) -> None:
    """Its text is as good as ever: only pictures show it."""
    from safetensors.torch import load_file, save_file

    harmed = tmp_path / "harmed"
    harmed.mkdir()
    for path in measured.folder.iterdir():
        if path.suffix in (".json", ".jinja"):
            (harmed / path.name).write_bytes(path.read_bytes())
    held = load_file(measured.folder / "model.safetensors")
    (patches,) = (name for name in held if "patch_embedding" in name)
    held[patches] = -held[patches]
    save_file(held, harmed / "model.safetensors", metadata={"format": "pt"})
    (harmed / "provenance.json").unlink()
    request = pipeline.VerifyRequest(str(harmed), str(model), SETTINGS, "cpu")
    evidence, sound = pipeline.verify(request, Silent()), measured.evidence
    assert evidence.scores is not None and sound.scores is not None
    assert evidence.scores.kld.mean.value == pytest.approx(sound.scores.kld.mean.value)
    assert evidence.pictures is not None and sound.pictures is not None
    assert evidence.pictures.kld.value > 3 * sound.pictures.kld.value
    assert not evidence.verdict.passed and "answers about pictures" in " ".join(evidence.verdict.reasons)


def with_picture_kld(evidence: Evidence, kld: float) -> Evidence:
    assert evidence.pictures is not None
    figures = dataclasses.replace(evidence.pictures.figures, kld=(kld,) * evidence.pictures.count)
    return dataclasses.replace(evidence, pictures=dataclasses.replace(evidence.pictures, figures=figures))


def test_the_verdict_is_the_worse_of_text_and_pictures(measured: package.Package) -> None:
    bad = judged(with_picture_kld(measured.evidence, 0.09), "degraded")
    assert bad.verdict.grade == "failed" and not bad.verdict.passed  # 8 pictures leave much unseen
    assert any("of answers about pictures" in reason for reason in bad.verdict.reasons)
    good = judged(with_picture_kld(measured.evidence, 1e-4), "degraded")
    assert good.verdict.passed and good.scores == measured.evidence.scores
    assert good.pictures is not None and good.pictures.kld.value == pytest.approx(1e-4)


def found(sealed: package.Package, evidence: Evidence) -> str:
    return " ".join(contradictions(evidence, sealed.provenance.recipe, sealed.provenance.settings))


def test_the_audit_recounts_pictures(measured: package.Package) -> None:
    audit.require_sound(measured)
    evidence = measured.evidence
    record = evidence.pictures
    assert record is not None and not found(measured, evidence)
    better = dataclasses.replace(record, kld=Estimate(0.001, 0.0, 0.002))
    assert "pictures do not follow" in found(measured, dataclasses.replace(evidence, pictures=better))
    assert "do not follow" in found(measured, with_picture_kld(evidence, 1e-5))
    assert "against what the model reads" in found(measured, dataclasses.replace(evidence, pictures=None))
    fewer = dataclasses.replace(record.figures, kld=record.figures.kld[:-1])
    shorter = dataclasses.replace(evidence, pictures=dataclasses.replace(record, figures=fewer))
    assert "are asked about" in found(measured, shorter)
    other = dataclasses.replace(evidence, pictures=dataclasses.replace(record, seed=1))
    assert "other settings" in found(measured, other)


def test_who_leaves_pictures_out_is_found(measured: package.Package) -> None:
    """The evidence of a model of text beside the weights of one that sees."""
    text_only = dataclasses.replace(measured.evidence, pictures=None, reads_pictures=False)
    forged = dataclasses.replace(measured, evidence=judged(text_only, "degraded"))
    with pytest.raises((PackageError, ParityRefused), match="reads pictures"):
        audit.require_sound(forged)


@pytest.mark.slow
def test_the_snippets_of_the_card_run(
    measured: package.Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """About a picture in the chat template and without one, on text alone, and hidden states."""
    monkeypatch.chdir(measured.folder.parent)
    record = measured.evidence.pictures
    assert record is not None
    plain = dataclasses.replace(measured.evidence, pictures=dataclasses.replace(record, chat=False))
    text = model_card.render(cards.facts(measured.provenance, plain, None, ()))
    uses = re.findall(r"```python\n(.*?)```", (measured.folder / "README.md").read_text(), re.DOTALL)[:-1]
    about_picture = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len(uses) == 3 and "apply_chat_template" in uses[0] and "processor.image_token" in about_picture
    for snippet in (*uses, about_picture):
        exec(snippet, {})
    assert "torch.Size" in capsys.readouterr().out


def test_without_a_chat_template_a_picture_stands_before_the_question(model: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(model, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    prompter, (picture,) = Prompter.of(checkout_of(plain)), pictures.draw(1, 0)
    text = prompter.processor.tokenizer.decode(prompter.inputs(picture)["input_ids"][0])
    assert not prompter.chat and text.replace(vision.IMAGE_TOKEN, "") == picture.question
    assert text.startswith(vision.IMAGE_TOKEN)


class Endless:
    """A processor whose settings no list names."""

    image_token = "<image>"

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes = shapes

    def __call__(self, **_: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(1).expand(shape) for name, shape in self.shapes.items()}


@pytest.mark.parametrize("shape", [{"input_ids": (1, 40_000)}, {"input_ids": (1, 8), "pixel_values": (3, 8192, 8192)}])
def test_what_a_processor_makes_of_a_picture_is_bounded(shape: dict[str, tuple[int, ...]]) -> None:
    (picture,) = pictures.draw(1, 0)
    with pytest.raises(NoPictures, match=r"makes [\d,]+ tokens and [\d,]+ numbers of one picture"):
        Prompter(Endless(**shape), chat=False).inputs(picture)
    assert Prompter(Endless(input_ids=(1, 8)), chat=False).inputs(picture)["input_ids"].shape == (1, 8)


def without_processor(folder: Path) -> str:
    (folder / "processor_config.json").unlink()
    return "the original has no processor"


def without_torchvision(folder: Path) -> str:
    """A processor that takes videos as well."""
    kinds = {"image_processor": "Qwen2VLImageProcessor", "video_processor": "Qwen2VLVideoProcessor"}
    content = {"processor_class": "Qwen2VLProcessor"} | {key: {f"{key}_type": name} for key, name in kinds.items()}
    (folder / "processor_config.json").write_text(json.dumps(content))
    return "it needs torchvision, which is not installed (pip install torchvision)"


def without_images(folder: Path) -> str:
    """Where nothing else is named, transformers takes the tokenizer for a processor."""
    (folder / "processor_config.json").write_text("{}")
    return "cannot be loaded"


def of_unknown_class(folder: Path) -> str:
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"]["image_processor_type"] = "NobodysImageProcessor"
    (folder / "processor_config.json").write_text(json.dumps(content))
    return "cannot be loaded"


def of_pictures_without_end(folder: Path) -> str:
    content = json.loads((folder / "processor_config.json").read_text())
    content["image_processor"]["size"] = {"height": 200_000, "width": 200_000}
    (folder / "processor_config.json").write_text(json.dumps(content))
    return "height = 200000 in the original's processor_config.json asks for more than can be"


def of_prompts_without_end(folder: Path) -> str:
    content = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**content, "num_additional_image_tokens": 10**9}))
    return "num_additional_image_tokens = 1e+09"


REASONS = [
    of_pictures_without_end,
    of_prompts_without_end,
    without_processor,
    without_images,
    of_unknown_class,
    pytest.param(
        without_torchvision,
        marks=pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is there"),
    ),
]


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "merge_size": 2}, True),
        ({"min_pixels": 3136, "max_pixels": 12845056}, True),
        ({"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, True),
        ({"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}, True),
        ({"size": {"shortest_edge": 65536}}, False),
        ({"min_pixels": 10**9, "merge_size": 2}, False),
    ],
)
def test_sizes_that_processors_have_are_no_bombs(
    settings: dict[str, Any], known: bool, model: Path, tmp_path: Path
) -> None:
    """As Qwen3-VL, Qwen2.5-VL, LLaVA and Idefics 3 have them."""
    source = Path(shutil.copytree(model, tmp_path / "source"))
    content = json.loads((source / "processor_config.json").read_text())
    kinds = {"image_processor_type": "Qwen2VLImageProcessor" if "merge_size" in settings else "CLIPImageProcessor"}
    (source / "processor_config.json").write_text(json.dumps(content | {"image_processor": kinds | settings}))
    assert ("asks for more" not in picture_problem(checkout_of(source))) is known


@pytest.mark.parametrize("change", REASONS)
def test_why_pictures_cannot_be_asked_about(change: Callable[[Path], str], model: Path, tmp_path: Path) -> None:
    blind = Path(shutil.copytree(model, tmp_path / "blind"))
    expected, reason = change(blind), picture_problem(checkout_of(blind))
    assert expected in reason and str(tmp_path) not in reason and "\n" not in reason


def test_a_processor_that_does_not_suit_the_model_leaves_text(
    model: Path, measured: package.Package, tmp_path: Path
) -> None:
    """Its pictures take more tokens than the model makes of them."""
    blind = Path(shutil.copytree(model, tmp_path / "blind"))
    content = json.loads((blind / "processor_config.json").read_text())
    (blind / "processor_config.json").write_text(json.dumps({**content, "patch_size": 7}))
    with pair_of(blind, measured.folder) as pair:
        answered = answers.compare(pair, SETTINGS, 0.05, Silent())
    assert answered.record is None and "the original cannot read pictures" in answered.left_out and not answered.checks


def test_pictures_that_leave_no_room_for_an_answer(
    model: Path, measured: package.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair_of(model, measured.folder) as pair:
        monkeypatch.setattr(Pair, "context", 20)
        assert "the original's context has 20" in answers.compare(pair, SETTINGS, 0.05, Silent()).left_out


def test_text_only_is_said_by_evidence_and_card(measured: package.Package) -> None:
    evidence = dataclasses.replace(measured.evidence, pictures=None, pictures_left_out="no *processor*")
    assert evidence.modalities == "text only: no *processor*" and not found(measured, evidence).count("pictures were")
    provenance = measured.provenance
    card = model_card.render(cards.facts(provenance, evidence, None, ()))
    assert "**Measured on text only.**" in card and "no \\*processor\\*" in card and "AutoProcessor" in card
    bare = dataclasses.replace(provenance, files=())
    card = model_card.render(cards.facts(bare, evidence, None, ()))
    assert "AutoProcessor" not in card and "AutoModelForImageTextToText.from_pretrained" in card
