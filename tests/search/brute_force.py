"""The search of issue 5 written plainly, image by image and plan by plan, apart from the code under test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

from mess_compile.network import Head
from mess_compile.search.metrics import Evidence


@dataclass(frozen=True)
class BrutePlan:
    """A plan and its figures: sums over images but for `p95_ns` and `worst_ns`, which are of one; mIoU in percent,
    `changed` in billionths of an image."""

    points: tuple[int, ...]
    heads: tuple[str, ...]
    rows: tuple[int, ...]
    cuts: tuple[int, ...]
    cost_ns: int
    macs: int
    memory: int
    graphs: int
    miou: float
    p95_ns: int
    worst_ns: int
    energy_nj: int
    score: float = 0.0
    changed: int = 0
    class_ious: dict[str, float] = field(default_factory=dict)
    thresholds: int = 0
    """The number of the gate's thresholds; rows from there on are of other policies, and come after them."""

    @property
    def text(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(str, self.points)), self.heads, self.row_texts, tuple(map(str, self.cuts))

    @property
    def row_texts(self) -> tuple[str, ...]:
        return tuple(str(row) if row < self.thresholds else f"policy {row:02d}" for row in self.rows)


def all_plans(evidence: Evidence, setting: str, max_exits: int, deadline_ns: int | None = None) -> Iterator[BrutePlan]:
    candidate = evidence.graph_set.candidate
    for name in whole_networks(evidence):
        yield whole_plan(evidence, name, None if setting != "anytime" else (deadline_ns,))
    for size in range((0 if setting == "budgeted" else max_exits) + 1):
        for heads in itertools.product(candidate.heads, repeat=size + 1):
            points = [head.exit_point for head in heads]
            if any(b <= a for a, b in itertools.pairwise(points)):
                continue
            if setting == "anytime":
                yield anytime_plan(evidence, heads, deadline_ns)
                continue
            decisions = [list(decisions_of(evidence, head.name)) for head in heads[:-1]]
            for chosen in itertools.product(*decisions):
                yield mixture_plan(evidence, heads, chosen)


def whole_networks(evidence: Evidence) -> list[str]:
    return ["baseline"] + ["baseline-alone"] * (evidence.graph_set.baseline_alone is not None)


def whole_plan(evidence: Evidence, name: str, anytime: tuple[int | None] | None) -> BrutePlan:
    """One graph from image to labels, for every image."""
    candidate, images = evidence.graph_set.candidate, evidence.statistics.images
    spec = evidence.graph_set.graphs[name]
    pixels = 1
    for side in candidate.input_hw:
        pixels *= side
    scored = candidate.baseline if name == "baseline" else name
    miou = miou_of(evidence, [scored] * images)
    path = ["upload", name, "download"]
    time, score = sum(ns(evidence, graph) for graph in path), 0.0
    if anytime is not None:
        (deadline,) = anytime
        horizon = sum(ns(evidence, graph) for graph in ("upload", baseline_of(evidence)[0], "download"))
        score = miou * max(0, horizon - time) / horizon if deadline is None else miou * (time <= deadline)
    return BrutePlan(
        points=(len(candidate.exit_points),),
        heads=(name,),
        rows=(),
        cuts=(),
        cost_ns=time * images,
        macs=(candidate.exit_points[-1].macs + candidate.heads[-1].macs) * images,
        memory=spec.bytes + spec.workspace_bytes + 3 * pixels + pixels,  # an RGB frame in, a label a pixel out
        graphs=1,
        miou=miou,
        class_ious=class_ious_of(evidence, [scored] * images),
        p95_ns=time,
        worst_ns=slowest(evidence, path),
        energy_nj=sum(ns(evidence, graph, "energy_mj") for graph in path) * images,
        score=score,
        changed=changed_by(evidence, [scored] * images),
    )


def graphs_of_plan(evidence: Evidence, plan: BrutePlan) -> set[str]:
    if plan.heads[0] in whole_networks(evidence):
        return {plan.heads[0]}
    return graphs_of(evidence, tuple(map(evidence.candidate.head, plan.heads)))


def cost_of_exit(evidence: Evidence, plan: BrutePlan, taken: int) -> int:
    """What an image costs that leaves at the exit of this index."""
    if plan.heads[0] in whole_networks(evidence):
        return sum(ns(evidence, graph) for graph in ("upload", plan.heads[0], "download"))
    return path_cost(evidence, tuple(map(evidence.candidate.head, plan.heads)), taken)


