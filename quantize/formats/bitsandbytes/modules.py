"""The modules of a model: which are linear, which become quantized, which hold codes, how they keep their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from quantize.errors import UnsupportedModel
from quantize.formats import source_model
from quantize.formats.experts import linear_experts
from quantize.records import Recipe

if TYPE_CHECKING:
    import torch

QUANTIZED_CLASSES = {4: "Linear4bit", 8: "Linear8bitLt"}
"""By the number of bits."""
ROUTER = re.compile(r"(^|[._])(router|gate)(\.|$)")
"""In the names of modules beside experts. Which experts a token is sent to depends on every digit of theirs."""
MOST_STACKED = 0.1
"""Share of the weights that may lie in tensors which bitsandbytes passes over."""


def linear_names(model: Any) -> tuple[str, ...]:
    """Names of the linear modules that transformers can quantize and that are not, in the order of the model."""
    return tuple(name for name, module in model.named_modules() if _is_plainly_linear(module))


def passed_over(model: Any) -> dict[str, str]:
    """The classes of linear modules that transformers does not quantize, which stay as they are, by their names."""
    import torch

    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not _is_plainly_linear(module)
        and type(module).__name__ not in QUANTIZED_CLASSES.values()
    }


def _is_plainly_linear(module: Any) -> bool:
    """What transformers asks before it replaces a module: subclasses of Linear may compute something else."""
    import torch

    return type(module) is torch.nn.Linear or is_transposed(module)


def quantized_names(model: Any) -> tuple[str, ...]:
    """Names of the quantized modules of either number of bits, in the order of the model."""
    return _names(model, QUANTIZED_CLASSES.values())


def _names(model: Any, classes: Iterable[str]) -> tuple[str, ...]:
    names = set(classes)
    return tuple(name for name, module in model.named_modules() if type(module).__name__ in names)


def holds_codes(module: Any) -> bool:
    """Whether a module of a quantized class really has a quantized weight."""
    return getattr(module.weight, "quant_state", None) is not None or not module.weight.is_floating_point()


def names_holding_codes(model: Any, bits: int) -> set[str]:
    """Names of the modules of the class for that many bits that really have a quantized weight."""
    return {name for name in _names(model, [QUANTIZED_CLASSES[bits]]) if holds_codes(model.get_submodule(name))}


def block_size(module: Any) -> int | None:
    """The number of weights that share a scale in a 4-bit module, None in others."""
    state = getattr(module.weight, "quant_state", None)
    return None if state is None else int(state.blocksize)


def to_quantize(model: Any, recipe: Recipe, model_name: str) -> tuple[str, ...]:
    """Names of the linear modules of the source's `model` that a recipe quantizes; raises UnsupportedModel."""
    skipped = to_skip(model, recipe, model_name)
    prefixes = tuple(f"{name}." for name in skipped)
    return tuple(name for name in linear_names(model) if not f"{name}.".startswith(prefixes))


def to_skip(model: Any, recipe: Recipe, model_name: str) -> list[str]:
    """Full names of what stays as it is: the head, what is tied to it, and what `kept_besides` says, always; towers,
    unless the recipe quantizes them; and what the recipe skips.

    Raises UnsupportedModel where the recipe skips what is not there.
    """
    linear = linear_names(model)
    for name in recipe.skip_modules:
        if not any(map(Recipe(skip_modules=(name,)).skips, linear)):
            raise UnsupportedModel(f"--skip-modules {name}: {model_name} has no linear module of that name")
    kept = () if recipe.quantize_towers else towers(model)
    always = (*kept_by_default(model), *kept_besides(model))
    return sorted({*always, *kept, *filter(recipe.skips, linear)})


def kept_by_default(model: Any) -> list[str]:
    """What transformers leaves alone where no skip list says otherwise: the head, ties, and what comes last.

    It decides when it loads a checkpoint (`get_keys_to_not_convert`), before weights are tied. A tied head is the last
    module then, though a tied model lists another.
    """
    ties, head = model.all_tied_weights_keys, model.get_output_embeddings()
    last = list(dict(model.named_parameters(remove_duplicate=False)))[-1]
    heads = (name for name, module in model.named_modules() if head is not None and module is head)
    return sorted({name.removesuffix(".weight") for name in (*ties, *ties.values(), last, *heads)})


def kept_besides(model: Any) -> tuple[str, ...]:
    """Linear modules that are never quantized, besides those that transformers leaves alone itself: routers, what the
    architecture wants in float32, weights that are read directly, and those that files have in another form."""
    return (*routers(model), *kept_in_float32(model), *read_directly(model), *converted(model))


def converted(model: Any) -> tuple[str, ...]:
    """Linear modules whose weights transformers makes of others while it loads them, which it cannot of codes."""
    names = source_model.converted(model)
    return tuple(name for name in linear_names(model) if f"{name}.weight" in names)


def kept_in_float32(model: Any) -> tuple[str, ...]:
    """Linear modules that the architecture wants in float32, in models of half precision or of float16."""
    listed, patterns = list(model._keep_in_fp32_modules or ()), float32_patterns(model, float16=True)
    return tuple(
        name
        for name in linear_names(model)
        if is_listed(name, listed) or any(pattern.search(f"{name}.weight") for pattern in patterns)
    )


