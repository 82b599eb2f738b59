"""Finds the user's folders. The home folder may be unknown: in a container, the user may have no passwd entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional


def home() -> Optional[Path]:
    try:
        return Path.home()
    except RuntimeError:
        return None


def settings() -> Optional[Path]:
    return _named("XDG_CONFIG_HOME", ".config")


def cache() -> Optional[Path]:
    return _named("XDG_CACHE_HOME", ".cache")


def _named(variable: str, usual: str) -> Optional[Path]:
    place = os.environ.get(variable)
    if place:
        return Path(place)
    own = home()
    return None if own is None else own / usual
