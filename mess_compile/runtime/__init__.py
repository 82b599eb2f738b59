"""The device side: runs a bundle. Needs Python 3.8, numpy and one engine library.

>>> with runtime.load("street.mess") as cascade:
...     prediction = cascade(frame)  # uint8 RGB (H, W, 3) -> labels (H, W), exit, confidence, latency_ms
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mess_compile.runtime.base.errors import BatchError, BundleError, EngineError, InputError, MessError, NotFiniteError

if TYPE_CHECKING:
    from mess_compile.runtime.bundle.signature import Signers
    from mess_compile.runtime.cascade.cascade import Cascade, Prediction, load
    from mess_compile.runtime.cascade.metrics import Metrics
    from mess_compile.runtime.cascade.stream import Stream

__all__ = [
    "BatchError",
    "BundleError",
    "Cascade",
    "EngineError",
    "InputError",
    "MessError",
    "Metrics",
    "NotFiniteError",
    "Prediction",
    "Signers",
    "Stream",
    "load",
]
_LATER = {
    **dict.fromkeys(("Cascade", "Prediction", "load"), "cascade.cascade"),
    "Metrics": "cascade.metrics",
    "Signers": "bundle.signature",
    "Stream": "cascade.stream",
}


def __getattr__(name: str) -> Any:
    """Import numpy with the first use: every part of the package imports the errors, not all need arrays."""
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
