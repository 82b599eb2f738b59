"""Tensors on the device: what is lost otherwise is the values, without a word, or the memory, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mess_compile.runtime.base.errors import EngineError
from mess_compile.runtime.engines.cuda import Cuda
from mess_compile.runtime.engines.device_memory import DeviceMemory, DeviceTensor
from tests.runtime.cuda_standin import Driver
from tests.runtime.engines.test_cuda import opened_cuda


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver(memory_bytes=1 << 20)
    yield driver
    assert driver.faults == []
    assert not driver.left()


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def memory(request: pytest.FixtureRequest) -> Iterator[DeviceMemory]:
    cuda = opened_cuda() if request.param == "real" else Cuda(request.getfixturevalue("driver"))
    memory = DeviceMemory(cuda)
    yield memory
    memory.close()
    cuda.close()


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float16", "float32", ">f4"])
def test_values_come_back_with_their_type_and_shape(memory: DeviceMemory, dtype: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = memory.download(memory.upload(values))
    assert found.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, values)


def test_a_view_is_uploaded_as_it_is_seen(memory: DeviceMemory) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-3]
    np.testing.assert_array_equal(memory.download(memory.upload(values)), values)


def test_the_array_may_change_after_it_was_uploaded(memory: DeviceMemory) -> None:
    values = np.zeros(5, np.int32)
    tensor = memory.upload(values)
    values[:] = 7
    np.testing.assert_array_equal(memory.download(tensor), np.zeros(5))


def test_frames_after_one_another_use_the_same_memory(driver: Driver) -> None:
    cuda = Cuda(driver)
    memory = DeviceMemory(cuda)
    for number in range(20):
        assert memory.download(memory.upload(np.full(100, number, np.uint8)))[0] == number
    assert driver.log.count("cuMemAlloc_v2") == driver.log.count("cuMemHostAlloc") == 1
    memory.close()
    cuda.close()


@given(st.lists(st.tuples(st.sampled_from(["upload", "drop", "download"]), st.integers(0, 3)), max_size=40))
def test_a_tensor_keeps_its_values_whatever_comes_and_goes(steps: list[tuple[str, int]]) -> None:
    """Sizes repeat, so that blocks are used again, and nothing waits but a download."""
    driver = Driver(memory_bytes=1 << 20)
    cuda = Cuda(driver)
    memory = DeviceMemory(cuda)
    held: list[tuple[DeviceTensor, int, int]] = []
    for count, (verb, which) in enumerate(steps):
        if verb == "upload":
            size = (8, 8, 16, 64)[which]
            held.append((memory.upload(np.full(size, count, np.uint8)), size, count))
        elif held and verb == "drop":
            held.pop(which % len(held))
        elif held:
            tensor, size, value = held[which % len(held)]
            np.testing.assert_array_equal(memory.download(tensor), np.full(size, value))
    for tensor, size, value in held:
        np.testing.assert_array_equal(memory.download(tensor), np.full(size, value))
    memory.close()
    cuda.close()
    assert driver.faults == []
    assert not driver.left()


def test_scratch_is_one_block_as_large_as_the_largest_need(memory: DeviceMemory) -> None:
    small = memory.scratch(100)
    assert memory.scratch(50) is small
    large = memory.scratch(200)
    assert large is not small
    assert memory.scratch(100) is large
    assert memory.scratch(0) is large


def test_what_was_full_goes_on_when_there_is_room(driver: Driver) -> None:
    cuda = Cuda(driver)
    memory = DeviceMemory(cuda)
    first = memory.upload(np.ones(900_000, np.uint8))
    memory.scratch(500)
    with pytest.raises(EngineError, match=r"Stand-in is out of memory: 0.2 MiB requested, 0.1 of 1.0 MiB are free"):
        memory.upload(np.ones(200_000, np.uint8))
    with pytest.raises(EngineError, match="out of memory"):
        memory.scratch(200_000)
    assert memory.scratch(400).size == 400
    assert memory.download(first).all()
    memory.close()
    cuda.close()


def test_what_is_not_there_is_not_read(memory: DeviceMemory) -> None:
    tensor = memory.upload(np.ones(3, np.uint8))
    memory.free(tensor.block)
    with pytest.raises(EngineError, match=r"a uint8 tensor \(3,\) is not on the device"):
        memory.download(tensor)
    with pytest.raises(EngineError, match="None is not on the device"):
        memory.download(None)
