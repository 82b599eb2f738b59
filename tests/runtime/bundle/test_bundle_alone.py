"""The device has Python, numpy and an engine library, and nothing of ours: the bundle must bring the rest."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import venv
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mess_compile.runtime import __main__ as program
from tests import commands, small_network

NEEDED = ("numpy", "numpy.libs", "onnxruntime")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment of its own that holds numpy and ONNX Runtime and no other package."""
    folder = tmp_path_factory.mktemp("device") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    place = next((folder / "lib").glob("python3*")) / "site-packages"
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    packages = Path(spec.origin).parent.parent
    for name in NEEDED:
        if (packages / name).exists():
            (place / name).symlink_to(packages / name)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "street.mess"
    small_network.write_bundle(path)
    return path


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *map(str, arguments)], capture_output=True, text=True, timeout=120, env={}, cwd="/", check=False
    )


def test_the_environment_has_nothing_of_ours(python: Path) -> None:
    for name in ("mess_compile", "torch", "onnx", "click", "PIL"):
        assert "No module named" in run(python, "-c", f"import {name}").stderr


def saved(folder: Path, seed: int, hw: tuple[int, int] = small_network.HW) -> NDArray[np.uint8]:
    frame = small_network.frame(seed, hw)
    Image.fromarray(frame).save(folder / f"{seed}.png")
    return frame


