"""A profile runs each graph after what produces its inputs, also where these come from several graphs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mess_compile.engines.files import EngineFiles, plain_files
from mess_compile.engines.jobs import profiling_jobs, reference_of, with_feeders
from mess_compile.network import GraphSet, threshold_table
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.measure.job_pool import PSEUDO_GRAPHS, Opened
from mess_compile.runtime.measure.measure import Effort, MeasureTask, measure
from tests import skips


@pytest.fixture(scope="module")
def graph_set(tmp_path_factory: pytest.TempPathFactory) -> GraphSet:
    return skips.imported(tmp_path_factory.mktemp("skips"))


def runnable(graph_set: GraphSet, names: list[str]) -> bool:
    """Whether some order of the graphs feeds every one of them, from the image on."""
    made, left = {"image", "thresholds"}, {name for name in names if name not in PSEUDO_GRAPHS}
    while ready := {name for name in left if {t.name for t in graph_set.spec(name).inputs} <= made}:
        made |= {tensor.name for name in ready for tensor in graph_set.spec(name).outputs}
        left -= ready
    return not left


@pytest.mark.parametrize("lost", [(), ("segment-1-2",), ("segment-0-1", "head-exit1.small"), ("segment-2-3",)])
def test_the_feeders_of_any_graphs_give_every_tensor_that_they_read(graph_set: GraphSet, lost: tuple[str, ...]) -> None:
    whole = plain_files(graph_set)
    engines = EngineFiles(graph_set, {name: path for name, path in whole.paths.items() if name not in lost})
    jobs = profiling_jobs([engines])
    names = [job.name for job in jobs]
    for chosen in itertools.chain(itertools.combinations(names, 1), itertools.combinations(names, 2)):
        fed = [name.removesuffix("@fp32") for name in with_feeders(jobs, chosen)]
        assert runnable(graph_set, fed), (chosen, fed)


@pytest.mark.parametrize("graph", ["segment-2-3", "head-exit3.own", "output-own"])
def test_a_graph_with_several_inputs_is_measured_on_what_the_graphs_before_it_give(
    graph_set: GraphSet, graph: str
) -> None:
    jobs = profiling_jobs([plain_files(graph_set)])
    names = with_feeders(jobs, [f"{graph}@fp32", reference_of(jobs)])
    task = MeasureTask(
        jobs=[job for job in jobs if job.name in names],
        frame=skips.frame(0),
        thresholds=threshold_table(graph_set.gate, skips.CLASSES).astype(np.float32),
        reference=reference_of(jobs),
        measured=[f"{graph}@fp32"],
    )
    library = open_library("onnxruntime", threads=1)
    found = list(measure(library, task, Effort(0.005, 2, 1, 1.0, 0.05, 0.0)))
    windows = [event for event in found if not isinstance(event, Opened)]
    assert {window.job for window in windows} == {f"{graph}@fp32"}
