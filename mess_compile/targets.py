"""Reads targets, what is compiled for, and checks whether a machine is one.

One TOML file each, ours in `profiles/`, the user's in `WORKSPACE/profiles/`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mess_compile import files, package_files
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.bundle.manifest import DeviceMatch
from mess_compile.runtime.bundle.plan_choice import device_differences
from mess_compile.runtime.engines.engine import FP32, LIBRARIES, PRECISIONS
from mess_compile.runtime.machine import machine
from mess_compile.runtime.machine.device_names import stored_name
from mess_compile.runtime.machine.machine import Machine, dotted

RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
_ON_GPU = LIBRARIES[1:]
_MEMORY_SEEN = (
    0.85,
    1.05,
)  # shares of the data sheet's memory that a driver reports: systems and error correction take some


def _is_text(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 300 and value.isprintable() and value == value.strip()


def _is_list(value: Any) -> bool:
    return type(value) is list and 0 < len(value) <= 50


def _are_precisions(value: Any) -> bool:
    return (
        _is_list(value) and all(map(PRECISIONS.__contains__, value)) and len(set(value)) == len(value) and FP32 in value
    )


def _capability(value: Any, where: str) -> tuple[int, ...]:
    decode.need(_CAPABILITY.passes(value), where, value, _CAPABILITY.expected)
    return tuple(map(int, value.split(".")))


def _sources(value: Any, where: str) -> tuple[FieldSource, ...]:
    """A text for each field of a target that has a source."""
    texts = decode.decode(dict[str, Any], value, where, toml=True)
    known = {each.name for each in fields(Target)}
    for name, text in texts.items():
        if name not in known:
            raise decode.DecodeError(f"{where}.{name!r:.80} is not a known entry{did_you_mean(name, known)}")
        decode.need(_TEXT.passes(text), f"{where}.{name}", text, _TEXT.expected)
    return tuple(FieldSource(name, text) for name, text in texts.items())


_TEXT = decode.Check(_is_text, "one line of text")
_TEXTS = decode.entry(check=decode.Check(_is_list, "a list of texts"), each=_TEXT, optional=True)
_POSITIVE = decode.Check(
    lambda value: type(value) in (int, float) and 0 < value <= 1e6, "a number above 0 and at most 1000000"
)
_FIGURE = decode.entry(check=_POSITIVE, optional=True)
_NAME = decode.matches("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "letters, digits, '.', '_' and '-'")
_NEEDED = decode.Check(_are_precisions, f"a list of {', '.join(reversed(PRECISIONS))} with fp32 among them")
_VERSION = decode.matches(r"[0-9]{1,9}([.][0-9]{1,9}){0,3}", "a version such as '8.5'")
_VERSIONS = decode.entry(check=decode.Check(_is_list, "a list of versions such as '8.5'"), each=_VERSION, optional=True)
_CAPABILITY = decode.matches("[1-9][0-9]?[.][0-9]", "text such as '8.7'")
_OPSET = decode.Check(lambda value: type(value) is int and 1 <= value <= 99, "an integer from 1 to 99")


@dataclass(frozen=True)
class Peak:
    """Dense arithmetic at the highest clock; None if the device has no units for it."""

    fp32_tflops: float = field(metadata=decode.entry(check=_POSITIVE))
    fp16_tflops: float | None = field(default=None, metadata=_FIGURE)
    int8_tops: float | None = field(default=None, metadata=_FIGURE)

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

    name: str = field(metadata=decode.entry(check=_NAME))
    description: str = field(metadata=decode.entry(check=_TEXT))
    library: str = field(metadata=decode.entry(check=decode.one_of(LIBRARIES)))
    precisions: tuple[str, ...] = field(metadata=decode.entry(check=_NEEDED))
    library_versions: tuple[str, ...] = field(default=(), metadata=_VERSIONS)
    compute_capability: tuple[int, int] | None = field(
        default=None, metadata=decode.entry(read=_capability, optional=True)
    )
    gpu: str | None = field(default=None, metadata=decode.entry(check=_TEXT, optional=True))
    boards: tuple[str, ...] = field(default=(), metadata=_TEXTS)
    opset: int | None = field(default=None, metadata=decode.entry(check=_OPSET, optional=True))
    peak: Peak | None = field(default=None, metadata=decode.OPTIONAL)
    memory_bandwidth_gb_per_s: float | None = field(default=None, metadata=_FIGURE)
    memory_gib: float | None = field(default=None, metadata=_FIGURE)
    power_modes: tuple[str, ...] = field(default=(), metadata=_TEXTS)
    sources: tuple[FieldSource, ...] = field(default=(), metadata=decode.entry(read=_sources, optional=True))

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
    here = machine.this_machine()
    found = differences(target, here)
    if found:
        remedy = ways or _remedy(target, here, workspace)
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
        target: Target = decode.decode(Target, files.read_toml(path), "", toml=True)
        _check_together(target, path.stem)
    except (ValueError, decode.DecodeError) as error:
        raise InputError(f"{path}: {error}: see {package_files.profiles() / 'xavier.toml'} for an example") from error
    return target


def _check_together(target: Target, stem: str) -> None:
    capability, library = target.compute_capability, target.library
    if target.name != stem:
        raise ValueError(f"name is {target.name!r}, but the file is named {stem!r}")
    needed = ("compute_capability", "gpu", "opset") if library in _ON_GPU else ()
    missing = next((name for name in needed if getattr(target, name) is None), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing, which a target of {library} needs")
    if (target.gpu is None) != (capability is None):
        raise ValueError("gpu and compute_capability go together, but one of them is missing")
    if library == "tensorrt_rtx" and capability and capability not in RTX_CAPABILITIES:
        known = ", ".join(map(dotted, RTX_CAPABILITIES))
        raise ValueError(f"compute_capability is {dotted(capability)}, but {library} builds for {known}")
    without = [precision for precision in target.precisions if target.peak and target.peak.of(precision) is None]
    if without:
        raise ValueError(f"peak has no figure for {without[0]}, which precisions names")
