"""How often the gate at feature resolution and the paper's Eq. 1-3 at full resolution decide alike.

    python benchmarks/agreement.py examples/02-camvid --data DIR --split val

The early exits of the workspace's plan with its own cuts, then the heaviest head of each early exit point with the cut
at the median of the counts: the hardest place to agree. "Same threshold" asks both for the same confident share of the
image; "matched" lets the paper's policy exit as many images as the gate does, its surest ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from mess_compile.data.dataset import open_dataset, samples
from mess_compile.network import head_graph_name, read_graph_set, segment_name, threshold_table
from mess_compile.runtime.engines.engine import open_library
from mess_compile.runtime.images import frames
from mess_compile.search.plan import read_result
from mess_compile.workspace import Workspace
from tests.paper_gate import image_confidence

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
            uploaded = {"image": library.upload(image[None]), "thresholds": thresholds}
            live = {**uploaded, **segment.run({"image": uploaded["image"]})}
            found = engine.run({name: live[name] for name in engine.inputs})
            logits.append(np.array(library.download(found["logits"])[0]))
            counts.append(int(library.download(found["counts"])[row].sum()))
        kind = "median" if cut is None else "plan's"
        cut = int(np.ceil(np.median(counts))) if cut is None else cut
        limit = gate.thresholds[row]
        paper = np.array([image_confidence(x, limit, candidate.input_hw, gate.confidence) for x in logits])
        ours = np.array(counts) >= cut
        cells = logits[0].shape[1] * logits[0].shape[2]
        same = float((ours == (paper >= cut / cells)).mean())
        surest = np.argsort(np.argsort(-paper, kind="stable"), kind="stable") < ours.sum()
        matched = float((ours == surest).mean())
        correlation = float(np.corrcoef(paper, counts)[0, 1])
        shares.append((kind, same, matched))
        print(
            f"{head}, pixels at {limit:.2f}, {kind} cut {cut}, {len(images)} images: same threshold "
            f"{same:.1%}, matched {matched:.1%}; correlation of the shares {correlation:.3f}"
        )
    for kind in dict.fromkeys(kind for kind, *_ in shares):
        same, matched = np.mean([values for k, *values in shares if k == kind], axis=0)
        print(f"{kind} cuts: {same:.1%} of the decisions alike at the same threshold, {matched:.1%} matched")


if __name__ == "__main__":
    main()
