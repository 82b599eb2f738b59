"""`search` as a user meets it: one line for what cannot be, a reason for what was chosen, nothing stale shipped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mess_compile.cli.search import subset_of
from mess_compile.evaluate import statistics
from mess_compile.report.model import Missing
from mess_compile.report.provenance import provenance_of
from mess_compile.search.display import expected_on_new_images
from mess_compile.search.plan import Optimism, read_result
from mess_compile.search.requirement import Limit, Requirement
from mess_compile.steps import Subset
from mess_compile.workspace import Workspace
from tests.commands import complaint, contents, done, edit, overwrite, printed_json, refused, run

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "brief_profile")


def with_statistics(workspace: Path, change: Callable[[statistics.ExitStatistics], statistics.ExitStatistics]) -> None:
    folder = Workspace(workspace).statistics("val")
    statistics.write_statistics(folder, change(statistics.read_statistics(folder)))


def table_for(workspace: Path, device: str, factor: float = 1.0) -> None:
    """A latency table of another device: that of host, each graph `factor` times as slow but for the heads."""
    content = json.loads((workspace / "latency" / "host.json").read_text())
    content["device"] = device
    for entry in content["entries"]:
        if not entry["graph"].startswith("head-"):
            entry.update({name: entry[name] * factor for name in ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")})
    overwrite(workspace / "latency" / f"{device}.json", json.dumps(content).encode())


class TestSummary:
    @pytest.mark.parametrize("options", [(), ("--max-err", "50%"), ("--max-err", "50%", "--hold-out", "33%")])
    def test_eight_lines_say_what_was_found(self, workspace: Path, options: tuple[str, ...]) -> None:
        """Plan against baseline, its figures, its proof, what to expect on new images, the next command."""
        lines = done("-C", workspace, "search", *options).splitlines()
        plan = read_result(workspace / "plans" / "host.json").plan
        assert len(lines) <= 8
        assert lines[0].startswith("Plan for host (fp32): ")
        lost = plan.predicted.miou - plan.baseline.miou
        assert lines[0].endswith("is better") or f", {lost:+.2f} pp mIoU" in lines[0]
        figures = {line.split()[0]: line.split()[1:3] for line in lines[2:4]}
        assert figures == {
            name: [f"{one.miou:.2f}", f"{one.latency_ms:.2f}"]
            for name, one in (("baseline", plan.baseline), ("plan", plan.predicted))
        }
        assert re.match(r"Proved optimal over [\d,]+ plans\. Chosen on \d+ images of val; ", lines[4])
        assert lines[-1].startswith("hint: mess-compile ")

    def test_details_are_those_of_inspect_plan(self, workspace: Path) -> None:
        brief = done("-C", workspace, "search", "--optimise", "accuracy").splitlines()
        long = done("-C", workspace, "search", "--optimise", "accuracy", "-v").splitlines()
        assert long[: len(brief) - 1] == brief[:-1]
        shown = done("-C", workspace, "inspect", "plan").splitlines()
        assert [line for line in long[len(brief) - 1 : -1] if line not in shown] == []
        assert any("trade-offs found" in line for line in long)

    def test_a_column_for_what_is_bounded(self, workspace: Path) -> None:
        shown = done("-C", workspace, "search", "--max-memory", "1GiB", "--max-latency-worst", "100x")
        assert {"worst", "memory"} <= {*shown.splitlines()[1].split()}
        assert "memory" not in done("-C", workspace, "search")


class TestBounds:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (("--max-err", "-1"), "--max-err '-1' is negative: write 1% for one percentage point"),
            (("--max-err", "1"), "--max-err '1' has no unit: write 1% for one percentage point of mIoU below"),
            (("--max-latency", "1"), "--max-latency '1' has no unit: write 20ms, or 0.5x of the baseline"),
            (("--max-latency-p95", "fast"), "--max-latency-p95 'fast' is not understood: write 20ms"),
            (("--max-latency-worst", "0ms"), "--max-latency-worst '0ms' is not above zero: write 20ms"),
            (("--max-energy", "5"), "--max-energy '5' has no unit: write 50mJ"),
            (("--time-limit", "60"), "--time-limit '60' has no unit: write 30min (units: s, min, h)"),
            (("--front", "beauty"), "--front 'beauty' is not understood: write latency,miou or"),
            (("--max-err", "0%", "--max-latency", "0.001x"), "no plan satisfies mIoU >= "),
            (("--max-latency-worst", "0.0001x"), "best reachable: worst-case latency "),
            (("--max-latency-p95", "0.0001x"), "best reachable: p95 latency "),
            (("--setting", "anytime", "--optimise", "energy"), "the anytime setting optimises mIoU over time"),
            (("--optimise", "energy"), "profile where the device reports its power"),
        ],
    )
    def test_one_line_for_what_cannot_be(self, workspace: Path, arguments: tuple[str, ...], line: str) -> None:
        assert line in refused(workspace, "search", *arguments)

    def test_each_one_holds(self, workspace: Path) -> None:
        """A bound between the fastest and the most accurate plan's own figures changes what is chosen, and is kept."""
        best = printed_json("-C", workspace, "search", "--optimise", "accuracy")["plan"]["predicted"]
        for option, name in (("--max-latency-p95", "p95_ms"), ("--max-latency-worst", "worst_ms")):
            limit = best[name] * 0.999
            content = printed_json("-C", workspace, "search", "--optimise", "accuracy", option, f"{limit:.6f}ms")
            assert content["plan"]["predicted"][name] <= limit

    def test_energy(self, workspace: Path) -> None:
        def told(content: dict[str, Any]) -> None:
            for entry in content["entries"]:
                entry["energy_mj"] = 5 * entry["mean_ms"]

        edit(workspace / "latency" / "host.json", told)
        figures = printed_json("-C", workspace, "search", "--optimise", "energy", "--max-energy", "100x")["plan"]
        assert figures["predicted"]["energy_mj"] == pytest.approx(5 * figures["predicted"]["latency_ms"], rel=1e-4)
        assert "mJ" in done("-C", workspace, "search")
        edit(workspace / "latency" / "host.json", lambda content: content["entries"][0].update(energy_mj=None))
        message = refused(workspace, "search", "--max-energy", "50mJ")
        assert "run `mess-compile profile --device host --all`" in message


