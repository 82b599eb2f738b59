"""Statistics recorded on a device over a real sshd are those of this machine, whatever breaks in between."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mess_compile.data.dataset import DataSet, open_dataset
from mess_compile.device.client import PythonSession
from mess_compile.device.remote import Remote, parse_host
from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.evaluate import record
from mess_compile.evaluate.record import Share, build_scored_graphs, evaluate_data, evaluate_there
from mess_compile.evaluate.statistics import ExitStatistics
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import EngineError, InputError, MessError
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.serve.scoring import ScoredExits
from tests import small_network
from tests.commands import contents
from tests.remote_device import Device, remote_device

SIZES = ((8, 12), (300, 400), (5, 7))
BLOCK = 2
STORE = ".mess-compile"
Watch = Callable[[int], object]


def quiet(*told: object) -> None:
    pass


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture
def device(running: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    running.restore()
    monkeypatch.setattr(record, "BLOCK", BLOCK)
    return running


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return small_network.graph_set(tmp_path_factory.mktemp("graphs"), baseline_alone="a" * 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """Five images: two blocks and a half, of which the second is as the first."""
    root = tmp_path_factory.mktemp("data")
    for kind in ("images", "labels"):
        (root / "val" / kind).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join([*small_network.CLASSES, "ignore 11"]))
    for seed, (height, width) in enumerate(SIZES):
        rows = np.random.default_rng(seed).choice(np.array([0, 1, 2, 11, 255], np.uint8), height)
        labels = np.repeat(rows[:, None], width, axis=1)
        Image.fromarray(small_network.frame(seed, (height, width))).save(root / "val" / "images" / f"{seed}.png")
        Image.fromarray(labels).save(root / "val" / "labels" / f"{seed}.png")
    found = open_dataset(root, "val")
    again = tuple(replace(item, id=f"again {item.id}") for item in found.items[:BLOCK])
    return replace(found, items=(*found.items[:BLOCK], *again, found.items[BLOCK]))


def here(engines: EngineFiles, data: DataSet, folder: Path) -> dict[str, bytes]:
    evaluate_data(engines, open_library("onnxruntime"), data, folder, Share(), device="host", progress=quiet)
    return contents(folder)


@contextmanager
def opened(device: Device) -> Iterator[PythonSession]:
    with Remote(parse_host(device.host), device.ssh_options) as remote:
        yield PythonSession(remote, "onnxruntime", small_network.frame(0), small_network.thresholds(), quiet)


def there(
    device: Device, engines: EngineFiles, data: DataSet, folder: Path, watch: Watch = lambda done: None
) -> ExitStatistics:
    with opened(device) as session:
        return evaluate_there(session, engines, data, folder, device="host", progress=watch)


def garble(device: Device, folder: Path, change: str) -> None:
    """What its Python prints is changed on the way, by a command of sed."""
    python = folder / "python" / "python3"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\n{device.python} \"$@\" | sed -u '{change}'\n")
    python.chmod(0o755)
    device.use_python(python)


def images_there(device: Device) -> list[int]:
    """The bytes of every file of images that lies there."""
    place = device.home / STORE / "images"
    return [path.stat().st_size for path in place.iterdir()] if place.exists() else []


def refusal(device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path, watch: Watch = lambda done: None) -> str:
    """The one line of an evaluation that could not be done."""
    with pytest.raises(MessError) as caught:
        there(device, plain_files(graphs), data, tmp_path / "there", watch)
    assert not (tmp_path / "there").exists()
    message = str(caught.value)
    print(message, getattr(caught.value, "lost", None))
    assert "\n" not in message
    assert message.startswith(device.host)
    return message


def test_the_device_writes_the_statistics_of_this_machine_and_keeps_no_image(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path
) -> None:
    """Nor does a photograph travel, which the network would see at its own size."""
    told: list[int] = []
    held: list[int] = []

    def watch(done: int) -> None:
        told.append(done)
        held.extend(images_there(device))

    found = there(device, plain_files(graphs), data, tmp_path / "there", watch)
    assert contents(tmp_path / "there") == here(plain_files(graphs), data, tmp_path / "here")
    assert (found.images, found.library, found.baseline_alone) == (5, "onnxruntime", "a" * 64)
    assert told == [1, 2, 3, 4, 5]
    assert len(held) <= len(told), "one block lies there at a time"
    assert max(held, default=0) < 10_000 < data.items[1].image.stat().st_size
    assert images_there(device) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


@pytest.mark.slow
def test_heads_that_do_not_build_there_are_left_out_and_the_others_are_reached(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path
) -> None:
    failed = {f"head-{small_network.HEADS[0]}": "no kernel", "segment-1-2": "no kernel"}
    told = (
        r's/"built": {"job": "\(head-exit1[^"]*\|segment-1-2@fp32\)".*/"failed": {"job": "\1", "error": "no kernel"}}/'
    )
    garble(device, tmp_path, told)
    first = replace(data, items=data.items[:1])
    with opened(device) as session:
        engines = build_scored_graphs(session, plain_files(graphs))
        assert engines.failed == failed
        assert engines.sources == {1: 0, 2: 0}, "a longer segment leads there"
        found = evaluate_there(session, engines, first, tmp_path / "there", device="host", progress=quiet)
    assert found.heads == small_network.HEADS[1:]
    assert contents(tmp_path / "there") == here(engines, first, tmp_path / "here")


@pytest.mark.slow
def test_a_network_of_which_no_head_runs_is_refused_before_anything_is_sent(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path
) -> None:
    engines = EngineFiles(graphs, {}, {"segment-0-1": "no kernel for it"})
    with pytest.raises(InputError, match="no head runs in fp32: no kernel for it"):
        there(device, engines, data, tmp_path / "there")
    assert not (device.home / STORE).exists()


@pytest.mark.slow
def test_after_a_break_in_the_middle_the_same_command_continues(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path
) -> None:
    message = refusal(device, graphs, data, tmp_path, lambda done: device.cut() if done == 3 else None)
    assert device.host in message
    kept = [path for path in tmp_path.glob(".there.parts-*/*") if path.name.isdecimal()]
    assert len(kept) in (1, 2), "the rest of a block may have been told before the end"
    told: list[int] = []
    there(device, plain_files(graphs), data, tmp_path / "there", told.append)
    assert told == list(range(len(kept) * BLOCK + 1, len(data.items) + 1)), "blocks are not done again"
    assert contents(tmp_path / "there") == here(plain_files(graphs), data, tmp_path / "here")
    assert images_there(device) == []


@pytest.mark.parametrize("how", ["cut", "kill"])
@pytest.mark.slow
def test_a_break_between_two_blocks_is_one_line_and_the_first_is_kept(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path, how: str
) -> None:
    ways = {"cut": device.cut, "kill": lambda: kill_program(device)}
    message = refusal(device, graphs, data, tmp_path, lambda done: ways[how]() if done == BLOCK else None)
    assert {"cut": "the connection was lost", "kill": "has the device enough memory?"}[how] in message
    assert [path.name for path in tmp_path.glob(".there.parts-*/*")] == ["0"]


def kill_program(device: Device) -> None:
    """As the system does when memory runs out."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and b"mess_compile.runtime.serve.worker" in command(entry, device):
            os.kill(int(entry.name), signal.SIGKILL)


