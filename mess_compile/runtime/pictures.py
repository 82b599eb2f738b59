"""Picture files in and out: PNG by ourselves, anything else by Pillow where it is installed."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any, Sequence, Tuple

import numpy as np

from mess_compile.runtime import png
from mess_compile.runtime.errors import InputError, PlaceError

_MAX_BYTES = 1 << 28
OF_ONE_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ELOOP)
"""Why a file cannot be written while another one beside it can."""
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1")


def read_picture(path: Path) -> np.ndarray:
    """An image file as uint8 RGB (H, W, 3). Raises InputError naming the file."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(f"{path} has {size} bytes, more than the {_MAX_BYTES} of any picture")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _decoded(content, path)
    except InputError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _decoded(content: bytes, path: Path) -> np.ndarray:
    why = "not a PNG, and other pictures need Pillow: `pip install Pillow`, or convert it"
    if content.startswith(png.SIGNATURE):
        try:
            return png.read_png(content)
        except png.OtherPngError as error:
            why = f"{error}, or `pip install Pillow`, which reads it"
    try:
        import PIL.Image as pillow
    except ImportError as error:
        raise InputError(why) from error
    return _by_pillow(pillow, path)


def _by_pillow(pillow: Any, path: Path) -> np.ndarray:
    try:
        with pillow.open(path) as image:
            if image.mode not in _MODES:
                raise InputError(f"it has mode {image.mode}: convert it to 8-bit RGB")
            pixels: np.ndarray = np.array(image.convert("RGB"))
            return pixels
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(f"not a picture that Pillow reads: {error}") from error


def write_labels(path: Path, labels: np.ndarray, colours: Sequence[Tuple[int, int, int]]) -> None:
    """Labels (H, W) as a palette PNG whose pixel values are the labels. Raises InputError, PlaceError."""
    _write(path, png.write_png(labels, colours))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """RGB (H, W, 3) as a PNG. Raises InputError, PlaceError."""
    _write(path, png.write_png(pixels))


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        kind = InputError if error.errno in OF_ONE_NAME else PlaceError
        raise kind(f"{path} cannot be written: {error.strerror}") from error
