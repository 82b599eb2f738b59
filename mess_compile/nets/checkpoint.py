"""Reads and writes the candidate network: `network.json` and content-named safetensors, convolutions in fp16."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mess_compile import files
from mess_compile.nets.network import Architecture, OverprovisionedNetwork
from mess_compile.network import SIDES, head_config_from_name
from mess_compile.runtime.base import decode
from mess_compile.runtime.base.errors import InputError, one_line
from mess_compile.runtime.base.lfs_pointers import refuse_pointer

_ATTACHED = ("network.onnx", "original.onnx", "attached.json", "weights")
_REMEDY = "train a multi-exit network with `mess-compile train`, or name the folder of one"


_HEAD = decode.matches(r"exit[1-9][0-9]{0,3}[.].+", "a head such as exit2.fcn-crm1-b0")
_WEIGHTS = decode.matches(r"weights-[0-9a-f]{16}[.]safetensors", "the name of a file of weights")


def architecture_to_json(architecture: Architecture) -> dict[str, Any]:
    return {
        "backbone": architecture.backbone,
        "width": architecture.width,
        "output_stride": architecture.output_stride,
        "input_hw": list(architecture.input_hw),
        "classes": list(architecture.classes),
        "colours": [list(colour) for colour in architecture.colours],
        "exit_blocks": list(architecture.exit_blocks),
        "heads": [f"exit{number}.{config.name}" for number, config in architecture.heads],
    }


@dataclass(frozen=True)
class _NetworkDocument:
    """The content of `network.json`: what `architecture_to_json` gives, and the file of weights with its hash."""

    backbone: str
    width: float
    output_stride: int
    input_hw: tuple[int, int] = field(metadata=decode.entry(check=SIDES))
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    exit_blocks: tuple[str, ...]
    heads: tuple[str, ...] = field(metadata=decode.entry(each=_HEAD))
    weights: str = field(metadata=decode.entry(check=_WEIGHTS))
    weights_sha256: str = field(metadata=decode.entry(check=decode.SHA256))

    @property
    def architecture(self) -> Architecture:
        """Raises InputError for a head of an unknown configuration."""
        parts = [head.removeprefix("exit").split(".", 1) for head in self.heads]
        return Architecture(
            backbone=self.backbone,
            classes=self.classes,
            colours=self.colours,
            input_hw=self.input_hw,
            exit_blocks=self.exit_blocks,
            heads=tuple((int(number), head_config_from_name(config)) for number, config in parts),
            output_stride=self.output_stride,
            width=self.width,
        )


def _read_document(folder: Path) -> _NetworkDocument:
    path = folder / "network.json"
    content = files.read_json(path, "mess-candidate", 1, _REMEDY)
    found: _NetworkDocument = files.decode_document(
        path, _NetworkDocument, content, _REMEDY, lambda document: document.architecture
    )
    return found


def save_candidate(network: OverprovisionedNetwork, folder: Path) -> None:
    """Write the network; convolution weights are rounded to fp16, BatchNorm stays fp32.

    The weights are written first, under a name from their content; renaming `network.json` makes them current.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: _stored(value) for key, value in network.state_dict().items() if "num_batches" not in key}
    temporary = folder / ".weights.safetensors"
    try:
        write_tensors(temporary, state)
        digest = files.sha256_of_file(temporary)
        name = f"weights-{digest[:16]}.safetensors"
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    content = architecture_to_json(network.architecture) | {"weights": name, "weights_sha256": digest}
    files.write_json(folder / "network.json", "mess-candidate", 1, content)
    for old in folder.glob("weights-*.safetensors"):
        if old.name != name:
            old.unlink()


