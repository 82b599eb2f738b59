"""The commands as a user meets them: what they print, what they say to do next, how they end."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from mess_compile import steps
from mess_compile.cli import console, main
from mess_compile.runtime.measure.measure import Effort
from mess_compile.workspace import Workspace
from tests.commands import ANY_SPEED, TRAIN, chained, complaint, contents, done, edit, first, printed_json, run
from tests.json_docs import differences

pytestmark = pytest.mark.usefixtures("brief_profile")
COLUMNS = ("baseline", "predicted", "replayed", "measured")
WORKLOADS = {"backbone", "classes", "input_hw", "baseline", "exit_points", "segments", "heads"}
KEYS = {
    "train": {"folder", *WORKLOADS},
    "export": {"gate", "graphs", "baseline_alone", *WORKLOADS},
    "evaluate": {"split", "images", "device", "library", "precision", "threshold", "heads", "baseline_alone"},
    "build": {"builds"},
    "profile": {"device", "library", "library_version", "source", "environment", "entries"},
    "search": {"source", "plan", "front", "certificate"},
    "bundle": {"bundle", "bytes", "files"},
    "run": {"images"},
    "bench": {"bundle", "split", "images", "passes", "latency_ratio", "workload_ratio", "disagreements", *COLUMNS}
    | {"baseline_name", "other_baselines"},
    "verify": {"passed", "checks"},
    "report": {"report", "bytes", "device", "parts", "missing"},
    "compare": {"plans", "notes", "page"},
    "devices": {"devices"},
    "doctor": {"findings"},
    "inspect": WORKLOADS,
}


@pytest.fixture
def arguments(workspace: Path, request: pytest.FixtureRequest) -> Callable[[str], tuple[str | Path, ...]]:
    """How a user would call each command in the finished workspace; `build` finds engines that are there."""
    image = first(workspace / "data" / "test" / "images")
    extra: dict[str, tuple[str | Path, ...]] = {
        "train": (*TRAIN[1:], "--data", workspace / "data"),
        "build": ("--device", "rtx-4090"),
        "search": ("--max-err", "50%"),
        "run": (workspace / "host.mess", image, "-o", workspace / "predictions"),
        "bench": (workspace / "host.mess", "--split", "test", "--passes", "1"),
        "verify": (workspace / "host.mess", *ANY_SPEED),
        "inspect": ("graphs",),
        "compare": ("host", workspace / "host.mess"),
    }

    def call(command: str) -> tuple[str | Path, ...]:
        if command == "build":
            request.getfixturevalue("engines").add_to(workspace)
        return ("-C", workspace, command, *extra.get(command, ()))

    return call


@pytest.mark.parametrize("command", KEYS)
def test_programs_get_one_object_with_the_documented_keys(
    arguments: Callable[[str], tuple[str | Path, ...]], command: str
) -> None:
    content = printed_json(*arguments(command))
    assert content.keys() >= KEYS[command]
    assert differences("export" if command == "inspect" else command, content) == []


@pytest.mark.parametrize("command", KEYS)
def test_every_command_ends_with_what_to_do_next_there(
    arguments: Callable[[str], tuple[str | Path, ...]], command: str, workspace: Path
) -> None:
    shown = done(*arguments(command))
    proposed = re.findall(r"^(?:hint: |      )mess-compile -C (\S+) (\S+)(.*)$", shown, re.MULTILINE)
    assert proposed
    assert shown.rstrip().endswith("".join(proposed[-1][1:]))
    for folder, name, rest in proposed:
        assert folder == str(workspace)
        options = main.commands[name].params
        for option in re.findall(r"--[a-z-]+", rest):
            assert any(option in parameter.opts for parameter in options if isinstance(parameter, click.Option))


PRINTED = (
    ("export",),
    ("evaluate", "-v"),
    ("search", "--explain", "-v"),
    ("bench", "host.mess", "--split", "test", "--passes", "1", "-v"),
    ("verify", "host.mess", "-v", *ANY_SPEED),
    ("compare", "host", "host.mess"),
    ("inspect", "graphs"),
    ("inspect", "latency"),
    ("inspect", "plan"),
    ("report",),
    ("devices",),
    ("doctor",),
)


@pytest.mark.parametrize(("columns", "most"), [(60, 60), (200, 100)])
def test_nothing_is_wider_than_100_columns_or_the_terminal(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, columns: int, most: int
) -> None:
    """But for words that are longer, and commands that are to be copied."""
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda *fallback: os.terminal_size((columns, 24)))
    monkeypatch.setattr(console, "_is_terminal", lambda stream: True)
    for arguments in PRINTED:
        for line in done(*arguments).splitlines():
            fits = len(line) <= most or len(line.split()) == 1
            assert fits or line.startswith(("hint: ", "      mess-compile ")), (arguments, line)


@pytest.mark.parametrize(
    ("former", "present", "words"),
    [
        (("ships",), ("ship", "--list"), "`ships` is now `ship --list`"),
        (("ship", "--unit"), ("ship", "--systemd"), "--unit is now --systemd"),
        (("export", "--plain"), ("export", "--no-edge-aware"), "--plain is now --no-edge-aware"),
        (("profile", "--for=--max-err 1"), ("profile", "--requirement=--max-err 1"), "--for is now --requirement"),
    ],
)
def test_former_names_do_the_same_and_say_the_present_ones(
    tmp_path: Path, former: tuple[str, ...], present: tuple[str, ...], words: str
) -> None:
    old, new = (run("-C", tmp_path, *words) for words in (former, present))
    warning, *rest = old.stderr.splitlines()
    assert warning == f"warning: {words}; the old name goes away in the next release"
    assert (old.exit_code, rest) == (new.exit_code, new.stderr.splitlines())
    shown = done("--help") + done(present[0], "--help")
    assert not re.search(rf"(?<!\S){re.escape(former[-1].partition('=')[0])}\b", shown)


def test_the_machine_itself_is_called_cpu_or_host(workspace: Path) -> None:
    def shown(*arguments: str | Path) -> str:
        return done("-C", workspace, *arguments).replace(" cpu", " host")

    for command in (("inspect",), ("bundle", "--dry-run"), ("search", "--max-err", "1%", "--device")):
        assert shown(*command, "cpu") == shown(*command, "host")
    assert printed_json("-C", workspace, "verify", workspace / "host.mess", "--target", "cpu:fp32", *ANY_SPEED)[
        "passed"
    ]


def test_a_profile_without_labelled_images_names_the_next_command(workspace: Path) -> None:
    shutil.rmtree(workspace / "statistics")
    edit(workspace / "workspace.json", lambda content: content.update(data=None))
    shown = done("-C", workspace, "profile", "--device", "cpu", "--estimate")
    assert shown.splitlines()[-1].startswith(
        "hint: no labelled images are known yet: `mess-compile evaluate --data DIR`"
    )


def test_a_gate_without_its_edge_aware_step_is_exported(workspace: Path) -> None:
    assert printed_json("-C", workspace, "export", "--no-edge-aware")["gate"]["edge_aware"] is False


class TestNewWorkspace:
    def test_export_makes_the_folder(self, finished: Path, tmp_path: Path) -> None:
        new = tmp_path / "not" / "there"
        assert f"-C {new} profile" in done("-C", new, "export", finished / "candidate")
        assert (new / "graphs" / "index.json").is_file()

    @pytest.mark.parametrize("arguments", [("export",), ("export", "--help"), ("train", "--data", "gone")])
    def test_a_command_that_fails_leaves_none(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        run("-C", tmp_path / "not" / "there", *arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("command", ["profile", "search", "bundle", "report"])
    def test_a_command_that_needs_something_in_it_says_that_it_is_gone(self, tmp_path: Path, command: str) -> None:
        gone = tmp_path / "gone"
        assert f"error: workspace {gone} does not exist: create the folder" in complaint("-C", gone, command)
        assert not gone.exists()


def test_run_says_what_the_confidence_is_that_it_prints(workspace: Path) -> None:
    image = first(workspace / "data" / "test" / "images")
    shown = done("-C", workspace, "run", workspace / "host.mess", image, "-o", workspace / "predictions", "-v")
    assert (
        shown.count("confident cells: the share of a stage's cells whose confidence reaches the plan's threshold") == 1
    )
    assert re.search(r": stage 1, confident cells \d+ %( \(needs \d+ %\))?, |: stage [23], confident cells", shown)


def test_every_command_is_covered_here() -> None:
    """But for those that need a device (test_ship.py has these) or a network of one's own (attach/test_attach.py)."""
    assert set(main.commands) == {*KEYS, "demo", "completion", "ship", "attach"}