class TestHoldOut:
    def test_both_figures_are_printed_and_bench_knows_the_images_that_were_held_out(self, workspace: Path) -> None:
        shown = done("-C", workspace, "search", "--max-err", "50%", "--hold-out", "33%", "-v")
        assert re.search(r"^measured latency, 9 images of val$", shown, re.MULTILINE)
        assert "held out, not used to choose the plan: 3 images of val, the last 33 % of each sequence" in shown
        assert re.search(r"pp on the 9 images that the plan was chosen on, [+-][\d.]+ pp on the 3 held out", shown)
        done("-C", workspace, "bundle")
        bench = printed_json("-C", workspace, "bench", workspace / "host.mess", "--split", "val", "--passes", "1")
        assert (bench["tuned_on"], bench["images"]) == (9, 12)
        report = dict(provenance_of(read_result(Workspace(workspace).plan("host")), Missing("")))
        assert "pp on the 3 held out" in report["held out"]
        assert "(3 images)" in done("-C", workspace, "compare", "host")

    def test_of_few_images_none_are_and_the_line_says_so(self, workspace: Path) -> None:
        assert "nothing was held out (12 images are fewer than 60)" in done("-C", workspace, "search", "-v")
        content = printed_json("-C", workspace, "search", "--hold-out", "none")
        assert (content["plan"]["hold_out"], content["without_hold_out"]) == (None, "--hold-out none")

    def test_what_cannot_be_is_refused(self, workspace: Path) -> None:
        assert "--hold-out '1' is not understood: write 33%" in refused(workspace, "search", "--hold-out", "1")
        both = run("-C", workspace, "search", "--max-err", "1%", "--confidence", "95%", "--hold-out", "33%")
        assert both.exit_code == 2
        assert "drop --hold-out" in both.stderr

    def test_what_is_evaluated_first_is_said(self, workspace: Path) -> None:
        shutil.rmtree(Workspace(workspace).statistics("val"))
        told = done("-C", workspace, "search")
        assert f"in fp32: evaluating first, on the 12 images of val in {workspace / 'data'}\n" in told


