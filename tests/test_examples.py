"""The examples' commands are what newcomers copy: they must work as written, in an untouched copy."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tests.commands import ANY_SPEED, chained, done
from tests.conftest import made_once
from tests.remote_device import Device, remote_device

EXAMPLES = Path(__file__).parent.parent / "examples"
CAMVID = EXAMPLES / "02-camvid"
PROGRAM = Path(sys.executable).parent / "mess-compile"


def commands(readme: Path, title: str) -> list[list[str]]:
    """The commands of the indented block below a heading."""
    section = re.split(r"^## ", readme.read_text(), flags=re.MULTILINE)
    body = next(part for part in section if part.startswith(title))
    return [shlex.split(line, comments=True)[1:] for line in body.splitlines() if line.startswith("    mess-compile")]


def run(folder: Path, arguments: list[str]) -> str:
    done = subprocess.run([PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: ")] == []
    return done.stdout


def play_camvid(folder: Path) -> None:
    kept = subprocess.run(["git", "ls-files", "."], cwd=CAMVID, capture_output=True, text=True, check=True)
    for name in kept.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CAMVID / name, folder / name)
    lines = commands(CAMVID / "README.md", "Without the data")
    for line in lines:
        line[:] = ["0.02" if before == "--seconds" else word for before, word in zip(["", *line], line, strict=False)]
    chained([[*line, *(ANY_SPEED if line[0] == "verify" else ())] for line in lines], folder)
    assert [line[0] for line in lines] == ["export", "profile", "search", "bundle", "verify"]


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with what its commands without data leave behind. Look only."""
    return made_once(tmp_path_factory, "02-camvid", play_camvid)


def check_the_camvid_plan(camvid: Path) -> None:
    plan = json.loads((camvid / "plans" / "host.json").read_text())["plan"]
    assert plan["predicted"]["miou"] >= plan["baseline"]["miou"] - 1
    assert plan["predicted"]["latency_ms"] < plan["baseline"]["latency_ms"]
    assert plan["predicted"]["images"] == 50


def check_the_camvid_network(camvid: Path) -> None:
    shown = run(camvid, ["inspect", "graphs", "--json"])
    graphs = json.loads(shown)
    early = {head["exit_point"] for head in graphs["heads"]} - {len(graphs["exit_points"])}
    assert len(early) == 4
    assert sum(head["exit_point"] in early for head in graphs["heads"]) >= 10
    assert graphs["input_hw"] == [360, 480]
    assert sum(path.stat().st_size for path in (camvid / "candidate").iterdir()) <= 25e6


def check_the_camvid_exits(camvid: Path) -> None:
    shown = run(camvid, ["inspect", "statistics", "--json"])
    heads = {head["name"]: head["miou"] for head in json.loads(shown)["heads"]}
    assert heads["exit5.fcn-crm1-b0"] >= 62


@pytest.mark.slow
def test_the_camvid_example_works_without_the_data_and_is_the_one_promised(camvid: Path) -> None:
    check_the_camvid_plan(camvid)
    check_the_camvid_network(camvid)
    check_the_camvid_exits(camvid)


def test_the_example_keeps_no_image_and_no_place_of_its_makers() -> None:
    kept = subprocess.run(["git", "ls-files", "."], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    names = kept.stdout.splitlines()
    assert not [name for name in names if name.endswith((".jpg", ".jpeg"))]
    for name in names:
        if name.endswith((".json", ".md")):
            assert "/work" not in (EXAMPLES / name).read_text()


def lines_of(example: str) -> list[list[str]]:
    """Every command of an example's README, in its order."""
    text = (EXAMPLES / example / "README.md").read_text()
    found = [line for line in text.splitlines() if line.startswith(("    mess-compile", "    python"))]
    return [shlex.split(line, comments=True) for line in found]


def play(folder: Path, line: list[str]) -> str:
    """What a command prints that runs in `folder`."""
    program, *words = line
    if program == "python":
        played = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=600)
        assert (played.returncode, played.stderr) == (0, "")
        return played.stdout
    expanded = [[str(p) for p in sorted(Path().glob(word))] if "*" in word else [word] for word in words]
    assert all(expanded), f"{words}: nothing matches"
    return done(*(word for each in expanded for word in each))


