"""A report must come out of any workspace, say what is missing and what to run, and never show what is stale."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mess_compile.report.model import Missing, Report
from mess_compile.report.page import max_err_text, report_page
from mess_compile.report.strips import extremes
from mess_compile.report.views import Classes
from tests.commands import complaint, done, edit, overwrite, printed_json, refused, run

LIMIT_BYTES = 6_000_000


def page_data(path: Path) -> dict[str, object]:
    """What the page's script draws from."""
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    content = json.loads(found)
    assert isinstance(content, dict)
    return content


class TestNothingToShow:
    """An empty page would hide the one thing to know: what comes first."""

    def test_a_fresh_folder_is_told_where_to_begin(self, tmp_path: Path) -> None:
        for arguments in ((), ("--json",)):
            message = refused(tmp_path, "report", *arguments)
            assert "there is nothing to report yet" in message
            assert "train one with `mess-compile train --data DIR`" in message

    def test_what_comes_next_depends_on_what_is_there(self, workspace: Path) -> None:
        for name in ("latency", "plans", "workspace.json"):
            part = workspace / name
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        assert "run `mess-compile profile --device cpu`" in refused(workspace, "report")
        (workspace / "graphs" / "index.json").unlink()
        assert "run `mess-compile export`" in refused(workspace, "report")

    def test_a_device_without_figures_is_named_with_its_command(self, workspace: Path) -> None:
        message = refused(workspace, "report", "--device", "xavier")
        assert "nothing to report of xavier yet" in message
        assert "run `mess-compile profile --device xavier`" in message


class TestMissingParts:
    def test_before_a_search_the_latencies_are_shown(self, workspace: Path) -> None:
        shutil.rmtree(workspace / "plans")
        told = printed_json("-C", workspace, "report")
        assert told["parts"] == ["latencies"]
        assert "run `mess-compile search" in told["missing"]["plan"]
        assert list(told["missing"]) == ["plan", "classes", "measured", "pictures"]
        assert done("-C", workspace, "report").rstrip().endswith("search --device host --max-err 1%")

    def test_a_changed_latency_table_is_not_shown_as_the_plans_times(self, workspace: Path) -> None:
        edit(workspace / "latency" / "host.json", lambda content: content["entries"][0].update(mean_ms=123.0))
        told = printed_json("-C", workspace, "report")
        assert "the latency table changed since the plan for host was searched" in told["missing"]["classes"]
        front = page_data(workspace / "report.html")["front"]
        assert isinstance(front, dict)
        assert all(stage["times"] is None for stop in front["stops"] for stage in stop["stages"])

    def test_a_bundle_of_another_plan_is_not_shown_as_this_one(self, workspace: Path) -> None:
        done("-C", workspace, "search", "--setting", "budgeted")
        told = printed_json("-C", workspace, "report")
        assert (
            told["missing"]["pictures"] == "host.mess is of another plan than the one chosen: run `mess-compile bundle`"
        )

    def test_a_mistyped_device_is_no_empty_report(self, workspace: Path) -> None:
        assert "xaveir" in refused(workspace, "report", "--device", "xaveir")

    @pytest.mark.parametrize(
        ("part", "left"),
        [
            ("plans/host.json", {"latencies"}),
            ("latency/host.json", {"plan", "pictures"}),
            ("bench/host.json", {"plan", "classes", "latencies", "pictures"}),
            ("host.mess", {"plan", "classes", "latencies"}),
        ],
    )
    def test_what_is_damaged_is_named_and_the_rest_is_there(self, workspace: Path, part: str, left: set[str]) -> None:
        (workspace / part).parent.mkdir(exist_ok=True)
        overwrite(workspace / part, b"{")
        told = printed_json("-C", workspace, "report")
        assert any(Path(part).name in reason for reason in told["missing"].values())
        assert set(told["parts"]) == left

    def test_a_missing_extra_is_named_with_its_install_line(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['plotly'] = None\nfrom mess_compile.cli import main\n"
            "main(['-C', sys.argv[1], 'report'])"
        )
        ended = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
        assert ended.returncode == 1
        assert ended.stderr == "error: plotly is not installed: run `pip install 'mess-compile[report]'`\n"


class TestBench:
    def test_what_bench_measured_is_on_the_page(self, workspace: Path) -> None:
        measured = printed_json("-C", workspace, "bench", workspace / "host.mess", "--split", "test", "--passes", "1")
        assert "measured" in printed_json("-C", workspace, "report")["parts"]
        shown = page_data(workspace / "report.html")["bench"]
        assert isinstance(shown, dict)
        assert shown["columns"][3]["latency_ms"] == measured["measured"]["latency_ms"]
        assert shown["columns"][0]["miou"] == measured["baseline"]["miou"]
        text = (workspace / "report.html").read_text(encoding="utf-8")
        assert "another plan than the one above" not in text
        done("-C", workspace, "search", "--setting", "budgeted")
        done("-C", workspace, "report")
        assert "another plan than the one above" in (workspace / "report.html").read_text(encoding="utf-8")

    def test_what_to_do_next_is_what_the_report_lacks_and_then_the_device(self, workspace: Path) -> None:
        shutil.rmtree(workspace / "bench", ignore_errors=True)
        (workspace / "host.mess").rename(workspace / "elsewhere.mess")
        assert f"hint: mess-compile -C {workspace} bundle {workspace}/plans/host.json" in done(
            "-C", workspace, "report"
        )
        (workspace / "elsewhere.mess").rename(workspace / "host.mess")
        bundle = workspace / "host.mess"
        assert f"hint: mess-compile -C {workspace} bench {bundle} --split test" in done("-C", workspace, "report")
        shown = done("-C", workspace, "bench", bundle, "--split", "test", "--passes", "1")
        assert f"hint: mess-compile -C {workspace} report" in shown
        assert "hint:" not in done("-C", workspace, "report"), "no device is known to ship to"
        edit(workspace / "workspace.json", lambda kept: kept["hosts"].update(host="ssh://user@street"))
        shown = done("-C", workspace, "report")
        assert f"hint: mess-compile -C {workspace} ship {bundle} ssh://user@street:~/host" in shown

    def test_a_result_from_tuning_data_is_called_that(self, workspace: Path) -> None:
        note = "The plan was chosen on 4 of these images, which flatters its figures."
        done("-C", workspace, "bench", workspace / "host.mess", "--split", "test", "--passes", "1")
        done("-C", workspace, "report")
        assert note not in (workspace / "report.html").read_text(encoding="utf-8")
        edit(workspace / "bench" / "host.json", lambda kept: kept["bench"].update(tuned_on=4))
        done("-C", workspace, "report")
        assert note in (workspace / "report.html").read_text(encoding="utf-8")