class TestEvidence:
    def test_no_images(self, workspace: Path) -> None:
        with_statistics(workspace, lambda found: found.select([]))
        assert "the evaluation has no images: run `mess-compile evaluate`" in refused(workspace, "search")

    def test_a_class_that_never_occurs_is_told(self, workspace: Path) -> None:
        def without(found: statistics.ExitStatistics) -> statistics.ExitStatistics:
            right, labelled = found.intersection.copy(), found.labelled.copy()
            right[:, :, 1] = 0
            labelled[:, 1] = 0
            return dataclasses.replace(found, intersection=right, labelled=labelled)

        with_statistics(workspace, without)
        name = statistics.read_statistics(Workspace(workspace).statistics("val")).classes[1]
        told = run("-C", workspace, "search").stderr
        assert f"warning: no image has a labelled pixel of {name}: mIoU is over the other classes\n" in told
        assert printed_json("-C", workspace, "search")["plan"]["absent_classes"] == [name]

    def test_no_class_occurs(self, workspace: Path) -> None:
        with_statistics(
            workspace,
            lambda found: dataclasses.replace(
                found, intersection=np.zeros_like(found.intersection), labelled=np.zeros_like(found.labelled)
            ),
        )
        assert "no image has a labelled pixel" in refused(workspace, "search")

    @pytest.mark.parametrize(
        "changed",
        [
            lambda found: {"intersection": found.intersection + 10**6},
            lambda found: {"intersection": found.intersection - 10**6},
            lambda found: {"counts": found.counts + 10**6},
            lambda found: {"counts": found.counts - 10**6},
            lambda found: {"thresholds": found.thresholds * np.float32("nan")},
        ],
    )
    def test_counts_that_cannot_be(self, workspace: Path, changed: Callable[[Any], dict[str, Any]]) -> None:
        edit(workspace / "workspace.json", lambda content: content.update(data=None))
        with_statistics(workspace, lambda found: dataclasses.replace(found, **changed(found)))
        message = refused(workspace, "search")
        assert "statistics.json is damaged" in message
        assert "run `mess-compile evaluate`" in message

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1e999", '"fast"', "null"])
    def test_a_latency_that_is_none(self, workspace: Path, value: str) -> None:
        path = workspace / "latency" / "host.json"
        overwrite(path, re.sub(r'"mean_ms": [^,]+', f'"mean_ms": {value}', path.read_text(), count=1).encode())
        message = refused(workspace, "search")
        assert "host.json is" in message
        assert "run `mess-compile profile --device host`" in message

    def test_a_table_that_lacks_graphs_names_them(self, workspace: Path) -> None:
        gone = ("segment-0-2", "upload")
        edit(
            workspace / "latency" / "host.json",
            lambda content: content.update(entries=[e for e in content["entries"] if e["graph"] not in gone]),
        )
        message = refused(workspace, "search")
        assert "lacks graphs (segment-0-2, upload): run `mess-compile profile --device host`" in message


