"""Figures made of latencies that cannot be trusted must say so, wherever they are looked at."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mess_compile.latency.checks import warnings_of
from mess_compile.latency.table import LatencyTable
from mess_compile.network import GraphSet
from mess_compile.profile import full
from mess_compile.runtime.__main__ import lines_of
from mess_compile.runtime.bundle.archive import read_manifest
from mess_compile.search.plan import read_result
from tests.commands import done, edit, printed_json, run
from tests.search import cases

PARTS = ("segment-0-1", "segment-1-2", "segment-2-3", "head-exit3.fcn-crm1-b0", "output-2x3")
"""Of 2 ms each, so that the network takes 10 ms in parts."""
TABLE = Path("latency") / "host.json"


def case(baseline_ms: float) -> tuple[LatencyTable, GraphSet]:
    found = cases.with_baseline_alone(cases.evidence((2, 1), 2, 6, seed=1), baseline_ms)
    times = {"baseline": baseline_ms, **dict.fromkeys(PARTS, 2.0)}
    entries = found.table.entries
    entries = {**entries, **{(name, "fp32"): replace(entries[name, "fp32"], mean_ms=ms) for name, ms in times.items()}}
    return replace(found.table, entries=entries), found.graph_set


@pytest.mark.parametrize(
    ("baseline_ms", "difference"), [(20.0, "50% less"), (12.0, "17% less"), (6.25, "60% more"), (1.0, "900% more")]
)
def test_a_network_that_is_not_the_sum_of_its_parts_gives_a_warning(baseline_ms: float, difference: str) -> None:
    table, graph_set = case(baseline_ms)
    whole, alone = warnings_of(table, (graph_set,))
    assert f"baseline takes {baseline_ms:.2f} ms on host, its parts in sequence 10.00 ms ({difference})" in whole
    assert f"baseline-alone takes {baseline_ms:.2f} ms on host, its parts in sequence 10.00 ms ({difference})" in alone


@pytest.mark.parametrize("baseline_ms", [11.7, 10.0, 9.0, 7.5])
def test_a_plausible_cost_of_cutting_gives_no_warning(baseline_ms: float) -> None:
    table, graph_set = case(baseline_ms)
    assert warnings_of(table, (graph_set,)) == ()


def test_what_was_not_measured_is_not_held_against_what_was() -> None:
    table, graph_set = case(20.0)
    part = "segment-1-2", "fp32"
    estimated = {**table.entries, part: replace(table.entries[part], source="estimated", error=1.5)}
    assert warnings_of(replace(table, entries=estimated), (graph_set,)) == ()
    gone = {key: entry for key, entry in table.entries.items() if key != part}
    assert warnings_of(replace(table, entries=gone), (graph_set,)) == ()


def mended(content: dict[str, Any]) -> None:
    """A steady table, in which the whole takes as long as its parts."""
    content["environment"]["verdict"] = "steady"
    times = {entry["graph"]: entry for entry in content["entries"]}
    parts = [name for name in times if name.startswith(("segment-0-1", "segment-1-2", "segment-2-3"))]
    parts += [name for name in times if name.startswith(("head-exit3.", "output-"))]
    for name in parts:
        times[name].update(mean_ms=2.0, p99_ms=2.0)
    times["baseline"].update(mean_ms=2.0 * len(parts), p99_ms=2.0 * len(parts))


def spoilt(content: dict[str, Any]) -> None:
    """A table of an unstable machine, in which the whole takes twice as long as its parts."""
    mended(content)
    content["environment"].update(verdict="unstable", likely_cause="heat (91 C)")
    (whole,) = (entry for entry in content["entries"] if entry["graph"] == "baseline")
    whole.update(mean_ms=2 * whole["mean_ms"], p99_ms=2 * whole["p99_ms"])


def told_everywhere(workspace: Path) -> dict[str, list[str]]:
    """What each command says of the latencies, as JSON."""
    bundle = workspace / "host.mess"
    search = printed_json("-C", workspace, "search", "--optimise", "accuracy")
    found = {"search": search["plan"]["doubts"], "front": search["front"][0]["doubts"]}
    found["bundle"] = printed_json("-C", workspace, "bundle")["doubts"]
    found["bench"] = printed_json("-C", workspace, "bench", bundle, "--split", "test", "--passes", "1")["doubts"]
    plan, bundled = printed_json("-C", workspace, "compare", "host", bundle)["plans"]
    found["compare"], found["compare a bundle"] = plan["doubts"], bundled["doubts"]
    found["inspect latency"] = printed_json("-C", workspace, "inspect", "latency")["doubts"]
    found["report"] = [note for note in printed_json("-C", workspace, "report")["notes"] if "final exit (" not in note]
    return found


@pytest.mark.parametrize("change", [mended, spoilt])
def test_warnings_travel_with_every_figure(workspace: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(workspace / TABLE, change)
    told = told_everywhere(workspace)
    doubts = told["search"]
    assert all(each == doubts for each in told.values()), told
    if change is mended:
        assert doubts == []
        return
    unstable, parts = doubts
    assert "latencies of host are noisy (heat (91 C)); profile again" in unstable
    assert "(50% less)" in parts
    searched = " ".join(run("-C", workspace, "search", "--optimise", "accuracy").stderr.split())
    assert f"{unstable} (1 more: `mess-compile inspect latency`)" in searched
    shown = {
        "compare": run("-C", workspace, "compare", "host", workspace / "host.mess").stderr,
        "inspect latency": run("-C", workspace, "inspect", "latency").stderr,
        "inspect": run("inspect", workspace / "host.mess").stderr,
        "on the device": "\n".join(lines_of(read_manifest(workspace / "host.mess"))),
    }
    for where, text in shown.items():
        words = " ".join(text.split())
        assert all(doubt in words for doubt in doubts), where
    assert f"warning: host, {workspace / 'host.mess'}: latencies of host are noisy" in shown["compare"]


@pytest.mark.usefixtures("brief_profile")
def test_profile_says_at_once_what_will_follow_its_figures(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "SLOW", -1.0)
    (workspace / TABLE).unlink()
    told = run("-C", workspace, "profile", "--device", "host").stderr
    doubts = printed_json("-C", workspace, "inspect", "latency")["doubts"]
    assert doubts[0].startswith("latencies of host are noisy (")
    assert told.splitlines() == [f"warning: {each}" for each in doubts]


def test_pages_and_the_readme_of_a_bundle_say_it_too(workspace: Path) -> None:
    edit(workspace / TABLE, spoilt)
    done("-C", workspace, "search", "--optimise", "accuracy")
    bench = ("bench", workspace / "host.mess", "--split", "test", "--passes", "1")
    for arguments in (("bundle",), ("report",), bench):
        result = run("-C", workspace, *arguments)
        assert (result.exit_code, result.stderr) == (0, ""), "it was printed where the plan was chosen"
    assert "predicted latencies: latencies of host are noisy" in run("-C", workspace, *bench, "-v").stderr
    done("-C", workspace, "report")
    done("-C", workspace, "compare", "host", "-o", workspace / "compare.html")
    report, compare = ((workspace / f"{name}.html").read_text("utf-8") for name in ("report", "compare"))
    assert report.count("Warning: latencies of host are noisy") == 2, "above all, and at the latencies"
    assert "latencies with a warning" in report, "at what bench predicted"
    assert "Warning: host: latencies of host are noisy" in compare
    done("-C", workspace, "bundle", "-o", workspace / "other.mess")
    with zipfile.ZipFile(workspace / "other.mess") as content:
        readme = next(name for name in content.namelist() if name.upper().startswith("README"))
        assert "Warning: latencies of host are noisy" in content.read(readme).decode()
    (workspace / TABLE).unlink()
    plan = json.loads((workspace / "plans" / "host.json").read_text())["plan"]
    (shown,) = printed_json("-C", workspace, "compare", "host")["plans"]
    assert shown["doubts"] == plan["doubts"] != [], "the plan keeps them, wherever its table is"
    assert "warning: latencies of host are noisy" in read_result(workspace / "plans" / "host.json")._repr_html_()
