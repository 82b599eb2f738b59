"""Refuses to judge a network by images that it was taught on."""

from __future__ import annotations

from mess_compile.data.dataset import DataSet
from mess_compile.runtime.base.errors import InputError
from mess_compile.runtime.bundle.manifest import OWN_OUTPUT

TAUGHT = "train"
"""The split of a data set of the network's own output that its exits were taught on."""


def refuse_taught(data: DataSet) -> None:
    """Raises InputError for images that the network was taught on."""
    if data.truth == OWN_OUTPUT and data.split.partition("[")[0] == TAUGHT:
        raise InputError(
            f"the exits were taught on split {data.split} of {data.root}, so that figures there say nothing of other "
            "images: use the images that were held back, --split val"
        )
