"""The names of this machine's CPU: `host` in every file, and `cpu`, which commands take as well."""

from __future__ import annotations

HOST = "host"
_ALIASES = {"cpu": HOST}


def stored_name(device: str) -> str:
    """The name that a device has in files; a target such as `cpu:fp32` keeps its precision."""
    name, colon, precision = device.partition(":")
    return f"{_ALIASES.get(name, name)}{colon}{precision}"
