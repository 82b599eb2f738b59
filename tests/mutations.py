"""Bundles as a forger would write them: bytes changed blindly, or contents changed and hashes and seal made to fit."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import stat
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx

Parts = dict[str, bytes]
MANIFEST = "manifest.json"
SEAL_BYTES = 71
NAMES = (
    *("../outside", "/tmp/outside", "graphs/../../outside", "a//b", "a\\b", "C:x", ".ssh/config", "graphs", "", "a/"),
    *("manifest.json", "manifest.json.sig", "manifest.json.sha256", "a\nb", "ä", "x" * 300, "a/b/c/d/e/f", ".", "a\0b"),
)
NUMBERS = (0, -1, 1, 2, 255, 2**31, 2**63, 2**64, -(2**63), 10**18, 0.5, -0.0, 1e308)
VALUES = (None, True, False, "", "x", "default", [], {}, [[]], [None], {"a": 1}, *NUMBERS)
PLACES = (
    *("/etc/passwd", "../golden/0.npy", "../../outside", "weights", "", ".", "weights/../../manifest.json", "x" * 5000),
)


def blindly(random_: random.Random, content: bytes) -> bytes:
    """Bits turned, bytes overwritten, dropped, doubled, swapped or cut off."""
    changed = bytearray(content)
    for _ in range(random_.choice((1, 1, 1, 2, 5, 30))):
        at = random_.randrange(len(changed) + 1) if changed else 0
        kind = random_.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = random_.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del changed[at : at + random_.choice((1, 2, 7, 100))]
        elif kind == 3:
            changed[at:at] = changed[at : at + random_.choice((1, 4, 50))] or b"\xff"
        elif kind == 4:
            changed[at : at + 8] = random_.choice((b"\xff" * 8, bytes(8), b"\xff\xff\xff\xff\x07"))
        elif random_.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def sealed(content: bytes) -> bytes:
    """With its last bytes the seal over those before."""
    start = content[:-SEAL_BYTES]
    return start + b"sha256:" + hashlib.sha256(start).hexdigest().encode()


def packed(entries: Sequence[tuple[str, bytes, int, int]]) -> bytes:
    """A sealed zip of (name, content, mode, compression)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as content:
        for name, data, mode, compression in entries:
            info = zipfile.ZipInfo(name or "empty")
            info.filename, info.external_attr, info.compress_type = name, mode << 16, compression
            content.writestr(info, data)
        content.comment = bytes(SEAL_BYTES)
    return sealed(stream.getvalue())


def plain(parts: Parts) -> list[tuple[str, bytes, int, int]]:
    return [(name, data, stat.S_IFREG | 0o644, zipfile.ZIP_STORED) for name, data in parts.items()]


def hashed(parts: Parts, manifest: Any) -> Parts:
    """The parts with this manifest and its hash."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    line = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
    return {
        MANIFEST: text,
        f"{MANIFEST}.sha256": line,
        **{n: d for n, d in parts.items() if not n.startswith(MANIFEST)},
    }


def listed(parts: Parts, manifest: Any) -> Parts:
    """The parts with this manifest, in which every file is listed as it is."""
    found = {name: data for name, data in parts.items() if not name.startswith(MANIFEST)}
    files = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in found.items()}
    return hashed(parts, {**manifest, "files": files})


def any_bytes(random_: random.Random, parts: Parts) -> bytes:
    return blindly(random_, packed(plain(parts)))


def any_bytes_sealed(random_: random.Random, parts: Parts) -> bytes:
    """Mostly where the zip's own headers are."""
    content = packed(plain(parts))
    end = random_.choice((0, 600, 4000))
    start = max(0, len(content) - SEAL_BYTES - end) if end else 0
    body = content[:start] + blindly(random_, content[start:-SEAL_BYTES])
    return sealed(body + bytes(SEAL_BYTES))


def one_file(random_: random.Random, parts: Parts) -> bytes:
    """A file that is not what it was, and is listed so."""
    manifest = json.loads(parts[MANIFEST])
    name = random_.choice([name for name in parts if not name.startswith(MANIFEST)])
    return packed(plain(listed({**parts, name: blindly(random_, parts[name])}, manifest)))


def one_value(random_: random.Random, parts: Parts) -> bytes:
    """Some value of the manifest another."""
    manifest = json.loads(parts[MANIFEST])
    for _ in range(random_.choice((1, 1, 2, 4))):
        holder, key = random_.choice(list(_places(manifest)))
        kind = random_.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[random_.choice(("surprise", "", "\ud800", key + "x" if isinstance(key, str) else "y"))] = 1
        elif kind == 2 and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = (
                holder[key] + random_.choice((-1, 1, 0.5)) if random_.random() < 0.5 else random_.choice(NUMBERS)
            )
        else:
            holder[key] = random_.choice((*VALUES, *NAMES))
        if not manifest:
            break
    return packed(plain(hashed(parts, manifest)))


