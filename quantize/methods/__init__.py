"""How codes and scales are chosen: one module a method, registered by being there.

A module of this package that has a `METHOD` adds a method: its name becomes a value of `--recipe`, its options become
options of `quantize run` and keys of a catalogue. Modules are imported for their options alone, so they import what is
heavy (torch, transformers, bitsandbytes) inside of functions.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import shutil
from collections.abc import Mapping
from typing import Any

from quantize.errors import ConfigError, memory_errors
from quantize.methods.method import Job, Larger, Method, no_attempts
from quantize.options import OTHERS, RECIPE, SOURCE, Choice, Option
from quantize.records import Checkout, Quantized, Recipe, Scalar

__all__ = [
    "AUTO",
    "Job",
    "Larger",
    "Method",
    "all_options",
    "check",
    "get",
    "names",
    "normalized",
    "options",
    "quantize",
    "recipe_of",
    "recipe_options",
    "registered",
    "replace",
]

ADVICE = "end other programs, try another --device, or --recipe rtn, which takes least memory"
"""Where memory does not suffice."""
AUTO = "auto"
"""The recipe that tries one method after the other; see quantize/search.py."""


@functools.cache
def registered() -> tuple[Method, ...]:
    """All methods, the plainest first."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    methods = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return tuple(sorted(methods, key=lambda method: (method.order, method.name)))


def names() -> tuple[str, ...]:
    """What `--recipe` may be."""
    return (AUTO, *(method.name for method in registered()))


def former_names() -> dict[str, str]:
    """What methods were called in earlier versions, and what they are called now."""
    return {former: method.name for method in registered() for former in method.former_names}


def get(name: str) -> Method:
    """The method of that name; raises ConfigError."""
    current = former_names().get(name, name)
    for method in registered():
        if method.name == current:
            return method
    raise ConfigError(f"there is no recipe {name!r}: choose one of {', '.join(names())}")


def tried_by_auto() -> tuple[Method, ...]:
    """The methods of which `auto` makes attempts."""
    return tuple(method for method in registered() if method.attempts is not no_attempts)


def options(name: str | None = None) -> tuple[Option, ...]:
    """The options of a method, of those that `auto` tries, or without a name of all methods; each once."""
    if name is None:
        owners = registered()
    elif name == AUTO:
        owners = tried_by_auto()
    else:
        owners = (get(name),)
    return tuple(dict.fromkeys(option for method in owners for option in method.options))


def recipe_options() -> tuple[Option, ...]:
    """All options that fill a recipe: which method, what every method has, what is a method's own."""
    summaries = "; ".join(f"{method.name} {method.summary}" for method in registered())
    tried, for_8_bits = (
        " and ".join(method.name for method in tried_by_auto() if method.attempts(Recipe(bits=bits))) for bits in (4, 8)
    )
    which = Option(
        "--recipe",
        "name",
        Choice(names()),
        f"{summaries}; {AUTO} tries {tried} until --target is reached, and takes {for_8_bits} for 8 bits.",
        Recipe,
        former_values=tuple(former_names().items()),
        key="recipe",
    )
    bits, *shared = RECIPE
    return (bits, which, *shared, *options())


def all_options() -> tuple[Option, ...]:
    """Every option of every command, in the order in which they are listed."""
    return (*SOURCE, *recipe_options(), *OTHERS)


def recipe_of(values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values of its fields and of methods' options; raises ConfigError."""
    shared = {item.name for item in dataclasses.fields(Recipe)}
    own = {name: value for name, value in values.items() if name not in shared}
    return normalized(Recipe(**{name: value for name, value in values.items() if name in shared}, options=own))


def replace(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values of its fields and of methods' options; raises ConfigError."""
    shared = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(Recipe) if item.name != "options"}
    return recipe_of({**shared, **recipe.options, **values})


def normalized(recipe: Recipe) -> Recipe:
    """The recipe with the present name of its method, and with only those of its options that change something.

    `auto` may have the options of all methods that it tries. Raises ConfigError for a value or an option that the
    method does not have.
    """
    name = recipe.name if recipe.name == AUTO else get(recipe.name).name
    own = {option.field: option for option in options(name)}
    every = {option.field: option for option in options()}
    changed: dict[str, Scalar] = {}
    for field, value in sorted(recipe.options.items()):
        option = every.get(field)
        if option is None:
            raise ConfigError(f"no recipe has an option {field!r}: it may be one of {', '.join(sorted(every))}")
        if not option.kind.accepts(value):
            raise ConfigError(f"{field} is {option.kind.words}, not {value!r}")
        if value == option.default:
            continue
        if field not in own:
            raise ConfigError(f"the recipe {name} has no {option.flag}: leave it out, or choose another --recipe")
        changed[field] = type(option.default)(value)
    return dataclasses.replace(recipe, name=name, options=changed)


def check(checkout: Checkout, recipe: Recipe, corpus: str) -> None:
    """Raise ConfigError or CorpusError now, rather than after other attempts, where the recipe cannot work.

    `corpus` is the text that the package will be judged by.
    """
    for method in registered():
        if recipe.name in (method.name, AUTO):
            method.check(checkout, recipe, corpus)


def quantize(job: Job) -> Quantized:
    """Write quantized weights and their config into the folder `job.output`, by the method that the recipe names.

    Finished parts are kept in the folder `job.resume` for a run that goes on there; without one they go away at the
    end. Raises CorruptModel (NaN, damage), UnsupportedModel (nothing to quantize), CorpusError (the calibration text),
    DeviceError or StorageError.
    """
    method = get(job.recipe.name)
    with memory_errors(f"quantizing {job.checkout.source.name} by the recipe {method.name} on {job.device}", ADVICE):
        if job.resume is not None:
            return method.quantize(job)
        temporary = job.output.with_name(f"{job.output.name}.unfinished")
        quantized = method.quantize(dataclasses.replace(job, resume=temporary))
    shutil.rmtree(temporary, ignore_errors=True)
    return quantized


def resized(job: Job, share: float, asked: Recipe) -> Larger | None:
    """The smallest file that is predicted to diverge by `share` of what the recipe of `job` does, or the largest
    that the recipe `asked` for allows; None where only one size can be had. Raises what `quantize` raises."""
    method = get(job.recipe.name)
    if method.resized is None:
        return None
    with memory_errors(f"predicting sizes for {job.checkout.source.name} on {job.device}", ADVICE):
        larger = method.resized(job, share, asked)
    return dataclasses.replace(larger, recipe=normalized(larger.recipe)) if larger else None
