"""Names of TensorRT: one that a version does not have would be found on the user's device, and nowhere before."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines import tensorrt_build, tensorrt_engine, tensorrt_module
from tests.runtime import tensorrt_standin
from tests.runtime.cuda_standin import Driver
from tests.runtime.tensorrt_bindings import RTX, VERSIONS, bindings
from tests.runtime.tensorrt_standin import NAMES

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext")
STAND_INS = {"8.6.1": "8.5.2.2", "10.3.0": "10.16.1.11"}
"""Versions that the stand-in has not, by one with the same names."""
Table = Mapping[str, frozenset[str]]


def table(**names: str) -> Table:
    return {kind: frozenset(text.split()) for kind, text in names.items()}


TABLE_8_5 = table(
    module="__version__ ILogger Runtime TensorIOMode TensorLocation Builder OnnxParser NetworkDefinitionCreationFlag "
    "MemoryPoolType BuilderFlag LayerType float32",
    Runtime="deserialize_cuda_engine DLA_core num_DLA_cores gpu_allocator error_recorder logger max_threads",
    ICudaEngine="num_layers serialize create_execution_context create_execution_context_without_device_memory "
    "device_memory_size refittable name num_optimization_profiles engine_capability num_io_tensors get_tensor_name "
    "get_tensor_mode is_shape_inference_io get_tensor_shape get_tensor_dtype get_tensor_location "
    "get_tensor_bytes_per_component get_tensor_components_per_element get_tensor_format get_tensor_format_desc "
    "get_tensor_vectorized_dim get_tensor_profile_shape error_recorder tactic_sources profiling_verbosity "
    "create_engine_inspector",
    IExecutionContext="execute execute_async execute_v2 execute_async_v2 debug_sync profiler engine name device_memory "
    "active_optimization_profile get_tensor_strides set_input_shape get_tensor_shape set_tensor_address "
    "get_tensor_address set_input_consumed_event get_input_consumed_event set_output_allocator get_output_allocator "
    "get_max_output_size temporary_allocator infer_shapes execute_async_v3 set_optimization_profile_async "
    "error_recorder enqueue_emits_profile report_to_profiler persistent_cache_limit nvtx_verbosity",
    Builder="create_network platform_has_tf32 platform_has_fast_fp16 platform_has_fast_int8 max_DLA_batch_size "
    "num_DLA_cores gpu_allocator create_optimization_profile error_recorder create_builder_config "
    "build_serialized_network is_network_supported logger max_threads reset",
    IBuilderConfig="avg_timing_iterations int8_calibrator engine_capability max_workspace_size set_memory_pool_limit "
    "get_memory_pool_limit flags default_device_type DLA_core clear_flag set_flag get_flag quantization_flags reset "
    "profile_stream profiling_verbosity set_tactic_sources get_tactic_sources create_timing_cache set_timing_cache "
    "get_timing_cache set_preview_feature get_preview_feature",
    ITimingCache="serialize combine reset",
    OnnxParser="parse parse_with_weight_descriptors parse_from_file supports_operator supports_model num_errors "
    "get_error clear_errors",
    ParserError="code desc file line func node",
    INetworkDefinition="name num_layers num_inputs num_outputs error_recorder mark_output remove_tensor get_layer "
    "get_input get_output",
    ILayer="name type num_inputs num_outputs precision precision_is_set set_input get_input get_output reset_precision "
    "set_output_type get_output_type output_type_is_set reset_output_type",
    ITensor="name shape dtype location allowed_formats is_network_input is_network_output is_shape_tensor "
    "is_execution_tensor dynamic_range set_dynamic_range reset_dynamic_range",
    BuilderFlag="FP16 INT8 DEBUG GPU_FALLBACK STRICT_TYPES REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE "
    "OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO REJECT_EMPTY_ALGORITHMS",
    NetworkDefinitionCreationFlag="EXPLICIT_BATCH EXPLICIT_PRECISION",
    MemoryPoolType="WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM",
    LayerType="CONSTANT SHAPE QUANTIZE DEQUANTIZE CONVOLUTION SOFTMAX RESIZE IDENTITY",
    TensorIOMode="NONE INPUT OUTPUT",
    TensorLocation="DEVICE HOST",
    ILogger="INTERNAL_ERROR ERROR WARNING INFO VERBOSE log",
)
"""As release 8.5.2 binds them, in python/src of NVIDIA's repository; layers shortened, binding indices left out."""
BUILDS = table(
    module="__version__ Builder OnnxParser NetworkDefinitionCreationFlag MemoryPoolType",
    Builder="create_network create_builder_config build_serialized_network",
    OnnxParser="parse_from_file num_errors get_error",
    ParserError="node desc",
    IBuilderConfig="set_memory_pool_limit",
    MemoryPoolType="WORKSPACE",
)
"""What every build uses."""
CLASSIC = table(
    module="BuilderFlag", IBuilderConfig="create_timing_cache set_timing_cache set_flag", ITimingCache="serialize"
)
CHOICES = table(
    module="float32 LayerType",
    BuilderFlag="FP16 INT8 OBEY_PRECISION_CONSTRAINTS",
    NetworkDefinitionCreationFlag="EXPLICIT_BATCH",
    INetworkDefinition="num_layers get_layer",
    ILayer="type precision num_outputs get_output",
    ITensor="dtype",
)
"""While the builder chooses precisions, up to 10."""
AHEAD = table(module="ComputeCapability", IBuilderConfig="num_compute_capabilities set_compute_capability")
"""TensorRT-RTX."""
GONE = table(
    BuilderFlag="FP16 INT8 OBEY_PRECISION_CONSTRAINTS",
    NetworkDefinitionCreationFlag="EXPLICIT_BATCH",
    ILayer="precision",
)
"""Not in 11, whose builds go by that; RTX has some of them in name."""
UNTYPED = ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE", "CAST")


