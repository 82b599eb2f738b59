"""Checks an ONNX file of a bundle before any engine library sees it.

A graph may name files to read and the memory that its tensors take; here both must match what the bundle contains.
Bytes that an engine library's parser could read differently are refused: fields that ONNX does not define, and numbers
longer than necessary. The nodes' computation is not checked. Source: onnx.proto3 (fields), the Protocol Buffers wire
format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple, Union

from mess_compile.runtime.base.errors import BundleError

MAX_GRAPH_BYTES = 1 << 24
MAX_FIELDS = 1 << 19
"""The limit over all graphs of a bundle; it takes seconds to check so many."""
_MAX_DEPTH = 24
_MAX_DIMS = 32
_MAX_ELEMENTS = 1 << 40
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
         17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # fmt: skip
"""Bits of an element, by TensorProto.DataType; texts have none and are refused."""
_Value = Union[int, memoryview]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIRES = {"int": (_VARINT,), "ints": (_VARINT, _BYTES), "float": (_FIXED32,), "floats": (_FIXED32, _BYTES),
          "doubles": (_FIXED64, _BYTES)}  # fmt: skip
"""The wire types of each kind of field; texts and messages are bytes."""


def _numbered(**kinds: Tuple[int, ...]) -> Dict[int, str]:
    return {number: kind for kind, numbers in kinds.items() for number in numbers}


_FIELDS: Dict[str, Dict[int, str]] = {
    "model": _numbered(
        int=(1, 5), text=(2, 3, 4, 6), graph=(7,), opset=(8,), pair=(14,), training=(20,), function=(25,)
    ),
    "graph": _numbered(
        node=(1,), text=(2, 10), tensor=(5,), value=(11, 12, 13), annotation=(14,), sparse=(15,), pair=(16,)
    ),
    "function": _numbered(
        text=(1, 4, 5, 6, 8, 10, 13), node=(7,), opset=(9,), attribute=(11,), value=(12,), pair=(14,)
    ),
    "node": _numbered(text=(1, 2, 3, 4, 6, 7, 8), attribute=(5,), pair=(9,)),
    "attribute": _numbered(
        text=(1, 4, 9, 13, 21), float=(2,), int=(3, 20), floats=(7,), ints=(8,),
        tensor=(5, 10), graph=(6, 11), type=(14, 15), sparse=(22, 23),
    ),
    "tensor": _numbered(int=(2, 14), ints=(1, 5, 7, 11), floats=(4,), doubles=(10,), text=(6, 8, 9, 12), pair=(13, 16)),
    "value": _numbered(text=(1, 3), type=(2,), pair=(4,)),
    "type": _numbered(tensor_type=(1,), text=(6,)),
    "tensor_type": _numbered(int=(1,), shape=(2,)),
    "shape": _numbered(dimension=(1,)),
    "dimension": _numbered(int=(1,), text=(2, 3)),
    "annotation": _numbered(text=(1,), pair=(2,)),
    "opset": _numbered(text=(1,), int=(2,)),
    "pair": _numbered(text=(1, 2)),
}  # fmt: skip
"""The fields of each message, by number, with their kinds. Types other than tensors, segments of tensors, devices and
shards are left out: no graph of a bundle has them.
"""
_REFUSED = {"sparse": "a sparse tensor", "training": "training information"}
_SINGLE = {"model": (7,), "attribute": (5, 6)}
"""A parser would merge two of these into one that was not checked."""
_OP_TYPE = 4
_DIMS, _DATA_TYPE, _RAW, _EXTERNAL, _LOCATION = 1, 2, 9, 13, 14
_TYPED = (4, 5, 7, 10, 11)
_PLACED = frozenset(("location", "offset", "length"))
_ENGINES = (b"EPContext", b"TRTEngineOp")
"""Nodes that contain an engine: they would load code that was not built here."""


class _Damaged(Exception):
    """The message names the damage."""


@dataclass
class _Look:
    """The check of one graph: the files beside it with their sizes, and the number of fields still allowed."""

    files: Mapping[str, int]
    fields_left: int


def check_graphs(folder: Path, files: Mapping[str, int]) -> None:
    """Check every graph in `folder`, whose files are `files` with their sizes. Raises BundleError."""
    left = MAX_FIELDS
    for name in files:
        if name.endswith(".onnx"):
            left = check(folder, name, files, left)


def check(folder: Path, name: str, files: Mapping[str, int], fields_left: int = MAX_FIELDS) -> int:
    """Check the graph `name`; returns the rest of `fields_left`. Raises BundleError."""
    size = files[name]
    if size > MAX_GRAPH_BYTES:
        raise BundleError(f"{name} has {size} bytes, too many for a graph whose weights are in other files")
    place = name[: name.rfind("/") + 1]
    beside = {path[len(place) :]: size for path, size in files.items() if path.startswith(place)}
    look = _Look(beside, fields_left)
    try:
        _check_message("model", memoryview((folder / name).read_bytes()), look, _MAX_DEPTH)
    except _Damaged as error:
        raise BundleError(f"{name} is not a graph that a bundle may contain: {error}") from error
    return look.fields_left


def _check_message(kind: str, content: memoryview, look: _Look, depth: int) -> None:
    if not depth:
        raise _Damaged(f"it is nested more than {_MAX_DEPTH} deep")
    if kind in _REFUSED:
        raise _Damaged(f"it has {_REFUSED[kind]}")
    if kind == "tensor":
        return _check_tensor(content, look)
    single, seen = _SINGLE.get(kind, ()), set()
    for field, value in _fields(kind, content, look):
        if field in single:
            if field in seen:
                raise _Damaged("a message is there twice")
            seen.add(field)
        if isinstance(value, int):
            continue
        if kind == "node" and field == _OP_TYPE and value.tobytes() in _ENGINES:
            raise _Damaged("a node of it is an engine")
        holds = _FIELDS[kind][field]
        if holds in _FIELDS or holds in _REFUSED:
            _check_message(holds, value, look, depth - 1)
    return None


def _check_tensor(content: memoryview, look: _Look) -> None:
    """Check that the elements of its dimensions are there, in it or in a file of the bundle."""
    dims: List[int] = []
    data_type, payload, raw, external, outside = 0, 0, -1, [], False
    for field, value in _fields("tensor", content, look):
        if field == _DIMS:
            _add_dims(dims, value)
        elif field == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif field == _LOCATION:
            outside = value != 0
        elif field == _EXTERNAL and isinstance(value, memoryview):
            external.append(_pair(value, look))
        elif field == _RAW and isinstance(value, memoryview):
            raw = len(value)
        elif field in _TYPED:
            payload += 8 if isinstance(value, int) else len(value)
    elements = _product(dims)
    if data_type not in _BITS:
        raise _Damaged(f"a tensor has elements of type {data_type}")
    expected = (elements * _BITS[data_type] + 7) // 8
    if outside or external:
        if raw >= 0 or payload or not outside:
            raise _Damaged("a tensor has values both in the graph and outside")
        _check_external(external, expected, look.files)
    elif raw >= 0 and raw != expected:
        raise _Damaged(f"a tensor of {dims[:8]} has {raw} bytes, not {expected}")
    elif raw < 0 and elements > 2 * payload:
        raise _Damaged(f"a tensor of {dims[:8]} has {payload} bytes of values")


def _add_dims(dims: List[int], value: _Value) -> None:
    for size in [value] if isinstance(value, int) else _varints(value):
        dims.append(size)
        if len(dims) > _MAX_DIMS or size > _MAX_ELEMENTS:
            raise _Damaged(f"a tensor has the shape {dims[:8]}")


def _product(dims: List[int]) -> int:
    elements = 1
    for size in dims:
        elements *= size
        if elements > _MAX_ELEMENTS:
            raise _Damaged(f"a tensor has the shape {dims[:8]}")
    return elements


def _check_external(pairs: List[Tuple[str, str]], expected: int, files: Mapping[str, int]) -> None:
    named = dict(pairs)
    location, offset = named.get("location", ""), _number(named.get("offset", "0"))
    if len(named) != len(pairs) or location not in files or not _PLACED.issuperset(named):
        raise _Damaged(f"a tensor refers to {location!r:.200}, which is not a file of the bundle")
    length = _number(named["length"]) if "length" in named else files[location] - offset
    if length != expected or offset + length > files[location]:
        raise _Damaged(
            f"a tensor of {expected} bytes refers to {offset} + {length} of {location}, which has {files[location]} "
            "bytes"
        )


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 15:
        raise _Damaged(f"a tensor's place is {text!r:.80}, not a number")
    return int(text)


def _pair(content: memoryview, look: _Look) -> Tuple[str, str]:
    texts = {field: value for field, value in _fields("pair", content, look) if isinstance(value, memoryview)}
    try:
        key, value = (str(texts.get(field, b""), "utf-8") for field in (1, 2))
    except UnicodeDecodeError as error:
        raise _Damaged("the place of a tensor is not text") from error
    return key, value


def _fields(kind: str, content: memoryview, look: _Look) -> Iterator[Tuple[int, _Value]]:
    """Field numbers and values of one message, in the order of the file."""
    known, position = _FIELDS[kind], 0
    while position < len(content):
        look.fields_left -= 1
        if look.fields_left < 0:
            raise _Damaged(f"the bundle's graphs have more than {MAX_FIELDS} fields")
        key, position = _varint(content, position, 32)
        field, wire = key >> 3, key & 7
        if field not in known or wire not in _WIRES.get(known[field], (_BYTES,)):
            raise _Damaged(f"it is not ONNX as known here: a {kind} has a field {field} of wire type {wire}")
        if wire == _VARINT:
            value, position = _varint(content, position, 64)
            yield field, value
            continue
        if wire == _BYTES:
            size, position = _varint(content, position, 31)
        else:
            size = 8 if wire == _FIXED64 else 4
        if position + size > len(content):
            raise _Damaged("it is truncated")
        yield field, content[position : position + size]
        position += size


def _varints(content: memoryview) -> Iterator[int]:
    position = 0
    while position < len(content):
        value, position = _varint(content, position, 64)
        yield value


def _varint(content: memoryview, position: int, bits: int) -> Tuple[int, int]:
    """A number below 2**bits in the fewest bytes: parsers that read fewer bits would read another number."""
    value = 0
    for shift in range(0, bits, 7):
        if position >= len(content):
            raise _Damaged("it is truncated")
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> bits or (shift and not byte):
                break
            return value, position
    raise _Damaged(f"it is not ONNX: a number is longer than necessary, or than {bits} bits")
