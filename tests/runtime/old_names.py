"""Which names of a piece of code neither Python 3.8 nor numpy 1.17 has, as far as the code alone tells."""

from __future__ import annotations

import ast
import builtins
import pathlib
from collections.abc import Iterator
from pathlib import Path

_LINES = [line.split() for line in (Path(__file__).parent / "names_3_8.txt").read_text().splitlines()]
KNOWN = {name: {each.partition(":")[0]: each.partition(":")[2] for each in names} for name, *names in _LINES}
"""By module, or `.` and a type's name: names, each with its keywords where these are known."""
_TYPES = (bytearray, bytes, dict, float, frozenset, int, list, set, str, tuple)
NEW_METHODS = {
    name
    for kind in (*_TYPES, pathlib.Path)
    for name in dir(kind)
    if not name.startswith("_") and name not in KNOWN[f".{kind.__name__}"]
}
NEW_BUILTINS = {name for name in dir(builtins) if not name.startswith("_")} - KNOWN["builtins"].keys()
_GENERIC = {kind.__name__ for kind in _TYPES} | {"type"}


def complaints(code: str) -> list[str]:
    """One for every name, keyword or form that is too new, or whose module is not in the list."""
    tree = ast.parse(code)
    modules = dict(_imported(tree))
    return [told for node in ast.walk(tree) for told in _of(node, modules)]


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name -> module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in KNOWN:
                    yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _of(node: ast.AST, modules: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"import {each.name}" for each in node.names if _is_new_module(each.name))
    elif isinstance(node, ast.ImportFrom) and node.module:
        if _is_new_module(node.module):
            yield f"from {node.module}"
        inside = [each.name for each in node.names if f"{node.module}.{each.name}" not in KNOWN]
        yield from (f"{node.module}.{name}" for name in inside if _is_new(node.module, name))
    elif isinstance(node, ast.Attribute):
        yield from _attribute(node, modules)
    elif isinstance(node, ast.Call):
        yield from _keywords(node, modules)
    elif isinstance(node, ast.Name) and node.id in NEW_BUILTINS:
        yield node.id
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _GENERIC:
        yield f"{node.value.id}[...]"
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from (f"{ast.unparse(node)}: a union" for side in (node.left, node.right) if _is_no_number(side))


def _is_new_module(name: str) -> bool:
    return not name.startswith(("mess_compile", "onnxruntime", "PIL")) and name not in KNOWN and name != "__future__"


def _is_new(module: str, name: str) -> bool:
    return module in KNOWN and not name.isupper() and not name.startswith("_") and name not in KNOWN[module]


def _attribute(node: ast.Attribute, modules: dict[str, str]) -> Iterator[str]:
    module = _module(node.value, modules)
    if module is None:
        yield from [f".{node.attr}"] if node.attr in NEW_METHODS else []
    elif _is_new(module, node.attr) and f"{module}.{node.attr}" not in KNOWN:
        yield f"{module}.{node.attr}"


def _module(node: ast.expr, modules: dict[str, str]) -> str | None:
    """The module that an expression names."""
    if isinstance(node, ast.Name):
        return modules.get(node.id)
    if isinstance(node, ast.Attribute):
        outer = _module(node.value, modules)
        return f"{outer}.{node.attr}" if outer is not None and f"{outer}.{node.attr}" in KNOWN else None
    return None


def _keywords(node: ast.Call, modules: dict[str, str]) -> Iterator[str]:
    given = {keyword.arg for keyword in node.keywords if keyword.arg}
    if isinstance(node.func, ast.Name) and node.func.id == "zip" and given:
        yield "zip(strict=)"
    if isinstance(node.func, ast.Attribute):
        module = _module(node.func.value, modules)
        known = KNOWN.get(module or "", {}).get(node.func.attr, "")
        new = sorted(given.difference(known.split(","))) if known else []
        yield from (f"{module}.{node.func.attr}({word}=)" for word in new)


def _is_no_number(node: ast.expr) -> bool:
    """A dict, None or a type: `|` takes none of these."""
    dictionary = isinstance(node, (ast.Dict, ast.DictComp)) or (isinstance(node, ast.Constant) and node.value is None)
    return dictionary or (isinstance(node, ast.Name) and node.id in (*_GENERIC, "str", "int", "float"))
