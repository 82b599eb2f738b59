"""Several processes must train the network that one would, and lose at most an epoch when one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from mess_compile.cli.interrupts import AFTER, NOTHING
from mess_compile.data import scenes
from mess_compile.data.dataset import open_dataset
from mess_compile.nets.checkpoint import load_candidate
from mess_compile.nets.network import Architecture, heads_from_names, with_final_head
from mess_compile.reporter import Reporter
from mess_compile.runtime.base.errors import InputError
from mess_compile.training import loop, parallel
from mess_compile.training.parallel import Machines
from mess_compile.training.recipe import Recipe
from mess_compile.training.train import TrainingJob, train

HW = (48, 64)
TRAIN = ["train", "--data", "data", "--input", "48x64", "--width", "0.25", "--exits", "features.6,features.17"]
TRAIN += ["--heads", "fcn-crm1-b0", "--batch", "8", "--accelerator", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scenes.write_scenes(tmp_path / "data", {"train": 16, "val": 3}, HW)
    return tmp_path


def started(folder: Path, *arguments: str, process_group: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mess_compile", "-C", str(folder), *TRAIN, *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=process_group,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def trained(folder: Path, *arguments: str) -> tuple[dict[str, torch.Tensor], str]:
    output = finished(started(folder, *arguments))
    state = load_candidate(folder / "candidate").state_dict()
    (folder / "candidate" / "network.json").unlink()
    return state, output


class Enough(BaseException):
    pass


def first_gradient(folder: str, name: str, pieces: int = 1) -> None:
    """Train until the first step, without dropout and norms, and save the gradient that the optimiser is given."""

    def stop(optimiser: torch.optim.Optimizer, *rest: object) -> None:
        found = [p.grad for group in optimiser.param_groups for p in group["params"]]
        torch.save(torch.cat([grad.flatten() for grad in found if grad is not None]), f"{folder}/{name}.pt")
        raise Enough

    torch.optim.AdamW.step = stop  # type: ignore[assignment, method-assign]
    nn.functional.dropout = lambda x, *rest, **more: x  # type: ignore[assignment]
    loop.synchronise_norms = lambda module: None  # type: ignore[assignment]
    nn.BatchNorm2d.forward = lambda norm, x: 3 * x  # type: ignore[assignment, method-assign]
    data = open_dataset(Path(folder) / "data", "train")
    blocks = ("features.6", "features.17")
    heads = with_final_head(heads_from_names(("fcn-crm1-b0",), 2), 2)
    shape = Architecture("mobilenetv2", data.classes.names, data.classes.colours, HW, blocks, heads, width=0.25)
    with suppress(Enough):
        machines = Machines(accumulate=pieces, threads=1)  # more round otherwise
        train(
            TrainingJob(shape, data, data, Path(folder) / "candidate", Recipe(batch=8), machines=machines),
            Reporter(note=print),
        )


def as_torchrun_starts_it(rank: int, port: int, folder: str) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in variables.items()})
    first_gradient(folder, str(rank))


def alone(rank: int, folder: str) -> None:
    first_gradient(folder, "alone")
    first_gradient(folder, "pieces", pieces=4)


def spawned(worker: Callable[..., None], arguments: tuple[object, ...], processes: int) -> None:
    """Processes forked from one that has this module, and so PyTorch, loaded."""
    method = "forkserver"
    torch.multiprocessing.get_context(method).set_forkserver_preload(["torch._dynamo", __name__])
    torch.multiprocessing.start_processes(worker, arguments, nprocs=processes, start_method=method)  # type: ignore[no-untyped-call]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_processes_and_pieces_step_by_the_gradient_of_the_whole_batch(folder: Path) -> None:
    """Crops differ in how much of them is labelled: the mean of means over parts is 10 % from the mean of the whole."""
    spawned(alone, (str(folder),), 1)
    spawned(as_torchrun_starts_it, (free_port(), str(folder)), 2)
    whole, *parts = (torch.load(folder / f"{name}.pt") for name in ("alone", "0", "1", "pieces"))
    assert whole.norm() > 0
    assert torch.equal(parts[0], parts[1])
    for part in parts:
        assert (part - whole).norm() < 1e-4 * whole.norm()  # the order of additions, made large by many layers


@pytest.mark.slow
def test_only_one_of_two_processes_speaks(folder: Path) -> None:
    _, output = trained(folder, "--epochs", "1", "1", "--devices", "2")
    assert "2 batches of 8 per epoch, 2 processes on cpu" in output
    for words in ("training on 16 images", "stage 1 epoch 1/1", "stage 2 group 1/1 epoch 1/1", "mIoU on val", "hint:"):
        assert output.count(words) == 1 + (words == "mIoU on val"), words


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(words):
            return


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the other process in /proc")
LONG = ("--epochs", "4", "1", "--devices", "2")


@NEEDS_PROC
@pytest.mark.slow
def test_a_killed_process_is_one_clear_line_and_the_same_command_continues(folder: Path) -> None:
    process = started(folder, *LONG)
    until(process, "stage 1 epoch 2")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert errors.startswith("error: one of the processes that share the work has ended: run the same command again")
    assert errors.count("\n") == 1, errors
    output = finished(started(folder, *LONG))
    assert "continuing stage 1 after epoch" in output
    assert load_candidate(folder / "candidate").candidate.heads


@NEEDS_PROC
def test_processes_end_when_the_first_one_is_killed(folder: Path) -> None:
    process = started(folder, *LONG)
    until(process, "stage 1 epoch 1")
    (child,) = children(process.pid)
    process.kill()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not is_running(child)


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [None, 0.0, 0.4, 1.5])
def test_ctrl_c_is_said_once_while_they_start_as_when_they_train(folder: Path, after_s: float | None) -> None:
    """A terminal sends it to every process: to the second one, too, whether it is just born or at work (None)."""
    process = started(folder, *LONG, process_group=True)
    if after_s is None:
        until(process, "stage 1 epoch 1")
    else:
        while not children(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(after_s)
    others = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert said in (f"stopped: {AFTER['train']}\n", f"stopped: {NOTHING}\n"), "by what it had finished by then"
    assert not any(map(is_running, others))


SHELL = """
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdout=open("log", "w"), stderr=subprocess.STDOUT)
while "stage 1 epoch 1/" not in open("log").read():
    time.sleep(0.1)
