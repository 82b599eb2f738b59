"""Optional parts of an installation, imported at one place."""

from __future__ import annotations

import importlib
from typing import Any

from mess_compile.runtime.errors import EngineError


def torch_module(name: str) -> Any:
    """A module of this package that needs torch. Raises EngineError naming the `pip install` line."""
    try:
        return importlib.import_module(f"mess_compile.{name}")
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors", "lightning_fabric"):
            raise
        raise EngineError(
            f"{error.name.replace('_', '-')} is not installed: run `pip install 'mess-compile[torch]'`"
        ) from error
