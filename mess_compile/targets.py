"""Reads targets, what is compiled for, and checks whether a machine is one.

One TOML file each, ours in `profiles/`, the user's in `WORKSPACE/profiles/`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mess_compile import files, package_files
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.manifest import DeviceMatch
from mess_compile.runtime.bundle.plan_choice import device_differences
from mess_compile.runtime.engines.engine import FP32, LIBRARIES, PRECISIONS
from mess_compile.runtime.machine import machine as machines
from mess_compile.runtime.machine.device_names import stored_name
from mess_compile.runtime.machine.machine import Machine, dotted

RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
_ON_GPU = LIBRARIES[1:]
_MEMORY_SEEN = (
    0.85,
    1.05,
)  # shares of the data sheet's memory that a driver reports: systems and error correction take some


@dataclass(frozen=True)
class Peak:
    """Dense arithmetic at the highest clock; None if the device has no units for it."""

    fp32_tflops: float
    fp16_tflops: float | None = None
    int8_tops: float | None = None

    def of(self, precision: str) -> float | None:
        """TFLOP/s or TOP/s."""
        return {"fp32": self.fp32_tflops, "fp16": self.fp16_tflops, "int8": self.int8_tops}[precision]


@dataclass(frozen=True)
class FieldSource:
    """The source of a field's value."""

    field: str
    text: str


@dataclass(frozen=True)
class Target:
    """A device, its engine library, and the precisions to consider.

    `library_versions` are accepted beginnings ("8.5" accepts 8.5.2.2); `compute_capability` such as (8, 7); `gpu` is
    the end of the driver's name of the GPU, one of `boards` is in the device tree's name of the board; `opset` is the
    newest that the library's parser supports. Missing fields of a target (None, empty) are not checked.
    """

    name: str
    description: str
    library: str
    precisions: tuple[str, ...]
    library_versions: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    gpu: str | None = None
    boards: tuple[str, ...] = ()
    opset: int | None = None
    peak: Peak | None = None
    memory_bandwidth_gb_per_s: float | None = None
    memory_gib: float | None = None
    power_modes: tuple[str, ...] = ()
    sources: tuple[FieldSource, ...] = ()

    @property
    def device(self) -> DeviceMatch:
        """The match by which a bundle chooses its plan."""
        return DeviceMatch(self.gpu, self.compute_capability, self.boards)


def known_targets(workspace: Path | None = None) -> dict[str, Target]:
    """All targets by name; one beside the workspace replaces ours of the same name. Raises InputError."""
    folders = (package_files.profiles(), *([workspace / "profiles"] if workspace else []))
    targets = (_read_target(path) for folder in folders for path in sorted(folder.glob("*.toml")))
    return {target.name: target for target in targets}


