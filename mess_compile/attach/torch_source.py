"""Turns a trained torch module into the ONNX that exits are attached to; named submodules become named tensors."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from mess_compile.graph.node_builder import OPSET
from mess_compile.nets.checkpoint import load_state
from mess_compile.runtime.base.errors import InputError, did_you_mean, one_line

OUTPUT = "output"
"""The name of the module's own output in the ONNX."""
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_factory(text: str) -> bool:
    """Whether a text names a function of a module, as in `package.module:factory`."""
    return _FACTORY.fullmatch(text) is not None


def made_by(factory: str, weights: Path | None = None) -> nn.Module:
    """The module that `package.module:factory`, called without arguments, returns, with `weights` loaded into it.

    The package is searched for from the current folder, too. Raises InputError.
    """
    name, _, attribute = factory.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
        module = found() if not isinstance(found, nn.Module) else found  # type: ignore[operator]
    except Exception as error:  # the user's code raises what it likes
        raise InputError(f"{factory} gives no module: {one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{factory} returns {type(module).__name__}, not a torch.nn.Module")
    if weights is not None:
        _load(module, weights)
    return module


def _load(module: nn.Module, weights: Path) -> None:
    try:
        module.load_state_dict(load_state(weights))
    except RuntimeError as error:
        raise InputError(f"{weights} does not fit the module: {one_line(error)}") from error


def write_onnx(module: nn.Module, hw: tuple[int, int], exits: Sequence[str], path: Path) -> None:
    """Write the module, in eval mode, for one image (1, 3, H, W); outputs of the submodules `exits` get their names.

    A module that returns a dict or tuple gives its first tensor. Raises InputError naming a submodule that does not
    exist or gives no tensor, and what the export did not take.
    """
    known = dict(module.named_modules())
    for name in exits:
        if name not in known:
            raise InputError(f"--exits-at {name}: the module has no such submodule{did_you_mean(name, known)}")
    traced = _Traced(module.eval(), exits)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecation, and tracing of Python values
            torch.onnx.export(
                traced,
                (torch.zeros(1, 3, *hw),),
                str(path),
                input_names=["input"],
                output_names=[OUTPUT, *exits],
                opset_version=OPSET,
                dynamo=False,
            )
    except InputError:
        raise
    except Exception as error:  # the exporter and the module raise what they like
        raise InputError(f"the module cannot be exported to ONNX: {one_line(error)}") from error


class _Traced(nn.Module):
    """The module with the outputs of some submodules beside its own."""

    def __init__(self, module: nn.Module, exits: Sequence[str]) -> None:
        super().__init__()
        self.module, self._exits = module, tuple(exits)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found: dict[str, torch.Tensor] = {}
        modules = dict(self.module.named_modules())

        def keep(name: str) -> Callable[[nn.Module, object, object], None]:
            return lambda module, inputs, output: found.update({name: _first(output, name)})

        hooks = [modules[name].register_forward_hook(keep(name)) for name in self._exits]
        try:
            output = _first(self.module(images), "the module")
        finally:
            for hook in hooks:
                hook.remove()
        missing = [name for name in self._exits if name not in found]
        if missing:
            raise InputError(f"--exits-at {missing[0]}: the module does not call this submodule")
        return (output, *(found[name] for name in self._exits))


def _first(output: object, name: str) -> torch.Tensor:
    """The tensor, or the first one of a dict or tuple."""
    if isinstance(output, dict):
        output = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    if not isinstance(output, torch.Tensor):
        raise InputError(f"{name} returns {type(output).__name__}, not a tensor")
    return output