def slowest(evidence: Evidence, path: list[str]) -> int:
    """The p99 of graphs one after the other: their means, and the root of the sum of their squared excesses."""
    excesses = [max(0, ns(evidence, graph, "p99_ms") - ns(evidence, graph)) for graph in path]
    return sum(ns(evidence, graph) for graph in path) + round(math.sqrt(sum(each**2 for each in excesses)))


def deepest_path(evidence: Evidence, heads: tuple[Head, ...], every_report: bool) -> list[str]:
    path, previous = ["upload"], 0
    for head in heads:
        last = head is heads[-1]
        graphs = graphs_of_stage(evidence, previous, head)
        path += graphs if last or every_report else graphs[:2]
        path.append("download" if last or every_report else "null")
        previous = head.exit_point
    return path


def decisions_of(evidence: Evidence, head: str) -> Iterator[tuple[int, int]]:
    statistics = evidence.statistics
    index = statistics.heads.index(head)
    for row in range(statistics.counts.shape[2]):
        observed = sorted({int(count) for count in statistics.counts[:, index, row]})
        cuts = [math.ceil((a + b) / 2) for a, b in itertools.pairwise(observed)]
        if len(cuts) > 32:
            cuts = [cuts[math.ceil(j * len(cuts) / 33) - 1] for j in range(1, 33)]
        for cut in cuts:
            yield row, cut


def mixture_plan(evidence: Evidence, heads: tuple[Head, ...], chosen: tuple[tuple[int, int], ...]) -> BrutePlan:
    statistics = evidence.statistics
    exits = []
    for image in range(statistics.images):
        taken = len(heads) - 1
        for stage, (row, cut) in reversed(list(enumerate(chosen))):
            if statistics.counts[image, statistics.heads.index(heads[stage].name), row] >= cut:
                taken = stage
        exits.append(taken)
    return BrutePlan(
        points=tuple(head.exit_point for head in heads),
        heads=tuple(head.name for head in heads),
        rows=tuple(row for row, _ in chosen),
        cuts=tuple(cut for _, cut in chosen),
        cost_ns=sum(path_cost(evidence, heads, taken) for taken in exits),
        macs=sum(path_macs(evidence, heads, taken) for taken in exits),
        memory=memory(evidence, heads),
        graphs=len(graphs_of(evidence, heads)),
        miou=miou_of(evidence, [heads[taken].name for taken in exits]),
        class_ious=class_ious_of(evidence, [heads[taken].name for taken in exits]),
        p95_ns=p95([path_cost(evidence, heads, taken) for taken in exits]),
        worst_ns=slowest(evidence, deepest_path(evidence, heads, every_report=False)),
        energy_nj=sum(path_cost(evidence, heads, taken, "energy_mj") for taken in exits),
        changed=changed_by(evidence, [heads[taken].name for taken in exits]),
        thresholds=len(evidence.graph_set.gate.thresholds),
    )


def p95(costs: list[int]) -> int:
    return next(c for c in sorted(costs) if 100 * sum(other <= c for other in costs) >= 95 * len(costs))


def anytime_plan(evidence: Evidence, heads: tuple[Head, ...], deadline_ns: int | None) -> BrutePlan:
    best, score, times, bests = 0.0, 0.0, [], []
    horizon = ns(evidence, "upload") + ns(evidence, baseline_of(evidence)[0]) + ns(evidence, "download")
    for stages, head in enumerate(heads, start=1):
        best = max(best, miou_of(evidence, [head.name] * evidence.statistics.images))
        times.append(reported(evidence, heads[:stages]))
        bests.append(best)
    if deadline_ns is None:
        for i, time in enumerate(times):
            until = times[i + 1] if i + 1 < len(times) else horizon
            if min(until, horizon) > time:
                score += bests[i] * (min(until, horizon) - time)
        score /= horizon
    else:
        for time, value in zip(times, bests, strict=True):
            score = value if time <= deadline_ns else score
    return BrutePlan(
        points=tuple(head.exit_point for head in heads),
        heads=tuple(head.name for head in heads),
        rows=(),
        cuts=(),
        cost_ns=times[-1] * evidence.statistics.images,
        macs=path_macs(evidence, heads, len(heads) - 1) * evidence.statistics.images,
        memory=memory(evidence, heads),
        graphs=len(graphs_of(evidence, heads)),
        miou=best,
        p95_ns=times[-1],
        worst_ns=slowest(evidence, deepest_path(evidence, heads, every_report=True)),
        energy_nj=reported(evidence, heads, "energy_mj") * evidence.statistics.images,
        score=score,
    )