def command(entry: Path, device: Device) -> bytes:
    """What a process of this device's runs; the shells around it do not count."""
    try:
        words = (entry / "cmdline").read_bytes()
        ours = os.readlink(entry / "cwd") == str(device.home) and words.split(b"\0")[0] == b"python3"
    except OSError:
        return b""
    return words if ours else b""


@pytest.mark.slow
def test_a_user_who_stops_it_leaves_nothing_running_there(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path
) -> None:
    def stop(done: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        there(device, plain_files(graphs), data, tmp_path / "there", stop)
    assert not any(command(entry, device) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


@pytest.mark.slow
def test_a_full_disk_there_is_one_line_and_the_blocks_before_it_are_kept(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path
) -> None:
    message = refusal(
        device, graphs, data, tmp_path, lambda done: device.limit_file_bytes(512) if done == BLOCK else None
    )
    assert "has no space left for folder .mess-compile/images: make room there" in message
    assert [path.name for path in tmp_path.glob(".there.parts-*/*")] == ["0"]


@pytest.mark.slow
def test_a_device_without_numpy(device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path) -> None:
    device.use_python(device.bare_python)
    assert "No module named 'numpy'" in refusal(device, graphs, data, tmp_path)


@pytest.mark.slow
def test_a_graph_that_does_not_load_there_is_named_in_the_library_s_words(
    device: Device, data: DataSet, tmp_path: Path
) -> None:
    graphs = small_network.graph_set(tmp_path / "graphs")
    broken = graphs.root / "broken.onnx"
    broken.write_bytes((graphs.root / f"head-{small_network.HEADS[0]}.onnx").read_bytes().replace(b"Conv", b"Cnov"))
    engines = plain_files(graphs)
    engines = EngineFiles(graphs, {**engines.paths, f"head-{small_network.HEADS[0]}": broken})
    with pytest.raises(EngineError, match=rf"{device.host}: ONNX Runtime .* cannot load .*Cnov"):
        there(device, engines, data, tmp_path / "there")


@pytest.mark.slow
def test_an_engine_that_is_gone_since_it_was_built_is_named(device: Device, graphs: GraphSet) -> None:
    exits = ScoredExits(small_network.HW, 3, ((0, 1, "segment-0-1"),), (), None)
    with (
        opened(device) as session,
        pytest.raises(EngineError, match="the engine of segment-0-1 is no longer on the device"),
        session.scoring({}, exits) as score,
    ):
        next(score([]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            r's/"counts": \[\[[0-9]*/"counts": [["many"/',
            "sent an unexpected reply: scored.counts[0][0] is 'many'",
        ),
        (r's/{"scored"/library says: {"scored"/', "did not send all of its scores: run the same command again"),
    ],
    ids=["no number", "a spoilt line"],
)
@pytest.mark.slow
def test_nonsense_is_one_line_and_never_statistics(
    device: Device, graphs: GraphSet, data: DataSet, tmp_path: Path, change: str, words: str
) -> None:
    garble(device, tmp_path, change)
    assert words in refusal(device, graphs, data, tmp_path)
