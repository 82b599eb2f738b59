"""Distributes one training over machines: Lightning Fabric, synchronised BatchNorm, and errors for lost processes."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import distributed, nn

from mess_compile import cores, launcher
from mess_compile.runtime.base.checks import check_threads
from mess_compile.runtime.base.errors import InputError

ACCELERATORS = ("auto", "cpu", "cuda")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
_GONE = "one of the processes that share the work has ended: run the same command again, it continues where they were"
_failing = threading.Event()
"""Set by the main thread when a collective operation failed: it reports that itself."""
_LOST = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "socket", "timed out")
_MOST_READERS = 8
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_HUGEPAGE, _HUGE_PAGE, _HUGE_BYTES = 14, 2 << 20, 4 << 30


@dataclass(frozen=True)
class Machines:
    """Where to train: `devices` processes on each of `nodes` machines; every batch in `accumulate` pieces.

    Under torchrun or SLURM, the launcher's counts apply instead. `threads` are the CPU threads of each process; None
    means as many as OMP_NUM_THREADS says, otherwise an equal share of the cores.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: str = "fp32"
    accumulate: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.accelerator not in ACCELERATORS or self.precision not in PRECISIONS:
            raise InputError(
                f"accelerator {self.accelerator!r} is one of {ACCELERATORS}, precision {self.precision!r} one of "
                f"{tuple(PRECISIONS)}"
            )
        if min(self.devices, self.nodes, self.accumulate) < 1:
            raise InputError(
                f"devices {self.devices}, nodes {self.nodes} and accumulate {self.accumulate} must be positive"
            )
        check_threads(self.threads)


def launch(machines: Machines) -> Fabric:
    """Join the other processes; starts those of this machine unless a launcher has. Raises InputError."""
    devices, nodes = launcher.counts() or (machines.devices, machines.nodes)
    if nodes > 1 and not launcher.started_this():
        raise InputError(f"{nodes} nodes need a launcher to find each other: start this command by torchrun or srun")
    if machines.accelerator != "cpu" and (machines.accelerator == "cuda" or torch.cuda.is_available()):
        _check_devices(devices)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    threads = _threads_each(machines.threads, devices)
    try:
        fabric = Fabric(
            accelerator=machines.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision=PRECISIONS[machines.precision],  # type: ignore[arg-type]
        )
        _shield(fabric)
        with _interrupted_together(fabric):
            fabric.launch()
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise InputError(f"{devices} x {nodes} processes could not be started or joined: {error}") from error
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if fabric.device.type == "cpu":
        _keep_freed_memory()
    if fabric.world_size > 1:
        _watch_in_its_place(_children(fabric))
        atexit.register(_leave)
    return fabric


