"""Decodes JSON and TOML values into frozen dataclasses, strictly: no missing or unknown key, no coerced type, no
infinity.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import sys
import types
import typing
from typing import Any, Callable, Dict, Iterable, Optional, Tuple, Union

from mess_compile.runtime.base.errors import did_you_mean

_LARGEST = int(sys.float_info.max)
_UNIONS = (Union, getattr(types, "UnionType", Union))
"""`Union` and `Optional`, and from Python 3.10 on `X | Y`."""
_EXPECTED = {str: "text", bool: "true or false", int: "an integer", float: "a number"}
_MOST_NAMED = 20


class DecodeError(Exception):
    """The message names the place, the value found and the value expected."""


class ForeignError(DecodeError):
    """The document has another format or version."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What a value must satisfy before its type is looked at; `expected` continues "X is 3, not ..."."""

    passes: Callable[[Any], bool]
    expected: str


def one_of(names: Iterable[str]) -> Check:
    """A text among `names`."""
    known = tuple(names)
    return Check(lambda value: type(value) is str and value in known, f"one of {', '.join(known)}")


def matches(pattern: str, expected: str) -> Check:
    """A text that a regular expression matches in full."""
    return Check(lambda value: type(value) is str and re.fullmatch(pattern, value) is not None, expected)


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a document holds a field of a dataclass.

    Where it is `local`, only documents that stay on this machine hold it; elsewhere it has its default. Where it is
    `optional`, a document may lack it, and it has its default. `key` is its name there, if it is another one. `check`
    looks at the value, `each` at every item of a list; `read` converts the value, given its path, in place of the
    field's type.
    """

    local: bool = False
    optional: bool = False
    key: Optional[str] = None
    check: Optional[Check] = None
    each: Optional[Check] = None
    read: Optional[Callable[[Any, str], Any]] = None


def entry(**how: Any) -> Dict[str, Entry]:
    """The metadata of a dataclass field, from the arguments of Entry."""
    return {"entry": Entry(**how)}


SHA256 = matches("[0-9a-f]{64}", "a SHA-256")
LOCAL, OPTIONAL = entry(local=True), entry(optional=True)
_PLAIN = Entry()


def encode(value: Any, form: str, version: int) -> Dict[str, Any]:
    """A dataclass as the content of a document that begins with its format and version, without local fields."""
    return {"format": form, "version": version, **_content(value)}


def _content(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind: Any = type(value)
        found = _fields(kind, False)
        return {key: _content(getattr(value, name)) for key, (name, _, _) in found.items()}
    if isinstance(value, tuple):
        return [_content(item) for item in value]
    if isinstance(value, dict):
        return {key: _content(item) for key, item in value.items()}
    return value


@functools.lru_cache(maxsize=None)
def _parts(kind: Any) -> Tuple[Any, Tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


@functools.lru_cache(maxsize=None)
def _fields(kind: Any, local: bool) -> Dict[str, Tuple[str, Any, Entry]]:
    """By the document's key: name, type and entry of each field."""
    hints, found = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        how = field.metadata.get("entry", _PLAIN)
        if local or not how.local:
            found[how.key or field.name] = (field.name, hints[field.name], how)
    return found


