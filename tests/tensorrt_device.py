"""Make a `remote_device` a Xavier: the stand-ins for CUDA and TensorRT 8.5 are found by its Python.

Engines are computed by ONNX Runtime; the builder notes what it builds, and behaves as files beside its log say.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.remote_device import Device

HERE = Path(__file__).parent
STANDIN = """
import os, pathlib, sys, time, zipfile
from pathlib import Path

place = Path({place!r})
sys.path.insert(0, str(place))
programs = [word for word in sys.orig_argv[1:] if os.path.isfile(word) and zipfile.is_zipfile(word)]
sys.path[:0] = programs  # Python puts the program that it runs there only after this
from tests.runtime.cuda_standin import Driver
from tests.runtime.tensorrt_standin import make_module, write_engine

VERSION = "8.5.2.2"
driver = Driver()
sys.modules["tensorrt"] = make_module(VERSION, driver)
plain_read = Path.read_text


def read_text(path, *arguments, **options):
    named = str(path) == "/etc/machine-id"
    return plain_read(place / "machine-id" if named else path, *arguments, **options)


Path.read_text = read_text
try:
    from mess_compile.runtime.base.errors import EngineError
    from mess_compile.runtime.engines import tensorrt_build, tensorrt_engine
    from mess_compile.runtime.engines.cuda import Cuda
    from mess_compile.runtime.machine import machine
except ImportError:
    pass
else:

    def build(path, options, timing_cache=None):
        wish = (place / "wish").read_text() if (place / "wish").exists() else ""
        verb, _, names = wish.partition(" ")
        if path.name in names.split():
            if verb == "crash":
                os.kill(os.getpid(), 9)
            raise EngineError(path.name + " does not build: no kernel for it")
        if verb == "slow":
            time.sleep(0.2)
        with (place / "log").open("a") as log:
            log.write(path.name + chr(10))
        engine = write_engine(place / ("engine-" + path.name), path.resolve(), VERSION)
        return tensorrt_build.Built(engine.read_bytes(), 0.1, (timing_cache or b"") + b"t")

    gpu = machine.Gpu("Xavier", (7, 2), 30.0)
    library = machine.InstalledLibrary("tensorrt", VERSION)
    machine.this_machine = lambda: machine.Machine((gpu,), "Jetson-AGX", "35.4.1", (library,))
    tensorrt_engine.open_cuda = lambda: Cuda(driver)
    tensorrt_build.build_engine = build
"""


@dataclass(frozen=True)
class Xavier:
    """`built` are the graphs that its TensorRT has built, by hash, in order."""

    device: Device
    place: Path

    @property
    def host(self) -> str:
        return self.device.host

    @property
    def built(self) -> list[str]:
        log = self.place / "log"
        return log.read_text().split() if log.exists() else []

    def wish(self, verb: str, *names: str) -> None:
        """How it builds from now on: `slow`; `break` or `crash` on the graphs of these hashes."""
        (self.place / "wish").write_text(" ".join((verb, *names)))

    def restore(self) -> None:
        self.device.restore()
        for name in ("log", "wish"):
            (self.place / name).unlink(missing_ok=True)


def as_xavier(device: Device, identity: str) -> Xavier:
    """`identity` is the machine's id, by which one device is told from another."""
    place = device.folder / "xavier"
    for name in ("__init__.py", "runtime/__init__.py", "runtime/cuda_standin.py", "runtime/tensorrt_standin.py"):
        target = place / "tests" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, target)
    (place / "machine-id").write_text(identity)
    (site,) = device.folder.glob("full/lib/python3*/site-packages")
    (site / "xavier_standin.py").write_text(STANDIN.format(place=str(place)))
    (site / "xavier.pth").write_text("import xavier_standin\n")
    return Xavier(device, place)
