"""A process of a user whom the system does not know, as in a container."""

from __future__ import annotations

import pytest


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no home folder is known, and none is named for settings or what is kept."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