def document(kind: Any, text: str, form: str, version: int, where: str) -> Any:
    """Decode JSON text that `encode` produced into the dataclass `kind`. Raises ForeignError, DecodeError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DecodeError(str(error)) from error
    if not isinstance(content, dict) or (content.pop("format", None), content.pop("version", None)) != (form, version):
        raise ForeignError(f"{where} is not {form} {version}")
    return decode(kind, content, where)


def decode(kind: Any, value: Any, where: str, local: bool = False, toml: bool = False) -> Any:
    """`value` as `kind`: a dataclass, str, int, float, bool, or Optional, Union, Tuple or Dict[str, ...] of these; Any
    takes every value.

    `where` begins the paths that messages name, such as `plan.stages[0].row`; "" for the document itself. With `local`
    the document holds local fields, too. In `toml`, which people write, lists are counted from 1.
    Raises DecodeError.
    """
    return _Decoder(local, toml).decoded(kind, value, where)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    local: bool
    toml: bool

    @property
    def first(self) -> int:
        return 1 if self.toml else 0

    @property
    def object(self) -> str:
        return "a table" if self.toml else "an object"

    def decoded(self, kind: Any, value: Any, where: str) -> Any:
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, where)
        origin, arguments = _parts(kind)
        if origin in _UNIONS:
            return self._union(arguments, value, where)
        if origin is tuple:
            return self._tuple(arguments, value, where)
        if origin is dict:
            items = _of_type(dict, value, where, self.object).items()
            return {key: self.decoded(arguments[1], item, f"{where}[{key}]") for key, item in items}
        if kind is float and type(value) is int and abs(value) <= _LARGEST:
            return float(value)
        return _of_type(kind, value, where, _EXPECTED[kind])

    def _dataclass(self, kind: Any, value: Any, where: str) -> Any:
        content: Dict[str, Any] = _of_type(dict, value, where or "the content", self.object)
        known, found = _fields(kind, self.local), {}
        for key in content:
            if key not in known:
                raise DecodeError(f"{_path(where, key)} is not a known entry{_nearest(key, known)}")
        for key, (name, field_kind, how) in known.items():
            if how is _PLAIN and key in content and _is_plain(field_kind, content[key]):
                found[name] = content[key]  # at once, without a path: a front holds tens of thousands
            elif key in content:
                found[name] = self._field(field_kind, how, content[key], _path(where, key))
            elif not how.optional:
                raise DecodeError(
                    f"{_path(where, key)} is missing" + (f": give {how.check.expected}" if how.check else "")
                )
        return kind(**found)

    def _field(self, kind: Any, how: Entry, value: Any, where: str) -> Any:
        if how.check is not None:
            need(how.check.passes(value), where, value, how.check.expected)
        if how.each is not None and isinstance(value, list):
            for index, item in enumerate(value, start=self.first):
                need(how.each.passes(item), f"{where}[{index}]", item, how.each.expected)
        return self.decoded(kind, value, where) if how.read is None else how.read(value, where)

    def _union(self, kinds: Tuple[Any, ...], value: Any, where: str) -> Any:
        """A value of one of several types, told apart by what JSON holds: none of them is a dataclass or a list."""
        if value is None and type(None) in kinds:
            return None
        others = [kind for kind in kinds if kind is not type(None)]
        if len(others) == 1:
            return self.decoded(others[0], value, where)
        fitting = [kind for kind in others if type(value) is kind]
        need(bool(fitting), where, value, " or ".join(_EXPECTED[kind] for kind in others))
        return self.decoded(fitting[0], value, where)

    def _tuple(self, kinds: Tuple[Any, ...], value: Any, where: str) -> Tuple[Any, ...]:
        items = _of_type(list, value, where, "a list")
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(items)
        if len(items) != len(kinds):
            raise DecodeError(f"{where} has {len(items)} entries, not {len(kinds)}")
        if all(map(_is_plain, kinds, items)):
            return tuple(items)
        places = enumerate(zip(kinds, items), start=self.first)
        return tuple(self.decoded(kind, item, f"{where}[{index}]") for index, (kind, item) in places)


def need(condition: bool, where: str, value: Any, expected: str) -> None:
    """Raises DecodeError with the path, the value found and the value expected, unless `condition` holds."""
    if not condition:
        raise DecodeError(f"{where} is {_as_text(value)}, not {expected}")


def _is_plain(kind: Any, value: Any) -> bool:
    """Whether a text, integer or truth value is of the kind."""
    return type(value) is kind and kind in (str, int, bool)


def _path(where: str, key: str) -> str:
    name = f"{key:.80}" if key.isprintable() and key else f"{key!r:.80}"
    return f"{where}.{name}" if where else name


def _nearest(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    return did_you_mean(key, names) or f"; known are {', '.join(names[:_MOST_NAMED])}"


def _of_type(kind: Any, value: Any, where: str, expected: str) -> Any:
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        need(False, where, value, expected)
    return value


def _as_text(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return "nested too deeply"
    except ValueError:
        return "a number of thousands of digits"