class TestStale:
    def changed_table(self, workspace: Path) -> None:
        edit(workspace / "latency" / "host.json", lambda content: content["entries"][3].update(mean_ms=7.5))

    def changed_statistics(self, workspace: Path) -> None:
        with_statistics(workspace, lambda found: found.select(range(found.images - 1)))

    @pytest.mark.parametrize("what", ["latency table", "statistics"])
    def test_a_plan_of_what_changed_is_not_shipped(self, workspace: Path, what: str) -> None:
        getattr(self, "changed_" + what.split()[-1])(workspace)
        line = f"the {what} changed since the plan for host was searched: run `mess-compile search`"
        assert line in refused(workspace, "bundle")
        assert line in refused(workspace, "bench", workspace / "host.mess", "--split", "test")
        done("-C", workspace, "search")
        done("-C", workspace, "bundle")

    def test_a_plan_whose_statistics_were_only_written_again_is_bundled(self, workspace: Path) -> None:
        with_statistics(workspace, lambda found: found)
        done("-C", workspace, "bundle")

    def test_a_bundle_needs_the_latencies_that_its_deadlines_go_by(self, workspace: Path) -> None:
        (workspace / "latency" / "host.json").unlink()
        assert "latency/host.json does not exist: run `mess-compile profile" in complaint("-C", workspace, "bundle")

    def test_a_bundle_says_what_it_was_searched_from(self, workspace: Path) -> None:
        plan = printed_json("-C", workspace, "search", "--optimise", "accuracy")["plan"]
        done("-C", workspace, "bundle")
        told = printed_json("inspect", workspace / "host.mess")["plans"][0]["sources"]
        assert (told["latency table"], told["statistics"]) == (plan["table_sha256"], plan["statistics_sha256"])


class TestTwice:
    def test_the_same_bytes_with_and_without_what_was_kept(self, workspace: Path) -> None:
        plan = workspace / "plans" / "host.json"
        done("-C", workspace, "search", "--max-err", "50%")
        first = plan.read_bytes()
        assert contents(workspace / "search")
        done("-C", workspace, "search", "--max-err", "50%")
        assert plan.read_bytes() == first
        shutil.rmtree(workspace / "search")
        done("-C", workspace, "search", "--max-err", "50%")
        assert plan.read_bytes() == first

    def test_another_requirement_adds_nothing_to_what_is_kept(self, workspace: Path) -> None:
        done("-C", workspace, "search")
        before = contents(workspace / "search")
        done("-C", workspace, "search", "--optimise", "accuracy", "--front", "latency,miou,memory")
        assert contents(workspace / "search") == before


class TestExplain:
    def test_in_words_and_as_json(self, workspace: Path) -> None:
        arguments = ("-C", workspace, "search", "--optimise", "accuracy", "--max-latency", "3x", "--explain")
        arguments += ("--policy", "plain,class,learned,agreement")
        shown = done(*arguments)
        for title in ("why: what each exit brings", "what each requirement costs (now accuracy", "max_latency"):
            assert title in shown
        content = printed_json(*arguments)["explanation"]
        assert content.keys() == {"objective", "value", "exits", "bounds", "helps", "weak_final", "policies"}
        worths = [tuple(each["policies"]) for each in content["policies"]]
        assert worths == [("plain",), ("plain", "class"), ("plain", "agreement")]
        best = max(each["outcome"]["value"] for each in content["policies"])
        assert best <= content["value"], "with all of them together it is no worse"
        rates = [share["coverage"] for share in content["exits"]]
        assert rates == printed_json("-C", workspace, "inspect", "plan")["plan"]["predicted"]["exit_rates"]
        assert [bound["tighter_limit"] for bound in content["bounds"]] == ["2.7x"]
        assert all(each["what"].endswith("10% faster") for each in content["helps"])