def float32_patterns(model: Any, *, float16: bool) -> list[re.Pattern[str]]:
    """In the names of tensors that transformers loads as float32 into a model of `float16`, or else of bfloat16."""
    listed = [*(model._keep_in_fp32_modules_strict or ()), *list(model._keep_in_fp32_modules or ()) * float16]
    return [re.compile(pattern.replace("*", ".*")) for pattern in listed]


def read_directly(model: Any) -> tuple[str, ...]:
    """Linear modules, besides the head, whose weights the model multiplies by itself, which it cannot with codes."""
    from quantize.formats.bitsandbytes import direct_reads

    kept = set(kept_by_default(model))
    return direct_reads.names(model, (name for name in linear_names(model) if name not in kept))


def routers(model: Any) -> tuple[str, ...]:
    """Names of the linear modules that choose among experts, or weigh them, in a model whose experts are linear."""
    names = []
    for path, _ in linear_experts(model):
        block = path.rpartition(".")[0]
        names += [
            f"{block}.{name}"
            for name, module in model.get_submodule(block).named_modules()
            if ROUTER.search(name) and _is_plainly_linear(module)
        ]
    return tuple(names)


def towers(model: Any) -> tuple[str, ...]:
    """Names of what a model has besides its language model, such as vision towers and projectors, with linear modules
    in them; none for a model of text alone.

    Raises UnsupportedModel where the language model cannot be told from the rest.
    """
    text_only = model.config.get_text_config() is model.config
    language_model, sees = model.get_decoder(), getattr(model.config, "vision_config", None) is not None
    if sees and (text_only or language_model in (model, model.base_model)):
        raise UnsupportedModel(
            f"{type(model).__name__} mixes its language model with what it sees by: what to quantize cannot be told"
        )
    if text_only:
        return ()
    path = next(name for name, module in model.named_modules() if module is language_model)
    head = model.get_output_embeddings()
    outside = [
        name
        for name in linear_names(model)
        if not name.startswith(f"{path}.") and model.get_submodule(name) is not head
    ]
    return tuple(dict.fromkeys(_branch(name, path) for name in outside))


def _branch(name: str, path: str) -> str:
    """The shortest beginning of a module's name, in whole parts, that is not one of `path`'s as well."""
    parts, other = name.split("."), path.split(".")
    shared = next(
        (index for index, pair in enumerate(zip(parts, other, strict=False)) if len(set(pair)) > 1), len(other)
    )
    return ".".join(parts[: shared + 1])


def is_listed(name: str, skip_list: list[str]) -> bool:
    """Whether transformers takes a module for one that a skip list names."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, skip_list)


def require_quantized(names: tuple[str, ...], model: Any, model_name: str) -> None:
    """Raise UnsupportedModel where no module is quantized, with the classes that are passed over."""
    if names:
        return
    if classes := sorted(set(passed_over(model).values())):
        raise UnsupportedModel(
            f"{model_name} keeps its matrices in layers of the class {', '.join(classes)}, which bitsandbytes leaves "
            f"in half precision: it cannot be quantized here"
        )
    raise UnsupportedModel(f"{model_name} has no linear layer left to quantize besides its head and what is skipped")


def require_mostly_linear(model: Any, model_name: str) -> None:
    """Raise UnsupportedModel for a model that stacks its experts in one tensor, which bitsandbytes passes over."""
    language_model = model.get_decoder() if towers(model) else model
    stacked = list(_stacked(language_model))
    total = sum(parameter.numel() for parameter in language_model.parameters())
    if sum(count for _, count in stacked) > MOST_STACKED * total:
        classes = ", ".join(sorted({kind for kind, _ in stacked}))
        raise UnsupportedModel(
            f"{model_name} keeps most weights in stacked expert tensors, in modules that are not known here "
            f"({classes}); bitsandbytes leaves them in half precision: it cannot be quantized here"
        )


def _stacked(model: Any) -> Iterator[tuple[str, int]]:
    """Of each tensor that is no matrix of a linear module the class that holds it, and its number of elements."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 2 or (parameter.ndim == 2 and not _has_one_matrix(module)):
                yield type(module).__name__, parameter.numel()


def _has_one_matrix(module: Any) -> bool:
    """Whether a module is linear, in whatever class, or an embedding."""
    import torch

    return isinstance(module, torch.nn.Linear | torch.nn.Embedding) or is_transposed(module)


def matrix(module: Any) -> torch.Tensor:
    """A linear module's weight as [outputs, inputs]."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if is_transposed(module) else weight


def laid_out(module: Any, values: torch.Tensor) -> torch.Tensor:
    """The inverse of `matrix`, in the type of the module's weight."""
    return (values.T.contiguous() if is_transposed(module) else values).to(module.weight)


def is_transposed(module: Any) -> bool:
    """Whether a linear module keeps its weight as [inputs, outputs], as those of GPT-2 do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