"""


def test_a_training_alone_goes_on_when_the_shell_that_started_it_is_gone(folder: Path) -> None:
    command = [sys.executable, "-m", "mess_compile", "-C", str(folder), *TRAIN, "--epochs", "12", "1"]
    subprocess.run([sys.executable, "-c", SHELL, *command], cwd=folder, env=ENVIRONMENT, timeout=60)
    deadline = time.monotonic() + 60
    while not (folder / "candidate" / "network.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert load_candidate(folder / "candidate").candidate.heads


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_said_once(folder: Path) -> None:
    process = started(folder, *LONG, "--batch", "3")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("error: a batch of 3 images cannot be shared by 2 processes")
    assert errors.count("\n") == 1


def test_a_damaged_image_is_said_once_whoever_meets_it(folder: Path) -> None:
    for image in (folder / "data" / "train" / "images").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    process = started(folder, *LONG)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "cannot be read: " in errors
    assert "has ended" not in errors


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_learns_the_same(folder: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        _, output = trained(folder, "--epochs", "1", "1", "--learning-rate", "1e-4", "--precision", precision)
        line = next(line for line in output.splitlines() if line.startswith("stage 1 epoch 1"))
        losses.append([float(word) for word in line.split("exit ")[1].split()[:2]])
    assert losses[0] != losses[1] or "bf16-mixed" in output
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    ("variables", "machines", "words"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Machines("cpu"), "--ntasks-per-node"),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "two"}, Machines("cpu"), "torchrun"),
        ({}, Machines("cpu", nodes=2), "need a launcher"),
    ],
)
def test_a_launch_that_cannot_work_says_how_it_would(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], machines: Machines, words: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        parallel.launch(machines)


def normalise_half(rank: int, port: int, folder: str) -> None:
    """One of two processes that normalise half a batch each."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images = torch.load(f"{folder}/images.pt")
    norm = nn.Sequential(nn.BatchNorm2d(3))
    parallel.synchronise_norms(norm)
    half = images[rank::2].clone().requires_grad_()
    made = norm(half)
    (made.square().sum() * (rank + 1)).backward()
    torch.save((made.detach(), half.grad, norm[0].running_mean, norm[0].running_var), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()  # its threads must not outlive Python


def test_synchronised_norms_are_batchnorm_over_all_images(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 4, 5) * 3 + 1
    torch.save(images, tmp_path / "images.pt")
    spawned(normalise_half, (free_port(), str(tmp_path)), 2)
    norm = nn.BatchNorm2d(3)
    whole = images.clone().requires_grad_()
    made = norm(whole)
    (made[0::2].square().sum() + 2 * made[1::2].square().sum()).backward()
    for rank in range(2):
        part, gradient, mean, variance = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(part, made[rank::2], atol=1e-5)
        assert whole.grad is not None
        assert torch.allclose(gradient, whole.grad[rank::2], atol=1e-5)
        assert torch.allclose(mean, norm.running_mean, atol=1e-6)
        assert torch.allclose(variance, norm.running_var, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"devices": 0}, "positive"),
        ({"precision": "int4"}, "int4"),
        ({"accelerator": "abacus"}, "abacus"),
        ({"accumulate": 0}, "positive"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000"),
    ],
)
def test_impossible_machines_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Machines(**wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(InputError, match="1 CUDA devices are requested, but this machine has 0"):
        parallel.launch(Machines(accelerator="cuda"))


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch computes with two threads by itself, and a container's limit grants one core."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel.cores, "cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "variable", "threads"),
    [(None, None, 1), (None, "2", 2), (4, "2", 4), (1, None, 1)],
    ids=["the cores there are", "OMP_NUM_THREADS", "--threads", "one"],
)
def test_a_training_computes_with_the_threads_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, asked: int | None, variable: str | None, threads: int
) -> None:
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    machines = Machines("cpu", threads=asked)
    fabric = parallel.launch(machines)
    assert torch.get_num_threads() == threads
    assert parallel.readers(fabric, machines) == max(1, threads // 2), "decoding leaves cores to what computes"
