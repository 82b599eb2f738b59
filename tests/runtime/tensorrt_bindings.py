"""The real Python bindings of TensorRT, asked in a process of their own which names they have, with which arguments.

Bindings are a wheel of 1.3 MB and import without a GPU; the libraries behind them, which are gigabytes, are stood in
for by functions that do nothing. So nothing of TensorRT runs here, but no name is made up.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

RTX = "1.7.1.116"
PACKAGES = {
    "8.6.1": "tensorrt-bindings",
    "10.0.1": "tensorrt-cu12-bindings",
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
"""The last 8, the first 10, that of JetPack 6, and the newest two; wheels of 8.5 there are for JetPack only."""
VERSIONS = (*PACKAGES, RTX)
_PATIENCE_S = 60
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers")
_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
    "_ZN11nvuffparser15createUffParserEv",
    "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv",
    "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)
"""What the bindings import, those of 8.6 two parsers more."""
_TELL = """
import importlib, inspect, json, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
kinds = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind)}
told = {name: {each: str(getattr(kind, each).__doc__) for each in dir(kind)} for name, kind in kinds.items()}
print(json.dumps({**told, "module": dict.fromkeys(dir(module), module.__version__)}))
"""

Bindings = Mapping[str, Mapping[str, str]]
"""By class ("module" for the module itself) the names that it has, each with what its documentation says."""


def bindings(version: str) -> Bindings:
    """Skips the test where they cannot be had."""
    found = _installed_rtx() if version == RTX else _downloaded(version)
    if isinstance(found, str):
        pytest.skip(f"the bindings of TensorRT {version} cannot be had: {found}")
    return found


@functools.cache
def _installed_rtx() -> Bindings | str:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return "TensorRT-RTX is not installed: pip install mess-compile[rtx]"
    found = _told("", "tensorrt_rtx", {})
    version = next(iter(found["module"].values()))
    return found if version.startswith("1.7.") else f"TensorRT-RTX is {version}"


@functools.cache
def _downloaded(version: str) -> Bindings | str:
    """The reason in words, where the index cannot be reached or has none for this Python."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--retries", "0", "--timeout", "10", "--dest", place, f"{PACKAGES[version]}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
            if done.returncode != 0:
                return (done.stderr.strip().splitlines() or ["pip gives no reason"])[-1][:200]
            with zipfile.ZipFile(next(Path(place).glob("*.whl"))) as wheel:
                wheel.extractall(place)
            _write_libraries(Path(place), version.partition(".")[0])
        except subprocess.TimeoutExpired:
            return f"pip had no answer after {_PATIENCE_S} s"
        except FileNotFoundError as error:
            return str(error)
        return _told(place, "tensorrt_bindings", {**os.environ, "LD_LIBRARY_PATH": place})


def _write_libraries(folder: Path, major: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is no C compiler to make stand-ins of the libraries with")
    (folder / "nothing.c").write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for library in _LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(folder / "nothing.c")], check=True)


def _told(folder: str, module: str, environment: Mapping[str, str]) -> Bindings:
    command = [sys.executable, "-c", _TELL, folder or ".", module]
    done = subprocess.run(command, capture_output=True, text=True, env=environment or None)
    assert done.returncode == 0, done.stderr
    told: Bindings = json.loads(done.stdout)
    return told
