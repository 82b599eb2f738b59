"""One training on many machines: Lightning Fabric, synchronised BatchNorm, and what to say when a process is gone."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import distributed, nn

from mess_compile.runtime.errors import InputError

ACCELERATORS = ("auto", "cpu", "cuda")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
_LOST = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "socket", "timed out")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Machines:
    """Where to train: `devices` processes on each of `nodes` machines; every batch in `accumulate` pieces.

    Started by torchrun or SLURM, the launcher's counts are taken instead.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: str = "fp32"
    accumulate: int = 1

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


def launch(machines: Machines) -> Fabric:
    """Join the other processes, starting those of this machine when nobody else has. Raises InputError."""
    devices, nodes = machines.devices, machines.nodes
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    _check_available(machines.accelerator, devices)
    many = devices * nodes > 1
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=machines.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if many else "auto",
        precision=PRECISIONS[machines.precision],  # type: ignore[arg-type]
    )
    fabric.launch()
    if fabric.device.type == "cpu":
        _keep_freed_memory()
    return fabric


def _check_available(accelerator: str, devices: int) -> None:
    count = torch.cuda.device_count()
    if accelerator == "cuda" and count < devices:
        raise InputError(f"--accelerator cuda --devices {devices}: this machine shows {count} CUDA devices")


def _keep_freed_memory() -> None:
    """Have malloc keep what is freed: feature maps given back to the system are paged in anew at every step, which
    makes training on large images three times slower. Only glibc knows how; elsewhere nothing is done."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)
    except (AttributeError, OSError):
        return


class _SumOverProcesses(torch.autograd.Function):
    """Every process adds to the sum, and the gradient of every process's sum comes back to each."""

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

    Once a step, after the last piece of a batch: which heads take part changes from step to step.
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
    total = fabric.all_reduce(torch.tensor(value, dtype=torch.float64), reduce_op="sum")
    return float(total)  # type: ignore[arg-type]


@contextmanager
def lost_process_named(fabric: Fabric, remedy: str) -> Iterator[None]:
    """Turns the failure of a collective operation into one InputError ending in `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not any(word in str(error).lower() for word in _LOST):
            raise
        raise InputError(f"a process of the {fabric.world_size} that train together is gone: {remedy}") from error
