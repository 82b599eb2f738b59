"""Reads and writes picture files: one reader decides for all callers which pictures are accepted, with which pixels.

Our own reader, which needs no imaging library, checks PNGs; Pillow, if installed, decodes them faster and reads other
formats. EXIF orientation is applied: the pixels are those that viewers and label tools show.
"""

from __future__ import annotations

import errno
import io
from contextlib import suppress
from pathlib import Path
from typing import Any, Sequence, Tuple

import numpy as np

from mess_compile.runtime.base.errors import InputError, PlaceError
from mess_compile.runtime.base.lfs_pointers import refuse_pointer
from mess_compile.runtime.images import png
from mess_compile.runtime.images.orientation import UPRIGHT, orientation_of, upright

_MAX_BYTES = 1 << 28
OF_ONE_NAME = (errno.ENAMETOOLONG, errno.EISDIR, errno.EINVAL, errno.EILSEQ, errno.ELOOP)
"""Errors that concern one file name; other files can still be written beside it."""
_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1")
_TIFF_BITS, _TIFF_ORIENTATION = 258, 274
_SEVERAL = ("GIF", "WEBP", "TIFF", "PNG", "AVIF", "PSD")
"""Pillow's formats that may hold several pictures of equal rank; in a JPEG (MPO) the first is the photograph."""


def read_picture(path: Path) -> np.ndarray:
    """Read an image file as uint8 RGB (H, W, 3), turned as its EXIF data say. Raises InputError naming the file."""
    content = read_content(path)
    try:
        return decoded(content)
    except InputError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_content(path: Path) -> bytes:
    """Read the bytes of a picture file. Raises InputError if it is missing, too large, or a Git LFS pointer."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(f"{path} has {size} bytes, more than the {_MAX_BYTES} that a picture may have")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    refuse_pointer(path, content)
    return content


def decoded(content: bytes) -> np.ndarray:
    """Decode the bytes of a file as `read_picture` does. Raises InputError."""
    if content.startswith(png.SIGNATURE):
        return _of_png(png.opened(content), content)
    pillow = _pillow()
    if pillow is None:
        raise InputError(
            "not a PNG; other formats need Pillow: run `pip install Pillow`, or convert the picture to PNG"
        )
    return _by_pillow(pillow, content)


def _pillow() -> Any:
    """Pillow's `Image` module, or None if Pillow is not installed."""
    try:
        import PIL.Image as pillow
    except ImportError:
        return None
    return pillow


def _of_png(picture: png.Png, content: bytes) -> np.ndarray:
    _refuse_several(picture.frames)
    samples = samples_of(picture, content)
    highest = int(samples.max())
    if picture.depth == 16 and 0 < highest < png.DARK:
        raise InputError(
            f"its 16-bit samples reach only {highest} of 65535, as from a 10- or 12-bit camera, and would be nearly "
            "black: scale them to the whole range, or save the picture with 8 bits"
        )
    return upright(png.rgb(picture, samples), orientation_of(picture.exif))


def samples_of(picture: png.Png, content: bytes) -> np.ndarray:
    """The samples stored in a PNG, like `png.samples_of`, but decoded by Pillow if it is installed, which is faster."""
    pillow = _pillow()
    if pillow is not None and (picture.depth == 8 or picture.is_palette):
        with suppress(Exception):  # whatever error some version of Pillow raises: our own reader decides
            with pillow.open(io.BytesIO(content)) as image:
                samples = np.array(image)
            samples = samples.reshape(*samples.shape[:2], -1)
            if samples.dtype == np.uint8 and samples.shape == picture.shape:
                return samples
    return png.samples_of(picture)


def _refuse_several(count: int) -> None:
    if count > 1:
        raise InputError(
            f"it holds {count} pictures (an animation, or pages): save the one you want as a file of its own"
        )


def _by_pillow(pillow: Any, content: bytes) -> np.ndarray:
    try:
        with pillow.open(io.BytesIO(content)) as image:
            _check(image)
            image.load()  # some versions of Pillow turn a TIFF here
            pixels = np.array(image.convert("RGB"))
            return upright(pixels, _orientation(image))
    except pillow.UnidentifiedImageError as error:
        raise InputError("not a picture that Pillow can read") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, pillow.DecompressionBombError) as error:
        raise InputError(f"not a picture that Pillow can read: {error}") from error


def _check(image: Any) -> None:
    if image.mode not in _MODES:
        raise InputError(f"it has mode {image.mode}: convert it to 8-bit RGB")
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, 8)
    if max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        raise InputError(f"it has mode {image.mode} of 16 bits a sample or more: convert it to 8-bit RGB")
    if image.width * image.height > png.MAX_PIXELS or max(image.size) > png.MAX_SIDE:
        raise InputError(f"it is {image.height} x {image.width}: at most {png.MAX_PIXELS} pixels are supported")
    if image.format in _SEVERAL:
        _refuse_several(getattr(image, "n_frames", 1))


def _orientation(image: Any) -> int:
    """The orientation from EXIF data, or from the tag of a TIFF that Pillow did not turn itself."""
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        return orientation_of(exif)
    found = getattr(image, "tag_v2", {}).get(_TIFF_ORIENTATION, UPRIGHT)
    return found if found in range(1, 9) else UPRIGHT


def write_labels(path: Path, labels: np.ndarray, colours: Sequence[Tuple[int, int, int]]) -> None:
    """Write labels (H, W) as a palette PNG whose pixel values are the labels. Raises InputError, PlaceError."""
    _write(path, png.write_png(labels, colours))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write RGB (H, W, 3) as a PNG. Raises InputError, PlaceError."""
    _write(path, png.write_png(pixels))


def _write(path: Path, content: bytes) -> None:
    """Write all of it or nothing."""
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
