"""Builds a TensorRT engine from an ONNX file: on the device by its own TensorRT, or ahead of time by TensorRT-RTX."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional

from mess_compile.runtime.base.errors import EngineError, InputError, one_line
from mess_compile.runtime.engines import tensorrt_module

DEFAULT_WORKSPACE_BYTES = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """`capability` is what TensorRT-RTX builds for, such as SM86; the classic library builds for the GPU that is
    present.

    `precision` must be the graph's own: a library that could choose (8.5 to 10) is constrained to the graph's types.
    """

    library: str
    precision: str
    capability: Optional[str] = None
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES


@dataclass(frozen=True)
class Built:
    """A serialised engine, and the updated timing cache (classic TensorRT; None without one)."""

    engine: bytes
    seconds: float
    timing_cache: Optional[bytes]


def timing_cache_name(version: str) -> str:
    """The name of the file in which builds of one version of classic TensorRT share their timings."""
    return f"timing-{version}.cache"


def build_engine(path: Path, options: BuildOptions, timing_cache: Optional[bytes] = None) -> Built:
    """Parse and build `path`, an ONNX file of static shapes. Raises EngineError with the parser's or builder's message.

    One build at a time in a process: builds in threads race.
    """
    trt = tensorrt_module.import_module(options.library)
    started = time.monotonic()
    logger = tensorrt_module.listener(trt)
    logger.words()  # discard what was logged about an earlier graph
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise EngineError(f"{path.name} cannot be parsed: {_parser_words(parser, logger)}")
    config = builder.create_builder_config()
    cache = _configure(trt, config, network, options, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{path.name} cannot be built: {logger.words()}")
    updated_cache = None if cache is None else bytes(cache.serialize())
    return Built(bytes(engine), time.monotonic() - started, updated_cache)


def _configure(trt: Any, config: Any, network: Any, options: BuildOptions, timing_cache: Optional[bytes]) -> Any:
    """Set what differs between the libraries; returns the timing cache in use."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.library == "tensorrt_rtx":
        if not hasattr(trt.ComputeCapability, str(options.capability)):
            known = ", ".join(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
            raise InputError(f"tensorrt_rtx {trt.__version__} builds for {known}, not for {options.capability}")
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, str(options.capability)), 0)
        return None
    _hold_to_precision(trt, config, network, options.precision)
    cache = config.create_timing_cache(timing_cache or b"")
    if cache is None or not config.set_timing_cache(cache, False):  # of another TensorRT or GPU: start afresh
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _hold_to_precision(trt: Any, config: Any, network: Any, precision: str) -> None:
    """Allow the precisions that the graph asks for, where flags exist, and constrain its fp32 layers to fp32: the gate
    and the output graph.
    """
    flags = trt.BuilderFlag
    if precision == "fp32" or not hasattr(flags, "FP16"):
        return
    if precision == "int8":  # explicit by Q/DQ; the rest can only be fp32
        config.set_flag(flags.INT8)
        return
    config.set_flag(flags.FP16)
    config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(place) for place in range(layer.num_outputs)]
        if all(output.dtype == trt.float32 for output in outputs) and layer.type not in _untyped(trt):
            layer.precision = trt.float32


def _untyped(trt: Any) -> List[Any]:
    """Layer types whose precision cannot be chosen."""
    names = ("CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE", "CAST")
    return [getattr(trt.LayerType, name) for name in names if hasattr(trt.LayerType, name)]


def _network_flags(trt: Any) -> int:
    """8.5 and 8.6 accept ONNX only with an explicit batch; 10 ignores the flag, 11 and RTX have removed it."""
    flags = trt.NetworkDefinitionCreationFlag
    return 1 << int(flags.EXPLICIT_BATCH) if hasattr(flags, "EXPLICIT_BATCH") else 0


def _parser_words(parser: Any, logger: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    errors_text = "; ".join(f"node {error.node()}: {error.desc()}" for error in errors)
    return one_line(errors_text) or str(logger.words())
