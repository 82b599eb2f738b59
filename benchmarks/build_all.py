"""Whether every graph of both backbones parses and builds, without a GPU.

All segments, every head of the space at every exit point with its gate, outputs and baseline; for Turing and Ampere, in
fp32 and fp16, weights at random.

    python benchmarks/build_all.py [--backbone mobilenetv2 resnet50] [--input 512 512] [--heads grid,sep-crm1-b0,...]

One kind of head at a time is exported and built, so that memory stays bounded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mess_compile.engines.build import EngineSet, build_engines
from mess_compile.graph.cut import cut_network
from mess_compile.graph.precision import is_fp16, to_fp16
from mess_compile.graph.store import read_whole_model, write_graph
from mess_compile.nets.export import export_network
from mess_compile.nets.network import (
    Architecture,
    OverprovisionedNetwork,
    block_workloads,
    place_exits,
    with_final_head,
)
from mess_compile.network import Gate, GraphSet, HeadConfig, head_config_from_name, head_grid, write_graph_set
from mess_compile.targets import find_target

CAPABILITIES = ((7, 5), (8, 6))
OURS = ("dlb64-crm1-b0", "sep-crm1-b0", "sep128-crm1-b0", "lra-crm1-b0")
MOST = 2.0
"""How much larger an engine for Turing may be than its twin for Ampere."""


@dataclass(frozen=True)
class Row:
    """One engine that was built, or failed."""

    backbone: str
    graph: str
    precision: str
    capability: tuple[int, int]
    bytes: int
    seconds: float
    error: str | None


def exported(backbone: str, hw: tuple[int, int], exits: int, head: HeadConfig, folder: Path) -> GraphSet:
    """The graphs of an untrained network with `head` at every early exit."""
    folder.mkdir()
    torch.manual_seed(0)
    blocks = place_exits(block_workloads(backbone, hw), exits)
    heads = with_final_head([(number, head) for number in range(1, exits)], exits)
    classes = tuple(f"class {index}" for index in range(21))
    colours = tuple((index, index, index) for index in range(21))
    network = OverprovisionedNetwork(Architecture(backbone, classes, colours, hw, blocks, heads)).eval()
    root = export_network(network, folder).parent
    graph_set = cut_network(root, Gate(), lambda *told: None)
    write_graph_set(graph_set)
    return graph_set


def in_fp16(graph_set: GraphSet, folder: Path) -> GraphSet:
    """Every graph as `to_fp16` leaves it, one at a time."""
    folder.mkdir()
    specs = {}
    for name, spec in graph_set.graphs.items():
        model = to_fp16(read_whole_model(graph_set.path(name)))
        precision = "fp16" if is_fp16(model) else "fp32"
        specs[name] = replace(write_graph(model, folder, name, spec.macs), precision=precision, wanted="fp16")
    return replace(graph_set, root=folder, graphs=specs, recipe="fp16")


def built(graph_set: GraphSet, capability: tuple[int, int], folder: Path) -> EngineSet:
    target = replace(find_target("rtx-4090", Path()), name="any", compute_capability=capability)
    return build_engines(graph_set, target, folder, 1, lambda *told: None)


def rows(backbone: str, hw: tuple[int, int], exits: int, heads: Sequence[HeadConfig]) -> Iterator[Row]:
    """Heads of every kind; what does not depend on the heads is built with the first."""
    for index, head in enumerate(heads):
        with tempfile.TemporaryDirectory() as place:
            graphs = exported(backbone, hw, exits, head, Path(place) / "fp32")
            final = graphs.candidate.heads[-1].name
            if index:
                kept = {n: s for n, s in graphs.graphs.items() if n.startswith("head-") and not n.endswith(final)}
                graphs = replace(graphs, graphs=kept)
            halved = in_fp16(graphs, Path(place) / "fp16")
            for found in (graphs, halved):
                for capability in CAPABILITIES:
                    engines = built(found, capability, Path(place) / f"{found.root.name}-{capability}")
                    for entry in engines.entries:
                        yield Row(
                            backbone, entry.graph, found.root.name, capability, entry.bytes, entry.seconds, entry.error
                        )


def report(found: Sequence[Row]) -> bool:
    """Prints a table; whether all was built."""
    print(f"{'backbone':12} {'precision':9} {'for':5} {'engines':>7} {'failed':>6} {'seconds':>8} {'MiB':>8}")
    for key in dict.fromkeys((row.backbone, row.precision, row.capability) for row in found):
        part = [row for row in found if (row.backbone, row.precision, row.capability) == key]
        seconds, size = sum(row.seconds for row in part), sum(row.bytes for row in part) / 2**20
        failed = sum(row.error is not None for row in part)
        print(f"{key[0]:12} {key[1]:9} SM{key[2][0]}{key[2][1]}  {len(part):7} {failed:6} {seconds:8.1f} {size:8.1f}")
    for row in found:
        if row.error is not None:
            print(f"FAILED  {row.backbone} {row.graph} {row.precision} {row.capability}: {row.error}")
    sizes = {(row.backbone, row.graph, row.precision, row.capability): row.bytes for row in found}
    ratios = {key[:3]: size / max(1, sizes[(*key[:3], (8, 6))]) for key, size in sizes.items() if key[3] == (7, 5)}
    large = sorted((ratio, key) for key, ratio in ratios.items() if ratio > MOST)
    print(f"SM75 engines larger than {MOST:g} x their SM86 twins: {len(large)} of {len(ratios)}")
    for ratio, key in large:
        pair = [sizes[(*key, capability)] / 2**20 for capability in CAPABILITIES]
        print(f"LARGE  {' '.join(key)}: {pair[0]:.2f} MiB, {ratio:.2f} x {pair[1]:.2f}")
    return all(row.error is None for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["mobilenetv2", "resnet50"])
    parser.add_argument("--input", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--exits", type=int, default=6)
    parser.add_argument("--heads", default=",".join(["grid", *OURS]), help="configurations; grid is the paper's 56")
    given = parser.parse_args()
    heads: list[HeadConfig] = []
    for name in given.heads.split(","):
        heads += head_grid() if name == "grid" else [head_config_from_name(name)]
    found: list[Row] = []
    start = time.monotonic()
    for backbone in given.backbone:
        found += rows(backbone, tuple(given.input), given.exits, heads)
    good = report(found)
    print(f"{len(found)} engines in {time.monotonic() - start:.0f} s")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
