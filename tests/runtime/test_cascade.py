"""The cascade does what the plan says and no more: a user would otherwise pay for stages that no image needed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mess_compile import runtime
from mess_compile.runtime import cascade as cascade_module
from mess_compile.runtime.archive import open_archive
from mess_compile.runtime.cascade import Cascade
from mess_compile.runtime.engine import TensorSpec
from mess_compile.runtime.engine_fake import FakeGraph, FakeLibrary
from mess_compile.runtime.errors import BundleError, InputError
from tests import small_network
from tests.small_network import CELLS_HW, CLASSES, HW, ROWS, frame

ROW = 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny.mess"
    small_network.write_bundle(path)
    return path


@pytest.fixture(scope="module")
def cascade(bundle: Path) -> Iterator[Cascade]:
    with runtime.load(bundle, threads=1) as loaded:
        yield loaded


def test_an_image_leaves_where_its_count_reaches_the_cut(cascade: Cascade) -> None:
    exits = []
    for seed in range(40):
        (first, first_labels), (second, second_labels) = small_network.expected(frame(seed))
        early = first[ROW] >= 18
        prediction = cascade(frame(seed))
        exits.append(prediction.exit)
        assert prediction.exit == prediction.exit_point == (1 if early else 2)
        assert prediction.confidence == pytest.approx((first if early else second)[ROW] / 24)
        np.testing.assert_array_equal(prediction.labels, first_labels if early else second_labels)
        assert prediction.labels.dtype == np.uint8
        assert prediction.latency_ms > 0
    assert set(exits) == {1, 2}


def test_a_count_at_the_cut_leaves_and_one_below_stays(tmp_path: Path) -> None:
    count = int(small_network.expected(frame(0))[0][0][ROW])
    for cut, wanted in ((count, 1), (count + 1, 2), (0, 1), (25, 2)):
        small_network.write_bundle(tmp_path / "cut.mess", small_network.plan(cut))
        with runtime.load(tmp_path / "cut.mess", threads=1) as loaded:
            assert loaded(frame(0)).exit == wanted


def test_refining_gives_every_exit_in_order_with_growing_time(cascade: Cascade) -> None:
    predictions = list(cascade.refine(frame(0)))
    assert [p.exit for p in predictions] == [1, 2]
    for prediction, (counts, labels) in zip(predictions, small_network.expected(frame(0)), strict=True):
        np.testing.assert_array_equal(prediction.labels, labels)
        assert prediction.confidence == pytest.approx(counts[ROW] / 24)
    assert predictions[0].latency_ms < predictions[1].latency_ms


def test_after_the_deadline_no_stage_begins_but_the_first(cascade: Cascade) -> None:
    assert [p.exit for p in cascade.refine(frame(0), deadline_ms=0)] == [1]
    assert [p.exit for p in cascade.refine(frame(0), deadline_ms=1e6)] == [1, 2]


def test_a_frame_of_another_size_comes_back_at_its_own(cascade: Cascade) -> None:
    large = frame(0).repeat(4, axis=0).repeat(4, axis=1)
    prediction = cascade(large)
    assert prediction.labels.shape == (32, 48)
    assert [p.labels.shape for p in cascade.refine(large)] == [(32, 48)] * 2
    assert cascade(frame(1, (5, 7))).labels.shape == (5, 7)


def test_the_same_frame_gives_the_same_answer_after_others(cascade: Cascade) -> None:
    first = cascade(frame(1))
    kept = first.labels.copy()
    for seed in range(5):
        cascade(frame(seed))
    np.testing.assert_array_equal(first.labels, kept)
    np.testing.assert_array_equal(cascade(frame(1)).labels, kept)


@pytest.mark.parametrize("wrong", [np.zeros((8, 12), np.uint8), np.zeros((8, 12, 3), np.float32), None])
def test_what_is_no_frame_is_refused(cascade: Cascade, wrong: object) -> None:
    for call in (cascade, lambda f: list(cascade.refine(f))):
        with pytest.raises(InputError, match="a frame is"):
            call(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "exits", "wanted"), [("budgeted", (1,), [1]), ("budgeted", (2,), [2]), ("anytime", (1, 2), [1, 2])]
)
def test_the_other_settings_run_from_the_same_class(
    tmp_path: Path, setting: str, exits: tuple[int, ...], wanted: list[int]
) -> None:
    path = tmp_path / "other.mess"
    small_network.write_bundle(path, small_network.plan(None, exits, setting))
    with runtime.load(path, threads=1) as loaded:
        assert [p.exit_point for p in loaded.refine(frame(0))] == wanted
        prediction = loaded(frame(0))
        assert prediction.exit_point == wanted[-1]
        np.testing.assert_array_equal(prediction.labels, small_network.expected(frame(0))[wanted[-1] - 1][1])


def test_a_plan_is_found_by_its_target_or_refused_with_those_there_are(bundle: Path) -> None:
    with runtime.load(bundle, target="host", threads=1) as loaded:
        assert loaded.plan.target == "host"
    with pytest.raises(InputError, match=r"no plan for the target xavier; it has host \(onnxruntime\)"):
        runtime.load(bundle, target="xavier")


def test_nothing_stays_on_disk_after_closing_or_failing(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with runtime.load(bundle, threads=1):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(cascade_module, "open_library", lambda name, threads, cuda_graphs: FakeLibrary({}))
    with pytest.raises(runtime.EngineError):
        runtime.load(bundle)
    assert list(tmp_path.iterdir()) == []


def fake(first_count: int, cells: int = 24) -> FakeLibrary:
    """The small network scripted: exit 1 has `first_count` sure cells, its labels are all 1, those of exit 2 all 2."""
    image = TensorSpec("image", "uint8", (1, *HW, 3))
    exits = [TensorSpec(f"exit{n}", "float32", (1, 4, *CELLS_HW)) for n in (1, 2)]
    thresholds = TensorSpec("thresholds", "float32", (len(ROWS), len(CLASSES)))
    counts = TensorSpec("counts", "int32", (len(ROWS),))
    logits = TensorSpec("logits", "float32", (1, len(CLASSES), 4, cells // 4))
    labels = TensorSpec("labels", "uint8", (1, *HW))
    heads = [f"head-{name}" for name in small_network.HEADS]

    def features(value: int) -> FakeGraph:
        source = image if value == 1 else exits[0]
        values = np.full(exits[0].shape, value, np.float32)
        return FakeGraph((source,), (exits[value - 1],), lambda feeds: {exits[value - 1].name: values})

    def head(value: int, count: int) -> FakeGraph:
        out = {"logits": np.full(logits.shape, value, np.float32), "counts": np.full(len(ROWS), count, np.int32)}
        return FakeGraph((exits[value - 1], thresholds), (logits, counts), lambda feeds: out)

    def upsample(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"labels": np.full(labels.shape, int(feeds["logits"][0, 0, 0, 0]), np.uint8)}

    return FakeLibrary(
        {
            "segment-0-1": features(1),
            "segment-1-2": features(2),
            heads[0]: head(1, first_count),
            heads[1]: head(2, 0),
            "output-4x6": FakeGraph((logits,), (labels,), upsample),
        },
        name="onnxruntime",
    )


def test_an_early_exit_pays_for_nothing_behind_it_and_the_output_graph_runs_once(bundle: Path) -> None:
    early, late = ["segment-0-1", "head-1"], ["segment-1-2", "head-2"]
    for count, wanted in ((18, [*early, "output"]), (17, [*early, *late, "output"])):
        library = fake(count)
        with runtime.load(bundle, library=library) as loaded:
            prediction = loaded(frame(0))
        ran = [name.replace("exit", "").split(".")[0] for verb, name in library.log if verb == "run"]
        assert [name.split("-4x6")[0] for name in ran] == wanted
        assert (prediction.labels == prediction.exit).all()
        assert library.log.count(("load", "output-4x6")) == 1
        assert {name for verb, name in library.log if verb == "close"} == {*library.graphs, ""}


def test_every_report_pays_its_own_output_graph(bundle: Path) -> None:
    library = fake(0)
    with runtime.load(bundle, library=library) as loaded:
        assert [int(p.labels[0, 0]) for p in loaded.refine(frame(0))] == [1, 2]
    assert library.log.count(("run", "output-4x6")) == 2


def test_graphs_that_do_not_fit_the_manifest_are_refused_before_they_run(bundle: Path) -> None:
    library = fake(0, cells=20)
    with pytest.raises(BundleError, match=r"logits \(1, 3, 4, 5\)"):
        runtime.load(bundle, library=library)
    other = fake(0)
    wrong = replace(other.graphs["segment-0-1"], outputs=(TensorSpec("exit2", "float32", (1, 4, 4, 6)),))
    with pytest.raises(BundleError, match="segment-0-1"):
        runtime.load(bundle, library=replace(other, graphs={**other.graphs, "segment-0-1": wrong}))
    assert not [verb for verb, _ in library.log + other.log if verb == "run"]


def test_the_archive_is_a_private_copy(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.mess"
    copy.write_bytes(bundle.read_bytes())
    with runtime.load(copy, threads=1) as loaded:
        copy.unlink()
        assert loaded(frame(0)).exit == 1
    archive = open_archive(bundle)
    archive.close()
    assert not archive.folder.exists()
