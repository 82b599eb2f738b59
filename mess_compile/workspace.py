"""Locates every artefact in the workspace, the folder that commands work in, and remembers choices between commands."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mess_compile import files
from mess_compile.data_folder import IMAGES, LABELS, Data, DataFolder, data_folder
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, did_you_mean
from mess_compile.runtime.engines.engine import FP32
from mess_compile.runtime.machine import device_names

HOST = device_names.HOST
"""The machine that mess-compile itself runs on, as a device."""
_REMEDY = "remove it; it only remembers the last device, data and split"


@dataclass(frozen=True)
class _ReadAs:
    """The options of `DataFolder` that are remembered of a folder."""

    images: str = field(default=IMAGES, metadata=decode.OPTIONAL)
    labels: str = field(default=LABELS, metadata=decode.OPTIONAL)
    label_offset: int = field(default=0, metadata=decode.OPTIONAL)


def _options_by_folder(value: Any, where: str) -> Any:
    decode.decode(dict[str, _ReadAs], value, where)
    return value


_READ_AS = decode.entry(optional=True, read=_options_by_folder)


@dataclass(frozen=True)
class Memory:
    """Defaults of later commands: the device profiled last, the data folder, and the tuning split.

    `read_as` maps data folders to options of `DataFolder`: the names of their folders of images and labels, and where
    labels begin; a folder that is missing is read by default. `hosts` maps devices to the hosts over which they were
    reached, `pythons` maps hosts to a Python that is not their python3; `ships` are the places that a bundle was
    shipped to, and `group_by` is the pattern by which `search` named groups of images.
    """

    device: str | None = field(default=None, metadata=decode.OPTIONAL)
    data: str | None = field(default=None, metadata=decode.OPTIONAL)
    split: str | None = field(default=None, metadata=decode.OPTIONAL)
    read_as: dict[str, dict[str, str | int]] = field(default_factory=dict, metadata=_READ_AS)
    hosts: dict[str, str] = field(default_factory=dict, metadata=decode.OPTIONAL)
    pythons: dict[str, str] = field(default_factory=dict, metadata=decode.OPTIONAL)
    ships: tuple[str, ...] = field(default=(), metadata=decode.OPTIONAL)
    group_by: str | None = field(default=None, metadata=decode.OPTIONAL)


@dataclass(frozen=True)
class Workspace:
    root: Path

    @property
    def candidate(self) -> Path:
        return self.root / "candidate"

    @property
    def baseline(self) -> Path:
        """The single-exit network trained alone, if there is one."""
        return self.root / "baseline"

    @property
    def attaching(self) -> Path:
        """The network and the progress of an `attach` that has not ended."""
        return self.root / "attaching"

    @property
    def own_labels(self) -> Path:
        """The data set whose truth is the network's own output, where there are no labels."""
        return self.root / "own-labels"

    @property
    def graphs(self) -> Path:
        return self.root / "graphs"

    def statistics(self, split: str, recipe: str = FP32, device: str = HOST) -> Path:
        """The folder of a split's statistics: `val[:50]` lives in `statistics/val_0-50`.

        Statistics of a recipe other than fp32, or recorded on a device, have their own: `statistics/xavier/fp16/val`.
        """
        match = re.fullmatch(r"([\w-]+)\[(\d*):(\d*)\]", split)
        name = f"{match[1]}_{match[2] or 0}-{match[3] or 'end'}" if match else split
        place = Path() if (recipe, device) == (FP32, HOST) else Path(device, recipe)
        return self.root / "statistics" / place / name

    def tuning_statistics(self, split: str, recipe: str, tuned_by: str) -> Path:
        """The folder of the statistics that a plan was chosen on; `tuned_by` in the plan's words, LIBRARY on DEVICE."""
        return self.statistics(split, recipe, tuned_by.rpartition(" on ")[2])

    def latency(self, device: str) -> Path:
        return self.root / "latency" / f"{device}.json"

    @property
    def recipes(self) -> Path:
        """Graph sets in precisions other than fp32, one folder per recipe."""
        return self.root / "recipes"

    def engines(self, device: str, recipe: str) -> Path:
        return self.root / "engines" / device / recipe

    def clocks(self, device: str) -> Path:
        """The settings of the clocks before they were locked for a measurement."""
        return self.root / "latency" / f"{device}.clocks.json"

    def forms(self, device: str) -> Path:
        """Graphs rewritten for a device's parser."""
        return self.root / "forms" / device

    def plan(self, device: str) -> Path:
        return self.root / "plans" / f"{device}.json"

    def plan_named(self, thing: str | Path) -> Path:
        """The file of a plan: a path from the shell's folder or the workspace's, or the name of the plan's device.

        Raises InputError naming the devices that have one.
        """
        places = (
            *(Path(thing), self.root / thing),
            *(self.plan(str(thing)), self.plan(device_names.stored_name(str(thing)))),
        )
        found = next((place for place in places if place.is_file()), None)
        if found is not None:
            return found
        devices = sorted(path.stem for path in self.plan("any").parent.glob("*.json"))
        raise InputError(
            f"{str(thing)!r} is not a file{did_you_mean(str(thing), devices)}, and not a device with a plan in this "
            f"workspace ({', '.join(devices) or 'none'}): run `mess-compile search --device NAME`, or name a file"
        )

    @property
    def searches(self) -> Path:
        """Results of searches that do not depend on their requirement."""
        return self.root / "search"

    def bench(self, device: str) -> Path:
        """The last measurement of the device's bundle."""
        return self.root / "bench" / f"{device}.json"

    def bundle(self, device: str) -> Path:
        return self.root / f"{device}.mess"

    @property
    def file(self) -> Path:
        """The file of what is remembered between commands."""
        return self.root / "workspace.json"

    def memory(self) -> Memory:
        """Raises InputError when `workspace.json` is damaged."""
        path = self.file
        if not path.exists():
            return Memory()
        content = files.read_json(path, "mess-workspace", 1, _REMEDY)
        memory: Memory = files.decode_document(path, Memory, content, _REMEDY)
        return memory

    def remember(
        self,
        device: str | None = None,
        data: DataFolder | None = None,
        split: str | None = None,
        host: str | None = None,
    ) -> None:
        """Remember the given values, leave the others unchanged. The data folder is stored relative to the workspace,
        together with how it is read; `host` belongs to `device`.
        """
        given: dict[str, Any] = {"device": device, "split": split}
        known = self.memory()
        if data is not None and data.root is not None:
            given["data"] = name = self._relative(data.root)
            others = {other: options for other, options in known.read_as.items() if other != name}
            given["read_as"] = others | ({name: _read_as(data)} if _read_as(data) else {})
        if host is not None and device is not None:
            given["hosts"] = {**known.hosts, device: host}
        memory = replace(known, **{name: value for name, value in given.items() if value is not None})
        if memory != known:
            files.write_json(self.file, "mess-workspace", 1, asdict(memory))

    def known_host(self, device: str) -> str | None:
        """The host over which a device was reached; None when it never was."""
        return self.memory().hosts.get(device)

    def known_python(self, host: str) -> str | None:
        """The command that starts Python on a host; None when none was named."""
        return self.memory().pythons.get(host)

    def remember_host(self, device: str, host: str) -> None:
        """Remember where a device is, whichever was profiled last."""
        known = self.memory()
        if known.hosts.get(device) != host:
            memory = replace(known, hosts={**known.hosts, device: host})
            files.write_json(self.file, "mess-workspace", 1, asdict(memory))

    def remember_python(self, host: str, python: str | None) -> None:
        """Remember the command that starts Python on a host; None changes nothing, and no workspace is created."""
        known = self.memory()
        if python is not None and self.file.exists() and known.pythons.get(host) != python:
            memory = replace(known, pythons={**known.pythons, host: python})
            files.write_json(self.file, "mess-workspace", 1, asdict(memory))

    def remember_groups(self, pattern: str | None) -> None:
        """Remember the pattern that names groups of images; None forgets it."""
        known = self.memory()
        if known.group_by != pattern:
            files.write_json(self.file, "mess-workspace", 1, asdict(replace(known, group_by=pattern)))

    def remember_ships(self, places: Sequence[str]) -> None:
        """Remember where a bundle was shipped to; does nothing outside a workspace, since one ships from anywhere."""
        known = self.memory()
        if self.file.exists() and not set(places) <= set(known.ships):
            memory = replace(known, ships=tuple(dict.fromkeys((*known.ships, *places))))
            files.write_json(self.file, "mess-workspace", 1, asdict(memory))

    def data_folder(self, data: Data | None) -> DataFolder:
        """The given or remembered data folder, with every option of how to read it.

        Raises InputError when there is neither, and for a new folder without a label offset if the labels of the
        remembered one do not begin at 0.
        """
        memory, named = self.memory(), DataFolder() if data is None else data_folder(data)
        if named.root is None and memory.data is None:
            raise InputError("this workspace knows no data folder: name one with --data DIR")
        root = named.root if named.root is not None else self.root / str(memory.data)
        known = DataFolder(**memory.read_as.get(self._relative(root), {}))  # type: ignore[arg-type]
        last = memory.read_as.get(str(memory.data), {}).get("label_offset", 0)
        if last and named.label_offset is None and self._relative(root) != memory.data and not known.label_offset:
            raise InputError(
                f"the labels of {memory.data}, which this workspace was used with, begin at {last}: give "
                f"--label-offset {last} or --label-offset 0 for those of {root}"
            )
        offset = known.label_offset if named.label_offset is None else named.label_offset
        return DataFolder(
            root, named.images or known.images or IMAGES, named.labels or known.labels or LABELS, offset or 0
        )

    def _relative(self, folder: Path) -> str:
        return os.path.relpath(folder.resolve(), self.root.resolve())


def _read_as(data: DataFolder) -> dict[str, str | int]:
    """The options to remember of a folder."""
    usual = {"images": IMAGES, "labels": LABELS, "label_offset": 0}
    options = {"images": data.images, "labels": data.labels, "label_offset": data.label_offset}
    return {name: value for name, value in options.items() if value is not None and value != usual[name]}


def open_workspace(folder: Path | str = ".") -> Workspace:
    """The workspace in a folder, which must exist; it may be empty. Raises InputError."""
    if not Path(folder).is_dir():
        raise InputError(f"workspace {folder} does not exist: create the folder, or name another with -C DIR")
    return Workspace(Path(folder))
