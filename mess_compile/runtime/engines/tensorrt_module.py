"""Imports TensorRT late, collects its log, and hides the names that differ between versions."""

from __future__ import annotations

import functools
import importlib
from collections import deque
from typing import Any, Deque

from mess_compile.runtime.base.errors import EngineError, one_line

INSTALL = {
    "tensorrt": "JetPack includes it (`sudo apt install python3-libnvinfer`); elsewhere run `pip install tensorrt`",
    "tensorrt_rtx": "run `pip install tensorrt-rtx-cu13 tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings`",
}


def import_module(name: str) -> Any:
    """Import the module `tensorrt` or `tensorrt_rtx`. Raises EngineError with the line that installs it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise EngineError(f"{name} cannot be imported ({one_line(error)}): {INSTALL[name]}") from error


@functools.lru_cache(maxsize=None)
def listener(module: Any) -> Any:
    """The process's logger for a module: TensorRT uses the first one that it gets."""

    class Listener(module.ILogger):  # type: ignore[misc]
        """Collects errors for the exception that is raised; otherwise they would go to standard error."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: Deque[str] = deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)

        def words(self) -> str:
            """The messages logged since the last call, on one line."""
            found = one_line("; ".join(self.errors)) or "it gives no reason"
            self.errors.clear()
            return found

    return Listener()


def scratch_size(engine: Any) -> int:
    """Bytes of device memory that a run needs: one name from 10.1 on, another up to 10."""
    newer = hasattr(engine, "device_memory_size_v2")
    return int(engine.device_memory_size_v2 if newer else engine.device_memory_size)


def create_context(module: Any, engine: Any) -> Any:
    """An execution context to be given its scratch memory: by strategy from 10.0 on, the only way in 11 and RTX."""
    if hasattr(module, "ExecutionContextAllocationStrategy"):
        return engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def set_scratch(context: Any, address: int, size: int) -> None:
    """By a call from 10.1 on, by an attribute before."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, size)
    else:
        context.device_memory = address
