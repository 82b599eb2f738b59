"""Reads the environment that torchrun and SLURM give to the processes that they start."""

from __future__ import annotations

import os

from mess_compile.runtime.base.errors import InputError


def counts() -> tuple[int, int] | None:
    """Processes on each machine, and machines; None unless a launcher started this. Raises InputError."""
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            devices = int(os.environ["LOCAL_WORLD_SIZE"])
            return devices, int(os.environ["WORLD_SIZE"]) // devices
        if "SLURM_PROCID" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1:
            return int(os.environ["SLURM_NTASKS_PER_NODE"]), int(os.environ["SLURM_NNODES"])
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"the launcher's variables do not give the number of processes ({error}): start by `torchrun "
            "--nproc-per-node N`, or by `srun --nodes M --ntasks-per-node N`"
        ) from error
    return None


def is_child() -> bool:
    """Whether this process is not the first on its machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0"


def is_first() -> bool:
    """Whether this process is the first on all machines."""
    return not is_child() and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def started_this() -> bool:
    """Whether a launcher started this process, so that it ends the other processes, too."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ
