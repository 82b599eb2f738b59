"""A bundle holds what its plan needs, nothing else, and proves itself: what is lost otherwise is trust in a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mess_compile import runtime
from mess_compile.bundle import write as bundle
from mess_compile.files import sha256_of_file
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import BundleError, InputError, StaleError
from mess_compile.runtime.bundle.archive import file_of, open_archive, write_archive
from mess_compile.runtime.bundle.manifest import EngineFile, Manifest
from mess_compile.runtime.images import npy
from mess_compile.runtime.serve.verify import verify_bundle
from mess_compile.search.plan import Plan
from tests import small_network
from tests.small_network import frame


@pytest.fixture
def graphs(tmp_path: Path) -> GraphSet:
    return small_network.graph_set(tmp_path / "graphs")


def write(graphs: GraphSet, plan: Plan, golden: int = 2) -> Manifest:
    frames = [frame(seed) for seed in range(golden)]
    path = graphs.root.parent / "tiny.mess"
    parts = [small_network.part(graphs, plan)]
    return bundle.write_bundle(path, parts, frames, {"made-by": "a test"})


def test_a_bundle_holds_the_plans_graphs_and_their_weights_alone(graphs: GraphSet) -> None:
    manifest = write(graphs, small_network.plan(None, (2,), "budgeted"))
    names = {"segment-0-2", f"head-{small_network.HEADS[1]}", "output-4x6"}
    found = {Path(name).stem for name in manifest.files if name.endswith(".onnx")}
    assert found == names
    weights = {name.removeprefix("graphs/") for name in manifest.files if "/weights/" in name}
    models = [onnx.load(str(graphs.path(name)), load_external_data=False) for name in names]
    named = {e.value for m in models for t in m.graph.initializer for e in t.external_data if e.key == "location"}
    assert weights == named
    assert len(weights) == 3


def test_a_fused_plan_runs_the_fused_segment(graphs: GraphSet) -> None:
    manifest = write(graphs, small_network.plan(None, (2,), "budgeted"))
    assert manifest.plans[0].stages[0].segment == "graphs/segment-0-2.onnx"
    with runtime.load(graphs.root.parent / "tiny.mess", threads=1) as cascade:
        np.testing.assert_array_equal(cascade(frame(3)).labels, small_network.expected(frame(3))[1][1])


def test_the_manifest_carries_plan_gate_and_network(graphs: GraphSet) -> None:
    manifest = write(graphs, small_network.plan(18))
    assert manifest.name == "tiny"
    assert [(s.exit_point, s.head, s.row, s.cut, s.cells) for s in manifest.plans[0].stages] == [
        (1, small_network.HEADS[0], 2, 18, 24),
        (2, small_network.HEADS[1], 2, None, 24),
    ]
    np.testing.assert_array_equal(np.array(manifest.gate.thresholds, np.float32), small_network.thresholds())
    assert manifest.network.gmacs == pytest.approx(210e-9)
    assert manifest.provenance == {"made-by": "a test"}
    assert manifest.plans[0].predicted.miou == 60.0
    assert manifest.plans[0].baseline_name == "baseline"


def test_golden_frames_carry_what_the_network_says_of_them(graphs: GraphSet) -> None:
    manifest = write(graphs, small_network.plan(18))
    archive = open_archive(graphs.root.parent / "tiny.mess")
    for seed, golden in enumerate(manifest.golden):
        results = small_network.expected(frame(seed))
        exit_ = 1 if results[0][0][2] >= 18 else 2
        counts, labels = results[exit_ - 1]
        assert (golden.exit, golden.count) == (exit_, counts[2])
        np.testing.assert_array_equal(archive.array(golden.frame), frame(seed))
        np.testing.assert_array_equal(archive.array(golden.labels), labels)
    archive.close()


def test_a_fresh_bundle_verifies(graphs: GraphSet) -> None:
    write(graphs, small_network.plan(18))
    checks = verify_bundle(graphs.root.parent / "tiny.mess")
    assert [check.name for check in checks] == ["hashes", "signature", "golden/0.npy", "golden/1.npy", "latency"]
    assert all(check.passed for check in checks)


def forged(path: Path, change: dict[str, bytes], **fields: object) -> None:
    """Write the bundle again with other content, hashes and seal made to fit, as another engine might compute it."""
    archive = open_archive(path)
    sources = {name: (archive.folder / name).read_bytes() for name in archive.manifest.files} | change
    listed = {name: file_of(content) for name, content in sources.items()}
    write_archive(path, replace(archive.manifest, files=listed, **fields), sources)  # type: ignore[arg-type]
    archive.close()


def test_other_labels_and_another_exit_fail_verification(graphs: GraphSet) -> None:
    path = graphs.root.parent / "tiny.mess"
    manifest = write(graphs, small_network.plan(18))
    labels = small_network.expected(frame(0))[0][1].copy()
    labels[0, 0] += 1
    forged(path, {"golden/0.labels.npy": npy.content_of(labels)})
    assert [check.passed for check in verify_bundle(path)] == [True, True, False, True, True]
    write(graphs, small_network.plan(18))
    moved = (manifest.golden[0], replace(manifest.golden[1], exit=1))
    forged(path, {}, golden=moved)
    checks = verify_bundle(path)
    assert [check.passed for check in checks] == [True, True, True, False, True]
    assert "exit 2, expected 1" in checks[3].detail


@pytest.mark.parametrize(("off", "passed"), [(-2, False), (-1, True), (1, True), (2, False)])
def test_a_gate_that_counts_otherwise_fails_verification(graphs: GraphSet, off: int, passed: bool) -> None:
    path = graphs.root.parent / "tiny.mess"
    manifest = write(graphs, small_network.plan(None, (2,), "budgeted"))
    count = int(small_network.expected(frame(0))[1][0][2])
    assert 2 <= count <= 22
    forged(path, {}, golden=(replace(manifest.golden[0], count=count + off), manifest.golden[1]))
    check = verify_bundle(path)[2]
    assert check.passed is passed
    assert f"{count} confident cells, expected {count + off};" in check.detail


def test_a_changed_bundle_is_not_verified_but_refused(graphs: GraphSet) -> None:
    path = graphs.root.parent / "tiny.mess"
    write(graphs, small_network.plan(18))
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(BundleError, match="changed after it was written"):
        verify_bundle(path)


def test_a_plan_of_other_graphs_is_stale(graphs: GraphSet) -> None:
    with pytest.raises(StaleError, match="another network"):
        write(graphs, replace(small_network.plan(), network="0" * 64))
    with pytest.raises(StaleError, match="another baseline"):
        write(graphs, replace(small_network.plan(), baseline_alone="a" * 64))
    with pytest.raises(StaleError, match="another gate"):
        write(graphs, replace(small_network.plan(), gate=replace(graphs.gate, confidence="margin")))


def test_damaged_graphs_and_weights_are_refused_and_the_old_bundle_stays(graphs: GraphSet) -> None:
    path = graphs.root.parent / "tiny.mess"
    write(graphs, small_network.plan(18))
    old = path.read_bytes()
    weight = next((graphs.root / "weights").iterdir())
    good = weight.read_bytes()
    for content in (good[:-1] + b"\0\0", good[:-1]):
        weight.write_bytes(content)
        with pytest.raises(InputError, match=r"changed after export: run `mess-compile export`"):
            write(graphs, small_network.plan(18))
    weight.unlink()
    with pytest.raises(InputError, match="is missing"):
        write(graphs, small_network.plan(18))
    weight.write_bytes(good)
    graph = graphs.path("segment-1-2")
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"segment-1-2\.onnx was changed"):
        write(graphs, small_network.plan(18))
    assert path.read_bytes() == old
    assert [p.name for p in graphs.root.parent.iterdir() if p.name.startswith(".")] == []


def test_a_bundle_without_golden_frames_is_refused(graphs: GraphSet) -> None:
    with pytest.raises(InputError, match="golden"):
        write(graphs, small_network.plan(), golden=0)


def test_golden_frames_are_few_take_every_exit_and_leave_no_doubt(graphs: GraphSet) -> None:
    frames = [frame(seed) for seed in range(40)]
    counts = [int(small_network.expected(each)[0][0][2]) for each in frames]
    cut = max(counts)  # one exit is taken by few of the frames
    early = [index for index, count in enumerate(counts) if count >= cut]
    assert 1 <= len(early) < 4
    path = graphs.root.parent / "tiny.mess"
    parts = [small_network.part(graphs, small_network.plan(cut))]
    manifest = bundle.write_bundle(path, parts, frames, {})
    assert sorted(golden.exit for golden in manifest.golden) == [1, 2, 2, 2]
    archive = open_archive(path)
    kept = [archive.array(golden.frame) for golden in manifest.golden]
    archive.close()
    places = [next(i for i, each in enumerate(frames) if np.array_equal(each, found)) for found in kept]
    assert places == sorted(places)
    clearest = sorted(cut - count for count in counts)[-3:]
    assert sorted(cut - counts[place] for place in places if counts[place] < cut) == clearest


def test_frames_of_another_shape_keep_their_proportions_where_the_bundle_says_so(graphs: GraphSet) -> None:
    path, wide = graphs.root.parent / "tiny.mess", frame(1, (4, 12))
    parts = [small_network.part(graphs, small_network.plan(None, (2,), "budgeted"))]
    found = {}
    for resize in ("stretch", "letterbox"):
        bundle.write_bundle(path, parts, [frame(0)], {}, resize=resize)
        with runtime.load(path) as cascade:
            found[resize] = cascade(wide).labels
    assert found["letterbox"].shape == found["stretch"].shape == (4, 12)
    assert not np.array_equal(found["letterbox"], found["stretch"])


def recipe_of_its_own(graphs: GraphSet, folder: Path, name: str) -> GraphSet:
    """The same graphs but for one, as another recipe has them."""
    other = replace(small_network.graph_set(folder), recipe="fp16")
    path = other.path(name)
    model = onnx.load(str(path), load_external_data=False)
    model.doc_string = "in another precision"
    path.write_bytes(model.SerializeToString(deterministic=True))
    changed = replace(other.graphs[name], sha256=sha256_of_file(path))
    return replace(other, graphs={**other.graphs, name: changed})


def test_several_plans_share_what_is_the_same(graphs: GraphSet, tmp_path: Path) -> None:
    """fp32 and fp16 of one target differ in one graph, and another target takes one exit fewer."""
    lower = recipe_of_its_own(graphs, tmp_path / "fp16", "segment-1-2")
    bold = small_network.part(lower, small_network.plan(18), "fp16")
    safe = small_network.part(graphs, small_network.plan(18))
    budgeted = replace(small_network.plan(None, (2,), "budgeted"), device="elsewhere")
    path = tmp_path / "several.mess"
    manifest = small_network.write_parts(path, [bold, safe, small_network.part(graphs, budgeted)])
    assert [plan.name for plan in manifest.plans] == ["host:fp16", "host:fp32", "elsewhere:fp32"]
    segments = [plan.stages[-1].segment for plan in manifest.plans]
    assert len(set(segments)) == 3
    assert segments[0] == "graphs/segment-1-2.onnx"
    assert segments[1].startswith("graphs/segment-1-2.")
    named = [name for name in manifest.files if name.endswith(".onnx")]
    assert len(named) == 5 + 1 + 1, "two segments, two heads and an output graph; one more of each other plan"
    assert len([name for name in manifest.files if "/weights/" in name]) == 4
    frames = [name for name in manifest.files if name.endswith(".npy") and ".labels." not in name]
    assert sorted(frames) == ["golden/0.npy", "golden/1.npy"]
    for plan in manifest.plans:
        assert [golden.frame for golden in manifest.golden_of(plan)] == ["golden/0.npy", "golden/1.npy"]
        checks = verify_bundle(path, plan.name)
        assert [check.passed for check in checks] == [True] * len(checks)
    archive = open_archive(path)
    for golden in manifest.golden:
        seed = ["golden/0.npy", "golden/1.npy"].index(golden.frame)
        results = small_network.expected(frame(seed))
        exit_point = 1 if golden.plan != "elsewhere:fp32" and results[0][0][2] >= 18 else 2
        np.testing.assert_array_equal(archive.array(golden.labels), results[exit_point - 1][1])
    archive.close()


def test_plans_that_do_not_go_together_are_refused(graphs: GraphSet, tmp_path: Path) -> None:
    part = small_network.part(graphs, small_network.plan())
    margin = replace(graphs.gate, confidence="margin")
    foreign = replace(graphs, candidate=replace(graphs.candidate, identity="e" * 64))
    elsewhere = replace(small_network.plan(), device="elsewhere")
    cases = {
        "two of the plans are for host in fp32": part,
        "elsewhere in fp32 is of another network than the one for host": small_network.part(
            foreign, replace(elsewhere, network="e" * 64)
        ),
        "elsewhere in fp32 has another gate than the one for host": small_network.part(
            replace(graphs, gate=margin), replace(elsewhere, gate=margin)
        ),
    }
    for words, other in cases.items():
        with pytest.raises(InputError, match=words):
            small_network.write_parts(tmp_path / "never.mess", [part, other])
    assert not (tmp_path / "never.mess").exists()


def test_engines_of_several_plans_keep_their_graphs(graphs: GraphSet, tmp_path: Path) -> None:
    lower = recipe_of_its_own(graphs, tmp_path / "fp16", "segment-1-2")
    parts = []
    for recipe, of in (("fp16", lower), ("fp32", graphs)):
        built = tmp_path / f"{recipe}.engine"
        built.write_bytes(recipe.encode())
        file, graph = "engines/segment-1-2.engine", "graphs/segment-1-2.onnx"
        engine = EngineFile(file, graph, recipe, "tensorrt", "10.0", "Orin", (8, 7))
        parts.append(replace(small_network.part(of, small_network.plan(), recipe), engines={engine: built}))
    manifest = small_network.write_parts(tmp_path / "engines.mess", parts)
    archive = open_archive(tmp_path / "engines.mess")
    for plan, engine in zip(manifest.plans, manifest.engines, strict=True):
        assert engine.graph == plan.stages[1].segment
        assert (archive.folder / engine.file).read_text() == plan.precision
    archive.close()