def find_target(name: str, workspace: Path) -> Target:
    """Raises InputError with the nearest known name."""
    targets = known_targets(workspace)
    for known in (name, stored_name(name)):
        if known in targets:
            return targets[known]
    near = difflib.get_close_matches(name, targets, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known devices: {', '.join(targets)}."
    raise InputError(f"unknown device {name!r}: {hint} Add your own as {workspace / 'profiles' / 'NAME.toml'}")


def differences(target: Target, machine: Machine) -> tuple[str, ...]:
    """The differences between `machine` and `target`, with both values; empty when it is that target."""
    seen_gib = machine.gpus[0].memory_gib if target.gpu and machine.gpus else None
    memory = _memory_differences(target.memory_gib, seen_gib)
    return (*device_differences(target.device, machine), *memory, *_library_differences(target, machine))


def targets_here(targets: Iterable[Target], machine: Machine) -> tuple[Target, ...]:
    """The targets that match `machine`, those with a GPU first."""
    return tuple(sorted((t for t in targets if not differences(t, machine)), key=lambda t: t.gpu is None))


def in_cells(target: Target) -> tuple[str, ...]:
    """Cells of a table: name, library, precisions, compute capability, a peak each, bandwidth, description."""
    peaks = [target.peak.of(precision) for precision in target.precisions] if target.peak else []
    bandwidth = target.memory_bandwidth_gb_per_s
    return (
        target.name,
        target.library,
        ",".join(target.precisions),
        dotted(target.compute_capability) if target.compute_capability else "-",
        ",".join(f"{peak:.4g}" for peak in peaks) or "-",
        f"{bandwidth:g}" if bandwidth else "-",
        target.description,
    )


def refuse_unless_here(target: Target, workspace: Path | None = None, ways: str | None = None) -> None:
    """Raises InputError with the differences between this machine and `target`, and a remedy: `ways` if given."""
    machine = machines.this_machine()
    found = differences(target, machine)
    if found:
        remedy = ways or _remedy(target, machine, workspace)
        raise InputError(f"this machine is not {target.name!r}: {'; '.join(found)}: {remedy}")


def refuse_unless_there(target: Target, machine: Machine, host: str) -> None:
    """Raises InputError with the differences between the machine at `host` and `target`."""
    found = differences(target, machine)
    if found:
        raise InputError(
            f"{host} is not {target.name!r}: {'; '.join(found)}: name the device that it is (--device), or describe "
            "it in profiles/NAME.toml"
        )


def _remedy(target: Target, machine: Machine, workspace: Path | None) -> str:
    if any(not differences(target, replace(machine, gpus=(gpu,))) for gpu in machine.gpus[1:]):
        return "another GPU of this machine matches; put it first with CUDA_VISIBLE_DEVICES"
    names = [here.name for here in targets_here(known_targets(workspace).values(), machine)]
    own = f"describe this machine in {(workspace or Path()) / 'profiles' / 'NAME.toml'}"
    return f"name the device that it is (--device {' or '.join(names)}), or {own}" if names else own


def _memory_differences(wanted_gib: float | None, seen_gib: float | None) -> tuple[str, ...]:
    if wanted_gib is None or seen_gib is None:
        return ()
    lowest, highest = (factor * wanted_gib for factor in _MEMORY_SEEN)
    if lowest <= seen_gib <= highest:
        return ()
    return (f"the GPU's memory is {seen_gib:.1f} GiB, not {wanted_gib:g} GiB",)


def _library_differences(target: Target, machine: Machine) -> tuple[str, ...]:
    """A missing library is not a difference: opening it names the line that installs it."""
    module = target.library.partition("-")[0]
    version = machine.version(module)
    accepted = target.library_versions
    if version is None or not accepted or any(f"{version}.".startswith(f"{begins}.") for begins in accepted):
        return ()
    return (f"{module} is {version}, not {' or '.join(accepted)}",)


def _read_target(path: Path) -> Target:
    try:
        return _target_from(files.read_toml(path), path.stem)
    except ValueError as error:
        raise InputError(f"{path}: {error}: see {package_files.profiles() / 'xavier.toml'} for an example") from error


def _target_from(content: dict[str, Any], stem: str) -> Target:
    needed: tuple[str, ...] = ("name", "description", "library", "precisions")
    if content.get("library") in _ON_GPU:
        needed += ("compute_capability", "gpu", "opset")
    checked = _checked(content, _FIELDS, needed)
    if "peak" in checked:
        checked["peak"] = Peak(**_checked(checked["peak"], _PEAK, ("fp32_tflops",), "peak."))
    if "sources" in checked:
        texts = _checked(checked["sources"], dict.fromkeys(_FIELDS, _TEXT), (), "sources.")
        checked["sources"] = tuple(FieldSource(field, text) for field, text in texts.items())
    target = Target(**checked)
    _check_together(target, stem)
    return target


def _check_together(target: Target, stem: str) -> None:
    capability, library = target.compute_capability, target.library
    if target.name != stem:
        raise ValueError(f"name is {target.name!r}, but the file is named {stem!r}")
    if (target.gpu is None) != (capability is None):
        raise ValueError("gpu and compute_capability go together, but one of them is missing")
    if library == "tensorrt_rtx" and capability and capability not in RTX_CAPABILITIES:
        known = ", ".join(map(dotted, RTX_CAPABILITIES))
        raise ValueError(f"compute_capability is {dotted(capability)}, but {library} builds for {known}")
    without = [precision for precision in target.precisions if target.peak and target.peak.of(precision) is None]
    if without:
        raise ValueError(f"peak has no figure for {without[0]}, which precisions names")


@dataclass(frozen=True)
class _Field:
    """A value that `passes` is stored as `read` returns it."""

    passes: Callable[[Any], bool]
    expected: str
    read: Callable[[Any], Any] = lambda value: value


def _checked(
    content: dict[str, Any], known: dict[str, _Field], needed: tuple[str, ...], place: str = ""
) -> dict[str, Any]:
    """Raises ValueError naming the first field that is unknown, wrong or missing."""
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, 1)
            hint = f"did you mean {near[0]}?" if near else f"only {', '.join(known)} are"
            raise ValueError(f"{place}{name[:80]!r} is not a field, {hint}")
        if not known[name].passes(value):
            raise ValueError(f"{place}{name} is {_as_text(value)}, not {known[name].expected}")
    for name in needed:
        if name not in content:
            raise ValueError(f"{place}{name} is missing, {known[name].expected}")
    return {name: known[name].read(value) for name, value in content.items()}


def _as_text(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python does not write integers of thousands of digits
        return "a very large number"


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and re.fullmatch(pattern, value) is not None


def _is_text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 300 and value.isprintable() and value == value.strip()


def _is_list_of(passes: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and 0 < len(value) <= 50 and all(passes(item) for item in value)


def _are_precisions(value: Any) -> bool:
    return _is_list_of(PRECISIONS.__contains__)(value) and len(set(value)) == len(value) and FP32 in value


_TEXT = _Field(_is_text, "one line of text")
_TEXTS = _Field(_is_list_of(_is_text), "a list of texts", tuple)
_FIGURE = _Field(
    lambda value: type(value) in (int, float) and 0 < value <= 1e6, "a number above 0 and at most 1000000", float
)
_TABLE = _Field(lambda value: type(value) is dict, "a table")
_PEAK = {"fp32_tflops": _FIGURE, "fp16_tflops": _FIGURE, "int8_tops": _FIGURE}
_FIELDS = {
    "name": _Field(_matches("[A-Za-z0-9][A-Za-z0-9._-]{0,63}"), "letters, digits, '.', '_' and '-'"),
    "description": _TEXT,
    "library": _Field(lambda value: value in LIBRARIES, f"one of {', '.join(LIBRARIES)}"),
    "precisions": _Field(_are_precisions, f"a list of {', '.join(reversed(PRECISIONS))} with fp32 among them", tuple),
    "library_versions": _Field(
        _is_list_of(_matches(r"[0-9]{1,9}([.][0-9]{1,9}){0,3}")), "a list of versions such as '8.5'", tuple
    ),
    "compute_capability": _Field(
        _matches("[1-9][0-9]?[.][0-9]"), "text such as '8.7'", lambda text: tuple(map(int, text.split(".")))
    ),
    "gpu": _TEXT,
    "boards": _TEXTS,
    "opset": _Field(lambda value: type(value) is int and 1 <= value <= 99, "an integer from 1 to 99"),
    "peak": _TABLE,
    "memory_bandwidth_gb_per_s": _FIGURE,
    "memory_gib": _FIGURE,
    "power_modes": _TEXTS,
    "sources": _TABLE,
}