class TestPictures:
    def test_are_of_the_images_that_the_first_exit_is_most_and_least_sure_of(self, workspace: Path) -> None:
        done("-C", workspace, "report")
        text = (workspace / "report.html").read_text(encoding="utf-8")
        assert re.findall(r"<h3>(easiest|median|hardest): scene_\d+</h3>", text) == ["easiest", "median", "hardest"]
        assert "Images of val, by confidence of the first exit." in text

    def test_are_generated_where_the_data_are_gone(self, workspace: Path) -> None:
        shutil.rmtree(workspace / "data")
        done("-C", workspace, "report")
        assert "generated street scenes, since the data are gone" in (workspace / "report.html").read_text("utf-8")

    def test_extremes_of_few_images_are_not_repeated(self) -> None:
        assert extremes([0.2, 0.9, 0.5, 0.7, 0.1]) == (1, 2, 4)
        assert extremes([0.3]) == (0,)
        assert extremes([0.3, 0.8]) == (1, 0)


class TestPage:
    def test_is_one_file_that_asks_no_network(self, workspace: Path) -> None:
        told = printed_json("-C", workspace, "report", "-o", workspace / "other.html")
        text = (workspace / "other.html").read_text(encoding="utf-8")
        assert told["bytes"] == (workspace / "other.html").stat().st_size < LIMIT_BYTES
        assert "default-src 'none'" in text
        markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
        assert not re.findall(r"(?:src|href)=\"(?!#|data:)", markup)
        assert not (workspace / "report.html").exists()

    def test_nothing_that_a_workspace_names_becomes_markup(self) -> None:
        evil = "</script><img src=x onerror=alert(1)>"
        gone = Missing(f"{evil}: run `{evil}`")
        page = report_page(Report(evil, gone, Classes((evil,), (50.0,)), gone, gone, gone, ((evil, evil),)))
        assert evil not in page
        assert page.count("<img") == 0

    @pytest.mark.parametrize(
        ("pp", "text"), [(-0.5, "0%"), (0.0, "0%"), (0.6428, "0.643%"), (1.0, "1%"), (12.30001, "12.301%")]
    )
    def test_a_max_err_is_rounded_up_so_that_it_allows_the_plan(self, pp: float, text: str) -> None:
        assert max_err_text(pp) == text


class TestCompare:
    def test_a_plan_and_its_bundle_have_the_same_figures(self, workspace: Path) -> None:
        told = printed_json(
            "-C", workspace, "compare", "host", workspace / "host.mess", workspace / "plans" / "host.json"
        )
        plan = json.loads((workspace / "plans" / "host.json").read_text())["plan"]
        assert [one["kind"] for one in told["plans"]] == ["plan", "bundle", "plan"]
        assert told["notes"] == []
        for one in told["plans"]:
            assert one["predicted"]["latency_ms"] == plan["predicted"]["latency_ms"]
            assert one["predicted"]["miou"] == plan["predicted"]["miou"]
            assert one["heads"] == [stage["head"] for stage in plan["stages"]]
            assert one["latency_ratio"] == pytest.approx(
                plan["baseline"]["latency_ms"] / plan["predicted"]["latency_ms"]
            )
        assert told["plans"][0]["decisions"] == told["plans"][1]["decisions"]

    def test_the_table_says_why_figures_may_not_be_compared(self, workspace: Path) -> None:
        shutil.copy(workspace / "plans" / "host.json", workspace / "plans" / "other.json")

        def change(content: dict[str, dict[str, dict[str, object]]]) -> None:
            content["plan"].update(device="orin")  # type: ignore[call-overload]
            for figures in (content["plan"]["predicted"], content["plan"]["operating_points"][0]["predicted"]):  # type: ignore[index]
                figures.update(source="estimated", split="train")

        edit(workspace / "plans" / "other.json", change)
        text = run("-C", workspace, "compare", "host", "other").stderr
        assert "warning: latencies and memory are of different devices" in text
        assert "warning: mIoU and exit rates were taken on different images" in text
        assert "warning: some latencies are measured and some are estimated" in text
        assert "networks" not in text

    def test_a_name_that_is_nothing_is_refused_with_what_there_is(self, workspace: Path) -> None:
        message = complaint("-C", workspace, "compare", "host", "xavier")
        assert "'xavier' is not a file, and not a device with a plan in this workspace (host)" in message

    def test_a_damaged_bundle_is_refused(self, workspace: Path) -> None:
        content = bytearray((workspace / "host.mess").read_bytes())
        content[len(content) // 2] ^= 1
        overwrite(workspace / "host.mess", bytes(content))
        assert "host.mess" in complaint("-C", workspace, "compare", workspace / "host.mess")
