"""The source's model against its files: built without weights, loaded without inventions."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.documents import read_json
from quantize.errors import CorruptModel, QuantizeError, UnsupportedModel, first_line
from quantize.files import CONFIG
from quantize.formats import safetensors
from quantize.formats.model_class import auto_class, class_of
from quantize.formats.safetensors import Entry
from quantize.records import Checkout

if TYPE_CHECKING:
    import torch

COUNTS = re.compile("layer|depth|labels")
"""In the names of config fields by which transformers makes lists before it makes a model."""
LAYER = re.compile(r".*?\.\d+(?=\.)|.*(?=\.)|.*", re.DOTALL)
"""A tensor's layer, which is what its name says up to the first number; else its module."""
MOST_COUNTED = 10_000
ELEMENTS_EACH, PARAMETERS_EACH = 4, 16
"""How often a model may have an element, or a parameter, for each that lies in its files: ties are undone while it is
built, and fused tensors are split."""
SPARE_ELEMENTS, SPARE_PARAMETERS = 1 << 20, 1000
MOST_LAYERS, MOST_PARAMETERS = 1000, 20_000
"""Of a model whose files are not here yet; the largest has some hundred layers with ten parameters each."""
FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)masked_bias$")
"""What older versions of transformers stored and computed anew: nobody misses it."""


@dataclass(frozen=True)
class Renamed:
    """What the model calls a tensor of its files, and what the tensor is called when the model is saved again.

    One that is fused with others or split is `converted`, and its shape with it; `others` come of it besides. Where it
    is `split_by_rows`, each gets as many of its rows.
    """

    name: str
    saved_name: str
    converted: bool = False
    others: tuple[str, ...] = ()
    split_by_rows: bool = False


def skeleton(checkout: Checkout, dtype: str = "float32") -> Any:
    """The source's model without weights.

    Raises CorruptModel, before that is built, where its config promises much more than its files hold, and
    UnsupportedModel where transformers builds nothing from it.
    """
    import torch
    from transformers import AutoConfig

    name, trust = checkout.source.name, checkout.source.remote_code
    held = tensors(checkout)
    content = read_json(checkout.folder / CONFIG, f"the {CONFIG} of {name}", CorruptModel, finite=False)
    _require_countable(content, name, max(MOST_COUNTED, len(held)))
    with _built_by_transformers(name), torch.device("meta"), _no_larger_than(held.values(), name):
        config = AutoConfig.from_pretrained(checkout.folder, local_files_only=True, trust_remote_code=trust)
        return class_of(content).from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust)


def promised(content: Mapping[str, Any], name: str) -> Any:
    """The model without weights that the `content` of a config.json describes, of a type that transformers knows.

    Its files need not be here. Raises CorruptModel where there is no end of layers, UnsupportedModel as `skeleton`.
    """
    import torch
    from transformers import CONFIG_MAPPING

    _require_countable(content, name, MOST_LAYERS)
    with _built_by_transformers(name), torch.device("meta"), _no_more_than(MOST_PARAMETERS, name):
        config = CONFIG_MAPPING[content["model_type"]].from_dict(copy.deepcopy(dict(content)))
        return class_of(content).from_config(config)


@contextmanager
def _built_by_transformers(name: str) -> Iterator[None]:
    """Tell what goes wrong as the config's fault: it can be wrong in any way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fields that are out of date, which users cannot change
            yield
    except QuantizeError:
        raise
    except Exception as error:
        raise UnsupportedModel(f"transformers cannot build {name} from its {CONFIG}: {first_line(error)}") from error


def tensors(checkout: Checkout) -> dict[str, Entry]:
    """All tensors of the source's weight files by their names there; raises CorruptModel."""
    held: dict[str, Entry] = {}
    for file in (file.path for file in checkout.source.files if safetensors.is_weights(file.path)):
        for name, entry in safetensors.entries(checkout.folder / file).items():
            if name in held:
                raise CorruptModel(f"{name} lies in {held[name].file.name} and in {file}: remove one of them")
            held[name] = entry
    return held