def tables_of(version: str) -> tuple[Table, ...]:
    if version == RTX:
        return BUILDS, AHEAD
    return (BUILDS, CLASSIC) if version.startswith("11.") else (BUILDS, CLASSIC, CHOICES)


def missing(wanted: Table, found: Mapping[str, Any]) -> list[str]:
    return [f"{kind}.{name}" for kind, names in wanted.items() for name in names if name not in found.get(kind, ())]


def runs(version: str) -> Table:
    return NAMES[STAND_INS.get(version, version)]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_runs_an_engine_is_in_the_real_bindings(version: str) -> None:
    found = bindings(version)
    assert not missing(runs(version), found)
    values = table(TensorIOMode="INPUT OUTPUT", TensorLocation="DEVICE HOST", ILogger="ERROR INTERNAL_ERROR log")
    dtypes = table(DataType=" ".join(set(tensorrt_engine.DTYPES) - ({"INT64"} if version.startswith("8.") else set())))
    assert not missing({**values, **dtypes}, found)
    if "ExecutionContextAllocationStrategy" in runs(version)["module"]:
        assert "USER_MANAGED" in found["ExecutionContextAllocationStrategy"]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_that_builds_an_engine_is_in_the_real_bindings(version: str) -> None:
    found = bindings(version)
    for wanted in tables_of(version):
        assert not missing(wanted, found)
    assert [name for name in UNTYPED if name in found["LayerType"]] == list(UNTYPED)


def test_flags_that_the_build_looks_for_are_gone_from_11() -> None:
    found = bindings("11.4.0.106")
    assert len(missing(GONE, found)) == sum(len(names) for names in GONE.values())


@pytest.mark.parametrize("version", VERSIONS)
def test_a_name_that_the_stand_in_hides_is_not_in_the_real_bindings_either(version: str) -> None:
    """So that the way an older version needs is really not there to be taken."""
    found = bindings(version)
    for kind in CLASSES:
        every = frozenset().union(*(names[kind] for names in NAMES.values()))
        hidden = every - runs(version)[kind] - {"create_execution_context"}  # there from the first, without a strategy
        assert not [name for name in hidden if name in found[kind]]


@pytest.mark.parametrize("version", VERSIONS)
def test_arguments_of_the_stand_in_are_those_of_the_real_bindings(version: str) -> None:
    found = bindings(version)
    for kind in CLASSES:
        for name in runs(version)[kind]:
            ours = getattr(getattr(tensorrt_standin, kind), name)
            if inspect.isfunction(ours):
                wanted = list(inspect.signature(ours).parameters)
                named = [[each.partition(":")[0] for each in every] for every in overloads(name, found[kind][name])]
                assert wanted in named, f"{kind}.{name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_has_as_many_arguments_as_the_real_bindings_take(version: str) -> None:
    found = bindings(version)
    checked = 0
    for module in (tensorrt_build, tensorrt_engine):
        for kinds, name, given in calls(module):
            for kind in (kind for kind in kinds if name in found.get(kind, {}) and "(" in found[kind][name]):
                takes = [
                    range(sum("=" not in each for each in every), len(every) + 1)
                    for every in overloads(name, found[kind][name])
                ]
                assert any(given + 1 in count for count in takes), f"{kind}.{name} with {given}, takes {takes}"
                checked += 1
    assert checked > 15


def overloads(name: str, text: str) -> list[list[str]]:
    """Arguments as `name: type = default`, from the signatures that pybind11 writes into a docstring."""
    found = re.findall(rf"\b{name}\((self: .*)\) ->", text)
    return [re.findall(r"(?:^|, )(\w+: [^,\[]*(?:\[.*?\])?[^,]*)", words) for words in found]


def test_names_of_8_5_are_still_in_8_6() -> None:
    """What the table says of a version whose bindings cannot be had, by the next one."""
    assert missing(TABLE_8_5, bindings("8.6.1")) == []


