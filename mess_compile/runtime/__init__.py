"""The device side: runs a bundle. Needs Python 3.8, numpy and one engine library.

>>> with runtime.load("street.mess") as cascade:
...     prediction = cascade(frame)  # uint8 RGB (H, W, 3) -> labels (H, W), exit, confidence, latency_ms
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mess_compile.runtime.errors import BundleError, EngineError, InputError, MessError

if TYPE_CHECKING:
    from mess_compile.runtime.cascade import Cascade, Prediction, load
    from mess_compile.runtime.signature import Signers

__all__ = ["BundleError", "Cascade", "EngineError", "InputError", "MessError", "Prediction", "Signers", "load"]


def __getattr__(name: str) -> Any:
    """Import numpy with the first use: every part of the package imports the errors, not all need arrays."""
    if name in ("Cascade", "Prediction", "load"):
        from mess_compile.runtime import cascade

        return getattr(cascade, name)
    if name == "Signers":
        from mess_compile.runtime import signature

        return signature.Signers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
