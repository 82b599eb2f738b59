"""What the labels of a data set are: somebody's, or a network's own output, by the mark file beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mess_compile import files
from mess_compile.runtime.base import decode
from mess_compile.runtime.bundle.manifest import LABELS, OWN_OUTPUT

MARK = "own-labels.json"
"""The file that marks a data set whose truth is a network's own output."""
_FORMAT, _VERSION = "mess-own-labels", 1
_REMEDY = "run `mess-compile attach MODEL.onnx --images DIR` again"


@dataclass(frozen=True)
class _Mark:
    """The content of the file; `left_out` are classes too rare to count."""

    truth: str = field(metadata=decode.entry(check=decode.one_of((OWN_OUTPUT,))))
    left_out: tuple[str, ...]


def write_mark(root: Path, left_out: tuple[str, ...]) -> None:
    """Mark the data set in the folder `root`."""
    files.write_json(root / MARK, _FORMAT, _VERSION, {"truth": OWN_OUTPUT, "left_out": list(left_out)})


def truth_of(root: Path) -> str:
    """What the labels in the folder `root` are: LABELS, or OWN_OUTPUT. Raises InputError for a damaged mark."""
    path = root / MARK
    if not path.exists():
        return LABELS
    content = files.read_json(path, _FORMAT, _VERSION, _REMEDY)
    mark: _Mark = files.decode_document(path, _Mark, content, _REMEDY)
    return mark.truth