@pytest.fixture
def examples(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brief_profile: None) -> Path:
    """The examples without CamVid, with a finished workspace where 01 leaves its demo."""
    shutil.copytree(
        EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("02-camvid", "08-inspection", "demo")
    )
    shutil.copytree(finished, tmp_path / "examples" / "01-quickstart" / "demo", copy_function=os.link)
    return tmp_path / "examples"


def all_played(examples: Path, example: str, monkeypatch: pytest.MonkeyPatch, lines: list[list[str]]) -> list[str]:
    monkeypatch.chdir(examples / example)
    return [play(examples / example, line) for line in lines]


def test_after_the_quickstart_other_wishes_cost_seconds(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo, *lines = lines_of("01-quickstart")
    assert demo == ["mess-compile", "demo", "demo"]
    lines = [["100%" if word == "3%" else word for word in line] for line in lines]  # this network is hardly trained
    all_played(examples, "01-quickstart", monkeypatch, lines)
    made = examples / "01-quickstart" / "demo"
    assert list((made / "predictions").glob("*.progressive.png"))
    assert json.loads((made / "plans" / "anytime.json").read_text())["plan"]["reports"]
    assert (made / "report.html").stat().st_size > 1e6


def test_a_xavier_is_estimated_without_one(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in lines_of("03-xavier") if "--estimate" in line or "--max-workload" in line]
    assert len(lines) == 2
    assert "ESTIMATED" in all_played(examples, "03-xavier", monkeypatch, lines)[-1]


def test_engines_for_a_card_are_built_without_one(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    lines = [["100%" if word == "5%" else word for word in line] for line in lines_of("04-rtx")]
    built, *_ = all_played(examples, "04-rtx", monkeypatch, lines)
    assert "13 engines of 13 graphs" in built
    assert (examples / "04-rtx" / "rtx-4090.mess").is_file()


def test_the_application_shows_all_that_it_promises(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = all_played(examples, "05-application", monkeypatch, lines_of("05-application"))
    assert [line.split(":")[0] for line in shown.splitlines()[:12]] == [f"frame {number}" for number in range(12)]
    assert "refined: exit 1" in shown
    assert "\nmess_frames_total{" in shown


@pytest.mark.parametrize("words", [[], ["gone.mess"]])
def test_the_application_without_its_bundle_says_what_it_takes(examples: Path, words: list[str]) -> None:
    played = subprocess.run(
        [sys.executable, "application.py", *words], cwd=examples / "05-application", capture_output=True, text=True
    )
    assert played.returncode == 2
    assert played.stderr.startswith("usage: application.py [-h] bundle\n")
    assert ("gone.mess does not exist" if words else "required: bundle") in played.stderr


@pytest.mark.slow
def test_a_network_of_plain_pytorch_comes_to_labels(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        ["30" if word == "300" else "100%" if word == "3%" else word for word in line]
        for line in lines_of("06-own-network")[1:]  # the demo, which is there
    ]
    all_played(examples, "06-own-network", monkeypatch, lines)
    assert list((examples / "06-own-network" / "predictions").glob("*.labels.png"))


@pytest.mark.slow
def test_a_trained_network_with_one_exit_comes_to_labels(
    tmp_path: Path, brief_profile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained so briefly, early heads are of no use: that every step works is what counts."""
    shutil.copytree(EXAMPLES / "07-your-network", tmp_path / "examples" / "07-your-network")
    lines = lines_of("07-your-network")
    lines[0] += ["--steps", "30"]
    lines = [[*line, "--epochs", "1", "1"] if "attach" in line else line for line in lines]
    all_played(tmp_path / "examples", "07-your-network", monkeypatch, lines)
    played = tmp_path / "examples" / "07-your-network"
    assert json.loads((played / "candidate" / "attached.json").read_text())["labelled"] is False
    assert list((played / "predictions").glob("*.labels.png"))


INSPECTION = EXAMPLES / "08-inspection"


def script(name: str) -> ModuleType:
    """A script of the inspection example as a module."""
    spec = importlib.util.spec_from_file_location(name, INSPECTION / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missed_defect_is_a_region_without_one_right_pixel() -> None:
    labels = np.zeros((6, 9), np.uint8)
    labels[0, 0:2], labels[1, 2] = 1, 1  # one blowhole: the third pixel touches at a corner
    labels[4, 0:3] = 1  # another one
    labels[2:6, 5:8] = 3  # a crack, with something between its pixels
    labels[3, 6] = 255
    plan, full = np.zeros((2, 6, 9), np.uint8)
    plan[1, 2] = 1  # finds the first blowhole by its last pixel
    plan[4, 1] = 3  # sees the second one as a crack
    full[5, 5] = 3  # finds the crack, where the plan predicts nothing
    found = script("missed").count(labels, {"plan": plan, "full": full}, 4)
    assert (found[1, "defects"], found[2, "defects"], found[3, "defects"]) == (2, 0, 1)
    assert (found[1, "plan", "missed"], found[1, "plan", "unseen"]) == (1, 0)
    assert (found[3, "plan", "missed"], found[3, "plan", "unseen"]) == (1, 1)
    assert (found[1, "full", "missed"], found[1, "full", "unseen"]) == (2, 2)
    assert (found[3, "full", "missed"], found[3, "full", "unseen"]) == (0, 0)


def test_missed_defects_are_counted_of_a_bundle_and_its_full_network(finished: Path) -> None:
    words = ["host.mess", "--data", "data", "--split", "test"]
    played = subprocess.run(
        [sys.executable, INSPECTION / "missed.py", *words], cwd=finished, capture_output=True, text=True
    )
    assert (played.returncode, played.stderr) == (0, "")
    images, defects = played.stdout.split("\n\n")
    counted = [int(re.split(r"  +", line)[1]) for line in images.splitlines()[1:]]
    assert sum(counted) == len(list((finished / "data" / "test" / "images").iterdir()))
    assert len(defects.splitlines()) == len(images.splitlines()) - 1  # class 0 is no defect
    words[0] = "gone.mess"
    played = subprocess.run(
        [sys.executable, INSPECTION / "missed.py", *words], cwd=finished, capture_output=True, text=True
    )
    assert played.returncode == 1
    assert played.stderr.startswith("error: there is no bundle gone.mess")
    assert played.stderr.count("\n") == 1


def test_one_class_defect_is_the_greatest_of_those_that_it_merges(finished: Path, tmp_path: Path) -> None:
    """Which pixels are good must not change: the bundle of the merged network passes the same parts."""
    shutil.copytree(finished / "graphs", tmp_path / "graphs")  # onnx reads no weights that are hard links
    source = tmp_path / "graphs" / "network.onnx"
    script("one_class").merge_outputs(source, tmp_path / "defect.onnx")
    logits = []
    for path in (source, tmp_path / "defect.onnx"):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        image = np.random.default_rng(1).integers(0, 256, session.get_inputs()[0].shape, dtype=np.uint8)
        names = [output.name for output in session.get_outputs() if output.name.startswith("logits:")]
        logits.append(dict(zip(names, session.run(names, {"image": image}), strict=True)))
    assert logits[0].keys() == logits[1].keys()
    for name, values in logits[0].items():
        wanted = np.concatenate([values[:, :1], values[:, 1:].max(1, keepdims=True)], 1)
        assert np.array_equal(logits[1][name], wanted)
    done("-C", tmp_path / "merged", "export", tmp_path / "defect.onnx")
    described = json.loads(done("-C", tmp_path / "merged", "inspect", "graphs", "--json"))
    assert described["classes"] == 2


def test_the_inspection_network_fits_a_repository_and_is_the_one_described() -> None:
    size = sum(path.stat().st_size for path in INSPECTION.rglob("*") if path.is_file())
    assert size <= 14e6
    described = json.loads(run(INSPECTION, ["inspect", "statistics", "--json"]))
    heads = {head["name"]: head["miou"] for head in described["heads"]}
    for head in ("exit1.lra-crm1-b0", "exit2.lra-crm1-b0", "exit3.sep-crm1-b0", "exit4.fcn-crm1-b0"):
        assert f"| {heads[head]:.2f} |" in (INSPECTION / "README.md").read_text()


@pytest.mark.slow
def test_the_inspection_example_works_without_the_data(tmp_path: Path) -> None:
    shutil.copytree(INSPECTION, tmp_path / "inspection", ignore=shutil.ignore_patterns("__pycache__"))
    lines = commands(INSPECTION / "README.md", "Without the data")
    for line in lines:
        line[:] = ["0.02" if before == "--seconds" else word for before, word in zip(["", *line], line, strict=False)]
        run(tmp_path / "inspection", [*line, *(ANY_SPEED if line[0] == "verify" else ())])
    assert [line[0] for line in lines] == ["export", "profile", "search", "bundle", "verify"]
    plan = json.loads((tmp_path / "inspection" / "plans" / "host.json").read_text())["plan"]
    assert plan["predicted"]["miou"] >= plan["baseline"]["miou"] - 1
    assert plan["predicted"]["latency_ms"] < plan["baseline"]["latency_ms"] / 3
    assert len(plan["stages"]) > 1


def test_parts_with_a_defect_are_added_for_training(tmp_path: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        for split in ("train", "val"):
            (tmp_path / "tiles" / split / kind).mkdir(parents=True)
            for name in ("1_good", "2_bad"):
                pixels = np.full((40, 50), 7 if kind == "images" else 0, np.uint8)
                if (name, kind) == ("2_bad", "labels"):
                    pixels[38, 47] = 3
                Image.fromarray(pixels).save(tmp_path / "tiles" / split / kind / f"{name}.{suffix}")
    assert script("prepare").write(tmp_path / "tiles", tmp_path / "made") == 2
    made = sorted((tmp_path / "made" / "train" / "labels").iterdir())
    assert [path.stem for path in made] == ["1_good", "2_bad", "2_bad_part0", "2_bad_part1"]
    for path in made[2:]:
        labels = np.asarray(Image.open(path))
        assert 0.5 * 40 <= labels.shape[0] <= 0.8 * 40
        assert 0.5 * 50 <= labels.shape[1] <= 0.8 * 50
        assert (labels == 3).sum() == 1
        image = np.asarray(Image.open(path.parents[1] / "images" / f"{path.stem}.jpg"))
        assert image.shape == labels.shape
    assert len(list((tmp_path / "made" / "val" / "images").iterdir())) == 2


@pytest.fixture
def device(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with remote_device(tmp_path_factory.mktemp("device")) as running:
        monkeypatch.setenv("PATH", f"{running.path_folder()}:{os.environ['PATH']}")
        yield running


LOOPBACK = (
    'name = "loopback"\nlibrary = "onnxruntime"\nprecisions = ["fp32"]\ndescription = "this machine behind sshd"\n'
)


@pytest.mark.slow
def test_what_the_xavier_example_shows_is_what_is_printed(
    examples: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded on a loopback device: numbers differ from run to run, the sentences do not."""
    workspace = examples / "01-quickstart" / "demo"
    (workspace / "profiles").mkdir()
    (workspace / "profiles" / "loopback.toml").write_text(LOOPBACK)
    here = {"xavier": "loopback", "ssh://user@xavier": device.host, "1%": "100%"}
    lines = [[here.get(word, word) for word in line] for line in lines_of("03-xavier")[:4]]
    printed = "".join(all_played(examples, "03-xavier", monkeypatch, lines))
    recorded = re.search(r"```\n(.*?)```", (EXAMPLES / "03-xavier" / "README.md").read_text(), re.DOTALL)
    assert recorded is not None
    shown = [line for line in recorded[1].splitlines() if not line.startswith(("$", "..."))]
    as_it_comes = ("warning: ",)  # how quiet this machine is
    told = [line for line in shown if not line.startswith(as_it_comes)]
    sentences = [line for line in told if len(opening(line)) == 3]
    assert len(sentences) > 10
    known = {opening(line) for line in printed.splitlines()}
    assert [line for line in sentences if opening(line) not in known] == []


def opening(line: str) -> tuple[str, ...]:
    """The first words of a line, numbers left out."""
    return tuple(word for word in line.split() if not re.search(r"\d", word))[:3]