def test_a_command_in_the_current_folder_proposes_commands_there(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    assert "hint: mess-compile run host.mess data/test/images/" in done("bundle")


def test_a_mistyped_command_gets_the_nearest_one() -> None:
    result = run("exprot")
    assert result.exit_code == 2
    assert "Did you mean 'export'?" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "--max-exits", "7"),
        ("train",),
        ("run",),
        ("inspect", "resnet50", "--classes", "0"),
        ("export", "--confidence", "luck"),
        ("evaluate", "--bogus"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_the_list_of_commands_is_whole_sentences_at_80_columns() -> None:
    shown = done("--help")
    assert "..." not in shown.partition("Commands:")[2]
    assert max(map(len, shown.splitlines())) <= 80


def test_help_is_not_an_error() -> None:
    for command in main.commands:
        assert done(command, "--help").startswith("Usage: ")


def test_the_papers_baselines_have_the_papers_workload() -> None:
    small = printed_json("inspect", "mobilenetv2", "--classes", "21", "--input", "512x512", "--exits", "1")
    assert str(small["baseline"]["gmacs"]).startswith("8.78")
    content = printed_json("inspect", "resnet50", "--classes", "21", "--input", "512x512")
    assert str(content["baseline"]["gmacs"]).startswith("138.63")
    assert len(content["exit_points"]) == 6
    assert len(content["segments"]) == 21
    assert len(content["heads"]) == 5 * 56 + 1
    whole = next(segment for segment in content["segments"] if segment["name"] == "segment-0-6")
    final = next(head for head in content["heads"] if head["exit_point"] == 6)
    assert whole["gmacs"] + final["gmacs"] == pytest.approx(content["baseline"]["gmacs"])


def test_nothing_but_results_is_printed_along_the_whole_chain(workspace: Path, tmp_path: Path) -> None:
    """In a process of its own: warnings of libraries would show on standard error."""
    bundle, image = workspace / "host.mess", first(workspace / "data" / "val" / "images")
    chain: list[tuple[str | Path, ...]] = [
        (*TRAIN, "--data", workspace / "data"),
        ("export",),
        ("profile", "--device", "host"),
        ("search", "--max-err", "100%"),
        ("bundle",),
        ("run", bundle, image, "-o", tmp_path),
        ("bench", bundle, "--data", workspace / "data", "--passes", "1"),
    ]
    printed = chained([("-C", workspace, *words) for words in chain])
    assert printed.count("hint: mess-compile") == len(chain)


class TestBundle:
    def test_it_brings_what_the_device_goes_by(self, workspace: Path) -> None:
        done("-C", workspace, "bundle")
        (plan,) = printed_json("inspect", workspace / "host.mess")["plans"]
        assert sum(plan["confidence"][0]) == plan["predicted"]["images"] == 12
        rates = plan["predicted"]["exit_rates"]
        assert sum(plan["confidence"][1]) == round(12 * (1 - rates[0]))
        assert plan["environment"]["library_version"]
        paths, spent = [], plan["upload_mean_ms"]
        for cost in plan["costs"]:
            spent += cost["mean_ms"]
            paths.append(spent + cost["report_mean_ms"])
        assert sum(map(math.prod, zip(paths, rates, strict=True))) == pytest.approx(plan["predicted"]["latency_ms"])

    def test_one_file_beside_it_for_onnx_runtime_alone(self, workspace: Path) -> None:
        image = first(workspace / "data" / "test" / "images")
        done("-C", workspace, "bundle", "--single-file", workspace / "host.onnx")
        labels, exit_ = onnxruntime.InferenceSession(workspace / "host.onnx").run(
            ["labels", "exit"], {"image": np.asarray(Image.open(image).convert("RGB"))[None]}
        )
        ran = printed_json("run", workspace / "host.mess", image, "-o", workspace / "out")["images"][0]
        assert ran["exit"] == exit_[0]
        pictured = np.asarray(Image.open(workspace / "out" / f"{image.stem}.labels.png"))
        np.testing.assert_array_equal(pictured, labels[0])

    def test_a_plan_is_found_by_its_device_from_wherever_one_stands(
        self, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file where the user stands comes first, as everywhere; then the workspace's, then the device's."""
        monkeypatch.chdir(tmp_path)
        shutil.copy(workspace / "plans" / "host.json", "street.json")
        (tmp_path / "host").mkdir()
        for named in ("street.json", "plans/host.json", "host"):
            made = printed_json("-C", workspace, "bundle", named, "-o", tmp_path / "made.mess")
            assert made["plans"] == ["host:fp32"]
            assert printed_json("-C", workspace, "compare", named)["plans"][0]["device"] == "host"
            assert printed_json("-C", workspace, "inspect", named)["plan"]["device"] == "host"
            assert done("-C", workspace, "inspect", named).endswith(f" bundle {named}\n")
        (tmp_path / "host.json").write_text("{}")
        assert "host.json" in complaint("-C", workspace, "bundle", "host.json")
        for command in ("bundle", "compare"):
            message = complaint("-C", workspace, command, "hots")
            assert (
                "'hots' is not a file (did you mean 'host'?), and not a device with a plan in this workspace" in message
            )

    def test_unpacked_it_is_the_same(self, workspace: Path) -> None:
        folder = workspace / "unpacked"
        with zipfile.ZipFile(workspace / "host.mess") as content:
            content.extractall(folder)
        done("verify", folder, *ANY_SPEED)
        assert printed_json("inspect", folder) == printed_json("inspect", workspace / "host.mess")
        weight = first(folder / "graphs" / "weights")
        weight.write_bytes(weight.read_bytes()[:-1] + b"x")
        assert "is not the file that the manifest lists" in complaint("verify", folder)

    def test_what_cannot_be_is_refused(self, workspace: Path) -> None:
        assert "has no engines: drop --engines" in complaint("-C", workspace, "bundle", "--engines")
        assert "there is no key" in complaint("-C", workspace, "bundle", "--sign", workspace / "gone")
        assert run("verify", workspace / "host.mess", "--require-signature").exit_code == 2
        slow = run("verify", workspace / "host.mess", "--latency-factor", "0.000001")
        assert slow.exit_code == 1
        assert "FAILED  latency: " in slow.stdout
        assert "(latency): stop other programs" in slow.stderr

    def test_it_overwrites_nothing_but_bundles(self, workspace: Path, tmp_path: Path) -> None:
        done("-C", workspace, "bundle")
        plan, bundle = workspace / "plans" / "host.json", workspace / "host.mess"
        graph, notes, link = workspace / "graphs" / "baseline.onnx", tmp_path / "notes.txt", tmp_path / "link.mess"
        notes.write_text("of many years")
        link.symlink_to(plan)
        before = contents(workspace)
        for words, *options in (
            ("host.json is the plan: name another file", plan, "-o", plan),
            ("link.mess is the plan: name another file", "-o", link),
            ("notes.txt: not a bundle", "-o", notes),
            (
                "is also the bundle: name another file for --single-file",
                "-o",
                tmp_path / "new",
                "--single-file",
                tmp_path / "." / "new",
            ),
            ("host.mess is also the bundle", "--single-file", bundle),
            ("baseline.onnx: not written by --single-file", "--single-file", graph),
            ("notes.txt: not written by --single-file", "--single-file", notes),
        ):
            assert str(words) in complaint("-C", workspace, "bundle", *options)
        assert contents(workspace) == before
        assert notes.read_text() == "of many years"
        assert {path.name for path in tmp_path.iterdir()} - {"workspace"} == {"link.mess", "notes.txt"}
        for _ in range(2):  # its own may be overwritten
            done("-C", workspace, "bundle", "-o", tmp_path / "new", "--single-file", tmp_path / "new.onnx")


class TestInspectPlan:
    def test_a_long_front_is_shortened_and_that_is_said(self, workspace: Path) -> None:
        def lengthen(content: dict[str, Any]) -> None:
            """136 plans, each 1 ms slower than the one before; the chosen one is the 70th."""
            chosen = {key: content["plan"][key] for key in content["front"][0]}
            others = [point for point in content["front"] if point["stages"] != chosen["stages"]]
            front = [json.loads(json.dumps(chosen if i == 69 else others[i % len(others)])) for i in range(136)]
            for index, point in enumerate(front):
                point["predicted"]["latency_ms"] = index + 1.0
            content["front"] = front

        edit(workspace / "plans" / "host.json", lengthen)
        shown = done("-C", workspace, "inspect", "plan")
        numbers = [int(found) for found in re.findall(r"^(\d+)(?: chosen)? +fp32 ", shown, re.MULTILINE)]
        assert len(numbers) <= 15
        assert {1, 69, 70, 71, 136} <= set(numbers)
        assert max(b - a for a, b in pairwise(numbers)) < 20, "no part of the front is hidden"
        assert re.search(r"^70 chosen +fp32 +70\.000 ", shown, re.MULTILINE)
        assert f"{136 - len(numbers)} of the front's 136 plans are left out: `inspect plan --all`" in shown
        everything = done("-C", workspace, "inspect", "plan", "--all")
        assert len(re.findall(r"^\d+(?: chosen)? +fp32 ", everything, re.MULTILINE)) == 136
        assert "left out" not in everything
        assert len(printed_json("-C", workspace, "inspect", "plan")["front"]) == 136

    def test_it_begins_with_what_was_chosen(self, workspace: Path) -> None:
        plan = printed_json("-C", workspace, "inspect", "plan")["plan"]
        shown = done("-C", workspace, "inspect", "plan")
        assert shown.startswith(f"plan for host, {plan['setting']}, fp32\n")
        for number, stage in enumerate(plan["stages"], start=1):
            name = f"stage {number} = network exit {stage['head'][4]}"
            assert re.search(rf"^{name} +{re.escape(stage['head'])} ", shown, re.MULTILINE)
        assert re.search(rf"^plan +{plan['predicted']['miou']:.2f} ", shown, re.MULTILINE)


class TestRun:
    def test_arguments_that_are_swapped_are_told_apart(self, workspace: Path) -> None:
        images, bundle = workspace / "data" / "test" / "images", workspace / "host.mess"
        image = first(images)
        for given in (image, images):
            message = complaint("run", given, bundle)
            assert (
                f"{given} is not a bundle, and the bundle comes first: `mess-compile run {bundle} {given}`" in message
            )
        assert f"run {bundle} {image} {images}" in complaint("run", image, bundle, images)
        assert f"{image} is an image, not a bundle" in complaint("run", image, image)

    def test_pictures_have_the_frames_own_size_and_labels_are_values(self, workspace: Path, tmp_path: Path) -> None:
        image = tmp_path / "frame.png"
        Image.open(first(workspace / "data" / "test" / "images")).resize((150, 70)).save(image)
        content = printed_json("run", workspace / "host.mess", image, "-o", tmp_path / "out")
        assert {Path(path).name for path in content["images"][0]["pictures"]} == {
            "frame.labels.png",
            "frame.overlay.png",
        }
        labels = Image.open(tmp_path / "out" / "frame.labels.png")
        assert (labels.mode, labels.size) == ("P", (150, 70))
        assert np.asarray(labels).max() < 8
        assert Image.open(tmp_path / "out" / "frame.overlay.png").size == (150, 70)

    def test_the_strip_shows_the_input_every_exit_and_the_truth(self, workspace: Path, tmp_path: Path) -> None:
        test = workspace / "data" / "test"
        image = first(test / "images")
        exits = len(printed_json("inspect", workspace / "host.mess")["plans"][0]["stages"])
        widths = []
        for truth in ((), ("--truth", test / "labels")):
            done("run", workspace / "host.mess", image, "--progressive", "-o", tmp_path, *truth)
            widths.append(Image.open(tmp_path / f"{image.stem}.progressive.png").width)
        panel = widths[1] - widths[0]
        assert abs(widths[0] / panel - (1 + exits)) < 0.1

    def test_truth_without_the_strip_is_wrong_usage(self, workspace: Path) -> None:
        image = first(workspace / "data" / "test" / "images")
        assert run("run", workspace / "host.mess", image, "--truth", workspace).exit_code == 2

    def test_operating_points_are_chosen_by_name(self, workspace: Path, tmp_path: Path) -> None:
        given = ("run", workspace / "host.mess", first(workspace / "data" / "test" / "images"), "-o", tmp_path)
        assert printed_json(*given, "--operating-point", "default")["images"]
        refused = run(*given, "--operating-point", "slow")
        assert refused.exit_code == 1
        assert re.search(r"has no operating point 'slow'; it has .*default", refused.output)
        assert run(*given, "--operating-point", "default", "--deadline", "20ms").exit_code == 2
        assert "write 20ms" in run(*given, "--deadline", "20").output


def miou_of_pictures(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> float:
    """From a confusion matrix, pixel by pixel."""
    confusion = [[0] * classes for _ in range(classes)]
    for guess, truth in pairs:
        for predicted, actual in zip(guess.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if actual != 255:
                confusion[actual][predicted] += 1
    shares = []
    for k in range(classes):
        union = sum(confusion[k]) + sum(row[k] for row in confusion) - confusion[k][k]
        if sum(confusion[k]):
            shares.append(confusion[k][k] / union)
    return 100 * sum(shares) / len(shares)


class TestBench:
    """Three columns that must tell one story, or nobody can trust the predicted one."""

    @pytest.fixture(scope="class")
    @staticmethod
    def bench(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        place = tmp_path_factory.mktemp("bench") / "workspace"
        shutil.copytree(finished, place, copy_function=os.link)
        return printed_json("-C", place, "bench", place / "host.mess", "--split", "test", "--passes", "2")

    @pytest.fixture(scope="class")
    @staticmethod
    def predictions(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        """What `run` says of the same images, with the labels it writes and the truth."""
        images = sorted((finished / "data" / "test" / "images").iterdir())
        content = printed_json("run", finished / "host.mess", *images, "-o", tmp_path_factory.mktemp("predictions"))
        for result in content["images"]:
            result["labels"] = np.asarray(Image.open(result["pictures"][0]))
            truth = finished / "data" / "test" / "labels" / f"{Path(result['image']).stem}.png"
            result["truth"] = np.asarray(Image.open(truth))
        return list(content["images"])

    def test_measured_and_replayed_exits_agree(
        self, bench: dict[str, Any], predictions: list[dict[str, Any]], finished: Path
    ) -> None:
        exits = len(bench["predicted"]["exit_rates"])
        expected = [sum(p["exit"] == e for p in predictions) / len(predictions) for e in range(1, exits + 1)]
        assert bench["disagreements"] == []
        assert bench["tuned_on"] == 0
        assert bench["measured"]["exit_rates"] == bench["replayed"]["exit_rates"] == expected
        assert bench["measured"]["gmacs"] == bench["replayed"]["gmacs"]

    def test_miou_is_that_of_the_pictures_run_writes(
        self, bench: dict[str, Any], predictions: list[dict[str, Any]]
    ) -> None:
        expected = miou_of_pictures([(p["labels"], p["truth"]) for p in predictions], 8)
        assert bench["measured"]["miou"] == pytest.approx(expected, abs=1e-9)
        assert bench["replayed"]["miou"] == bench["measured"]["miou"]

    def test_the_baselines_miou_is_that_of_its_graph(self, bench: dict[str, Any], finished: Path) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(finished / "graphs" / "baseline.onnx"))
        pairs = []
        for image in sorted((finished / "data" / "test" / "images").iterdir()):
            guess = session.run(["labels"], {"image": np.asarray(Image.open(image))[None]})[0][0]
            pairs.append((guess, np.asarray(Image.open(image.parent.parent / "labels" / image.name))))
        assert bench["baseline"]["miou"] == pytest.approx(miou_of_pictures(pairs, 8), abs=1e-9)

    def test_workload_is_the_backbone_and_heads_that_ran(
        self, bench: dict[str, Any], predictions: list[dict[str, Any]], finished: Path
    ) -> None:
        graphs = printed_json("-C", finished, "inspect", "graphs")
        stages = printed_json("inspect", finished / "host.mess")["plans"][0]["stages"]
        heads = {head["name"]: head["gmacs"] for head in graphs["heads"]}
        points = [point["gmacs"] for point in graphs["exit_points"]]
        spent = [
            points[p["exit_point"] - 1] + sum(heads[stage["head"]] for stage in stages[: p["exit"]])
            for p in predictions
        ]
        assert bench["measured"]["gmacs"] == pytest.approx(sum(spent) / len(spent))

    def test_under_a_deadline_it_tells_what_is_there_and_the_share_of_misses(
        self, finished: Path, tmp_path: Path
    ) -> None:
        """With time for every exit, the labels are those that `run` writes under this deadline."""
        exits = len(printed_json("inspect", finished / "host.mess")["plans"][0]["stages"])
        given = ("-C", finished, "bench", finished / "host.mess", "--split", "test", "--passes", "1", "--deadline")
        images = sorted((finished / "data" / "test" / "images").iterdir())
        written = printed_json("run", finished / "host.mess", *images, "-o", tmp_path, "--deadline", "60000ms")
        pairs = []
        for result in written["images"]:
            truth = finished / "data" / "test" / "labels" / f"{Path(result['image']).stem}.png"
            pairs.append((np.asarray(Image.open(result["pictures"][0])), np.asarray(Image.open(truth))))
        late, early = printed_json(*given, "60000ms"), printed_json(*given, "0.001ms")
        assert late["miou"] == pytest.approx(miou_of_pictures(pairs, 8), abs=1e-9)
        assert (late["missed_first"], late["missed_later"], late["images"]) == (0, 0, len(images))
        assert late["exit_rates"] == [0.0] * (exits - 1) + [1.0]
        assert {result["exit"] for result in written["images"]} == {exits}
        assert (early["missed_first"], early["missed_later"]) == (1, 0)
        assert early["exit_rates"] == [1.0] + [0.0] * (exits - 1)
        misses = "misses: 0.00% of the images had no result in time, 0.00% a later one too late"
        assert misses in done(*given, "60000ms")

    def test_on_the_tuning_images_the_prediction_comes_true(self, workspace: Path) -> None:
        bench = printed_json("-C", workspace, "bench", workspace / "host.mess", "--split", "val", "--passes", "1")
        assert bench["tuned_on"] == bench["images"]  # a user must not take these figures for a report
        plan = printed_json("-C", workspace, "inspect", "plan")["plan"]["predicted"]
        for column in COLUMNS[1:]:
            assert bench[column]["exit_rates"] == plan["exit_rates"]
            assert bench[column]["miou"] == pytest.approx(plan["miou"], abs=1e-9)
            assert bench[column]["gmacs"] == pytest.approx(plan["gmacs"])
        assert bench["replayed"]["latency_ms"] == pytest.approx(plan["latency_ms"])

    def test_the_ratio_is_of_times_measured_in_the_same_run(self, bench: dict[str, Any]) -> None:
        ratio = bench["baseline"]["latency_ms"] / bench["measured"]["latency_ms"]
        assert bench["latency_ratio"] == pytest.approx(ratio)
        assert bench["latency_ratio_range"][0] <= bench["latency_ratio_range"][1]
        assert bench["workload_ratio"] == pytest.approx(bench["baseline"]["gmacs"] / bench["measured"]["gmacs"])


EFFORT = Effort(window_s=0.03, window_runs=2, max_s=0.09, warm_up_s=0.0)
PROFILE = f"""
import sys
from pathlib import Path
from mess_compile import steps
from mess_compile.runtime.measure.measure import Effort
from mess_compile.workspace import Workspace
steps.profile(Workspace(Path(sys.argv[1])), "host", steps.ProfileOptions(effort={EFFORT!r}))
"""


def started(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int) -> None:
    end = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


class TestProfile:
    """Measuring takes hours on a small device: a break may cost no visit, and no visit may count twice."""

    @pytest.fixture
    @staticmethod
    def samples(workspace: Path) -> Iterator[Path]:
        (workspace / "latency" / "host.json").unlink()
        path = workspace / "latency" / "host.samples.jsonl"
        yield path
        assert not path.exists()

    def test_a_killed_one_continues(self, workspace: Path, samples: Path) -> None:
        process = started("-c", PROFILE, workspace)
        wait_for_lines(process, samples, 8)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = samples.read_text().splitlines()[1:]
        assert not (workspace / "latency" / "host.json").exists()
        with samples.open("a") as stream:
            stream.write('{"window": {"job": "baseline@fp32", "wall_')
        last = ""

        def watch(label: str, done: int, total: int) -> None:
            nonlocal last
            last = samples.read_text()

        table = steps.profile(Workspace(workspace), None, steps.ProfileOptions(effort=EFFORT), steps.Reporter(watch))
        lines = last.splitlines()[1:]
        assert lines[: len(kept)] == kept
        windows = [line["window"] for line in map(json.loads, lines) if "window" in line]
        assert len({(window["job"], window["round"]) for window in windows}) == len(windows), "measured twice"
        ticks = [tick for window in windows for tick in window["ticks_ms"]]
        for (graph, precision), entry in table.entries.items():
            taken = [window for window in windows if window["job"] in (graph, f"{graph}@{precision}")]
            assert 0 < entry.runs <= sum(len(window["wall_ms"]) for window in taken), "some while the machine was slow"
            in_ticks = [value / np.mean(window["ticks_ms"]) for window in taken for value in window["wall_ms"]]
            assert min(in_ticks) * min(ticks) <= entry.mean_ms * (1 + 1e-9), "brought to the speed of some tick"
            assert entry.mean_ms <= max(in_ticks) * max(ticks) * (1 + 1e-9)

    @pytest.mark.usefixtures("brief_profile")
    def test_ctrl_c_keeps_what_was_measured(self, workspace: Path, samples: Path) -> None:
        code = "from mess_compile.cli import main; main()"
        process = started("-c", code, "-C", workspace, "profile", "--device", "host")
        wait_for_lines(process, samples, 2)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert process.returncode == 1
        assert stderr == "stopped: finished measurements are kept; the same command continues from there\n"
        assert len(samples.read_text().splitlines()) >= 2
        done("-C", workspace, "profile")

    @pytest.mark.usefixtures("brief_profile")
    def test_samples_of_other_graphs_do_not_count(self, workspace: Path, samples: Path) -> None:
        done("-C", workspace, "profile")
        window = {"job": "baseline@fp32", "round": 0, "wall_ms": [9e9], "device_ms": [], "power_mw": None, "spent_s": 9}
        samples.write_text('{"format": "mess-latency-samples", "graphs": {}}\n' + json.dumps({"window": window}) + "\n")
        done("-C", workspace, "profile")
        table = printed_json("-C", workspace, "inspect", "latency")
        assert all(entry["mean_ms"] < 1e6 for entry in table["entries"])

    @pytest.mark.parametrize("text", ["", "\n", "[]\n", "\xff\xfe"])
    @pytest.mark.usefixtures("brief_profile")
    def test_damaged_samples_are_measured_again(self, workspace: Path, samples: Path, text: str) -> None:
        samples.write_text(text, encoding="latin-1")
        done("-C", workspace, "profile")


def test_a_slice_of_a_split_is_remembered(workspace: Path) -> None:
    content = printed_json("-C", workspace, "evaluate", "--split", "val[:5]")
    assert (content["split"], content["images"]) == ("val[:5]", 5)
    assert printed_json("-C", workspace, "search")["plan"]["predicted"]["images"] == 5


def test_search_evaluates_when_nobody_did(workspace: Path) -> None:
    shutil.rmtree(workspace / "statistics")
    assert "Chosen on 12 images of val" in done("-C", workspace, "search")


def test_our_own_profiles_can_be_replaced(workspace: Path) -> None:
    (workspace / "profiles").mkdir()
    (workspace / "profiles" / "host.toml").write_text(
        'name = "host"\ndescription = "my own"\nlibrary = "onnxruntime"\nprecisions = ["fp32"]\n'
    )
    content = printed_json("-C", workspace, "devices")
    assert [target["description"] for target in content["devices"] if target["name"] == "host"] == ["my own"]
