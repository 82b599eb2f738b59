"""The driver's calls: a wrong argument type or a handle kept too long takes the user's process down without a word."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines import cuda as cuda_module
from mess_compile.runtime.engines.cuda import CALLS, Cuda, open_cuda
from tests.runtime.cuda_standin import PROTOTYPES, Driver, c_types

HEADERS = sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))
SIZE = 1000


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    assert driver.faults == []
    assert not driver.left()


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[Cuda]:
    opened = opened_cuda() if request.param == "real" else Cuda(request.getfixturevalue("driver"))
    yield opened
    opened.close()


def opened_cuda() -> Cuda:
    try:
        return open_cuda()
    except EngineError as error:
        pytest.skip(str(error))


def kind(c_type: Any) -> tuple[object, ...]:
    """What decides how an argument is passed: bytes and signedness, or what a pointer points to."""
    if c_type in (ctypes.c_void_p, ctypes.c_char_p) or c_type is ctypes.POINTER(ctypes.c_char):
        return ("pointer",)
    if hasattr(c_type, "contents"):
        return ("pointer", *kind(c_type._type_))
    return (ctypes.sizeof(c_type), c_type(-1).value == -1)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_those_of_the_header(name: str) -> None:
    assert [kind(found) for found in CALLS[name]] == [kind(wanted) for wanted in c_types(PROTOTYPES[name])]


@pytest.mark.skipif(not HEADERS, reason="no CUDA toolkit under /usr/local, whose cuda.h has the prototypes")
@pytest.mark.parametrize("name", PROTOTYPES)
def test_the_stand_in_has_the_prototypes_of_cuda_h(name: str) -> None:
    text = HEADERS[-1].read_text()
    names = (name, re.sub(r"_v\d$", "", name))
    found = [words for each in names for words in re.findall(rf"CUDAAPI {each}\(([^;]*)\);", text)]
    assert PROTOTYPES[name] in found


def pinned_bytes(cuda: Cuda, content: bytes) -> int:
    pointer = cuda.allocate_pinned(len(content))
    ctypes.memmove(pointer, content, len(content))
    return pointer


def test_bytes_come_back_as_they_went(cuda: Cuda) -> None:
    content = bytes(range(250)) * 4
    with cuda:
        address, there, back = cuda.allocate(SIZE), pinned_bytes(cuda, content), pinned_bytes(cuda, bytes(SIZE))
        cuda.copy_to_device(address, there, SIZE)
        cuda.copy_from_device(back, address, SIZE)
        cuda.synchronise()
        assert ctypes.string_at(back, SIZE) == content
        assert address % 256 == 0
        cuda.free(address)
        cuda.free_pinned(there)
        cuda.free_pinned(back)


def test_events_tell_the_time_on_the_device(cuda: Cuda) -> None:
    with cuda:
        first, second = cuda.event(), cuda.event()
        cuda.record(first)
        cuda.record(second)
        cuda.synchronise()
        assert 0 <= cuda.elapsed_ms(first, second) < 1000
        cuda.free_event(first)
        cuda.free_event(second)


def test_a_captured_copy_runs_with_every_launch(cuda: Cuda) -> None:
    with cuda:
        address, there, back = cuda.allocate(4), pinned_bytes(cuda, b"old!"), pinned_bytes(cuda, bytes(4))
        cuda.begin_capture()
        cuda.copy_to_device(address, there, 4)
        cuda.copy_from_device(back, address, 4)
        graph = cuda.end_capture()
        assert graph is not None
        for content in (b"one.", b"two."):
            ctypes.memmove(there, content, 4)
            cuda.launch(graph)
            cuda.synchronise()
            assert ctypes.string_at(back, 4) == content
        cuda.free_graph(graph)
        cuda.free(address)
        cuda.free_pinned(there)
        cuda.free_pinned(back)


def test_what_cannot_be_captured_gives_no_graph(cuda: Cuda) -> None:
    with cuda:
        cuda.begin_capture()
        with pytest.raises(EngineError):
            cuda.synchronise()
        assert cuda.end_capture() is None
        cuda.synchronise()


def test_without_room_the_message_says_how_much_there_is(cuda: Cuda) -> None:
    with (
        cuda,
        pytest.raises(EngineError, match=r"out of memory: 1099511627776.0 MiB requested, [\d.]+ of [\d.]+ MiB are"),
    ):
        cuda.allocate(1 << 60)


def test_the_device_is_named_with_its_capability(cuda: Cuda) -> None:
    assert re.fullmatch(r".+ \(sm_\d+, CUDA \d+\.\d\)", str(cuda.device))
    assert cuda.device.memory_bytes >= 1 << 28


def test_a_context_that_was_current_before_is_so_again(driver: Driver) -> None:
    cuda = Cuda(driver)
    (stack,) = driver.stacks.values()
    stack.append(77)
    with cuda:
        assert stack[-1] != 77
    assert stack == [77]
    stack.clear()
    cuda.close()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (100, r"cuInit failed with CUDA_ERROR_NO_DEVICE \(100\): there is no CUDA device, or CUDA_VISIBLE_DEVICES"),
        (34, r"CUDA_ERROR_STUB_LIBRARY \(34\): this libcuda is the toolkit's stub"),
        (999, r"cuInit failed with CUDA_ERROR_UNKNOWN \(999\)$"),
    ],
)
def test_why_there_is_no_cuda_is_one_line(driver: Driver, code: int, words: str) -> None:
    driver.fail = {"cuInit": code}
    with pytest.raises(EngineError, match=words):
        Cuda(driver)


def test_without_a_driver_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_module.ctypes, "CDLL", missing)
    with pytest.raises(EngineError, match=r"libcuda.so.1 cannot be loaded .*: install the NVIDIA driver"):
        open_cuda()


def test_an_old_driver_is_named_by_what_it_lacks() -> None:
    with pytest.raises(EngineError, match=r"has no cuInit: update it to one for CUDA 11"):
        Cuda(SimpleNamespace())


def test_a_context_without_a_stream_is_given_back(driver: Driver) -> None:
    driver.fail = {"cuStreamCreate": 2}
    with pytest.raises(EngineError, match="cuStreamCreate"):
        Cuda(driver)


def test_a_fault_on_the_device_is_told_by_the_next_call_and_not_by_giving_back() -> None:
    driver = Driver()
    cuda = Cuda(driver)
    with cuda:
        there = pinned_bytes(cuda, bytes(4))
        cuda.copy_to_device(12345, there, 4)
        with pytest.raises(EngineError, match=r"ILLEGAL_ADDRESS \(700\): the device cannot go on"):
            cuda.synchronise()
        cuda.free_pinned(there)
    cuda.close()
    assert len(driver.faults) == 1
