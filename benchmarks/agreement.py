"""How often the gate at feature resolution and the paper's Eq. 1-3 at full resolution decide alike.

    python benchmarks/agreement.py examples/camvid --data DIR --split val

For every head named (default: those of the plan's early exits, then one per early exit point) and some threshold rows,
the cut is the one of the plan, or lies midway between the observed counts: the hardest place to agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from mess_compile.candidates import head_graph_name, read_graph_set, segment_name
from mess_compile.dataset import open_dataset, samples
from mess_compile.runtime import frames
from mess_compile.runtime.engine import open_library
from mess_compile.search.plan import read_result
from mess_compile.statistics import threshold_table
from mess_compile.workspace import Workspace
from tests.paper_gate import agreement

ROWS = (0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    options = parser.parse_args()
    workspace = Workspace(options.workspace)
    graph_set = read_graph_set(workspace.graphs)
    candidate, gate = graph_set.candidate, graph_set.gate
    library = open_library("onnxruntime")
    thresholds = library.upload(threshold_table(gate, len(candidate.classes)))
    images = [frames.resize(s.frame, candidate.input_hw) for s in samples(open_dataset(options.data, options.split))]
    cases = [(stage.head, stage.row, stage.cut) for stage in read_result(workspace.plan("host")).plan.stages[:-1]]
    for number in range(1, len(candidate.exit_points)):
        head = max(candidate.heads_at(number), key=lambda head: head.macs).name
        cases += [(head, min(range(12), key=lambda row: abs(gate.thresholds[row] - wanted)), None) for wanted in ROWS]
    shares = []
    for head, row, cut in cases:
        point = candidate.head(head).exit_point
        segment = library.load(graph_set.path(segment_name(0, point)))
        engine = library.load(graph_set.path(head_graph_name(head)))
        logits, counts = [], []
        for image in images:
            maps = segment.run({"image": library.upload(image[None])})[f"exit{point}"]
            found = engine.run({f"exit{point}": maps, "thresholds": thresholds})
            logits.append(np.array(library.download(found["logits"])[0]))
            counts.append(int(library.download(found["counts"])[row]))
        kind = "median" if cut is None else "plan's"
        cut = int(np.ceil(np.median(counts))) if cut is None else cut
        result = agreement(logits, counts, cut, gate.thresholds[row], candidate.input_hw, gate.confidence)
        shares.append((kind, result.share))
        print(f"{head}, pixels at {gate.thresholds[row]:.2f}, {kind} cut {cut}: {result.share:.1%} of {result.images}")
    for kind in dict.fromkeys(kind for kind, _ in shares):
        print(f"{kind} cuts: {np.mean([share for k, share in shares if k == kind]):.1%} of the decisions alike")


if __name__ == "__main__":
    main()