def test_the_bundle_segments_pictures_there(python: Path, bundle: Path, tmp_path: Path) -> None:
    frames = [saved(tmp_path, seed) for seed in range(3)]
    pictures = [tmp_path / f"{seed}.png" for seed in range(3)]
    done = run(python, bundle, "run", *pictures, "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    for seed, frame in enumerate(frames):
        results = small_network.expected(frame)
        counts, labels = results[0] if results[0][0][2] >= 18 else results[1]
        stage, needs = (1, " (needs 75 %)") if results[0][0][2] >= 18 else (2, "")
        assert f"{seed}.png: stage {stage}, confident cells {100 * counts[2] / 24:.0f} %{needs}, " in done.stdout
        picture = Image.open(tmp_path / "out" / f"{seed}.labels.png")
        np.testing.assert_array_equal(np.asarray(picture), labels)
        palette = picture.getpalette()
        assert palette is not None
        assert palette[3:9] == [128, 64, 0, 0, 0, 255]
        overlay = np.asarray(Image.open(tmp_path / "out" / f"{seed}.overlay.png")).astype(int)
        colours = np.array([(0, 0, 0), (128, 64, 0), (0, 0, 255)])[labels]
        assert np.abs(overlay - (frame + colours) / 2).max() <= 1


def test_both_run_commands_read_the_same_pictures(python: Path, bundle: Path, tmp_path: Path) -> None:
    """There Pillow is not installed, here it is."""
    frame = Image.fromarray(small_network.frame(5))
    pictures = {
        "palette of 4 bits": frame.quantize(16),
        "palette of 1 bit": frame.quantize(2),
        "grey with alpha": frame.convert("LA"),
        "black and white": frame.convert("1"),
        "grey of 16 bits": Image.fromarray(np.asarray(frame.convert("L")).astype(np.uint16) * 257),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in pictures]
    there = run(python, bundle, "run", *paths, "-o", tmp_path / "there")
    assert (there.returncode, there.stderr) == (0, "")
    commands.done("run", bundle, *paths, "-o", tmp_path / "here")
    for name in pictures:
        for kind in ("labels", "overlay"):
            drawn = [np.asarray(Image.open(tmp_path / place / f"{name}.{kind}.png")) for place in ("here", "there")]
            np.testing.assert_array_equal(*drawn, name)


def test_the_bundle_verifies_itself_there(python: Path, bundle: Path) -> None:
    done = run(python, bundle, "verify")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 5
    assert "latency" in done.stdout


def test_a_bundle_that_is_too_slow_there_says_so(python: Path, bundle: Path) -> None:
    done = run(python, bundle, "verify", "--latency-factor", "0.000001")
    assert done.returncode == 1
    assert "FAILED  latency: " in done.stdout
    assert "35.00 ms in the plan" in done.stdout  # one frame leaves at exit 1 after 30 ms, one at exit 2 after 40 ms


def test_under_a_deadline_every_exit_reports_there_and_misses_are_told(
    python: Path, bundle: Path, tmp_path: Path
) -> None:
    frame = saved(tmp_path, 1)
    done = run(python, bundle, "run", tmp_path / "1.png", "-o", tmp_path, "--deadline", "60000 ms")
    assert (done.returncode, done.stderr) == (0, "")
    first, last, legend, told = done.stdout.splitlines()
    assert legend.startswith("stage: an exit of the plan")
    (counts, _), (deeper, labels) = small_network.expected(frame)
    assert f"1.png: stage 1, confident cells {100 * counts[2] / 24:.0f} %, " in first, (
        "no share is needed: time decides"
    )
    assert f"1.png: stage 2, confident cells {100 * deeper[2] / 24:.0f} %, " in last
    assert "too late" not in first + last
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "1.labels.png")), labels)
    assert told == "deadline 60000 ms: of 1 pictures the first result came too late for 0, a later one for 0"
    first, _, told = run(
        python, bundle, "run", tmp_path / "1.png", "-o", tmp_path, "--deadline", ".001ms"
    ).stdout.splitlines()
    assert "stage 1" in first
    assert ", too late -> " in first
    assert told == "deadline 0.001 ms: of 1 pictures the first result came too late for 1, a later one for 0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("verify", "--latency-factor", "abc"),
            "argument --latency-factor: 'abc' is not a number above 0, such as 1.25",
        ),
        (("verify", "--latency-factor", "nan"), "argument --latency-factor: 'nan' is not a number above 0"),
        (("verify", "--latency-factor", "0"), "argument --latency-factor: '0' is not a number above 0"),
        (("run", "a.png", "--deadline", "20"), "argument --deadline: '20' is not milliseconds, such as 20ms"),
        (("run", "a.png", "--deadline=-1ms"), "argument --deadline: '-1ms' is not milliseconds, such as 20ms"),
        (("run", "a.png", "--deadline", "0ms"), "argument --deadline: '0ms' is not milliseconds, such as 20ms"),
        (("run", "a.png", "--deadline", "1ms", "--operating-point", "x"), "not allowed with argument"),
    ],
)
def test_wrong_usage_names_the_option_and_what_it_takes(
    bundle: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        program.main(list(arguments), bundle)
    assert raised.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "stopped"),
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device", "/tmp/x"), r"the disk is full \(/tmp/x\): free some space"),
        (OSError(13, "Permission denied", "/tmp/x"), r"Permission denied \(/tmp/x\)"),
    ],
)
def test_what_breaks_off_the_program_is_one_line_and_exit_code_1(
    bundle: Path, error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(program, "verify_bundle", broken)
    assert program.main(["verify"], bundle) == 1
    assert re.fullmatch(rf"error: .*{words}.*\n", capsys.readouterr().err)


def test_ctrl_c_there_is_one_line(python: Path, bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.png")
    command = [python, str(bundle), "run", str(tmp_path / "endless.png"), "-o", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={}) as process:
        writer = os.open(tmp_path / "endless.png", os.O_WRONLY)  # waits until the picture is being read
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        os.close(writer)
    assert (process.returncode, output, errors) == (1, "", "error: stopped; pictures that were written are whole\n")


def test_output_that_nobody_takes_is_no_traceback(python: Path, bundle: Path) -> None:
    def told(sink: int | IO[bytes]) -> tuple[int, str]:
        done = subprocess.run(
            [python, bundle, "info"], stdout=sink, stderr=subprocess.PIPE, text=True, env={}, check=False
        )
        return done.returncode, done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    assert told(writer) == (1, "")
    os.close(writer)
    with open("/dev/full", "wb") as full:
        assert told(full) == (1, "error: the disk is full: free some space and run the same command again\n")


def test_what_is_in_it_and_for_whom_is_told_there(python: Path, bundle: Path) -> None:
    shown = run(python, bundle, "info").stdout
    assert "street: tiny, 3 classes, 8 x 12" in shown
    assert "operating point default: 1.50 ms, 60.00 % mIoU" in shown
    with zipfile.ZipFile(bundle) as content:
        readme = content.read("README.txt").decode()
    for words in (
        "python3 street.mess verify",
        "Classes, by label from 0: sky, road, car.",
        "measured on host, cores 2",
    ):
        assert words in readme


def test_an_unpacked_bundle_runs_there_and_stays_as_it_is(python: Path, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "street"
    with zipfile.ZipFile(bundle) as content:
        content.extractall(folder)
    before = sorted(path for path in folder.rglob("*"))
    for _ in range(2):
        done = run(python, folder, "verify")
        assert (done.returncode, done.stderr) == (0, "")
    after = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    assert after == before


def test_a_program_imports_the_runtime_from_the_bundle(python: Path, bundle: Path, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(bundle)!r})\n"
        "from mess_compile import runtime\nimport numpy as np\n"
        f"with runtime.load({str(bundle)!r}) as cascade:\n"
        f"    np.save({str(tmp_path / 'labels.npy')!r}, cascade(np.load({str(tmp_path / 'frame.npy')!r})).labels)\n"
    )
    frame = small_network.frame(1)
    np.save(tmp_path / "frame.npy", frame)
    done = run(python, "-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    results = small_network.expected(frame)
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy"), results[0 if results[0][0][2] >= 18 else 1][1])


def test_what_goes_wrong_there_is_one_line(python: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    saved(tmp_path, 1)
    (tmp_path / "more").mkdir()
    saved(tmp_path / "more", 1)
    damaged = tmp_path / "damaged.mess"
    damaged.write_bytes(bundle.read_bytes()[:-100] + bytes(100))
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((bundle, "run", tmp_path / "a.jpg"), "need Pillow: run `pip install Pillow`"),
        ((bundle, "run", tmp_path / "gone.png"), "gone.png does not exist"),
        ((bundle, "run", tmp_path / "1.png", tmp_path / "more" / "1.png"), "two images are named 1"),
        ((bundle, "run", tmp_path / "1.png", "--operating-point", "fast"), "no operating point 'fast'; it has default"),
        ((bundle, "run", tmp_path / "1.png", "--target", "xavier"), "no plan for the target xavier"),
        ((bundle, "verify", "--require-signature"), "--allowed-signers FILE"),
    ]
    for arguments, words in cases:
        done = run(python, *arguments)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert words in done.stderr
    assert run(python, damaged, "verify").returncode == 1


@pytest.mark.slow
def test_it_runs_in_an_environment_made_by_pip(bundle: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "numpy", "onnxruntime"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=600, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install here: {installed.stderr[-200:]}")
    saved(tmp_path, 1, (20, 31))
    done = run(python, bundle, "run", tmp_path / "1.png", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "1.labels.png")).shape == (20, 31)
