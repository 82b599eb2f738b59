"""One store of weights: a lost or doubled weight means a wrong network, or gigabytes too many."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mess_compile.graph.node_builder import add, empty_model
from mess_compile.graph.store import externalise, read_model, write_graph
from mess_compile.graph.workload import activations, count_macs, workspace_bytes
from mess_compile.runtime.base.errors import InputError
from tests.graph import tiny


def small_model(opset: int = 17) -> onnx.ModelProto:
    """image (1, 2, 8, 8) -> conv to 32 channels -> relu -> conv to 4 channels -> logits."""
    model = empty_model([helper.make_tensor_value_info("image", TensorProto.FLOAT, (1, 2, 8, 8))])
    model.opset_import[0].version = opset
    random = np.random.default_rng(0)
    for name, shape in {"first": (32, 2, 3, 3), "second": (4, 32, 1, 1)}.items():
        model.graph.initializer.append(numpy_helper.from_array(random.random(shape, np.float32), name))
    add(model.graph, "Conv", ["image", "first"], "wide", pads=[1, 1, 1, 1])
    add(model.graph, "Relu", ["wide"], "kept")
    add(model.graph, "Conv", ["kept", "second"], "logits")
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, (1, 4, 8, 8)))
    return model


def test_large_weights_become_files_named_by_their_content(tmp_path: Path) -> None:
    model = small_model()
    first = numpy_helper.to_array(model.graph.initializer[0])
    spec = write_graph(model, tmp_path, "small")
    digest = hashlib.sha256(first.tobytes()).hexdigest()  # 32 * 2 * 9 * 4 = 2304 bytes; the other has 512
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [digest]
    assert (tmp_path / "weights" / digest).read_bytes() == first.tobytes()
    assert spec.bytes == 2304 + 512
    loaded = onnx.load(str(tmp_path / spec.path))
    assert np.array_equal(numpy_helper.to_array(loaded.graph.initializer[0]), first)


def test_equal_graphs_give_equal_bytes_whoever_made_them(tmp_path: Path) -> None:
    other = small_model()
    other.producer_name, other.doc_string, other.graph.doc_string = "someone", "yesterday", "on a Tuesday"
    other.graph.node[0].doc_string = "at /home/someone/network.py:17"
    (tmp_path / "b").mkdir()
    first, second = write_graph(small_model(), tmp_path, "small"), write_graph(other, tmp_path / "b", "small")
    assert first == second
    assert (tmp_path / "small.onnx").read_bytes() == (tmp_path / "b" / "small.onnx").read_bytes()


def test_a_changed_weight_changes_the_hash_of_the_graph(tmp_path: Path) -> None:
    other = small_model()
    values = numpy_helper.to_array(other.graph.initializer[0]).copy()
    values[0, 0, 0, 0] += 1
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "first"))
    assert write_graph(small_model(), tmp_path, "a").sha256 != write_graph(other, tmp_path, "a").sha256


def test_foreign_external_data_moves_into_the_store(tmp_path: Path) -> None:
    model = small_model()
    first = numpy_helper.to_array(model.graph.initializer[0])
    (tmp_path / "from").mkdir()
    path = tmp_path / "from" / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="all.bin", size_threshold=0)
    moved = read_model(path)
    externalise(moved, tmp_path, tmp_path / "from")
    write_graph(moved, tmp_path, "small")
    assert np.array_equal(numpy_helper.to_array(onnx.load(str(tmp_path / "small.onnx")).graph.initializer[0]), first)
    (tmp_path / "from" / "all.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="first"):
        externalise(read_model(path), tmp_path, tmp_path / "from")


def test_workload_and_memory_of_a_graph_counted_by_hand() -> None:
    model = small_model()
    assert count_macs(model) == 64 * 32 * 2 * 9 + 64 * 4 * 32
    assert workspace_bytes(model) == 2 * 64 * 32 * 4  # before and after relu; input and output are counted elsewhere


def test_batchnorm_counts_two_per_element() -> None:
    stem, down, residual = 96 * 8 * 3 * 9 + 2 * 96 * 8, 24 * 12 * 8 * 9, 24 * 12 * 12 * 9
    heads = 96 * 8 * 4 + 2 * 24 * 12 * 4 + 24 * 16 * 4
    assert count_macs(tiny.tiny_network()) == stem + down + residual + 2 * 24 * 12 * 16 + heads


def test_another_opset_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"opset 18.*export at opset 17"):
        write_graph(small_model(opset=18), tmp_path, "small")


def test_dynamic_shapes_are_refused_by_name() -> None:
    model = small_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(InputError, match=r"'image'.*batch"):
        activations(model)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08\x12"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx"):
        read_model(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        read_model(tmp_path / "absent.onnx")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n"


def test_pointers_of_git_lfs_instead_of_a_model_or_its_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text(POINTER)
    with pytest.raises(InputError, match=r"model\.onnx is a Git LFS pointer.*git lfs pull"):
        read_model(tmp_path / "model.onnx")
    model = small_model()
    onnx.save(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.data", size_threshold=0)
    (tmp_path / "model.data").write_text(POINTER)
    with pytest.raises(InputError, match=r"model\.data is a Git LFS pointer"):
        externalise(read_model(tmp_path / "model.onnx"), tmp_path / "graphs", tmp_path)