def _places(value: Any) -> list[tuple[Any, Any]]:
    items: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        items.append((value, key))
        items += _places(value[key])
    return items


def odd_json(random_: random.Random, parts: Parts) -> bytes:
    text = parts[MANIFEST].decode()
    deep = random_.choice((10, 500, 100_000))
    found = random_.choice(
        (
            blindly(random_, parts[MANIFEST]),
            ("[" * deep + "]" * deep).encode(),
            ('{"a":' * deep + "1" + "}" * deep).encode(),
            text.replace('"bytes": ', '"bytes": ' + "9" * random_.choice((30, 5000, 1_000_000)), 1).encode(),
            text.replace('"golden": [', '"golden": ' + "[" * deep, 1).encode(),
            text.replace("0.5", random_.choice(("NaN", "Infinity", "1e999", "-1e999", "0.5.5")), 1).encode(),
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + text.encode(),
            text.replace("{", '{"format": "mess-bundle", ', 1).encode(),
            b" " * (5 << 20),
        )
    )
    return packed(plain(hashed(parts, found)))


def other_name(random_: random.Random, parts: Parts) -> bytes:
    """A file under a name that leads elsewhere, in the list and in the archive, or in one of them."""
    manifest = json.loads(parts[MANIFEST])
    old, new = random_.choice([name for name in parts if not name.startswith(MANIFEST)]), random_.choice(NAMES)
    moved = {new if name == old else name: data for name, data in parts.items()}
    if random_.random() < 0.5:
        text = json.dumps(listed(moved, manifest)[MANIFEST].decode())
        moved = listed(moved, json.loads(json.loads(text).replace(json.dumps(old), json.dumps(new))))
    return packed(plain(moved))


def odd_entry(random_: random.Random, parts: Parts) -> bytes:
    """Links, devices, compression, duplicates."""
    entries = plain(parts)
    at = random_.randrange(len(entries))
    name, data, mode, compression = entries[at]
    kind = random_.randrange(5)
    if kind == 0:
        entries[at] = (name, b"/etc/passwd", stat.S_IFLNK | 0o777, compression)
    elif kind == 1:
        entries[at] = (
            name,
            data,
            random_.choice((stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR, stat.S_IFSOCK)),
            compression,
        )
    elif kind == 2:
        entries[at] = (name, data, mode, random_.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)))
    elif kind == 3:
        entries.insert(random_.randrange(len(entries) + 1), (name, data[:10], mode, compression))
    else:
        entries[at] = (name, bytes(30_000_000), mode, zipfile.ZIP_DEFLATED)
    return packed(entries)


def odd_array(random_: random.Random, parts: Parts) -> bytes:
    manifest = json.loads(parts[MANIFEST])
    name = random_.choice([name for name in parts if name.endswith(".npy")])
    header = parts[name][10:128].decode("latin-1")
    old, new = random_.choice(
        (
            ("(8, 12", f"({random_.choice((0, 1, 99999, 2**40, 2**63, -1))}, {random_.choice((12, 2**31))}"),
            ("'|u1'", random_.choice(("'|O'", "'<f8'", "'<U1000000000'", "'V2000000000'", "[('a', '|u1')]"))),
            ("False", random_.choice(("True", "__import__('os').getpid()", "(" * 60))),
            ("{", "{" * 50),
        )
    )
    odd = header.replace(old, new).encode("latin-1")
    content = parts[name][:8] + min(len(odd), 65535).to_bytes(2, "little") + odd + parts[name][128:]
    return packed(plain(listed({**parts, name: content}, manifest)))


def odd_graph(random_: random.Random, parts: Parts) -> bytes:
    """An ONNX graph that reads elsewhere, takes more, or computes otherwise."""
    manifest = json.loads(parts[MANIFEST])
    name = random_.choice([name for name in parts if name.endswith(".onnx")])
    model = onnx.load_from_string(parts[name])
    for _ in range(random_.choice((1, 1, 2))):
        random_.choice(_GRAPH_CHANGES)(random_, model)
    return packed(plain(listed({**parts, name: model.SerializeToString()}, manifest)))


def _placed(random_: random.Random, model: onnx.ModelProto) -> None:
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if tensors:
        entry = random_.choice(random_.choice(tensors).external_data)
        if random_.random() < 0.6:
            entry.key, entry.value = "location", random_.choice(PLACES)
        else:
            entry.key = random_.choice(("offset", "length", "basepath", "checksum"))
            entry.value = str(random_.choice(NUMBERS))


def _sized(random_: random.Random, model: onnx.ModelProto) -> None:
    if model.graph.initializer:
        tensor = random_.choice(model.graph.initializer)
        if random_.random() < 0.5 and tensor.dims:
            tensor.dims[random_.randrange(len(tensor.dims))] = random_.choice((0, -1, 7, 2**31, 2**40, 2**62))
        else:
            tensor.data_type = random_.choice((0, 1, 2, 6, 7, 8, 10, 11, 16, 22, 99))