def _threads_each(asked: int | None, processes: int) -> int:
    """The threads of each of the processes on this machine; fixed, since sums round by their number.

    torch's own default ignores a cgroup's limit and the other processes, but respects the user's OMP_NUM_THREADS.
    """
    if asked is not None:
        return asked
    own = torch.get_num_threads()
    return own if cores.threads_are_set() else max(1, min(own, cores.cores() // processes))


def readers(fabric: Fabric, machines: Machines) -> int:
    """The threads of this process that decode and augment: few beside a CPU that computes, all beside a GPU."""
    if fabric.device.type == "cpu":
        return max(1, min(_MOST_READERS, torch.get_num_threads() // 2))
    processes, _ = launcher.counts() or (machines.devices, machines.nodes)
    return max(1, min(_MOST_READERS, machines.threads or cores.cores() // processes))


def _leave() -> None:
    """End the library's threads first: one that releases a tensor while Python ends aborts the process."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _check_devices(devices: int) -> None:
    count = torch.cuda.device_count()
    if count < devices:
        raise InputError(
            f"{devices} CUDA devices are requested, but this machine has {count}: change --devices, or "
            "use --accelerator cpu"
        )


def _children(fabric: Fabric) -> list[subprocess.Popen[bytes]]:
    """The processes that this one started for its machine: none if a launcher or another process started us."""
    return list(getattr(fabric.strategy.launcher, "procs", []))


def _shield(fabric: Fabric) -> None:
    """Let processes that this one starts inherit blocked interrupts: a terminal sends interrupts to every process, and
    the first one reports them.
    """
    starter = fabric.strategy.launcher
    start = getattr(starter, "_call_children_scripts", None)
    if start is None:
        return

    def started() -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    starter._call_children_scripts = started  # type: ignore[union-attr]


@contextmanager
def _interrupted_together(fabric: Fabric) -> Iterator[None]:
    """End the other processes first: their libraries would complain about a missing one."""
    try:
        yield
    except KeyboardInterrupt:
        for child in _children(fabric):
            child.kill()
        raise


def _watch_in_its_place(children: list[subprocess.Popen[bytes]]) -> None:
    """Watch the other processes; Fabric's own watcher would kill this one without a message."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]  # it ends when it has nobody to watch
    threading.Thread(target=_watch, args=(children,), daemon=True).start()


def _watch(children: list[subprocess.Popen[bytes]]) -> None:
    """End with the others: a process waits for ever for one that has ended, and outlives the one that started it."""
    parent = os.getppid()
    while True:
        time.sleep(0.5)
        if not children and os.getppid() != parent:
            os._exit(1)
        if any(child.poll() for child in children):
            break
    if not _failing.wait(timeout=5) and not _has_spoken(children):  # a failing collective operation reports first
        print(f"error: {_GONE}", file=sys.stderr, flush=True)
    if _failing.is_set():
        return  # the main thread ends by itself
    for child in children:
        child.kill()
    os._exit(1)


def _has_spoken(children: list[subprocess.Popen[bytes]]) -> bool:
    """Whether a child refused its input and has printed the error."""
    return any(child.poll() == 1 for child in children)


def _keep_freed_memory() -> None:
    """Make malloc reuse freed memory: feature maps returned to the system are paged in again at every step, which makes
    training on large images three times slower. Only glibc supports it; elsewhere nothing is done.
    """
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
        _use_huge_pages(library)
    except (AttributeError, OSError):
        return


def _use_huge_pages(library: ctypes.CDLL) -> None:
    """Ask for huge pages in the part of the heap that a training will use: a tenth less time, for what is a hint."""
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes, library.madvise.argtypes = (
        [ctypes.c_void_p],
        [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    )
    block = library.malloc(_HUGE_BYTES)  # untouched, so it takes no memory; the heap keeps it when it is freed
    if block:
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        library.madvise(start, (block + _HUGE_BYTES - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        library.free(block)


class _SumOverProcesses(torch.autograd.Function):
    """Every process adds to the sum, and each gets the gradient of every process's sum."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


def summed_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, differentiable."""
    total: torch.Tensor = _SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return total


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the images of all processes. torch's own works on GPUs only; names of the state are the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            evaluated: torch.Tensor = super().forward(x)
            return evaluated
        wide = x.float()
        count = summed_over_processes(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = summed_over_processes(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = summed_over_processes(centred.square().sum((0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach(), float(count))
        scale = self.weight * (variance + self.eps).rsqrt()
        normal: torch.Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normal.to(x.dtype)

    def _remember(self, mean: torch.Tensor, variance: torch.Tensor, count: float) -> None:
        momentum = self.momentum if self.momentum is not None else 0.1
        assert self.running_mean is not None
        assert self.running_var is not None
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * count / max(1.0, count - 1), momentum)


def synchronise_norms(module: nn.Module) -> None:
    """Turn every BatchNorm2d below `module` into a SynchronisedBatchNorm, when there is more than one process."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SynchronisedBatchNorm


def average_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes; all of them have gradients of the same parameters.

    Called once per step, after the last piece of a batch: the heads that take part change from step to step.
    """
    if fabric.world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= fabric.world_size
    for gradient, values in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(values.view_as(gradient))


def summed(fabric: Fabric, value: float) -> float:
    """The sum of `value` over all processes."""
    if fabric.world_size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=fabric.device)
    distributed.all_reduce(total)
    return float(total)


@contextmanager
def lost_process_named(fabric: Fabric) -> Iterator[None]:
    """Turns the failure of a collective operation into one InputError, or into a silent end if another process has
    reported the reason.
    """
    try:
        with _interrupted_together(fabric):
            yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not any(word in str(error).lower() for word in _LOST):
            raise
        _failing.set()
        children = _children(fabric)
        if children:
            time.sleep(1)  # until the child that failed has ended
        if _has_spoken(children) or (fabric.global_rank and not launcher.started_this()):
            os._exit(1)  # at once: threads that the library leaves running would complain
        raise InputError(f"{_GONE} ({str(error).splitlines()[0][:120]})") from error


@contextmanager
def reported_by_first(fabric: Fabric) -> Iterator[None]:
    """For errors that every process meets: the first one reports them, the others end."""
    try:
        yield
    except InputError:
        if fabric.global_rank:
            os._exit(0)
        raise


def refuse_if_any(fabric: Fabric, wrong: bool, message: Callable[[], str]) -> None:
    """Raises InputError in the first process if something is `wrong` in any, and ends the others; all must call it."""
    if not summed(fabric, float(wrong)):
        return
    if fabric.global_rank:
        sys.exit(0)
    raise InputError(message())
