"""Targets: what is compiled for. One TOML file each, ours in `profiles/`, the user's in `WORKSPACE/profiles/`."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path

from mess_compile import files
from mess_compile.runtime.engine import LIBRARIES
from mess_compile.runtime.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PACKAGE = Path(__file__).resolve().parent
PRECISIONS = ("fp32",)


@dataclass(frozen=True)
class Target:
    """A device, its engine library, and the precisions to consider."""

    name: str
    description: str
    library: str
    precisions: tuple[str, ...]


def known_targets(workspace: Path) -> dict[str, Target]:
    """All targets by name; one beside the workspace replaces ours of the same name. Raises InputError."""
    targets = (_read_target(path) for folder in _folders(workspace) for path in sorted(folder.glob("*.toml")))
    return {target.name: target for target in targets}


def find_target(name: str, workspace: Path) -> Target:
    """Raises InputError with the nearest known name."""
    targets = known_targets(workspace)
    if name in targets:
        return targets[name]
    near = difflib.get_close_matches(name, targets, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known devices: {', '.join(targets)}."
    raise InputError(f"unknown device {name!r}: {hint} Add your own as {workspace / 'profiles' / 'NAME.toml'}")


def _folders(workspace: Path) -> tuple[Path, ...]:
    installed = _PACKAGE / "profiles"
    return (installed if installed.is_dir() else _PACKAGE.parent / "profiles", workspace / "profiles")


def _read_target(path: Path) -> Target:
    remedy = "see profiles/host.toml for an example"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML ({error}): {remedy}") from error

    def decode() -> Target:
        precisions = tuple(str(precision) for precision in content["precisions"])
        target = Target(str(content["name"]), str(content["description"]), str(content["library"]), precisions)
        if target.name != path.stem:
            raise ValueError(f"name is {target.name!r}, the file's name says {path.stem!r}")
        if target.library not in LIBRARIES:
            raise ValueError(f"library is {target.library!r}, not one of {', '.join(LIBRARIES)}")
        if not precisions or set(precisions) - set(PRECISIONS):
            raise ValueError(f"precisions is {precisions}, not of {', '.join(PRECISIONS)}")
        return target

    target: Target = files.decoded(path, remedy, decode)
    return target