def test_for_8_5_everything_is_in_the_table() -> None:
    for wanted in (NAMES["8.5.2.2"], *tables_of("8.5.2.2"), table(LayerType=" ".join(UNTYPED[:-1]))):
        assert not missing(wanted, TABLE_8_5)
    for kind in CLASSES:
        every = frozenset().union(*(names[kind] for names in NAMES.values()))
        assert every & TABLE_8_5[kind] - {"create_execution_context"} == NAMES["8.5.2.2"][kind]


RECEIVERS = {
    "module": ("module",), "trt": ("module",),
    "engine": ("ICudaEngine",), "context": ("IExecutionContext",), "runtime": ("Runtime",),
    "builder": ("Builder",), "network": ("INetworkDefinition",), "parser": ("OnnxParser",),
    "config": ("IBuilderConfig",), "cache": ("ITimingCache",), "error": ("ParserError",), "layer": ("ILayer",),
    "output": ("ITensor",), "flags": ("BuilderFlag", "NetworkDefinitionCreationFlag"),
    "trt.MemoryPoolType": ("MemoryPoolType",), "module.TensorIOMode": ("TensorIOMode",),
    "module.TensorLocation": ("TensorLocation",), "module.ILogger": ("ILogger",),
    "module.ExecutionContextAllocationStrategy": ("ExecutionContextAllocationStrategy",),
}  # fmt: skip
"""The names that the code has for TensorRT's objects."""


def kinds_of(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Call):
        node = node.func
    name = ast.unparse(node).removeprefix("self.").removeprefix("_tools.").lstrip("_")
    return RECEIVERS.get(name, ())


def parsed(module: ModuleType) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(Path(str(module.__file__)).read_text()))


def calls(module: ModuleType) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """What each method of TensorRT is called on, its name, and how many arguments it gets."""
    for node in parsed(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and kinds_of(node.func.value):
            yield kinds_of(node.func.value), node.func.attr, len(node.args)


def attributes(*modules: ModuleType) -> set[tuple[tuple[str, ...], str]]:
    nodes = (node for module in modules for node in parsed(module) if isinstance(node, ast.Attribute))
    return {(kinds_of(node.value), node.attr) for node in nodes if kinds_of(node.value)}


def test_what_the_code_reads_off_tensorrt_is_in_the_tables() -> None:
    """Every attribute that follows a TensorRT object in the source, so that none escapes the tests above."""
    values = table(
        module="__version__", TensorIOMode="INPUT", TensorLocation="DEVICE", ILogger="ERROR INTERNAL_ERROR __init__",
        ExecutionContextAllocationStrategy="USER_MANAGED",
    )  # fmt: skip
    tables = (*NAMES.values(), BUILDS, CLASSIC, CHOICES, AHEAD, values)
    known = {kind: frozenset().union(*(each.get(kind, ()) for each in tables)) for each in tables for kind in each}
    found = attributes(tensorrt_engine, tensorrt_module, tensorrt_build) - {(("ParserError",), "strerror")}  # OSError's
    assert not [(kinds, name) for kinds, name in found if not any(name in known.get(kind, ()) for kind in kinds)]
    seen = {name for _, name in found}
    unread = {f"{kind}.{name}" for kind, names in known.items() for name in names if name not in seen}
    assert not unread, "tables that promise more than the code needs hide what it lacks"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_without_the_module_the_message_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(wanted: str) -> None:
        raise ImportError(f"No module named {wanted!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EngineError, match=rf"{name} cannot be imported .*pip install {name.replace('_', '-')}"):
        tensorrt_module.import_module(name)


def test_what_the_real_library_complains_of_is_heard() -> None:
    """In a process of its own logger, TensorRT-RTX tells why a file is no graph, once, in one line."""
    module = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    listener = tensorrt_module.listener(module)
    assert listener is tensorrt_module.listener(module)
    listener.log(module.ILogger.ERROR, "first\n  line")
    listener.log(module.ILogger.WARNING, "not for the user")
    listener.log(module.ILogger.INTERNAL_ERROR, "second")
    assert listener.words() == "first line; second"
    assert listener.words() == "it gives no reason"


def test_without_a_driver_the_real_library_is_refused_before_it_ends_the_process() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install mess-compile[rtx]")
    try:
        library = tensorrt_engine.open_library("tensorrt_rtx")
    except EngineError as error:
        assert "libcuda" in str(error) or "cuInit" in str(error)  # noqa: PT017
    else:
        library.close()


def test_a_hidden_name_is_really_hidden() -> None:
    old = tensorrt_standin.make_module("8.5.2.2", Driver())
    assert not hasattr(old, "ExecutionContextAllocationStrategy")
    assert not hasattr(object.__new__(old.Runtime.engine_class), "device_memory_size_v2")