class TestSeveralDevices:
    def test_a_plan_for_each_and_what_they_share(self, workspace: Path) -> None:
        table_for(workspace, "rtx-2080")
        arguments = ("-C", workspace, "search", "--device", "host", "--device", "rtx-2080")
        content = printed_json(*arguments)
        assert content.keys() == {"results", "shared"}
        plans = {device: result["plan"] for device, result in content["results"].items()}
        assert plans.keys() == {"host", "rtx-2080"}
        names = [[graph["name"] for graph in plan["graphs"]] for plan in plans.values()]
        assert names[0] == names[1] == content["shared"]["graphs"], "equal latencies make equal plans"
        shared = content["shared"]
        assert shared["shared_bytes"] == shared["together_bytes"] == shared["apart_bytes"] / 2 > 0
        shown = done(*arguments)
        assert "Plan for host (" in shown
        assert "Plan for rtx-2080 (" in shown
        assert f"graphs that all 2 plans run: {', '.join(names[0])}" in shown
        for device in plans:
            assert f"-C {workspace} bundle {device}\n" in shown
            assert json.loads((workspace / "plans" / f"{device}.json").read_text())["plan"] == plans[device]

    def test_weights_are_counted_by_content(self, workspace: Path) -> None:
        """Fused and separate segments are other graphs with the same weights."""
        table_for(workspace, "rtx-2080", factor=40.0)
        content = printed_json(
            *("-C", workspace, "search", "--device", "host", "--device", "rtx-2080", "--setting", "budgeted"),
            *("--optimise", "accuracy"),
        )
        sizes = []
        index = json.loads((workspace / "graphs" / "index.json").read_text())
        store = {path.name: path.stat().st_size for path in (workspace / "graphs" / "weights").iterdir()}
        for result in content["results"].values():
            graphs = {graph["name"] for graph in result["plan"]["graphs"]}
            paths = [workspace / "graphs" / spec["path"] for spec in index["graphs"] if spec["name"] in graphs]
            named = {name.decode() for path in paths for name in re.findall(rb"[0-9a-f]{64}", path.read_bytes())}
            sizes.append({name: store[name] for name in named & store.keys()})
        shared = content["shared"]
        assert shared["apart_bytes"] == sum(sum(each.values()) for each in sizes)
        assert shared["together_bytes"] == sum({**sizes[0], **sizes[1]}.values())
        assert shared["shared_bytes"] == sum(size for name, size in sizes[0].items() if name in sizes[1])

    def test_all_plans_or_none(self, workspace: Path) -> None:
        table_for(workspace, "rtx-2080", factor=1000.0)
        figures = printed_json("-C", workspace, "search")["plan"]["predicted"]
        limit = f"{figures['latency_ms'] * 5:.4f}ms"
        before = contents(workspace / "plans")
        both = ("--device", "host", "--device", "rtx-2080")
        message = complaint("-C", workspace, "search", *both, "--max-latency", limit)
        assert contents(workspace / "plans") == before
        assert "error: rtx-2080: no plan satisfies latency" in message


def test_inspect_shows_the_operating_points(workspace: Path) -> None:
    done("-C", workspace, "search", "--optimise", "accuracy")
    shown = done("-C", workspace, "inspect", "plan")
    points = printed_json("-C", workspace, "inspect", "plan")["plan"]["operating_points"]
    assert "operating points: the same graphs, switched at run time" in shown
    for point in points:
        assert f"{point['name']} " in shown
    assert "default" in [point["name"] for point in points]


def test_a_requirement_of_profile_is_one_of_search() -> None:
    requirements = (
        "--max-latency-p95 20ms --max-latency-worst 0.5x --max-energy 50mJ",
        "--setting anytime --deadline 8ms --max-memory 64MiB",
    )
    assert subset_of(requirements, "30min") == Subset(
        requirements=(
            Requirement(
                max_latency_p95=Limit(20.0), max_latency_worst=Limit(0.5, relative=True), max_energy=Limit(50.0)
            ),
            Requirement(setting="anytime", deadline_ms=8.0, max_memory_bytes=64 << 20),
        ),
        budget_s=1800.0,
    )


def test_profile_names_a_bound_that_it_does_not_know(workspace: Path) -> None:
    message = refused(workspace, "profile", "--requirement", "--max-latency-p95 20")
    assert "--max-latency-p95 '20' has no unit: write 20ms" in message
    message = refused(workspace, "profile", "--requirement", "--max-latency-p96 20ms")
    assert "--max-latency-p96" in message
    assert "it takes the options of `search`" in message


