"""Names of TensorRT: one that a version does not have would be found on the user's device, and nowhere before."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from mess_compile.runtime import tensorrt_engine, tensorrt_module
from mess_compile.runtime.errors import EngineError
from tests.runtime import tensorrt_standin
from tests.runtime.cuda_standin import Driver
from tests.runtime.tensorrt_standin import NAMES, RTX

CLASSES = ("Runtime", "ICudaEngine", "IExecutionContext")
TABLE_8_5 = {
    "module": "ILogger Runtime TensorIOMode TensorLocation",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape get_tensor_dtype "
    "get_tensor_location device_memory_size create_execution_context_without_device_memory",
    "IExecutionContext": "set_tensor_address execute_async_v3 device_memory",
}
"""As release 8.5.2 binds them, in python/src/infer/pyCore.cpp of NVIDIA's repository."""


def bindings(version: str) -> Any:
    """The real module of a version of the stand-in; lean bindings run engines and cannot build them."""
    name = "tensorrt_rtx" if version == RTX else "tensorrt_lean_bindings"
    module = pytest.importorskip(name, reason=f"{name} {version} is not installed")
    if str(module.__version__).split(".")[:2] != version.split(".")[:2]:
        pytest.skip(f"{name} is {module.__version__}, and this is about {version}")
    return module


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106", RTX])
def test_every_name_of_the_stand_in_is_in_the_real_bindings(version: str) -> None:
    module = bindings(version)
    assert not [name for name in NAMES[version]["module"] if not hasattr(module, name)]
    for kind in CLASSES:
        assert not [name for name in NAMES[version][kind] if not hasattr(getattr(module, kind), name)]
    for values, names in (("TensorIOMode", "INPUT OUTPUT"), ("TensorLocation", "DEVICE HOST")):
        assert not [name for name in names.split() if not hasattr(getattr(module, values), name)]
    assert module.ExecutionContextAllocationStrategy.USER_MANAGED.name == "USER_MANAGED"
    assert [getattr(module.DataType, name).name for name in tensorrt_engine.DTYPES] == list(tensorrt_engine.DTYPES)
    assert not [name for name in ("ERROR", "INTERNAL_ERROR", "log") if not hasattr(module.ILogger, name)]


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106", RTX])
def test_a_name_that_the_stand_in_hides_is_not_in_the_real_bindings_either(version: str) -> None:
    """So that the way an older version needs is really not there to be taken."""
    module = bindings(version)
    for kind in CLASSES:
        every = frozenset().union(*(names[kind] for names in NAMES.values()))
        assert not [name for name in every - NAMES[version][kind] if hasattr(getattr(module, kind), name)]


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106", RTX])
def test_arguments_of_the_stand_in_are_those_of_the_real_bindings(version: str) -> None:
    module = bindings(version)
    for kind in CLASSES:
        for name in NAMES[version][kind]:
            ours, real = (getattr(getattr(place, kind), name) for place in (tensorrt_standin, module))
            if inspect.isfunction(ours):
                wanted = list(inspect.signature(ours).parameters)
                assert wanted in overloads(name, str(real.__doc__)), f"{kind}.{name}"


def overloads(name: str, text: str) -> list[list[str]]:
    """Names of the arguments, from the signatures that pybind11 writes into a docstring."""
    found = re.findall(rf"\b{name}\((self: .*)\) ->", text)
    return [re.findall(r"(?:^|, )(\w+): ", words) for words in found]


def test_for_8_5_the_stand_in_is_the_table() -> None:
    assert {kind: frozenset(names.split()) for kind, names in TABLE_8_5.items()} == NAMES["8.5.2.2"]


def test_what_the_code_reads_off_tensorrt_is_in_the_table() -> None:
    """Every attribute that follows a TensorRT object in the source, so that none escapes the tests above."""
    known = frozenset().union(*(names for version in NAMES.values() for names in version.values()))
    values = {"INPUT", "DEVICE", "USER_MANAGED", "ERROR", "INTERNAL_ERROR", "__version__", "__init__", "name"}
    found = set()
    for module in (tensorrt_engine, tensorrt_module):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Attribute) and is_tensorrt(node.value):
                found.add(node.attr)
    assert found >= {"execute_async_v3", "set_tensor_address", "device_memory_size_v2", "USER_MANAGED"}
    assert found <= known | values


def is_tensorrt(node: ast.expr) -> bool:
    """module, engine, context and runtime are the names that the code has for TensorRT's objects."""
    if isinstance(node, ast.Call):
        node = node.func
    words = ast.unparse(node).removeprefix("self.").removeprefix("_tools.").replace("_", "").split(".")
    return words[0] in ("module", "engine", "context", "runtime")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_without_the_module_the_message_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(wanted: str) -> None:
        raise ImportError(f"No module named {wanted!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EngineError, match=rf"{name} cannot be imported .*pip install {name.replace('_', '-')}"):
        tensorrt_module.import_module(name)


def test_what_the_real_library_complains_of_is_heard() -> None:
    """In a process of its own logger, TensorRT-RTX tells why a file is no graph, once, in one line."""
    module = bindings(RTX)
    listener = tensorrt_module.listener(module)
    assert listener is tensorrt_module.listener(module)
    listener.log(module.ILogger.ERROR, "first\n  line")
    listener.log(module.ILogger.WARNING, "not for the user")
    listener.log(module.ILogger.INTERNAL_ERROR, "second")
    assert listener.words() == "first line; second"
    assert listener.words() == "it gives no reason"


def test_without_a_driver_the_real_library_is_refused_before_it_ends_the_process() -> None:
    bindings(RTX)
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