def _shaped(random_: random.Random, model: onnx.ModelProto) -> None:
    values = [*model.graph.input, *model.graph.output]
    if not values:
        return
    value = random_.choice(values)
    dims = value.type.tensor_type.shape.dim
    if dims:
        dims[random_.randrange(len(dims))].dim_value = random_.choice((0, -1, 1, 7, 2**31, 2**62))
    if random_.random() < 0.3:
        value.type.tensor_type.elem_type = random_.choice((1, 2, 7, 10, 99))


def _computed(random_: random.Random, model: onnx.ModelProto) -> None:
    if not model.graph.node:
        return
    node, kind = random_.choice(model.graph.node), random_.randrange(5)
    if kind == 0:
        node.op_type = random_.choice(("EPContext", "Relu", "Loop", "Nothing", "Identity", "Shape"))
    elif kind == 1:
        node.domain = random_.choice(("com.microsoft", "ai.onnx.ml", "own"))
    elif kind == 2 and node.input:
        node.input[random_.randrange(len(node.input))] = random_.choice(("", "image", "nothing", *node.output))
    elif kind == 3 and node.attribute:
        attribute = random_.choice(node.attribute)
        attribute.i = random_.choice((0, -1, 7, 2**31))
        for index in range(len(attribute.ints)):
            attribute.ints[index] = random_.choice((0, 1, 3, 1000))
    else:
        model.graph.node.remove(node)


def _blindly_stored(random_: random.Random, model: onnx.ModelProto) -> None:
    try:
        model.ParseFromString(blindly(random_, model.SerializeToString()))
    except Exception:
        model.graph.Clear()


_GRAPH_CHANGES: tuple[Callable[[random.Random, onnx.ModelProto], None], ...] = (
    *(_placed, _placed, _sized, _shaped, _computed, _blindly_stored),
)


def hidden_field(random_: random.Random, parts: Parts) -> bytes:
    """A weight in a file of the device, or an engine, under a tag that one parser knows and another one does not."""
    manifest = json.loads(parts[MANIFEST])
    name = random_.choice([name for name in parts if name.endswith(".onnx")])
    model = onnx.load_from_string(parts[name])
    weight = onnx.TensorProto(name="hidden", data_type=1, dims=[4], data_location=1)
    weight.external_data.add(key="location", value=random_.choice(PLACES))
    engine = onnx.NodeProto(op_type="EPContext", domain="com.microsoft", output=["hidden"])
    number, hidden = random_.choice(((5, weight.SerializeToString()), (1, engine.SerializeToString())))
    graph = model.graph.SerializeToString() + _odd_tag(random_, number) + _varint(len(hidden)) + hidden
    model.ClearField("graph")
    content = model.SerializeToString() + b"\x3a" + _varint(len(graph)) + graph
    return packed(plain(listed({**parts, name: content}, manifest)))


def _odd_tag(random_: random.Random, number: int) -> bytes:
    """Of a field that holds a message: with bits above the 32nd, or with bytes that add nothing."""
    tag = number << 3 | 2
    if random_.random() < 0.5:
        return _varint(tag + (random_.randrange(1, 1 << random_.choice((1, 3, 10, 31))) << 32))
    return bytes([tag | 128, *[128] * random_.randrange(9), 0])


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def with_engines(random_: random.Random, parts: Parts) -> bytes:
    """Engines that nobody here has built, for the very GPU that is here; sometimes with a signature of nobody."""
    manifest = json.loads(parts[MANIFEST])
    graphs = [name for name in parts if name.endswith(".onnx")]
    manifest["engines"] = [
        {
            "file": f"engines/{number}.{random_.choice(('engine', 'cache', 'engine'))}",
            "graph": random_.choice((graph, None, graph)),
            "precision": "fp32",
            "library": "tensorrt",
            "library_version": "10.0",
            "device": random_.choice(("GPU", "")),
            "capability": [8, 9],
        }
        for number, graph in enumerate(graphs)
    ]
    brought = {engine["file"]: b"code of somebody else" for engine in manifest["engines"]}
    found = listed({**parts, **brought}, manifest)
    if random_.random() < 0.5:
        found["manifest.json.sig"] = b"-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"
    return packed(plain(found))


WAYS: tuple[Callable[[random.Random, Parts], bytes], ...] = (
    *(any_bytes, any_bytes_sealed, one_file, one_value, one_value, odd_json, other_name, odd_entry, odd_array),
    *(odd_graph, odd_graph, hidden_field, with_engines),
)


def as_folder(random_: random.Random, content: bytes, folder: Path, outside: Path) -> bool:
    """Unpack a forged bundle as a user would, then put a link or pipe in it; False when it cannot be unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(folder)
    except Exception:
        return False
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if files and random_.random() < 0.6:
        path = random_.choice(files)
        kind = random_.randrange(4)
        path.unlink()
        if kind == 0:
            path.symlink_to(outside)
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.mkdir()
        else:
            (folder / "more").symlink_to(outside.parent)
    return True
