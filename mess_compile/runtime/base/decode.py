"""Decodes JSON values into frozen dataclasses, strictly: no missing or unknown key, no coerced type, no infinity."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from typing import Any, Dict, Tuple, Union

_LARGEST = int(sys.float_info.max)
_UNIONS = (Union, getattr(types, "UnionType", Union))
"""`Optional[X]`, and from Python 3.10 on `X | None`."""


class DecodeError(Exception):
    """The message names the place, the value found and the value expected."""


class ForeignError(DecodeError):
    """The document has another format or version."""


LOCAL = {"stored": False}
"""Metadata of a dataclass field that documents do not hold; decoding leaves its default."""


def encode(value: Any, form: str, version: int) -> Dict[str, Any]:
    """A dataclass as the content of a document that begins with its format and version."""
    return {"format": form, "version": version, **_content(value)}


def _content(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _content(getattr(value, name)) for name in _stored(value)}
    if isinstance(value, tuple):
        return [_content(item) for item in value]
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items()}
    return value


def _stored(kind: Any) -> Tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind) if field.metadata != LOCAL)


def document(kind: Any, text: str, form: str, version: int, where: str) -> Any:
    """Decode JSON text that `encode` produced into the dataclass `kind`. Raises ForeignError, DecodeError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    if not isinstance(content, dict) or (content.pop("format", None), content.pop("version", None)) != (form, version):
        raise ForeignError(f"{where} is not {form} {version}")
    return decode(kind, content, where)


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, str, int, float, bool, Optional, Tuple or Dict[str, ...] of these."""
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        return None if value is None else decode(arguments[0], value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    if origin is dict:
        items = _of_type(dict, value, where, "an object").items()
        return {key: decode(arguments[1], item, f"{where}[{key}]") for key, item in items}
    return _decode_scalar(kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    content: Dict[str, Any] = _of_type(dict, value, where, "an object")
    hints = typing.get_type_hints(kind)
    kinds = {name: hints[name] for name in _stored(kind)}
    missing, unknown = sorted(set(kinds) - set(content)), sorted(set(content) - set(kinds))
    if missing or unknown:
        raise DecodeError(f"{where} lacks {missing} and has unknown {unknown}"[:300])
    return kind(**{name: decode(kinds[name], content[name], f"{where}.{name}") for name in kinds})


def _decode_tuple(kinds: Tuple[Any, ...], value: Any, where: str) -> Tuple[Any, ...]:
    items = _of_type(list, value, where, "a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(items) != len(kinds):
        raise DecodeError(f"{where} has {len(items)} entries, not {len(kinds)}")
    return tuple(decode(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, items)))


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    return _of_type(kind, value, where, {str: "text", bool: "true or false", int: "an integer"}.get(kind, "a number"))


def _of_type(kind: Any, value: Any, where: str, expected: str) -> Any:
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise DecodeError(f"{where} is {_as_text(value)}, not {expected}")
    return value


def _as_text(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return "nested too deeply"
