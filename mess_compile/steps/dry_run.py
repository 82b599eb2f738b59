"""Plans evaluations and benches for `--dry-run`: what they would do, what they write and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mess_compile.latency.table import LatencyTable, mean_ms_of, read_latency_table
from mess_compile.network import BASELINE_ALONE, GraphSet, head_graph_name, segment_name
from mess_compile.planned_step import PlannedStep
from mess_compile.runtime.base.errors import InputError

_UNSCORED = "without reading and scoring images"


def of_evaluation(
    graph_set: GraphSet, images: int, writes: Sequence[Path], table: Path, place: str, notes: tuple[str, ...] = ()
) -> PlannedStep:
    """Evaluate `images`; statistics go to the first of `writes`, `table` is the file of the device's latencies."""
    folder = writes[0]
    if any(folder.parent.glob(f".{folder.name}.parts-*")):
        notes += ("continues an interrupted evaluation, if images and graphs are the same",)
    each_ms, basis = recording_ms(graph_set, table)
    what = f"record {len(graph_set.candidate.heads)} heads on {images} images, by {graph_set.recipe} at {place}"
    least_s = None if each_ms is None else images * each_ms / 1e3
    return PlannedStep("evaluate", what, tuple(map(str, writes)), least_s, basis, notes)


def of_bench(
    graph_set: GraphSet, table: LatencyTable, plan_ms: float, images: int, passes: int, bundle: Path, result: Path
) -> PlannedStep:
    """Run a plan, which takes `plan_ms`, and the baseline `passes` times on `images`, and all heads once.

    The result goes to `result`.
    """
    entries = [entry for (name, _), entry in table.entries.items() if name in graph_set.baselines]
    each_ms = plan_ms + min((entry.mean_ms for entry in entries), default=0.0)
    replay_ms = mean_ms_of(table, graph_set, _recorded(graph_set)) or 0.0
    what = f"run {bundle} and the baseline {passes} times on {images} images, and every head once"
    basis = f"{table.source} latencies of {table.device}, {_UNSCORED}"
    return PlannedStep("bench", what, (str(result),), images * (passes * each_ms + replay_ms) / 1e3, basis)


def of_deadline(images: int, passes: int, bundle: Path, deadline_ms: float, path_ms: float) -> PlannedStep:
    """Refine `images` `passes` times until a deadline; the last exit takes `path_ms`."""
    what = f"refine {images} images {passes} times by {bundle}, {deadline_ms:g} ms each at most; writes no file"
    least_s = images * passes * min(deadline_ms, path_ms) / 1e3
    return PlannedStep("bench", what, (), least_s, f"latencies in the bundle, {_UNSCORED}")


def recording_ms(graph_set: GraphSet, path: Path) -> tuple[float | None, str]:
    """Time of all heads on one image, and where it is from."""
    with suppress(InputError):
        table = read_latency_table(path)
        cost_ms = mean_ms_of(table, graph_set, _recorded(graph_set))
        if cost_ms is not None:
            return cost_ms, f"{table.source} latencies of {table.device}, {_UNSCORED}"
    return None, f"{path} has no latencies of these graphs"


def _recorded(graph_set: GraphSet) -> list[str]:
    """The graphs that an evaluation runs on an image, each as often as it runs."""
    candidate = graph_set.candidate
    names = [segment_name(number, number + 1) for number in range(len(candidate.exit_points))]
    for head in candidate.heads:
        names += [head_graph_name(head.name), candidate.output_of(head)]
    return names + ([BASELINE_ALONE] if graph_set.baseline_alone else [])
