"""Bundles that differ in one thing, and a device on which a version is in use: every frame must get its labels."""

from __future__ import annotations

import io
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mess_compile.runtime.bundle import archive
from mess_compile.runtime.bundle.manifest import Golden, Manifest
from tests.remote_device import Device

PATIENCE_S = 60.0
IDENTITY = "maker@example.com"


def with_threshold(number: int) -> Callable[[Manifest], Manifest]:
    """One threshold differs, by so little that nothing is decided otherwise, and a colour: pictures of labels tell
    which version made them."""

    def change(manifest: Manifest) -> Manifest:
        first, *rest = manifest.gate.thresholds
        rows = ((first[0] + number * 1e-6, *first[1:]), *rest)
        network = manifest.network
        colours = ((number % 256, number // 256, 255), *network.colours[1:])
        gate = replace(manifest.gate, thresholds=rows)
        return replace(manifest, gate=gate, network=replace(network, colours=colours))

    return change


def released(number: int) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, provenance={**manifest.provenance, "release": str(number)})


def that_fails(manifest: Manifest) -> Manifest:
    """What no device computes: a golden frame with another count."""

    def wrong(golden: Golden) -> Golden:
        return replace(golden, count=0 if golden.count > 2 else 3)

    return replace(manifest, golden=tuple(map(wrong, manifest.golden)))


def keys(folder: Path) -> tuple[Path, Path]:
    """A key whose owner is in `folder/allowed`, and one of somebody else."""
    for name in ("own", "other"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    (folder / "allowed").write_text(f"{IDENTITY} {(folder / 'own.pub').read_text()}")
    return folder / "own", folder / "other"


@dataclass
class Service:
    """A program on the device that labels frames by what is in use there, day after day."""

    device: Device
    folder: Path
    frame: bytes
    labels: NDArray[np.uint8]
    fed: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _end: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def live(self) -> Path:
        return self.folder / "live"

    def start(self) -> None:
        command = [str(self.device.python), str(self.folder / "current"), "watch", str(self.live)]
        environment = {"HOME": str(self.device.home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, env=environment, cwd="/", start_new_session=True)

    def feed(self) -> None:
        (self.live / "in").mkdir(parents=True, exist_ok=True)
        while not self._end.wait(0.1):
            path = self.live / f"{self.fed:06}.png"
            path.write_bytes(self.frame)
            os.replace(path, self.live / "in" / path.name)
            self.fed += 1

    def check(self) -> None:
        """It runs, by the version in use, and every frame until now has the labels that it should have."""
        until = time.monotonic() + PATIENCE_S
        assert self._process is not None
        while self.fed == 0:
            time.sleep(0.05)
        fed = self.fed
        while not all((self.live / "out" / f"{number:06}.labels.png").exists() for number in range(fed)):
            assert self._process.poll() is None, "what runs there was ended"
            assert time.monotonic() < until, "frames are left without labels"
            time.sleep(0.05)
        assert not list((self.live / "refused").iterdir())
        for number in {0, fed // 2, fed - 1}:
            with Image.open(self.live / "out" / f"{number:06}.labels.png") as labels:
                assert np.array_equal(np.array(labels), self.labels)
        with closing(archive.open_archive(self.folder / "current")) as opened:
            colours = [value for colour in opened.manifest.network.colours for value in colour]
        while self._latest_palette()[: len(colours)] != colours:
            assert self._process.poll() is None, "what runs there was ended"
            assert time.monotonic() < until, "the version in use is not taken up"
            time.sleep(0.05)

    def _latest_palette(self) -> list[int]:
        with Image.open(max((self.live / "out").glob("*.labels.png"))) as labels:
            return labels.getpalette() or []

    def stop(self) -> int:
        """Its exit code."""
        self._end.set()
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(PATIENCE_S)


@contextmanager
def service(device: Device, folder: Path, bundle: Path) -> Iterator[Service]:
    """Running from now on; frames arrive ten times a second."""
    with closing(archive.open_archive(bundle)) as opened:
        golden = opened.manifest.golden[0]
        frame, labels = opened.array(golden.frame), opened.array(golden.labels)
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "PNG")
    running = Service(device, folder, stream.getvalue(), labels)
    feeding = threading.Thread(target=running.feed)
    running.start()
    feeding.start()
    try:
        running.check()
        yield running
        running.check()
        assert running.stop() == 0
    finally:
        running.stop()
        feeding.join()


def check_whole(folder: Path) -> str:
    """The version in use, each of whose bytes is right."""
    current = os.readlink(folder / "current")
    with closing(archive.open_archive(folder / current)):
        return current
