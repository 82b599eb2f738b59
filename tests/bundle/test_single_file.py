"""Whoever has ONNX Runtime alone gets the same labels from one file, and leaves as early."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from mess_compile import runtime
from mess_compile.bundle import single_file
from mess_compile.runtime.base.errors import InputError
from mess_compile.search.plan import Plan
from tests import skips, small_network


def written(folder: Path, plan: Plan) -> Path:
    small_network.write_bundle(folder / "tiny.mess", plan)
    single_file.write_single_file(folder / "tiny.mess", "host:fp32", folder / "tiny.onnx")
    return folder / "tiny.onnx"


@pytest.mark.parametrize("cut", [0, 12, 18, 25])
def test_one_file_says_what_the_network_says(tmp_path: Path, cut: int) -> None:
    session = onnxruntime.InferenceSession(written(tmp_path, small_network.plan(cut)))
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [("image", [1, 8, 12, 3], "tensor(uint8)")]
    for seed in range(12):
        frame = small_network.frame(seed)
        labels, exit_, confidence = session.run(["labels", "exit", "confidence"], {"image": frame[None]})
        results = small_network.expected(frame)
        taken = 0 if results[0][0][2] >= cut else 1
        assert exit_.tolist() == [taken + 1]
        assert confidence[0] == pytest.approx(results[taken][0][2] / 24)
        np.testing.assert_array_equal(labels[0], results[taken][1])


@pytest.mark.parametrize(("exits", "setting"), [((2,), "budgeted"), ((1, 2), "anytime")])
def test_where_nothing_is_decided_there_is_no_branch(tmp_path: Path, exits: tuple[int, ...], setting: str) -> None:
    path = written(tmp_path, small_network.plan(None, exits, setting))
    assert "If" not in {node.op_type for node in onnx.load(str(path)).graph.node}
    session = onnxruntime.InferenceSession(path)
    frame = small_network.frame(4)
    labels, exit_ = session.run(["labels", "exit"], {"image": frame[None]})
    np.testing.assert_array_equal(labels[0], small_network.expected(frame)[1][1])
    assert exit_.tolist() == [len(exits)]


def test_the_rest_does_not_run_when_the_first_exit_is_sure(tmp_path: Path) -> None:
    path = written(tmp_path, small_network.plan(0))
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(path, options)
    session.run(None, {"image": small_network.frame(0)[None]})
    told = Path(session.end_profiling()).read_text()
    assert "exit1/output" in told
    assert "exit2/" not in told


def test_weights_lie_in_it_once(tmp_path: Path) -> None:
    model = onnx.load(str(written(tmp_path, small_network.plan(18))), load_external_data=False)
    names = [weight.name for weight in model.graph.initializer]
    assert len(names) == len(set(names))
    assert not any(weight.external_data for weight in model.graph.initializer)
    assert sum(weight.name.startswith("graphs/output-4x6.onnx/") for weight in model.graph.initializer) == len(
        onnx.load(str(tmp_path / "graphs" / "output-4x6.onnx"), load_external_data=False).graph.initializer
    )


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_network.write_bundle(tmp_path / "tiny.mess")
    made = single_file._Writer.model

    def off_by_one(self: single_file._Writer) -> onnx.ModelProto:
        model = made(self)
        (cut,) = [weight for weight in model.graph.initializer if weight.name == "exit1/cut"]
        cut.raw_data = np.array([0], np.int32).tobytes()
        return model

    monkeypatch.setattr(single_file._Writer, "model", off_by_one)
    with runtime.load(tmp_path / "tiny.mess") as cascade:
        assert 2 in {golden.exit for golden in cascade.manifest.golden}
    with pytest.raises(InputError, match=r"is not written: on golden/\d\.npy the single file leaves at exit 1"):
        single_file.write_single_file(tmp_path / "tiny.mess", "host:fp32", tmp_path / "tiny.onnx")
    assert not (tmp_path / "tiny.onnx").exists()


@pytest.mark.parametrize("exits", [(1, 2, 3), (1, 3)])
def test_one_file_of_a_network_with_skips_says_what_the_network_says_run_whole(
    tmp_path: Path, exits: tuple[int, ...]
) -> None:
    """Its branches read the tensors of earlier stages from outside; the last exit's labels are the network's own."""
    path, _ = skips.write_bundle(tmp_path, skips.imported(tmp_path), exits)
    single_file.write_single_file(path, "host:fp32", tmp_path / "skips.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "skips.onnx")
    taken = set()
    for seed in range(20):
        labels, exit_, confidence = session.run(None, {"image": skips.frame(seed)[None]})
        results = [skips.expected(skips.frame(seed))[number - 1] for number in exits]
        counts = [counts[1] for counts, _ in results]
        wanted = next((n for n, cut in enumerate((90, 14)[: len(exits) - 1]) if counts[n] >= cut), len(exits) - 1)
        assert exit_.tolist() == [wanted + 1]
        assert confidence[0] == pytest.approx(counts[wanted] / (96, 24, 24)[exits[wanted] - 1])
        np.testing.assert_array_equal(labels[0], results[wanted][1])
        taken.add(wanted + 1)
    assert taken == set(range(1, len(exits) + 1))
