"""The manifest is read strictly: a user would otherwise run a plan that nobody searched for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mess_compile.runtime.base.errors import BundleError
from mess_compile.runtime.bundle.manifest import EngineFile, File, Manifest, manifest_from_json, manifest_to_json
from tests import small_network

Path_ = tuple[str | int, ...]
FREE = {"provenance", "environment", "sources"}
LATER = ("truth", "change", "by_class", "policy_rows", "class_name", "least_iou", "retrained")
"""Keys that earlier bundles lack."""
"""Objects of any texts."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Without the runtime's files, which are listed as the others are, and with an engine."""
    whole = small_network.write_bundle(tmp_path_factory.mktemp("bundle") / "tiny.mess")
    files = {path: file for path, file in whole.files.items() if not path.startswith("mess_compile/")}
    engine = EngineFile("engines/0.engine", "graphs/segment-0-1.onnx", "fp32", "tensorrt", "10.0", "GPU", (8, 9))
    return replace(whole, files={**files, engine.file: File("0" * 64, 1)}, engines=(engine,))


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))


def edited(content: Any, path: Path_, edit: Callable[[Any, Any], None]) -> str:
    changed = copy.deepcopy(content)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    edit(parent, path[-1])
    return json.dumps(changed)


def put(new: Any, parent: Any, key: Any) -> None:
    parent[key] = new


def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    text = manifest_to_json(manifest)
    assert manifest_from_json(text) == manifest
    assert manifest_to_json(manifest_from_json(text)) == text


def test_any_value_of_another_type_is_refused(manifest: Manifest) -> None:
    content = json.loads(manifest_to_json(manifest))
    for path, value in leaves(content):
        for other in (None, [1, "x"], {"a": 1}, "text", 1, 1.5, True, float("nan"), 10**400):
            same = type(other) is type(value) or (isinstance(value, float) and other == 1)
            if (
                not path
                or same
                or path[0] == "provenance"
                or path[-1] in ("cut", "power_mode", "graph", "gpu", "compute_capability", "error", "change")
            ):
                continue
            with pytest.raises(BundleError, match=r"manifest"):
                manifest_from_json(edited(content, path, partial(put, other)))


