"""A systemd user unit that runs the version in use on every frame that arrives, and restarts it when it ends."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import List, Optional

from mess_compile.runtime.base import user_dirs
from mess_compile.runtime.base.errors import InputError, one_line

_TEXT = """\
[Unit]
Description=mess-compile: labels for the frames in {folder}/live/in
StartLimitIntervalSec=0

[Service]
{environment}ExecStart={python} {folder}/current watch {folder}/live{options}
Restart=always
RestartSec=2

[Install]
WantedBy=default.target
"""
_PLAIN = re.compile(r"/[A-Za-z0-9_./+-]+")
_TIMEOUT_S = 30
_PATHS = ("PYTHONPATH", "LD_LIBRARY_PATH")
"""Variables by which a login shell finds numpy and the engine library; systemd does not read its start files."""


def check_paths(folder: Path, python: str) -> None:
    """Raises InputError for paths that a unit file cannot hold."""
    for path in (str(folder.absolute()), python):
        if _PLAIN.fullmatch(path) is None:
            raise InputError(
                f"{path} has characters that are special in a systemd unit: use a path of letters, digits and . _ - + /"
            )


def install(folder: Path, python: str, target: Optional[str] = None) -> str:
    """Write the unit, and have systemd start it now and at each login; returns what was done, or is left to do."""
    folder = folder.absolute()
    name = f"mess-{re.sub('[^A-Za-z0-9_.-]', '-', folder.name)}.service"
    own = user_dirs.settings()
    if own is None:
        return "the systemd unit was not written: there is no home folder; set XDG_CONFIG_HOME"
    settings = own / "systemd" / "user"
    settings.mkdir(parents=True, exist_ok=True)
    temporary = settings / f".{name}"
    options = "" if target is None else f" --target {target}"
    text = _TEXT.format(folder=folder, python=python, options=options, environment=_environment())
    changed = (settings / name).is_file() and (settings / name).read_bytes() != text.encode("utf-8")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, settings / name)
    for command in (["daemon-reload"], ["enable", "--now", name], *([["restart", name]] if changed else [])):
        reason = _refusal(["systemctl", "--user", *command])
        if reason is not None:
            return f"{settings / name} was written ({reason}): start it with `systemctl --user enable --now {name}`"
    return f"{name} is enabled; `loginctl enable-linger` keeps it running while nobody is logged in"


def _environment() -> str:
    """Lines for the variables that are set here, quoted for systemd."""
    values = {name: os.environ.get(name, "") for name in _PATHS}
    return "".join(f'Environment="{name}={_quoted(value)}"\n' for name, value in values.items() if _is_plain(value))


def _is_plain(value: str) -> bool:
    return bool(value) and value.isprintable()


def _quoted(value: str) -> str:
    return re.sub(r'["\\]', r"\\\g<0>", value).replace("%", "%%")


def _refusal(command: List[str]) -> Optional[str]:
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]}"
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        return one_line(error)
    return one_line(done.stderr) or "systemctl failed" if done.returncode else None
