"""The search on statistics made up by CamVid's figures: how long it takes to prove the optimum, or the gap left.

    python benchmarks/search.py                        # the whole space: three seeds, and one with independent exits
    python benchmarks/search.py --growth               # over images, heads and exit points
    python benchmarks/search.py --enumeration          # against an enumeration of all plans
    python benchmarks/search.py --camvid WORKSPACE     # a first search, and one after a change of requirement

--fit first prints how the made-up statistics compare with those of the CamVid example. Compilation is timed separately,
before everything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from made_up import Fit, Size, fit, made_up

from mess_compile.evaluate.statistics import read_statistics
from mess_compile.latency.table import read_latency_table
from mess_compile.network import read_graph_set
from mess_compile.search.bnb.driver import Proof, branch_and_bound
from mess_compile.search.bnb.incumbent import BestPlan
from mess_compile.search.context import SearchContext, SearchProgress
from mess_compile.search.deadline import Clock
from mess_compile.search.exhaustive.plan_table import enumerate_plans, plans_in_space
from mess_compile.search.metrics import Evidence, baseline_figures
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.search.solver import search

CAMVID = Path(__file__).parents[1] / "examples/02-camvid/statistics/val_0-50"
GROWTH = {"images": (250, 1000, 4000, 16000), "heads": (8, 14, 28, 56), "points": (3, 4, 5)}
ENUMERATED_HEADS, ENUMERATION_S = (2, 3, 4, 6, 8, 12, 16), 60.0


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compile_kernels() -> None:
    start = time.perf_counter()
    for objective in ("latency", "accuracy"):
        searched(made_up(Size(20, 3, 2, 3, 2)), Requirement(objective=objective), None)
    print(f"compiled in {time.perf_counter() - start:.0f} s (less where an earlier run has left it)\n")


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of branch and bound; `best` is None where the time was too short for any plan."""

    seconds: float
    best: BestPlan | None
    proof: Proof
    images: int

    @property
    def latency_ms(self) -> float:
        return self.best.goal / self.images / 1e6 if self.best else float("inf")

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.seconds:6.1f} s  nothing found"
        gap = self.proof.gap
        left = f"gap {gap:.3g} ms of {self.latency_ms:.4g} ms ({gap / self.latency_ms:.1%})" if gap else "gap 0"
        return f"{self.seconds:6.1f} s  {left}"


def searched(evidence: Evidence, requirement: Requirement, limit_s: float | None) -> Found:
    start = time.perf_counter()
    clock = None if limit_s is None else Clock(limit_s)
    best, proof = branch_and_bound(evidence, SearchContext(requirement, clock=clock))
    return Found(time.perf_counter() - start, best, proof, evidence.statistics.images)


def whole_space(size: Size, cases: Iterable[tuple[int, bool]], requirement: Requirement, limit_s: float | None) -> None:
    for seed, independent in cases:
        evidence = made_up(size, seed, independent)
        found = searched(evidence, requirement, limit_s)
        space = plans_in_space(evidence, requirement.early_exits)
        print(f"seed {seed}{', independent exits' if independent else ''}: {space:.3g} plans")
        proof, groups = found.proof, found.proof.expanded + found.proof.pruned
        print(f"{found}; at most {peak_mib():,.0f} MiB so far")
        print(f"    {proof.expanded:,} of {groups:,} chains of heads expanded, {proof.evaluated:,} plans evaluated")
        if found.best is not None:
            baseline = baseline_figures(evidence)
            print(f"    {' -> '.join(found.best.heads)}: {found.latency_ms:.3f} ms, {found.best.miou:.2f} % mIoU")
            print(f"    the baseline: {baseline.latency_ms:.3f} ms, {baseline.miou:.2f} % mIoU", flush=True)
        del evidence
        gc.collect()


def growth(size: Size, requirement: Requirement, limit_s: float | None) -> None:
    """One of images, heads and exit points at a time, from the size given."""
    for name, values in GROWTH.items():
        for value in values:
            grown = dataclasses.replace(size, **{name: value})
            evidence = made_up(grown)
            space = plans_in_space(evidence, requirement.early_exits)
            print(f"{value:6} {name:7} {space:9.3g} plans {searched(evidence, requirement, limit_s)}", flush=True)
            del evidence
            gc.collect()
        print()
    print(f"at most {peak_mib():,.0f} MiB")


class TooLong(Exception):
    pass


