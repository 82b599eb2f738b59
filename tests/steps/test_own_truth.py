"""Without labels: what is evaluated against the network's own output says so in every figure that follows from it."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from mess_compile.data.truth import MARK, write_mark
from mess_compile.search.plan import read_result
from tests.commands import complaint, done, edit, overwrite, printed_json
from tests.json_docs import differences

AGAINST = "against the network's own output"

pytestmark = pytest.mark.usefixtures("brief_profile")


@pytest.fixture
def own(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished workspace, evaluated on data that are marked as the network's own output."""
    monkeypatch.chdir(workspace)
    write_mark(workspace / "data", ())
    evaluated = done("evaluate", "--data", "data", "--split", "val")
    assert f"12 images of val, {AGAINST}" in evaluated
    assert "search --max-change 3%" in evaluated
    return workspace


def test_every_command_says_what_miou_is_against(own: Path) -> None:
    shutil.copyfile(own / "plans" / "host.json", "labels.json")
    found = done("search", "--max-change", "95%")
    plan = read_result(own / "plans" / "host.json").plan
    assert plan.predicted.change is not None
    assert f"changed pixels {plan.predicted.change:.1f} %" in found
    assert f"mIoU is {AGAINST}" in found
    assert AGAINST in done("inspect", "plan")
    assert AGAINST in done("inspect", "statistics")
    done("bundle")
    assert AGAINST.partition(" ")[2] in done("compare", "host", "host.mess")
    assert AGAINST in done("inspect", "host.mess")
    mixed = printed_json("compare", "labels.json", "host")
    assert differences("compare", mixed) == []
    assert [each["truth"] for each in mixed["plans"]] == ["labels", "the network's own output"]
    assert f"mIoU is against labels for some, and {AGAINST} for others" in mixed["notes"]
    with zipfile.ZipFile("host.mess") as bundle:
        assert f"Every mIoU is {AGAINST}." in bundle.read("README.txt").decode()
    measured = done("bench", "host.mess", "--split", "test", "--passes", "1")
    assert f"6 images of test, {AGAINST}" in measured
    assert re.search(r"held: \d+\.\d\d % of the pixels changed, at most 95 % asked", measured)
    done("report", "-o", "report.html")
    assert f"very mIoU of the plan is {AGAINST}" in Path("report.html").read_text().replace("&#39;", "'")


def test_programs_read_what_miou_is_against(own: Path) -> None:
    for section, arguments in (
        ("evaluate", ("inspect", "statistics")),
        ("search", ("search", "--max-change", "95%", "--max-err", "95%", "--explain")),
    ):
        content = printed_json(*arguments)
        assert differences(section, content) == []
    bounds = {bound["bound"]: bound["limit"] for bound in content["explanation"]["bounds"]}
    assert bounds == {"max_err": "95%", "max_change": "95%"}
    assert [promise["quantity"] for promise in content["plan"]["promises"]] == ["err_pp", "change"]
    done("bundle")
    content = printed_json("bench", "host.mess", "--split", "test", "--passes", "1")
    assert differences("bench", content) == []
    assert (content["truth"], content["plan_truth"]) == ("the network's own output",) * 2
    assert all(0 <= content[name]["change"] <= 100 for name in ("baseline", "predicted", "replayed", "measured"))


def test_a_bench_on_labels_compares_no_error_with_one_against_the_network(own: Path) -> None:
    """mIoU against labels is another quantity, and no pixel of the network's output is known to change."""
    done("search", "--max-change", "95%", "--max-err", "95%")
    done("bundle")
    (own / "data" / MARK).unlink()
    shown = done("bench", "host.mess", "--split", "test", "--passes", "1", "--strict")
    assert "the column predicted is against the network's own output, the others are against labels" in shown
    assert "not measured here: 95.00 pp of mIoU" in shown
    assert "not measured here: 95.00 % of the pixels changed" in shown


def test_images_that_were_taught_on_are_refused(own: Path) -> None:
    for command in (("evaluate",), ("bench", "host.mess")):
        message = complaint(*command, "--data", "data", "--split", "train[:5]")
        assert "the exits were taught on split train[:5] of " in message
        assert "--split val" in message


def test_a_bound_on_changes_needs_the_network_s_own_output(workspace: Path) -> None:
    message = complaint("-C", workspace, "search", "--max-change", "3%")
    assert "--max-change counts pixels that are labelled otherwise than by the network itself" in message
    assert "the evaluation is against labels: use --max-err, or " in message


@pytest.mark.parametrize(
    ("text", "reason"), [("3", "has no unit"), ("-1%", "is negative"), ("101%", "no more than 100%")]
)
def test_what_is_no_share_of_pixels_is_refused(workspace: Path, text: str, reason: str) -> None:
    message = complaint("-C", workspace, "search", "--max-change", text)
    assert f"--max-change {text}".replace("'", "") in message.replace("'", "")
    assert reason in message


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": "mess-own-labels", "version": 1}', '{"format": "mess-own-labels", "version": 9}'],
)
def test_a_damaged_mark_is_named(own: Path, content: str) -> None:
    """Read as labels, the network's own output would count as truth."""
    overwrite(own / "data" / MARK, content.encode())
    message = complaint("evaluate", "--data", "data")
    assert MARK in message
    assert "mess-compile attach MODEL.onnx --images DIR" in message


def test_a_mark_with_another_truth_is_named(own: Path) -> None:
    edit(own / "data" / MARK, lambda content: content.update(truth="labels"))
    assert "truth" in complaint("evaluate", "--data", "data")


def test_plans_of_earlier_releases_are_against_labels(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    path = workspace / "plans" / "host.json"
    content = json.loads(path.read_text())
    for plan in (content["plan"], *content["front"]):
        del plan["truth"]
        for figures in (plan["predicted"], plan["baseline"], *(each["predicted"] for each in plan["operating_points"])):
            del figures["change"]
    overwrite(path, json.dumps(content).encode())
    plan = read_result(path).plan
    assert (plan.truth, plan.predicted.change) == ("labels", None)
    done("bundle")