def check_tensors(checkout: Checkout) -> tuple[str, ...]:
    """Names of the tensors in the source's files that its model does not use; only headers are read.

    Raises CorruptModel where a tensor is absent, has another shape than the config says, or differs from the one that
    it is said to be tied to. Of a model with its own code nothing is known before it is loaded.
    """
    model, held = skeleton(checkout), tensors(checkout)
    if model.is_remote_code():
        return ()
    expected, ties = model.state_dict(), dict(model.all_tied_weights_keys)
    rename = renaming(model, expected)
    renamed = {key: rename(key) for key in held}
    plain = {tensor.name: held[key] for key, tensor in renamed.items() if not tensor.converted}
    name = checkout.source.name
    _require_shapes(plain, expected, name)
    _require_equal_ties(plain, ties, name)
    if not any(tensor.converted for tensor in renamed.values()):
        absent = _absent(expected.keys(), plain.keys(), ties)
        require_complete(_not_matching(absent, model._keys_to_ignore_on_load_missing or ()), name)
    unused = sorted((key for key, tensor in renamed.items() if tensor.name not in expected), key=natural)
    return tuple(key for key in unused if not _is_former_buffer(key, model))


def load(folder: Path, name: str, **options: Any) -> Any:
    """The model in `folder` as stock transformers loads it with these `options`, safetensors and local files alone.

    Raises CorruptModel where a tensor is absent, which transformers would fill with random values.
    """
    model, report = auto_class(folder).from_pretrained(
        folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    require_complete(report["missing_keys"], name)
    return model


def require_complete(absent: Iterable[str], name: str) -> None:
    """Raise CorruptModel where tensors are `absent` from the files of the model called `name`."""
    listed = sorted(absent, key=natural)
    if listed:
        more = f", and so are {len(listed) - 1} more" if len(listed) > 1 else ""
        raise CorruptModel(
            f"{listed[0]} is missing from the weights of {name}{more}: fetch the model again, or ask its authors for it"
        )


def context(config: Any) -> int:
    """The tokens that a model reads at most, by the config of its language model; 1,024 where that names no number."""
    named = getattr(config, "max_position_embeddings", None)
    return int(named) if isinstance(named, int | float) and named > 0 else 1024


def require_known_tokens(ids: torch.Tensor, vocabulary: int, name: str) -> None:
    """Raise CorruptModel where token `ids` go beyond the `vocabulary` of the model called `name`."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise CorruptModel(
            f"the tokenizer of {name} writes token {int(ids.max())}, and its model knows {vocabulary} tokens: "
            f"the tokenizer is another model's"
        )


def renaming(model: Any, expected: Container[str]) -> Callable[[str], Renamed]:
    """Tells what `model` calls a tensor of its files, out of the names in `expected`.

    Names may lack the model's prefix, or have it too much, and some architectures have had others. As in transformers,
    all renamings come first, and then one conversion at most.
    """
    renamings, converters = _transforms(model)
    prefix = model.base_model_prefix

    def rename(key: str) -> Renamed:
        name = key
        for transform in renamings:
            name, _ = transform.rename_source_key(name)
        converter, names = None, [name]
        for transform in converters:
            first, pattern = transform.rename_source_key(name)
            if pattern is not None:
                converter, names = transform, _targets(first, transform.target_patterns)
                break
        name, *others = [_variant(name, prefix, expected, key) for name in names]
        split = converter is not None and _splits_rows(converter)
        return Renamed(name, name if names == [key] else key, converter is not None, tuple(others), split)

    return rename


def converted(model: Any) -> set[str]:
    """Names of a model's tensors that transformers fuses, splits or permutes while it loads files of its authors' form.

    Those that take equal numbers of rows of another one are left out.
    """
    _, converters = _transforms(model)
    back = [transform.reverse_transform() for transform in converters if not _splits_rows(transform)]
    return {name for name in model.state_dict() if any(item.rename_source_key(name)[1] is not None for item in back)}


def converts_experts(model: Any) -> bool:
    """Whether transformers makes the experts of a model, which are linear here, of tensors in a form not known here."""
    return any("experts" in target for transform in _transforms(model)[1] for target in transform.target_patterns)


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to names, and to tensors, of a model's files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    return [transform for transform in transforms if not isinstance(transform, WeightConverter)], converters


def _splits_rows(converter: Any) -> bool:
    """Whether a conversion gives equal numbers of one tensor's rows to others."""
    from transformers.core_model_loading import Chunk

    operations = converter.operations
    return len(operations) == 1 and isinstance(operations[0], Chunk) and operations[0].dim == 0


def _targets(first: str, patterns: list[str]) -> list[str]:
    """All names that a tensor becomes, of which `first` is the one by the first of the target `patterns`."""
    match = re.search(re.escape(patterns[0]).replace(re.escape(r"\1"), "(.+)"), first)
    if match is None:
        return [first]
    return [first[: match.start()] + match.expand(pattern) + first[match.end() :] for pattern in patterns]


def _variant(name: str, prefix: str, expected: Container[str], key: str) -> str:
    """The name with the model's prefix, or without it, as it is expected, or the `key` where none of them is."""
    return next((variant for variant in _variants(name, prefix) if variant in expected), key)


def same_values(first: Entry, second: Entry) -> bool:
    """Whether two tensors are equal, bit by bit and in type and shape."""
    import torch

    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    starts = range(0, first.numel, safetensors.PART)
    parts = ((start, min(safetensors.PART, first.numel - start)) for start in starts)
    return all(
        torch.equal(safetensors.read(first, *part, False), safetensors.read(second, *part, False)) for part in parts
    )


def grouped(names: Iterable[str]) -> dict[str, int]:
    """How many of the tensors called `names` lie in each layer, or in each module outside of layers.

    Names come from files: what no module is called is shown as `?`.
    """
    places = (LAYER.match(name) for name in names)
    return Counter(re.sub(r"[^\w.-]", "?", place[0]) for place in places if place)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts names with the numbers in them by their size."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _variants(name: str, prefix: str) -> tuple[str, str, str]:
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


def _absent(expected: Iterable[str], stored: Iterable[str], ties: Mapping[str, str]) -> set[str]:
    """What the model has and its files do not, neither under its own name nor under one that it is tied to."""
    held = {ties.get(name, name) for name in stored}
    return {name for name in expected if ties.get(name, name) not in held}


def _require_shapes(stored: Mapping[str, Entry], expected: Mapping[str, torch.Tensor], name: str) -> None:
    for key in sorted(stored.keys() & expected.keys(), key=natural):
        held, due = list(stored[key].shape), list(expected[key].shape)
        if held != due:
            raise CorruptModel(
                f"{key} of {name} has the shape {held} in its file, and {due} by its {CONFIG}: one of the two is "
                f"another model's"
            )


def _require_equal_ties(stored: Mapping[str, Entry], ties: Mapping[str, str], name: str) -> None:
    for target, kept in ties.items():
        if target in stored and kept in stored and not same_values(stored[target], stored[kept]):
            raise CorruptModel(
                f"{target} of {name} differs from {kept}, which its {CONFIG} says that it is: programs disagree about "
                f"which of them counts; remove the wrong one, or set tie_word_embeddings to false there"
            )


def _is_former_buffer(key: str, model: Any) -> bool:
    """Whether a tensor is what a module that the model still has once kept in files, such as a causal mask."""
    if any(re.search(pattern, key) for pattern in FORMER_BUFFERS):
        return True
    modules = dict(model.named_modules())
    inside = any(name.rpartition(".")[0] in modules for name in _variants(key, model.base_model_prefix))
    return inside and not _not_matching([key], model._keys_to_ignore_on_load_unexpected or ())


def _not_matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    listed = list(patterns)
    return [name for name in names if not any(re.search(pattern, name) for pattern in listed)]


def _require_countable(config: Mapping[str, Any], name: str, most: int) -> None:
    """Raise CorruptModel where the config counts more layers than there can be."""
    waiting: list[Any] = [dict(config)]
    while waiting:
        content = waiting.pop()
        if isinstance(content, list):
            waiting += content
        elif isinstance(content, dict):
            waiting += content.values()
            for field, value in content.items():
                if COUNTS.search(field) and isinstance(value, int | float) and value > most:
                    raise CorruptModel(
                        f"the {CONFIG} of {name} says {field} = {str(value)[:20]}, which its weights "
                        f"cannot fill: it is another model's"
                    )


@contextmanager
def _no_more_than(parameters: int, name: str) -> Iterator[None]:
    """Stop building a model, with CorruptModel, after so many parameters, of whatever size."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def count(module: Any, key: str, parameter: Any) -> None:
        nonlocal parameters
        parameters -= 1
        if parameters < 0:
            raise CorruptModel(f"the {CONFIG} of {name} describes a model without end: correct it at the source")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _no_larger_than(held: Iterable[Entry], name: str) -> Iterator[None]:
    """Stop building a model, with CorruptModel, as soon as it is much larger than these tensors."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    sizes = [entry.numel for entry in held]
    elements = ELEMENTS_EACH * sum(sizes) + SPARE_ELEMENTS
    parameters = PARAMETERS_EACH * len(sizes) + SPARE_PARAMETERS

    def count(module: Any, key: str, parameter: Any) -> None:
        nonlocal elements, parameters
        elements -= parameter.numel()
        parameters -= 1
        if elements < 0 or parameters < 0:
            raise CorruptModel(
                f"the {CONFIG} of {name} describes a model that is much larger than the {sum(sizes):,} weights in its "
                f"files: it is another model's"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
