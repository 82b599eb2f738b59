"""The tables of docs/json.md, to hold what a command prints against."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "json.md"
_ROW = re.compile(r"\| `([^`]+)` \| ([^|]+) \|")
_KINDS: dict[str, Any] = {
    "text": str,
    "number": (int, float),
    "integer": int,
    "true/false": bool,
    "object": dict,
    "list": list,
}


@dataclass
class _Node:
    """What stands at one place: a kind, keys, or the elements of a list."""

    kind: str = ""
    optional: bool = False
    keys: dict[str, _Node] = field(default_factory=dict)


def _tables() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    title = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            title = line.strip("# ")
        elif row := _ROW.match(line):
            found.setdefault(title, []).append((row[1], row[2].strip()))
    return found


def _add(tree: _Node, key: str, kind: str) -> None:
    for word in re.findall(r"[^.\[\]]+|\[\]", key):
        tree = tree.keys.setdefault(word.rstrip("?"), _Node())
        tree.optional = tree.optional or word.endswith("?")
    tree.kind = kind


def _tree(title: str) -> _Node:
    tables, tree = _tables(), _Node()
    for key, kind in tables[title]:
        shape = re.match(r"\*(\w+)\*", kind)
        if not shape:
            _add(tree, key, kind)
            continue
        if key != "{}":
            _add(tree, key, "object or null" if kind.endswith("null") else "object")
        for name, inner in tables[shape[1]]:
            beside = re.match(r"\*(\w+)\*", inner)
            place = name if key == "{}" else f"{key}.{name}"
            for last, kind_of in tables[beside[1]] if beside else ():
                _add(tree, f"{place}.{last}", kind_of)
            _add(tree, place, ("object or null" if inner.endswith("null") else "object") if beside else inner)
    return tree


def differences(title: str, content: Any) -> list[str]:
    """What a command prints and the section does not say, or the other way round."""
    return list(_compared(_tree(title), content, title))


def _compared(node: _Node, content: Any, place: str) -> Iterator[str]:
    kinds = tuple(_KINDS[word] for word in node.kind.split(" or ") if word in _KINDS)
    if content is None:
        if "null" not in node.kind and not (node.keys and not node.kind):
            yield f"{place} is null"
    elif kinds and not any(isinstance(content, kind) for kind in kinds):
        yield f"{place} is {content!r:.40}, not {node.kind}"
    elif isinstance(content, bool) and kinds and bool not in kinds:
        yield f"{place} is {content!r}, not {node.kind}"
    elif isinstance(content, list) and "[]" in node.keys:
        for each in content:
            yield from _compared(node.keys["[]"], each, f"{place}[]")
    elif isinstance(content, dict) and "{}" in node.keys:
        for name, each in content.items():
            yield from _compared(node.keys["{}"], each, f"{place}.{name}")
    elif isinstance(content, dict) and node.keys:
        yield from (f"{place}.{name} is not documented" for name in content.keys() - node.keys.keys())
        for name, below in node.keys.items():
            if name in content:
                yield from _compared(below, content[name], f"{place}.{name}")
            elif not below.optional:
                yield f"{place}.{name} is not printed"
    elif not kinds:
        yield f"{place} is {content!r:.40}, and of no documented kind"
