"""Picture files in and out: one reader decides everywhere which pictures are taken, and with which pixels.

PNGs are judged by our own reader, which needs no imaging library; Pillow, where it is installed, decodes them faster
and reads other files. EXIF orientation is applied: pixels are those that viewers and label tools show.
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
"""Why a file cannot be written while another one beside it can."""
_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1")
_TIFF_BITS, _TIFF_ORIENTATION = 258, 274
_SEVERAL = ("GIF", "WEBP", "TIFF", "PNG", "AVIF", "PSD")
"""Formats of Pillow that may hold several pictures of equal rank; in a JPEG (MPO) the first is the photograph."""


def read_picture(path: Path) -> np.ndarray:
    """An image file as uint8 RGB (H, W, 3), turned as its EXIF data say. Raises InputError naming the file."""
    content = read_content(path)
    try:
        return decoded(content)
    except InputError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def read_content(path: Path) -> bytes:
    """The bytes of a picture file. Raises InputError for what is missing, too large, or a pointer of Git LFS."""
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(f"{path} has {size} bytes, more than the {_MAX_BYTES} of any picture")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    refuse_pointer(path, content)
    return content


def decoded(content: bytes) -> np.ndarray:
    """What `read_picture` makes of the bytes of a file. Raises InputError."""
    if content.startswith(png.SIGNATURE):
        return _of_png(png.opened(content), content)
    pillow = _pillow()
    if pillow is None:
        raise InputError("not a PNG, and other pictures need Pillow: `pip install Pillow`, or convert it")
    return _by_pillow(pillow, content)


def _pillow() -> Any:
    """Pillow's module of pictures, None where it is not installed."""
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
            f"its 16-bit samples reach {highest} of 65535, as of a 10- or 12-bit camera, and would be nearly black: "
            "scale them to the whole range, or save it with 8 bits"
        )
    return upright(png.rgb(picture, samples), orientation_of(picture.exif))


def samples_of(picture: png.Png, content: bytes) -> np.ndarray:
    """The numbers stored in a PNG, as `png.samples_of`; by Pillow where it is installed, which is faster."""
    pillow = _pillow()
    if pillow is not None and (picture.depth == 8 or picture.is_palette):
        with suppress(Exception):  # whatever a library of some version finds: our own reader decides
            with pillow.open(io.BytesIO(content)) as image:
                samples = np.array(image)
            samples = samples.reshape(*samples.shape[:2], -1)
            if samples.dtype == np.uint8 and samples.shape == picture.shape:
                return samples
    return png.samples_of(picture)


def _refuse_several(count: int) -> None:
    if count > 1:
        raise InputError(f"it holds {count} pictures (an animation, or pages): save the one that is meant by itself")


def _by_pillow(pillow: Any, content: bytes) -> np.ndarray:
    try:
        with pillow.open(io.BytesIO(content)) as image:
            _check(image)
            image.load()  # some versions of Pillow turn a TIFF here
            pixels = np.array(image.convert("RGB"))
            return upright(pixels, _orientation(image))
    except pillow.UnidentifiedImageError as error:
        raise InputError("not a picture that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError, pillow.DecompressionBombError) as error:
        raise InputError(f"not a picture that Pillow reads: {error}") from error


def _check(image: Any) -> None:
    if image.mode not in _MODES:
        raise InputError(f"it has mode {image.mode}: convert it to 8-bit RGB")
    bits = getattr(image, "tag_v2", {}).get(_TIFF_BITS, 8)
    if max(bits if isinstance(bits, tuple) else (bits,)) > 8:
        raise InputError(f"it has mode {image.mode} of 16 bits a sample or more: convert it to 8-bit RGB")
    if image.width * image.height > png.MAX_PIXELS or max(image.size) > png.MAX_SIDE:
        raise InputError(f"it is {image.height} x {image.width}: {png.MAX_PIXELS} pixels are possible")
    if image.format in _SEVERAL:
        _refuse_several(getattr(image, "n_frames", 1))


def _orientation(image: Any) -> int:
    """As said by EXIF data, or by the tag of a TIFF that Pillow did not turn itself."""
    exif = image.info.get("exif")
    if isinstance(exif, bytes):
        return orientation_of(exif)
    found = getattr(image, "tag_v2", {}).get(_TIFF_ORIENTATION, UPRIGHT)
    return found if found in range(1, 9) else UPRIGHT


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