def reported(evidence: Evidence, heads: tuple[Head, ...], quantity: str = "mean_ms") -> int:
    """What it takes until the last of `heads` has reported, as every one before it did."""
    now, previous = ns(evidence, "upload", quantity), 0
    for head in heads:
        for graph in graphs_of_stage(evidence, previous, head):
            now += ns(evidence, graph, quantity)
        now += ns(evidence, "download", quantity)
        previous = head.exit_point
    return now


def baseline_of(evidence: Evidence) -> tuple[str, float]:
    """The single-exit graph of the highest mIoU on the images, and that mIoU; of equals the candidate network's own."""
    images = evidence.statistics.images
    name, miou = "baseline", miou_of(evidence, [evidence.candidate.baseline] * images)
    if evidence.graph_set.baseline_alone is not None:
        alone = miou_of(evidence, ["baseline-alone"] * images)
        if alone > miou:
            name, miou = "baseline-alone", alone
    return name, miou


def ns(evidence: Evidence, graph: str, quantity: str = "mean_ms") -> int:
    return round(getattr(evidence.table.entries[graph, "fp32"], quantity) * 1e6)


def graphs_of_stage(evidence: Evidence, previous: int, head: Head) -> list[str]:
    height, width = head.hw or evidence.graph_set.candidate.exit_points[head.exit_point - 1].hw
    return [f"segment-{previous}-{head.exit_point}", f"head-{head.name}", f"output-{height}x{width}"]


def graphs_of(evidence: Evidence, heads: tuple[Head, ...]) -> set[str]:
    names: set[str] = set()
    previous = 0
    for head in heads:
        names |= set(graphs_of_stage(evidence, previous, head))
        previous = head.exit_point
    return names


def path_cost(evidence: Evidence, heads: tuple[Head, ...], taken: int, quantity: str = "mean_ms") -> int:
    cost, previous = ns(evidence, "upload", quantity) + ns(evidence, "download", quantity), 0
    for stage in range(taken + 1):
        segment, head, output = graphs_of_stage(evidence, previous, heads[stage])
        cost += ns(evidence, segment, quantity) + ns(evidence, head, quantity)
        if stage < len(heads) - 1:
            cost += ns(evidence, "null", quantity)
        if stage == taken:
            cost += ns(evidence, output, quantity)
        previous = heads[stage].exit_point
    return cost


def path_macs(evidence: Evidence, heads: tuple[Head, ...], taken: int) -> int:
    backbone = evidence.graph_set.candidate.exit_points[heads[taken].exit_point - 1].macs
    return backbone + sum(head.macs for head in heads[: taken + 1])


def memory(evidence: Evidence, heads: tuple[Head, ...]) -> int:
    specs = [evidence.graph_set.graphs[name] for name in graphs_of(evidence, heads)]
    widths = {"uint8": 1, "int32": 4, "float32": 4}
    buffers = {}
    for spec in specs:
        for tensor in spec.inputs + spec.outputs:
            buffers[tensor.name, tensor.shape] = math.prod(tensor.shape) * widths[tensor.dtype]
    return sum(spec.bytes for spec in specs) + max(spec.workspace_bytes for spec in specs) + sum(buffers.values())


def changed_by(evidence: Evidence, head_of_image: list[str]) -> int:
    """Of each image the share of labelled pixels that its head gets wrong, in billionths rounded half up; their sum."""
    statistics, total = evidence.statistics, 0
    scored = [*statistics.heads, "baseline-alone"]
    for image, name in enumerate(head_of_image):
        labelled = sum(int(pixels) for pixels in statistics.labelled[image])
        right = sum(int(pixels) for pixels in statistics.intersection[image, scored.index(name)])
        if labelled:
            total += math.floor(Fraction((labelled - right) * 10**9, labelled) + Fraction(1, 2))
    return total


def miou_of(evidence: Evidence, head_of_image: list[str]) -> float:
    ious = list(class_ious_of(evidence, head_of_image).values())
    return 100.0 * (sum(ious) / len(ious))


def class_ious_of(evidence: Evidence, head_of_image: list[str]) -> dict[str, float]:
    """IoU, from 0 to 1, of each class that has labelled pixels."""
    statistics = evidence.statistics
    scored = [*statistics.heads, "baseline-alone"]
    head_of_image = [evidence.candidate.baseline if name == "baseline" else name for name in head_of_image]
    ious = {}
    for k in range(len(statistics.classes)):
        labelled = sum(int(pixels) for pixels in statistics.labelled[:, k])
        if labelled == 0:
            continue
        intersection = predicted = 0
        for image, name in enumerate(head_of_image):
            intersection += int(statistics.intersection[image, scored.index(name), k])
            predicted += int(statistics.predicted[image, scored.index(name), k])
        ious[statistics.classes[k]] = intersection / (predicted + labelled - intersection)
    return ious
