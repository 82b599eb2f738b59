"""Builds of classic TensorRT, whose builder needs a GPU: each version is asked what it knows, and nothing else.

Names per version are those of the table of TensorRT's API changes; a name that a version lacks fails the test.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.engines import tensorrt_module
from mess_compile.runtime.engines.tensorrt_build import BuildOptions, build_engine

FP32, FP16 = "float32", "float16"


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class Config:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.calls.append((pool, size))

    def set_flag(self, flag: str) -> None:
        self.calls.append(flag)

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.calls.append(cache.content)
        return cache.content in (b"", b"of this GPU")


class Module(SimpleNamespace):
    __hash__ = object.__hash__  # as modules have


class Layer:
    def __init__(self, kind: str, dtype: str) -> None:
        self.type, self.num_outputs, self._dtype, self.precision = kind, 1, dtype, "free"

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(dtype=self._dtype)


def module(version: str, calls: list[Any], layers: list[Layer], *, parses: bool = True, builds: bool = True) -> Any:
    """`tensorrt` of a version, as far as a build asks it."""
    major = int(version.split(".")[0])
    network = SimpleNamespace(num_layers=len(layers), get_layer=lambda index: layers[index])
    parser = SimpleNamespace(
        parse_from_file=lambda path: parses,
        num_errors=1,
        get_error=lambda index: SimpleNamespace(node=lambda: 3, desc=lambda: "no importer\nfor Foo"),
    )

    def create_network(flags: int) -> Any:
        calls.append(("flags", flags))
        return network

    builder = SimpleNamespace(
        create_network=create_network,
        create_builder_config=lambda: Config(calls),
        build_serialized_network=lambda network, config: b"engine" if builds else None,
    )
    flags = {"FP16": "FP16", "INT8": "INT8", "OBEY_PRECISION_CONSTRAINTS": "OBEY"} if major < 11 else {}
    logger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 0, "__init__": lambda self: None})
    return Module(
        __version__=version,
        ILogger=logger,
        Builder=lambda logger: builder,
        OnnxParser=lambda network, logger: parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(**({"EXPLICIT_BATCH": 0} if major < 11 else {})),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(**flags),
        LayerType=SimpleNamespace(CONSTANT="constant", SHAPE="shape"),
        float32=FP32,
    )


def built(monkeypatch: pytest.MonkeyPatch, trt: Any, precision: str, cache: bytes | None = None) -> Any:
    monkeypatch.setattr(tensorrt_module, "import_module", lambda name: trt)
    return build_engine(Path("head.onnx"), BuildOptions("tensorrt", precision), cache)


@pytest.mark.parametrize(("version", "flags"), [("8.5.2.2", 1), ("8.6.1", 1), ("10.3.0", 1), ("11.4.0", 0)])
def test_onnx_needs_an_explicit_batch_where_there_is_such_a_flag(
    monkeypatch: pytest.MonkeyPatch, version: str, flags: int
) -> None:
    calls: list[Any] = []
    assert built(monkeypatch, module(version, calls, []), "fp32").engine == b"engine"
    assert calls[:2] == [("flags", flags), ("workspace", 1 << 30)]
    assert not {"FP16", "INT8"} & {call for call in calls if isinstance(call, str)}


@pytest.mark.parametrize(
    ("version", "precision", "flags"),
    [("8.5.2.2", "fp16", ["FP16", "OBEY"]), ("8.6.1", "int8", ["INT8"]), ("11.4.0", "fp16", [])],
)
def test_a_library_that_may_choose_keeps_the_gate_in_fp32(
    monkeypatch: pytest.MonkeyPatch, version: str, precision: str, flags: list[str]
) -> None:
    """An fp16 gate would count other cells than those that the search saw."""
    layers = [Layer("convolution", FP16), Layer("softmax", FP32), Layer("constant", FP32), Layer("shape", "int32")]
    calls: list[Any] = []
    built(monkeypatch, module(version, calls, layers), precision)
    assert [call for call in calls if isinstance(call, str)] == flags
    assert [layer.precision for layer in layers] == ["free", FP32 if "OBEY" in flags else "free", "free", "free"]


@pytest.mark.parametrize(
    ("cache", "kept"), [(None, b"+"), (b"of this GPU", b"of this GPU+"), (b"of another GPU", b"+"), (b"torn", b"+")]
)
def test_a_timing_cache_of_another_gpu_is_started_afresh(
    monkeypatch: pytest.MonkeyPatch, cache: bytes | None, kept: bytes
) -> None:
    assert built(monkeypatch, module("8.5.2.2", [], []), "fp32", cache).timing_cache == kept


def test_what_parser_and_builder_say_reaches_the_user_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"^head.onnx cannot be parsed: node 3: no importer for Foo$"):
        built(monkeypatch, module("8.5.2.2", [], [], parses=False), "fp32")
    with pytest.raises(EngineError, match=r"^head.onnx cannot be built: it gives no reason$"):
        built(monkeypatch, module("8.5.2.2", [], [], builds=False), "fp32")


def test_a_capability_that_rtx_does_not_build_for_is_refused_with_those_it_does(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    from tests import small_network

    path = small_network.graph_set(tmp_path).path("segment-0-1")
    with pytest.raises(InputError, match=r"builds for .*SM75.*, not for SM61"):
        build_engine(path, BuildOptions("tensorrt_rtx", "fp32", "SM61"))
