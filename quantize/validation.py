"""JSON documents become records strictly: a value has the type that its field names, and nothing is converted to fit.

A string is no number and "false" is not true; null stands only where a field may be None, NaN and infinity nowhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
SHOWN = 60
"""Characters of a wrong value that a message repeats."""


class Misfit(ValueError):
    """A value that its field cannot have; the message names both."""


class UnknownField(Misfit):
    """A field that the record does not have."""


def structured(kind: type[Record], document: object, *, unknown_fields: bool = False) -> Record:
    """The record that a document holds; what is no field of it is left out with `unknown_fields`, and refused without.

    Raises Misfit, or UnknownField.
    """
    record: Record = _record(kind, document, "", unknown_fields)
    return record


def _record(kind: Any, value: object, where: str, unknown_fields: bool) -> Any:
    document = _document(value, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(document.keys() - fields.keys())
    if unknown and not unknown_fields:
        raise UnknownField(f"there is no field {_joined(where, unknown[0])}")
    hints = _hints(kind)
    required = {name for name, field in fields.items() if _is_required(field)}
    for name in sorted(required - document.keys()):
        raise Misfit(f"{_joined(where, name)} is missing")
    present = document.keys() & fields.keys()
    return kind(**{name: _value(hints[name], document[name], _joined(where, name), unknown_fields) for name in present})


def _value(kind: Any, value: object, where: str, unknown_fields: bool) -> Any:
    """The `value` as a field of the type `kind` holds it."""
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where, unknown_fields)
    arguments = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return _alternative(arguments, value, where, unknown_fields)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise _misfit(where, value, "a list")
        return tuple(
            _value(arguments[0], item, f"{where}[{index}]", unknown_fields) for index, item in enumerate(value)
        )
    if get_origin(kind) in (dict, Mapping):
        items = _document(value, where).items()
        return {key: _value(arguments[1], item, _joined(where, key), unknown_fields) for key, item in items}
    return _scalar(kind, value, where)


def _alternative(kinds: tuple[Any, ...], value: object, where: str, unknown_fields: bool) -> Any:
    """A value of one of several types: a record or None, or one of a few scalars."""
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    exact = [kind for kind in others if type(value) is kind]
    if not exact and len(others) > 1:
        raise _misfit(where, value, " or ".join(WORDS[kind] for kind in others))
    return _value((exact or others)[0], value, where, unknown_fields)


def _scalar(kind: type, value: object, where: str) -> object:
    if kind is float and type(value) in (int, float):
        number = float(value)  # type: ignore[arg-type]
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        return value
    raise _misfit(where, value, WORDS[kind])


def _document(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _misfit(where or "the document", value, "an object")
    return value


def _misfit(where: str, value: object, words: str) -> Misfit:
    shown = repr(value)
    return Misfit(f"{where} is {words}, not {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}")


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
