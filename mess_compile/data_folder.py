"""Describes which data to read: a folder, the names of its folders of images and labels, and where labels begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

from mess_compile.runtime.base.errors import InputError

IMAGES, LABELS = "images", "labels"
MOST_OFFSET = 254


@dataclass(frozen=True)
class DataFolder:
    """A folder of labelled images, as named on the command line; None means the remembered value, or the default.

    `images` and `labels` are the names of the folders of a plain data set. With a `label_offset` of N the label value N
    is the first class, and smaller values are void.
    """

    root: Path | None = None
    images: str | None = None
    labels: str | None = None
    label_offset: int | None = None

    def __post_init__(self) -> None:
        for option, name in (("--images", self.images), ("--labels", self.labels)):
            if name is not None and not _is_inside(name):
                raise InputError(
                    f"{option} {name!r} is not the name of a folder in the data folder: such as {option} frames"
                )
        if self.images is not None and self.images == self.labels:
            raise InputError(f"--images and --labels both name {self.images!r}: images and labels need a folder each")
        if self.label_offset is not None and not 0 <= self.label_offset <= MOST_OFFSET:
            raise InputError(
                f"--label-offset {self.label_offset} is not 0 to {MOST_OFFSET}: give 1 if labels begin at 1"
            )

    @property
    def names(self) -> tuple[str, str]:
        """The names of the folders of images and labels."""
        return self.images or IMAGES, self.labels or LABELS

    @property
    def is_plain(self) -> bool:
        """Whether the user declared it to consist of folders of images and labels."""
        return self.names != (IMAGES, LABELS)


Data = Path | DataFolder
"""A folder by its path alone, or with how it is read."""


def data_folder(data: Data) -> DataFolder:
    """A bare path is a folder with default options."""
    return data if isinstance(data, DataFolder) else DataFolder(data)


def _is_inside(name: str) -> bool:
    parts = PurePath(name).parts
    return bool(parts) and ".." not in parts and not PurePath(name).is_absolute() and "\0" not in name
