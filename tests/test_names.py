"""Names that are not UTF-8, or that the terminal cannot show, cost their user no result and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import small_network

STRANGE, FOREIGN = os.fsdecode(b"caf\xe9.png"), "gr\u00f6\u00dfe-\u732b.png"
TERMINALS = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "no locale": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, and frames of which one is damaged."""
    folder = tmp_path_factory.mktemp("names")
    small_network.write_bundle(folder / "street.mess")
    (folder / "frames").mkdir()
    for name in (STRANGE, FOREIGN):
        Image.fromarray(small_network.frame(1)).save(folder / "frames" / name)
    (folder / "frames" / f"bad-{STRANGE}").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    return folder


def ended(place: Path, terminal: dict[str, str], *words: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([sys.executable, *words], cwd=place, env={**os.environ, **terminal}, capture_output=True)
    assert b"Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("terminal", TERMINALS.values(), ids=TERMINALS)
def test_the_program_in_the_bundle_labels_all_that_can_be_read(
    place: Path, tmp_path: Path, terminal: dict[str, str]
) -> None:
    frames = [os.path.join("frames", name) for name in sorted(os.listdir(place / "frames"))]
    done = ended(place, terminal, "street.mess", "run", *frames, "-o", str(tmp_path))
    assert (done.returncode, done.stdout.count(b": stage ")) == (1, 2)
    assert b"error: 1 of 3 pictures failed" in done.stderr
    labels = {path.name for path in tmp_path.glob("*.labels.png")}
    assert labels == {f"{name[:-4]}.labels.png" for name in (STRANGE, FOREIGN)}


def test_the_command_labels_all_that_can_be_read_and_its_json_names_them(place: Path, tmp_path: Path) -> None:
    words = ("-m", "mess_compile", "run", "street.mess", "frames", "-o", str(tmp_path))
    done = ended(place, TERMINALS["ASCII"], *words)
    assert (done.returncode, done.stdout.count(b": stage ")) == (1, 2)
    told = json.loads(ended(place, TERMINALS["UTF-8"], *words, "--json").stdout)
    assert {Path(each["image"]).name for each in told["images"]} == {STRANGE, FOREIGN}
    (failure,) = told["failed"]
    assert (Path(failure["source"]).name, failure["frames"]) == (f"bad-{STRANGE}", [])
    assert "cannot be read" in failure["error"]