def set_aside(folder: Path) -> Path | None:
    """Keep a network that was trained in `folder`, or attached to, in the first free `folder-N`; returns that folder.

    What `attach` wrote is moved, for `export` would take it first.
    """
    weights = list(folder.glob("weights-*.safetensors"))
    trained = [*weights, folder / "network.json"] if weights and (folder / "network.json").exists() else []
    attached = [folder / name for name in _ATTACHED if (folder / name).exists()]
    if not trained and not attached:
        return None
    place = next(path for n in itertools.count(1) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
    with files.replaced_folder(place) as temporary:
        for path in (*trained, *attached):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, temporary / path.name)
    for path in attached:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises OSError with the number that safetensors mentions in its text only."""
    try:
        save_file(tensors, path)
        path.chmod(0o644)
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def _stored(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().contiguous()
    return value.half() if value.ndim == 4 else value.float()


def read_architecture(folder: Path) -> Architecture:
    """Read the architecture from `network.json`. Raises InputError."""
    return _read_document(folder).architecture


def load_candidate(folder: Path) -> OverprovisionedNetwork:
    """The network in evaluation mode, fp32. Raises InputError naming what is missing, damaged or does not fit."""
    path, found = folder / "network.json", _read_document(folder)
    architecture, weights = found.architecture, folder / found.weights
    if not weights.is_file():
        raise InputError(f"{weights} does not exist, though {path} names it: {_REMEDY}")
    refuse_pointer(weights)
    digest = files.sha256_of_file(weights)
    if digest != found.weights_sha256:
        raise InputError(f"{weights} is damaged (its SHA-256 is not the one in {path}): restore it or train again")
    network = OverprovisionedNetwork(architecture)
    load_weights(network, load_state(weights), str(weights))
    described = json.dumps(architecture_to_json(architecture), sort_keys=True)
    identity = hashlib.sha256(f"{described}\n{digest}".encode()).hexdigest()
    network.candidate = replace(network.candidate, identity=identity)
    return network.eval()


def load_weights(network: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    """Load a whole state. Raises InputError naming parameters that are missing, extra or of another shape."""
    wanted = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    wrong = sorted(wanted.keys() ^ state.keys())
    wrong += [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    if wrong:
        raise InputError(f"{source} does not fit the network: {len(wrong)} parameters differ, first {wrong[0]}")
    network.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from `.safetensors`, or from a foreign `.pth` by the unpickler that runs no code.

    Raises InputError saying what the file is instead, and what to do.
    """
    if not path.is_file():
        raise InputError(f"weights {path} do not exist")
    refuse_pointer(path)
    _refuse_text(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        raise InputError(
            f"{path} cannot be read as weights, and may be truncated ({_brief(error)}): {_AGAIN}"
        ) from error
    except Exception as error:  # pickle.UnpicklingError: anything that the file would have executed is refused here
        raise InputError(
            f"{path} contains more than tensors and was refused ({type(error).__name__}): save its state dict alone, "
            "`torch.save(model.state_dict(), FILE)`"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is not a state dict (a mapping of names to tensors): {_remedy_of_content(state)}")
    if state and all(key.startswith(_WRAPPED) for key in state):
        raise InputError(
            f"the names in {path} begin with {_WRAPPED!r}, because it was saved from a DataParallel model: save "
            "`model.module.state_dict()`"
        )
    return state


_AGAIN = "copy or download it again"
_WRAPPED = "module."
_PICKLED = (b"PK", b"\x80")
"""First bytes of torch.save's files: zip archives, before version 1.6 pickles."""


def _refuse_text(path: Path) -> None:
    """Raises InputError for a file that no library wrote as weights: an error page, or another text."""
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise InputError(f"{path} is empty, not a file of weights: {_AGAIN}")
    if path.suffix == ".safetensors" or head.startswith(_PICKLED):
        return
    is_text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in head)
    kind = "an HTML page" if b"<html" in head.lower() or b"<!doctype" in head.lower() else "a text" if is_text else ""
    found = f", but {kind}" if kind else ""
    raise InputError(
        f"{path} is not a file of weights{found} (it begins with {bytes(head[:16])!r}): give a .safetensors, or a "
        f"file that torch.save wrote; {_AGAIN}"
    )


def _remedy_of_content(content: Any) -> str:
    """What to save instead of a checkpoint that contains a state dict among other things."""
    entries = content.items() if isinstance(content, dict) else ()
    for name, entry in entries:
        if isinstance(entry, dict) and entry and all(isinstance(value, torch.Tensor) for value in entry.values()):
            return f"its entry {name!r} is one, so save that alone: `torch.save(torch.load(FILE)[{name!r}], NEW)`"
    return "save `model.state_dict()`"


def _brief(error: BaseException) -> str:
    return one_line(str(error).partition("\n")[0])[:120]
