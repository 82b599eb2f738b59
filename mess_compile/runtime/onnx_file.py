"""An ONNX file of a bundle, looked over before any engine library sees it.

A graph may name files to read and say how much memory its tensors take; here both must be what the bundle holds. What
the nodes compute is not judged. Source: onnx.proto3 (field numbers), the Protocol Buffers wire format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple, Union

from mess_compile.runtime.errors import BundleError

MAX_GRAPH_BYTES = 1 << 28
_MAX_DEPTH = 24
_MAX_ELEMENTS = 1 << 40
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
         17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4}  # fmt: skip
"""Of an element, by TensorProto.DataType; texts have none and are refused."""
_Value = Union[int, bytes]

# Fields that hold messages: kind of the message -> field number -> kind of what it holds.
_KINDS: Dict[str, Dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
}
_REFUSED = {"sparse": "a sparse tensor", "training": "training information"}
_SINGLE = {"model": (7,), "attribute": (5, 6)}
"""Of these a parser merges two into one that nobody looked over."""
_OP_TYPE = 4
_DIMS, _DATA_TYPE, _RAW, _EXTERNAL, _LOCATION = 1, 2, 9, 13, 14
_TYPED = (4, 5, 7, 10, 11)
_ENGINES = (b"EPContext", b"TRTEngineOp")
"""Nodes whose content is an engine: they would load what nobody built here."""


class _Damaged(Exception):
    """The message says how."""


def check(folder: Path, name: str, files: Mapping[str, int]) -> None:
    """Look over the graph `name` in `folder`, whose files are `files` with their sizes. Raises BundleError."""
    size = files[name]
    if size > MAX_GRAPH_BYTES:
        raise BundleError(f"{name} has {size} bytes, more than any graph whose weights lie beside it")
    place = name[: name.rfind("/") + 1]
    beside = {path[len(place) :]: size for path, size in files.items() if path.startswith(place)}
    try:
        _walk("model", (folder / name).read_bytes(), beside, _MAX_DEPTH)
    except _Damaged as error:
        raise BundleError(f"{name} is not a graph that a bundle holds: {error}") from error


def _walk(kind: str, content: bytes, files: Mapping[str, int], depth: int) -> None:
    if not depth:
        raise _Damaged(f"it is nested more than {_MAX_DEPTH} deep")
    if kind in _REFUSED:
        raise _Damaged(f"it has {_REFUSED[kind]}")
    if kind == "tensor":
        return _check_tensor(content, files)
    single, seen = _SINGLE.get(kind, ()), set()
    for field, value in _fields(content):
        if field in single:
            if field in seen:
                raise _Damaged("a message stands where there is one already")
            seen.add(field)
        if kind == "node" and field == _OP_TYPE and value in _ENGINES:
            raise _Damaged("a node of it is an engine")
        if field in _KINDS[kind]:
            _walk(_KINDS[kind][field], _message(value), files, depth - 1)
    return None


def _check_tensor(content: bytes, files: Mapping[str, int]) -> None:
    """The elements that its dimensions ask for are there, in it or in a file of the bundle."""
    dims: List[int] = []
    data_type, payload, raw, external, outside = 0, 0, -1, [], False
    for field, value in _fields(content):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == _DATA_TYPE and isinstance(value, int):
            data_type = value
        elif field == _LOCATION:
            outside = value != 0
        elif field == _EXTERNAL:
            external.append(_pair(_message(value)))
        elif field == _RAW:
            raw = len(_message(value))
        elif field in _TYPED:
            payload += 8 if isinstance(value, int) else len(value)
    elements = _product(dims)
    if data_type not in _BITS:
        raise _Damaged(f"a tensor has elements of type {data_type}")
    wanted = (elements * _BITS[data_type] + 7) // 8
    if outside or external:
        if raw >= 0 or payload or not outside:
            raise _Damaged("a tensor lies in the graph and outside of it")
        _check_external(external, wanted, files)
    elif raw >= 0 and raw != wanted:
        raise _Damaged(f"a tensor of {dims[:8]} has {raw} bytes, not {wanted}")
    elif raw < 0 and elements > 2 * payload:
        raise _Damaged(f"a tensor of {dims[:8]} has {payload} bytes of values")


def _product(dims: List[int]) -> int:
    elements = 1
    for size in dims:
        elements *= size
        if elements > _MAX_ELEMENTS or len(dims) > 32:
            raise _Damaged(f"a tensor has the shape {dims[:8]}")
    return elements


def _check_external(pairs: List[Tuple[str, str]], wanted: int, files: Mapping[str, int]) -> None:
    named = dict(pairs)
    location, offset = named.get("location", ""), _number(named.get("offset", "0"))
    if len(named) != len(pairs) or location not in files:
        raise _Damaged(f"a tensor lies in {location!r:.200}, which is no file of the bundle")
    length = _number(named["length"]) if "length" in named else files[location] - offset
    if length != wanted or offset + length > files[location]:
        raise _Damaged(f"a tensor of {wanted} bytes lies at {offset} + {length} of {location}, {files[location]} bytes")


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 15:
        raise _Damaged(f"a tensor lies at {text!r:.80}")
    return int(text)


def _pair(content: bytes) -> Tuple[str, str]:
    texts = {field: _message(value) for field, value in _fields(content)}
    try:
        return texts.get(1, b"").decode("utf-8"), texts.get(2, b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Damaged("the place of a tensor is no text") from error


def _message(value: _Value) -> bytes:
    if isinstance(value, int):
        raise _Damaged("a number stands where a message should")
    return value


def _fields(content: bytes) -> Iterator[Tuple[int, _Value]]:
    """Field numbers and values of one message, in the order in which they lie."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(content, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(content, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise _Damaged("it is no ONNX")
        if position + size > len(content):
            raise _Damaged("it is truncated")
        yield key >> 3, content[position : position + size]
        position += size


def _varints(content: bytes) -> Iterator[int]:
    position = 0
    while position < len(content):
        value, position = _varint(content, position)
        yield value


def _varint(content: bytes, position: int) -> Tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(content):
            raise _Damaged("it is truncated")
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise _Damaged("it is no ONNX")