def test_a_plan_of_its_own_name_goes_into_a_bundle(workspace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "apart.json"
    before = (workspace / "plans" / "host.json").read_bytes()
    assert f"bundle {plan}" in done("-C", workspace, "search", "--max-err", "100%", "-o", plan)
    assert (workspace / "plans" / "host.json").read_bytes() == before
    done("-C", workspace, "bundle", plan, "-o", tmp_path / "apart.mess")
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    assert ": not a plan" in refused(workspace, "search", "--max-err", "100%", "-o", other)
    assert other.read_text() == "mine"
    two = "--device", "host", "--device", "xavier"
    several = refused(workspace, "search", "--max-err", "100%", "-o", plan, *two)
    assert "holds the plan of one device" in several


def test_what_makes_a_plan_doubtful_is_said_beside_it(workspace: Path) -> None:
    edit(workspace / "latency" / "host.json", lambda content: content["environment"].update(verdict="unstable"))
    told = run("-C", workspace, "search", "--max-err", "100%").stderr
    assert "warning: latencies of host are noisy" in told
    assert "no --max-err" not in told


def test_a_plan_that_loses_much_says_so_where_nobody_asked_for_less(workspace: Path) -> None:
    """Early heads are fast, and right nowhere; then all as right as the baseline."""

    def slow(content: dict[str, Any]) -> None:
        for entry in content["entries"]:
            if entry["graph"].startswith(("head-exit3", "baseline")):
                entry.update(dict.fromkeys(("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms"), 1000.0))

    def as_right_as_the_baseline(times: int, found: statistics.ExitStatistics) -> statistics.ExitStatistics:
        final, heads = np.s_[:, -1:], len(found.heads)
        right, predicted = (np.repeat(array[final], heads, axis=1) for array in (found.intersection, found.predicted))
        right[:, :-1] *= times
        return dataclasses.replace(found, intersection=right, predicted=predicted)

    edit(workspace / "latency" / "host.json", slow)
    with_statistics(workspace, partial(as_right_as_the_baseline, 0))
    baseline = printed_json("-C", workspace, "search")["plan"]["baseline"]["miou"]
    line = f"warning: the plan loses {baseline:.1f} pp of mIoU, and no --max-err was given: add --max-err 1%\n"
    assert baseline > 1
    assert line in run("-C", workspace, "search").stderr
    for asked in (("--max-err", "100%"), ("--optimise", "accuracy")):
        assert "was given" not in run("-C", workspace, "search", *asked).stderr
    with_statistics(workspace, partial(as_right_as_the_baseline, 1))
    assert "was given" not in run("-C", workspace, "search").stderr


@pytest.mark.parametrize("command", [("search", "--explain"), ("bundle",)])
def test_what_a_plan_rests_on_is_read_once(
    workspace: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of COCO are hundreds of megabytes, each time hashed."""
    read: list[Path] = []

    def noted(folder: Path) -> statistics.ExitStatistics:
        read.append(folder)
        return found(folder)

    found = statistics.read_statistics
    monkeypatch.setattr(statistics, "read_statistics", noted)
    done("-C", workspace, *command)
    assert read == [Workspace(workspace).statistics("val")]


def test_a_plan_without_early_exits_shows_no_thresholds(workspace: Path) -> None:
    """Nothing is held against them: a reader would look for what they do."""
    gated = done("-C", workspace, "search", "--optimise", "accuracy", "-v")
    needed = re.findall(r" (\d+\.\d) % \((\d+) of (\d+)\) ", gated)
    assert "confidence threshold  confident cells needed" in gated
    assert needed
    for percent, cut, cells in needed:
        assert float(percent) == pytest.approx(100 * int(cut) / int(cells), abs=0.051)
    assert "threshold/cells needed" in gated
    assert "confident cells needed" in done("inspect", workspace / "host.mess")
    single = done("-C", workspace, "search", "--setting", "budgeted", "--optimise", "accuracy", "-v")
    assert "head  images" in single
    done("-C", workspace, "bundle")
    for text in (
        single,
        done("-C", workspace, "inspect", "plan"),
        done("inspect", workspace / "host.mess"),
        read_result(workspace / "plans" / "host.json")._repr_html_(),
    ):
        assert "threshold" not in text
        assert "cells needed" not in text


def test_an_estimate_from_few_images_is_called_rough(workspace: Path) -> None:
    assert "one group of images: expect this of more of this sequence; other places are not covered." in done(
        "-C", workspace, "search", "--max-err", "100%"
    )
    shown = done("-C", workspace, "search", "--max-err", "100%", "-v", "--group-by", "[0-9]+")
    told = printed_json("-C", workspace, "search", "--max-err", "100%")["plan"]["optimism"]
    assert told["images"] == 12
    assert "too few images: a rough estimate for new ones is " in shown
    assert "on new images of this kind: too few images" not in shown, "beside the interval that would be two figures"
    assert "evaluate 40 images or more" in shown
    provenance = provenance_of(read_result(workspace / "plans" / "host.json"), Missing("no table"))
    assert dict(provenance)["on new images of this kind"].startswith("too few images (12)")


@pytest.mark.parametrize(
    ("images", "groups", "says"),
    [
        (39, 39, "too few images (39): a rough estimate is -1.3 pp of mIoU relative to the baseline"),
        (40, 40, "expect -1.26 pp of mIoU relative to the baseline (spread over folds 0.52 pp)"),
        (400, 1, "by folds; 400 images of 1 sequence (too few sequences to generalise)"),
        (400, 8, "by folds; 400 images of 8 sequences"),
    ],
)
def test_an_expectation_says_what_it_rests_on(images: int, groups: int, says: str) -> None:
    text = expected_on_new_images(Optimism(1.26, 3.4, 5, 0.52, "by folds", images, groups))
    assert says in text
    assert text.endswith(says) == (images == 400)


def test_groups_named_by_a_pattern_go_from_search_to_bundle(workspace: Path) -> None:
    """`bench` must count the same images as tuned on; a user who forgets the pattern must not get other groups."""
    options = ("--max-err", "100%", "--max-exits", "1", "--hold-out", "33%")
    plan = printed_json("-C", workspace, "search", *options, "--group-by", "[0-4]$")["plan"]
    assert plan["group_by"] == "[0-4]$"
    assert plan["expected"]["rule"].endswith("groups by --group-by '[0-4]$'")
    assert plan["expected"]["low_pp"] <= plan["expected"]["miou_pp"] <= plan["expected"]["high_pp"]
    known = statistics.statistics_content_sha256(statistics.read_statistics(Workspace(workspace).statistics("val")))
    assert plan["statistics_sha256"] == known  # as recorded: the pattern is none of their content
    printed = done("-C", workspace, "search", *options)
    assert "pp mIoU against the baseline (95 %: " in printed
    assert "groups by --group-by '[0-4]$'" in printed
    done("-C", workspace, "bundle")
    environment = printed_json("inspect", workspace / "host.mess")["plans"][0]["environment"]
    assert (environment["group_by"], environment["held_out"]) == ("[0-4]$", "33/100")
    assert "groups by --group-by" in done("-C", workspace, "inspect", "plan")
    assert printed_json("-C", workspace, "search", *options, "--group-by", "none")["plan"]["group_by"] is None
    assert Workspace(workspace).memory().group_by is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--safety", "100%"), "--safety '100%' is not understood: write 90% (above 50% and below 100%)"),
        (("--safety", "0"), "--safety '0' is not understood: write 90%"),
        (("--group-by", "("), "--group-by '(' is not a regular expression"),
        (("--group-by", "no such image"), "--group-by 'no such image' matches no image id"),
        (("--safety", "90%", "--max-err", "1%", "--group-by", "^."), "one group of images"),
    ],
)
def test_groups_and_safety_that_mean_nothing_are_refused_in_a_line(
    workspace: Path, options: tuple[str, ...], says: str
) -> None:
    assert says in complaint("-C", workspace, "search", *options)
    assert Workspace(workspace).memory().group_by is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--confidence", "95%"), "drop one of them"),
        (("--time-limit", "5s"), "drop --time-limit"),
        (("--explain",), "drop one of them"),
    ],
)
def test_safety_is_refused_beside_what_it_contradicts(workspace: Path, options: tuple[str, ...], says: str) -> None:
    found = run("-C", workspace, "search", "--max-err", "1%", "--safety", "90%", *options)
    assert found.exit_code == 2
    assert says in found.stderr


def test_a_safe_plan_says_what_it_keeps(workspace: Path) -> None:
    options = ("--max-err", "90%", "--max-exits", "1", "--safety", "60%", "--group-by", "[0-9]+")
    printed = done("-C", workspace, "search", *options)
    plan = read_result(workspace / "plans" / "host.json").plan
    assert plan.safety is not None
    bound = f"at most 90 pp lost (bound {plan.safety.loss_bound_pp:.2f} pp)"
    assert f"Kept at 60 %, by a bootstrap: {bound}." in printed
    assert len(printed.splitlines()) <= 8
    assert "candidate plans that satisfy --safety." in printed


class TestPolicies:
    def test_plans_name_the_rows_that_they_use_and_the_recorded_statistics(self, workspace: Path) -> None:
        """The bundle, the report and the device find what they decide by."""
        folder = Workspace(workspace).statistics("val")
        recorded = statistics.statistics_content_sha256(statistics.read_statistics(folder))
        for policies in ("plain", "class", "agreement", "plain,class,learned,agreement"):
            done("-C", workspace, "search", "--policy", policies, "--optimise", "accuracy")
            result = read_result(workspace / "plans" / "host.json")
            for plan in (result.plan, *result.front):
                assert plan.statistics_sha256 == recorded
                decisions = [(stage.head, stage.row) for stage in plan.stages if stage.cut is not None]
                rows = {(row.head, row.row): row.policy for row in plan.policy_rows}
                used = {rows.get(decision, "plain") for decision in decisions}
                assert used <= set(policies.split(","))
        done("-C", workspace, "bundle")
        assert "passed" in done("-C", workspace, "verify", workspace / "host.mess", "--latency-factor", "1000")

    def test_plain_alone_is_what_an_earlier_evaluation_gives(self, workspace: Path) -> None:
        done("-C", workspace, "search", "--policy", "plain")
        plain = read_result(workspace / "plans" / "host.json")
        gate = dataclasses.replace(plain.plan.gate, by_class=False)
        with_statistics(workspace, lambda known: dataclasses.replace(known, class_counts=None, gate=gate))
        done("-C", workspace, "search")
        again = read_result(workspace / "plans" / "host.json")
        assert (again.plan.stages, again.plan.predicted) == (plain.plan.stages, plain.plan.predicted)
        assert again.certificate == plain.certificate
        message = refused(workspace, "search", "--policy", "class")
        assert "policy class needs counts by class, which the evaluation of val lacks: run `mess-compile" in message

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                ("--policy", "classes"),
                "--policy 'classes' is not one of plain, class, learned, agreement",
            ),
            (("--policy", "class", "--confidence", "80%", "--max-err", "90%"), "class is fitted to images that"),
        ],
    )
    def test_what_cannot_be_is_refused(self, workspace: Path, options: tuple[str, ...], words: str) -> None:
        assert words in refused(workspace, "search", *options)

    def test_images_alike_have_nothing_to_learn(self, workspace: Path) -> None:
        """It says so, and the thresholds decide."""
        result = run("-C", workspace, "search", "--policy", "plain,learned")
        assert "nothing to learn for the policy learned from these 12 images" in result.stderr + result.stdout
        assert read_result(workspace / "plans" / "host.json").plan.policy_rows == ()
