"""Chooses which of a bundle's plans this machine runs."""

from __future__ import annotations

from typing import Iterator, List, Optional, Tuple

from mess_compile.runtime.base.errors import EngineError, InputError
from mess_compile.runtime.bundle.manifest import BundlePlan, DeviceMatch, Manifest
from mess_compile.runtime.engines.engine import LIBRARIES, Library, open_library
from mess_compile.runtime.machine import machine
from mess_compile.runtime.machine.device_names import stored_name
from mess_compile.runtime.machine.machine import Machine, dotted


def matching_plans(manifest: Manifest, target: Optional[str], library: Optional[Library]) -> List[BundlePlan]:
    """Plans for `target`, such as "xavier" or "xavier:fp16"; without one, plans for this machine and for a library of
    this release (or for `library`), those for a specific device first.

    Raises InputError when there are none.
    """
    known = LIBRARIES if library is None else (library.name,)
    if target is None:
        plans = [plan for plan in manifest.plans if plan.library in known]
    else:
        plans = named_plans(manifest.plans, target)
    if not plans:
        wanted = f"the target {target}" if target is not None else f"a library of {', '.join(known)}"
        raise InputError(f"bundle {manifest.name} has no plan for {wanted}; it has {_listed(manifest.plans)}")
    return _for_this_machine(plans, manifest.name) if len({plan.target for plan in plans}) > 1 else plans


def named_plans(plans: Tuple[BundlePlan, ...], target: str) -> List[BundlePlan]:
    """The plan with that name, or all of a target; fp16 also names a recipe such as fp16-1f2e3d, and
    cpu the host."""
    exactly = [plan for plan in plans if plan.name == target]
    about = [p for p in plans if target in (p.target, f"{p.target}:{p.precision.partition('-')[0]}")]
    if not exactly and not about and stored_name(target) != target:
        return named_plans(plans, stored_name(target))
    return exactly or about


def _listed(plans: Tuple[BundlePlan, ...]) -> str:
    return ", ".join(f"{plan.name} ({plan.library})" for plan in plans)


def _for_this_machine(plans: List[BundlePlan], bundle: str) -> List[BundlePlan]:
    here = machine.this_machine()
    differences = {plan.target: list(device_differences(plan.device, here)) for plan in plans}
    fitting = [plan for plan in plans if not differences[plan.target]]
    if not fitting:
        found = "; ".join(f"not {target}: {', '.join(words)}" for target, words in differences.items())
        raise InputError(f"bundle {bundle} has no plan for this machine ({found}): name a target to run one anyway")
    return sorted(fitting, key=lambda plan: plan.device == DeviceMatch())


def device_differences(device: DeviceMatch, machine: Machine) -> Iterator[str]:
    """The differences between `machine` and `device`, with both values."""
    if device.boards and not any(board.lower() in (machine.board or "").lower() for board in device.boards):
        yield f"the board is {machine.board or 'no Jetson'}, not {' or '.join(device.boards)}"
    wanted = device.compute_capability
    if device.gpu is None or wanted is None:
        return
    if not machine.gpus:
        yield f"no NVIDIA GPU is visible, not {device.gpu} (compute capability {dotted(wanted)})"
        return
    gpu = machine.gpus[0]
    if not gpu.name.lower().endswith(device.gpu.lower()):  # "RTX 2080" is also in "RTX 2080 Ti"
        yield f"the GPU is {gpu.name}, not {device.gpu}"
    if gpu.compute_capability is not None and gpu.compute_capability != wanted:
        yield f"the compute capability is {dotted(gpu.compute_capability)}, not {dotted(wanted)}"


def first_that_opens(
    plans: List[BundlePlan], threads: Optional[int] = None, cuda_graphs: bool = False
) -> Tuple[BundlePlan, Library]:
    """Raises EngineError for the last plan when no plan's library can be opened."""
    for plan in plans[:-1]:
        try:
            return plan, open_library(plan.library, threads, cuda_graphs=cuda_graphs)
        except EngineError:
            continue
    last = plans[-1]
    try:
        return last, open_library(last.library, threads, cuda_graphs=cuda_graphs)
    except EngineError as error:
        raise EngineError(
            f"the bundle's plan is for {last.target}, which runs {last.library}; here {error}; run it there, or "
            "bundle a plan for this machine"
        ) from error
