"""A bundle of a network with skip connections: what is read later is carried, and let go of after its last reader."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mess_compile import runtime
from mess_compile.network import GraphSet
from mess_compile.runtime.base.errors import BundleError, EngineError
from mess_compile.runtime.cascade.cascade import Cascade, Prediction
from mess_compile.runtime.engines.engine import Engine, Library, TensorSpec, open_library
from mess_compile.runtime.engines.engine_fake import FakeGraph, FakeLibrary
from tests import skips
from tests.runtime.faults import FaultyLibrary

EXIT2 = ("exit2", "float32", (1, 12, 4, 6))
GRAPHS = ("segment-0-1", "head-exit1.small", "segment-1-2", "head-exit2.small", "segment-2-3", "head-exit3.own")


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return skips.imported(tmp_path_factory.mktemp("skips"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, graph_set: GraphSet) -> Path:
    return skips.write_bundle(tmp_path_factory.mktemp("bundle"), graph_set)[0]


@pytest.fixture(scope="module")
def cascade(bundle: Path) -> Iterator[Cascade]:
    with runtime.load(bundle, threads=1) as loaded:
        yield loaded


def exit_taken(seed: int) -> int:
    counts = [counts[1] for counts, _ in skips.expected(skips.frame(seed))]
    return 1 if counts[0] >= 90 else 2 if counts[1] >= 14 else 3


def check(prediction: Prediction, seed: int, exit_: int) -> None:
    """Against the network run whole."""
    counts, labels = skips.expected(skips.frame(seed))[exit_ - 1]
    assert prediction.exit == exit_
    assert prediction.confidence == pytest.approx(counts[1] / (96, 24, 24)[exit_ - 1])
    np.testing.assert_array_equal(prediction.labels, labels)


def test_every_exit_gives_what_the_network_gives_run_whole(cascade: Cascade) -> None:
    for seed in range(30):
        check(cascade(skips.frame(seed)), seed, exit_taken(seed))
    assert set(Counter(map(exit_taken, range(30)))) == {1, 2, 3}


def test_the_networks_own_end_has_a_confidence_map(cascade: Cascade) -> None:
    """Of its logits as they are: the softmax maximum of each cell, over the cell's pixels."""
    seed = next(seed for seed in range(30) if exit_taken(seed) == 3)
    found = cascade.confidence_map(cascade(skips.frame(seed)))
    logits = skips.tensors(skips.frame(seed))["logits:exit3.own"][0]
    odds = np.exp(logits - logits.max(axis=0))
    wanted = (odds.max(axis=0) / odds.sum(axis=0)).repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_so_do_a_refinement_a_batch_and_a_stream(cascade: Cascade) -> None:
    for seed in range(3):
        for exit_, prediction in enumerate(cascade.refine(skips.frame(seed)), start=1):
            check(prediction, seed, exit_)
    frames = [skips.frame(seed) for seed in range(8)]
    for found in (cascade.batch(frames), list(cascade.stream(frames))):
        for seed, prediction in enumerate(found):
            check(prediction, seed, exit_taken(seed))


@pytest.mark.parametrize("exits", [(1, 3), (2, 3), (3,), (1, 2)])
def test_a_plan_that_skips_exit_points_carries_what_its_own_segments_need(
    tmp_path: Path, graph_set: GraphSet, exits: tuple[int, ...]
) -> None:
    path, _ = skips.write_bundle(tmp_path, graph_set, exits)
    with runtime.load(path, threads=1) as loaded:
        for seed in range(3):
            found = list(loaded.refine(skips.frame(seed)))
            assert [prediction.exit_point for prediction in found] == list(exits)
            for prediction in found:
                wanted = skips.expected(skips.frame(seed))[prediction.exit_point - 1][1]
                np.testing.assert_array_equal(prediction.labels, wanted)


@pytest.mark.parametrize("graph", [*GRAPHS, "output-own"])
def test_a_frame_on_which_an_engine_fails_starts_again_from_the_image(bundle: Path, graph: str) -> None:
    broken = {graph}
    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: "error" if name in broken else None)
    with runtime.load(bundle, library=library, threads=1, on_failure="fallback") as loaded:
        for seed in range(4):
            for exit_, prediction in enumerate(loaded.refine(skips.frame(seed)), start=1):
                check(prediction, seed, exit_)
        assert loaded.metrics().fallback_frames == 4


class Held:
    """A tensor of which the test knows whether anything still refers to it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class CountingLibrary:
    """A library that notes, before every run, which named tensors are referred to from anywhere."""

    name, version, builds_for, concurrent = "onnxruntime", "1", None, True

    def __init__(self) -> None:
        self.library: Library = open_library("onnxruntime", threads=1)
        self.names: weakref.WeakKeyDictionary[Held, str] = weakref.WeakKeyDictionary()
        self.log: list[tuple[str, set[str]]] = []

    def held(self, name: str, value: Any) -> Held:
        tensor = Held(value)
        self.names[tensor] = name
        return tensor

    def load(self, path: Path) -> CountingEngine:
        return CountingEngine(self, path.stem, self.library.load(path))

    def upload(self, array: np.ndarray[Any, Any]) -> Held:
        return self.held("image" if array.dtype == np.uint8 else "thresholds", self.library.upload(array))

    def download(self, tensor: Held) -> Any:
        return self.library.download(tensor.value)

    def synchronise(self) -> None:
        pass

    def close(self) -> None:
        self.library.close()


class CountingEngine:
    def __init__(self, home: CountingLibrary, name: str, engine: Engine) -> None:
        self._home, self._name, self._engine = home, name, engine
        self.inputs, self.outputs, self.scratch_bytes = engine.inputs, engine.outputs, None

    def run(self, feeds: Mapping[str, Held]) -> dict[str, Held]:
        self._home.log.append((self._name, set(self._home.names.values()) - {"thresholds", "logits", "counts"}))
        assert set(feeds) == set(self.inputs)
        made = self._engine.run({name: tensor.value for name, tensor in feeds.items()})
        return {name: self._home.held(name, value) for name, value in made.items()}

    def run_timed(self, feeds: Mapping[str, Held]) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self._engine.close()


def alive(path: Path) -> list[tuple[str, set[str]]]:
    """Every run of a refinement, with the tensors alive just before; at its end none are."""
    library = CountingLibrary()
    with runtime.load(path, library=library) as loaded:  # type: ignore[arg-type]
        predictions = list(loaded.refine(skips.frame(0)))
        assert len(predictions) == len(loaded.plan.stages)
        assert not set(library.names.values()) - {"thresholds", "logits", "counts", "labels"}
    return [(name, names - {"labels"}) for name, names in library.log]


def test_a_tensor_is_let_go_of_after_its_last_reader(bundle: Path) -> None:
    assert alive(bundle) == [
        ("segment-0-1", {"image"}),
        ("head-exit1.small", {"image", "exit1"}),
        ("output-8x12", {"image", "exit1"}),
        ("segment-1-2", {"image", "exit1"}),
        ("head-exit2.small", {"image", "exit1", "exit2"}),
        ("output-4x6", {"image", "exit1", "exit2"}),
        ("segment-2-3", {"image", "exit1", "exit2"}),
        ("head-exit3.own", {"image", "skip1"}),  # nothing reads exit3, the pooled map
        ("output-own", set()),
    ]


@pytest.mark.parametrize(
    ("exits", "wanted"),
    [
        ((1, 2), [("segment-0-1", {"image"}), ("head-exit1.small", {"exit1"}), ("output-8x12", {"exit1"}),
                  ("segment-1-2", {"exit1"}), ("head-exit2.small", {"exit2"}), ("output-4x6", set())]),
        ((1, 3), [("segment-0-1", {"image"}), ("head-exit1.small", {"image", "exit1"}),
                  ("output-8x12", {"image", "exit1"}), ("segment-1-3", {"image", "exit1"}),
                  ("head-exit3.own", {"image", "skip1"}), ("output-own", set())]),
        ((3,), [("segment-0-3", {"image"}), ("head-exit3.own", {"image", "skip1"}), ("output-own", set())]),
    ],
)  # fmt: skip
def test_what_no_later_graph_of_the_plan_reads_is_let_go_of_at_once(
    tmp_path: Path, graph_set: GraphSet, exits: Sequence[int], wanted: list[tuple[str, set[str]]]
) -> None:
    assert alive(skips.write_bundle(tmp_path, graph_set, exits)[0]) == wanted


def test_an_early_exit_leaves_nothing_behind(bundle: Path) -> None:
    library = CountingLibrary()
    seed = next(seed for seed in range(30) if exit_taken(seed) == 1)
    with runtime.load(bundle, library=library) as loaded:  # type: ignore[arg-type]
        prediction = loaded(skips.frame(seed))
        assert prediction.exit == 1
        assert not set(library.names.values()) & {"image", "exit1", "exit2", "skip1", "exit3"}


def scripted(graph_set: GraphSet) -> FakeLibrary:
    """Graphs of the right tensors, which never run."""
    graphs = {name: FakeGraph(spec.inputs, spec.outputs, lambda feeds: {}) for name, spec in graph_set.graphs.items()}
    return FakeLibrary(graphs, name="onnxruntime")


@pytest.mark.parametrize(
    ("graph", "inputs", "outputs", "message"),
    [
        ("segment-2-3", [EXIT2, ("skip9", "float32", (1,))], None, "segment-2-3.*reads.*skip9"),
        ("segment-2-3", [("exit1", "float32", (1, 8, 8, 13))], None, r"8, 13.*before it give {'exit1': .*8, 12"),
        ("segment-2-3", [("exit1", "int64", (1, 8, 8, 12))], None, "segment-2-3.*int64"),
        ("segment-1-2", [], None, "segment-1-2.*reads"),
        ("segment-1-2", None, [EXIT2, ("exit1", "float32", (1, 8, 8, 12))], "segment-1-2.*new names"),
        ("segment-1-2", None, [EXIT2, ("logits", "float32", (1,))], "segment-1-2.*new names"),
        ("segment-1-2", None, [("skip1", "float32", (1, 12, 4, 6))], "segment-1-2.*not exit2"),
        ("head-exit3.own", [("skip1", "float32", (1, 12, 8, 12))], None, "head-exit3.own.*reads"),
        ("head-exit3.own", [("thresholds", "float32", (4, 4))], None, "head-exit3.own.*reads"),
    ],
)  # fmt: skip
def test_a_graph_that_reads_what_none_before_it_gives_is_refused_before_anything_runs(
    bundle: Path, graph_set: GraphSet, graph: str, inputs: Any, outputs: Any, message: str
) -> None:
    library = scripted(graph_set)
    known = library.graphs[graph]
    changes = {"inputs": inputs, "outputs": outputs}
    specs = {k: tuple(TensorSpec(*each) for each in v) for k, v in changes.items() if v is not None}
    library.graphs[graph] = replace(known, **specs)
    with pytest.raises(BundleError, match=message):
        runtime.load(bundle, library=library)
    assert not [verb for verb, _ in library.log if verb == "run"]


def test_only_the_last_gate_may_count_over_pooled_logits(bundle: Path, graph_set: GraphSet) -> None:
    library = scripted(graph_set)
    known = library.graphs["head-exit2.small"]
    larger = TensorSpec("logits", "float32", (1, 4, 8, 12))
    library.graphs["head-exit2.small"] = replace(known, outputs=(larger, known.outputs[1]))
    with pytest.raises(BundleError, match=r"head-exit2.small.onnx has logits \(1, 4, 8, 12\) for 4 classes, 24 cells"):
        runtime.load(bundle, library=library)


def test_a_failure_without_a_fallback_leaves_the_next_frame_unharmed(bundle: Path) -> None:
    broken = {"segment-2-3"}
    library = FaultyLibrary(open_library("onnxruntime", threads=1), lambda name: "error" if name in broken else None)
    seed = next(seed for seed in range(30) if exit_taken(seed) == 3)
    with runtime.load(bundle, library=library, threads=1) as loaded:
        with pytest.raises(EngineError, match="segment-2-3 failed"):
            loaded(skips.frame(seed))
        broken.clear()
        check(loaded(skips.frame(seed)), seed, 3)