def test_a_missing_and_an_unknown_key_are_refused_by_name(manifest: Manifest) -> None:
    content = json.loads(manifest_to_json(manifest))
    for path, _ in leaves(content):
        if path and isinstance(path[-1], str) and "files" not in path and not FREE & {*path[:-1]}:
            if path[-1] in LATER:
                manifest_from_json(edited(content, path, lambda parent, key: parent.pop(key)))
                continue
            with pytest.raises(BundleError, match=str(path[-1]) if len(path) > 1 else "manifest"):
                manifest_from_json(edited(content, path, lambda p, k: p.__delitem__(k)))
            with pytest.raises(BundleError, match="surprise"):
                manifest_from_json(edited(content, path, lambda p, k: p.__setitem__("surprise", 1)))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("network", "input_hw"), [0, 12], "input_hw"),
        (("network", "input_hw"), [8, 1 << 20], "input_hw"),
        (("network", "classes"), ["one"], "classes"),
        (("network", "colours"), [[0, 0, 0]], "colours"),
        (("network", "colours", 0, 1), 256, "colours"),
        (("gate", "thresholds"), [], "thresholds"),
        (("gate", "thresholds"), [[0.5, 0.5]], "thresholds"),
        (("gate", "thresholds", 0, 0), float("inf"), "thresholds"),
        (("gate", "thresholds", 0, 0), 1e308, "1e.308; a confidence is between 0 and 1"),
        (("plans",), [], "plans is empty"),
        (("plans", 0, "setting"), "eager", "setting 'eager'"),
        (("plans", 0, "stages"), [], "no stages"),
        (("plans", 0, "stages", 0, "exit_point"), 0, "not ascending"),
        (("plans", 0, "stages", 1, "exit_point"), 1, "not ascending"),
        (("plans", 0, "stages", 0, "row"), 4, "row is 4"),
        (("plans", 0, "stages", 0, "row"), -1, "row is -1"),
        (("plans", 0, "stages", 0, "cells"), 0, "cells is 0"),
        (("plans", 0, "stages", 0, "cut"), None, "cut is None"),
        (("plans", 0, "stages", 0, "cut"), -1, "cut is -1"),
        (("plans", 0, "stages", 0, "cut"), 26, "cut is 26"),
        (("plans", 0, "stages", 1, "cut"), 3, "cut is 3"),
        (("plans", 0, "stages", 0, "segment"), "graphs/other.onnx", "not a graph of the bundle"),
        (("plans", 0, "stages", 0, "segment"), "golden/0.npy", "not a graph of the bundle"),
        (("plans", 0, "predicted", "source"), "guessed", "source 'guessed'"),
        (("plans", 0, "precisions", "graphs/segment-0-1.onnx", "used"), "fp8", "'fp8', wanted 'fp32'; known are int8"),
        (("plans", 0, "predicted", "exit_rates"), [1.0], "exit_rates"),
        (("network", "resize"), "crop", "'crop', not one of stretch, letterbox"),
        (("plans", 0, "operating_points"), [], "no 'default'"),
        (("plans", 0, "operating_points", 0, "name"), "Fast", "operating point"),
        (("plans", 0, "operating_points", 0, "name"), "fast", "no 'default'"),
        (("plans", 0, "operating_points", 0, "decisions", 0, "cut"), 17, "no 'default' with the row and cut"),
        (("plans", 0, "operating_points", 0, "decisions", 0, "cut"), 26, "cut is 26"),
        (("plans", 0, "operating_points", 0, "decisions", 1, "cut"), 3, "cut is 3"),
        (("plans", 0, "operating_points", 0, "decisions", 1, "row"), 4, "row is 4"),
        (("plans", 0, "operating_points", 0, "decisions"), [], "decisions does not fit"),
        (("plans", 0, "operating_points", 0, "predicted", "source"), "guessed", "source 'guessed'"),
        (("plans", 0, "costs"), [], "costs does not fit"),
        (("plans", 0, "costs", 1, "p99_ms"), -1.0, "-1.0 ms"),
        (("plans", 0, "upload_p99_ms"), -0.5, "-0.5 ms"),
        (("plans", 0, "confidence"), [[]], "confidence does not fit"),
        (("plans", 0, "confidence", 0), [1, 2], "not 10 counts"),
        (("plans", 0, "confidence", 0), [0] * 9 + [-1], "not 10 counts"),
        (("golden", 0, "frame"), "golden/9.npy", "not an array of the bundle"),
        (("golden", 0, "exit"), 3, "exit is 3"),
        (("golden", 0, "count"), 25, "count is 25"),
        (("golden", 0, "plan"), "xavier:fp32", "no plan 'xavier:fp32'"),
        (("plans", 0, "device", "gpu"), "Orin", "one of gpu and compute_capability, but needs both"),
        (("engines", 0, "file"), "golden/0.npy", "not an engine of the bundle"),
        (("engines", 0, "file"), "engines/1.engine", "not an engine of the bundle"),
        (("engines", 0, "graph"), "golden/0.npy", "is in no plan"),
        (("engines", 0, "precision"), "fp8", "precision is 'fp8'"),
        (("engines", 0, "capability"), [8], "capability has 1 entries"),
        (("files", "golden/0.npy", "bytes"), -1, "bytes is -1"),
        (("files", "golden/0.npy", "sha256"), "0" * 63, "sha256"),
        (("version",), 1, "version 1; this release reads 5, 6 and 7: update mess-compile, or write the bundle again"),
        (("version",), True, "version True"),
        (("format",), "mess-plan", "format"),
    ],
)
def test_a_value_out_of_range_is_named(manifest: Manifest, path: Path_, value: Any, words: str) -> None:
    content = json.loads(manifest_to_json(manifest))
    with pytest.raises(BundleError, match=words):
        manifest_from_json(edited(content, path, partial(put, value)))


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "a/../x", "/etc/passwd", "a//b", "a\\b", "C:x", ".ssh/key", "a/.", "", "a/", "a\nb", "ä", "a" * 200),
        *("manifest.json", "a/b/c/d/e"),
    ],
)
def test_a_file_may_only_lie_inside_the_bundle(manifest: Manifest, name: str) -> None:
    content = json.loads(manifest_to_json(manifest))
    content["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(BundleError, match="path"):
        manifest_from_json(json.dumps(content))


def test_operating_points_are_few_and_have_names_of_their_own(manifest: Manifest) -> None:
    content = json.loads(manifest_to_json(manifest))
    plan = content["plans"][0]
    (default,) = plan["operating_points"]
    plan["operating_points"] = [default, {**default, "name": "fast"}]
    assert [p.name for p in manifest_from_json(json.dumps(content)).plans[0].operating_points] == ["default", "fast"]
    for names in (["fast", "fast"], [f"fast-{number}" for number in range(8)]):
        plan["operating_points"] = [default, *({**default, "name": name} for name in names)]
        with pytest.raises(BundleError, match="not 8 names"):
            manifest_from_json(json.dumps(content))


def test_a_key_twice_and_a_number_of_a_million_digits_are_refused(manifest: Manifest) -> None:
    text = manifest_to_json(manifest)
    with pytest.raises(BundleError, match="a key twice"):
        manifest_from_json(text.replace('"bytes": ', '"bytes": 1, "bytes": ', 1))
    with pytest.raises(BundleError, match="digits"):
        manifest_from_json(text.replace('"bytes": ', f'"bytes": {"9" * 1_000_000}', 1))


def test_text_that_would_steer_a_terminal_is_refused(manifest: Manifest) -> None:
    content = json.loads(manifest_to_json(manifest))
    for text in ("\x1b[2J", "a\nb", "\ud800"):
        content["provenance"] = {"made-by": text}
        with pytest.raises(BundleError, match="cannot be printed"):
            manifest_from_json(json.dumps(content))


def test_two_plans_for_one_target_are_refused(manifest: Manifest) -> None:
    content = json.loads(manifest_to_json(manifest))
    content["plans"] *= 2
    with pytest.raises(BundleError, match="twice"):
        manifest_from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"format": 1}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        manifest_from_json(text)


def test_a_bundle_written_to_another_folder_has_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        small_network.write_bundle(tmp_path / folder / "tiny.mess")
    assert (tmp_path / "a" / "tiny.mess").read_bytes() == (tmp_path / "b" / "tiny.mess").read_bytes()
