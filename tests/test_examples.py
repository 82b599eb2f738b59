"""The examples' commands are what newcomers copy: they must work as written, in an untouched copy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ANY_SPEED

EXAMPLES = Path(__file__).parent.parent / "examples"
CAMVID = EXAMPLES / "camvid"
PROGRAM = Path(sys.executable).parent / "mess-compile"


def commands(readme: Path, title: str) -> list[list[str]]:
    """The commands of the indented block below a heading."""
    section = re.split(r"^## ", readme.read_text(), flags=re.MULTILINE)
    body = next(part for part in section if part.startswith(title))
    return [line.split("#")[0].split()[1:] for line in body.splitlines() if line.startswith("    mess-compile")]


def run(folder: Path, arguments: list[str]) -> str:
    done = subprocess.run([PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with what its commands without data leave behind."""
    folder = tmp_path_factory.mktemp("examples") / "camvid"
    kept = subprocess.run(["git", "ls-files", "."], cwd=CAMVID, capture_output=True, text=True, check=True)
    for name in kept.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CAMVID / name, folder / name)
    lines = commands(CAMVID / "README.md", "Without the data")
    for arguments in lines:
        run(folder, [*arguments, *(ANY_SPEED if arguments[0] == "verify" else ())])
    assert [line[0] for line in lines] == ["export", "profile", "search", "bundle", "verify"]
    return folder


def test_the_camvid_example_works_without_the_data(camvid: Path) -> None:
    plan = json.loads((camvid / "plans" / "host.json").read_text())["plan"]
    assert plan["predicted"]["miou"] >= plan["baseline"]["miou"] - 1
    assert plan["predicted"]["latency_ms"] < plan["baseline"]["latency_ms"]
    assert plan["predicted"]["images"] == 50


def test_the_camvid_network_is_the_one_promised(camvid: Path) -> None:
    shown = run(camvid, ["inspect", "graphs", "--json"])
    graphs = json.loads(shown)
    early = {head["exit_point"] for head in graphs["heads"]} - {len(graphs["exit_points"])}
    assert len(early) == 4
    assert sum(head["exit_point"] in early for head in graphs["heads"]) >= 10
    assert graphs["input_hw"] == [360, 480]
    assert sum(path.stat().st_size for path in (camvid / "candidate").iterdir()) <= 25e6


def test_the_final_exit_is_worth_leaving_early_from(camvid: Path) -> None:
    shown = run(camvid, ["inspect", "statistics", "--json"])
    heads = {head["name"]: head["miou"] for head in json.loads(shown)["heads"]}
    assert heads["exit5.fcn-crm1-b0"] >= 62


def test_the_example_keeps_no_image_and_no_place_of_its_makers() -> None:
    kept = subprocess.run(["git", "ls-files", "."], cwd=EXAMPLES, capture_output=True, text=True, check=True)
    names = kept.stdout.splitlines()
    assert not [name for name in names if name.endswith((".jpg", ".jpeg"))]
    for name in names:
        if name.endswith((".json", ".md")):
            assert "/work" not in (EXAMPLES / name).read_text()