def enumeration(size: Size, requirement: Requirement) -> None:
    """More and more heads, until an enumeration of all plans takes more than a minute."""
    print("heads     plans  enumeration  branch and bound  ratio")
    for heads in ENUMERATED_HEADS:
        evidence = made_up(dataclasses.replace(size, heads=heads))
        found = searched(evidence, requirement, None)
        start = time.perf_counter()

        def until_too_long(done: int, total: int, start: float = start) -> None:
            if time.perf_counter() - start > ENUMERATION_S:
                raise TooLong(f"{done} of {total} chains of heads")

        space = plans_in_space(evidence, requirement.early_exits)
        try:
            least_ms = enumerated(evidence, requirement, until_too_long)
        except TooLong as error:
            print(f"{heads:5} {space:9.3g}  > {ENUMERATION_S:.0f} s ({error}) {found.seconds:8.1f} s")
            return
        seconds = time.perf_counter() - start
        agreed = found.latency_ms == least_ms
        print(
            f"{heads:5} {space:9.3g} {seconds:10.1f} s {found.seconds:15.1f} s {seconds / found.seconds:6.1f}"
            f"  {'the same latency' if agreed else 'DIFFERENT LATENCIES'}"
        )


def enumerated(evidence: Evidence, requirement: Requirement, progress: SearchProgress) -> float:
    """The least mean latency in ms of the plans within --max-err, by enumeration."""
    plans = enumerate_plans(evidence, SearchContext(requirement, progress=progress)).plans
    floor = baseline_figures(evidence).miou - (requirement.max_err_pp or 0.0)
    return float(plans["cost_ns"][plans["miou"] >= floor].min() / evidence.statistics.images / 1e6)


def camvid(folder: Path) -> None:
    """The network of examples/02-camvid, exported and profiled in the workspace `folder`."""
    evidence = Evidence(
        read_graph_set(folder / "graphs"),
        read_latency_table(folder / "latency" / "host.json"),
        read_statistics(folder / "statistics" / CAMVID.name),
    )
    requirements = {
        "first, --max-err 1%": Requirement(max_err_pp=1.0),
        "then --max-err 2%": Requirement(max_err_pp=2.0),
        "then --optimise accuracy --max-latency 0.5x": Requirement(
            objective="accuracy", max_latency=Limit(0.5, relative=True)
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, requirement in requirements.items():
            start = time.perf_counter()
            proof = search(evidence, requirement, cache_folder=Path(folder)).certificate
            seconds = time.perf_counter() - start
            print(f"{name:45} {seconds:6.2f} s  {proof.space:,} plans, gap {proof.gap:g}")


def print_fit(size: Size) -> None:
    there, here = fit(read_statistics(CAMVID)), fit(made_up(size).statistics)
    print(f"{'':20} CamVid example | made up, seed 0, {size.images:,} images")
    for field in dataclasses.fields(Fit):
        print(f"{field.name:20} {' | '.join(formatted(getattr(each, field.name)) for each in (there, here))}")
    print()


def formatted(values: object) -> str:
    return " ".join(f"{value:.3g}" for value in np.atleast_1d(np.asarray(values, np.float64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--max-err", type=float, default=1.0, help="percentage points of mIoU (default 1)")
    parser.add_argument("--max-exits", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds per search; 0: none (default 60)")
    parser.add_argument("--fit", action="store_true", help="compare the made-up statistics with CamVid's")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--growth", action="store_true")
    modes.add_argument("--enumeration", action="store_true")
    modes.add_argument("--camvid", type=Path, metavar="WORKSPACE")
    given = parser.parse_args()
    size = Size(*(getattr(given, field.name) for field in dataclasses.fields(Size)))
    requirement = Requirement(max_err_pp=given.max_err, max_exits=given.max_exits)
    limit_s = given.time_limit or None
    if given.camvid:
        camvid(given.camvid)
        return
    if given.fit:
        print_fit(size)
    compile_kernels()
    print(f"{size}, m <= {given.max_exits}, --max-err {given.max_err:g}%")
    if given.growth:
        growth(size, requirement, limit_s)
    elif given.enumeration:
        enumeration(size, requirement)
    else:
        cases = [(seed, False) for seed in given.seeds]
        whole_space(size, [*cases, (given.seeds[0], True)] if given.seeds else [], requirement, limit_s)


if __name__ == "__main__":
    main()
